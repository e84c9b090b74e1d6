"""What a schema refuses is said in one line: the setting, what it was, what to give instead."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem, read_yaml


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    share: float = Field(default=0.5, ge=0, le=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    rank: int = Field(default=4, ge=1)
    decay: float = Field(default=0.0, ge=0, lt=1)
    rate: float | None = Field(default=None, gt=0)
    most: int = Field(default=1, le=9)
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    flips: bool = False
    inner: Inner | None = None
    word: str = Field(default="x", min_length=1)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if "/" in value:
            raise ValueError(f"{value!r} is no file name")
        return value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "rank is 0: expected a whole number from 1 up"),
        ({"rank": "x"}, "rank is 'x': expected a whole number"),
        ({"rank": 1.5}, "rank is 1.5: expected a whole number"),
        ({"decay": 1.0}, "decay is 1: expected a number from 0, but below 1"),
        ({"decay": -1}, "decay is -1: expected a number from 0, but below 1"),
        ({"rate": 0.0}, "rate is 0: expected a number above 0"),
        ({"most": 10}, "most is 10: expected a whole number of 9 at most"),
        ({"loss": "l2"}, "loss is 'l2': expected one of 'sigmoid', 'hinge'"),
        ({"flips": "maybe"}, "flips is 'maybe': expected true or false"),
        ({"inner": {"share": 2}}, "inner.share is 2: expected a number from 0 to 1"),
        ({"inner": {"shar": 2}}, "inner.shar is not known: did you mean share?"),
        ({"zzz": 2}, "zzz is not known: expected one of name, rank, decay, rate, most, loss, flips, inner and 1 more"),
        ({"inner": {"zzz": 2}}, "inner.zzz is not known: expected one of share"),
        ({"inner": 3}, "inner is 3: expected a mapping"), ({"word": ""}, "word is empty: expected text"),
        ({"name": "a/b"}, "name: 'a/b' is no file name"), ({"name": ["a" * 200]}, "…: expected text"),
    ],
)  # fmt: skip
def test_one_line_says_what_and_what_instead(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer(**{"name": "a", **changes})
    line = first_problem(caught.value, Outer)
    assert said in line and "\n" not in line and len(line) < 200


def test_what_is_missing_or_spelled_otherwise() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer()  # type: ignore[call-arg]
    assert first_problem(caught.value) == "name is missing"
    with pytest.raises(ValidationError) as caught:
        Outer(name="a", rank=0)
    assert first_problem(caught.value, spelled=lambda name: f"--{name}").startswith("--rank is 0: expected a number")
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json("{")
    assert first_problem(caught.value).startswith("the text is '{': expected")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: " + b"[" * 3000 + b"]" * 3000, "cannot be read as YAML"),  # deeper than Python's stack
        (b"a: [1, }", "cannot be read as YAML"),
        (b"\xff\xfe", "cannot be read as YAML"),
        (b"- 1", "no mapping: expected a name"),
        (None, "is not there: expected a spec"),
    ],
)
def test_a_yaml_file_that_is_none_is_said(text: bytes | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(UserError, match=said):
        read_yaml(tmp_path / "a.yaml", "a spec", "a name")
