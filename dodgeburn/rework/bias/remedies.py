"""Ways to take a tie away, behind one interface: the baselines that anything cleverer has to beat.

    random-prompt    a class is drawn for every picture and said in the prompt, with chances that even out what is not
                     drawn as it is asked for (asking.py); no training, no weights
    uce              keys and values of cross-attention in closed form (uce.py); seconds, no data
    negation         theta_0 - s (theta_1 - theta_0), theta_1 trained on the model's own tied pictures (undo.py)
    reweight         fine-tune on tied data with importance weights
    balanced         fine-tune on data in which every class is as frequent as the target says
    taught           the same data, but of each picture is learned, under a neutral caption, what the model as it was
                     says of it, plus `taught` times what asking for its class changes: all else stays this model's
    self             the same on its own pictures of explicit prompts; no data
    shrink-perturb   balanced from weights that were shrunk and perturbed
    dpo              Diffusion-DPO (rework/dpo/train.py): a picture of another class preferred to one of the majority

All training methods take the same number of steps. Half of every batch is pictures of other things by the model as it
was, with what it said of them then as the aim (prior preservation). Where pictures are weighted, a few drawings are
read on the way and the weights follow (weighing.py); uce and negation search strengths by the same readings.
Each leaves `model.unet` edited (random-prompt: untouched) and says what it cost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.jobs import KeptRows
from dodgeburn.models.model import Model
from dodgeburn.rework.bias.asking import PromptRule, chances_to_ask, shown_when_asked
from dodgeburn.rework.bias.balance import (
    SELF_SEED,
    balanced,
    kept_pictures,
    reweighted,
    self_pictures,
    shown_classes,
)
from dodgeburn.rework.bias.before_after import DrawPictures, Meter
from dodgeburn.rework.bias.classify import Classifier
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.uce import UceSettings, uce
from dodgeburn.rework.bias.undo import distance, negated, set_state, shrunk, state_of
from dodgeburn.rework.bias.weighing import followed
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.training.examples import Pictures, encode_examples
from dodgeburn.training.fine_tune import FineTuneSettings, Prior, fine_tune, make_prior, make_teacher
from dodgeburn.training.loop import evaluated


class RemedySettings(BaseModel):
    """What all methods share, and what some of them need."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=150, ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float | None = Field(default=None, gt=0)  # None: as `rate` says
    pictures: int = Field(default=256, ge=8)  # of the concept that are trained on (drawn, made or taken in turn)
    kept: int = Field(default=128, ge=0)  # pictures of other things, by the model as it was
    points: int = Field(default=4, ge=1)  # noise levels that each of these is held at
    share: float = Field(default=0.5, gt=0, le=1)  # of concept pictures in a batch
    look: int = Field(default=64, ge=8)  # neutral pictures a look, while strengths or weights are searched
    every: int = Field(default=25, ge=1)  # steps from look to look
    adapt: float = Field(default=0.25, ge=0, le=2)  # power by which weights follow what is read; 0: they do not
    taught: float = Field(default=2.0, gt=0)  # taught, self: times what asking for a class changes
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # of task negation
    shrink: float = Field(default=0.95, gt=0, le=1)
    noise: float = Field(default=0.05, ge=0)
    seed: int = Field(default=0, ge=0)

    def rate(self, method: str, classes: int) -> float:
        """The learning rate: 3e-4 unless said otherwise. Where the model's own answers are learned 5e-5 for each class:
        larger steps move other attributes further, and take more of the tie away only where classes are many, measured
        with two and six (docs/notes/bias.md).
        """
        if self.lr is not None:
            return self.lr
        return min(3e-4, 5e-5 * classes) if method in ("taught", "self") else 3e-4

    def tuning(self, held: bool, rate: float) -> FineTuneSettings:
        """The fine-tune of all methods that train; held: with prior preservation, in a batch of the same size."""
        own = max(1, round(self.batch * self.share)) if held else self.batch
        return FineTuneSettings(
            steps=self.steps, batch=own, lr=rate, ema=0.97, seed=self.seed, gamma=10.0, noise_power=0.4,
            empty=0.0 if held else 0.1, prior=float(held), prior_batch=max(1, self.batch - own), log_every=self.every,
        )  # fmt: skip


