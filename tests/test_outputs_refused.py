"""Names that nothing can be written to, or that say something wrong of what is written, are refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from dodgeburn.checkpoint.tensorfile import check_weights_output
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError

FIX = ["--prompt", "a doctor", "--attribute", "glasses"]


@pytest.fixture(scope="module")
def slider(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("slider") / "smile.safetensors"
    spec = out.with_suffix(".yaml")
    spec.write_text("name: smile\ntarget: a person\npositive: a person, smiling\nnegative: a person, frowning\n")
    assert main(["slider", "train", str(spec), "--closed-form", "--no-calibrate", "-o", str(out)]) == 0
    return str(out)


@pytest.mark.parametrize(
    ("command", "out", "said"),
    [
        (["merge", "pocket-style", "pocket-bold"], "x.ckpt", "name it so: x.safetensors"),
        (["bake", "pocket", "SLIDER"], "x.pt", "name it so: x.safetensors"),
        (["delta", "extract", "pocket-style", "pocket"], "v1.5", "name it so: v1.5.safetensors"),
        (["delta", "apply", "pocket", "SLIDER"], "x.bin", "name it so: x.safetensors"),
        (["convert", "pocket"], "x.ckpt", "pickles are read, not written"),
        (["slider", "compose", "SLIDER"], "x.ckpt", "name it so: x.safetensors"),
        (["slider", "calibrate", "SLIDER", "--attribute", "smile"], "x.ckpt", "name it so: x.safetensors"),
        (["slider", "train", "SPEC"], "x.ckpt", "sliders are written as .safetensors"),
        (["slider", "sweep", "SLIDER"], "none/x.png", "none is not a folder"),
        (["slider", "sweep", "SLIDER"], "folder.png", "is a folder"),
        (["slider", "sweep", "SLIDER", "--animate"], "none/x.gif", "none is not a folder"),
        (["bias", "fix", "pocket", *FIX, "-o"], "folder.safetensors", "is a folder"),
        (["bias", "fix", "pocket", *FIX, "--report", "report", "-o"], "none/x.safetensors", "none is not a folder"),
        (["pocket", "draw"], "x.gif", "ends in .png"),
        (["pocket", "evaluate"], "file/x", "cannot write to folder"),
    ],
)
def test_an_output_is_looked_at_before_the_work(
    command: list[str], out: str, said: str, slider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for work in ("slide.sweep.make_pictures", "rework.bias.fix.fix", "training.pocket_gate.evaluate_model"):
        monkeypatch.setattr(f"dodgeburn.{work}", lambda *_args, **_more: pytest.fail("the work began"))
    monkeypatch.chdir(tmp_path)
    for name in ("folder.png", "folder.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    there = sorted(p.name for p in tmp_path.iterdir())
    words = [{"SLIDER": slider, "SPEC": slider.replace(".safetensors", ".yaml")}.get(word, word) for word in command]
    last = [] if words[-1] in ("-o", "--animate") else ["-o"]
    assert main([*words, *last, out]) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in sorted(tmp_path.iterdir()) if p.name != "report"] == there


def test_names_of_weights(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.SAFETENSORS"):
        assert check_weights_output(tmp_path / name).name == name
    for name in ("x.gguf", "x"):  # other programs list files by their ending
        with pytest.raises(UserError, match=r"what is written is a safetensors file, name it so: x.safetensors"):
            check_weights_output(tmp_path / name)


@pytest.mark.parametrize("place", [".", "/", ""])
def test_a_folder_is_no_file_to_verify(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", place]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_an_empty_name_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an unset variable of a shell gives it: nothing else is taken instead."""
    assert main(["generate", "a face", "--model", "", "-o", str(tmp_path / "x")]) == 2
    assert "unknown model ''" in capsys.readouterr().err
