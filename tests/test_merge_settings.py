"""One set of settings for merge, dry run, recipes and the command line: one spelling, one-line refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

import dodgeburn as db
from dodgeburn.errors import UserError
from dodgeburn.merge.run import dry_run
from dodgeburn.merge.settings import MergeSettings


def test_names_are_brought_to_one_spelling() -> None:
    found = MergeSettings.of(preset="grad_v", method="Weighted-Sum", keep="vae, text", blocks={"in04": "0.25"}, base=1)
    assert (found.preset, found.method, found.keep) == ("GradV", "weighted_sum", ("text", "vae"))
    assert found.blocks == {"IN04": 0.25} and found.base == 1.0
    assert MergeSettings.of(**found.model_dump()) == found
    assert found.but(base=None, keep=()) == MergeSettings.of(preset="GradV", blocks={"IN04": 0.25})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"presets": "GradV"}, "presets is not known: did you mean preset"),
        ({"xl_presets": "stretch"}, "xl_presets is 'stretch': expected one of 'curve', 'cut'"),
        ({"seed": "one"}, "seed is 'one': expected a whole number"),
        ({"blocks": ["IN00"]}, "blocks is .*: expected a mapping"),
        ({"blocks": {"IN00": 2}}, "block IN00 is 2"),
        ({"dtype": "int8"}, "no output type is named 'int8'"),
        ({"base": True}, "base is True"),
        ({"params": {"beta": "much"}}, "params.beta is 'much': expected a number"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(options: dict[str, object], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        MergeSettings.of(**options)
    assert "\n" not in str(caught.value)


def test_settings_and_keywords_say_the_same(tmp_path: Path) -> None:
    settings = MergeSettings.of(preset="Cosine", base=0.4, keep="vae")
    one = dry_run("pocket-style", "pocket-bold", None, settings)
    assert one[1] == dry_run("pocket-style", "pocket-bold", preset="Cosine", base=0.4, keep="vae")[1]
    other = dry_run("pocket-style", "pocket-bold", None, settings, base=0.6)[0]
    assert (other.settings.preset, other.blocks["BASE"], one[0].blocks["BASE"]) == ("Cosine", 0.6, 0.4)
    with pytest.raises(UserError, match="presett is not known: did you mean preset"):
        db.merge("pocket-style", "pocket-bold", tmp_path / "m.safetensors", presett="Cosine")
    assert not list(tmp_path.iterdir())
