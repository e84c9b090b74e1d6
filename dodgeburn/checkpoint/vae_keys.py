"""Names of the VAE's tensors: single file (ldm names) -> diffusers' AutoencoderKL."""

from __future__ import annotations

from dodgeburn.checkpoint.unet_keys import Config, both, known

VAE = "first_stage_model."
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers < 0.18


def _vae_resnet(single: str, diffusers: str, shortcut: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        out |= both(f"{single}.{layer}", f"{diffusers}.{layer}")
    if shortcut:
        out |= both(f"{single}.nin_shortcut", f"{diffusers}.conv_shortcut")
    return out


def _vae_middle(side: str, attention: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for j in range(2):
        out |= _vae_resnet(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}", False)
    if attention:
        for a, b in _VAE_ATTENTION.items():
            out |= both(f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}")
    return out


def vae_key_map(config: Config) -> dict[str, str]:
    """Single-file key (`first_stage_model.…`) -> key of AutoencoderKL, from the VAE's config."""
    channels = list(config["block_out_channels"])
    n = len(channels)
    known(list(config["down_block_types"]), ("DownEncoderBlock2D",), n, "down_block_types")
    known(list(config["up_block_types"]), ("UpDecoderBlock2D",), n, "up_block_types")
    layers = int(config.get("layers_per_block", 1))
    attention = bool(config.get("mid_block_add_attention", True))
    out: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        out |= both(f"{side}.conv_in", f"{side}.conv_in") | _vae_middle(side, attention)
        out |= both(f"{side}.norm_out", f"{side}.conv_norm_out") | both(f"{side}.conv_out", f"{side}.conv_out")
    previous = channels[0]
    for b in range(n):
        single, diffusers = f"encoder.down.{b}", f"encoder.down_blocks.{b}"
        for j in range(layers):
            out |= _vae_resnet(f"{single}.block.{j}", f"{diffusers}.resnets.{j}", previous != channels[b])
            previous = channels[b]
        if b < n - 1:
            out |= both(f"{single}.downsample.conv", f"{diffusers}.downsamplers.0.conv")
    previous = channels[-1]
    for b in range(n):
        level = n - 1 - b  # ldm numbers the decoder's levels from fine to coarse
        single, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{b}"
        for j in range(layers + 1):
            out |= _vae_resnet(f"{single}.block.{j}", f"{diffusers}.resnets.{j}", previous != channels[level])
            previous = channels[level]
        if b < n - 1:
            out |= both(f"{single}.upsample.conv", f"{diffusers}.upsamplers.0.conv")
    if config.get("use_quant_conv", True):
        out |= both("quant_conv", "quant_conv")
    if config.get("use_post_quant_conv", True):
        out |= both("post_quant_conv", "post_quant_conv")
    return {VAE + single: diffusers for single, diffusers in out.items()}


def is_vae_attention_weight(key: str) -> bool:
    """True for the single-file keys whose tensors are 1x1 convolutions there and linear in diffusers."""
    parts = key.split(".")
    return (
        len(parts) >= 3 and parts[-3] == "attn_1" and parts[-2] in ("q", "k", "v", "proj_out") and parts[-1] == "weight"
    )


def modern_vae_name(name: str) -> str:
    """An AutoencoderKL key of any diffusers release, as releases from 0.18 on spell it."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) > 1 and parts[-2] in _VAE_ATTENTION_OLD:
        return ".".join([*parts[:-2], _VAE_ATTENTION_OLD[parts[-2]], parts[-1]])
    return name