@dataclass
class Job:
    """What a method works with. `meter` is the reader's: methods choose by it, nothing reports with it."""

    model: Model
    concept: Concept
    classifier: Classifier
    meter: Meter
    sampling: GenerateSettings
    folder: Path  # checkpoints, so that an interrupted training goes on
    settings: RemedySettings = field(default_factory=RemedySettings)
    fair: Callable[[int, int], Pictures] | None = None  # (n, seed) -> pictures of the concept, all classes among them
    tied: Callable[[int, int], Pictures] | None = None  # the same from data as biased as the model
    _prior: Prior | None = None
    _chances: tuple[float, ...] = ()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures by the model as it is now."""
        return draw(self.model, prompts, seeds, self.sampling)

    def prior(self) -> Prior | None:
        """What the model says of other things; made once, when first asked for: before anything is edited."""
        s = self.settings
        if self._prior is None and s.kept and s.share < 1:
            kept = encode_examples(self.model, kept_pictures(self.concept, self.draw, s.kept))
            self._prior = make_prior(self.model, kept, s.points * s.kept, s.seed + 5)
        return self._prior

    def chances(self) -> tuple[float, ...]:
        """How often to ask for each class; found when first asked for: before anything is edited."""
        if not self._chances:
            log = KeptRows(self.folder / "asked.jsonl")
            shown = shown_when_asked(self.concept, self.draw, self.classifier, self.settings.look, log)
            self._chances = chances_to_ask(shown, self.concept.target)
        return self._chances


@dataclass(frozen=True)
class Done:
    """What a method did and cost."""

    method: str
    steps: int = 0  # gradient steps
    drawn: int = 0  # pictures sampled on the way
    seconds: float = 0.0
    weights: bool = True  # False: the remedy is a rule for prompts, the model is as it was
    notes: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None  # learning rate of the gradient steps, before its decay

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self)))


# -------------------- the methods


def _train(
    job: Job, name: str, pictures: Pictures, classes: Sequence[str] | None = None, taught: float = 0.0
) -> int:  # fmt: skip
    """Fine-tune on these, other things held; the steps taken. classes: of the pictures, whose weights are to follow.
    taught: what is learned of a picture is what the model as it is says of it, plus so many times what asking for the
    picture's class changes."""
    prior, c = job.prior(), job.concept
    examples = encode_examples(job.model, pictures)
    teacher = None
    if taught and classes is not None:
        shown = list(classes)
        teacher = make_teacher(job.model, examples, lambda row, text: c.explicit(text, shown[row], row), taught)
    tuning = job.settings.tuning(prior is not None, job.settings.rate(name, len(c.classes)))
    looks = _Looks(job, name, tuning.steps) if classes is not None and job.settings.adapt else None

    def weights(step: int) -> torch.Tensor:
        assert looks is not None and classes is not None
        return followed(examples.weights, classes, c.classes, c.target, looks.before(step), job.settings.adapt)

    told = {"method": name, "taught": taught, "adapt": job.settings.adapt}
    fine_tune(job.model, examples, tuning, job.folder / name, name, prior, looks, told=told, show_average=True,
              weights=weights if looks else None, teacher=teacher)  # fmt: skip
    return tuning.steps


class _Looks:
    """The callback: shares of a few fresh neutral pictures, kept for a run that resumes."""

    def __init__(self, job: Job, name: str, steps: int) -> None:
        self.job, self.steps = job, steps
        self.log = KeptRows(job.folder / name / "looks.jsonl")

    def before(self, step: int) -> list[dict[str, float]]:
        """Of the looks that training step `step` (0-based) comes after."""
        return [row["shares"] for row in self.log.rows.values() if row["step"] <= step]

    def __call__(self, step: int, means: dict[str, float]) -> None:
        if step >= self.steps or str(step) in self.log.rows:
            return
        with evaluated(self.job.model.unet):
            figures, unread = self.job.meter.neutral(self.job.draw, self.job.settings.look, fresh=step)
        shares = dict(zip(self.job.concept.classes, np.nan_to_num(figures.shares).tolist(), strict=True))
        self.log.add(str(step), step=step, shares=shares, tv_cons=figures.tv_cons, unread=unread)


