"""A concept of the pocket world: the ways that the captions' grammar has to say it, and drawings of it.

Every neutral prompt names what the concept's own prompts name, leaves the attribute open, and names any of the others.
Three lists have no prompt in common: those that remedies are trained on, those that readings use on the way, and the
gate's, which are kept for the last word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.pocket.attributes import (
    CATEGORICAL,
    CONTINUOUS,
    FINGER_COUNTS,
    FINGER_SHARES,
    PLANTED,
    Attributes,
    draw_attributes,
)
from dodgeburn.pocket.captions import GRADED, NAMED, Asked, caption, level, parse
from dodgeburn.pocket.captions import LEVELS as SPANS
from dodgeburn.pocket.pictures import draw_pictures
from dodgeburn.rework.bias.classify import LEVELS
from dodgeburn.rework.bias.concept import Concept, make_concept
from dodgeburn.training.examples import Captions, Pictures

PHRASINGS, WATCHED, OTHERS = 256, 192, 96  # prompts of each list
_LISTS = {"phrasings": 95, "watched": 96}  # numbers of the lists that they are drawn from


def pocket_concept(
    prompts: Sequence[str], attribute: str, classes: Sequence[str] = (), target: Sequence[float] | None = None,
    phrases: Mapping[str, Sequence[str]] | None = None,
) -> Concept:  # fmt: skip
    """A concept of the pocket world; the other prompts are those of the development list that are not about it.

    A graded attribute's classes are its five levels, "0.0-0.2" to "0.8-1.0". classes: all of the attribute's if none
    are given. phrases: the world's own if none are given. Raises UserError for what is no attribute, for a class that
    is none of its, and for prompts that name it.
    """
    said = dict(zip(LEVELS, GRADED[attribute], strict=True)) if attribute in CONTINUOUS else NAMED.get(attribute)
    if said is None:
        known = (*CATEGORICAL, *CONTINUOUS)
        raise UserError(
            f"{attribute!r} is no attribute in the pocket world: {did_you_mean(attribute, known)}expected one of "
            f"{', '.join(known)}"
        )
    for name in classes:
        if name not in said:
            raise UserError(f"{attribute} has no value {name!r}: expected some of {', '.join(said)}")
    for prompt in prompts:
        if attribute in parse(prompt):
            raise UserError(f"the prompt {prompt!r} itself names {attribute}: give one that leaves it open")
    chosen = tuple(classes) or tuple(said)
    never = held_out_prompts()
    phrasings = _ways_to_say(prompts, attribute, PHRASINGS, _LISTS["phrasings"], never)
    watched = _ways_to_say(prompts, attribute, WATCHED, _LISTS["watched"], never | set(phrasings))
    return make_concept(prompts, attribute, chosen, phrases or said, target, phrasings, watched,
                        _other_things(prompts, attribute))  # fmt: skip


@lru_cache(maxsize=1)
def held_out_prompts() -> frozenset[str]:
    """The gate's: nothing is trained on them or chosen by them."""
    from dodgeburn.training.pocket import gate_prompts

    return frozenset(str(row["prompt"]) for row in gate_prompts())


def asked_by_all(prompts: Sequence[str]) -> Asked:
    """What all of these prompts name alike."""
    first, *rest = [parse(p) for p in prompts] or [{}]
    return {name: wish for name, wish in first.items() if all(asked.get(name) == wish for asked in rest)}


def agrees(a: Attributes, asked: Asked) -> bool:
    """Whether a picture with these attributes shows all that is asked for."""
    return all(a[name] == wish if isinstance(wish, str) else wish[0] <= a[name] <= wish[1]
               for name, wish in asked.items())  # fmt: skip


def _ways_to_say(
    prompts: Sequence[str], attribute: str, n: int, number: int, never: frozenset[str]
) -> tuple[str, ...]:  # fmt: skip
    """n different neutral prompts (fewer where the grammar has no more), none of `never` or of `prompts`."""
    found: dict[str, None] = {}
    for i in range(20 * n):
        rng = np.random.default_rng([number, i])
        asked = parse(prompts[i % len(prompts)])
        text = caption(_drawn(asked, attribute, rng), rng, None, frozenset(asked), frozenset({attribute}))[0]
        if text not in never and text not in prompts:
            found[text] = None
        if len(found) == n:
            break
    return tuple(found)


