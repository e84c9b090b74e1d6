"""A user's own scorer: any Python file will do, and whatever goes wrong in it is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dodgeburn.errors import UserError
from dodgeburn.measure.own_scorer import own_scorer

FILE = """
from __future__ import annotations
import sys
from dataclasses import dataclass

@dataclass
class Weights:
    red: float = 2.0

def red(pictures, prompts):
    return Weights().red * pictures[..., 0].mean((1, 2))

def late(pictures, prompts):
    from neighbour import number
    return [number] * len(pictures)

def paints(pictures, prompts):
    pictures[:] = 0
    return [0.0] * len(pictures)

def endless(pictures, prompts):
    return [0.0, float("inf")]

def unknown(pictures, prompts):
    return [0.0, float("nan")]

def long(pictures, prompts):
    raise RuntimeError("first line\\nsecond line")

def leaves(pictures, prompts):
    sys.exit(3)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("number = 7.0\n")
    return np.stack([np.full((8, 8, 3), v, np.uint8) for v in (9, 3)])


def test_a_file_may_have_dataclasses_and_import_its_neighbours_late(pictures: np.ndarray, tmp_path: Path) -> None:
    assert own_scorer(f"{tmp_path}/own.py:red")[0](pictures, ["", ""]).tolist() == [18, 6]
    assert own_scorer(f"{tmp_path}/own.py:late")[0](pictures, ["", ""]).tolist() == [7, 7]


def test_pictures_stay_as_they_are(pictures: np.ndarray, tmp_path: Path) -> None:
    own_scorer(f"{tmp_path}/own.py:paints")[0](pictures, ["", ""])
    assert pictures.max() == 9


@pytest.mark.parametrize(
    "name, said",
    [("endless", "answered with inf"), ("long", "RuntimeError: first line second line"), ("leaves", "SystemExit: 3")],
)
def test_what_goes_wrong_is_one_line(name: str, said: str, pictures: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        own_scorer(f"{tmp_path}/own.py:{name}")[0](pictures, ["", ""])
    assert "\n" not in str(caught.value)


def test_a_picture_may_stay_without_a_number(pictures: np.ndarray, tmp_path: Path) -> None:
    assert np.isnan(own_scorer(f"{tmp_path}/own.py:unknown")[0](pictures, ["", ""])).tolist() == [False, True]