def _fair(job: Job) -> tuple[Pictures, list[str]]:
    """Pictures in the target's shares, and their classes."""
    if job.fair is None:
        raise UserError("no pictures of the concept in which every class occurs: give --data FOLDER, or take --method "
                        "self, uce or random-prompt, which need none")  # fmt: skip
    found = job.fair(job.settings.pictures, job.settings.seed)
    even = balanced(found, shown_classes(found, job.concept, job.classifier), job.concept, job.settings.pictures,
                    job.settings.seed)  # fmt: skip
    return even, shown_classes(even, job.concept, job.classifier)


def _balanced(job: Job) -> Done:
    return Done("balanced", _train(job, "balanced", *_fair(job)))


def _taught(job: Job) -> Done:
    return Done("taught", _train(job, "taught", *_fair(job), taught=job.settings.taught))


def _reweight(job: Job) -> Done:
    if job.tied is None:
        raise UserError("no tied pictures to weigh: give --data FOLDER")
    found = job.tied(job.settings.pictures, job.settings.seed)
    classes = shown_classes(found, job.concept, job.classifier)
    counts = {c: classes.count(c) for c in job.concept.classes}
    steps = _train(job, "reweight", reweighted(found, classes, job.concept), classes)
    return Done("reweight", steps, notes={"classes": counts})


def _self(job: Job) -> Done:
    job.prior()
    found, counts = self_pictures(job.concept, job.draw, job.classifier, job.settings.pictures,
                                  SELF_SEED + 10_000 * job.settings.seed)  # fmt: skip
    even = balanced(found, shown_classes(found, job.concept), job.concept, job.settings.pictures, job.settings.seed)
    steps = _train(job, "self", even, shown_classes(even, job.concept), taught=job.settings.taught)
    return Done("self", steps, job.settings.pictures, notes={"right": counts})


def _shrink_perturb(job: Job) -> Done:
    job.prior()
    start = state_of(job.model.unet)
    fresh = shrunk(start, job.settings.shrink, job.settings.noise, job.settings.seed)
    pictures, classes = _fair(job)
    set_state(job.model.unet, fresh)
    steps = _train(job, "shrink-perturb", pictures, classes)
    return Done("shrink-perturb", steps, notes={"moved_before_training": distance(start, fresh)})


def _negation(job: Job) -> Done:
    """Train a copy on the model's own pictures of the majority, then go the other way as far as the reader likes."""
    s, concept = job.settings, job.concept
    neutral = concept.neutral(s.pictures, s.seed)
    pixels = job.draw(neutral, [SELF_SEED + 2_000_000 + 10_000 * s.seed + i for i in range(s.pictures)])
    shown = job.classifier.labels(pixels)[concept.attribute]
    over = {c: float((shown == c).mean()) - q for c, q in zip(concept.classes, concept.target, strict=True)}
    majority = max(over, key=lambda c: over[c])
    rows = np.flatnonzero(shown == majority)
    if not len(rows):
        raise UserError(f"the reader finds no class of {concept.attribute} in this model's pictures")
    tied = Pictures(pixels[rows], [(neutral[i],) for i in rows])
    start = state_of(job.model.unet)
    _train(job, "negation", tied)
    trained = state_of(job.model.unet)
    tried: dict[float, float] = {}
    for strength in (0.0, *s.strengths):
        set_state(job.model.unet, negated(start, trained, strength))
        figures, unread = job.meter.neutral(job.draw, s.look, fresh=1)
        tried[strength] = figures.tv_cons if np.isfinite(figures.tv_cons) else 1.0
        if unread > 0.5:
            break
    best = min(tried, key=lambda x: tried[x])
    set_state(job.model.unet, negated(start, trained, best))
    notes = {"majority": majority, "strength": best, "tried": {f"{k:g}": round(v, 4) for k, v in tried.items()}}
    return Done("negation", s.steps, s.pictures + s.look * len(tried), notes=notes)


