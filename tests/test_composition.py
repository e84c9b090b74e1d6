"""Which combinations keep all their directions: hand-made moves, then real pictures of a tiny model."""

import numpy as np
import pytest
from test_edits import FAST, strong_adapter
from tiny import tiny_model

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.reader import Readings
from dodgeburn.slide import composition
from dodgeburn.slide.composition import Member, asked_moves, kept, kept_by_picture, kept_by_prompt, patterns
from dodgeburn.slide.edits import Unedited
from dodgeburn.slide.splits import Split


def test_all_patterns_of_signs_take_turns() -> None:
    signs = patterns(2, 2, 4)
    assert sorted(map(tuple, signs[0])) == sorted(map(tuple, signs[1])) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert not np.array_equal(signs[0], signs[1])


def test_asked_moves_follow_the_sign_and_unreadable_is_no_move() -> None:
    read, plain = np.array([[0.7, 0.2, np.nan]]), np.array([[0.5, 0.5, 0.5]])
    assert asked_moves(read, plain, np.array([[1, -1, 1]])) == pytest.approx(np.array([[0.2, 0.3, 0.0]]))


def test_kept_by_prompt_and_picture() -> None:
    alone = np.full((4, 2, 2), 0.2)
    together = np.array([
        [[0.2, 0.2], [0.1, 0.1]],  # both well above half on average
        [[0.2, 0.09], [0.2, 0.1]],  # the second: 0.095 on average
        [[0.2, -0.2], [0.2, 0.4]],  # 0.1 on average is just half
        [[0.0, 0.2], [0.0, 0.2]],
    ])  # fmt: skip
    assert kept_by_prompt(together, alone).tolist() == [True, False, True, False]
    assert kept_by_picture(together, alone).tolist() == [[True, True], [False, True], [False, True], [False, False]]


def test_a_slider_that_goes_the_wrong_way_alone_keeps_nothing() -> None:
    assert not kept_by_prompt(np.full((1, 1, 2), 0.2), np.array([[[0.2, -0.1]]])).any()


class Colours:
    """Reads smile from red and age from green."""

    def read(self, pictures, /):
        mean = pictures.reshape(len(pictures), -1, 3).mean(1) / 255
        values = {name: np.full(len(pictures), 0.5) for name in CONTINUOUS}
        values |= {name: np.full(len(pictures), options[0]) for name, options in CATEGORICAL.items()}
        return Readings({**values, "smile": mean[:, 0], "age": mean[:, 1]}, {}, np.zeros(len(pictures), bool))


def coloured(rule):
    """In place of drawing: red and green pictures by a rule of the two sliders' scales."""

    def draw(model, prompts, seeds, settings, applied, *_):
        pairs = zip(applied[0].scale, applied[1].scale, strict=True)
        return np.array([[[[*rule(a, b), 0]]] for a, b in pairs], np.uint8)

    return draw


@pytest.mark.parametrize("rule, prompts, pictures", [
    (lambda a, b: (128 + 40 * a, 128 + 40 * b), 1.0, 1.0),  # effects add
    (lambda a, b: (128 + 40 * a * (b > 0), 128 + 40 * b), 1.0, 0.5),  # one is lost in half of the patterns: just kept
    (lambda a, b: (128 + 40 * a * (b > 0) - 1, 128 + 40 * b - b), 1.0, 0.5),
    (lambda a, b: (128 + 40 * a, 128 - 40 * b), 0.0, 0.0),  # the second turns round
    (lambda a, b: (128 + 40 * a, 128 + 19 * b), 0.0, 0.0),  # the second is less than half of itself
])  # fmt: skip
def test_kept_counts_over_all_patterns(monkeypatch, rule, prompts, pictures) -> None:
    monkeypatch.setattr(composition, "draw", coloured(rule))
    model = tiny_model()
    members = [Member(strong_adapter(model, 1), "smile"), Member(strong_adapter(model, 2), "age")]
    split = Split(["a", "b"], [1, 2, 3, 4])
    alone = dict.fromkeys((0, 1), np.broadcast_to(np.array([88, 128, 168]) / 255, (2, 4, 3)))
    found = kept(model, members, 2, split, Colours(), Unedited(model, FAST), alone)
    assert found.prompts.mean == prompts and found.pictures.mean == pictures
    assert found.by_combination == {"random 1 + random 2": prompts}


def test_a_slider_that_does_nothing_is_not_kept() -> None:
    model = tiny_model()
    members = [Member(strong_adapter(model, 1), "smile"), Member(strong_adapter(model, 2), "age", start=0.0)]
    found = kept(model, members, 2, Split(["a", "b"], [1, 2]), Colours(), Unedited(model, FAST))
    assert found.prompts.mean == 0.0 and found.pictures.mean == 0.0
