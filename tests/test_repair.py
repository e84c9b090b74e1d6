"""Repairs of fingers: what counts as five, what stands in files, what a slider does off its class."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dodgeburn.checkpoint.slider_card import SliderCard, card_lines
from dodgeburn.errors import UserError
from dodgeburn.measure.intervals import bootstrap_ratio
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Reader, Readings
from dodgeburn.slide import repair
from dodgeburn.slide.off_class import Sides, measure_off_class, sides_of, subject_of
from dodgeburn.slide.readings import attribute_of, values_of
from dodgeburn.slide.splits import FIRST_EVALUATION_SEED, Split, evaluation_split, hands_split, shows
from dodgeburn.slide.sweep import read_values, sheet, strips

SPLIT = Split(["a face, waving", "a doctor, waving"], [0, 1])


def readings(fingers: list[int], unreadable: list[bool] | None = None) -> Readings:
    return Readings({"fingers": np.array(fingers)}, {}, np.array(unreadable or [False] * len(fingers)))


class Repairs:
    """Stands for an edit and its reader: the picture is the row itself, and has 4 fingers below its prompt's scale."""

    needed = {"a face, waving": 1.0, "a doctor, waving": 2.0}

    def __init__(self) -> None:
        self.asked: list[float] = []

    def pictures(self, prompts, seeds, strengths) -> np.ndarray:
        self.asked += list(strengths)
        # The first prompt's seed 1 is right from the beginning.
        return np.array([
            5 if s >= self.needed[p] or (p, seed) == ("a face, waving", 1) else 4
            for p, seed, s in zip(prompts, seeds, strengths, strict=True)
        ])  # fmt: skip

    def read(self, pictures: np.ndarray) -> Readings:
        return readings(list(pictures))


def test_only_a_readable_hand_with_five_fingers_counts() -> None:
    found = repair.shows_five(readings([5, 4, 0, 5, 6], [False, False, False, True, False]))
    assert found.tolist() == [1, 0, 0, 0, 0]


def test_before_after_and_gain() -> None:
    edit = Repairs()
    found = repair.as_json(repair.evaluate_repair(edit, SPLIT, edit, name="fix", scales=[2.0]))
    assert (found["five_fingers_before"], found["five_fingers_after"], found["five_fingers_gain"]) == (0.25, 0.5, 0.25)
    assert found["curve"] == [[0.0, 0.25], [1.0, 0.5], [2.0, 1.0]] and set(edit.asked) == {0.0, 1.0, 2.0}
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high, name
    assert found["off_class_effect"] is None and json.loads(json.dumps(found)) == found


def test_certificate_and_words() -> None:
    edit = Repairs()
    found = repair.evaluate_repair(edit, SPLIT, edit, name="fix", scales=[2.0])
    card = SliderCard(name="fix", attribute="fingers", certificate=repair.certificate_of(found))
    assert SliderCard(**json.loads(card.as_metadata()["dodgeburn.slider"])) == card
    [line] = [line for line in card_lines(card) if "certificate" in line]
    assert "judge, 4 sweeps, 2 seeds" in line and "five fingers before 25.0% [" in line and "after 50.0% [" in line
    said = repair.summary(found)
    assert "25.0% [" in said and "2: 100.0%" in said and "read by the judge" in said


def test_drawn_pairs_differ_in_the_hand_alone(tmp_path: Path) -> None:
    repair.draw_hand_pairs(tmp_path, 4)
    sides = {
        side: np.stack([np.asarray(Image.open(tmp_path / side / f"{i}.png")) for i in range(4)])
        for side in ("before", "after")
    }
    judge = Reader.load("judge")
    assert judge.read(sides["before"]).values["fingers"].tolist() == [3, 4, 6, 7]
    assert repair.shows_five(judge.read(sides["after"])).all()
    changed = (sides["before"] != sides["after"]).any((0, 3))
    assert changed.any() and not changed[:, :30].any()  # the hand is on the right


def test_fingers_have_no_unit_but_a_number() -> None:
    with pytest.raises(UserError, match="right or wrong"):
        attribute_of("fingers")
    with pytest.raises(UserError, match="did you mean 'fingers'|did you mean fingers"):
        attribute_of("finger")
    assert values_of(readings([5, 3], [False, True]), "fingers") == pytest.approx([5, np.nan], nan_ok=True)


