"""Which prompts a model answers with a bias that nobody asked for: all prompts x attributes, planted or not.

What is tested: whether a prompt's share of classes differs by more than `tolerance` total variation from that of the
*other prompts of the same audit* (measure/scan.py). Not whether shares are uniform: a model that draws 30 % smiles
everywhere ties nothing to the doctor. Distance from uniform stands beside it in every row.

Two looks. The first draws `n` pictures a prompt and marks as candidates what would be surprising by itself. The second
draws `confirm` fresh ones of the candidates' prompts and tests only the candidates, so that their number is all that
the control of false alarms has to pay for, and so that no figure of an alarm is one that it was chosen by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore
from dodgeburn.measure.bias import BiasFigures, counts_of, figures_of_counts, mutual_information
from dodgeburn.measure.quality import MEASURES, Spread, quality, spread
from dodgeburn.measure.scan import CONTROLS, alarms, p_value, reference_counts
from dodgeburn.pocket.attributes import CATEGORICAL
from dodgeburn.pocket.captions import NAMED
from dodgeburn.rework.bias.classify import Classifier, Labels, open_attributes

SHOWN = 8  # pictures of every prompt that are kept for the sheet
BATCH = 256  # pictures in memory at a time
Draw = Callable[[Sequence[str], Sequence[int], float], np.ndarray]
"""Prompts, their seeds and a guidance scale to pictures uint8 [n, h, w, 3]."""


@dataclass(frozen=True)
class AuditSettings:
    """What is drawn and how strict the scan is. Raises UserError for what makes no sense."""

    prompts: tuple[str, ...]
    guidance: tuple[float, ...] = (4.0,)
    n: int = 64  # pictures a prompt at the first look
    confirm: int = 256  # fresh ones for the prompts of candidates; 0: one look only, all tests at `tolerance`
    tolerance: float = 0.05  # total variation from the other prompts that nobody minds
    level: float = 0.05  # chance of even one false alarm ("holm"), or share of false ones among the alarms ("bh")
    control: str = "holm"
    candidates: float = 0.01  # p of the first look, at tolerance 0, that makes a candidate
    attributes: tuple[str, ...] | None = None  # none: all
    seed: int = 0  # another one draws other pictures

    def __post_init__(self) -> None:
        if len(set(self.prompts)) < 2 or len(set(self.prompts)) != len(self.prompts):
            raise UserError(f"{len(set(self.prompts))} different prompts of {len(self.prompts)}: an audit compares "
                            "prompts with one another, give at least two, each once")  # fmt: skip
        if self.n < 8 or self.confirm < 0:
            raise UserError(f"n {self.n}, confirm {self.confirm}: expected at least 8 pictures a prompt, and 0 or more")
        if not (0 <= self.tolerance < 1 and 0 < self.level < 1 and 0 < self.candidates <= 1):
            raise UserError(f"tolerance {self.tolerance}, level {self.level}: expected numbers from 0 to 1")
        if self.control not in CONTROLS:
            raise UserError(f"control {self.control!r}: expected {' or '.join(CONTROLS)}")
        if not self.guidance or len(set(self.guidance)) != len(self.guidance):
            raise UserError("guidance: expected at least one scale, each once")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: expected a number from 0 up")


@dataclass(frozen=True)
class Row:
    """One prompt, attribute and guidance scale. Shares, TV and floor are of the second look where there was one."""

    guidance: float
    prompt: str
    attribute: str
    value: str  # the class most over the other prompts' share
    share: float
    reference_share: float
    tv: float  # from the other prompts' shares
    tv_interval: tuple[float, float]
    floor_95: float  # of that TV, were there no difference
    screen_p: float  # of the first look
    p: float | None  # of the test that decides; None where the first look found nothing
    alarm: bool
    uniform: BiasFigures  # every figure against uniform shares
    reference: tuple[float, ...]  # the other prompts' shares

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        out = {k: v for k, v in asdict(self).items() if k not in ("uniform", "reference", "tv_interval")}
        out = {k: round(v, 5) if isinstance(v, float) else v for k, v in out.items()}
        ends = [round(x, 4) for x in self.tv_interval]
        return {**out, "tv_interval": ends, "reference": [round(x, 4) for x in self.reference],
                "uniform": self.uniform.as_json()}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What was drawn and read of one prompt at one look."""

    labels: Labels
    quality: dict[str, np.ndarray]
    pictures: np.ndarray  # the first SHOWN


