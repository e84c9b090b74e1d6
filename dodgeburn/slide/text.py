"""A slider from prompts: the U-Net with the slider at scale s is to say what the frozen one says, shifted by s.

Concept Sliders (arXiv 2311.12092), eq. 7 and 8, with the scale in it, so that both signs and all magnitudes are
trained:

    eps_s(x_t, c_t, t)  ->  eps(x_t, c_t, t) + s * eta * mean_p [ eps(x_t, (c+, p), t) - eps(x_t, (c-, p), t) ]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dodgeburn.models.adapters import Adapter, attached, layers_of, new_adapter
from dodgeburn.models.model import Model
from dodgeburn.slide.cache import Points, directions
from dodgeburn.slide.predict import Predictor, set_rows
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.training.loop import LoopSettings, train


@dataclass(frozen=True)
class Trained:
    """A trained slider and what it cost."""

    adapter: Adapter
    loss: float
    forwards: int  # samples through the U-Net for this slider alone, students included
    seconds: float


def train_text(
    model: Model,
    predictor: Predictor,
    points: Points,
    spec: SliderSpec,
    folder: Path,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    first: Adapter | None = None,
) -> Trained:
    """Train a slider on a class's points. `folder` holds the checkpoint to resume from; `first` is another start.

    Raises UserError for layers or a rank that cannot be, FloatingPointError when the loss is no longer finite.
    """
    began, before = time.perf_counter(), predictor.forwards
    components = model.components()
    layers = [f"unet.{name}" for name in layers_of(model.unet, spec.layers)]
    adapter = first or new_adapter(components, layers, spec.rank, spec.alpha, spec.seed, spec.name)
    shift = directions(predictor, points, spec) * spec.eta
    for module in components.values():
        module.requires_grad_(False)
    n = len(points.x)

    with attached(components, [adapter], trains=True) as attachment:

        def batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(n, (spec.batch,), generator=generator)
            # Magnitudes spread evenly, signs in turn: half of every batch pulls each way.
            spread = (torch.arange(spec.batch) + torch.rand(spec.batch, generator=generator)) / spec.batch
            return rows, (spread * 2 - 1) * spec.reach

        def losses(drawn: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
            rows, scales = drawn
            set_rows(attachment, scales)
            said = predictor(points.x[rows], points.timesteps[rows], [points.texts[int(i)] for i in rows])
            wanted = points.neutral[rows] + scales.view(-1, 1, 1, 1) * shift[rows]
            return {"loss": (said - wanted.to(said.device)).square().mean()}

        settings = LoopSettings(
            steps=spec.steps, lr=spec.lr, weight_decay=0.0, warmup=max(1, spec.steps // 20), constant=0.3, final=0.02,
            ema=0.9, precision="no", seed=spec.seed, checkpoint_every=25, log_every=5, settings=spec.model_dump(),
        )  # fmt: skip
        means = train(spec.name, {"adapter": adapter}, batch, losses, folder, settings, callback, str(model.device))
    return Trained(adapter, means.get("loss", float("nan")), predictor.forwards - before, time.perf_counter() - began)
