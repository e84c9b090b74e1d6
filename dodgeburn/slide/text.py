"""A slider from prompts: the U-Net with the slider at scale s is to say what the frozen one says, shifted by s.

Concept Sliders (arXiv 2311.12092), eq. 7 and 8, with the scale in it, so that both signs and all magnitudes are
trained:

    eps_s(x_t, c_t, t)  ->  eps(x_t, c_t, t) + s * eta * mean_p [ eps(x_t, (c+, p), t) - eps(x_t, (c-, p), t) ]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from dodgeburn.models.adapters import Adapter, attached, new_adapter, trained_layers
from dodgeburn.models.model import Model
from dodgeburn.models.quick import bf16_is_quick, quick_products
from dodgeburn.sampling.predict import Predictor, predict_scaled
from dodgeburn.slide.cache import Points, directions
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.slide.stopping import Watch
from dodgeburn.training.loop import LoopSettings, train


@contextmanager
def _checkpointing(unet: Any, on: bool) -> Iterator[None]:
    """diffusers checkpoints in training mode only; Stable Diffusion's U-Nets have no dropout: nothing else changes."""
    if not on:
        yield
        return
    unet.enable_gradient_checkpointing()
    unet.train()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()


@contextmanager
def _plain_attention(model: Model) -> Iterator[None]:
    """On the CPU the U-Net's attention by matrix products, as `training.loop.attention_on` has it, and without torch's
    search for rows that are masked as a whole, which took a tenth of a step.
    """
    before = model.unet.attn_processors
    if model.device.type == "cpu" and all(type(one) is AttnProcessor2_0 for one in before.values()):
        model.unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        model.unet.set_attn_processor(before)


HELD_OUT = 12  # points that no step trains on
Progress = Callable[[int, Adapter], None]


@dataclass(frozen=True)
class Trained:
    """A trained slider and what it cost."""

    adapter: Adapter
    loss: float
    steps: int
    forwards: int  # samples through the U-Net for this slider alone, students included
    seconds: float


def train_text(
    model: Model,
    predictor: Predictor,
    points: Points,
    spec: SliderSpec,
    folder: Path,
    progress: Progress | None = None,
    first: Adapter | None = None,
    measure: Callable[[Adapter], float] | None = None,
    shuffled: bool = False,
    spent: Callable[[], int] = int,
) -> Trained:
    """Train a slider on a class's points.

    folder: for the checkpoint to resume from. first: a start other than 0. measure: what early stopping looks at where
    the spec asks for it (the higher the better); the loss on held-out points otherwise. spent: samples through the
    U-Net that measures have taken so far. progress(step, adapter) is called after every step. shuffled: a control,
    positive and negative changed about at random points. Raises UserError for layers or a rank that cannot be, and
    where the loss is no longer finite.
    """
    began, before = time.perf_counter(), predictor.forwards
    components = model.components()
    layers = trained_layers(components, spec.layers, spec.text_encoders)
    adapter = first or new_adapter(components, layers, spec.rank, spec.alpha, spec.seed, spec.name)
    shift = directions(predictor, points, spec) * spec.eta
    targets = predictor.forwards - before
    if shuffled:
        shift *= torch.randn(len(shift), 1, 1, 1, generator=torch.Generator().manual_seed(spec.seed)).sign()
    for module in components.values():
        module.requires_grad_(False)
    held = HELD_OUT if len(points.x) > 4 * HELD_OUT else 0
    n = len(points.x) - held
    reached = 0

    with ExitStack() as stack:
        stack.enter_context(_checkpointing(model.unet, spec.checkpointing))
        stack.enter_context(_plain_attention(model))
        attachment = stack.enter_context(attached(components, [adapter], trains=True))

        def error(rows: Tensor, scales: Tensor) -> Tensor:
            texts = [points.texts[int(i)] for i in rows]
            said = predict_scaled(predictor, attachment, scales, points.x[rows], points.timesteps[rows], texts)
            wanted = points.neutral[rows] + scales.view(-1, 1, 1, 1) * shift[rows]
            return (said - wanted.to(said.device)).square().mean()

        def batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(n, (spec.batch,), generator=generator)
            # Magnitudes spread evenly over both signs.
            spread = (torch.arange(spec.batch) + torch.rand(spec.batch, generator=generator)) / spec.batch
            return rows, (spread * 2 - 1) * spec.reach

        def losses(drawn: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
            return {"loss": error(*drawn)}

        def held_out() -> float:
            scales = torch.tensor([spec.reach / 2, -spec.reach / 2]).repeat(held)[:held]
            with torch.no_grad(), quick_products(model):
                return -float(error(torch.arange(n, n + held), scales))

        def measured() -> float:
            attachment.set(0.0)  # the measure attaches the adapter itself
            return measure(adapter) if measure is not None else held_out()

        long = measure is not None and spec.steps > 60
        by_measure = measure is not None and (spec.stop == "measure" or (spec.stop == "auto" and long))
        watch = None
        if spec.stop != "never" and (by_measure or held):
            samples = spent if by_measure else lambda: predictor.forwards
            watch = Watch(measured if by_measure else held_out, folder / f"{spec.name}.held-out.json", samples)

        def after(step: int, _: dict[str, float]) -> bool:
            nonlocal reached
            reached = step
            if progress is not None:
                attachment.set(0.0)
                progress(step, adapter)
            return watch is None or not watch.look(step)

        precision = "bf16" if bf16_is_quick(model) else "no"
        settings = LoopSettings(
            steps=spec.steps, lr=spec.lr, weight_decay=0.0, warmup=max(1, spec.steps // 20), constant=0.3, final=0.02,
            ema=0.9, precision=precision, seed=spec.seed, checkpoint_every=10, log_every=5 if progress is None else 1,
            settings=spec.model_dump(),
        )  # fmt: skip
        means = train(spec.name, {"adapter": adapter}, batch, losses, folder, settings, after, str(model.device))
    # Of all steps and looks, also those before an interruption: the number stands in the file.
    forwards = targets + reached * spec.batch + (watch.samples if watch is not None else 0)
    return Trained(adapter, means.get("loss", float("nan")), reached, forwards, time.perf_counter() - began)