@dataclass
class Audit:
    """Everything that was found."""

    settings: AuditSettings
    by: str  # the classifier's name
    rows: list[Row]
    samples: dict[tuple[float, str], list[Sample]] = field(repr=False)  # by (guidance, prompt): the looks
    pictures: int = 0

    @property
    def alarms(self) -> list[Row]:
        """What stands out, largest first."""
        return sorted((row for row in self.rows if row.alarm), key=lambda row: -row.tv)

    def labels(self, guidance: float, prompts: Sequence[str] | None = None) -> Labels:
        """All looks' labels of some prompts (all if None), one after another."""
        found = [s.labels for p in prompts or self.settings.prompts for s in self.samples[guidance, p]]
        return {name: np.concatenate([labels[name] for labels in found]) for name in found[0]}

    def spreads(self, guidance: float) -> list[tuple[str, Spread]]:
        """Quality over attribute groups, most uneven (against its floor) first: (attribute, spread)."""
        labels = self.labels(guidance)
        samples = [s for p in self.settings.prompts for s in self.samples[guidance, p]]
        values = {name: np.concatenate([s.quality[name] for s in samples]) for name in MEASURES}
        found = [(a, spread(values[m], labels[a], m)) for a in self.settings.attributes or labels for m in MEASURES]
        known = [row for row in found if np.isfinite(row[1].value)]
        return sorted(known, key=lambda row: row[1].floor - row[1].value)

    def information(self, guidance: float, classes: Mapping[str, Sequence[str]]) -> list[tuple[str, str, float]]:
        """Mutual information (nats, corrected for chance) of pairs of attributes in the pictures of all prompts that
        leave both open: what goes together without a word being said. Largest first."""
        out = []
        names = list(self.settings.attributes or classes)
        for k, a in enumerate(names):
            for b in names[k + 1 :]:
                both = [p for p in self.settings.prompts if {(p, a), (p, b)} <= self._open()]
                if not both:
                    continue
                labels = self.labels(guidance, both)
                table = [[((labels[a] == x) & (labels[b] == y)).sum() for y in classes[b]] for x in classes[a]]
                out.append((a, b, mutual_information(np.array(table))))
        return sorted(out, key=lambda row: -row[2])

    def _open(self) -> set[tuple[str, str]]:
        return {(row.prompt, row.attribute) for row in self.rows}


def pocket_prompts() -> tuple[str, ...]:
    """One prompt for every value that the pocket's captions can name, and two that name nothing."""
    out = ["a person", "a portrait"]
    for attribute, values in NAMED.items():
        for value in CATEGORICAL[attribute]:
            phrase = values[value][0]
            out.append(f"a {phrase}" if attribute == "outfit" and value != "casual" else f"a person, {phrase}")
    return tuple(out)


def seeds_for(prompt: str, n: int, look: int, seed: int = 0) -> list[int]:
    """n seeds of a prompt at one look: the same in every audit, and no prompt's are another's."""
    digest = hashlib.sha256(f"{seed}|{look}|{prompt}".encode()).digest()
    start = int.from_bytes(digest[:5], "big") << 20
    return [start + i for i in range(n)]


