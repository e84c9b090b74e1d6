"""`dodgeburn generate --x … --y … --z …`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import random_adapter
from PIL import Image
from tiny import tiny_model

from dodgeburn.cli import generate_grid as grid
from dodgeburn.cli.main import main
from dodgeburn.images.png import read_png
from dodgeburn.models import loading
from dodgeburn.models.adapter_file import save_adapter


def run(model: Path, out: Path, *more: str, prompt: tuple[str, ...] = ("a red hat",)) -> int:
    return main(["generate", *prompt, "--model", str(model), "-o", str(out), "--json", "--steps", "2", *more])


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_axes_are_read() -> None:
    def read(text: str) -> tuple[str, list]:
        axis = grid.parse_axis("x", text)
        return axis.name, axis.values

    assert read("steps=10,20") == ("steps", [10, 20]) and read("cfg=2..8/4") == ("guidance", [2, 4, 6, 8])
    assert read("seed=3-5") == ("seed", [3, 4, 5]) and read("zero-snr=true,no") == ("zero_snr", [True, False])
    assert read("clip_skip=none,2") == ("clip_skip", [None, 2]) and read("lora:smile=-1,1") == ("lora:smile", [-1, 1])
    assert read('prompt="red, old",blue') == ("prompt", ["red, old", "blue"])
    assert grid.parse_axis("x", "guidance=2,2.5").label(1) == "guidance 2.5"
    assert grid.parse_axis("x", "model=a/b.safetensors,pocket").label(0) == "b"
    assert grid.parse_axis("x", "clip_skip=none,2").label(0) == "clip skip none"


def test_every_combination_once_with_a_sheet_each(model_file: Path, tmp_path: Path, capsys) -> None:
    axes = ["--x", "guidance=1,3", "--y", "prompt=red,blue,green", "--z", "sampler=euler,ddim"]
    assert run(model_file, tmp_path / "grid", *axes, "-n", "2") == 0
    found = last(capsys)
    assert len(found["pictures"]) == 2 * 3 * 2 * 2 and len(found["sheets"]) == 2 * 2
    seen = {(p["x"], p["y"], p["z"], p["seed"]) for p in found["pictures"]}
    assert len(seen) == 24 and {p["prompt"] for p in found["pictures"]} == {"a red hat", "a blue hat", "a green hat"}
    for row in found["pictures"]:
        assert row["settings"]["guidance"] == row["x"] and row["settings"]["sampler"] == row["z"]
        assert row["y"] in row["prompt"] and read_png(row["path"]).own["guidance"] == row["x"]
    # Each is the picture that is made alone, but for the batch's last bit.
    row = next(p for p in found["pictures"] if (p["x"], p["y"], p["z"], p["seed"]) == (3, "blue", "ddim", 1))
    alone = ["--guidance", "3", "--sampler", "ddim", "--seed", "1"]
    assert run(model_file, tmp_path / "one", *alone, prompt=("a blue hat",)) == 0
    (one,) = last(capsys)["pictures"]
    assert np.abs(pixels(row["path"]) - pixels(one["path"])).max() <= 1
    assert read_png(found["sheet"]).own["grid"]["y"] == ["prompt", "red", "blue", "green"]
    # The same again gives the same files.
    before = sorted(p.name for p in (tmp_path / "grid").iterdir())
    assert run(model_file, tmp_path / "grid", *axes, "-n", "2") == 0
    assert sorted(p.name for p in (tmp_path / "grid").iterdir()) == before


def test_scales_of_a_lora_and_models(model_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    real, loaded = loading.load_model, []
    monkeypatch.setattr(loading, "load_model", lambda *args: loaded.append(args[0]) or real(*args))
    lora = tmp_path / "ours.safetensors"
    save_adapter(random_adapter(tiny_model("sdxl")), lora, "sdxl")
    axes = ["--x", "lora=0,1", "--y", f"model={model_file},{model_file.with_name('other.safetensors')}"]
    assert run(model_file, tmp_path / "grid", *axes, "--z", "seed=4,7", "--lora", str(lora)) == 0
    found = last(capsys)
    rows = {(p["model"], p["x"], p["z"]): p for p in found["pictures"]}
    assert len(rows) == 8 and len(found["sheets"]) == 2
    assert all(p["loras"]["ours"] == p["x"] and p["seed"] == p["z"] for p in rows.values())
    assert [p["model"] for p in found["pictures"]] == (["tiny"] * 2 + ["other"] * 2) * 2
    assert len(loaded) == 2  # each once
    # A sheet says the making of its first picture, which the last model did not draw.
    sheet, first = read_png(found["sheet"]), read_png(rows["tiny", 0, 4]["path"])
    assert sheet.own is not None and {k: v for k, v in sheet.own.items() if k != "grid"} == first.own
    assert sheet.infotext == first.infotext
    assert (pixels(rows["tiny", 0, 4]["path"]) == pixels(rows["other", 0, 4]["path"])).all()
    assert (pixels(rows["tiny", 0, 4]["path"]) != pixels(rows["tiny", 1, 4]["path"])).any()


def test_a_grid_without_sheets(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--x", "guidance=1,2", "--no-sheet") == 0
    found = last(capsys)
    assert found["sheets"] == [] and found["sheet"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-red-hat-0-2.png", "a-red-hat-0.png"]


def test_a_tuned_model_is_loaded_once(model_file: Path, tmp_path: Path, monkeypatch) -> None:
    real, loaded = loading.load_model, []
    monkeypatch.setattr(loading, "load_model", lambda *args: loaded.append(Path(args[0]).stem) or real(*args))
    tuned = ["--tuned", str(model_file.with_name("other.safetensors:0.5"))]
    assert run(model_file, tmp_path, "--x", "guidance=1,2,3", *tuned) == 0
    assert sorted(loaded) == ["other", "tiny"]


def test_settings_of_a_picture_are_varied(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--guidance", "2", "--seed", "5") == 0
    (picture,) = last(capsys)["pictures"]
    # 4 is what --guidance is by default, and what the picture was not made with
    assert run(model_file, tmp_path / "grid", "--from", picture["path"], "--x", "guidance=2,4", prompt=()) == 0
    found = last(capsys)
    assert [(p["settings"]["guidance"], p["seed"]) for p in found["pictures"]] == [(2, 5), (4, 5)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--x", "steps"], "expected a setting and its values"), (["--x", "stps=1"], "did you mean steps"),
        (["--x", "steps=1.5"], "whole numbers"), (["--x", "steps=0,1"], "steps is 0"),
        (["--x", "zero_snr=maybe"], "true,false"), (["--x", "prompt=dog,cat"], "no such words to replace"),
        (["--x", "lora=1,2"], "there is none"), (["--x", "sampler=eulr"], "did you mean euler"),
        (["--x", "seed=1", "--y", "seed=2"], "two axes change seed"), (["--x", "seed=0-600"], "500 are the most"),
        (["--x", "model=none.safetensors"], "none.safetensors"), (["--x", "guidance=a"], "no number"),
        (["--x", "seed=1,2", "--best-of", "2"], "leave one out"),
        (["--x", "guidance=1", "--lora", "no.safetensors"], "no.safetensors"),
    ],
)  # fmt: skip
def test_bad_axes(model_file: Path, tmp_path: Path, capsys, more: list[str], said: str) -> None:
    assert run(model_file, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "out").exists()


def test_one_of_several_loras_is_named(model_file: Path, tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        save_adapter(random_adapter(tiny_model("sdxl")), tmp_path / f"{name}.safetensors", "sdxl")
    both = [part for name in ("a", "b") for part in ("--lora", str(tmp_path / f"{name}.safetensors:0.5"))]
    assert run(model_file, tmp_path / "out", *both, "--x", "lora=1,2") == 2
    assert "say lora:a=" in capsys.readouterr().err
    assert run(model_file, tmp_path / "out", *both, "--x", "lora:b=1,2") == 0
    assert [p["loras"] for p in last(capsys)["pictures"]] == [{"a": 0.5, "b": 1}, {"a": 0.5, "b": 2}]


def test_a_grid_has_no_single_name(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path / "x.png", "--x", "guidance=1,2") == 2
    assert "name a folder" in capsys.readouterr().err
    assert run(model_file, tmp_path / "x", "--x", "prompt=a,b", prompt=()) == 2
    assert "no prompt" in capsys.readouterr().err
