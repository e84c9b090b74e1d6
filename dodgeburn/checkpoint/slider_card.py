"""What a slider file says about itself: what 1.0 means, how far it goes safely, how it was made and how it was tested.

It is JSON under one metadata key, so any program may carry it along, and no torch is needed to read it. Fields that a
later version adds are kept and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from dodgeburn.checkpoint.metadata import json_of, to_json
from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem

SLIDER = "dodgeburn.slider"
_SHOWN = 11  # points of the curve, and leaks, that are printed
Interval = tuple[FiniteFloat, FiniteFloat]


class Certificate(BaseModel):
    """A test on prompts and seeds that played no part in making the slider. What was not measured is None."""

    model_config = ConfigDict(extra="allow")

    reader: str  # who read the pictures: "judge", "reader", or "proxy: …"
    n: int  # sweeps: prompts x seeds
    seeds: list[int]
    prompts_sha256: str
    monotone: FiniteFloat | None = None  # share of sweeps without a reverse step and with enough range
    spearman: FiniteFloat | None = None  # mean rank correlation of scale and reading, -1..1
    selectivity: FiniteFloat | None = None  # own movement over the others' mean movement, in natural deviations
    unreadable: FiniteFloat | None = None  # share of pictures that could not be read, counted as failures above
    calibration_error: FiniteFloat | None = None  # in natural deviations, at 0.5, 1 and 2 of them
    range_sigma: FiniteFloat | None = None  # end to end, in natural deviations
    symmetry: FiniteFloat | None = None  # smaller over larger of the moves at +s and -s
    linearity: FiniteFloat | None = None  # R^2 of moves that are proportional to the scale
    identity: FiniteFloat | None = None  # share of the other attributes that a picture keeps at one deviation
    five_fingers_before: FiniteFloat | None = None  # of repair sliders: share of waving hands with five fingers
    five_fingers_after: FiniteFloat | None = None  # the same at scale 1
    off_class_effect: FiniteFloat | None = None  # change of pictures without the slider's subject over that of its own
    leakage: dict[str, FiniteFloat] = {}  # other attribute -> how far it moves at one deviation, without sign: a graded
    # one in its own deviations, a named one as a share of how often seeds differ in it
    intervals: dict[str, Interval] = {}  # 95 %, by field: "monotone", "leakage.age", …


class Training(BaseModel):
    """How it was trained."""

    model_config = ConfigDict(extra="allow")

    settings: dict[str, Any] = {}
    forwards: int | None = None  # samples that went through the U-Net
    seconds: FiniteFloat | None = None
    seed: int | None = None


class SliderParent(BaseModel):
    """A file that a composed slider holds, and at which scale."""

    file: str
    sha256: str
    scale: FiniteFloat
    name: str = ""


class SliderCard(BaseModel):
    """A slider's metadata. Scales are those of the file as it is: what a user types after the colon."""

    model_config = ConfigDict(extra="allow")

    version: int = 1
    name: str
    method: str = ""  # "text", "pairs", "closed form", "composed", …
    target: str = ""  # prompt of the subject
    positive: str = ""  # prompt at the right end
    negative: str = ""  # prompt at the left end
    attribute: str = ""  # what it moves
    unit: str = ""  # what 1.0 means: "one natural standard deviation of smile, read exactly"; proxies named as such
    sigma: FiniteFloat | None = None  # that deviation, in the reader's own units
    safe_range: Interval | None = None  # scales
    start: FiniteFloat | None = None  # time step (0..1000) above which it is off; None: from the beginning
    curve: list[Interval] = []  # (scale, mean movement of the attribute in units of sigma)
    certificate: Certificate | None = None
    training: Training | None = None
    base: str = ""  # name of the model it was made for
    base_sha256: str = ""
    parents: list[SliderParent] = []  # of a composed slider

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.safe_range is not None and not self.safe_range[0] < self.safe_range[1]:
            raise UserError(f"slider {self.name}: safe range {list(self.safe_range)} is no [low, high]")
        if self.start is not None and not 0 <= self.start <= 1000:
            raise UserError(f"slider {self.name}: start {self.start:g} is no time step from 0 to 1000")
        return self

    def as_metadata(self) -> dict[str, str]:
        """The metadata key that holds it."""
        return {SLIDER: to_json(self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version})}

    def usage_hint(self) -> str:
        """How to use it, in a line, as other programs show it (ModelSpec's usage_hint)."""
        parts = [f"1.0 = {self.unit or 'not calibrated'}"]
        if self.safe_range is not None:
            parts.append(f"safe from {self.safe_range[0]:g} to {self.safe_range[1]:g}")
        if self.start is not None:
            parts.append(f"off above time step {self.start:g}")
        return "; ".join(parts)


