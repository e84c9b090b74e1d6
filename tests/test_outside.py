"""Keys outside the U-Net's blocks by the rules of several tools: which block, which share, recorded and printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_checkpoints import single_file

from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.checkpoint.metadata import recipe_of
from dodgeburn.checkpoint.outside import RULES, Outside
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.merge.blocks import alphas
from dodgeburn.merge.recipe import MergeRecipe
from dodgeburn.merge.run import dry_run, merge
from dodgeburn.merge.settings import MergeSettings

U = "model.diffusion_model."
TIME, LABEL, OUT = f"{U}time_embed.0.weight", f"{U}label_emb.0.0.weight", f"{U}out.2.bias"
VAE = "first_stage_model.decoder.conv_out.bias"
TEXT = {
    "sd15": "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    "sdxl": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
}
PROJECTION = "conditioner.embedders.1.model.text_projection"
CONV_IN = f"{U}input_blocks.0.0.weight"


def layout(kind: str, outside: Any) -> Layout:
    return replace(detect_layout(single_file(kind)), outside=outside)


# time_embed, label_emb, out, text encoder, VAE, text_projection
EXPECTED = {
    ("sdxl", "dodgeburn"): ("BASE", "BASE", "OUT08", "BASE", "VAE", "BASE"),
    ("sdxl", "mecha"): ("BASE", "BASE", "OUT08", "BASE", "VAE", "BASE"),
    ("sdxl", "mbw"): ("IN00", "IN00", "OUT08", "BASE", "BASE", "BASE"),
    ("sdxl", "supermerger"): ("NOT_MERGED", "NOT_MERGED", "OUT08", "BASE", "BASE", "NOT_MERGED"),
    ("sdxl", "comfyui"): ("TIME_EMBED", "LABEL_EMB", "OUT", "BASE", "NOT_MERGED", "BASE"),
    ("sd15", "dodgeburn"): ("BASE", None, "OUT11", "BASE", "VAE", None),
    ("sd15", "mecha"): ("BASE", None, "OUT11", "BASE", "BASE", None),
    ("sd15", "mbw"): ("IN00", None, "OUT11", "BASE", "BASE", None),
    ("sd15", "supermerger"): ("IN00", None, "OUT11", "BASE", "BASE", None),
    ("sd15", "comfyui"): ("TIME_EMBED", None, "OUT", "BASE", "NOT_MERGED", None),
}


def test_every_rule_is_expected() -> None:
    assert {outside for _, outside in EXPECTED} == set(RULES) == set(get_args(Outside))
    for outside in RULES:
        assert MergeSettings.of(outside=outside).outside == outside
    with pytest.raises(UserError, match="outside is 'comfy': expected one of .*'comfyui'"):
        MergeSettings.of(outside="comfy")


@pytest.mark.parametrize(("kind", "outside"), EXPECTED)
def test_blocks(kind: str, outside: str) -> None:
    found = layout(kind, outside)
    keys = (TIME, LABEL, OUT, TEXT[kind], VAE, PROJECTION)
    for key, block in zip(keys, EXPECTED[kind, outside], strict=True):
        if block is not None:
            assert found.block(key) == block, key
    assert found.block(CONV_IN) == "IN00" and found.block("model_ema.decay") is None
    # Every block that a key is in is one of the model's, and no block is empty.
    assert {found.block(key) for key in single_file(kind)} == set(found.all_blocks)
    held = {kind: block for block, kinds in found.held.items() for kind in kinds}
    assert held["time_embed"] == found.block(TIME) and held["vae"] == found.block(VAE)


@pytest.mark.parametrize(("kind", "outside"), EXPECTED)
def test_shares(kind: str, outside: str) -> None:
    shares = alphas(layout(kind, outside), "GradV", 0.4)
    for block, share in shares.items():
        if block == "NOT_MERGED":
            assert share == 0.0
        elif block in ("BASE", "VAE", "TIME_EMBED", "LABEL_EMB", "OUT"):
            assert share == 0.4
    assert shares["IN00"] == 1.0
    own = alphas(layout(kind, "comfyui"), "GradV", 0.4, {"time_embed": 0.7, "NOT_MERGED": 0.2})
    assert own["TIME_EMBED"] == 0.7 and own["NOT_MERGED"] == 0.2


def test_tensors_recipe_and_words(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    result = merge("pocket-style", "pocket-bold", out, preset="Cosine", base=0.4, outside="supermerger")
    a, merged = (load_tensors(path) for path in (Path(str(_packaged("pocket-style"))), out))
    assert torch.equal(merged[TIME], a[TIME]) and torch.equal(merged[PROJECTION], a[PROJECTION])
    plain = tmp_path / "plain.safetensors"
    merge("pocket-style", "pocket-bold", plain, preset="Cosine", base=0.4)
    other = load_tensors(plain)
    assert not torch.equal(other[TIME], a[TIME])
    differ = {name for name in other if not torch.equal(other[name], merged[name])}
    assert differ and all("time_embed" in n or "label_emb" in n or n == PROJECTION or "positional" in n for n in differ)
    assert result.recipe.outside == "supermerger"
    recipe = recipe_of(read_header(out).metadata)
    assert recipe is not None and recipe["outside"] == "supermerger" and recipe["blocks"]["NOT_MERGED"] == 0.0
    assert MergeRecipe.model_validate(recipe).outside == "supermerger"
    # A recipe from before the setting means our own rule.
    old = {name: value for name, value in recipe.items() if name != "outside"} | {"conventions": "dodgeburn"}
    assert MergeRecipe.model_validate(old).outside == "dodgeburn"
    _, text = dry_run("pocket-style", "pocket-bold", None, preset="Cosine", outside="mbw")
    assert "by the rule of mbw" in text and "with time embedding, label embedding" in text


def _packaged(name: str) -> Path:
    from dodgeburn.checkpoint.naming import find_checkpoint

    return find_checkpoint(name)


@pytest.mark.parametrize("outside", ["supermerger", "comfyui"])
def test_the_file_is_told_of_and_derived_again(
    tmp_path: Path, outside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m.safetensors")
    options = ["--preset", "Cosine:GradV:0.3", "--outside", outside, "--keep", "vae", "--base", "0.4"]
    assert main(["merge", "pocket-style", "pocket-bold", "-o", out, *options]) == 0
    assert main(["inspect", out]) == 0
    text = capsys.readouterr().out
    assert f"outside: {outside}" in text and "Cosine:GradV:0.3" in text and "of their own" not in text
    assert main(["verify", out]) == 0
    weights = json.loads(read_header(out).metadata["sd_merge_recipe"])["weights_alpha"].split(",")
    assert len(weights) == 20 and weights[0] == "0.4"  # BASE and SDXL's 19, as A1111's tools have them


def test_kept_parts_and_no_effect() -> None:
    plan, _ = dry_run("pocket-style", "pocket-bold", None, preset="Cosine", outside="mbw", keep=["text", "vae"])
    actions = {work.name: work.action for work in plan.work}
    assert actions[VAE] == "copy_a" and actions[PROJECTION] == "copy_a"
    assert "VAE" not in plan.blocks
    with pytest.raises(UserError, match="--outside mbw has no effect"):
        dry_run("pocket-style", "pocket-bold", None, base=0.3, outside="mbw")
    with pytest.raises(UserError, match="SDXL has no block 'VAE'"):
        dry_run("pocket-style", "pocket-bold", None, preset="Cosine", outside="mbw", blocks={"VAE": 0.3})


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "pocket-style", "pocket-bold", "-n", "--preset", "GradV", "--outside", "comfyui"]) == 0
    text = capsys.readouterr().out
    assert "by the rule of comfyui" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line and line[0].isupper()}
    assert {"TIME_EMBED", "LABEL_EMB", "OUT", "NOT_MERGED"} <= set(rows) and "VAE" in rows["NOT_MERGED"]
