"""The pictures that a deconstruction works with: one pool, from the pocket world, the model itself or a folder.

The pool has two columns: `concept` ("yes" or "") and the attribute's name. All sets are taken from it: the majority's
pictures (stress), pictures of under-represented values (anchors), balanced ones, others, and some that are held out and
never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, PLANTED, Attributes, draw_attributes
from dodgeburn.pocket.captions import parse
from dodgeburn.rework.bias.classify import Classifier, PocketClassifier
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.pocket_concept import (
    agrees,
    asked_by_all,
    class_of,
    held_out_prompts,
    world_pictures,
)
from dodgeburn.rework.deconstruct.meters import Check, Panel
from dodgeburn.rework.deconstruct.spec import Data, DeconstructSpec
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.training.examples import Pictures, join, model_pictures, pocket_pictures
from dodgeburn.training.image_folder import read_image_folder

CONCEPT = "concept"
OTHERS = 24  # prompts of other things that the meters ask


@dataclass(frozen=True)
class Materials:
    """The pool and what is held out."""

    pool: Pictures
    held_out: Pictures
    attribute: str
    left_out: tuple[str, ...] = ()  # bad lines of a folder

    def rows(self, concept: bool | None = None, value: str | None = None) -> np.ndarray:
        """Indices of the pool's pictures of the concept (or not, or all), with this value (or any)."""
        inside = np.array([bool(c) for c in self.pool.columns[CONCEPT]])
        values = np.array(self.pool.columns[self.attribute])
        keep = np.ones(len(self.pool), bool)
        if concept is not None:
            keep &= inside == concept
        if value is not None:
            keep &= values == value
        return np.flatnonzero(keep)


def concept_of(spec: DeconstructSpec, classifier: Classifier) -> Concept:
    """The spec's concept, with the prompts that the pocket's grammar has where that is what it is of."""
    said = spec.concept
    pocket = isinstance(classifier, PocketClassifier) and said.attribute in classifier.classes
    return said.concept(pocket or spec.data.source == "pocket")


