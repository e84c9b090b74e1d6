"""A tiny decoder that shows what latents hold without the VAE (diffusers' AutoencoderTiny, as TAESD is one).

For real models a folder of TAESD weights is loaded; for any other model the same network, smaller, is fitted to
finished latents and their pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.errors import UserError
from dodgeburn.training.loop import LoopSettings, train

WIDTH = 32


def load_tiny(folder: str | Path) -> Any:
    """An AutoencoderTiny of a local folder. Raises UserError for a folder that holds none."""
    from diffusers import AutoencoderTiny

    try:
        tiny: Any = AutoencoderTiny.from_pretrained(str(folder), local_files_only=True)
        return tiny.eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tiny VAE's folder ({str(error).splitlines()[0][:100]})") from None


def fit_tiny(latents: Tensor, pictures: Tensor, folder: Path, steps: int = 400, seed: int = 0) -> Any:
    """Fit one to latents [n, c, h, w] and their pictures (uint8 [n, H, W, 3]) by squared error.

    H is h times a power of two. folder: for the checkpoint. Raises UserError for sizes that no such decoder has.
    """
    from diffusers import AutoencoderTiny

    factor, h = pictures.shape[1] // latents.shape[2], latents.shape[2]
    if pictures.shape[1] != factor * h or factor < 2 or factor & (factor - 1):
        raise UserError(
            f"pictures of {pictures.shape[1]} pixels for latents of {h}: expected a power of two between them"
        )
    levels = factor.bit_length()
    torch.manual_seed(seed)
    tiny: Any = AutoencoderTiny(
        latent_channels=latents.shape[1], decoder_block_out_channels=(WIDTH,) * levels,
        num_decoder_blocks=(1,) * levels, encoder_block_out_channels=(8,) * levels, num_encoder_blocks=(1,) * levels,
    )  # fmt: skip
    wanted = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1

    def batch(i: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(latents), (16,), generator=generator)

    def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(tiny.decoder(latents[rows].float()), wanted[rows])}

    loop = LoopSettings(steps=steps, lr=2e-3, warmup=20, precision="no", ema=0.98, seed=seed, checkpoint_every=steps,
                        settings={"shape": list(latents.shape)})  # fmt: skip
    train("tiny-vae", {"decoder": tiny.decoder}, batch, losses, folder, loop)
    return tiny.eval()


@torch.no_grad()
def show(tiny: Any, latents: Tensor, batch: int = 64) -> Tensor:
    """Scaled latents [n, c, h, w] as pictures uint8 [n, H, W, 3]."""
    found = [tiny.decoder(latents[i : i + batch].float()) for i in range(0, len(latents), batch)]
    return ((torch.cat(found) + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
