"""Model cards: valid front matter, a gallery that exists, recipes in words, hostile names."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from dodgeburn.checkpoint.card import Facts, Shown, card_text, facts_of
from dodgeburn.checkpoint.tensorfile import save_tensors, sha256_file, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.images.png import Infotext, write_picture
from dodgeburn.merge.run import merge
from dodgeburn.pocket.model import weights_path

pytestmark = pytest.mark.metadata


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "my merge.safetensors"
    merge("pocket-style", "pocket-bold", out, preset="ReverseSmoothstep", base=0.4, keep=("text", "vae"))
    return out


def picture(path: Path, info: Infotext | None = None) -> None:
    write_picture(path, Image.new("RGB", (8, 8), (1, 2, 3)), info)


def read(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_a_card_of_a_merge(merged: Path, tmp_path: Path) -> None:
    settings = {"Steps": "45", "Sampler": "DPM++ 3M SDE", "CFG scale": "4", "Seed": "1", "Size": "64x64"}
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png", Infotext('a "hat": é\nx', "blurry", settings))
    picture(tmp_path / "in" / "b.webp", Infotext("漢字 🙂", "", {**settings, "CFG scale": "6"}))
    picture(tmp_path / "in" / "c.jpg")
    out = tmp_path / "out"
    more = ["--images", str(tmp_path / "in"), "--license", "gpl-3.0", "--base-model", "a/b", "c/d", "-o", str(out)]
    assert main(["card", str(merged), *more]) == 0
    card = read(out)
    data = card.data.to_dict()
    assert data["license"] == "gpl-3.0" and data["base_model"] == ["a/b", "c/d"]
    assert data["base_model_relation"] == "merge" and data["pipeline_tag"] == "text-to-image"
    assert data["library_name"] == "diffusers" and "merge" in data["tags"]
    widget = data["widget"]
    assert [w["text"] for w in widget] == ['a "hat": é\nx', "漢字 🙂", ""]
    assert widget[0]["parameters"] == {"negative_prompt": "blurry"} and "parameters" not in widget[1]
    for w in widget:
        assert (out / w["output"]["url"]).is_file()
    text = card.text
    assert "<Gallery />" in text and "ReverseSmoothstep" in text and "Kept as in A: text, vae" in text
    assert "40 % elsewhere" in text and sha256_file(merged) in text and sha256_file(weights_path("pocket-bold")) in text
    assert "| Sampler | `DPM++ 3M SDE` |" in text and "| CFG scale | `4`, `6` |" in text
    assert "settings of 1 of 3 pictures" in text and "its licence" not in text


def test_the_command_on_the_card_makes_the_file_again(merged: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    text = card_text(facts_of(merged))
    command = next(line for line in text.splitlines() if line.startswith("dodgeburn merge"))
    for name in ("pocket-style", "pocket-bold"):
        (tmp_path / f"{name}.safetensors").symlink_to(weights_path(name))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert sha256_file(tmp_path / merged.name) == sha256_file(merged)


def test_what_the_short_command_cannot_say_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    settings = {"method": "add_difference", "base": 0.5, "rules": ["M00::0.25"]}
    merge("pocket-style", "pocket-bold", tmp_path / "m.safetensors", base_model="pocket", **settings)
    text = card_text(facts_of(tmp_path / "m.safetensors"))
    assert f"| base | `pocket.safetensors` | `{sha256_file(weights_path('pocket'))}` |" in text
    show, run = (line for line in text.splitlines() if line.startswith("dodgeburn inspect") or "-o again" in line)
    assert show == "dodgeburn inspect m.safetensors --recipe > m.toml"
    assert main(shlex.split(show)[1:4]) == 0
    (tmp_path / "m.toml").write_text(capsys.readouterr().out)
    assert main(shlex.split(run)[1:]) == 0
    assert sha256_tensors(tmp_path / "again-m.safetensors") == sha256_tensors(tmp_path / "m.safetensors")
    again = card_text(facts_of(tmp_path / "again-m.safetensors"))  # of a graph
    assert "| base | `pocket.safetensors`" in again and "| a | `pocket-style.safetensors`" in again


def test_a_card_that_makes_its_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["card", "pocket-style", "-o", str(tmp_path), "--steps", "2", "--prompt", "a cap", "--device", "cpu",
            "--json"]  # fmt: skip
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p["prompt"] for p in found["pictures"]] == ["a cap"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in text and "dodgeburn convert" in text and "from_single_file" not in text
    assert "| Steps | `2` |" in text
    assert main(args) == 2  # a card that is there is not replaced
    assert "--force" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0


def test_pictures_of_another_model_are_told_and_contact_sheets_left_out(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    made_by = {"own": sha256_file(merged)[:10], "other": "0123456789", "unknown": ""}
    for name, digest in made_by.items():
        model = {"Model": name, **({"Model hash": digest} if digest else {})}
        picture(tmp_path / "in" / f"{name}.png", Infotext("a face", "", {"Steps": "4", **model}))
    picture(tmp_path / "in" / "a-face-sheet.png")
    picture(tmp_path / "in" / "a-face-sheet-2.png")
    assert main(["card", str(merged), "--images", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "1 of 3 pictures say that another model made them (other.png: other): a card is to show what" in said.err
    assert "3 pictures" in said.out and not list((tmp_path / "out").rglob("*sheet*"))


def test_hostile_texts_stay_texts(merged: Path) -> None:
    facts = facts_of(merged)
    evil = "x\n---\nlicense: mit\n<script>|`"
    bad = Facts(**{**vars(facts), "title": evil, "file": evil, "metadata": {"modelspec.description": evil}})
    card = ModelCard(card_text(bad, [Shown("images/a.png", evil, evil, {"Steps": evil})]))
    assert card.data.license is None
    assert card.data.to_dict()["widget"][0]["text"] == evil
    assert "# x --- license: mit \\<script\\>\\|\\`\n" in card.text
    assert "\n---\n" not in card.text


def test_stock_models_are_told_apart(tmp_path: Path) -> None:
    stock = Facts(**{**vars(facts_of(weights_path("pocket"))), "stock": True})
    text = card_text(stock)
    assert "from_single_file" in text and "stable-diffusion-xl" in text and "ComfyUI" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base-model", "nope"], "no hub id"),
        (["--images", "none"], "no folder"),
        (["--images", "."], "no pictures"),
        (["--images", ".", "--prompt", "a"], "no effect"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                   more: list[str], message: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["card", "pocket", "-o", "out", *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_gets_no_card(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    with pytest.raises(UserError, match="gets no card"):
        facts_of(tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("")
    assert main(["card", "pocket", "-o", str(tmp_path / "file" / "x")]) == 2
