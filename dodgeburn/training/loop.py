"""One training loop for everything: accelerate, EMA, checkpoints, resume, a JSON-lines log, a progress bar.

The loop knows nothing of models: it gets modules, a function that makes batch number i, and a function that
turns a batch into losses. Batch i and its noise depend on the seed and on i alone, so a run that was killed and
resumed ends with the weights of one that was not.

A step may be made of several batches (`accumulate`), and of several processes (`accelerate launch`): each takes batches
of its own, gradients are averaged, and the first process alone writes. Batches are numbered the same way in both, so
two processes do what one does with twice the accumulation.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dodgeburn.checkpoint.atomic import atomic_path, explain
from dodgeburn.errors import UserError

BatchFn = Callable[[int, torch.Generator], Any]
LossFn = Callable[[Any, torch.Generator], dict[str, Tensor]]
"""Named scalars. Their sum is minimised; one that needs no gradient is only logged."""
Callback = Callable[[int, dict[str, float]], object]
"""Told (step, mean losses) every `log_every` steps; False ends the training there (early stopping)."""


class Diverged(UserError):
    """The loss is no longer finite; the last checkpoint is from before."""


@dataclass
class LoopSettings:
    """How to train. Lengths are in optimizer steps."""

    steps: int = 2000
    lr: float = 1.5e-3  # peak learning rate of AdamW
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200  # linear, from 0
    constant: float = 0.5  # share of the steps at the peak, then linear down to `final`
    final: float = 0.02  # last learning rate, as a share of the peak
    grad_clip: float = 1.0
    ema: float = 0.998  # decay of the averaged weights, reached after a ramp (1 + i) / (10 + i); 0: none are kept
    precision: str = "bf16"  # bf16 (autocast) or no (fp32)
    seed: int = 0
    accumulate: int = 1  # batches a step, of each process
    checkpoint_every: int = 500
    log_every: int = 20
    settings: dict[str, Any] = field(default_factory=dict)  # what else decides the outcome: a resume checks it

    def __post_init__(self) -> None:
        """UserError for what no training can be made with."""
        if self.precision not in ("bf16", "fp16", "no"):
            raise UserError(f"precision is {self.precision!r}: expected bf16, fp16 or no")
        shares = {"constant": self.constant, "final": self.final}
        decays = {"ema": self.ema, **{f"betas[{i}]": b for i, b in enumerate(self.betas)}}
        for name, value in {**shares, **decays}.items():
            if not 0 <= value <= 1 or (name in decays and value == 1):
                below = "below 1" if name in decays else "to 1"
                raise UserError(f"{name} is {value:g}: expected 0 {below}")
        if min(self.steps, self.accumulate, self.checkpoint_every, self.log_every) < 1:
            raise UserError("steps, accumulate, checkpoint_every or log_every is below 1")


def learning_rate(step: int, s: LoopSettings) -> float:
    """Learning rate of a step as a share of the peak: warm-up, plateau, linear decay."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    start = max(s.warmup, int(s.constant * s.steps))
    if step < start:
        return 1.0
    done = (step - start) / max(1, s.steps - start)
    return 1.0 + (s.final - 1.0) * min(1.0, done)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step: a function of seed and step, so that resuming repeats nothing."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)


