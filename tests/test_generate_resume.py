"""`dodgeburn generate --resume`: what the folder has is kept, what is missing is made."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dodgeburn.cli import generate
from dodgeburn.cli.main import main
from dodgeburn.cli.picture_files import free_name
from dodgeburn.images.png import read_png, write_picture
from dodgeburn.sampling import saving


def run(model: Path, out: Path, *more: str) -> int:
    return main(["generate", "a red hat", "--model", str(model), "-o", str(out), "--json", "--steps", "2", *more])


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next picture after n is Ctrl-C's."""
    real, left = saving.save_picture, [n]

    def save(*args, **kw):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **kw)

    monkeypatch.setattr(saving, "save_picture", save)


def apart(a: Path, b: Path) -> int:
    """The largest difference of a pixel between pictures of the same names."""
    assert sorted(contents(a)) == sorted(contents(b))
    pairs = [(np.asarray(Image.open(a / name)), np.asarray(Image.open(b / name))) for name in contents(a)]
    return max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in pairs)


def apart_from(path: Path, data: bytes) -> int:
    """The same of a file and a picture in memory."""
    one, two = (np.asarray(Image.open(source)).astype(int) for source in (path, io.BytesIO(data)))
    return int(np.abs(one - two).max())


@pytest.mark.parametrize(("stop", "ending"), [(4, "png"), (4, "webp"), (3, "png"), (1, "png")])
def test_an_interrupted_command_ends_as_a_whole_one(
    model_file: Path, tmp_path: Path, capsys, monkeypatch, stop: int, ending: str
) -> None:
    more = ["-n", "5", "--batch-size", "2", "--format", ending]
    assert run(model_file, tmp_path / "whole", *more) == 0
    whole = last(capsys)
    with monkeypatch.context() as patched:
        stop_after(stop, patched)
        assert run(model_file, tmp_path / "two", *more) == 130
    assert "--resume" in capsys.readouterr().err and len(contents(tmp_path / "two")) == stop
    before = contents(tmp_path / "two")
    assert run(model_file, tmp_path / "two", *more, "--resume") == 0
    found = last(capsys)
    assert found["kept"] == stop and [p["seed"] for p in found["pictures"]] == [p["seed"] for p in whole["pictures"]]
    assert all(contents(tmp_path / "two")[name] == data for name, data in before.items())
    if stop == 4:  # two batches
        assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    assert apart(tmp_path / "two", tmp_path / "whole") <= 1  # the last bit depends on a picture's batch


def test_other_settings_and_other_files_are_not_taken_for_it(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "-n", "2") == 0
    before = contents(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "a-red-hat-2.png")
    strange = (tmp_path / "a-red-hat-2.png").read_bytes()
    assert run(model_file, tmp_path, "-n", "2", "--guidance", "2", "--resume") == 0
    assert last(capsys)["kept"] == 0
    assert run(model_file, tmp_path, "-n", "3", "--resume") == 0
    found = last(capsys)
    assert found["kept"] == 2 and Path(found["pictures"][2]["path"]).name == "a-red-hat-2-2.png"
    now = contents(tmp_path)
    assert now["a-red-hat-2.png"] == strange
    assert all(now[name] == data for name, data in before.items())


def test_one_picture_by_name_and_one_made_again_from_its_batch(model_file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "hat.png"
    assert run(model_file, out) == 0 and last(capsys)["kept"] == 0
    assert run(model_file, out, "--resume") == 0 and last(capsys)["kept"] == 1
    assert run(model_file, out, "--resume", "--seed", "5") == 0 and last(capsys)["kept"] == 0

    assert run(model_file, tmp_path / "batch", "-n", "3") == 0
    source = tmp_path / "batch" / "a-red-hat-1.png"
    again = ["generate", "--from", str(source), "--model", str(model_file), "-o", str(tmp_path / "again"), "--json"]
    assert main(again) == 0 and main([*again, "--resume"]) == 0
    found = last(capsys)
    assert found["kept"] == 1 and contents(tmp_path / "again") == {source.name: source.read_bytes()}


def test_a_grid_goes_on_too(model_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    axes = ["--x", "guidance=1,3", "--y", "prompt=red,blue", "-n", "2"]
    assert run(model_file, tmp_path / "whole", *axes) == 0
    whole = last(capsys)
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        assert run(model_file, tmp_path / "two", *axes) == 130
    capsys.readouterr()
    assert run(model_file, tmp_path / "two", *axes, "--resume") == 0
    found = last(capsys)
    assert found["kept"] == 5 and len(found["pictures"]) == len(whole["pictures"]) == 8
    assert apart(tmp_path / "two", tmp_path / "whole") <= 1


def test_a_damaged_picture_is_made_again_under_its_name(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "-n", "2") == 0
    whole = contents(tmp_path)
    (tmp_path / "a-red-hat-1.png").write_bytes(whole["a-red-hat-1.png"][:-200])
    capsys.readouterr()
    assert run(model_file, tmp_path, "-n", "2", "--resume", "--batch-size", "1") == 0
    found = last(capsys)
    assert found["kept"] == 1 and found["pictures"][1]["path"] == str(tmp_path / "a-red-hat-1.png")
    assert apart_from(tmp_path / "a-red-hat-1.png", whole["a-red-hat-1.png"]) <= 1
    assert sorted(contents(tmp_path)) == sorted(whole)


@pytest.mark.parametrize("batch", [5, "ab", [1, 2, 3], [0.5, 1], None])
def test_a_picture_with_a_damaged_record_is_made_again(model_file: Path, tmp_path: Path, capsys, batch: object) -> None:
    assert run(model_file, tmp_path) == 0
    path = tmp_path / "a-red-hat-0.png"
    own = read_png(path).own
    assert own is not None
    write_picture(path, Image.open(path), None, {**own, "batch": batch})
    capsys.readouterr()
    assert run(model_file, tmp_path, "--resume") == 0
    found = last(capsys)
    said = read_png(path).own
    assert found["kept"] == 0 and found["pictures"][0]["path"] == str(path) and said is not None
    assert said["batch"] == [0, 1]


def test_names_are_found_without_a_look_at_pixels(tmp_path: Path, monkeypatch) -> None:
    """A grid of one prompt and seed tries the names of all its pictures before each."""
    for ending in ("png", "jpg", "webp"):
        record = {"seed": 3, "batch": [0, 1]}
        for name in ("a", "a-2"):
            write_picture(tmp_path / f"{name}.{ending}", Image.new("RGB", (16, 16)), None, record | {"name": name})
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were read"))
        assert free_name(tmp_path, "a", ending, record | {"name": "a-2"}) == tmp_path / f"a-2.{ending}"
        assert free_name(tmp_path, "a", ending, record) == tmp_path / f"a-3.{ending}"
        monkeypatch.undo()


def test_seeds_that_are_chosen_among_cannot_go_on(model_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(generate, "main", interrupted)
        assert run(model_file, tmp_path, "--best-of=2") == 130
    assert "--resume" not in capsys.readouterr().err
    assert run(model_file, tmp_path, "--best-of", "2", "--resume") == 2
    assert "--resume" in capsys.readouterr().err and not contents(tmp_path)
