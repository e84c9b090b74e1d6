"""Names of the text encoders' tensors: single file (HF names, OpenCLIP's names) -> transformers' CLIP models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.unet_keys import Config, both

if TYPE_CHECKING:
    import torch

CLIP_SD15 = "cond_stage_model.transformer."
CLIP_SDXL = "conditioner.embedders.0.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."
POSITION_IDS = "text_model.embeddings.position_ids"
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def clip_key_map(config: Config, prefix: str = CLIP_SDXL) -> dict[str, str]:
    """Single-file key -> key of CLIPTextModel (`text_model.…`) for a text encoder kept in HF names."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for i in range(int(config["num_hidden_layers"])):
        for layer in (
            "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
            "layer_norm2", "mlp.fc1", "mlp.fc2",
        ):  # fmt: skip
            names += [f"encoder.layers.{i}.{layer}.weight", f"encoder.layers.{i}.{layer}.bias"]
    names += ["final_layer_norm.weight", "final_layer_norm.bias"]
    return {f"{prefix}text_model.{name}": f"text_model.{name}" for name in names}


def open_clip_key_map(config: Config, prefix: str = OPEN_CLIP) -> dict[str, str]:
    """Single-file (OpenCLIP) key -> key of CLIPTextModelWithProjection, where one tensor is one tensor.

    `in_proj_weight` and `in_proj_bias` are not in it: they are three tensors on the other side.
    """
    out = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_projection": "text_projection.weight",
    } | both("ln_final", "text_model.final_layer_norm")
    for i in range(int(config["num_hidden_layers"])):
        for a, b in _OPEN_CLIP_LAYER.items():
            out |= both(f"transformer.resblocks.{i}.{a}", f"text_model.encoder.layers.{i}.{b}")
    return {prefix + single: hf for single, hf in out.items()}


def in_proj_keys(config: Config, prefix: str = OPEN_CLIP) -> dict[str, tuple[str, str, str]]:
    """Fused single-file key -> the keys of q, k and v on the other side."""
    out: dict[str, tuple[str, str, str]] = {}
    for i in range(int(config["num_hidden_layers"])):
        for kind in ("weight", "bias"):
            q, k, v = (f"text_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}" for x in "qkv")
            out[f"{prefix}transformer.resblocks.{i}.attn.in_proj_{kind}"] = (q, k, v)
    return out


def fit_names(state_dict: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """The state dict under the names a module wants: CLIPTextModel lost its `text_model.` in transformers
    5.6.

    `position_ids` is left out where the module has it as a constant. All other names pass unchanged.
    """
    names = set(wanted)
    has_prefix = any(name.startswith("text_model.") for name in names)
    out: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if key not in names:
            other = f"text_model.{key}" if has_prefix else key.removeprefix("text_model.")
            if other in names:
                key = other
            elif key.endswith("embeddings.position_ids"):
                continue
        out[key] = tensor
    return out


def classic_text_name(name: str) -> str:
    """A text encoder's key under the names of transformers before 5.6: `text_model.…`, and `text_projection.weight`."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
