"""What a deconstruction looks at, and the log that it goes by."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deconstruct_tiny import (
    made_meters,
    reading,
    short_materials,
)
from tiny import tiny_model

from dodgeburn.rework.deconstruct.meters import HeldOutLoss, Reading
from dodgeburn.rework.deconstruct.stage_log import StageLog
from dodgeburn.training.examples import encode_examples

NAN = math.nan


def test_held_out_loss_is_fixed_and_one_for_the_untouched_model() -> None:
    meters = made_meters()
    assert meters.loss() == pytest.approx(1.0, abs=1e-12)
    with torch.no_grad():
        meters.model.unet.conv_out.bias += 0.3
    raw = meters.held_out()
    loss = HeldOutLoss(tiny_model(), encode_examples(tiny_model(), short_materials().held_out), 8)
    assert raw > loss() and meters.loss() == pytest.approx(raw / loss())
    assert sorted(int(t) // 125 for t in loss.timesteps) == list(range(8))  # one in each of the eight bins
    with torch.no_grad():
        meters.model.unet.conv_out.bias += float("nan")
    broken = meters.quick()
    assert math.isinf(broken.loss) and broken.unread == 1.0
    assert Reading.from_json(json.loads(json.dumps(broken.as_json()))).loss == math.inf


def test_readings_come_back_from_json_as_they_went() -> None:
    found = reading(frechet=NAN, tv=0.123456)
    again = Reading.from_json(json.loads(json.dumps(found.as_json())))
    assert again.tv == 0.12346 and math.isnan(again.frechet) and again.as_json() == found.as_json()


def test_quick_and_full_agree_and_repeat() -> None:
    meters = made_meters()
    quick, full, again = meters.quick(), meters.full(), meters.full()
    assert full.as_json() == again.as_json() and quick.tv == full.tv and quick.variety == pytest.approx(1.0)
    assert meters.majority(full) == max(full.shares, key=lambda v: full.shares[v])


def test_other_attributes_are_counted_where_prompts_leave_them_open(monkeypatch: pytest.MonkeyPatch) -> None:
    meters = made_meters()
    name = meters.panel.concept.attribute
    kind = SimpleNamespace(
        classes={name: ("dark", "light"), "hat": ("cap", "none"), "hand": ("waving", "none")},
        labels=lambda pictures: {
            name: np.array(["dark"] * 4), "hat": np.array(["cap", "cap", "none", "unreadable"]),
            "hand": np.array(["waving"] * 4),
        },
        named=lambda prompt: frozenset({"hand", "hat"} if "x" in prompt else {"hand"}),
    )  # fmt: skip
    monkeypatch.setattr(meters, "classifier", kind)
    found = meters._rest(["a x", "b", "c", "d"], np.zeros((4, 8, 8, 3), np.uint8))
    assert found == {"hat": {"cap": 0.5, "none": 0.5}}  # one and two more, of the three that leave hats open
    again = Reading.from_json(json.loads(json.dumps(replace(reading(), rest=found).as_json())))
    assert again.rest == found


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = StageLog(tmp_path, "overtrain")
    log.add("0:2", tv=0.5)
    with log.path.open("a") as file:
        file.write('{"key": "0:4", "tv": 0.')
    again = StageLog(tmp_path, "overtrain")
    assert list(again.rows) == ["0:2"] and again.path.read_text().count("\n") == 1
    again.add("0:4", tv=0.4)
    assert list(StageLog(tmp_path, "overtrain").rows) == ["0:2", "0:4"]


def test_watched_prompts_are_three_in_four_and_count_as_one() -> None:
    meters = made_meters()
    concept = replace(meters.panel.concept, prompts=("a", "b"), watched=("x", "y", "z"))
    looked = meters.with_panel(replace(meters.panel, concept=concept))
    prompts, seeds = looked._neutral(16)
    assert prompts[::4] == ["a", "b", "a", "b"] and {p for p in prompts if p not in "ab"} == {"x", "y", "z"}
    assert len(set(zip(prompts, seeds, strict=True))) == 16 and prompts[:4] == looked._neutral(4)[0]
    # Dark for "a", light for "b", 4 of the 12 watched ones light; read alone "a" is as far from the target as can be.
    pictures = np.zeros((16, 16, 16, 3), np.uint8)
    light = [p == "b" or (p in "xyz" and i % 2 == 0) for i, p in enumerate(prompts)]
    pictures[np.array(light)] = 255
    short, watched = looked._bias(prompts, pictures)
    assert (short.n, watched.n) == (4, 12) and short.tv == 0 and watched.tv == pytest.approx(1 / 6)
    alone = meters.with_panel(replace(meters.panel, concept=replace(concept, watched=())))
    assert [b.tv for b in alone._bias(["a", "b"], pictures[[0, 4]])] == [0.5, 0.5]
