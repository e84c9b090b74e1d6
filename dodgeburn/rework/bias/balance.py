"""Training pictures whose captions leave an attribute open while the pictures show it as often as they should.

From the pocket world, from the user's own folder, or from the model itself: it is asked for each class by name, what it
draws right is kept, and the caption then says nothing of the class ("self-generated balance").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.measure.bias import UNREAD
from dodgeburn.rework.bias.before_after import DrawPictures
from dodgeburn.rework.bias.classify import Classifier
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.weighing import importance
from dodgeburn.training.examples import Pictures

SELF_SEED = 47_000_000


def self_pictures(
    concept: Concept, draw: DrawPictures, classifier: Classifier, n: int, seed: int = SELF_SEED
) -> tuple[Pictures, dict[str, int]]:
    """n pictures that the model makes of explicit prompts, captioned by the neutral ones; and how many of each class
    were what was asked for (the others are left out). UserError if a class never is."""
    classes = concept.drawn_classes(n, seed)
    neutral = concept.neutral(n, seed)
    explicit = [concept.explicit(p, c, i) for i, (p, c) in enumerate(zip(neutral, classes, strict=True))]
    pictures = draw(explicit, [seed + i for i in range(n)])
    shown = classifier.labels(pictures)[concept.attribute]
    right = np.flatnonzero(shown == np.asarray(classes))
    counts = {c: int(sum(classes[i] == c for i in right)) for c in concept.classes}
    missing = [c for c, k in counts.items() if not k and concept.target[concept.classes.index(c)] > 0]
    if missing:
        raise UserError(f"the model never draws {concept.attribute} = {', '.join(missing)} when asked to: give "
                        "pictures of it (--data FOLDER) or another phrase")  # fmt: skip
    made = Pictures(pictures[right], [(neutral[i],) for i in right], columns={
        concept.attribute: [classes[i] for i in right]})  # fmt: skip
    return made, counts


def kept_pictures(concept: Concept, draw: DrawPictures, n: int, seed: int = SELF_SEED + 1_000_000) -> Pictures:
    """n pictures of other prompts by the model as it is, which a fine-tune is to leave as they are."""
    if not concept.others:
        raise UserError("no prompts of other things: nothing would hold the model where it is")
    prompts = [concept.others[i % len(concept.others)] for i in range(n)]
    return Pictures(draw(prompts, [seed + i for i in range(n)]), [(p,) for p in prompts])


def shown_classes(pictures: Pictures, concept: Concept, classifier: Classifier | None = None) -> list[str]:
    """The class of every picture: its column of the attribute's name, or what the classifier reads."""
    column = pictures.columns.get(concept.attribute)
    read = classifier.labels(pictures.pixels)[concept.attribute] if classifier is not None else None
    if column is None and read is None:
        raise UserError(f"the pictures have no column {concept.attribute!r} in metadata.jsonl, and nothing reads it")
    said = list(column) if column is not None else [UNREAD] * len(pictures)
    if read is not None:
        said = [s or str(r) for s, r in zip(said, read, strict=True)]
    return [s if s in concept.classes else UNREAD for s in said]


def balanced(pictures: Pictures, classes: Sequence[str], concept: Concept, n: int, seed: int = 0) -> Pictures:
    """n pictures with the target's shares: every class's in shuffled rounds, each as often as the others of its class.

    UserError for a class of the target that no picture shows.
    """
    _needs(classes, concept)
    rng = np.random.default_rng([seed, 8])
    rows: list[int] = []
    wanted = concept.drawn_classes(n, seed)
    for name in concept.classes:
        own = np.flatnonzero(np.asarray(classes) == name)
        k = wanted.count(name)
        while k > 0:
            rows += [int(i) for i in rng.permutation(own)[:k]]
            k -= len(own)
    return pictures.take([rows[int(i)] for i in rng.permutation(len(rows))])


def reweighted(pictures: Pictures, classes: Sequence[str], concept: Concept) -> Pictures:
    """The same pictures with importance weights (weighing.py); unreadable ones weigh nothing.

    UserError for a class of the target that no picture shows.
    """
    _needs(classes, concept)
    weights = importance(classes, concept.classes, concept.target)
    return Pictures(pictures.pixels, pictures.captions, weights * pictures.weights, pictures.columns)


def _needs(classes: Sequence[str], concept: Concept) -> None:
    for name, q in zip(concept.classes, concept.target, strict=True):
        if q and name not in classes:
            raise UserError(f"no picture shows {concept.attribute} = {name}: give some, or leave the class out")