def _other_things(prompts: Sequence[str], attribute: str) -> tuple[str, ...]:
    """Development prompts that are not about the concept: one that is would hold the tie in place. Where the concept is
    of all pictures, as "a person" is, those that say the attribute."""
    from dodgeburn.training.pocket import development_prompts

    own = asked_by_all(prompts)

    def other(asked: Asked) -> bool:
        return any(asked.get(name) != wish for name, wish in own.items()) if own else attribute in asked

    rows = [str(row["prompt"]) for row in development_prompts(6 * OTHERS)]
    return tuple(p for p in rows if other(parse(p)))[:OTHERS]


# -------------------- drawings


def _drawn(asked: Asked, attribute: str, rng: np.random.Generator) -> Attributes:
    """A picture's attributes as a prompt asks for them; all else is drawn from the world, with its other ties."""
    outfit = asked.get("outfit")
    kept = tuple(t for t in PLANTED if not (t.outfit == outfit and t.attribute == attribute))
    while True:
        drawn = draw_attributes(rng, kept)
        if outfit is None or drawn["outfit"] == outfit:
            break
    for name, wish in asked.items():
        drawn[name] = wish if isinstance(wish, str) else float(rng.uniform(*wish))
    return drawn


def world_attributes(concept: Concept, classes: Sequence[str], seed: int) -> list[Attributes]:
    """Pictures of the world as the concept's prompts, in turn, ask for them, with these classes."""
    out = []
    for i, value in enumerate(classes):
        rng = np.random.default_rng([seed, i, 7])
        drawn = _drawn(parse(concept.prompts[i % len(concept.prompts)]), concept.attribute, rng)
        drawn[concept.attribute] = _shown(concept.attribute, value, rng)
        waving = drawn["hand"] == "waving"
        if waving != bool(drawn["fingers"]):
            drawn["fingers"] = int(rng.choice(FINGER_COUNTS, p=FINGER_SHARES)) if waving else 0
        out.append(drawn)
    return out


def _shown(attribute: str, value: str, rng: np.random.Generator) -> str | float:
    """What a picture of this class shows: the class, or any degree within a level."""
    return float(rng.uniform(*SPANS[LEVELS.index(value)])) if attribute in CONTINUOUS else value


def class_of(attribute: str, shown: str | float) -> str:
    """The class of what a picture shows of an attribute: the value, or the level of a degree."""
    return shown if isinstance(shown, str) else LEVELS[level(shown)]


def world_captions(concept: Concept, index: int, a: Attributes, seed: int, n: int = 6) -> Captions:
    """Neutral captions of such a picture: the concept's prompt, and up to n that name whatever else is seen but never
    the class. None is a watched or held-out one."""
    prompt = concept.prompts[index % len(concept.prompts)]
    asked = frozenset(parse(prompt))
    rng = np.random.default_rng([seed, index])
    never = held_out_prompts() | set(concept.watched)
    made = [caption(a, rng, None, asked, frozenset({concept.attribute}))[0] for _ in range(n)]
    return tuple(dict.fromkeys([prompt, *(text for text in made if text not in never)]))


def world_pictures(concept: Concept, classes: Sequence[str], size: int, seed: int, short: float = 0.0) -> Pictures:
    """Drawings of the concept with these classes, captioned without them; a share `short` by its prompts alone."""
    attributes = world_attributes(concept, classes, seed)
    rng = np.random.default_rng([seed, 61])
    captions = [concept.prompts if rng.random() < short else world_captions(concept, i, a, seed)
                for i, a in enumerate(attributes)]  # fmt: skip
    columns = {name: [str(a[name]) for a in attributes] for name in CATEGORICAL} | {concept.attribute: list(classes)}
    return Pictures(draw_pictures(attributes, size), captions, columns=columns)
