"""What a model in training is compared with: itself as it was, without a second copy where that can be had.

- `Off`: the adapter in training, switched off. Nothing more in memory, one forward more a step.
- `Bank`: the reference's errors at a fixed number of points, worked out before training. One forward for each of them
  in all, and training draws from them only; also for full fine-tuning, where it saves the second U-Net.
- `Copy`: a second, frozen U-Net.

With `decay`, the reference follows the model as a moving average (Linear-DPO, arXiv 2605.21123): a second adapter, or
the copy, moves a little at the beginning of each step. Its state is saved with the model's, so runs resume exactly.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from dodgeburn.checkpoint.tensorfile import save_tensors
from dodgeburn.models.adapters import Adapter, Attachment
from dodgeburn.models.model import Model
from dodgeburn.rework.dpo.pair_points import PairPoints, Rows

TRAINED = torch.tensor([1.0, 0.0])
FOLLOWER = torch.tensor([0.0, 1.0])


class Reference(Protocol):
    """Errors of the reference at a batch, and what of it has to be saved."""

    def errors(self, rows: Rows, step: int) -> Tensor:
        """Mean squared errors [2n], winners first, without gradient."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """What changes in training and must be in a checkpoint."""
        ...


class Follower(nn.Module):
    """A moving average of a module's parameters: once a step, also when a step is begun twice."""

    def __init__(self, leader: nn.Module, decay: float) -> None:
        super().__init__()
        self.net = copy.deepcopy(leader).requires_grad_(False)
        self.decay = decay
        self.moved_at: Tensor
        self.register_buffer("moved_at", torch.tensor(0))

    @torch.no_grad()
    def follow(self, leader: nn.Module, step: int) -> None:
        """Move towards `leader` as it is before `step`; the first step finds both alike."""
        if step <= int(self.moved_at):
            return
        for mine, theirs in zip(self.net.parameters(), leader.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine.dtype), 1 - self.decay)
        self.moved_at.fill_(step)


def mean_errors(points: PairPoints, rows: Rows, said: Tensor) -> Tensor:
    """[2n], winners first."""
    return points.residuals(rows, said).square().mean(dim=(1, 2, 3))


class Off:
    """The adapter switched off (the second adapter of the attachment on, where it follows)."""

    def __init__(self, points: PairPoints, attachment: Attachment, adapter: Adapter, follower: Follower | None) -> None:
        self.points, self.attachment, self.adapter, self.follower = points, attachment, adapter, follower

    @torch.no_grad()
    def errors(self, rows: Rows, step: int) -> Tensor:
        scales = self.attachment.scales
        if self.follower is None:
            self.attachment.set(0.0)
        else:
            self.follower.follow(self.adapter, step)
            self.attachment.set(FOLLOWER)
        try:
            said = self.points.buckets[rows.bucket].predictor(rows.x, rows.timesteps, rows.texts)
        finally:
            self.attachment.set(scales)
        return mean_errors(self.points, rows, said)

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.follower is None else {"reference": self.follower}


class Copy:
    """A second U-Net."""

    def __init__(self, points: PairPoints, model: Model, decay: float = 0.0) -> None:
        self.points, self.leader, self.decay = points, model.unet, decay
        self.follower = Follower(model.unet, decay)
        self.follower.net.eval()
        other = replace(model, unet=self.follower.net)
        self.predictors = [replace(b.predictor, model=other, forwards=0) for b in points.buckets]

    @torch.no_grad()
    def errors(self, rows: Rows, step: int) -> Tensor:
        if self.decay:
            self.follower.follow(self.leader, step)
        predictor = self.predictors[rows.bucket]
        predictor.encode(rows.texts, alone=True)
        said = predictor(rows.x, rows.timesteps, rows.texts)
        return mean_errors(self.points, rows, said)

    def modules(self) -> dict[str, nn.Module]:
        return {"reference": self.follower} if self.decay else {}


class Bank:
    """Errors worked out beforehand, [points of a bucket, 2] for each bucket."""

    def __init__(self, points: PairPoints, errors: list[Tensor]) -> None:
        self.points, self.kept = points, errors

    def errors(self, rows: Rows, step: int) -> Tensor:
        chosen = self.kept[rows.bucket][rows.points]
        return torch.cat([chosen[:, 0], chosen[:, 1]]).to(self.points.buckets[0].predictor.model.device)

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def draw(self, bucket: int, count: int, generator: torch.Generator) -> list[int]:
        """Points to train on."""
        return torch.randint(len(self.kept[bucket]), (count,), generator=generator).tolist()


def make_bank(points: PairPoints, size: int, folder: Path, name: str, settings: str, batch: int = 16) -> Bank:
    """The errors of the model as it is at `size` points in all, shared among buckets by their pairs.

    They are kept in `folder` under `name` with `settings` (what they depend on) in the metadata, and read from there
    when a run goes on: by then the model has moved.
    """
    pairs = sum(len(bucket) for bucket in points.buckets)
    sizes = [max(1, round(size * len(bucket) / pairs)) for bucket in points.buckets]
    path = folder / f"{name}.bank.safetensors"
    if path.exists() and _settings_of(path) == settings:
        found = load_file(path)
        return Bank(points, [found[f"errors.{i}"] for i in range(len(sizes))])
    out: list[Tensor] = []
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tqdm(total=sum(sizes), desc="reference", disable=None) as bar:
        for b, count in enumerate(sizes):
            parts = []
            for start in range(0, count, batch):
                rows = points.rows(b, range(start, min(start + batch, count)))
                said = points.buckets[b].predictor(rows.x, rows.timesteps, rows.texts)
                parts.append(mean_errors(points, rows, said).view(2, -1).T.cpu())
                bar.update(len(rows.points))
            out.append(torch.cat(parts))
    save_tensors(path, {f"errors.{i}": errors.contiguous() for i, errors in enumerate(out)}, {"settings": settings})
    return Bank(points, out)


def _settings_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str((file.metadata() or {}).get("settings", ""))
