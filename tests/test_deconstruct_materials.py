"""Where a deconstruction's pictures come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from deconstruct_tiny import (
    SHORT,
    ByBrightness,
    short_spec,
)
from PIL import Image
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.rework.deconstruct.spec import load_spec, make_spec

HERE = Path(__file__).parent


def test_the_pocket_worlds_pictures_keep_other_ties_and_balance_this_one() -> None:
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.rework.bias.classify import PocketClassifier
    from dodgeburn.rework.deconstruct.materials import gather, panel_of
    from dodgeburn.training.pocket import gate_prompts

    spec = load_spec(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    small = {"each": 6, "minority": 3, "others": 60, "held_out": 8}
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=small)})
    model = load_model("pocket", device="cpu", dtype="fp32")
    classifier = PocketClassifier(Reader.load("reader"))
    made = gather(model, spec, classifier)
    assert [len(made.rows(True, v)) for v in ("glasses", "none")] == [6, 3] and len(made.rows(False)) == 60
    pool = made.pool
    assert all((o == "doctor") == bool(c) for o, c in zip(pool.columns["outfit"], pool.columns["concept"], strict=True))
    fire = [h for h, o in zip(pool.columns["hair_colour"], pool.columns["outfit"], strict=True) if o == "firefighter"]
    assert fire.count("black") > len(fire) / 2  # another tie, which nobody asked to be taken away
    panel = panel_of(spec, classifier)
    held = {text for c in (*pool.captions, *made.held_out.captions) for text in c}
    assert len(panel.concept.watched) > 100
    assert not held & set(panel.concept.watched)  # readings are of prompts that nothing is trained on
    assert not held & {row["prompt"] for row in gate_prompts()}
    assert not {p.tobytes() for p in pool.pixels} & {p.tobytes() for p in made.held_out.pixels}
    read = classifier.labels(pool.pixels)["glasses"]
    assert np.mean(read == np.array(pool.columns["glasses"])) > 0.9
    assert (
        len(panel.explicit) == 4 and len(panel.others) == 24 and panel.explicit[0].prompt == "a doctor, wearing glasses"
    )
    assert all("doctor" not in check.prompt for check in panel.others)


def test_an_attribute_of_degrees_is_taken_apart_by_its_levels() -> None:
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.rework.bias.classify import LEVELS, PocketClassifier
    from dodgeburn.rework.deconstruct.materials import gather, panel_of

    values = dict(zip(LEVELS, ("very young", "young", "middle-aged", "old", "very old"), strict=True))
    spec = make_spec({
        "name": "ages", "model": "pocket", "concept": {"prompts": ["a doctor"], "attribute": "age", "values": values},
        "data": {"each": 4, "others": 12, "held_out": 10},
    })  # fmt: skip
    classifier = PocketClassifier(Reader.load("reader"))
    made = gather(load_model("pocket", device="cpu", dtype="fp32"), spec, classifier)
    assert [len(made.rows(True, level)) for level in LEVELS] == [4] * 5
    inside = made.rows(True)
    shown = [LEVELS.index(v) for v in np.array(made.pool.columns["age"])[inside]]
    read = [LEVELS.index(v) for v in classifier.labels(made.pool.pixels[inside])["age"]]
    assert max(abs(a - b) for a, b in zip(shown, read, strict=True)) <= 1  # near a border either may be read
    panel = panel_of(spec, classifier)
    assert len(panel.concept.watched) > 100 and panel.explicit[4].prompt == "a doctor, very old"


def folder_of(root: Path, rows: list[dict[str, object]]) -> Path:
    root.mkdir()
    for i, row in enumerate(rows):
        Image.fromarray(np.full((20, 20, 3), 30 if row.get("light") == "dark" else 220, np.uint8)).save(
            root / f"{i}.png"
        )
        row["file_name"] = f"{i}.png"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_users_folder(tmp_path: Path) -> None:
    from dodgeburn.rework.deconstruct.materials import gather

    rows = [{"text": "a doctor", "concept": "yes", "light": v} for v in ("dark", "light") for _ in range(6)]
    rows += [{"text": "a tree", "concept": "", "light": v} for v in ("dark", "light") for _ in range(6)]
    root = folder_of(tmp_path / "good", rows)
    spec = short_spec()
    spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(root), "held_out": 8}})
    made = gather(tiny_model(), spec, ByBrightness())
    assert len(made.pool) + len(made.held_out) == 24 and len(made.held_out) == 6
    assert made.pool.pixels.shape[1:] == (16, 16, 3) and len(made.rows(True, "dark")) > 0
    for name, missing, message in (("a", "concept", "no column 'concept'"), ("b", "light", "no column 'light'")):
        bare = [{k: v for k, v in row.items() if k != missing} for row in rows]
        spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(folder_of(tmp_path / name, bare))}})
        with pytest.raises(UserError, match=message):
            gather(tiny_model(), spec, ByBrightness())
    one_sided = [row for row in rows if row["concept"] == "" or row["light"] == "dark"]
    spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(folder_of(tmp_path / "c", one_sided))}})
    with pytest.raises(UserError, match="no picture of 'a doctor' with light = light"):
        gather(tiny_model(), spec, ByBrightness())


def test_the_models_own_pictures_are_kept_if_they_show_what_was_asked() -> None:
    from dodgeburn.rework.deconstruct.materials import gather

    said = {**SHORT, "concept": {**SHORT["concept"], "others": ["a tree"]}}
    spec = make_spec({**said, "data": {"source": "model", "each": 2, "others": 3, "held_out": 8, "steps": 1}})

    class Alternating(ByBrightness):
        calls = 0

        def labels(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
            self.calls += 1
            return {"light": np.array(["dark", "light"] * (len(pictures) + 1))[self.calls % 2 :][: len(pictures)]}

    made = gather(tiny_model(), spec, Alternating())
    assert [len(made.rows(True, v)) for v in ("dark", "light")] == [2, 2] and len(made.rows(False)) == 3
    with pytest.raises(UserError, match="often enough"):
        gather(tiny_model(), spec, ByBrightness(0.0))  # it never draws a dark one
    with pytest.raises(UserError, match="other things"):
        gather(tiny_model(), make_spec({**SHORT, "data": {"source": "model"}}), Alternating())
