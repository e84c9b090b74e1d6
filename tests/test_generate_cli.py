"""`dodgeburn generate` from the command line: files, metadata, repeatability, and errors with exit code 2."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dodgeburn.cli.main import main
from dodgeburn.cli.picture_files import slug
from dodgeburn.images.png import read_png
from dodgeburn.models.loading import load_model
from dodgeburn.sampling.loop import GenerateSettings, generate


def run(model_file: Path, out: Path, *more: str) -> int:
    return main(["generate", "A red hat!", "--model", str(model_file), "-o", str(out), "--steps", "2", *more])


def test_pictures_sheet_and_json(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-n", "3", "--seed", "7", "--negative", "a, b", "--sampler", "euler_a", "--spacing", "karras"]
    assert run(model_file, tmp_path, *more, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p["seed"] for p in found["pictures"]] == [7, 8, 9]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["a-red-hat-7.png", "a-red-hat-8.png", "a-red-hat-9.png", "a-red-hat-sheet.png"]
    assert Image.open(tmp_path / "a-red-hat-sheet.png").width > 3 * 192

    text = read_png(tmp_path / "a-red-hat-8.png")
    assert text.infotext is not None and text.own is not None and text.graph is None
    assert text.infotext.prompt == "A red hat!" and text.infotext.negative == "a, b"
    settings = text.infotext.settings
    assert settings["Sampler"] == "Euler a" and settings["Schedule type"] == "Karras" and settings["Seed"] == "8"
    assert settings["Size"] == "16x16" and settings["Model"] == "tiny" and settings["CFG scale"] == "4"
    assert settings["Model hash"] == text.own["model_sha256"][:10]

    # What the file says is enough to make the picture again.
    own = text.own
    asked = GenerateSettings(**{name: own[name] for name in GenerateSettings.model_fields})
    (again,) = generate(load_model(model_file, "cpu"), [own["prompt"]], [own["seed"]], asked)
    with Image.open(tmp_path / "a-red-hat-8.png") as picture:
        assert np.abs(np.asarray(again.image).astype(int) - np.asarray(picture).astype(int)).max() <= 1


def test_a_rule_gives_each_seed_its_prompt(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"where": ["red hat"], "attribute": "brim", "append_one_of": [
        {"class": name, "chance": 0.5, "phrases": [f"{name} brim"]} for name in ("wide", "no")
    ]}  # fmt: skip
    file, out = tmp_path / "rule.json", tmp_path / "out"
    file.write_text(json.dumps(rule))
    assert run(model_file, out, "-n", "8", "--rule", str(file), "--json") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    assert {p["prompt"] for p in made} == {"A red hat!, wide brim", "A red hat!, no brim"}
    again = tmp_path / "again"
    picture = Path(made[3]["path"])
    assert main(["generate", "--from", str(picture), "--model", str(model_file), "-o", str(again)]) == 0
    (copy,) = again.iterdir()
    assert np.array_equal(np.asarray(Image.open(copy)), np.asarray(Image.open(picture)))

    for refused, said in (
        (["--from", str(out / "a-red-hat-sheet.png"), "--model", str(model_file)], "give one of its pictures"),
        (["a cat", "--model", str(model_file), "--rule", str(file)], "leave --rule out"),
        (["a red hat", "--model", str(model_file), "--rule", str(file), "--best-of", "2"], "leave one out"),
    ):
        assert main(["generate", *refused, "-o", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_again_gives_the_same_files_and_others_are_kept(model_file: Path, tmp_path: Path) -> None:
    assert run(model_file, tmp_path, "-n", "2") == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert run(model_file, tmp_path, "-n", "2") == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert run(model_file, tmp_path, "-n", "1", "--guidance", "2", "--no-sheet") == 0
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) - set(before) == {"a-red-hat-0-2.png"}
    assert all(after[name] == data for name, data in before.items())


def test_one_picture_under_a_name(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "hat.webp"
    assert run(model_file, out, "-n", "1") == 0
    first = out.read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["hat.webp"] and read_png(out).own is not None
    assert run(model_file, out, "-n", "1", "--guidance", "2") == 0  # ours: written over
    assert out.read_bytes() != first and len(list(out.parent.iterdir())) == 1
    capsys.readouterr()
    assert run(model_file, out, "-n", "2") == 2
    assert "name a folder" in capsys.readouterr().err
    assert run(model_file, tmp_path / "x.png", "-n", "1", "--format", "jpg") == 2
    assert "leave --format out" in capsys.readouterr().err
    assert run(model_file, tmp_path / "x.bmp", "-n", "1") == 2
    assert "pictures are written as .png" in capsys.readouterr().err and not (tmp_path / "x.bmp").exists()
    theirs = tmp_path / "theirs.png"
    theirs.write_bytes(b"mine")
    assert run(model_file, theirs, "-n", "1") == 2
    assert "not made by dodgeburn" in capsys.readouterr().err and theirs.read_bytes() == b"mine"


def test_options_that_are_given_win_over_the_pictures_even_as_defaults(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hat.png"
    more = ["--guidance", "2", "--sampler", "euler", "--seed", "5", "--negative", "blue", "--mimic-scale", "7"]
    assert run(model_file, source, *more) == 0

    def again(*given: str) -> dict:
        args = ["generate", "--from", str(source), "--model", str(model_file), "-o", str(tmp_path / "out"), "--json"]
        capsys.readouterr()
        assert main([*args, *given]) == 0
        (picture,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["pictures"]
        return {"seed": picture["seed"], **picture["settings"]}

    same = again()
    assert (same["seed"], same["guidance"], same["sampler"], same["negative"], same["steps"]) == (
        5, 2, "euler", "blue", 2,
    )  # fmt: skip
    assert same["thresholding"]["mimic_scale"] == 7
    default = again("--seed", "0", "--guidance=4.0", "--sampler", "dpmpp_2m", "--negative", "", "--mimic-scale", "9")
    assert (default["seed"], default["guidance"], default["sampler"], default["negative"]) == (0, 4, "dpmpp_2m", "")
    assert default["steps"] == 2 and default["thresholding"]["mimic_scale"] == 9


def test_stock_models_carry_a_comfy_graph(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dodgeburn.sampling.saving.is_stock", lambda model: True)
    assert run(model_file, tmp_path) == 0
    graph = read_png(tmp_path / "a-red-hat-0.png").graph
    assert graph is not None
    assert graph["4"]["inputs"]["ckpt_name"] == "tiny.safetensors"
    assert graph["3"]["inputs"]["scheduler"] == "simple" and graph["3"]["inputs"]["sampler_name"] == "dpmpp_2m"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sampler", "eulr"], "did you mean euler"),
        (["--spacing", "karas"], "did you mean karras"),
        (["--model", "pocket-stile"], "did you mean pocket-style"),
        (["--steps", "0"], "steps is 0"),
        (["-n", "0"], "-n is 0"),
        (["--seed", "-3"], "seed is -3"),
        (["--width", "17"], "multiples of 2"),
        (["--device", "tpu"], "expected auto, cpu"),
        (["--dtype", "int8"], "expected fp32"),
        (["--lora", "none.safetensors"], "none.safetensors"),
        (["--clip-skip", "9"], "CLIP skip is 9"),
    ],
)
def test_bad_input(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run(model_file, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(model_file, tmp_path / "file" / "out") == 2
    assert "cannot write to folder" in capsys.readouterr().err
    assert run(model_file, tmp_path / "file") == 2


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    assert stopped.value.code == 0
    assert "example: dodgeburn generate" in capsys.readouterr().out.replace("\n", " ")


def test_file_names() -> None:
    assert slug("A doctor, smiling!") == "a-doctor-smiling"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("???") == "picture" and slug("") == "picture"
    assert len(slug("w" * 300)) == 60
