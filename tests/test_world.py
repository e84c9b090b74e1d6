"""The pocket world: deterministic, every attribute shows, planted ties have their size."""

import numpy as np
import pytest

from dodgeburn.pocket.attributes import (
    CATEGORICAL,
    CONTINUOUS,
    FINGER_COUNTS,
    PLANTED,
    draw_attributes,
    marginal,
    shares,
    tied_shares,
)
from dodgeburn.pocket.pictures import attributes_of, draw_pictures
from dodgeburn.pocket.world import render


def some(n: int, seed: int = 0) -> list[dict]:
    return [attributes_of(i, seed) for i in range(n)]


def test_the_world_is_as_large_as_promised() -> None:
    assert len(CONTINUOUS) >= 10 and len(CATEGORICAL) >= 6 and "style" in CATEGORICAL
    assert len(CONTINUOUS) + len(CATEGORICAL) >= 18


def test_same_attributes_same_bytes_and_a_list_does_not_depend_on_its_length() -> None:
    a = some(3)
    assert a == some(9)[:3]
    assert all((render(x, s) == render(x, s)).all() for x in a for s in (64, 128))
    assert (draw_pictures(a, 64) == np.stack([render(x, 64) for x in a])).all()


@pytest.mark.parametrize("size", [64, 128])
def test_both_sizes_show_the_same_picture(size: int) -> None:
    a = {**some(1)[0], "sharpness": 1.0}
    picture = render(a, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    small = render(a, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - render(a, 64)).mean() < 3


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64 or 128"):
        render(some(1)[0], 96)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_continuous_attribute_shows(name: str) -> None:
    change = [np.abs(render({**a, name: 0.0}).astype(int) - render({**a, name: 1.0})).mean() for a in some(12)]
    nearby = [np.abs(render({**a, name: 0.40}).astype(int) - render({**a, name: 0.60})).mean() for a in some(12)]
    assert min(change) > 0.1 and np.mean(change) > 0.5 and np.mean(nearby) > 0.1


@pytest.mark.parametrize("name", CATEGORICAL)
def test_every_categorical_value_shows(name: str) -> None:
    a = {**some(1, 5)[0], "fingers": 5, "beard": 0.0}
    pictures = [render({**a, name: v}).astype(int) for v in CATEGORICAL[name]]
    for i, p in enumerate(pictures):
        for q in pictures[:i]:
            assert np.abs(p - q).mean() > 0.5


def test_each_finger_changes_the_hand_and_nothing_else() -> None:
    a = {**some(1)[0], "hand": "waving", "sharpness": 1.0}
    hands = {n: render({**a, "fingers": n}).astype(int) for n in FINGER_COUNTS}
    for n in FINGER_COUNTS[1:]:
        change = np.abs(hands[n] - hands[n - 1]).sum(-1)
        assert change.max() > 60
        assert change[:, :34].max() == 0 and change[:28].max() == 0


def test_planted_ties_and_marginals_have_their_size() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_attributes(rng) for _ in range(12000)]
    for tie in PLANTED:
        assert tie.share == 0.95
        with_outfit = [a for a in drawn if a["outfit"] == tie.outfit]
        assert abs(np.mean([a[tie.attribute] == tie.value for a in with_outfit]) - 0.95) < 0.02
        assert np.isclose(tied_shares(tie).sum(), 1)
    for name, values in CATEGORICAL.items():
        seen = np.array([np.mean([a[name] == v for a in drawn]) for v in values])
        assert np.abs(seen - marginal(name)).max() < 0.015
        assert np.isclose(marginal(name).sum(), 1)
    hands = [a["fingers"] for a in drawn if a["hand"] == "waving"]
    assert abs(np.mean([f != 5 for f in hands]) - 0.30) < 0.03
    assert all(a["fingers"] == 0 for a in drawn if a["hand"] == "none")


def test_planting_can_be_switched_off() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_attributes(rng, planted=()) for _ in range(6000)]
    doctors = [a for a in drawn if a["outfit"] == "doctor"]
    assert abs(np.mean([a["glasses"] == "glasses" for a in doctors]) - shares("glasses")[1]) < 0.05