def _dpo(job: Job) -> Done:
    """Winners are pictures of the other classes in the target's shares, losers of the majority, captions the same."""
    from dodgeburn.rework.dpo.pairs import Preference, checked
    from dodgeburn.rework.dpo.settings import DpoSettings
    from dodgeburn.rework.dpo.train import align

    s, concept = job.settings, job.concept
    found, shown = _fair(job)
    classes = np.asarray(shown)
    figures, _ = job.meter.neutral(job.draw, s.look)
    majority = figures.majority
    lost = np.flatnonzero(classes == majority)
    if not len(lost):
        raise UserError(f"no picture shows {concept.attribute} = {majority}: dpo needs losers, give some")
    pairs = checked(
        (Preference(found.captions[i][0], found.pixels[i], found.pixels[lost[k % len(lost)]], name=f"picture {i}")
         for k, i in enumerate(np.flatnonzero(classes != majority))),
        source=f"{concept.attribute} other than {majority}",
    )  # fmt: skip
    rate = s.rate("dpo", len(concept.classes)) / 10
    settings = DpoSettings(rank=None, steps=s.steps, batch=max(1, s.batch // 4), lr=rate, seed=s.seed)
    aligned = align(job.model, pairs, settings, job.folder / "dpo")
    notes = {"pairs": len(pairs), "majority": majority, "alarms": aligned.alarms, "forwards": aligned.forwards}
    return Done("dpo", s.steps, s.look, notes=notes, rate=rate)


def _uce(job: Job) -> Done:
    looked = 0

    def look() -> Any:
        nonlocal looked
        looked += job.settings.look
        return job.meter.neutral(job.draw, job.settings.look, fresh=looked)

    found = uce(job.model, job.concept, look, UceSettings())
    return Done("uce", drawn=looked, notes={"strengths": found.strengths, "curve": [round(x, 4) for x in found.curve]})


def _random_prompt(job: Job) -> Done:
    rule = PromptRule(job.concept, job.classifier.named, job.chances())
    return Done("random-prompt", drawn=job.settings.look * len(job.concept.classes), weights=False,
                notes={"rule": rule.as_json()})  # fmt: skip


# From the cheapest to the dearest.
METHODS: dict[str, Callable[[Job], Done]] = {
    "random-prompt": _random_prompt, "uce": _uce, "reweight": _reweight, "balanced": _balanced,
    "taught": _taught, "self": _self, "negation": _negation, "shrink-perturb": _shrink_perturb, "dpo": _dpo,
}  # fmt: skip


def apply_remedy(method: str, job: Job) -> Done:
    """Run one method on `job.model`. Raises UserError for an unknown one, and where it lacks what it needs."""
    if method not in METHODS:
        raise UserError(f"no method {method!r}: {did_you_mean(method, METHODS)}expected {', '.join(METHODS)}")
    began = time.perf_counter()
    done = METHODS[method](job)
    rate = job.settings.rate(method, len(job.concept.classes)) if done.steps else None
    return replace(done, seconds=time.perf_counter() - began, rate=done.rate or rate)


def drawing_of(done: Done, job: Job) -> DrawPictures:
    """How pictures are drawn after a remedy: by the model, with prompts rewritten where the remedy is a rule."""
    return job.draw if done.weights else PromptRule(job.concept, job.classifier.named, job.chances()).drawing(job.draw)


def world_sources(concept: Concept, size: int, shares: Sequence[float]) -> tuple[Any, Any]:
    """(fair, tied) for `Job`: drawings of the pocket world in the target's shares, and in a model's own (with half a
    picture in 256 more of every class, for a class that never occurs cannot be weighed up)."""
    from dodgeburn.rework.bias.pocket_concept import world_pictures

    def fair(n: int, seed: int) -> Pictures:
        return world_pictures(concept, concept.drawn_classes(n, seed), size, seed)

    def tied(n: int, seed: int) -> Pictures:
        p = (np.nan_to_num(np.asarray(shares, np.float64)) * 256 + 0.5) / (256 + 0.5 * len(shares))
        drawn = np.random.default_rng([seed, 10]).choice(len(p), size=n, p=p / p.sum())
        drawn[: len(p)] = range(len(p))  # at least one of each
        return world_pictures(concept, [concept.classes[int(i)] for i in drawn], size, seed)

    return fair, tied


def folder_source(pictures: Pictures, concept: Concept) -> Callable[[int, int], Pictures]:
    """The user's pictures, as `Job.fair` and `Job.tied`: captions that say the class lose it, for they would teach the
    prompt and not the tie."""
    phrases = [p for said in concept.phrases.values() for p in said]

    def neutral(captions: tuple[str, ...]) -> tuple[str, ...]:
        kept = tuple(", ".join(part for part in c.split(", ") if part not in phrases) for c in captions)
        return tuple(c for c in kept if c) or (concept.prompts[0],)

    cleaned = pictures.with_captions([neutral(c) for c in pictures.captions])
    return partial(_whole, cleaned)


def _whole(pictures: Pictures, _n: int, _seed: int) -> Pictures:
    return pictures