def test_sheets_say_how_many_fingers() -> None:
    slider = SimpleNamespace(name="fix", card=SliderCard(name="fix", attribute="fingers"))
    plan = strips([slider], ["p"], [1], [0.0, 1.0])
    reader = SimpleNamespace(read=lambda pictures: readings([4, 5], [True, False]))
    pictures = [[np.zeros((8, 8, 3), np.uint8)] * 2]
    values = read_values([slider], pictures, reader)
    assert values == [[{"fingers": None}, {"fingers": 5.0}]]
    assert sheet([slider], plan, pictures, values).size[0] > 16


# --------------------------------------------------------------------------------------------------------- prompts


def test_hands_are_judged_on_held_out_prompts_that_wave() -> None:
    split = hands_split(12, 3)
    assert len(set(split.prompts)) == 12 and split.seeds[0] == FIRST_EVALUATION_SEED and len(split.seeds) == 3
    assert all(parse(prompt)["hand"] == "waving" for prompt in split.prompts)
    with pytest.raises(UserError, match="take fewer"):
        hands_split(1000, 1)
    with pytest.raises(UserError, match="at least 1"):
        hands_split(2, 0)


def test_what_a_prompt_shows() -> None:
    assert shows("a doctor, waving", {"outfit": "doctor"}) is True
    assert shows("a gardener", {"outfit": "doctor"}) is False and shows("a face", {"outfit": "doctor"}) is None
    old = {"age": (0.6, 1.0)}
    assert shows("a face, an old face", old) is True and shows("a young person", old) is False
    both = {"outfit": "doctor", "hand": "waving"}
    assert shows("a doctor", both) is None and shows("a doctor, hands down", both) is False


def test_the_subject_is_what_the_target_names_beside_the_attribute() -> None:
    assert subject_of("a person", "smile") == {} and subject_of("a doctor", "smile") == {"outfit": "doctor"}
    assert subject_of("a doctor, smiling", "smile") == {"outfit": "doctor"}
    assert subject_of("", "fingers") == {"hand": "waving"}


def test_off_class_prompts() -> None:
    split = evaluation_split(["smile"], 16, 2)
    assert sides_of("a person", "smile", split) is None  # every picture shows one
    assert sides_of("a person", "smile", split, ["a dog"]) == Sides(split.prompts[:8], ["a dog"], split.seeds)
    sides = sides_of("a doctor", "smile", split)
    assert len(sides.own) == len(sides.off) == 8
    assert all(parse(p)["outfit"] == "doctor" and "smile" not in parse(p) for p in sides.own)
    assert all(parse(p)["outfit"] != "doctor" and "smile" not in parse(p) for p in sides.off)
    assert sides_of("a doctor", "smile", split, ["a dog"]).off == ["a dog"]
    hands = sides_of("a person, waving", "fingers", hands_split(2, 1))
    assert all(parse(prompt)["hand"] == "none" for prompt in hands.off) and len(hands.own) == 2


class Shifts:
    """An edit that makes a picture brighter by 50 a scale, where it doesn't show its subject by 10."""

    def pictures(self, prompts, seeds, strengths) -> np.ndarray:
        moved = [(10 if p == "off" else 50) * s for p, s in zip(prompts, strengths, strict=True)]
        return np.stack([np.full((4, 4, 3), 100 + by, np.uint8) for by in moved])


def test_off_class_effect_is_a_ratio_of_distances() -> None:
    found = measure_off_class(Shifts(), Sides(["own", "own"], ["off"], [0, 1]))
    assert found.mean == pytest.approx(0.2) and found.ends == pytest.approx([0.2, 0.2])
    alone = measure_off_class(Shifts(), Sides(["own"], ["off"], [0]), [1.0])
    assert alone.mean == pytest.approx(0.2) and alone.ends is None


def test_a_ratios_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.uniform(0.5, 1.5, (6, 4)), rng.uniform(1.5, 2.5, (4, 4))
    found = bootstrap_ratio(above, below)
    assert found.low < found.mean < found.high and found.mean == pytest.approx(above.mean() / below.mean())
    assert np.isnan(bootstrap_ratio(above, np.zeros((2, 2))).mean)
