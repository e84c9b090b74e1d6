"""Architectures told apart, and keys put into components and blocks."""

from __future__ import annotations

from collections import Counter

import pytest
from tiny_checkpoints import configs, single_file

from dodgeburn.checkpoint.convert import unet_key_map
from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.errors import UserError


@pytest.mark.parametrize(("kind", "n"), [("sdxl", 9), ("sd15", 12)])
def test_detected_from_keys(kind: str, n: int) -> None:
    layout = detect_layout(single_file(kind))
    assert (layout.name, layout.n_in, layout.n_out) == (kind, n, n)
    assert layout.blocks == (*(f"IN{i:02d}" for i in range(n)), "M00", *(f"OUT{i:02d}" for i in range(n)))
    assert layout.all_blocks[0] == "BASE" and layout.all_blocks[-1] == "VAE"


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_every_key_has_a_component_and_a_block(kind: str) -> None:
    keys = list(single_file(kind))
    layout = detect_layout(keys)
    components = Counter(layout.component(k) for k in keys)
    expected = {"unet", "vae", "text_encoder"} | ({"text_encoder_2"} if kind == "sdxl" else set())
    assert set(components) == expected
    assert components["unet"] == len(unet_key_map(configs(kind)["unet"]))
    blocks = Counter(layout.block(k) for k in keys)
    assert set(blocks) == set(layout.all_blocks)


def test_unet_alone_is_detected() -> None:
    for kind in ("sdxl", "sd15"):
        assert detect_layout(unet_key_map(configs(kind)["unet"])).name == kind


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "IN00"),
        ("model.diffusion_model.input_blocks.8.1.norm.weight", "IN08"),
        ("model.diffusion_model.middle_block.1.norm.weight", "M00"),
        ("model.diffusion_model.output_blocks.2.2.conv.bias", "OUT02"),
        ("model.diffusion_model.out.2.weight", "OUT08"),
        ("model.diffusion_model.time_embed.0.weight", "BASE"),
        ("model.diffusion_model.label_emb.0.0.weight", "BASE"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "BASE"),
        ("conditioner.embedders.1.model.text_projection", "BASE"),
        ("first_stage_model.decoder.conv_out.bias", "VAE"),
        ("model_ema.decay", None),
        ("betas", None),
    ],
)
def test_blocks_of_sdxl_keys(key: str, block: str | None) -> None:
    assert detect_layout(single_file("sdxl")).block(key) == block


def test_last_out_block_of_sd15() -> None:
    layout = detect_layout(single_file("sd15"))
    assert layout.block("model.diffusion_model.out.0.weight") == "OUT11"
    assert layout.block("cond_stage_model.transformer.text_model.final_layer_norm.bias") == "BASE"


UNET = "model.diffusion_model."
BOTH = (UNET + "input_blocks.0.0.x", UNET + "output_blocks.0.0.x")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_unet_x.lora_down.weight"], "LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        ([UNET + "joint_blocks.0.x"], "SD3"),
        (["first_stage_model.encoder.conv_in.weight"], "VAE alone"),
        (["something"], "model.diffusion_model"),
        ([], "model.diffusion_model"),
        ([UNET + "input_blocks.0.0.weight"], "output_blocks"),
        ([UNET + "input_blocks.0.0.weight", UNET + "input_blocks.2.0.weight", UNET + "output_blocks.0.0.x"],
         "input_blocks.1 is missing"),
        ([*BOTH, "cond_stage_model.model.ln_final.bias"], "SD2"),
        ([*BOTH, "conditioner.embedders.0.model.ln_final.bias"],
         "refiner"),
    ],
)  # fmt: skip
def test_other_files_are_named(keys: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        detect_layout(keys)


def test_sd2_by_its_text_width() -> None:
    keys = unet_key_map(configs("sd15")["unet"])
    shapes = {k: (8, 1024) for k in keys}
    with pytest.raises(UserError, match="SD2"):
        detect_layout(keys, shapes)
    detect_layout(keys, {k: (8, 768) for k in keys})
