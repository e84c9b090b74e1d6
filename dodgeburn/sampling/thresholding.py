"""Dynamic thresholding: a high guidance scale with the contrast of a low one ("mimic") scale.

The sd-dynamic-thresholding extension of A1111, SwarmUI and ComfyUI, from its formulas. It works on the guesses of the
clean latents (x0), not on eps: guidance at the CFG scale is what the picture follows, guidance at the mimic scale says
how far from their mean values may lie. Both scales can change over the steps. (Imagen's thresholding, in diffusers, is
another thing: it clamps pixels.)

One deviation: where the channels are not taken apart, the original takes extremes and deviations over the whole batch,
so that a picture depends on its batch mates; here they are always those of one picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, field_validator

from dodgeburn.errors import UserError
from dodgeburn.sampling.spelling import resolve

if TYPE_CHECKING:
    from torch import Tensor

MODES = (
    "Constant", "Linear Down", "Cosine Down", "Half Cosine Down", "Linear Up", "Cosine Up", "Half Cosine Up",
    "Power Up", "Power Down", "Linear Repeating", "Cosine Repeating", "Sawtooth",
)  # fmt: skip
USES_VALUE = ("Power Up", "Power Down", "Linear Repeating", "Cosine Repeating", "Sawtooth")
STARTPOINTS = ("MEAN", "ZERO")
VARIABILITIES = ("AD", "STD")
FRACTIONS = ("step", "time")
SCHEDULER_VALUE = 4.0  # where none is given, as in the extension's A1111 panel


class Thresholding(BaseModel):
    """Settings of dynamic thresholding, named as in the extension. Raises UserError for a value out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mimic_scale: float = 7.0  # guidance scale whose spread of values is imitated, 0..100
    threshold_percentile: float = 1.0  # AD only: this quantile of |value - mean| is the CFG side's extreme, 0..1
    mimic_mode: str = "Constant"  # how the mimic scale changes over the steps: one of MODES
    mimic_scale_min: float = 0.0  # its value where the mode's curve is 0, 0..100; no effect with Constant
    cfg_mode: str = "Constant"  # the same for the guidance scale
    cfg_scale_min: float = 0.0
    scheduler_value: float | None = None  # exponent of Power, repetitions of Repeating and Sawtooth; None: 4
    separate_feature_channels: bool = True  # measure each latent channel apart, or all of a picture's together
    scaling_startpoint: str = "MEAN"  # shrink towards the channel's mean, or towards ZERO
    variability_measure: str = "AD"  # AD: largest absolute deviation; STD: standard deviation
    interpolate_phi: float = 1.0  # 1: all thresholded, 0: plain guidance
    fraction: str = "step"  # what the modes run along: "step" as A1111 and SwarmUI, "time" as ComfyUI

    @field_validator("mimic_scale", "mimic_scale_min", "cfg_scale_min")
    @classmethod
    def _scale(cls, value: float) -> float:
        if not 0 <= value <= 100:  # also refuses NaN
            raise UserError(f"a scale of dynamic thresholding is {value}: give a number from 0 to 100")
        return value

    @field_validator("threshold_percentile", "interpolate_phi")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise UserError(
                f"threshold percentile or interpolate phi is {value}: give a number from 0 to 1 (1 = 100 %)"
            )
        return value

    @field_validator("scheduler_value")
    @classmethod
    def _value(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 100:
            raise UserError(f"scheduler value is {value}: give a number from 0 to 100")
        return value

    @field_validator("mimic_mode", "cfg_mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        return resolve("mode of dynamic thresholding", value, MODES)

    @field_validator("scaling_startpoint")
    @classmethod
    def _startpoint(cls, value: str) -> str:
        return resolve("scaling startpoint", value, STARTPOINTS)

    @field_validator("variability_measure")
    @classmethod
    def _variability(cls, value: str) -> str:
        return resolve("variability measure", value, VARIABILITIES)

    @field_validator("fraction")
    @classmethod
    def _fraction(cls, value: str) -> str:
        return resolve("fraction", value, FRACTIONS)

    def progress(self, step: int, steps: int, timestep: float) -> float:
        """How far the generation is, 0..1: step / (steps - 1), or (999 - timestep) / 998."""
        if self.fraction == "step":
            return step / (steps - 1) if steps > 1 else 0.0
        return min(1.0, max(0.0, (999 - timestep) / 998))

    def scales(self, guidance: float, progress: float) -> tuple[float, float]:
        """(mimic scale, CFG scale) at a progress of 0..1."""
        value = SCHEDULER_VALUE if self.scheduler_value is None else self.scheduler_value
        return (
            scale_at(self.mimic_scale, self.mimic_mode, self.mimic_scale_min, progress, value),
            scale_at(guidance, self.cfg_mode, self.cfg_scale_min, progress, value),
        )


def scale_at(scale: float, mode: str, least: float, progress: float, value: float) -> float:
    """A scale at a progress of 0..1: (scale - least) * curve + least, with one of the `MODES` as the curve.

    "Half Cosine" is the cosine of 0..1 radians, so it goes from 1 to 0.54 (or from 0 to 0.46), as in the extension.
    """
    f = progress
    if mode == "Constant":
        curve = 1.0
    elif mode.startswith("Linear Repeating"):
        curve = abs(1 - 2 * ((f * value) % 1.0))
    elif mode == "Cosine Repeating":
        curve = 0.5 + 0.5 * math.cos(2 * math.pi * f * value)
    elif mode == "Sawtooth":
        curve = (f * value) % 1.0
    else:
        shape, direction = mode.rsplit(" ", 1)
        # what "Down" falls by and "Up" rises by
        change = {
            "Linear": f,
            "Half Cosine": 1 - math.cos(f),
            "Cosine": 1 - math.cos(f * math.pi / 2),
            "Power": f**value,
        }[shape]
        curve = change if direction == "Up" else 1 - change
    return (scale - least) * curve + least


def threshold(
    negative: Tensor, positive: Tensor, guidance: float, mimic: float, settings: Thresholding
) -> tuple[Tensor, Tensor]:
    """Guided x0 [n, c, h, w] from the x0 guesses of both prompts, at this step's CFG and mimic scales.

    And how many channels (pictures, where they are not taken apart) came out other than plain guidance, int64 [].
    """
    import torch

    difference = positive - negative
    plain = (negative + guidance * difference).flatten(2)
    imitated = (negative + mimic * difference).flatten(2)
    means = plain.mean(2, keepdim=True)
    centred, imitated = plain - means, imitated - imitated.mean(2, keepdim=True)
    ours, theirs = _spread(centred, settings, quantile=True), _spread(imitated, settings, quantile=False)
    if settings.scaling_startpoint == "ZERO":
        result = plain * _ratio(theirs, ours)
    elif settings.variability_measure == "STD":
        result = centred * _ratio(theirs, ours) + means
    else:
        largest = torch.maximum(theirs, ours)
        result = centred.clamp(-largest, largest) * _ratio(theirs, largest) + means
    if settings.interpolate_phi != 1.0:
        result = torch.lerp(plain, result, settings.interpolate_phi)
    apart = 2 if settings.separate_feature_channels else (1, 2)
    # Rounding is no effect: a change below a millionth of the largest value is not counted.
    changed = (result - plain).abs().amax(apart) > 1e-6 * plain.abs().amax(apart)
    return result.unflatten(2, negative.shape[2:]), changed.sum()


def _spread(centred: Tensor, settings: Thresholding, quantile: bool) -> Tensor:
    """How far values lie from their mean: [n, c, 1], or [n, 1, 1] where channels are not taken apart."""
    import torch

    values = centred if settings.separate_feature_channels else centred.flatten(1).unsqueeze(1)
    if settings.variability_measure == "STD":
        return values.std(2, keepdim=True)
    if quantile and settings.threshold_percentile < 1:
        return torch.quantile(values.abs(), settings.threshold_percentile, dim=2, keepdim=True)
    return values.abs().amax(2, keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where b is 0: a channel without any variation has nothing to shrink."""
    import torch

    return torch.where(b > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), torch.ones_like(a))


def explain(settings: Thresholding, guidance: float, steps: int, timesteps: tuple[float, ...]) -> list[str]:
    """What of these settings has no effect, or another than their names suggest, and what they really do: one line
    each. `timesteps` are the plan's.
    """
    pairs = [settings.scales(guidance, settings.progress(i, steps, t)) for i, t in enumerate(timesteps)]
    mimic, cfg = [m for m, _ in pairs], [c for _, c in pairs]
    says = []
    if settings.interpolate_phi == 0:
        says.append(f"dynamic thresholding has no effect with interpolate phi 0: it is plain CFG, {_curve(cfg)}")
    elif settings.scaling_startpoint == "MEAN" and settings.variability_measure == "AD":
        if all(c <= m for m, c in pairs):
            says.append(
                "dynamic thresholding hardly acts here: MEAN with AD does where CFG spreads the values further than "
                f"the mimic scale, but CFG is {_curve(cfg)} and the mimic scale {_curve(mimic)} over the steps. What "
                f"you get is close to plain CFG, {_curve(cfg)}"
            )
    elif all(c == m for m, c in pairs) and (
        settings.variability_measure == "STD" or settings.threshold_percentile == 1
    ):
        says.append(f"dynamic thresholding has no effect: CFG and mimic scale are the same, {_curve(cfg)}")
    for name, scale, mode, least in (
        ("mimic", settings.mimic_scale, settings.mimic_mode, settings.mimic_scale_min),
        ("CFG", guidance, settings.cfg_mode, settings.cfg_scale_min),
    ):
        if mode == "Constant" and least != 0:
            says.append(f"the {name} scale's minimum {least:g} has no effect with mode Constant")
        elif mode != "Constant" and least > scale:
            values = mimic if name == "mimic" else cfg
            says.append(
                f"the {name} scale {scale:g} lies below its minimum {least:g}, which turns {mode} around: it is "
                f"{_curve(values)}"
            )
    if settings.scheduler_value is not None and not {settings.mimic_mode, settings.cfg_mode} & set(USES_VALUE):
        modes = " and ".join(dict.fromkeys((settings.mimic_mode, settings.cfg_mode)))
        says.append(f"scheduler value {settings.scheduler_value:g} has no effect: {modes} does not use it")
    if settings.threshold_percentile != 1 and settings.variability_measure == "STD":
        says.append(f"threshold percentile {settings.threshold_percentile:g} has no effect with STD")
    return says


def _curve(values: list[float]) -> str:
    """Numbers over the steps in a few words: "4 throughout", "4 to 2.851", "between 0 and 7"."""
    first, last, low, high = values[0], values[-1], min(values), max(values)
    if low == high:
        return f"{first:.4g} throughout"
    if {low, high} == {first, last}:
        return f"{first:.4g} to {last:.4g}"
    return f"between {low:.4g} and {high:.4g}"
