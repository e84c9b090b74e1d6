"""Preference alignment of a diffusion model: Diffusion-DPO (arXiv 2311.12908) and its successors, as a LoRA or in full.

A step takes pairs, noises winner and loser of each alike (`pair_points.py`), asks the model in training and its
reference (`reference.py`) for the noise, and minimises a loss of the four errors (`losses.py`). Everything else is
`training/loop.py`'s: averaging, accumulation, several processes, checkpoints, resuming.

The log says every few steps whether this goes well: `accuracy`, the share of pairs whose margin has the right sign;
`winner` and `loser`, by how much their errors differ from the reference's, as shares of the winners' reference error
(without a reference, the errors themselves); `margin`, the median size of z. `sft` has the winners' alone. DPO widens a
margin also by making both worse, the loser more: where the winners' error rises by a tenth, a warning says so.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.adapters import Adapter, attached, layers_of, new_adapter
from dodgeburn.models.model import Model
from dodgeburn.rework.dpo.losses import LOSSES, PairErrors, safe_share, scaled_gradient
from dodgeburn.rework.dpo.pair_points import PairPoints, Rows, encode_pairs
from dodgeburn.rework.dpo.pairs import PreferencePairs
from dodgeburn.rework.dpo.reference import TRAINED, Bank, Copy, Follower, Off, Reference, make_bank
from dodgeburn.rework.dpo.settings import DpoSettings
from dodgeburn.training.loop import LoopSettings, attention_on, train

ALARM = 0.10  # rise of the winners' error over the reference's, as a share of it
FEW_TOKENS = 1024  # latent cells up to which plain attention pays off on the CPU


@dataclass
class Aligned:
    """A model aligned with preferences, and how it went. With `adapter` None, the model's U-Net itself was trained."""

    adapter: Adapter | None
    settings: DpoSettings
    beta: float
    elements: int  # of a latent: what beta belongs to
    history: list[dict[str, float]] = field(default_factory=list)  # the log
    alarms: int = 0  # intervals of the log in which the winners' error stood a tenth above the reference's
    forwards: int = 0  # samples through the U-Net, the reference's included
    seconds: float = 0.0

    @property
    def last(self) -> dict[str, float]:
        return self.history[-1] if self.history else {}


def align(
    model: Model,
    pairs: PreferencePairs,
    settings: DpoSettings,
    folder: Path,
    callback: Callable[[int, dict[str, float]], object] | None = None,
    first: Adapter | None = None,
    log_every: int = 10,
    checkpoint_every: int = 50,
    release: bool = False,
) -> Aligned:
    """Align `model` with `pairs`. A LoRA is returned and the model left as it was; in full, its U-Net is changed.

    folder: for the checkpoint and the log; the same call goes on where it was cut off. first: an adapter to start from.
    release: give back the memory of VAE and text encoders once pictures and captions are encoded; the model cannot draw
    afterwards. callback(step, means): False stops. Raises UserError for settings, layers or a model that cannot be, and
    a loss that is no longer finite.
    """
    began = time.perf_counter()
    if settings.rank is None and model.dtype != torch.float32:
        raise UserError("full training needs the weights in fp32: load the model with dtype fp32")
    points = PairPoints(
        model,
        encode_pairs(model, pairs, settings.flips, settings.guidance),
        settings.seed,
        settings.dropout,
        settings.start,
        settings.end,
        settings.emphasis,
    )
    elements = points.buckets[0].winners[0].numel()
    beta = settings.beta_for(elements)
    out = Aligned(None, settings, beta, elements)
    watch = _Watch(settings, callback)
    loop = _loop_settings(settings, model, pairs, beta, first, log_every, checkpoint_every)
    for module in model.components().values():
        module.requires_grad_(False)
    with ExitStack() as stack:
        if release:
            points.encode_all()
            for module in (model.vae, *model.text_encoders):
                module.to("meta")
        else:
            stack.enter_context(_vae_aside(model))
        stack.enter_context(_checkpointing(model.unet, settings.checkpointing))
        trained, reference = _begin(model, points, settings, loop, folder, first, stack)
        modules = {"adapter": trained} if isinstance(trained, Adapter) else {"unet": trained}
        modules |= reference.modules() if reference is not None else {}
        made = _Losses(points, reference, settings, beta)
        try:
            train("dpo", modules, made.batch, made, folder, loop, watch, str(model.device), _plain(points))
        finally:
            model.unet.requires_grad_(False)
            model.unet.eval()
    out.adapter = trained if isinstance(trained, Adapter) else None
    AcceleratorState().wait_for_everyone()  # or the first process clears away the log that others still read
    # From the log and by count, not as seen from here: a run that was resumed says the same as one that wasn't.
    out.history = _history(folder / "dpo.jsonl")
    out.alarms = sum(rise > ALARM for rise in _rises(out.history, settings))
    batches = int(out.last.get("step", 0)) * settings.accumulate * AcceleratorState().num_processes
    live = 0 if reference is None or isinstance(reference, Bank) else 1
    asked = (2 if LOSSES[settings.loss].loser else 1) * (1 if settings.guidance == 1 else 2)  # with text, and without
    out.forwards = asked * batches * settings.batch * (1 + live + settings.one_by_one)
    if isinstance(reference, Bank):
        out.forwards += asked * sum(len(errors) for errors in reference.kept)
    out.seconds = time.perf_counter() - began
    return out


