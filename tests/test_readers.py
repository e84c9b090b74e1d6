"""The shipped readers read fresh drawings and refuse junk (`dodgeburn pocket evaluate --reader` measures in full)."""

import numpy as np
import pytest

from dodgeburn.errors import UserError
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.pictures import attributes_of, draw_pictures
from dodgeburn.pocket.reader import READERS, Reader, Readings, network
from dodgeburn.training.pocket_gate import agreement, held, measure
from dodgeburn.training.pocket_readers import JUNK, grade, junk, junk_unreadable

N = 240
ATTRIBUTES = [attributes_of(i, 1234) for i in range(N)]


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    return draw_pictures(ATTRIBUTES, 64)


@pytest.mark.parametrize("name", READERS)
def test_reads_fresh_drawings(name: str, drawings: np.ndarray) -> None:
    result = grade(Reader.load(name).read(drawings), ATTRIBUTES)
    assert result["categorical_accuracy"] > 0.98
    assert result["finger_accuracy"] > 0.93
    assert result["rmse_worst"] < 0.09
    assert result["unreadable"] < 0.02


@pytest.mark.parametrize("name", READERS)
def test_refuses_junk(name: str, drawings: np.ndarray) -> None:
    shares = junk_unreadable(Reader.load(name), drawings, 5)
    assert set(shares) == set(JUNK) and min(shares.values()) > 0.95


def test_larger_pictures_are_read_like_small_ones(drawings: np.ndarray) -> None:
    large = draw_pictures(ATTRIBUTES[:60], 128)
    reader = Reader.load("judge")
    small, big = reader.read(drawings[:60]), reader.read(large)
    for name in CATEGORICAL:
        assert np.mean(small.values[name] == big.values[name]) > 0.95


def test_reading_does_not_depend_on_the_batch(drawings: np.ndarray) -> None:
    reader = Reader.load("reader")
    all_at_once, one_by_one = reader.read(drawings[:6]), reader.read(drawings[:6], batch=1)
    for name in CONTINUOUS:
        assert np.allclose(all_at_once.values[name], one_by_one.values[name], atol=1e-4)


def test_no_pictures_give_no_readings() -> None:
    readings = Reader.load("reader").read(np.zeros((0, 64, 64, 3), np.uint8))
    assert len(readings) == 0 and len(readings.values["smile"]) == 0


def test_the_two_are_built_differently() -> None:
    one, other = network("reader"), network("judge")
    assert type(one) is not type(other)
    assert {tuple(p.shape) for p in one.body.parameters()} != {tuple(p.shape) for p in other.face.parameters()}
    with pytest.raises(UserError, match="reader or judge"):
        network("umpire")


@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_no_portrait(kind: str, drawings: np.ndarray) -> None:
    made = junk(kind, drawings[:8], np.random.default_rng(0))
    assert made.shape == (8, 64, 64, 3) and made.dtype == np.uint8
    assert np.abs(made.astype(int) - drawings[:8]).mean() > 5


def perfect(attributes: list[dict], unreadable: np.ndarray | None = None) -> Readings:
    values = {k: np.array([a[k] for a in attributes]) for k in (*CONTINUOUS, *CATEGORICAL, "fingers")}
    confidence = {k: np.ones(len(attributes), np.float32) for k in values}
    return Readings(values, confidence, np.zeros(len(attributes), bool) if unreadable is None else unreadable)


def test_grade_by_hand() -> None:
    result = grade(perfect(ATTRIBUTES), ATTRIBUTES)
    assert result["categorical_accuracy"] == result["finger_accuracy"] == 1 and result["rmse_worst"] == 0
    unreadable = np.arange(N) % 4 == 0
    result = grade(perfect(ATTRIBUTES, unreadable), ATTRIBUTES)
    assert result["categorical_accuracy"] == pytest.approx(0.75) and result["unreadable"] == 0.25
    assert result["rmse_worst"] == pytest.approx(0.25)  # a quarter of errors of 0.5


def test_the_gate_by_hand() -> None:
    rows = [{"prompt": f"{style} style, {words}", "seed": i} for i, (style, words) in enumerate(
        [("flat", "smiling broadly"), ("comic", "slightly smiling"), ("poster", "frowning deeply"), ("flat", "doctor")]
    )]  # fmt: skip
    attributes = [dict(ATTRIBUTES[i]) for i in range(4)]
    for a, style, smile in zip(attributes, ("flat", "comic", "flat", "flat"), (0.9, 0.7, 0.1, 0.5), strict=True):
        a |= {"style": style, "smile": smile, "outfit": "doctor", "glasses": "glasses"}
    result = measure(rows, perfect(attributes))
    assert result["categorical_accuracy"] == pytest.approx(4 / 5)  # four styles and a doctor, one style wrong
    assert result["categorical_worst"] == pytest.approx(3 / 4)
    assert result["spearman"]["smile"] == pytest.approx(1)
    assert result["planted_shares"]["doctor: glasses = glasses"] == 1
    assert held({"a": 0.5, "b": 0.5, "c": None}, (("a", 0.4, True), ("b", 0.4, False), ("c", 1, True))) == {
        "a": True, "b": False,
    }  # fmt: skip


def test_agreement_leaves_out_what_either_cannot_read() -> None:
    one, other = perfect(ATTRIBUTES[:4]), perfect(ATTRIBUTES[:4], np.array([True, False, False, False]))
    other.values["style"] = other.values["style"].copy()
    other.values["style"][0] = other.values["style"][1] = "none of them"
    result = agreement(one, other)
    assert result["agreement_by_attribute"]["style"] == pytest.approx(2 / 3)
    assert result["readable_by_both"] == 0.75