def gather(model: Model, spec: DeconstructSpec, classifier: Classifier) -> Materials:
    """The spec's pictures. UserError where there are too few of any kind."""
    data, concept = spec.data, concept_of(spec, classifier)
    left_out: tuple[str, ...] = ()
    if data.source == "folder":
        assert data.folder is not None
        size = model.native_size
        found, faults = read_image_folder(data.folder, (size, size), data.skip_bad)
        missing = [name for name in (CONCEPT, concept.attribute) if name not in found.columns]
        if missing:
            raise UserError(f"{data.folder}: no column {missing[0]!r} in the metadata: expected {CONCEPT} (yes for "
                            f"pictures of {concept.prompts[0]!r}) and {concept.attribute}")  # fmt: skip
        no = ("", "no", "false", "0")
        found = _columned(found, ["" if c.lower() in no else "yes" for c in found.columns[CONCEPT]],
                          found.columns[concept.attribute], concept.attribute)  # fmt: skip
        pool, held_out = _split(found, data.held_out, data.seed)
        left_out = tuple(faults)
    else:
        make = _pocket if data.source == "pocket" else _drawn
        rest = data.minority or data.each
        counts = [data.each] + [rest] * (len(concept.classes) - 1)
        held = [max(1, data.held_out // 2 // len(concept.classes))] * len(concept.classes)
        pool = make(model, concept, data, classifier, counts, data.others, 0)
        held_out = make(model, concept, data, classifier, held, data.held_out - sum(held), 1)
    made = Materials(pool, held_out, concept.attribute, left_out)
    if not len(made.rows(False)):
        raise UserError("no pictures of other things: they hold the rest of the model in place, give some")
    for value in concept.classes:
        if not len(made.rows(True, value)):
            raise UserError(f"no picture of {concept.prompts[0]!r} with {concept.attribute} = {value}: give some")
    return made


def panel_of(spec: DeconstructSpec, classifier: Classifier) -> Panel:
    """What the meters ask: explicit prompts in the values' words, and others that name something countable."""
    concept, watching = concept_of(spec, classifier), spec.watching
    explicit = tuple(
        Check(concept.explicit(prompt, value), {concept.attribute: value})
        for prompt in concept.prompts for value in concept.classes
    )  # fmt: skip
    others = [Check(p, {n: str(v) for n, v in parse(p).items() if n in CATEGORICAL}) for p in concept.others]
    others = [c for c in others if c.wanted][:OTHERS]
    return Panel(
        concept, explicit, tuple(others), watching.neutral, watching.quick, watching.each, watching.steps,
        watching.guidance, watching.seed,
    )  # fmt: skip


# -------------------- sources


def _pocket(
    model: Model, concept: Concept, data: Data, classifier: Classifier, counts: Sequence[int], others: int, part: int
) -> Pictures:
    own = asked_by_all(concept.prompts)
    if not own:
        raise UserError(f"the pocket world does not know {concept.prompts[0]!r}: expected prompts that all name "
                        "something of it, or another source of pictures")  # fmt: skip
    classes = [value for value, count in zip(concept.classes, counts, strict=True) for _ in range(count)]
    seed = data.seed * 2 + part
    # Held-out pictures are asked for by the concept alone.
    inside = world_pictures(concept, classes, model.native_size, seed, 1.0 if part else data.short)
    rng = np.random.default_rng([data.seed, 62, part])
    attributes: list[Attributes] = []
    while len(attributes) < others:
        a = draw_attributes(rng, PLANTED)
        if not agrees(a, own):
            attributes.append(a)
    outside = pocket_pictures(attributes, model.native_size, seed, captions=4, never=held_out_prompts())
    shown = [class_of(concept.attribute, a[concept.attribute]) for a in attributes]
    sets = ((inside, "yes", classes), (outside, "", shown))
    return join([_columned(p, [said] * len(p), values, concept.attribute) for p, said, values in sets])


def _drawn(
    model: Model, concept: Concept, data: Data, classifier: Classifier, counts: Sequence[int], others: int, part: int
) -> Pictures:
    """The model's own pictures of explicit prompts, of which those are kept that show what was asked for."""
    if not concept.others:
        raise UserError("source model needs prompts of other things: name some under concept.others")
    settings = GenerateSettings(steps=data.steps)
    sets = []
    for k, (value, count) in enumerate(zip(concept.classes, counts, strict=True)):
        kept: list[Pictures] = []
        for attempt in range(6):
            lacking = count - sum(map(len, kept))
            if lacking <= 0:
                break
            start = ((data.seed * 2 + part) * 64 + k * 8 + attempt + 1) * 1_000_000
            rows = concept.neutral(lacking, start)
            asked = [concept.explicit(p, value, i) for i, p in enumerate(rows)]
            made = model_pictures(model, asked, [start + i for i in range(lacking)], settings,
                                  list(zip(rows, asked, strict=True)))  # fmt: skip
            shows = np.flatnonzero(classifier.labels(made.pixels)[concept.attribute] == value)
            kept.append(made.take(shows))
        if sum(map(len, kept)) < count:
            raise UserError(
                f"the model does not draw {concept.prompts[0]!r} with {concept.attribute} = {value} often enough "
                f"({sum(map(len, kept))} of {count} in 6 rounds): give pictures in a folder"
            )
        sets.append(_columned(join(kept), ["yes"] * count, [value] * count, concept.attribute))
    prompts = [concept.others[i % len(concept.others)] for i in range(others)]
    start = ((data.seed * 2 + part) * 64 + 63) * 1_000_000
    made = model_pictures(model, prompts, [start + i for i in range(others)], settings)
    values = [str(v) for v in classifier.labels(made.pixels)[concept.attribute]]
    return join([*sets, _columned(made, [""] * others, values, concept.attribute)])


def _columned(pictures: Pictures, concept: list[str], values: list[str], attribute: str) -> Pictures:
    return Pictures(pictures.pixels, pictures.captions, pictures.weights,
                    {**pictures.columns, CONCEPT: concept, attribute: values})  # fmt: skip


def _split(found: Pictures, held_out: int, seed: int) -> tuple[Pictures, Pictures]:
    """A folder's pictures in two: up to `held_out`, at most a quarter, are kept away from training."""
    order = np.random.default_rng([seed, 62]).permutation(len(found))
    n = min(held_out, len(found) // 4)
    if n < 2:
        raise UserError(f"{len(found)} pictures: expected at least 8, a quarter of which is held out")
    return found.take(np.sort(order[n:])), found.take(np.sort(order[:n]))