def _begin(
    model: Model, points: PairPoints, settings: DpoSettings, loop: LoopSettings, folder: Path, first: Adapter | None,
    stack: ExitStack,
) -> tuple[nn.Module, Reference | None]:  # fmt: skip
    """What is trained, attached to the model, and its reference."""
    kind, decay = settings.kind_of_reference, settings.reference_decay
    bank = None
    if kind == "bank":  # before anything is attached: the model as it is
        said = json.dumps(loop.settings, sort_keys=True, default=str)
        size = min(settings.bank, settings.steps * settings.batch * settings.accumulate)
        with attention_on(model.device, _plain(points)):  # as in training, to the last bit
            bank = make_bank(points, size, folder, "dpo", said, batch=max(16, settings.batch))
    if settings.rank is None:
        reference: Reference | None = bank or (Copy(points, model, decay) if kind == "copy" else None)
        model.unet.requires_grad_(True)
        return model.unet, reference
    copied = Copy(points, model) if kind == "copy" else None  # before hooks are in it
    components = model.components()
    layers = [f"unet.{name}" for name in layers_of(model.unet, settings.layers)]
    adapter = first or new_adapter(components, layers, settings.rank, settings.alpha, settings.seed, "dpo")
    adapter.to(model.device)
    follower = Follower(adapter, decay).to(model.device) if decay else None
    adapters = [adapter, follower.net] if follower is not None else [adapter]
    attachment = stack.enter_context(attached(components, adapters, trains=True))  # type: ignore[arg-type]
    attachment.set(TRAINED if follower is not None else 1.0)
    return adapter, bank or copied or (Off(points, attachment, adapter, follower) if kind == "off" else None)


def _plain(points: PairPoints) -> bool:
    """Whether plain attention pays off."""
    return points.buckets[0].winners[0, 0].numel() <= FEW_TOKENS


class _Losses:
    """Batches, and what is minimised and logged of them."""

    def __init__(self, points: PairPoints, reference: Reference | None, settings: DpoSettings, beta: float) -> None:
        self.points, self.reference, self.settings, self.beta = points, reference, settings, beta
        self.loss = LOSSES[settings.loss].function

    def batch(self, index: int, generator: torch.Generator) -> tuple[int, Rows]:
        """(optimizer step, batch)"""
        n, bucket = self.settings.batch, self.points.draw(generator)
        if isinstance(self.reference, Bank):
            chosen = self.reference.draw(bucket, n, generator)
        else:
            chosen = list(range(index * n, (index + 1) * n))
        return index // self.settings.accumulate, self.points.rows(bucket, chosen)

    def _frozen(self, rows: Rows, step: int) -> Tensor | None:
        """The reference's errors [2n]."""
        if self.reference is None:
            return None
        if isinstance(self.reference, Bank) or not self.settings.one_by_one:
            return self.reference.errors(rows, step)
        return torch.cat([self.reference.errors(half, step) for half in rows.halves()])

    def __call__(self, drawn: tuple[int, Rows], generator: torch.Generator) -> dict[str, Tensor]:
        step, rows = drawn
        if not LOSSES[self.settings.loss].loser:
            return self._of_winners(rows.halves()[0])
        frozen = self._frozen(rows, step)
        predictor = self.points.buckets[rows.bucket].predictor
        if self.settings.one_by_one:
            said = torch.cat([
                checkpoint(predictor, half.x, half.timesteps, half.texts, use_reentrant=False) for half in rows.halves()
            ])  # fmt: skip
        else:
            said = predictor(rows.x, rows.timesteps, rows.texts)
        residuals = self.points.residuals(rows, said)
        winner, loser = residuals.square().mean(dim=(1, 2, 3)).chunk(2)
        nothing = torch.zeros_like(winner.detach())
        base = frozen.to(winner.device).chunk(2) if frozen is not None else (nothing, nothing)
        told: dict[str, Tensor] = {}
        passed = loser
        if self.settings.safeguard:
            of_winner, of_loser = residuals.chunk(2)
            share = safe_share(of_winner, of_loser, self.settings.slack)
            passed, told["passed"] = scaled_gradient(loser, share), share.mean()
        weights = rows.weights.to(winner.device)
        losses = self.loss(PairErrors(winner, passed, *base), self.beta)
        e = PairErrors(winner.detach(), loser.detach(), *base)
        size = base[0].mean() if frozen is not None else torch.ones_like(nothing[0])
        return {
            "loss": (weights * losses).mean(),
            "accuracy": ((e.difference() < 0).float() + 0.5 * (e.difference() == 0).float()).mean(),
            "winner": (e.winner - base[0]).mean() / size,
            "loser": (e.loser - base[1]).mean() / size,
            "margin": e.margin(self.beta).abs().median(),
            **told,
        }

    def _of_winners(self, rows: Rows) -> dict[str, Tensor]:
        """The same for a loss that asks nothing of losers and has no reference."""
        said = self.points.buckets[rows.bucket].predictor(rows.x, rows.timesteps, rows.texts)
        winner = self.points.residuals(rows, said).square().mean(dim=(1, 2, 3))
        nothing = torch.zeros_like(winner.detach())
        losses = self.loss(PairErrors(winner, nothing, nothing, nothing), self.beta)
        return {"loss": (rows.weights.to(winner.device) * losses).mean(), "winner": winner.detach().mean()}


