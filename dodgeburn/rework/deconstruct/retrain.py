"""Stage 4: retraining on balanced pictures, then a fine-tune until grain and colours are those of real pictures.

4a: pictures of the concept, weighted by w = q(a) / p(a) of their value a (clipped), beside pictures of other things in
a fixed share; every check moves the weights towards what is still lacking (weighing.py). Prior preservation towards the
untouched model on the others' prompts, a quarter of them left out: guidance goes by what is said of no prompt, which
pictures of one concept alone are not to move. Averaged weights. With `taught`, what is learned of a picture is not the
picture but what the untouched model says of it, plus `taught` times what asking for the picture's value changes: real
pictures would bring their own style with them, which guidance then overstates. A model that does not show what it is
asked for has no such answers: of that one pictures are learned, unless the spec says otherwise; then their weights
follow what is read of all other attributes too, back to how the untouched model draws them. It ends when at two
checks running

    B <= tv  and  L <= loss  and  fid >= the untouched model's - fidelity_fall

or when the distance from that goal has not shrunk by 1 % in `plateau` checks, or with the steps.

4b: a tenth of the learning rate, on the pictures whose grain and colour spread are nearest to the set's median, until
both are within `quality` of real pictures', or as near as the untouched model came. Left out where they are already.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import DodgeburnWarning
from dodgeburn.jobs import KeptRows
from dodgeburn.measure.quality import quality
from dodgeburn.models.model import Model
from dodgeburn.rework.bias.asking import shown_when_asked
from dodgeburn.rework.bias.classify import LEVELS
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.weighing import followed, held, importance
from dodgeburn.rework.deconstruct.materials import CONCEPT, Materials
from dodgeburn.rework.deconstruct.meters import Meters, Reading
from dodgeburn.rework.deconstruct.overtrain import Tell
from dodgeburn.rework.deconstruct.spec import DeconstructSpec, Retrain
from dodgeburn.rework.deconstruct.stage_log import StageLog, StageResult, State, load_unet
from dodgeburn.training.examples import Examples, Pictures, encode_examples, join
from dodgeburn.training.fine_tune import Teacher, fine_tune, make_prior, make_teacher
from dodgeburn.training.loop import evaluated

ANSWERS = 2.0  # times what asking for a value changes, unless the spec says another number
ASKED = 64  # pictures of each value that tell whether the untouched model is a teacher
TEACHES = 0.95  # share of them that shows the value asked for; below, answers are a poor teacher
TEACHES_LEVELS = 0.4  # of levels of a degree, whose neighbours are often shown instead: 0.56 taught well (docs/bias.md)


def balanced(materials: Materials, concept: Concept, s: Retrain) -> Pictures:
    """The concept's pictures, weighted, and others: repeated so that a batch holds `concept_share` of the concept."""
    inside, outside = materials.rows(True), materials.rows(False)
    own = materials.pool.take(inside)
    weights = importance(own.columns[materials.attribute], concept.classes, concept.target, s.weight_high)
    own = Pictures(own.pixels, own.captions, own.weights * weights / weights.mean(), own.columns)
    own = own.take(np.flatnonzero(weights > 0))
    wanted = s.concept_share / (1 - s.concept_share) * len(outside)
    rng = np.random.default_rng([s.seed, 81])
    if wanted > len(own):
        times = np.concatenate([rng.permutation(len(own)) for _ in range(math.ceil(wanted / len(own)))])
        return join([own.take(times[: round(wanted)]), materials.pool.take(outside)])
    n = round(len(own) * (1 - s.concept_share) / s.concept_share)
    times = np.concatenate([rng.permutation(outside) for _ in range(math.ceil(n / len(outside)))])
    return join([own, materials.pool.take(times[:n])])


def _values(pictures: Pictures, attribute: str) -> list[str]:
    """The value of each picture of the concept, "" of the others."""
    return [v if c else "" for v, c in zip(pictures.columns[attribute], pictures.columns[CONCEPT], strict=True)]


def typical(pictures: Pictures, share: float) -> np.ndarray:
    """Indices of the pictures whose grain and colour spread are nearest to their medians, in units of the spread
    between the quartiles: what is unusually grainy, smooth or blotched is left out."""
    apart = np.zeros(len(pictures))
    for name in ("grain", "colour"):
        found = quality(pictures.pixels)[name]
        if np.isnan(found).all():
            continue  # no flat patch in any picture
        low, middle, high = np.nanquantile(found, [0.25, 0.5, 0.75])
        apart = np.maximum(apart, np.nan_to_num(np.abs(found - middle) / max(high - low, 1e-12), nan=np.inf))
    n = max(1, round(share * len(pictures)))
    return np.sort(np.argsort(apart, kind="stable")[:n])


@dataclass
class _Goal:
    """When it is enough, from the readings so far."""

    s: Retrain
    before: Reading

    def distance(self, r: Reading) -> float:
        """0 at the goal."""
        fall = self.before.fidelity - self.s.fidelity_fall
        return max(0.0, r.tv - self.s.tv) + max(0.0, r.loss - self.s.loss) + max(0.0, fall - r.fidelity)

    def reached(self, readings: list[Reading]) -> bool:
        """Whether the last two checks are at the goal: one alone may be there by luck."""
        return len(readings) > 1 and all(self.distance(r) == 0 for r in readings[-2:])

    def plateau(self, readings: list[Reading]) -> bool:
        """Whether the last checks have not brought it nearer by 1 % of the best distance before them."""
        n = self.s.plateau
        if len(readings) <= n:
            return False
        distances = [self.distance(r) for r in readings]
        return min(distances[-n:]) > 0.99 * min(distances[:-n])

    def clean(self, r: Reading) -> bool:
        """Whether grain and colour are back."""
        return all(
            math.isnan(now) or abs(now - 1) <= max(self.s.quality, abs(was - 1))
            for now, was in ((r.grain, self.before.grain), (r.colour, self.before.colour))
        )


def retrain(
    model: Model, base: State, start: State, materials: Materials, meters: Meters, before: Reading,
    spec: DeconstructSpec, folder: Path, tell: Tell | None = None,
) -> StageResult:  # fmt: skip
    """From `start`; the model ends retrained. `base` is the untouched one, `before` its full reading."""
    log = StageLog(folder, "retrain")
    if (done := log.restored(model)) is not None:
        return done
    s, drawn, concept = spec.retrain, meters.drawn, meters.panel.concept
    goal = _Goal(s, before)
    lesson = _lesson(s, concept, 1.0 if s.taught == 0 else _shown(model, base, meters, folder))
    pictures = balanced(materials, concept, s)
    prior = None
    if s.prior > 0:
        load_unet(model, base)
        others = encode_examples(model, materials.pool.take(materials.rows(False)))
        prior = make_prior(model, others, s.prior_points, s.seed + 5)
    examples, values = _examples(model, pictures), _values(pictures, materials.attribute)
    teacher = _teacher(model, base, examples, values, concept, lesson.taught) if lesson.taught else None
    load_unet(model, start)
    settings = spec.tuning(
        steps=s.steps, batch=s.batch, lr=lesson.lr, empty=0.0 if s.prior > 0 else 0.1, ema=s.ema, prior=s.prior,
        prior_batch=s.prior_batch, gamma=s.gamma, noise_power=lesson.noise_power, constant=0.4, final=0.05,
        warmup=min(10, s.every), seed=s.seed, checkpoint_every=s.every, log_every=s.every,
    )  # fmt: skip
    watch = _Watch(model, meters, log, "a", tell, lambda seen: goal.reached(seen) or goal.plateau(seen))

    def weigh(of: Pictures, weights: Tensor, values: list[str]) -> Callable[[list[Reading]], Tensor]:
        """What the pictures weigh after checks. A teacher's answers do not depend on how often it is asked what, so
        the other attributes are held where pictures are learned."""
        labels = {} if lesson.taught or not s.hold else meters.classifier.labels(of.pixels)
        shown = {name: list(map(str, of_name)) for name, of_name in labels.items()}
        rest = {name: shares for name, shares in before.rest.items() if name in shown}

        def after(seen: list[Reading]) -> Tensor:
            shares = [reading.shares for reading in seen]
            own = followed(weights, values, concept.classes, concept.target, shares, s.adapt, s.weight_high)
            return held(own, values, shown, rest, [reading.rest for reading in seen], s.hold, s.weight_high)

        return after

    weighed = weigh(pictures, examples.weights, values)
    fine_tune(
        model, examples, settings, log.work / "a", "retrain", prior, watch, told={"taught": lesson.taught},
        show_average=True, weights=lambda step: weighed(watch.before(step)), teacher=teacher,
    )  # fmt: skip
    steps, last = watch.last, watch.readings[-1]
    decision = lesson.why + (
        f"goal reached at step {steps}" if goal.reached(watch.readings) else
        f"plateau at step {steps}" if goal.plateau(watch.readings) else "steps used up"
    )  # fmt: skip
    polished = 0
    if s.polish_steps and not goal.clean(last):
        every = min(s.polish_every, s.polish_steps)
        settings = settings.model_copy(update={
            "steps": s.polish_steps, "lr": lesson.lr / 10, "seed": s.seed + 1,
            "checkpoint_every": every, "log_every": every,
        })  # fmt: skip
        polish = _Watch(model, meters, log, "b", tell, lambda seen: goal.clean(seen[-1]))
        best = pictures.take(typical(pictures, s.best))
        few, of_best = _examples(model, best), _values(best, materials.attribute)
        if teacher is not None:
            teacher = replace(teacher, asks=_asking(of_best, concept))
        last_weights = weigh(best, few.weights, of_best)(watch.readings)
        fine_tune(
            model, few, settings, log.work / "b", "polish", prior, polish, told={"taught": lesson.taught},
            show_average=True, weights=lambda _step: last_weights, teacher=teacher,
        )  # fmt: skip
        polished, last = polish.last, polish.readings[-1]
        decision += f"; grain and colour {'back' if goal.clean(last) else 'not back'} after {polished} steps more"
    elif s.polish_steps:
        decision += "; grain and colour needed no fine-tune"
    seen = (steps + polished) * (s.batch + (s.prior_batch if s.prior > 0 else 0))
    return log.finish(model, decision, goal.distance(last) == 0, steps + polished, seen, meters.drawn - drawn,
                      distance=round(goal.distance(last), 5), clean=goal.clean(last), polish=polished)  # fmt: skip


def _asking(values: list[str], concept: Concept) -> Callable[[int, str], str]:
    """What a teacher is asked about a picture: its caption, and of the concept's pictures their value."""
    return lambda row, text: concept.explicit(text, values[row], row) if values[row] else text


@dataclass(frozen=True)
class _Lesson:
    """What is learned of a picture, and how: what is decided decides how fast and at which noise. Answers are exact,
    and steps as large as pictures need move other attributes twice as far (docs/notes/deconstruct.md)."""

    taught: float  # 0: the picture itself
    lr: float
    noise_power: float
    why: str = ""


def _shown(model: Model, base: State, meters: Meters, folder: Path) -> float:
    """Share of the untouched model's pictures that show the value they were asked for; leaves it with these weights."""
    load_unet(model, base)
    concept, log = meters.panel.concept, KeptRows(folder / "asked.jsonl")
    shown = shown_when_asked(concept, meters.sampled, meters.classifier, ASKED, log)
    return float(np.average(np.diag(shown), weights=concept.target))


def _lesson(s: Retrain, concept: Concept, shown: float) -> _Lesson:
    """What the spec says, and where it says nothing what suits a model that shows this share of what it is asked for; a
    warning where it is asked for answers that it does not have."""
    enough = TEACHES_LEVELS if set(concept.classes) <= set(LEVELS) else TEACHES
    poor = f"asked for {concept.attribute}, the untouched model shows it in {shown:.0%} of pictures"
    taught, why = s.taught, ""
    if shown < enough and taught is None:
        taught, why = 0.0, f"learned from the pictures, for {poor}; "
    elif shown < enough and taught:
        warnings.warn(
            f"{poor}: what it says is a poor teacher, and the tie may stay; retrain: {{taught: 0}} learns from the "
            "pictures themselves",
            DodgeburnWarning,
            stacklevel=3,
        )
    taught = ANSWERS if taught is None else taught
    lr, noise_power = (1e-4, 0.8) if taught else (3e-4, 0.4)
    return _Lesson(taught, s.lr or lr, noise_power if s.noise_power is None else s.noise_power, why)


def _teacher(
    model: Model, base: State, examples: Examples, values: list[str], concept: Concept, strength: float
) -> Teacher:  # fmt: skip
    """The untouched model, in memory beside the one that is trained; leaves `model` with the base's weights."""
    load_unet(model, base)
    return make_teacher(model, examples, _asking(values, concept), strength)


def _examples(model: Model, pictures: Pictures) -> Examples:
    """Encoded, each different picture once."""
    keys = [p.tobytes() for p in pictures.pixels]
    first: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    rows = list(first.values())
    once = encode_examples(model, pictures.take(rows))
    at = {key: j for j, key in enumerate(first)}
    index = torch.tensor([at[key] for key in keys])
    return Examples(once.latents[index], pictures.captions, torch.from_numpy(pictures.weights), once.size)


class _Watch:
    """The callback: a full reading at every check, of the averaged weights."""

    def __init__(
        self, model: Model, meters: Meters, log: StageLog, part: str, tell: Tell | None,
        enough: Callable[[list[Reading]], bool],
    ) -> None:  # fmt: skip
        self.enough, self.model, self.meters, self.log, self.part, self.tell = enough, model, meters, log, part, tell
        # A training that resumes begins behind its first checks.
        self.seen = {int(key.split(":")[1]): Reading.from_json(row) for key, row in log.rows.items()
                     if key.startswith(f"{part}:")}  # fmt: skip
        self.last = 0

    def before(self, step: int) -> list[Reading]:
        """Of the checks that training step `step` (0-based) comes after."""
        return [reading for at, reading in sorted(self.seen.items()) if at <= step]

    @property
    def readings(self) -> list[Reading]:
        """Up to the last check."""
        return [reading for step, reading in sorted(self.seen.items()) if step <= self.last]

    def __call__(self, step: int, means: dict[str, float]) -> bool:
        losses = {f"train_{k}": round(v, 5) for k, v in means.items()}
        reading = self.log.reading(f"{self.part}:{step}", self._measure, step=step, part=self.part, **losses)
        self.seen[step], self.last = reading, step
        if self.tell is not None:
            self.tell("retrain", step, reading)
        return not self.enough(self.readings)

    def _measure(self) -> Reading:
        with evaluated(self.model.unet):
            return self.meters.full()
