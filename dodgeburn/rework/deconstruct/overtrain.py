"""Stage 1: overtraining to a controlled noisy state.

All of the U-Net's weights are trained on pictures of the biased concepts' majority, which exaggerates the association,
so that the weights move along it. Constant learning rate (ten times a fine-tune's), AdamW without weight decay, no
average, one caption in ten left out. Every few steps the meters are read (meters.py):

    in the band    L >= loss_low or V <= variety_low; twice running: stop
    too far        L > loss_high, U > unread_high, or a loss that is not finite: back to the last check in the band;
                   if there was none, back to the start with half the learning rate, up to `retries` times

"Predictably" is a test: over several seeds, the step at which it stops has a coefficient of variation of at most 25 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError
from dodgeburn.models.model import Model
from dodgeburn.rework.deconstruct.meters import Meters, Reading
from dodgeburn.rework.deconstruct.spec import DeconstructSpec, Overtrain
from dodgeburn.rework.deconstruct.stage_log import StageLog, StageResult, State, load_unet, save_unet
from dodgeburn.training.examples import Examples
from dodgeburn.training.fine_tune import fine_tune
from dodgeburn.training.loop import Diverged, evaluated

Tell = Callable[[str, int, Reading], object]
"""Told (stage, step, reading) at every check."""


def overtrain(
    model: Model, base: State, stress: Examples, meters: Meters, spec: DeconstructSpec, folder: Path,
    tell: Tell | None = None,
) -> StageResult:  # fmt: skip
    """From `base` into the band; the model ends there. A finished stage is only loaded."""
    log = StageLog(folder, "overtrain")
    if (done := log.restored(model)) is not None:
        return done
    drawn = meters.drawn
    s = spec.overtrain
    found = _into_band(model, base, stress, meters, spec, log, s.seed, "", tell)
    detail: dict[str, Any] = {"lr": found["lr"], "step": found["step"], "attempts": found["attempts"]}
    if s.predict > 1:
        state = log.folder / "working" / "overtrain" / "found.safetensors"
        if not state.exists():
            save_unet(model, state)
        stops, steps = [found["step"]], found["steps"]
        for k in range(1, s.predict):
            again = _into_band(model, base, stress, meters, spec, log, s.seed + 1000 * k, f"seed{k}/", tell)
            stops.append(again["step"] if again["reached"] else None)
            steps += again["steps"]
        load_unet(model, state)
        found["steps"] = steps
        detail |= predictability(stops, s.predict_cv)
    return log.finish(model, found["decision"], found["reached"], found["steps"], found["steps"] * s.batch,
                      meters.drawn - drawn, **detail)  # fmt: skip


def predictability(stops: list[int | None], limit: float) -> dict[str, Any]:
    """Whether the steps at which several seeds stopped (None: never) vary by at most `limit` of their mean."""
    known = [step for step in stops if step is not None]
    if len(known) < len(stops) or len(known) < 2:
        return {"stops": stops, "cv": None, "predictable": False}
    cv = statistics.stdev(known) / statistics.mean(known)
    return {"stops": stops, "cv": round(cv, 4), "predictable": cv <= limit}


def in_band(reading: Reading, s: Overtrain) -> bool:
    """Whether the model has failed as it should."""
    return reading.loss >= s.loss_low or reading.variety <= s.variety_low


def too_far(reading: Reading, s: Overtrain) -> bool:
    """Whether it has failed too much."""
    return not math.isfinite(reading.loss) or reading.loss > s.loss_high or reading.unread > s.unread_high


def _into_band(
    model: Model, base: State, stress: Examples, meters: Meters, spec: DeconstructSpec, log: StageLog, seed: int,
    prefix: str, tell: Tell | None,
) -> dict[str, Any]:  # fmt: skip
    """One seed's attempts; the model ends in the state that was found."""
    s = spec.overtrain
    spent = 0
    for attempt in range(s.retries + 1):
        lr = s.base_lr * s.factor / 2**attempt
        one = _Attempt(model, meters, log, s, f"{prefix}{attempt}", tell)
        load_unet(model, base)
        settings = spec.tuning(
            steps=s.steps, batch=s.batch, lr=lr, empty=0.1, warmup=0, constant=1.0, final=1.0, ema=0.0,
            weight_decay=0.0, seed=seed, checkpoint_every=s.every, log_every=s.every, gamma=math.inf, noise_power=0.0,
        )  # fmt: skip
        try:
            fine_tune(model, stress, settings, log.work / one.name, "overtrain", callback=one)
        except Diverged:
            one.far = True
        spent += one.last
        log.decide(one.name, one.decision, step=one.last, lr=lr)
        if not one.far or one.band is not None:
            if one.stop is None and one.band is not None:
                load_unet(model, one.state)
            step = one.band if one.band is not None else one.last
            return {"decision": one.decision, "reached": one.band is not None, "step": step, "steps": spent, "lr": lr,
                    "attempts": attempt + 1}  # fmt: skip
    load_unet(model, base)
    raise UserError(
        f"overtraining went past loss_high {s.loss_high:g} without a check in the band, {s.retries + 1} times with "
        f"ever smaller learning rates (last {lr:g}): check more often (every), or raise loss_high"
    )


class _Attempt:
    """The callback of one training: reads the meters and says when it is enough."""

    def __init__(self, model: Model, meters: Meters, log: StageLog, s: Overtrain, name: str, tell: Tell | None) -> None:
        self.model, self.meters, self.log, self.s, self.name, self.tell = model, meters, log, s, name, tell
        self.state = log.work / name / "band.safetensors"
        self.running, self.last = 0, 0
        self.band: int | None = None  # the last check in the band
        self.stop: int | None = None
        self.far = False
        # A training that resumes begins behind its first checks: what they saw counts as if it were seen again.
        for step in range(s.every, s.steps + 1, s.every):
            if f"{name}:{step}" not in log.rows or self.stop is not None or self.far:
                break
            self._judge(step, Reading.from_json(log.rows[f"{name}:{step}"]))

    @property
    def decision(self) -> str:
        if self.stop is not None:
            return f"in the band at two checks running, steps {self.stop - self.s.every} and {self.stop}"
        if self.far:
            back = f"step {self.band}, in the band" if self.band else "the start, half the learning rate"
            return f"too far at step {self.last}: back to {back}"
        if self.band is not None:
            return f"steps used up; last in the band at step {self.band}"
        return f"the band was not reached in {self.s.steps} steps"

    def __call__(self, step: int, means: dict[str, float]) -> bool:
        known = f"{self.name}:{step}" in self.log.rows
        reading = self.log.reading(f"{self.name}:{step}", self._measure, attempt=self.name, step=step,
                                   train_loss=round(means.get("loss", math.nan), 5))  # fmt: skip
        if not known:
            self._judge(step, reading)
        if self.band == step:
            save_unet(self.model, self.state)
        if self.tell is not None:
            self.tell("overtrain", step, reading)
        return not (self.far or self.stop is not None)

    def _measure(self) -> Reading:
        with evaluated(self.model.unet):
            return self.meters.quick()

    def _judge(self, step: int, reading: Reading) -> None:
        self.last = step
        if too_far(reading, self.s):
            self.far = True
        elif in_band(reading, self.s):
            self.running += 1
            self.band = step
            if self.running == 2:
                self.stop = step
        else:
            self.running = 0
