"""Stage 1 of the pocket: the VAE, and the scaling that makes its latents look like SDXL's to every tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.training.loop import LoopSettings, train


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> np.ndarray:
    """float [n, 3, h, w] in [-1, 1] -> uint8 [n, h, w, 3]."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(
    vae: Any,
    pictures: np.ndarray,
    folder: Path,
    settings: LoopSettings,
    polish: LoopSettings,
    batch: int,
    device: str,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train `vae` on uint8 pictures [n, h, w, 3]: L1, L1 of the edges (fingers and lips), and a small KL term.

    `polish` goes on with the edges weighing twice as much: flat areas are right by then, mouths and fingers are not.
    """
    edge_weight = 0.5

    def make(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (batch,), generator=generator).sort().values.numpy()
        return to_tensor(pictures[index]).to(device)

    def losses(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        moments = vae.encode(x).latent_dist
        noise = torch.randn(moments.mean.shape, generator=generator).to(device)
        y = vae.decode(moments.mean + moments.std * noise).sample.float()
        slopes = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        kl = 0.5 * (moments.mean.float() ** 2 + moments.var.float() - 1 - moments.logvar.float()).mean()
        return {"l1": (x - y).abs().mean(), "edges": edge_weight * slopes, "kl": 1e-4 * kl}

    train("vae", {"vae": vae}, make, losses, folder, settings, callback, device)
    edge_weight = 1.0
    train("vae-polish", {"vae": vae}, make, losses, folder, polish, callback, device)


def train_decoder(
    vae: Any,
    pictures: np.ndarray,
    latents: Tensor,
    folder: Path,
    settings: LoopSettings,
    batch: int,
    device: str,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train on the decoder alone, from scaled latents [n, 4, 16, 16] of uint8 pictures [n, h, w, 3], the face weighing
    three times as much: eyes and mouths are what round trips lose. Latents stay as they are, so a U-Net does too."""
    size = pictures.shape[1]
    window = torch.ones(size, size)
    window[size // 4 : size * 3 // 4, size * 3 // 16 : size * 3 // 4] = 3.0
    window = (window / window.mean()).to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def make(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pictures), (batch,), generator=generator).sort().values
        z = latents[index].float() / vae.config.scaling_factor
        return to_tensor(pictures[index.numpy()]).to(device), z.to(device)

    def losses(made: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        x, z = made
        y = vae.decode(z).sample.float()
        (dx, dy), (ex, ey) = edges(x), edges(y)
        slopes = ((dx - ex).abs() * window[:, 1:]).mean() + ((dy - ey).abs() * window[1:]).mean()
        return {"l1": ((x - y).abs() * window).mean(), "edges": slopes}

    train("vae_decoder", {"vae": vae}, make, losses, folder, settings, callback, device)


@torch.no_grad()
def encode(vae: Any, pictures: np.ndarray, device: str, batch: int = 32) -> Tensor:
    """Latent means as the U-Net sees them (times the scaling factor): float32 [n, 4, 16, 16]."""
    factor = vae.config.scaling_factor
    out = [
        vae.encode(to_tensor(pictures[i : i + batch]).to(device)).latent_dist.mean.float().cpu() * factor
        for i in range(0, len(pictures), batch)
    ]
    return torch.cat(out)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, device: str, batch: int = 32) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] of scaled latents [n, 4, 16, 16]."""
    factor = vae.config.scaling_factor
    parts = [vae.decode(z.to(device) / factor).sample for z in latents.split(batch)]
    return np.concatenate([to_pictures(p) for p in parts])


@torch.no_grad()
def normalise(vae: Any, pictures: np.ndarray, device: str) -> None:
    """Give each latent channel mean 0 and std 1 / scaling_factor by folding the change into the 1x1 convolutions.

    After it, `latents * scaling_factor` is unit-sized, with SDXL's constant 0.13025 that single-file tools
    hard-code, and needs no latents_mean / latents_std that those tools would not read.
    """
    factor = vae.config.scaling_factor
    z = encode(vae, pictures, device) / factor
    mean, std = z.mean(dim=(0, 2, 3)).to(device), z.std(dim=(0, 2, 3)).to(device)
    gain = 1 / (std * factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    c = len(mean)
    quant.weight[:c] *= gain.view(c, 1, 1, 1)
    quant.bias[:c] = (quant.bias[:c] - mean) * gain
    quant.bias[c:] += 2 * gain.log()  # log-variance follows the scale
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= gain.view(1, c, 1, 1)