def _history(log: Path) -> list[dict[str, float]]:
    """Rows of a log by step; where a stretch was done twice, the second time counts."""
    if not log.exists():
        return []
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    by_step = {row["step"]: {key: value for key, value in row.items() if key != "seconds"} for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _rises(history: list[dict[str, float]], settings: DpoSettings) -> list[float]:
    """By how much the winners' error stands above the reference's, as a share; without one, above where it began."""
    found = [row["winner"] for row in history]
    if LOSSES[settings.loss].reference:
        return found
    return [error / found[0] - 1 for error in found]


class _Watch:
    """Raises the alarm, once."""

    def __init__(self, settings: DpoSettings, callback: Callable[[int, dict[str, float]], object] | None) -> None:
        self.settings, self.callback = settings, callback
        self.first: list[dict[str, float]] = []
        self.alarmed = False

    def __call__(self, step: int, means: dict[str, float]) -> object:
        self.first = self.first or [means]
        rise = _rises([*self.first, means], self.settings)[-1]
        if rise > ALARM and not self.alarmed:
            self.alarmed = True
            warnings.warn(self._advice(step, rise), DodgeburnWarning, stacklevel=2)
        return self.callback(step, means) if self.callback is not None else None

    def _advice(self, step: int, rise: float) -> str:
        what = ["a lower --lr"]
        if LOSSES[self.settings.loss].reference:
            what.append("a higher --beta")
        if LOSSES[self.settings.loss].loser and not self.settings.safeguard:
            what.append("--safeguard")
        against = "the reference's" if LOSSES[self.settings.loss].reference else "where it began"
        return (
            f"at step {step} the winners' error stands {rise:.0%} above {against}: the model is losing what it knew; "
            f"try {' or '.join(what)}, or fewer steps"
        )


def _loop_settings(
    settings: DpoSettings, model: Model, pairs: PreferencePairs, beta: float, first: Adapter | None, log_every: int,
    checkpoint_every: int,
) -> LoopSettings:  # fmt: skip
    warmup = settings.warmup if settings.warmup is not None else settings.steps // 10
    full_on_cuda = settings.rank is None and model.device.type == "cuda"
    return LoopSettings(
        steps=settings.steps, lr=settings.rate, betas=(0.9, 0.999), weight_decay=settings.weight_decay, warmup=warmup,
        constant=settings.constant, final=0.0, grad_clip=1.0, ema=settings.ema,
        precision="bf16" if full_on_cuda else "no", seed=settings.seed, accumulate=settings.accumulate,
        checkpoint_every=checkpoint_every, log_every=log_every,
        settings={
            **settings.model_dump(), "beta": beta, "pairs": pairs.sha256, "model": model.sha256,
            "first": None if first is None else (first.name, first.origin and first.origin.sha256),
        },
    )  # fmt: skip


@contextmanager
def _checkpointing(unet: Any, on: bool) -> Iterator[None]:
    if on:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            unet.disable_gradient_checkpointing()


@contextmanager
def _vae_aside(model: Model) -> Iterator[None]:
    """The VAE has done its part: off the accelerator while the U-Net trains."""
    if model.device.type == "cpu":
        yield
        return
    model.vae.to("cpu")
    try:
        yield
    finally:
        model.vae.to(model.device)