class Average:
    """Exponential moving average of the parameters (fp32). With decay 0 it holds nothing: they are their average."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.shadow = [p.detach().clone().float() for p in parameters] if decay > 0 else []

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter], step: int) -> None:
        if not self.shadow:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        if not self.shadow:
            return
        for p, s in zip(parameters, self.shadow, strict=True):
            p.copy_(s)

    @contextmanager
    def shown(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within the context the parameters are the averaged ones."""
        held = [p.detach().clone() for p in parameters]
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, held, strict=True):
                    p.copy_(value)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Within the context the module is in eval mode: for a look in the middle of training."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def train(
    name: str,
    modules: dict[str, nn.Module],
    batch: BatchFn,
    losses: LossFn,
    folder: Path,
    settings: LoopSettings,
    callback: Callback | None = None,
    device: str = "cpu",
    plain_attention: bool = True,
    show_average: bool = False,
) -> dict[str, float]:
    """Train `modules` in place; they end with the averaged weights, in eval mode.

    name: of the stage, for the checkpoint and the log in `folder`. batch(i, generator) makes batch i;
    losses(batch, generator) returns named scalars whose sum is minimised. plain_attention: on the CPU, by matrix
    products: faster for few tokens, but its memory grows with their square. show_average: while the callback is told,
    the modules hold the averaged weights, which are those that would be kept. Ctrl-C saves a checkpoint and stops;
    the same call goes on from there. Returns the last logged means. Raises UserError when the checkpoint in the
    folder was made with other settings, and Diverged when the loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # one process may train stages of different precision one after another
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=settings.precision)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    for m in modules.values():
        m.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    average = Average(parameters, settings.ema)
    checkpoint, log = folder / f"{name}.checkpoint.pt", folder / f"{name}.jsonl"
    processes, rank, parts_a_step = accelerator.num_processes, accelerator.process_index, settings.accumulate
    first = accelerator.is_main_process
    if processes > 1:
        _part_at_exit()
        settings = replace(settings, settings={**settings.settings, "processes": processes})
    start, since = _resume(checkpoint, modules, optimizer, average, settings)
    if first:
        _cut(log, start)
    means: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    # In a file, a line a minute; and tqdm's own environment variables count for the first process.
    seen = sys.stderr.isatty()
    hidden: dict[str, Any] = {} if first else {"disable": True}
    bar = tqdm(
        range(start, settings.steps), initial=start, total=settings.steps, desc=name, mininterval=1 if seen else 60,
        miniters=1, **hidden,
    )  # fmt: skip
    began, done = time.perf_counter(), start
    try:
        for step in bar:
            generator = step_generator(settings.seed, step * processes + rank)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * learning_rate(step, settings)
            said: list[dict[str, float]] = []
            for k in range(parts_a_step):
                with attention_on(accelerator.device, plain_attention):
                    with accelerator.autocast():
                        parts = losses(batch((step * parts_a_step + k) * processes + rank, generator), generator)
                    accelerator.backward(torch.stack(list(parts.values())).sum() / parts_a_step)
                said.append({key: float(value.detach()) / parts_a_step for key, value in parts.items()})
            if processes > 1:
                _average_gradients(accelerator, parameters)
            accelerator.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(parameters, step)
            since.add(said)
            done = step + 1
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                means = _over_processes(accelerator, since.means())
                since = _Since()
                if not all(math.isfinite(v) for v in means.values()):
                    more = f", and take {folder} away: it holds the state from before" if checkpoint.exists() else ""
                    raise Diverged(
                        f"{name}: the loss is no longer finite at step {step}: train with a smaller lr than "
                        f"{settings.lr:g}{more}"
                    )
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()}, refresh=seen)
                row = {"step": step + 1, **means, "seconds": round(time.perf_counter() - began, 1)}
                if first:
                    try:
                        with log.open("a", encoding="utf-8") as f:
                            f.write(json.dumps(row) + "\n")
                    except OSError as error:
                        raise explain(error, log) from None
                if callback is not None:
                    with average.shown(parameters) if show_average else nullcontext():
                        enough = callback(step + 1, means) is False
                    if enough:
                        break
            if first and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
                _save(checkpoint, modules, optimizer, average, settings, step + 1, since)
    except KeyboardInterrupt:
        # A step that was cut off before the optimizer moved is made again.
        if first:
            _save(checkpoint, modules, optimizer, average, settings, done, since)
        raise
    average.copy_to(parameters)
    for m in modules.values():
        m.eval()
    return means


@cache
def _part_at_exit() -> None:
    """Leave the process group before the interpreter ends: registered once, however many stages are trained.

    Without it a thread of gloo may still hold the last tensor when Python is already ending, and asking for the
    interpreter then aborts the process: a training that had succeeded ended with an error, rarely.
    """
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def _average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """The mean gradient over the processes, in every process: one message for all parameters."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    mean: Tensor = accelerator.reduce(flat, "mean")
    for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def _over_processes(accelerator: Accelerator, means: dict[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return means
    values = torch.tensor(list(means.values()), device=accelerator.device)
    mean: Tensor = accelerator.reduce(values, "mean")
    return dict(zip(means, mean.tolist(), strict=True))


def attention_on(device: torch.device, plain: bool = True) -> AbstractContextManager[None]:
    """What `train` computes attention with: plain, on the CPU, by matrix products. For the few tokens and narrow heads
    of the pocket, torch's fused backward took half of a training step (1.31 s against 0.78 s in all,
    benchmarks/training_step.py)."""
    return sdpa_kernel(SDPBackend.MATH) if plain and device.type == "cpu" else nullcontext()


def _fingerprint(settings: LoopSettings) -> str:
    kept = {k: v for k, v in asdict(settings).items() if k not in ("checkpoint_every", "log_every")}
    return json.dumps(kept, sort_keys=True, default=str)


@dataclass
class _Since:
    """Losses summed over the steps since the log's last row; checkpoints keep them: a mean is of all its steps."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, batches: list[dict[str, float]]) -> None:
        self.steps += 1
        for losses in batches:
            for key, value in losses.items():
                self.sums[key] = self.sums.get(key, 0.0) + value

    def means(self) -> dict[str, float]:
        return {key: value / self.steps for key, value in self.sums.items()}


def _cut(log: Path, step: int) -> None:
    """Take the log's rows away that are of later steps, which are made again, and one that was cut off."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_path(log) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _save(
    path: Path, modules: dict[str, nn.Module], optimizer: Any, average: Average, settings: LoopSettings, step: int,
    since: _Since,
) -> None:  # fmt: skip
    state = {
        "step": step,
        "since": asdict(since),
        "settings": _fingerprint(settings),
        "modules": {k: m.state_dict() for k, m in modules.items()},
        "optimizer": optimizer.state_dict(),
        "average": average.shadow,
    }
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # so torch's writer says that the disk refused; its message has no reason
            raise UserError(f"{path} cannot be written: the disk is full, or files may not be so large") from error


def _resume(
    path: Path, modules: dict[str, nn.Module], optimizer: Any, average: Average, settings: LoopSettings
) -> tuple[int, _Since]:
    """The step to go on with, and what was summed since the log's last row."""
    if not path.exists() or os.path.getsize(path) == 0:
        return 0, _Since()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError):
        raise UserError(f"{path} cannot be read: take {path.parent} away to begin this training anew") from None
    if state["settings"] != _fingerprint(settings):
        raise UserError(
            f"{path} was made with other settings: give those of that run, or take {path.parent} away to begin anew"
        )
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    optimizer.load_state_dict(state["optimizer"])
    for shadow, saved in zip(average.shadow, state["average"], strict=True):
        shadow.copy_(saved)
    return int(state["step"]), _Since(**state.get("since", {}))
