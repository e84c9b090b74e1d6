"""The first attempt at this task, rebuilt so that its recipe can be run, seen to fail, and beaten.

outrun32/diffusion-artifact-estimator (its code was read, none is taken): the finished picture's latents get noise of
one level, a matrix turns the noisy latents into a small 8-bit RGB picture, an encoder trained to match such previews
with their prompts turns it into a vector, and five linear layers without activations (one linear function, that is)
guess the artifact rating 0..5 with a squared error. With batches of 8 192 for some thousand rows an epoch is one
optimiser step: 25 of them, and 25 more on a class-balanced part, whose best constant is 2.5. It returned 2.5.

Here the matrix is fitted to the VAE at hand by least squares, and the number of optimiser steps is a setting. A tiny
VAE can show the previews in its place (`tiny_vae.py`), at the pictures' full size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dodgeburn.errors import UserError
from dodgeburn.foresee.feed import Where, words_of
from dodgeburn.foresee.shards import Store
from dodgeburn.foresee.tiny_vae import fit_tiny, show
from dodgeburn.training.loop import LoopSettings, train

BATCH = 8192
LOG_SNR = -0.964  # SD1.5 at time step 500: alpha_bar 0.276
WORDS = 256


def fit_preview(latents: Tensor, pictures: Tensor) -> Tensor:
    """The matrix [c + 1, 3] (last row: constant) that best turns latents [n, c, h, w] into pictures (uint8
    [n, H, W, 3]) averaged down to h x w and scaled to -1..1, by least squares."""
    n, c, h, w = latents.shape
    small = F.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, (h, w))
    x = latents.float().permute(0, 2, 3, 1).reshape(-1, c)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    found: Tensor = torch.linalg.lstsq(x, small.permute(0, 2, 3, 1).reshape(-1, 3)).solution
    return found


def preview(latents: Tensor, matrix: Tensor) -> Tensor:
    """Latents [n, c, h, w] as 8-bit pictures uint8 [n, h, w, 3]: noise is cut off at black and white, as it was."""
    x = latents.float().permute(0, 2, 3, 1)
    rgb = x @ matrix[:-1] + matrix[-1]
    return ((rgb + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)


def noised(latents: Tensor, log_snr: float, generator: torch.Generator) -> Tensor:
    """Finished latents with noise of one level: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    alpha = torch.tensor(log_snr).sigmoid()
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn(latents.shape, generator=generator)


class PreviewEncoder(nn.Module):
    """Previews uint8 [n, h, w, 3] to unit vectors [n, width]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(8, 24), nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.GroupNorm(8, 48), nn.SiLU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1), nn.GroupNorm(8, 96), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(96, width)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.layers(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).mean((2, 3))
        return F.normalize(self.out(x), dim=1)


def five_layers(inputs: int, width: int = 1024) -> nn.Sequential:
    """The head: five linear layers and nothing between them."""
    sizes = [inputs, *[width] * 4, 1]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


@dataclass(frozen=True)
class OriginalSettings:
    """steps: optimiser steps of the head. balanced: half of them on the class-balanced part, as it was. batch: 8 192 is
    the original's; more than there are rows means one step an epoch. tiny: previews by a tiny VAE, not a matrix."""

    steps: int = 50
    batch: int = BATCH
    balanced: bool = True
    width: int = 1024
    encoder_steps: int = 300
    encoder_batch: int = 32
    tiny: bool = False
    seed: int = 0


@dataclass
class Original:
    """The trained pipeline: noisy latents in, artifact rating out."""

    show: Callable[[Tensor], Tensor]  # latents [n, c, h, w] to previews uint8 [n, h', w', 3]
    encoder: PreviewEncoder
    head: nn.Sequential

    @torch.no_grad()
    def score(self, x_t: Tensor) -> np.ndarray:
        """Estimated severity of noisy latents [n, c, h, w]; float [n]."""
        found: np.ndarray = self.head(self.encoder(self.show(x_t)))[:, 0].numpy()
        return found


@dataclass
class Finished:
    """Finished latents [n, c, h, w] with severities [n], prompts and pictures."""

    latents: Tensor
    severity: Tensor
    prompts: list[str]
    pictures: Tensor


