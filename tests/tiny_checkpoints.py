"""Tiny random models with the real topologies of SD1.5 and SDXL, for tests of files, conversion and
merging.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from dodgeburn.checkpoint.convert import diffusers_to_single_file, open_clip_key_map

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CLIP: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 16,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 16, 16, 16],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def configs(kind: str) -> dict[str, dict[str, Any]]:
    """Component configs of a tiny "sdxl" (9 + 1 + 9 blocks) or "sd15" (12 + 1 + 12 blocks) model."""
    if kind == "sdxl":
        unet: dict[str, Any] = {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 16, 32],
            "transformer_layers_per_block": [1, 1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "cross_attention_dim": 32,
        }
    else:
        unet = {
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "block_out_channels": [8, 16, 32, 32],
            "cross_attention_dim": 16,
        }
    unet |= {"layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4, "sample_size": 8}
    out = {"unet": unet, "vae": dict(_VAE), "text_encoder": dict(_CLIP)}
    if kind == "sdxl":
        out["text_encoder_2"] = _CLIP | {
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "hidden_act": "gelu",
        }
    return out


def build(kind: str, seed: int = 0) -> dict[str, torch.nn.Module]:
    """Random diffusers and transformers modules of these configs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = configs(kind)
    modules: dict[str, torch.nn.Module] = {
        "unet": UNet2DConditionModel(**config["unet"]),
        "vae": AutoencoderKL(**config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
    }
    if kind == "sdxl":
        modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    return modules


@cache
def _names(kind: str) -> dict[str, tuple[int, ...]]:
    state_dicts = {name: module.state_dict() for name, module in build(kind).items()}
    return {key: tuple(t.shape) for key, t in diffusers_to_single_file(state_dicts, configs(kind)).items()}


def single_file(kind: str, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A whole random single-file state dict with the real key names, cheap to make again with other seeds."""
    generator = torch.Generator().manual_seed(seed)
    out = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in _names(kind).items()}
    if kind == "sd15":
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        out[ids] = torch.arange(77).reshape(1, 77)
    return out


def clip_g_keys() -> set[str]:
    """Single-file names of the second text encoder."""
    return set(open_clip_key_map(configs("sdxl")["text_encoder_2"]))


def small(seed: int, dtype: torch.dtype = torch.float16, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A few tensors with real SDXL names, quick to merge."""
    generator = torch.Generator().manual_seed(seed)
    u = "model.diffusion_model."
    shapes = {
        CONV_IN: (4, 4),
        u + "input_blocks.1.0.in_layers.0.weight": (5,),
        u + "middle_block.0.in_layers.0.weight": (2, 3),
        u + "output_blocks.0.0.in_layers.0.weight": (3,),
        u + "out.2.bias": (4,),
        u + "time_embed.0.weight": (2, 2),
        u + "label_emb.0.0.weight": (2, 2),
        "first_stage_model.decoder.conv_out.bias": (3,),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (4,),
        "conditioner.embedders.1.model.ln_final.bias": (4,),
    }
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()} | more