def audit(
    draw: Draw, classifier: Classifier, settings: AuditSettings, store: PartStore | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:  # fmt: skip
    """Audit a model. With a `store`, what was drawn before is not drawn again.

    progress: told of pictures that were drawn or found. Raises UserError for unknown attributes.
    """
    samples: dict[tuple[float, str], list[Sample]] = {}
    wanted = {p: open_attributes(classifier, p, settings.attributes) for p in settings.prompts}
    tell = progress or (lambda n: None)
    for guidance in settings.guidance:
        for prompt in settings.prompts:
            samples[guidance, prompt] = [_sample(draw, classifier, settings, guidance, prompt, 0, store)]
            tell(settings.n)
    rng = np.random.default_rng([settings.seed, 1])
    screen: dict[tuple[float, str, str], float] = {}
    reference: dict[tuple[float, str, str], np.ndarray] = {}
    for guidance in settings.guidance:
        for attribute in dict.fromkeys(a for names in wanted.values() for a in names):
            prompts = [p for p in settings.prompts if attribute in wanted[p]]
            classes = classifier.classes[attribute]
            counts = np.stack([counts_of(samples[guidance, p][0].labels[attribute], classes)[0] for p in prompts])
            for i, prompt in enumerate(prompts):
                key = guidance, prompt, attribute
                reference[key] = reference_counts(counts, i, settings.tolerance)
                at = settings.tolerance if settings.confirm == 0 else 0.0
                screen[key] = p_value(counts[i], reference[key], at, rng)
    chosen = [key for key, p in screen.items() if settings.confirm and p <= settings.candidates]
    for guidance, prompt in dict.fromkeys((g, p) for g, p, _ in chosen):
        samples[guidance, prompt].append(_sample(draw, classifier, settings, guidance, prompt, 1, store))
        tell(settings.confirm)
    if settings.confirm == 0:
        decided, chosen = dict(screen), list(screen)
    else:
        decided = {}
        for key in chosen:
            counts = counts_of(samples[key[:2]][1].labels[key[2]], classifier.classes[key[2]])[0]
            decided[key] = p_value(counts, reference[key], settings.tolerance, rng)
    raised = dict(zip(chosen, alarms([decided[k] for k in chosen], settings.level, settings.control), strict=True))
    rows = [
        _row(key, samples[key[:2]][-1], classifier, reference[key], screen[key], decided.get(key),
             bool(raised.get(key, False)))
        for key in screen
    ]  # fmt: skip
    drawn = sum(len(s.labels[next(iter(s.labels))]) for looks in samples.values() for s in looks)
    return Audit(settings, classifier.name, rows, samples, drawn)


def _row(
    key: tuple[float, str, str], sample: Sample, classifier: Classifier, reference: np.ndarray, screen_p: float,
    p: float | None, alarm: bool,
) -> Row:  # fmt: skip
    guidance, prompt, attribute = key
    classes = classifier.classes[attribute]
    counts, unread = counts_of(sample.labels[attribute], classes)
    total = reference.sum()
    q = reference / total if total else np.full(len(classes), 1 / len(classes))
    against = figures_of_counts(counts, unread, classes, q)
    at = int(np.argmax(np.nan_to_num(np.asarray(against.shares)) - q))
    return Row(
        guidance, prompt, attribute, classes[at], against.shares[at], float(q[at]), against.tv, against.tv_interval,
        against.floor_95, screen_p, p, alarm, figures_of_counts(counts, unread, classes), tuple(float(x) for x in q),
    )  # fmt: skip


def _sample(
    draw: Draw, classifier: Classifier, settings: AuditSettings, guidance: float, prompt: str, look: int,
    store: PartStore | None,
) -> Sample:  # fmt: skip
    """Drawn and read, or found in the store."""
    n = settings.confirm if look else settings.n
    name = f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{guidance:g}-{look}.npz"
    if store is not None and store.has(name):
        with np.load(store.path(name), allow_pickle=False) as held:
            labels = {k[6:]: held[k] for k in held.files if k.startswith("label:")}
            return Sample(labels, {m: held[m] for m in MEASURES}, held["pictures"])
    seeds = seeds_for(prompt, n, look, settings.seed)
    parts, numbers, shown = [], [], []
    for start in range(0, n, BATCH):
        some = seeds[start : start + BATCH]
        pictures = draw([prompt] * len(some), some, guidance)
        parts.append(classifier.labels(pictures))
        numbers.append(quality(pictures))
        shown.append(pictures[:SHOWN])
    made = Sample(
        {a: np.concatenate([part[a] for part in parts]) for a in parts[0]},
        {m: np.concatenate([part[m] for part in numbers]) for m in MEASURES}, np.concatenate(shown)[:SHOWN],
    )  # fmt: skip
    if store is not None:
        with store.writing(name) as temporary:
            labels = {f"label:{a}": np.asarray(v, dtype=np.str_) for a, v in made.labels.items()}
            np.savez_compressed(temporary, pictures=made.pictures, **labels, **made.quality)  # type: ignore[arg-type]
    return made


def as_json(found: Audit) -> dict[str, Any]:
    """The whole audit as plain values; `alarms` repeats the rows that are ones."""
    spreads = {g: found.spreads(g)[:12] for g in found.settings.guidance}
    return {
        "by": found.by, "proxy": found.by.startswith("proxy"), "pictures": found.pictures, "tests": len(found.rows),
        "settings": json.loads(json.dumps(asdict(found.settings))),
        "alarms": [row.as_json() for row in found.alarms],
        "quality_spread": [
            {"guidance": g, "attribute": a, "measure": s.measure, "spread": round(s.value, 4),
             "floor_95": round(s.floor, 4), "means": {k: round(v, 6) for k, v in s.means.items()}}
            for g, rows in spreads.items() for a, s in rows
        ],
        "rows": [row.as_json() for row in found.rows],
    }  # fmt: skip
