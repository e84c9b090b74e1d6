"""What a deconstruction is to do: one schema for the YAML file, Python and the metadata of what it makes.

The stages and their names are from a model card that gives them a sentence each; every number and rule here is our own
exact definition (docs/deconstruct.md).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem, read_yaml
from dodgeburn.rework.bias.concept import Concept, make_concept
from dodgeburn.rework.bias.pocket_concept import pocket_concept
from dodgeburn.training.fine_tune import FineTuneSettings

Stage = Literal["overtrain", "nightshade", "bucket", "retrain"]
STAGES: tuple[Stage, ...] = ("overtrain", "nightshade", "bucket", "retrain")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ConceptSpec(_Part):
    """What is biased: a concept, and the attribute that it is tied to."""

    prompts: tuple[str, ...] = Field(min_length=1)  # neutral ones: they leave the attribute open
    attribute: str  # what the classifier reads
    values: dict[str, str] = Field(min_length=2)  # each value the attribute may have, and the words that ask for it
    target: dict[str, float] | None = None  # share of each value; None: equal shares
    phrasings: tuple[str, ...] = ()  # more neutral prompts that mean it, for training; the pocket has its own
    watched: tuple[str, ...] = ()  # and such that only readings use; the pocket has its own
    others: tuple[str, ...] = ()  # prompts of other things, to watch for bleed-through; the pocket has its own

    @model_validator(mode="after")
    def _sums(self) -> Self:
        if len(set(self.prompts)) != len(self.prompts) or not all(p.strip() for p in self.prompts):
            raise ValueError("prompts has an empty or repeated prompt")
        if self.target is None:
            return self
        if set(self.target) != set(self.values) or min(self.target.values()) < 0:
            raise ValueError(f"target needs a share for each of {', '.join(self.values)}, and no others")
        if abs(sum(self.target.values()) - 1) > 1e-6:
            raise ValueError(f"target sums to {sum(self.target.values()):g}: expected 1")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """q, in the order of the values."""
        if self.target is None:
            return (1 / len(self.values),) * len(self.values)
        return tuple(self.target[value] for value in self.values)

    def concept(self, pocket: bool) -> Concept:
        """The concept; one of the pocket world gets the prompts that its grammar has. Raises UserError for an attribute
        or value that the pocket lacks."""
        phrases = {value: (words,) for value, words in self.values.items()}
        own = (self.phrasings, self.watched, self.others)
        if not pocket:
            return make_concept(self.prompts, self.attribute, tuple(self.values), phrases, self.shares, *own)
        try:
            found = pocket_concept(self.prompts, self.attribute, tuple(self.values), self.shares, phrases)
        except UserError as error:
            raise UserError(f"the spec's concept: {error}") from None
        return replace(found, phrasings=own[0] or found.phrasings, watched=own[1] or found.watched,
                       others=(*own[2], *found.others))  # fmt: skip


class Data(_Part):
    """Where pictures come from. Numbers are pictures."""

    source: Literal["pocket", "model", "folder"] = "pocket"
    folder: Path | None = None  # source folder: imagefolder with the columns `concept` (yes or empty) and the attribute
    skip_bad: bool = False  # source folder: leave bad lines out instead of stopping
    each: int = Field(default=96, ge=1)  # pocket, model: pictures of the concept with each value
    minority: int | None = Field(default=None, ge=1)  # pocket, model: of each value but the first; None: `each`
    others: int = Field(default=384, ge=1)  # pocket, model: pictures of other things
    held_out: int = Field(default=96, ge=8)  # never trained on, half of them of the concept
    short: float = Field(default=0.25, ge=0, le=1)  # pocket: share of the concept's pictures captioned by it alone
    steps: int = Field(default=12, ge=1)  # model: denoising steps
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError("source folder and a folder belong together: give both or neither")
        return self


class Watching(_Part):
    """How the meters look. Numbers are pictures."""

    pairs: int = Field(default=128, ge=8)  # held-out noise
    neutral: int = Field(default=96, ge=8)
    quick: int = Field(default=32, ge=8)
    each: int = Field(default=48, ge=1)
    steps: int = Field(default=8, ge=1)
    guidance: float = Field(default=4.0, ge=0, le=100)
    seed: int = Field(default=0, ge=0)


class Overtrain(_Part):
    """Stage 1: fine-tune on the majority's pictures until a band is reached, twice in a row."""

    stress: Literal["majority", "random"] = "majority"  # what is exaggerated; random: a control, any pictures
    pictures: int = Field(default=128, ge=1)
    base_lr: float = Field(default=1e-4, gt=0)  # a usual fine-tune's
    factor: float = Field(default=10.0, gt=0)  # times this
    batch: int = Field(default=32, ge=1)
    steps: int = Field(default=80, ge=1)  # at most
    every: int = Field(default=5, ge=1)  # steps between checks
    loss_low: float = Field(default=1.5, gt=1)  # the band begins here
    loss_high: float = Field(default=4.0, gt=1)  # and ends here: rollback
    variety_low: float = Field(default=0.5, ge=0, le=1)  # or: pictures are this much alike
    unread_high: float = Field(default=0.8, ge=0, le=1)
    retries: int = Field(default=3, ge=0)  # with half the learning rate
    predict: int = Field(default=1, ge=1)  # seeds; from 2 on: is the stop predictable?
    predict_cv: float = Field(default=0.25, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.loss_low >= self.loss_high:
            raise ValueError(f"loss_low {self.loss_low:g} is not below loss_high {self.loss_high:g}")
        return self


class Nightshade(_Part):
    """Stage 2: pictures of what is under-represented, under the concept's name."""

    variant: Literal["dirty", "perturb"] = "dirty"
    anchors: Literal["others", "concept"] = "others"  # whose pictures show the under-represented value
    poison: float = Field(default=0.25, gt=0, lt=1)  # share of a batch
    pictures: int = Field(default=128, ge=1)  # poisoned ones
    lr: float = Field(default=5e-4, gt=0)
    batch: int = Field(default=32, ge=1)
    steps: int = Field(default=80, ge=1)  # at most
    every: int = Field(default=10, ge=1)
    success: float | None = Field(default=0.8, gt=0, le=1)  # share of pictures without the majority's value that ends
    # it; None: what the target asks for, 1 - q of the majority
    loss_high: float = Field(default=4.0, gt=1)
    bleed: float = Field(default=0.3, ge=0, le=1)  # fall of `others` that ends it
    budget: float = Field(default=0.05, gt=0, le=1)  # perturb: largest change of a pixel, of [0, 1]
    perturb_steps: int = Field(default=30, ge=1)
    export: Path | None = None  # write the poisoned pictures here, marked poisoned=true
    seed: int = Field(default=0, ge=0)


class Bucket(_Part):
    """Stage 3: merge what the noise states changed back into the untouched model, bucket by bucket."""

    method: Literal["bislerp", "slerp", "lerp", "bislerp4"] = "bislerp"
    scales: tuple[float, ...] = (-0.5, -0.25, 0.25, 0.5, 1.0)  # s; slerp, lerp and bislerp4: shares in 0..1
    mixes: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # v between the noise states; bislerp4: the other axis
    evaluations: int = Field(default=40, ge=1)
    neutral: int = Field(default=48, ge=8)  # pictures an evaluation
    each: int = Field(default=16, ge=1)
    loss_high: float = Field(default=1.1, gt=1)  # what is further from real pictures takes other attributes along
    fidelity_low: float = Field(default=0.7, ge=0, le=1)  # of the untouched model's
    hopeless: float = Field(default=2.0, gt=1)  # L above which no picture is drawn
    step: float = Field(default=0.5, gt=0)  # coordinate pass: scales times (1 - step) and (1 + step)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low = -0.5 if self.method == "bislerp" else 0.0
        if not self.scales or any(not low <= s <= 1 for s in self.scales):
            raise ValueError(f"scales {list(self.scales)}: {self.method} takes numbers from {low:g} to 1")
        if not self.mixes or any(not 0 <= v <= 1 for v in self.mixes):
            raise ValueError(f"mixes {list(self.mixes)}: expected numbers from 0 to 1")
        return self


class Retrain(_Part):
    """Stage 4: retrain on balanced pictures, then fine-tune until grain and colour are those of real ones."""

    steps: int = Field(default=160, ge=1)
    lr: float | None = Field(default=None, gt=0)  # None: 1e-4, or 3e-4 where pictures are learned (taught 0)
    batch: int = Field(default=32, ge=1)
    every: int = Field(default=40, ge=1)
    ema: float = Field(default=0.97, ge=0, lt=1)
    prior: float = Field(default=0.5, ge=0)
    prior_batch: int = Field(default=8, ge=1)
    prior_points: int = Field(default=256, ge=1)
    weight_high: float = Field(default=10.0, ge=1)  # importance weights are clipped here
    adapt: float = Field(default=0.25, ge=0, le=2)  # each check multiplies them by (target / share read) to this power
    hold: float = Field(default=0.25, ge=0, le=2)  # the same for all other attributes, where pictures are learned:
    # their target is how the untouched model draws them
    concept_share: float = Field(default=0.5, gt=0, lt=1)  # of a batch
    taught: float | None = Field(default=None, ge=0)  # times what asking the untouched model for a value changes; 0:
    # pictures are learned; None: 2, or 0 where the untouched model does not show what it is asked for
    tv: float = Field(default=0.05, ge=0)  # enough; a remedy is to leave 0.10, but few pictures are read here
    loss: float = Field(default=1.02, gt=0)
    fidelity_fall: float = Field(default=0.01, ge=0)
    plateau: int = Field(default=3, ge=1)  # checks without a gain of 1 %
    polish_steps: int = Field(default=40, ge=0)  # the fine-tune, at lr / 10; 0: none
    polish_every: int = Field(default=20, ge=1)
    quality: float = Field(default=0.10, gt=0)  # how far grain and colour may be from real pictures'
    best: float = Field(default=0.5, gt=0, le=1)  # share of the pictures that is "best"
    gamma: float = 10.0
    noise_power: float | None = None  # None: 0.8, or 0.4 where pictures are learned
    seed: int = Field(default=0, ge=0)


class DeconstructSpec(_Part):
    """The whole run. Stages that are left out of `stages` don't take place."""

    name: str = "deconstructed"
    model: str = "pocket"
    concept: ConceptSpec
    data: Data = Field(default_factory=Data)
    watching: Watching = Field(default_factory=Watching)
    stages: tuple[Stage, ...] = STAGES
    overtrain: Overtrain = Field(default_factory=Overtrain)
    nightshade: Nightshade = Field(default_factory=Nightshade)
    bucket: Bucket = Field(default_factory=Bucket)
    retrain: Retrain = Field(default_factory=Retrain)
    precision: Literal["bf16", "no"] = "bf16"
    clip: Path | None = None  # a CLIP folder that reads pictures, for models other than the pocket; a proxy

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w+-][\w.+-]*", value):
            raise ValueError(f"{value!r} is no name for a file, expected letters, digits and . _ - +")
        if value in (*STAGES, "nightshade-base", "nightshade-first"):
            raise ValueError(f"{value!r} is the name of a stage's own file: take another one")
        return value

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if not self.stages or list(self.stages) != sorted(set(self.stages), key=STAGES.index):
            raise ValueError(f"stages {list(self.stages)}: expected some of {', '.join(STAGES)}, each once, in order")
        return self

    def tuning(self, **changes: Any) -> FineTuneSettings:
        """A fine-tune's settings with this run's precision."""
        return FineTuneSettings(precision=self.precision, **changes)


def load_spec(path: str | Path) -> DeconstructSpec:
    """A run from a YAML file; UserError of one line that names what is wrong. Paths in it are relative to the file: of
    pictures, of a CLIP folder, of exported ones, and of a model where it is there (else it is a packaged name or a hub
    id)."""
    path = Path(path)
    wanted = "at least concept with prompts, attribute and values"
    said = read_yaml(path, "a run's YAML file (examples/deconstruct/)", wanted)
    for part, name in ((said.get("data"), "folder"), (said.get("nightshade"), "export"), (said, "clip")):
        if isinstance(part, dict) and isinstance(part.get(name), str):
            part[name] = path.parent / part[name]
    if isinstance(said.get("model"), str) and (path.parent / said["model"]).exists():
        said["model"] = str(path.parent / said["model"])
    return make_spec(said, str(path))


def make_spec(said: dict[str, Any], where: str = "spec") -> DeconstructSpec:
    """A checked run; UserError of one line."""
    try:
        return DeconstructSpec(**said)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, DeconstructSpec)}") from None
