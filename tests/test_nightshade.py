"""Stage 2 of a deconstruction: anchors, the two kinds of poison, and its mark."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from deconstruct_tiny import (
    made_meters,
    reading,
    short_materials,
    short_spec,
    some,
)
from PIL import Image
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.models.latents import encode_pictures
from dodgeburn.rework.bias.concept import make_concept
from dodgeburn.rework.deconstruct.nightshade import anchor_shares, export, mixed, perturbed, poisoned_pictures


def test_anchors_are_drawn_from_what_is_lacking() -> None:
    concept = make_concept(["x"], "y", ["a", "b", "c", "d"])
    shares = anchor_shares(concept, {"a": 0.7, "b": 0.25, "c": 0.05, "d": 0.0})
    assert shares == pytest.approx({"c": 0.2 / 0.45, "d": 0.25 / 0.45})
    assert anchor_shares(concept, {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}) == {}


def test_dirty_labels_are_others_pictures_under_the_concepts_name() -> None:
    materials, meters, spec = short_materials(), made_meters(), short_spec()
    dark = reading(shares={"dark": 1.0, "light": 0.0})  # type: ignore[arg-type]
    poison = poisoned_pictures(meters.model, materials, meters, dark, spec)
    assert poison.captions == [("a doctor",)] * 4 and all(p.mean() > 130 for p in poison.pixels)
    trees = {p.tobytes() for p in materials.pool.take(materials.rows(False, "light")).pixels}
    assert {p.tobytes() for p in poison.pixels} <= trees
    own = poisoned_pictures(meters.model, materials, meters, dark, short_spec(nightshade={"anchors": "concept"}))
    assert not {p.tobytes() for p in own.pixels} & trees
    both = mixed(meters.model, poison, materials.pool.take(materials.rows(False)), 0.25, 0)
    assert len(both) == 16 and sum(c == ("a doctor",) for c in both.captions) == 4


def test_perturbed_pictures_stay_within_the_budget_and_move_their_latents() -> None:
    model = tiny_model()
    clean, anchors = some(3, False, 1, "x", True).pixels, some(3, True, 2, "x", True).pixels
    near = perturbed(model, clean, anchors, 0.05, 8)
    assert near.dtype == np.uint8 and np.abs(near.astype(int) - clean.astype(int)).max() <= math.ceil(0.05 * 255)
    target, before, after = (encode_pictures(model.vae, torch.from_numpy(p)) for p in (anchors, clean, near))
    assert float((after - target).square().mean()) < 0.97 * float((before - target).square().mean())


def test_exported_poison_is_marked(tmp_path: Path) -> None:
    assert export(some(2, True, 1, "a doctor", True), tmp_path / "poison") == 2
    for path in sorted((tmp_path / "poison").glob("*.png")):
        assert Image.open(path).info["poisoned"] == "true"
    lines = [json.loads(line) for line in (tmp_path / "poison" / "metadata.jsonl").read_text().splitlines()]
    assert [line["poisoned"] for line in lines] == ["true", "true"] and lines[0]["text"] == ["a doctor"]
    with pytest.raises(UserError, match="not empty"):
        export(some(2, True, 1, "a doctor", True), tmp_path / "poison")
