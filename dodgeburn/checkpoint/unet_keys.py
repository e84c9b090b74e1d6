"""Names of the U-Net's tensors: single file (ldm/sgm names) -> diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dodgeburn.errors import UserError

Config = Mapping[str, Any]

UNET = "model.diffusion_model."
_RESNET = {  # U-Net: ldm name -> diffusers name
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


def both(single: str, diffusers: str) -> dict[str, str]:
    """A layer's weight and bias, single-file name -> diffusers name."""
    return {f"{single}.weight": f"{diffusers}.weight", f"{single}.bias": f"{diffusers}.bias"}


def _per_block(value: Any, n: int, what: str) -> list[Any]:
    if isinstance(value, int):
        return [value] * n
    if isinstance(value, Sequence) and len(value) == n:
        return list(value)
    raise UserError(f"config: {what} is {value!r}, expected a number or a list of {n}")


def _resnet(single: str, diffusers: str, shortcut: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for a, b in _RESNET.items():
        out |= both(f"{single}.{a}", f"{diffusers}.{b}")
    if shortcut:
        out |= both(f"{single}.skip_connection", f"{diffusers}.conv_shortcut")
    return out


def _transformer(single: str, diffusers: str, depth: int) -> dict[str, str]:
    """Spatial transformer: names below the block are the same on both sides."""
    tails = [f"{layer}.{kind}" for layer in ("norm", "proj_in", "proj_out") for kind in ("weight", "bias")]
    for d in range(depth):
        block = f"transformer_blocks.{d}"
        for attention in ("attn1", "attn2"):
            tails += [f"{block}.{attention}.{name}.weight" for name in ("to_q", "to_k", "to_v")]
            tails += [f"{block}.{attention}.to_out.0.weight", f"{block}.{attention}.to_out.0.bias"]
        for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"):
            tails += [f"{block}.{layer}.weight", f"{block}.{layer}.bias"]
    return {f"{single}.{tail}": f"{diffusers}.{tail}" for tail in tails}


def unet_key_map(config: Config) -> dict[str, str]:
    """Single-file key (`model.diffusion_model.…`) -> key of UNet2DConditionModel, from the U-Net's config.

    Raises UserError for block types that SD1.5 and SDXL do not have.
    """
    channels = list(config["block_out_channels"])
    down_types, up_types = list(config["down_block_types"]), list(config["up_block_types"])
    n = len(channels)
    layers = _per_block(config.get("layers_per_block", 2), n, "layers_per_block")
    depths = _per_block(config.get("transformer_layers_per_block", 1), n, "transformer_layers_per_block")
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    known(down_types, ("DownBlock2D", "CrossAttnDownBlock2D"), n, "down_block_types")
    known(up_types, ("UpBlock2D", "CrossAttnUpBlock2D"), n, "up_block_types")
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    known([middle], ("UNetMidBlock2DCrossAttn",), 1, "mid_block_type")

    out = both("time_embed.0", "time_embedding.linear_1") | both("time_embed.2", "time_embedding.linear_2")
    if config.get("addition_embed_type") == "text_time":
        out |= both("label_emb.0.0", "add_embedding.linear_1") | both("label_emb.0.2", "add_embedding.linear_2")
    out |= both("input_blocks.0.0", "conv_in")

    i = 1  # running number of the input block
    previous = channels[0]
    for b in range(n):
        for j in range(layers[b]):
            here = f"down_blocks.{b}"
            out |= _resnet(f"input_blocks.{i}.0", f"{here}.resnets.{j}", previous != channels[b])
            if down_types[b].startswith("CrossAttn"):
                out |= _transformer(f"input_blocks.{i}.1", f"{here}.attentions.{j}", _depth(depths[b], j))
            previous = channels[b]
            i += 1
        if b < n - 1:
            out |= both(f"input_blocks.{i}.0.op", f"down_blocks.{b}.downsamplers.0.conv")
            i += 1

    out |= _resnet("middle_block.0", "mid_block.resnets.0", False)
    out |= _transformer("middle_block.1", "mid_block.attentions.0", _depth(depths[-1], 0))
    out |= _resnet("middle_block.2", "mid_block.resnets.1", False)

    i = 0
    reverse = channels[::-1]
    previous = reverse[0]
    for b in range(n):
        skip_last = reverse[min(b + 1, n - 1)]  # the last layer takes the skip from one level up
        count = layers[::-1][b] + 1
        for j in range(count):
            here, block = f"up_blocks.{b}", f"output_blocks.{i}"
            incoming = previous + (skip_last if j == count - 1 else reverse[b])
            out |= _resnet(f"{block}.0", f"{here}.resnets.{j}", incoming != reverse[b])
            next_slot = 1
            if up_types[b].startswith("CrossAttn"):
                out |= _transformer(f"{block}.1", f"{here}.attentions.{j}", _depth(up_depths[b], j))
                next_slot = 2
            if j == count - 1 and b < n - 1:
                out |= both(f"{block}.{next_slot}.conv", f"{here}.upsamplers.0.conv")
            previous = reverse[b]
            i += 1
    out |= both("out.0", "conv_norm_out") | both("out.2", "conv_out")
    return {UNET + single: diffusers for single, diffusers in out.items()}


def known(types: list[str], expected: tuple[str, ...], n: int, what: str) -> None:
    """UserError unless there are `n` block types, all of them `expected` ones."""
    if len(types) != n:
        raise UserError(f"config: {what} lists {len(types)} blocks, expected {n}")
    for kind in types:
        if kind not in expected:
            raise UserError(f"config: {what} has {kind!r}; SD1.5 and SDXL have only {', '.join(expected)}")


def _depth(depth: int | Sequence[int], layer: int) -> int:
    return depth if isinstance(depth, int) else depth[layer]
