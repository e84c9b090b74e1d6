"""Modules of SD1.5 and SDXL by their diffusers names, and the single-file tensors that hold them.

A module's name begins with its component: `unet.down_blocks.1.attentions.0.proj_in`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. The tables cover every depth that the two topologies come
in (up to 10 transformer blocks a level in SDXL, one in SD1.5, 32 text layers), so one table serves real models, the
pocket and anything between; a checkpoint's own header says which of the modules it has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dodgeburn.checkpoint.moves import Move, moves_to_diffusers
from dodgeburn.checkpoint.text_keys import CLIP_SD15, CLIP_SDXL, clip_key_map, in_proj_keys, open_clip_key_map
from dodgeburn.checkpoint.unet_keys import UNET, unet_key_map

ARCHITECTURES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "sd2": "Stable Diffusion 2"}
_TEXT_LAYERS = {"num_hidden_layers": 32}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        # Widths that all differ, so that every shortcut convolution is in the table.
        "block_out_channels": [1, 2, 3, 4],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "transformer_layers_per_block": 1,
    },
    "sdxl": {
        "block_out_channels": [1, 2, 3],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "transformer_layers_per_block": 10,
        "addition_embed_type": "text_time",
    },
}


@cache
def tensor_moves(layout: str) -> dict[str, Move]:
    """`component.module.weight` or `.bias` -> how diffusers' tensor is made from the single file's; layout "sd15" or
    "sdxl". VAEs are not in it: adapters leave them alone.
    """
    keys = list(unet_key_map(_UNETS[layout]))
    configs: dict[str, dict[str, Any]] = {"unet": _UNETS[layout], "text_encoder": _TEXT_LAYERS}
    keys += clip_key_map(_TEXT_LAYERS, CLIP_SDXL if layout == "sdxl" else CLIP_SD15)
    if layout == "sdxl":
        configs["text_encoder_2"] = _TEXT_LAYERS
        keys += [*open_clip_key_map(_TEXT_LAYERS), *in_proj_keys(_TEXT_LAYERS)]
    # Only names matter here; the shapes need as many dimensions as the moves look at, and thirds.
    moves, _ = moves_to_diffusers({key: (3, 3) for key in keys}, configs)
    return {f"{part}.{name}": move for part, of_part in moves.items() for name, move in of_part.items()}


@cache
def modules(layout: str) -> frozenset[str]:
    """Names of all modules that have a weight, `component.module`."""
    return frozenset(name.removesuffix(".weight") for name in tensor_moves(layout) if name.endswith(".weight"))


def is_module(name: str) -> bool:
    """Whether SD1.5 or SDXL has a module of this name (U-Net or text encoder)."""
    return name in modules("sdxl") or name in modules("sd15")


@cache
def flat_names() -> dict[str, tuple[str, str]]:
    """Name with underscores, as kohya writes it -> (module, "kohya" for diffusers' or "sgm" for sgm's block names).

    U-Net modules only, without prefix: `down_blocks_0_resnets_0_conv1`, `input_blocks_1_0_in_layers_2`.
    """
    out: dict[str, tuple[str, str]] = {}
    for layout in ("sd15", "sdxl"):
        for name in modules(layout):
            if name.startswith("unet."):
                out[name.removeprefix("unet.").replace(".", "_")] = (name, "kohya")
                out[sgm_name(name, layout).replace(".", "_")] = (name, "sgm")
    return out


@cache
def flat_text_names() -> dict[str, str]:
    """Text module with underscores, without prefix -> its name without component, `text_model.…`."""
    names = {name.partition(".")[2] for name in modules("sdxl") if name.startswith("text_encoder")}
    return {name.replace(".", "_"): name for name in names}


@cache
def _sgm(layout: str) -> dict[str, str]:
    moves = tensor_moves(layout)
    return {
        name: moves[f"{name}.weight"].sources[0].removeprefix(UNET).removesuffix(".weight")
        for name in modules(layout)
        if name.startswith("unet.")
    }


@cache
def sgm_modules() -> dict[str, str]:
    """Dotted sgm name of a U-Net module (`input_blocks.1.0.in_layers.2`) -> module."""
    return {sgm: name for layout in ("sd15", "sdxl") for name, sgm in _sgm(layout).items()}


def sgm_name(module: str, layout: str) -> str:
    """A U-Net module's dotted name in a single file, without `model.diffusion_model.`; KeyError if it has none."""
    return _sgm(layout)[module]


def guess_architecture(names: set[str], text_width: int | None = None) -> str | None:
    """ "sd15", "sdxl" or "sd2" from the modules that an adapter has (and the width of the text its cross-attention
    reads, where known); None if they would fit more than one.
    """
    only_sdxl, only_sd15 = names - modules("sd15"), names - modules("sdxl")
    if only_sdxl and not only_sd15:
        return "sdxl"
    if only_sd15 and not only_sdxl:
        return "sd2" if text_width == 1024 else "sd15"
    return {768: "sd15", 1024: "sd2", 2048: "sdxl"}.get(text_width or 0)
