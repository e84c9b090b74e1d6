"""What a slider is to be: one schema for the command line, YAML files, Python and the metadata of the file.

A spec file describes one slider, or many of one class (`sliders: [...]` beside what they share), which are then
trained on one cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem, read_yaml
from dodgeburn.sampling.loras import ALWAYS

LAYER_SETS = ("full", "noxattn", "xattn", "selfattn", "xattn-strict")
Said = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class SliderSpec(BaseModel):
    """One text slider. The defaults were chosen on the pocket's development prompts; lengths are in U-Net calls."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Said
    target: Said  # the class that the slider is for; what the trained U-Net is asked for
    positive: Said  # what +1 should look like
    negative: Said  # what -1 should look like
    neutral: str | None = None  # the prompt whose prediction is shifted; the target where left out
    preserve: tuple[str, ...] = ()  # attributes to be kept: put behind every prompt in turn
    changes: tuple[str, ...] = ()  # those of a class's preserved ones that this slider changes itself: not put behind
    attribute: str | None = None  # pocket: what the readers measure; calibrates the slider
    eta: float = Field(default=1.0, gt=0)  # strength of the target at scale 1
    reach: float = Field(default=1.5, gt=0)  # scales from -reach to reach are trained
    rank: int = Field(default=4, ge=1)
    alpha: float | None = Field(default=None, gt=0)  # None: the rank
    layers: str = "noxattn"
    text_encoders: bool = False  # trained too: attention and feed-forward; on at all time steps, whatever the start
    start: int = Field(default=875, ge=1, le=1000)  # trained at time steps up to this
    late: bool = True  # used at those alone, which keeps the layout; False: from the first step on
    latents: int = Field(default=24, ge=1)  # clean latents, made once
    latent_steps: int = Field(default=8, ge=1)
    guidance: float = 4.0  # of the clean latents
    points: int = Field(default=96, ge=1)  # noised latents with cached frozen predictions
    contexts: int = Field(default=1, ge=1)  # preserved attributes summed over at each point
    unconditional: float = Field(default=0.25, ge=0, le=1)  # share of rows trained with the empty prompt
    steps: int = Field(default=28, ge=1)
    batch: int = Field(default=18, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    checkpointing: bool = False  # work activations out twice instead of keeping them: less memory, a third more time
    begin: Literal["zero", "closed-form", "gradient"] = "zero"  # slide/begin.py
    stop: Literal["auto", "measure", "loss", "never"] = "auto"  # early: on the reader's measure or held-out loss;
    # auto is the measure in trainings of over 60 steps, where there is a reader, else the loss
    seed: int = Field(default=0, ge=0)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", value):
            raise ValueError(f"{value!r} is no name for a file, expected letters, digits and . _ - +")
        return value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str) -> str:
        if value not in LAYER_SETS:
            raise ValueError(f"unknown layer set {value!r}, expected one of {', '.join(LAYER_SETS)}")
        return value

    @model_validator(mode="after")
    def _apart(self) -> Self:
        strangers = [one for one in self.changes if one not in self.preserve]
        if strangers:
            raise ValueError(f"changes names {strangers[0]!r}, which is none of the preserved attributes")
        if self.contexts > max(1, len(self.preserve)):
            raise ValueError(f"contexts is {self.contexts}, but {len(self.preserve)} attributes are preserved")
        if self.positive == self.negative:
            raise ValueError(f"positive and negative are both {self.positive!r}: there is no direction between them")
        return self

    def prompts(self, context: str) -> tuple[str, str, str]:
        """(neutral, positive, negative) with a preserved attribute behind each ("" for none).

        What the slider changes itself stays behind the neutral prompt only: pictures with and without it are in the
        class's cache, and positive and negative say what becomes of them.
        """
        end = f", {context}" if context else ""
        kept = "" if context in self.changes else end
        return f"{self.neutral or self.target}{end}", f"{self.positive}{kept}", f"{self.negative}{kept}"

    @property
    def used_from(self) -> float:
        """The highest time step at which the slider is to be on."""
        return float(self.start) if self.late else ALWAYS

    def cache_key(self) -> tuple[Any, ...]:
        """What the shared cache depends on: sliders with equal keys are of one class."""
        return (self.target, self.neutral, self.preserve, self.start, self.latents, self.latent_steps, self.guidance,
                self.points, self.unconditional, self.seed)  # fmt: skip


def load_specs(path: str | Path) -> list[SliderSpec]:
    """The sliders of a YAML file. Raises UserError for a file that cannot be read, and missing or unknown keys."""
    path = Path(path)
    said = read_yaml(path, "a slider's YAML file", "name, target, positive and negative")
    if "sliders" not in said:
        return [make_spec(said, str(path))]
    shared = {key: value for key, value in said.items() if key != "sliders"}
    if not isinstance(said["sliders"], list) or not said["sliders"]:
        raise UserError(f"{path}: sliders is no list, or an empty one")
    specs = []
    for number, one in enumerate(said["sliders"], 1):
        if not isinstance(one, dict):
            raise UserError(f"{path}: slider {number} is {one!r}: expected a mapping with name, positive and negative")
        specs.append(make_spec({**shared, **one}, f"{path}: slider {one.get('name', number)}"))
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two sliders are named {twice[0]}")
    return specs


def make_spec(said: dict[str, Any], where: str = "slider") -> SliderSpec:
    """A checked spec; UserError of one line that names what is wrong."""
    try:
        return SliderSpec(**said)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, SliderSpec)}") from None