def slider_of(metadata: Mapping[str, str]) -> SliderCard | None:
    """A file's slider card; None if it has none. Raises UserError for one that is damaged."""
    if SLIDER not in metadata:
        return None
    said = json_of(metadata, SLIDER)
    if not isinstance(said, dict):
        raise UserError(f"the file's {SLIDER} metadata is no JSON object")
    try:
        return SliderCard(**{str(key): value for key, value in said.items()})
    except ValidationError as error:
        raise UserError(f"the file's {SLIDER} metadata is damaged: {first_problem(error, SliderCard)}") from None


def card_lines(card: SliderCard) -> list[str]:
    """The card in words, a line each."""
    made = ", ".join(part for part in (card.method, f"of {card.attribute}" if card.attribute else "") if part)
    lines = [f"slider: {card.name}" + (f" ({made})" if made else "")]
    if card.positive or card.negative:
        lines.append(
            f"  from {card.negative!r} to {card.positive!r}" + (f", on {card.target!r}" if card.target else "")
        )
    lines.append(f"  1.0 = {card.unit or 'not calibrated'}" + (f" ({card.sigma:g})" if card.sigma is not None else ""))
    if card.safe_range is not None:
        lines.append(f"  safe range: {card.safe_range[0]:g} to {card.safe_range[1]:g}")
    if card.start is not None:
        lines.append(f"  start: from time step {card.start:g} on (off above it)")
    if card.curve:
        lines.append("  curve (scale: movement in deviations): " + _few([f"{s:g}: {v:+.2f}" for s, v in card.curve]))
    if card.certificate is not None:
        lines += _certificate_lines(card.certificate)
    if card.training is not None:
        lines.append(f"  trained: {_training(card)}")
    for parent in card.parents:
        lines.append(f"  + {parent.scale:g} x {parent.file} (sha256 {parent.sha256[:10]})")
    if card.base or card.base_sha256:
        lines.append(f"  made for {card.base or 'a model'} (sha256 {card.base_sha256[:10] or 'not said'})")
    return lines


_CERTIFIED = {
    "monotone": ("monotone", ".1%"), "spearman": ("Spearman", ".3f"), "selectivity": ("selectivity", ".2f"),
    "unreadable": ("unreadable", ".1%"), "calibration_error": ("calibration error", ".2f"),
    "range_sigma": ("range", ".1f"), "symmetry": ("symmetry", ".2f"), "linearity": ("linearity", ".2f"),
    "identity": ("identity", ".1%"), "five_fingers_before": ("five fingers before", ".1%"),
    "five_fingers_after": ("after", ".1%"), "off_class_effect": ("off-class effect", ".2f"),
}  # fmt: skip


def _certificate_lines(found: Certificate) -> list[str]:
    def value(name: str, number: float, pattern: str) -> str:
        between = found.intervals.get(name)
        spread = f" [{between[0]:{pattern}}, {between[1]:{pattern}}]" if between else ""
        return f"{number:{pattern}}{spread}"

    parts = [
        f"{label} {value(name, number, pattern)}"
        for name, (label, pattern) in _CERTIFIED.items()
        if (number := getattr(found, name)) is not None
    ]
    seeds = f"{len(set(found.seeds))} seeds"
    lines = [f"  certificate ({found.reader}, {found.n} sweeps, {seeds}): {', '.join(parts) or 'nothing measured'}"]
    if found.leakage:
        worst = sorted(found.leakage.items(), key=lambda item: -abs(item[1]))
        lines.append("  leakage at one deviation: " + _few([f"{name} {abs(moved):.2f}" for name, moved in worst]))
    return lines


def _training(card: SliderCard) -> str:
    found, parts = card.training or Training(), []
    if found.forwards is not None:
        parts.append(f"{found.forwards:,} U-Net samples")
    if found.seconds is not None:
        parts.append(f"{found.seconds:.1f} s")
    if found.seed is not None:
        parts.append(f"seed {found.seed}")
    said = {*SliderCard.model_fields, *Training.model_fields}  # what stands in the other lines already
    parts += [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.settings.items()
        if key not in said and value is not None and not isinstance(value, (dict, list))
    ]
    return ", ".join(parts) or "nothing said"


def _few(items: list[str]) -> str:
    more = f" … and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
