import numpy as np
import pytest

from dodgeburn.measure.distances import pixel_distance, reader_distance
from dodgeburn.measure.fidelity import (
    expected_shares,
    fidelity,
    graded_spearman,
    marginal_tv,
    named_accuracy,
    planted_shares,
    satisfied,
    shares_read,
    total_variation,
)
from dodgeburn.measure.pareto import pareto_front
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, draw_attributes
from dodgeburn.pocket.captions import caption, parse
from dodgeburn.pocket.reader import Readings


def readings_of(pictures: list[dict], unreadable: list[int] | None = None) -> Readings:
    """What a perfect reader would see in pictures with these attributes."""
    values = {k: np.array([a[k] for a in pictures], np.float32) for k in CONTINUOUS}
    values |= {k: np.array([a[k] for a in pictures]) for k in (*CATEGORICAL, "fingers")}
    blind = np.zeros(len(pictures), bool)
    blind[unreadable or []] = True
    return Readings(values, {k: np.ones(len(pictures), np.float32) for k in values}, blind)


def world(n: int, seed: int = 0, **planted) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [draw_attributes(rng, **planted) for _ in range(n)]


def test_perfect_pictures_have_fidelity_one() -> None:
    rng = np.random.default_rng(1)
    pictures = world(200)
    captions = [caption(a, rng) for a in pictures]
    asked = [parse(text) for text, _ in captions]
    assert asked == [wish for _, wish in captions]
    found = fidelity(asked, readings_of(pictures))
    for wish, value in zip(asked, found, strict=True):
        assert value == 1 if wish else np.isnan(value)


def test_fidelity_counts_attributes_and_unreadable_pictures() -> None:
    a = world(3)
    for picture in a:
        picture.update(hair_colour="red", smile=0.95, glasses="none")
    asked = [{"hair_colour": "red", "smile": (0.0, 0.2), "glasses": "none"}, {"hair_colour": "red"}, {}]
    found = fidelity(asked, readings_of(a, unreadable=[1]))
    assert found[0] == pytest.approx(2 / 3) and found[1] == 0 and np.isnan(found[2])


def test_tolerance_is_half_a_word_on_both_sides() -> None:
    read = np.array([0.29, 0.3, 0.5, 0.7, 0.71], np.float32)
    assert satisfied("smile", (0.4, 0.6), read).tolist() == [False, True, True, True, False]
    assert satisfied("smile", (0.4, 0.6), read, tolerance=0.0).tolist() == [False, False, True, False, False]
    assert satisfied("hat", "cap", np.array(["cap", "crown"])).tolist() == [True, False]


def test_named_accuracy_counts_unreadable_as_wrong() -> None:
    a = world(4)
    for picture, hat in zip(a, ("cap", "cap", "crown", "cap"), strict=True):
        picture["hat"] = hat
    asked = [{"hat": "cap"}, {"hat": "cap"}, {"hat": "cap"}, {}]
    assert named_accuracy(asked, readings_of(a, unreadable=[1])) == {"hat": (pytest.approx(1 / 3), 3)}


def test_spearman_follows_the_order_asked() -> None:
    a = world(60)
    asked = [{"smile": (0.2 * (i % 5), 0.2 * (i % 5) + 0.2)} for i in range(60)]
    for i, picture in enumerate(a):
        picture["smile"] = 0.2 * (i % 5) + 0.1
    assert graded_spearman(asked, readings_of(a))["smile"] == (pytest.approx(1.0), 60)
    for picture in a:
        picture["smile"] = 1 - picture["smile"]
    assert graded_spearman(asked, readings_of(a))["smile"][0] == pytest.approx(-1.0)
    for picture in a:
        picture["smile"] = 0.4
    assert graded_spearman(asked, readings_of(a))["smile"][0] == 0
    half = graded_spearman(asked, readings_of(world(60, 3), unreadable=list(range(60))))
    assert half["smile"][0] == 0


def test_marginals_of_the_world_are_near_and_a_skew_is_seen() -> None:
    a = world(3000)
    asked: list = [{} for _ in a]
    near = marginal_tv(asked, readings_of(a))
    assert set(near) == {*CONTINUOUS, *CATEGORICAL, "fingers"}
    assert max(tv for tv, _ in near.values()) < 0.05
    assert near["fingers"][1] == sum(picture["fingers"] > 0 for picture in a)
    for picture in a:
        picture["background"] = "blue"
        picture["zoom"] *= 0.2
    skewed = marginal_tv(asked, readings_of(a))
    assert skewed["background"][0] == pytest.approx(1 - expected_shares("background")[0])
    assert skewed["zoom"][0] == pytest.approx(0.8)


def test_marginals_leave_out_named_and_unreadable_pictures() -> None:
    a = world(3)
    found = marginal_tv([{"hat": "cap"}, {}, {}], readings_of(a, unreadable=[1]))
    assert found["hat"][1] == 1 and found["smile"][1] == 2


def test_planted_shares_see_the_ties() -> None:
    a = world(2500)
    asked = [{"outfit": picture["outfit"]} for picture in a]
    shares = planted_shares(asked, readings_of(a))
    assert len(shares) == 3
    for share, n in shares.values():
        assert n > 300 and share == pytest.approx(0.95, abs=0.03)
    free = world(2500, planted=())
    loose = planted_shares([{"outfit": picture["outfit"]} for picture in free], readings_of(free))
    assert loose["gardener: background = green"][0] == pytest.approx(1 / 6, abs=0.06)


def test_total_variation_and_bins() -> None:
    assert total_variation(np.array([1, 0]), np.array([0, 1])) == 1
    assert shares_read("age", np.array([0.0, 0.19, 0.2, 1.0])).tolist() == [0.5, 0.25, 0, 0, 0.25]
    assert shares_read("fingers", np.array([5, 5, 4, 0])).tolist() == [0, 1 / 3, 2 / 3, 0, 0]


def test_reader_distance_by_hand() -> None:
    a = world(1)[0]
    n = len(CONTINUOUS) + len(CATEGORICAL) + 1
    b = {
        **a,
        "hat": "crown" if a["hat"] != "crown" else "cap",
        "smile": a["smile"] + (0.3 if a["smile"] < 0.5 else -0.3),
    }
    one, two = readings_of([a]), readings_of([b])
    assert reader_distance(one, two)[0] == pytest.approx(1.3 / n, abs=1e-6)
    assert reader_distance(one, one)[0] == 0
    assert reader_distance(readings_of([a], unreadable=[0]), one)[0] == 1
    assert np.isnan(reader_distance(one, readings_of([a], unreadable=[0]))[0])


def test_unrelated_pictures_are_as_far_apart_as_documented() -> None:
    found = reader_distance(readings_of(world(2000, 1)), readings_of(world(2000, 2)))
    assert found.mean() == pytest.approx(0.46, abs=0.01)


def test_pixel_distance() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    white = np.full_like(black, 255)
    assert pixel_distance(black, white).tolist() == [1, 1]
    assert pixel_distance(white, white).tolist() == [0, 0]
    half = black.copy()
    half[:, :, :2] = 255
    assert pixel_distance(half, black)[0] == pytest.approx(np.sqrt(0.5))
    with pytest.raises(ValueError):
        pixel_distance(black, white[:1])


def test_pareto_front() -> None:
    points = np.array([[1, 0], [0, 1], [0.4, 0.4], [0.5, 0.5], [0.5, 0.5], [np.nan, 2]])
    assert pareto_front(points).tolist() == [True, True, False, True, True, False]
