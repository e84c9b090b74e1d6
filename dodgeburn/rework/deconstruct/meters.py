"""What constructive deconstruction looks at: how far a model has come apart, and how far it has come back.

    L    eps-loss on held-out pictures at fixed (time step, noise) pairs, over the untouched model's: 1 = as it was
    B    total variation between the shares read and the target: mean over the concept's neutral prompts; where there
         are watched ones, which nothing is trained on, mean by pictures of these (three in four) and the short ones
    U    share of pictures that cannot be read
    fid  share of explicit prompts ("a doctor, without glasses") whose picture shows what they say
    others  the same for prompts about other things: bleed-through is its fall
    D    Frechet distance from held-out pictures, in the reader's (or CLIP's) features
    V    mean distance of two pictures of the neutral prompts in these features, over the untouched model's: collapse
    grain, colour   over those of real pictures (measure/quality.py)

Prompts, seeds and noise are fixed, so that two readings of one model are equal and those of two models differ by the
models. The reader reads; the judge has no place here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.measure.bias import BiasFigures, bias_figures
from dodgeburn.measure.frechet import frechet_distance
from dodgeburn.measure.quality import quality, ratios
from dodgeburn.models.model import Model
from dodgeburn.pocket.reader import Reader
from dodgeburn.rework.bias.audit import seeds_for
from dodgeburn.rework.bias.classify import Classifier, ClipClassifier, PocketClassifier
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.sampling.predict import Predictor, add_noise, alphas_cumprod
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.training.examples import Examples
from dodgeburn.training.noise_loss import wanted

BINS = 8  # of time steps, that held-out noise is spread over
UNSEEN = 2  # pictures of each value that shares of other attributes count besides those that are there
SHOWN = 8  # pictures of a reading that are kept for sheets


class HeldOutLoss:
    """Mean squared error of the U-Net's output on held-out examples, at noise that never changes."""

    def __init__(self, model: Model, examples: Examples, pairs: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        alpha_bar = alphas_cumprod(model)
        per_bin = -(-pairs // BINS)
        width = len(alpha_bar) / BINS
        drawn = torch.rand(BINS, per_bin, generator=generator)
        self.timesteps = ((torch.arange(BINS)[:, None] + drawn) * width).long().T.flatten()[:pairs]
        rows = torch.arange(pairs) % len(examples)
        clean = examples.latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        level = alpha_bar[self.timesteps]
        self.x = add_noise(clean, noise, level)
        self.target = wanted(str(model.scheduler_config.get("prediction_type", "epsilon")), clean, noise, level)
        self.texts = [examples.captions[int(i)][0] for i in rows]
        self.predictor = Predictor(model, *examples.size)
        self.predictor.encode(self.texts)

    def __call__(self) -> float:
        """Of the model as it is now; infinite where an output is not finite."""
        error = (self.predictor.frozen(self.x, self.timesteps, self.texts) - self.target).square().mean()
        return float(error) if bool(torch.isfinite(error)) else float("inf")


@dataclass(frozen=True)
class Check:
    """A prompt and what its picture must show."""

    prompt: str
    wanted: Mapping[str, str]  # value by attribute


@dataclass(frozen=True)
class Panel:
    """What is drawn and asked. Numbers are pictures."""

    concept: Concept
    explicit: tuple[Check, ...]
    others: tuple[Check, ...] = ()
    neutral: int = 96  # pictures of all neutral prompts together
    quick: int = 32  # the same, at the frequent checks of stages 1 and 2
    each: int = 32  # pictures of explicit prompts, and of the others
    steps: int = 8
    guidance: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Reading:
    """All meters of one model; NaN where a meter was not asked for."""

    loss: float  # L
    tv: float  # B
    tv_cons: float  # unreadable pictures counted as the majority
    unread: float  # U
    fidelity: float
    others: float
    frechet: float
    variety: float  # V
    grain: float
    colour: float
    shares: dict[str, float] = field(default_factory=dict)
    pictures: np.ndarray | None = field(default=None, repr=False, compare=False)  # the first SHOWN neutral ones
    rest: dict[str, dict[str, float]] = field(default_factory=dict)  # of the other attributes, see `Meters._rest`

    def as_json(self) -> dict[str, Any]:
        """Numbers, rounded to 5 places; None for NaN."""
        numbers = {k: getattr(self, k) for k in METERS}
        plain = {k: round(v, 5) if np.isfinite(v) else (None if np.isnan(v) else "inf") for k, v in numbers.items()}
        rest = {name: {k: round(v, 4) for k, v in shares.items()} for name, shares in self.rest.items()}
        return {**plain, "shares": {k: round(v, 4) for k, v in self.shares.items()}, **({"rest": rest} if rest else {})}

    @staticmethod
    def of_loss(loss: float) -> Reading:
        """Of a model that isn't worth drawing with."""
        return Reading(loss, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN)

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Reading:
        """The numbers again."""
        numbers: dict[str, Any] = {k: _NAN if said.get(k) is None else float(said[k]) for k in METERS}
        return Reading(**numbers, shares=dict(said.get("shares", {})), rest=dict(said.get("rest", {})))


METERS = ("loss", "tv", "tv_cons", "unread", "fidelity", "others", "frechet", "variety", "grain", "colour")
_NAN = float("nan")


class Meters:
    """Reads a model, relative to what it was when this was made (the untouched one, or `base` of an earlier run)."""

    def __init__(
        self, model: Model, classifier: Classifier, panel: Panel, held_out: Examples, real: np.ndarray, pairs: int = 128
    ) -> None:
        """real: held-out pictures uint8 [n, h, w, 3], which D, grain and colour are compared with."""
        concept = panel.concept
        for value in concept.classes:
            if value not in classifier.classes.get(concept.attribute, ()):
                known = ", ".join(classifier.classes.get(concept.attribute, ())) or "no such attribute"
                raise UserError(f"{classifier.name} does not read {concept.attribute} = {value}: {known}")
        self.model, self.classifier, self.panel = model, classifier, panel
        self.held_out = HeldOutLoss(model, held_out, pairs, panel.seed)
        self.real, self._real = real, self._features(real)
        self._quality = quality(real)
        self.base_loss, self.base_variety = 1.0, 1.0
        self.drawn = 0  # pictures so far

    def calibrate(self, base: Mapping[str, float] | None = None) -> dict[str, float]:
        """Take the model as it is now for the untouched one, or what that one's raw figures were."""
        if base is None:
            loss = self.held_out()
            variety = self._variety(self.sampled(*self._neutral(self.panel.quick)))
            base = {"loss": loss, "variety": variety}
        self.base_loss, self.base_variety = base["loss"], base["variety"]
        return dict(base)

    def with_panel(self, panel: Panel) -> Meters:
        """The same meters asking something else."""
        other = copy.copy(self)
        other.panel, other.drawn = panel, 0
        return other

    def loss(self) -> float:
        """L alone: cheap, no picture is drawn."""
        return self.held_out() / self.base_loss

    def quick(self) -> Reading:
        """L, B, U and V from a few pictures of the neutral prompts."""
        loss = self.loss()
        if not np.isfinite(loss):
            return replace(Reading.of_loss(loss), unread=1.0)
        prompts, seeds = self._neutral(self.panel.quick)
        pictures = self.sampled(prompts, seeds)
        bias = self._bias(prompts, pictures)
        return self._reading(loss, bias, pictures, variety=self._variety(pictures))

    def full(self, loss: float | None = None) -> Reading:
        """Everything; `loss` is L where it is known already."""
        loss = self.loss() if loss is None else loss
        if not np.isfinite(loss):
            return replace(Reading.of_loss(loss), unread=1.0, fidelity=0.0, others=0.0)
        prompts, seeds = self._neutral(self.panel.neutral)
        neutral = self.sampled(prompts, seeds)
        explicit, fidelity = self._checked(self.panel.explicit)
        others, bleeding = self._checked(self.panel.others)
        everything = np.concatenate([neutral, explicit, others])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no flat patch anywhere: NaN
            numbers = ratios(quality(everything), self._quality)
        found = self._reading(
            loss, self._bias(prompts, neutral), neutral, fidelity, bleeding,
            self._frechet(everything), self._variety(neutral[: self.panel.quick]), numbers["grain"], numbers["colour"],
        )  # fmt: skip
        return replace(found, rest=self._rest(prompts, neutral))

    def fidelities(self) -> tuple[float, float]:
        """Of explicit prompts and of the others."""
        return self._checked(self.panel.explicit)[1], self._checked(self.panel.others)[1]

    def majority(self, reading: Reading) -> str:
        """The value most over its target."""
        concept = self.panel.concept
        excess = [reading.shares.get(v, 0.0) - q for v, q in zip(concept.classes, concept.target, strict=True)]
        return concept.classes[int(np.argmax(excess))]

    def sampled(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures of the model as it is now, drawn as all readings are."""
        self.drawn += len(prompts)
        settings = GenerateSettings(steps=self.panel.steps, guidance=self.panel.guidance)
        return draw(self.model, prompts, seeds, settings)

    # -------------------- parts

    def _reading(
        self, loss: float, bias: list[BiasFigures], pictures: np.ndarray, fidelity: float = _NAN, others: float = _NAN,
        frechet: float = _NAN, variety: float = _NAN, grain: float = _NAN, colour: float = _NAN,
    ) -> Reading:  # fmt: skip
        known = [b for b in bias if np.isfinite(b.tv)]
        tv = float(np.average([b.tv for b in known], weights=[b.n for b in known])) if known else 1.0
        cons = float(np.average([b.tv_cons for b in bias], weights=[b.n for b in bias]))
        counts = np.sum([b.counts for b in bias], axis=0)
        unread = sum(b.unread for b in bias) / max(1, sum(b.n for b in bias))
        shares = dict(zip(self.panel.concept.classes, (counts / max(1, counts.sum())).tolist(), strict=True))
        return Reading(loss, tv, cons, unread, fidelity, others, frechet, variety, grain, colour, shares,
                       pictures[:SHOWN])  # fmt: skip

    def _neutral(self, n: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds; a prompt that comes again has another seed."""
        prompts = self.panel.concept.neutral(n, self.panel.seed, watched=True)
        again: dict[str, Iterator[int]] = {p: iter(seeds_for(p, n, 7, self.panel.seed)) for p in dict.fromkeys(prompts)}
        return prompts, [next(again[p]) for p in prompts]

    def _bias(self, prompts: Sequence[str], pictures: np.ndarray) -> list[BiasFigures]:
        """Of each prompt; with watched ones, of the short prompts and of these."""
        concept = self.panel.concept
        labels = self.classifier.labels(pictures)[concept.attribute]
        at = np.asarray([p in concept.prompts if concept.watched else p for p in prompts])
        return [bias_figures(labels[at == p], concept.classes, concept.target) for p in dict.fromkeys(at.tolist())]

    def _rest(self, prompts: Sequence[str], pictures: np.ndarray) -> dict[str, dict[str, float]]:
        """Shares of every other attribute's values where the prompt leaves it open, each value counted `UNSEEN` times
        more, so that none is 0; attributes that most prompts name are left out."""
        labels, named = self.classifier.labels(pictures), [self.classifier.named(p) for p in prompts]
        out = {}
        for name, classes in self.classifier.classes.items():
            open_ = np.array([name not in said for said in named])
            if name == self.panel.concept.attribute or 2 * open_.sum() < len(open_):
                continue
            counts = UNSEEN + np.array([(labels[name][open_] == value).sum() for value in classes])
            out[name] = dict(zip(classes, (counts / counts.sum()).tolist(), strict=True))
        return out

    def _checked(self, checks: Sequence[Check]) -> tuple[np.ndarray, float]:
        """Pictures of the checks, in turn until there are `each`, and the share that shows what was asked for."""
        if not checks:
            return np.zeros((0, *self.real.shape[1:]), np.uint8), _NAN
        rows = [checks[i % len(checks)] for i in range(self.panel.each)]
        seeds = [seeds_for(c.prompt, self.panel.each, 8, self.panel.seed)[i // len(checks)] for i, c in enumerate(rows)]
        pictures = self.sampled([c.prompt for c in rows], seeds)
        labels = self.classifier.labels(pictures)
        hits = [labels[name][i] == value for i, c in enumerate(rows) for name, value in c.wanted.items()]
        return pictures, float(np.mean(hits))

    def _frechet(self, pictures: np.ndarray) -> float:
        found = self._features(pictures)
        return frechet_distance(found, self._real) if np.isfinite(found).all() else float("inf")

    def _variety(self, pictures: np.ndarray) -> float:
        found = torch.from_numpy(self._features(pictures))
        n = len(found)
        apart = float(torch.cdist(found, found).sum()) / max(1, n * (n - 1))
        return apart / self.base_variety

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        return features(self.classifier, pictures)


@torch.inference_mode()
def features(classifier: Classifier, pictures: np.ndarray, batch: int = 128) -> np.ndarray:
    """float64 [n, d]: what the classifier's network sees before it decides; thumbnails of 8 x 8 where it has none."""
    parts: list[Tensor] = []
    for start in range(0, len(pictures), batch):
        some = pictures[start : start + batch]
        if isinstance(classifier, PocketClassifier) and isinstance(classifier.reader, Reader):
            parts.append(torch.from_numpy(classifier.reader.features(some)))
        elif isinstance(classifier, ClipClassifier):
            clip = classifier.clip
            inputs = clip.processor(text=["picture"], images=list(some), return_tensors="pt", padding=True)
            parts.append(clip.model(**inputs.to(clip.device)).image_embeds.float().cpu())
        else:
            pixels = torch.from_numpy(np.ascontiguousarray(some)).permute(0, 3, 1, 2).float() / 255
            parts.append(torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1))
    return torch.cat(parts).double().numpy() if parts else np.zeros((0, 0))
