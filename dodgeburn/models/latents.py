"""Between the VAE's latents and those the U-Net works on, and from there to pixels.

The U-Net sees latents of about unit variance: (z - mean) / std * scaling_factor where the VAE's config has
`latents_mean` and `latents_std` (per channel), else z * scaling_factor; diffusers' SDXL pipeline does the
same.
"""

from typing import Any

import torch
from torch import Tensor

DECODE_PIXELS = 4 * 1024 * 1024  # pixels decoded at a time; bounds the memory that decoding takes


def _mean_std(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return None
    shape = (1, -1, 1, 1)
    return (
        torch.tensor(mean, device=like.device, dtype=like.dtype).view(shape),
        torch.tensor(std, device=like.device, dtype=like.dtype).view(shape),
    )


def normalise(latents: Tensor, config: Any) -> Tensor:
    """The VAE's latents [n, c, h, w] to the U-Net's; `config` is the VAE's config (a mapping)."""
    moments = _mean_std(config, latents)
    if moments is None:
        return latents * config["scaling_factor"]
    mean, std = moments
    return (latents - mean) * config["scaling_factor"] / std


def denormalise(latents: Tensor, config: Any) -> Tensor:
    """The U-Net's latents [n, c, h, w] to the VAE's: the inverse of `normalise`."""
    moments = _mean_std(config, latents)
    if moments is None:
        return latents / config["scaling_factor"]
    mean, std = moments
    return latents * std / config["scaling_factor"] + mean


@torch.no_grad()
def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures uint8 [n, height, width, 3] to U-Net latents float32 [n, c, h, w] on the CPU: the VAE's means.

    Sides must be multiples of the VAE's factor.
    """
    like = next(vae.parameters())
    n = max(1, DECODE_PIXELS // (pictures.shape[1] * pictures.shape[2]))
    parts = []
    for start in range(0, len(pictures), n):
        x = pictures[start : start + n].permute(0, 3, 1, 2).to(like.device, like.dtype) / 127.5 - 1
        parts.append(normalise(vae.encode(x).latent_dist.mean, vae.config).float().cpu())
    return torch.cat(parts)


def decode_pictures(vae: Any, latents: Tensor) -> Tensor:
    """U-Net latents [n, c, h, w] to pictures uint8 [n, height, width, 3] on the CPU; NaN becomes black."""
    dtype = next(vae.parameters()).dtype
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    n = max(1, DECODE_PIXELS // (latents.shape[-1] * latents.shape[-2] * scale * scale))
    parts = []
    for start in range(0, len(latents), n):
        z = denormalise(latents[start : start + n], vae.config).to(dtype)
        pixels = vae.decode(z, return_dict=False)[0].float()
        pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().nan_to_num(0.0)
        parts.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)
