"""`dodgeburn dpo train` from end to end: what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from test_dpo import picture, quick, run, some_pairs
from tiny import tiny_model

from dodgeburn.checkpoint.card import card_text, facts_of
from dodgeburn.checkpoint.metadata import RECIPE
from dodgeburn.checkpoint.tensorfile import TensorFile
from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.loading import load_model
from dodgeburn.rework.dpo.file import save_aligned
from dodgeburn.rework.dpo.pairs import Preference, checked, write_pairs


def test_an_aligned_merge_doesn_t_claim_to_be_the_merge(tmp_path: Path) -> None:
    model = tiny_model()
    model.metadata = {
        RECIPE: json.dumps({"kind": "merge"}), "sd_merge_recipe": "{}", "modelspec.merged_from": "a, b", "mine": "kept",
    }  # fmt: skip
    aligned = run(tmp_path / "run", quick(rank=None, steps=1), model)
    save_aligned(model, some_pairs(), aligned, tmp_path / "out.safetensors")
    with TensorFile(tmp_path / "out.safetensors") as file:
        said = file.header.metadata
    assert said["mine"] == "kept" and "sd_merge_recipe" not in said and "modelspec.merged_from" not in said
    found = json.loads(said[RECIPE])
    assert found["kind"] == "dpo" and found["base"]["recipe"] == {"kind": "merge"}


def test_train_on_pocket_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.main import main

    pairs = checked(Preference("a smiling woman", picture(i, 64, 64), picture(i + 9, 64, 64)) for i in range(2))
    folder, out = write_pairs(tmp_path / "pairs", pairs, {"by": "a test"}), tmp_path / "out.safetensors"
    args = ["dpo", "train", "--pairs", str(folder), "--steps", "2", "--batch", "1", "--lora", "2", "-o", str(out)]
    assert main([*args, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = json.loads(lines[-1])
    assert row["pairs"] == 2 and row["beta"]["paper"] == 2 * row["beta"]["diffusers"]
    assert any("as the paper counts" in line and "in diffusers" in line for line in lines)
    assert not (tmp_path / "out.safetensors.training").exists()
    adapter = load_adapter(out, load_model("pocket"))
    assert adapter.modules_changed and any(bool(f.up.any()) for f in adapter.factors().values())
    with TensorFile(out) as file:
        said = json.loads(file.header.metadata[RECIPE])
    assert said["kind"] == "dpo" and said["as"] == "lora"
    assert said["pairs"]["sha256"] == pairs.sha256 and said["pairs"]["about"] == {"by": "a test"}
    assert said["base"]["sha256"] == load_model("pocket").sha256 and said["settings"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(said)


def test_pairs_of_two_folders_are_learned_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.main import main

    folders = [
        str(write_pairs(tmp_path / f"p{i}", checked([Preference("a", picture(i, 64, 64), picture(i + 1, 64, 64))])))
        for i in (0, 2)
    ]
    out = tmp_path / "out.safetensors"
    args = ["--steps", "1", "--batch", "2", "--lora", "1", "--safeguard", "--slack", "0.3", "--constant", "0.5"]
    assert main(["dpo", "train", "--pairs", *folders, "-o", str(out), *args, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["pairs"] == 2 and f"{folders[0]} and {folders[1]}: 2 pairs" in lines
    with TensorFile(out) as file:
        said = json.loads(file.header.metadata[RECIPE])
    assert said["pairs"]["about"] == {"sets": [{}, {}]}
    assert (said["settings"]["slack"], said["settings"]["constant"]) == (0.3, 0.5)


def test_full_training_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.main import main

    folder = write_pairs(tmp_path / "pairs", checked([Preference("a", picture(0, 64, 64), picture(1, 64, 64))]))
    out = tmp_path / "out.safetensors"
    args = ["--steps", "1", "--batch", "1", "--lora", "full", "--lr", "1e-3", "--reference", "bank", "--bank", "1"]
    assert main(["dpo", "train", "--pairs", str(folder), "-o", str(out), *args]) == 0
    base, made = load_model("pocket"), load_model(str(out))
    assert json.loads(made.metadata[RECIPE])["as"] == "model" and "dodgeburn.training" not in made.metadata
    assert main(["inspect", str(out)]) == 0
    assert "base = pocket.safetensors (sha256" in capsys.readouterr().out
    card = card_text(facts_of(out))
    assert "Aligned by Diffusion-DPO, arXiv 2311.12908, with 1 preference pairs" in card and base.sha256 in card
    moved = [
        name for (name, a), (_, b) in zip(
            base.unet.state_dict().items(), made.unet.state_dict().items(), strict=True
        ) if not torch.equal(a, b)
    ]  # fmt: skip
    assert len(moved) > 100
    for a, b in zip(base.vae.state_dict().values(), made.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no pairs"), (["--pairs", "x"], "no output"), (["--pairs", "x", "-o", "y.ckpt"], "name it so"),
        (["--pairs", "nowhere", "-o", "y.safetensors"], "holds no pairs"),
        (["--pairs", "x", "-o", "y.safetensors", "--lora", "big"], "expected a rank"),
        (["--pairs", "x", "-o", "y.safetensors", "--lora", "0"], "--lora is 0: expected a rank"),
        (["--pairs", "x", "-o", "y.safetensors", "--beta", "-1"], "--beta is -1: expected a number above 0"),
        (["--pairs", "x", "-o", "y.safetensors", "--loss", "sft", "--safeguard"], "loss sft has none"),
        (["--pairs", "x", "-o", "y.safetensors", "--slack", "0.3"], "slack is the safeguard's"),
        (["--pairs", "x", "-o", "y.safetensors", "--dtype", "bf16"], "fp32 or fp16"),
    ],
)  # fmt: skip
def test_bad_commands(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dodgeburn.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "train", *args]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []
