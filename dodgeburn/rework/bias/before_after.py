"""What a remedy did: bias, fidelity, garbage, distance from real pictures and what moved besides, before and after.

The same prompts and seeds before and after. Who reads is the caller's choice: the reader while something is chosen, the
judge when something is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from dodgeburn.measure.bias import UNREAD, BiasFigures, bias_figures, counts_of
from dodgeburn.measure.fidelity import fidelity, total_variation
from dodgeburn.measure.frechet import frechet_distance
from dodgeburn.measure.intervals import bootstrap_mean
from dodgeburn.measure.quality import MEASURES, quality, spread
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Readings
from dodgeburn.rework.bias.classify import Classifier, Labels, labels_of
from dodgeburn.rework.bias.concept import Concept

DrawPictures = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Prompts and seeds to pictures uint8 [n, h, w, 3]."""
FIRST_SEED = 31_000_000
FRESH_SEED = 33_000_000
REAL_LIST = 99  # picture list of real drawings


class Looks(Protocol):
    """A pocket reader, with what it reads from."""

    def read(self, pictures: np.ndarray, /) -> Readings: ...

    def features(self, pictures: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Plan:
    """Which pictures are drawn: `prompts` leave the attribute open, `others` are of anything."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # parallel to prompts
    others: tuple[str, ...]
    other_seeds: tuple[int, ...]
    explicit: tuple[tuple[str, str], ...]  # (prompt, class that it asks for)
    explicit_seeds: tuple[int, ...]


def make_plan(concept: Concept, n: int, others: int, explicit: int, first_seed: int = FIRST_SEED) -> Plan:
    """n neutral pictures, and so many of other prompts and of explicit ones. Neutral prompts are those that nothing is
    trained on, where the concept has such."""
    neutral = concept.neutral(n, first_seed, watched=True)
    rest = [concept.others[i % len(concept.others)] for i in range(others)] if concept.others else []
    classes = [concept.classes[i % len(concept.classes)] for i in range(explicit)]
    asks = concept.neutral(explicit, first_seed + 1, watched=True)
    asked = [(concept.explicit(asks[i], value, i), value) for i, value in enumerate(classes)]
    return Plan(
        tuple(neutral), tuple(first_seed + i for i in range(n)), tuple(rest),
        tuple(first_seed + 100_000 + i for i in range(len(rest))), tuple(asked),
        tuple(first_seed + 200_000 + i for i in range(len(asked))),
    )  # fmt: skip


@dataclass
class Measured:
    """One model's figures."""

    bias: BiasFigures
    fidelity: float  # of other prompts: share of named attributes that are shown (pocket); NaN if nothing reads them
    explicit: float  # share of explicit prompts whose picture shows the class asked for
    unreadable: float  # share of all these pictures
    frechet: float  # features of other prompts' pictures against real ones; NaN without
    others: dict[str, list[float]]  # shares of every other attribute under the neutral prompts that leave it open
    open: dict[str, int]  # how many pictures these are
    spreads: dict[str, float]  # quality over the attribute's classes, by measure
    grain: dict[str, float]  # means of the three quality numbers over the neutral pictures
    n: int  # neutral pictures
    pictures: np.ndarray = field(repr=False, default_factory=lambda: np.zeros((0, 8, 8, 3), np.uint8))  # the first
    labels: list[str] = field(repr=False, default_factory=list)  # of the neutral pictures, one by one
    fidelities: list[float] = field(repr=False, default_factory=list)  # of other prompts' pictures, one by one

    def as_json(self) -> dict[str, Any]:
        """Plain values; None for NaN."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("bias", "pictures", "labels", "fidelities")}
        return {"bias": self.bias.as_json(), **{k: _plain(v) for k, v in kept.items()}}

    def as_row(self) -> dict[str, Any]:
        """Everything but the pictures, exactly, for `from_row`."""
        return {k: v for k, v in asdict(self).items() if k != "pictures"}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], pictures: np.ndarray | None = None) -> Measured:
        """The measurement again, as JSON gives it back."""
        bias: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["bias"].items()}
        more = {} if pictures is None else {"pictures": pictures}
        return cls(**{**row, "bias": BiasFigures(**bias), **more})


class Meter:
    """Draws a plan's pictures and reads them.

    Not deconstruction's `Meters`: that one is bound to a model on its way, asks it for held-out losses too and reads
    against what the model was, a few pictures at a time; this one judges finished models, however they draw (a random
    prompt is no weights), on the same pictures for all.
    """

    def __init__(
        self, concept: Concept, plan: Plan, classifier: Classifier, looks: Looks | None = None,
        real: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """looks: the pocket's reader or judge, for prompt fidelity and features. real: features of real pictures."""
        self.concept, self.plan, self.classifier, self.looks, self.real = concept, plan, classifier, looks, real
        if concept.attribute not in classifier.classes:
            raise ValueError(f"{classifier.name} does not read {concept.attribute}")

    def neutral(self, draw: DrawPictures, n: int | None = None, fresh: int = 0) -> tuple[BiasFigures, float]:
        """The bias alone, of the first n neutral pictures, and the share of unreadable ones. fresh: a number above 0
        has prompts and seeds of its own, so that what is steered by many looks is steered by no one sample's luck."""
        prompts, seeds = list(self.plan.prompts[:n]), list(self.plan.seeds[:n])
        if fresh:
            prompts = self.concept.neutral(n or len(prompts), FRESH_SEED + fresh, watched=True)
            seeds = [FRESH_SEED + 10_000 * fresh + i for i in range(len(prompts))]
        pictures = draw(prompts, seeds)
        labels = self.classifier.labels(pictures)[self.concept.attribute]
        return self._figures(labels), float((labels == UNREAD).mean())

    def measure(self, draw: DrawPictures) -> Measured:
        """Everything."""
        plan, concept = self.plan, self.concept
        pictures = draw(plan.prompts, plan.seeds)
        labels = self.classifier.labels(pictures)
        own = labels[concept.attribute]
        unread = [own == UNREAD]
        shown = float("nan")
        if plan.explicit:
            found = self.classifier.labels(draw([p for p, _ in plan.explicit], plan.explicit_seeds))[concept.attribute]
            shown = float((found == np.array([value for _, value in plan.explicit])).mean())
            unread.append(found == UNREAD)
        kept = distance = float("nan")
        each: list[float] = []
        if plan.others and self.looks is not None:
            rest = draw(plan.others, plan.other_seeds)
            readings = self.looks.read(rest)
            each = fidelity([parse(p) for p in plan.others], readings).tolist()
            kept = float(np.nanmean(each))
            unread.append(labels_of(readings)[concept.attribute] == UNREAD)
            if self.real is not None:
                distance = frechet_distance(self.looks.features(rest), self.real)
        numbers = quality(pictures)
        return Measured(
            self._figures(own), kept, shown, float(np.concatenate(unread).mean()), distance,
            *self._others(labels), {m: spread(numbers[m], own, m).value for m in MEASURES},
            {m: _mean(numbers[m]) for m in MEASURES}, len(own), pictures[:16], [str(x) for x in own], each,
        )  # fmt: skip

    def _figures(self, labels: np.ndarray) -> BiasFigures:
        return bias_figures(labels, self.concept.classes, self.concept.target)

    def _others(self, labels: Labels) -> tuple[dict[str, list[float]], dict[str, int]]:
        named = [self.classifier.named(prompt) for prompt in self.plan.prompts]
        shares, known = {}, {}
        for name, classes in self.classifier.classes.items():
            rows = np.array([name not in said for said in named], bool)
            if name == self.concept.attribute or not rows.any():
                continue
            counts = counts_of(labels[name][rows], classes)[0]
            known[name] = int(counts.sum())
            shares[name] = (counts / max(1, known[name])).tolist()
        return shares, known


@dataclass(frozen=True)
class Change:
    """After against before."""

    tv_before: float
    tv_after: float
    tv_cons: float
    floor_95: float
    fidelity_drop: float
    explicit_drop: float
    unreadable_rise: float
    frechet_ratio: float
    others_tv: float  # of the other attributes, the one that moved most: total variation between before and after
    others_name: str
    others_mean: float
    others_floor: float  # 95 % of the largest of as many, were both samples of one model
    fidelity_ends: tuple[float, float] | None = None  # 95 % interval of fidelity_drop, over the pictures

    def meets(self, target: float = 0.10, slack: float = 0.01, others: float = 0.05) -> bool:
        """TV, counting unreadable pictures as the majority, at most `target`; fidelity and readability kept within
        `slack`; no other attribute moved by more than `others`, nor by more than chance shows. Figures that were not
        measured don't count."""
        return not self.misses(target, slack, others)

    def misses(self, target: float = 0.10, slack: float = 0.01, others: float = 0.05) -> list[str]:
        """What `meets` finds too large, each in words."""
        out = [] if self.tv_cons <= target else [f"TV {self.tv_cons:.3f} is above {target:g}"]
        for name, drop in (
            ("fidelity is lower", self.fidelity_drop),
            ("unreadable pictures are up", self.unreadable_rise),
        ):
            if np.isfinite(drop) and drop > slack + 1e-9:
                out.append(f"{name} by {drop:.3f}, more than {slack:g}")
        if self.others_tv > (most := max(others, self.others_floor)):
            out.append(f"{self.others_name} moved by {self.others_tv:.3f}, more than {most:.3f}"
                       + (", which chance shows" if self.others_floor > others else ""))  # fmt: skip
        return out

    def as_json(self) -> dict[str, Any]:
        """Plain values; None for NaN."""
        return {k: _plain(v) for k, v in asdict(self).items()}


def change(before: Measured, after: Measured) -> Change:
    """What a remedy changed."""
    moved = {name: total_variation(p, after.others[name]) for name, p in before.others.items()}  # type: ignore[arg-type]
    worst = max(moved, key=lambda name: moved[name], default="")
    return Change(
        before.bias.tv, after.bias.tv, after.bias.tv_cons, after.bias.floor_95, before.fidelity - after.fidelity,
        before.explicit - after.explicit, after.unreadable - before.unreadable,
        after.frechet / before.frechet if before.frechet else float("nan"), moved.get(worst, float("nan")), worst,
        float(np.mean(list(moved.values()))) if moved else float("nan"), _floor_of_largest(before.others, before.open),
        _ends(before.fidelities, after.fidelities),
    )  # fmt: skip


def _ends(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean drop, picture by picture: before and after have prompts and seeds in common."""
    if not before or len(before) != len(after):
        return None
    ends = bootstrap_mean(np.subtract(before, after)[:, None]).ends
    return (ends[0], ends[1]) if ends else None


def _floor_of_largest(others: Mapping[str, Sequence[float]], known: Mapping[str, int], draws: int = 2000) -> float:
    """95 % quantile of the largest total variation between two samples, over attributes with these shares and so many
    readable pictures."""
    if not any(known.values()):
        return float("nan")
    rng = np.random.default_rng(0)
    largest = np.zeros(draws)
    for name, shares in others.items():
        q = np.asarray(shares, np.float64)
        n = known[name]
        if q.sum() <= 0 or n < 1:
            continue
        a, b = (rng.multinomial(n, q / q.sum(), size=draws) / n for _ in range(2))
        largest = np.maximum(largest, np.abs(a - b).sum(1) / 2)
    return float(np.quantile(largest, 0.95))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if not np.isfinite(value) else round(float(value), 5)
    return value


def real_features(looks: Looks, size: int, n: int = 500) -> np.ndarray:
    """Features of n drawings of the world without ties, from a list that nothing is trained on."""
    from dodgeburn.pocket.pictures import attributes_of, draw_pictures

    return looks.features(draw_pictures([attributes_of(i, REAL_LIST, ()) for i in range(n)], size))