def finished(store: Store, where: Where) -> Finished:
    """The last clean estimates and the pictures of labelled trajectories. UserError where shards hold no pictures."""
    latents, severity, prompts, pictures = [], [], [], []
    for shard in store.shards(("x0", "picture")):
        for i, record in enumerate(shard.records):
            if record.label is not None and where(record) and shard.rows(i).stop > shard.rows(i).start:
                latents.append(shard.tensors["x0"][shard.rows(i).stop - 1].float())
                pictures.append(shard.tensors["picture"][i])
                severity.append(record.label.severity)
                prompts.append(record.prompt)
    if not latents:
        raise UserError(f"{', '.join(map(str, store.folders))}: no labelled trajectories with pictures there")
    return Finished(torch.stack(latents), torch.tensor(severity), prompts, torch.stack(pictures))


def train_encoder(previews: Tensor, prompts: list[str], folder: Path, settings: OriginalSettings) -> PreviewEncoder:
    """Contrastive training of previews against prompts (arXiv 2103.00020), the prompts as hashed words."""
    torch.manual_seed(settings.seed)
    encoder, text = PreviewEncoder(), nn.Linear(WORDS, 128)
    words = torch.stack([words_of(p, WORDS) for p in prompts])

    def batch(i: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(previews), (settings.encoder_batch,), generator=generator)

    def losses(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        similar = encoder(previews[index]) @ F.normalize(text(words[index]), dim=1).T / 0.07
        same = words[index] @ words[index].T > 0.999  # a prompt of several pictures is no negative for any of them
        target = same.float() / same.sum(1, keepdim=True)
        both = -(target * similar.log_softmax(1)).sum(1).mean() - (target * similar.T.log_softmax(1)).sum(1).mean()
        return {"contrast": both / 2}

    loop = LoopSettings(steps=settings.encoder_steps, lr=1e-3, warmup=30, precision="no", ema=0.98, seed=settings.seed,
                        checkpoint_every=settings.encoder_steps)  # fmt: skip
    train("encoder", {"encoder": encoder, "text": text}, batch, losses, folder, loop)
    return encoder


def train_head(x: Tensor, severity: Tensor, folder: Path, settings: OriginalSettings) -> nn.Sequential:
    """The head on vectors [n, d] and severities [n]: AdamW 1e-3, then 1e-4 on as many rows of each rounded severity."""
    torch.manual_seed(settings.seed)
    head = five_layers(x.shape[1], settings.width)
    level = severity.round().long()
    counts = [int((level == v).sum()) for v in level.unique().tolist()]
    rng = torch.Generator().manual_seed(settings.seed)
    balanced = torch.cat([
        (level == v).nonzero()[:, 0][torch.randperm(int((level == v).sum()), generator=rng)[: min(counts)]]
        for v in level.unique().tolist()
    ])  # fmt: skip
    for name, rows, lr in (("head", torch.arange(len(x)), 1e-3), ("head-balanced", balanced, 1e-4)):
        if name != "head" and not settings.balanced:
            break
        steps = settings.steps // 2 if settings.balanced else settings.steps

        def batch(i: int, generator: torch.Generator, rows: Tensor = rows) -> Tensor:
            if settings.batch >= len(rows):
                return rows
            return rows[torch.randint(len(rows), (settings.batch,), generator=generator)]

        def losses(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            return {"mse": F.mse_loss(head(x[index])[:, 0], severity[index])}

        loop = LoopSettings(
            steps=steps, lr=lr, betas=(0.9, 0.999), warmup=0, constant=0.0, final=0.0, ema=0.0, precision="no",
            seed=settings.seed, checkpoint_every=steps, settings={"phase": name},
        )  # fmt: skip
        train(name, {"head": head}, batch, losses, folder, loop)
    return head


def train_original(
    data: Finished, folder: Path, settings: OriginalSettings | None = None, tiny: Any = None
) -> Original:
    """The whole route on finished pictures. tiny: a tiny VAE (`load_tiny`) to see previews by; fitted to these pictures
    where the settings ask for one and none is given."""
    settings = settings or OriginalSettings()
    if settings.tiny and tiny is None:
        tiny = fit_tiny(data.latents, data.pictures, folder / "tiny-vae", seed=settings.seed)
    by = partial(preview, matrix=fit_preview(data.latents, data.pictures)) if tiny is None else partial(show, tiny)
    generator = torch.Generator().manual_seed(settings.seed)
    previews = by(noised(data.latents, LOG_SNR, generator))
    encoder = train_encoder(previews, data.prompts, folder / "encoder", settings)
    with torch.no_grad():
        vectors = encoder(previews)
    head = train_head(vectors, data.severity, folder / f"head-{settings.steps}-{settings.batch}", settings)
    return Original(by, encoder, head)
