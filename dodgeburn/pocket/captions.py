"""Captions of the pocket world, and the way back: what a prompt asks for.

Every phrase stands in one table together with what it means, so the sentence that a picture is trained with and
the reading of a prompt cannot drift apart. A continuous attribute is asked for as an interval of [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, Attributes

Interval = tuple[float, float]
Asked = dict[str, "str | Interval"]
"""What a prompt names: a value for a categorical attribute, an interval for a continuous one."""

LEVELS: tuple[Interval, ...] = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))

# Five graded phrases for every continuous attribute, weakest to strongest; synonyms after the first.
GRADED: dict[str, tuple[tuple[str, ...], ...]] = {
    "age": (
        ("a very young face", "a baby face"), ("a young face", "a youthful face"),
        ("a middle-aged face", "an adult face"), ("an old face", "an elderly face"),
        ("a very old face", "an ancient face"),
    ),
    "smile": (
        ("frowning deeply", "with a deep frown"), ("slightly frowning", "with a faint frown"),
        ("with a straight mouth", "with a neutral mouth"), ("slightly smiling", "with a faint smile"),
        ("smiling broadly", "with a broad smile"),
    ),
    "eye_size": (
        ("tiny eyes", "very small eyes"), ("small eyes", "smallish eyes"), ("medium eyes", "average eyes"),
        ("big eyes", "large eyes"), ("huge eyes", "very big eyes"),
    ),
    "brow_angle": (
        ("very worried brows", "steeply raised brows"), ("slightly worried brows", "softly raised brows"),
        ("level brows", "straight brows"), ("slightly angry brows", "softly lowered brows"),
        ("very angry brows", "steeply lowered brows"),
    ),
    "hair_length": (
        ("very short hair", "cropped hair"), ("short hair", "ear-length hair"),
        ("chin-length hair", "medium-length hair"), ("long hair", "shoulder-length hair"),
        ("very long hair", "flowing hair"),
    ),
    "skin_tone": (
        ("very pale skin", "fair skin"), ("light skin", "pale skin"), ("tan skin", "olive skin"),
        ("brown skin", "dark skin"), ("very dark skin", "deep brown skin"),
    ),
    "face_width": (
        ("a very narrow face", "a very thin face"), ("a narrow face", "a thin face"), ("an oval face", "an even face"),
        ("a wide face", "a round face"), ("a very wide face", "a very round face"),
    ),
    "beard": (
        ("clean-shaven", "without a beard"), ("with a short beard", "with stubble"),
        ("with a medium beard", "with a trimmed beard"), ("with a long beard", "with a full beard"),
        ("with a very long beard", "with a huge beard"),
    ),
    "zoom": (
        ("seen from far away", "very distant"), ("seen from a distance", "distant"), ("at medium distance", "mid shot"),
        ("seen close", "near the camera"), ("in extreme close-up", "very close"),
    ),
    "brightness": (
        ("very dark light", "night light"), ("dim light", "dark light"), ("even light", "normal light"),
        ("bright light", "light exposure"), ("very bright light", "blazing light"),
    ),
    "saturation": (
        ("washed-out colours", "almost grey colours"), ("muted colours", "dull colours"),
        ("natural colours", "normal colours"), ("rich colours", "strong colours"),
        ("vivid colours", "garish colours"),
    ),
    "sharpness": (
        ("very blurry", "badly out of focus"), ("slightly blurry", "soft focus"), ("normal focus", "fair focus"),
        ("sharp focus", "crisp"), ("very sharp focus", "razor sharp"),
    ),
}  # fmt: skip

# Wider words a user would type; each covers two levels.
LOOSE: dict[str, tuple[str, Interval]] = {
    "sad": ("smile", (0.0, 0.4)), "smiling": ("smile", (0.6, 1.0)), "happy": ("smile", (0.6, 1.0)),
    "young": ("age", (0.0, 0.4)), "old": ("age", (0.6, 1.0)),
    "worried": ("brow_angle", (0.0, 0.4)), "angry": ("brow_angle", (0.6, 1.0)),
    "bearded": ("beard", (0.6, 1.0)), "blurry": ("sharpness", (0.0, 0.4)), "sharp": ("sharpness", (0.6, 1.0)),
    "colourful": ("saturation", (0.6, 1.0)), "faded": ("saturation", (0.0, 0.4)),
    "dark scene": ("brightness", (0.0, 0.4)), "bright scene": ("brightness", (0.6, 1.0)),
    "close-up": ("zoom", (0.6, 1.0)), "far away": ("zoom", (0.0, 0.4)),
}  # fmt: skip

NAMED: dict[str, dict[str, tuple[str, ...]]] = {
    "hair_colour": {
        "black": ("black hair", "jet-black hair"), "brown": ("brown hair", "chestnut hair"),
        "blonde": ("blonde hair", "golden hair"), "red": ("red hair", "ginger hair"),
        "white": ("white hair", "snow-white hair"), "blue": ("blue hair", "dyed blue hair"),
    },
    "background": {
        value: (f"on a {value} background", f"in front of a {value} wall", f"{value} backdrop")
        for value in CATEGORICAL["background"]
    },
    "glasses": {
        "none": ("without glasses", "no glasses"), "glasses": ("wearing glasses", "with round glasses"),
    },
    "hat": {
        "none": ("bareheaded", "without a hat"), "top hat": ("wearing a top hat", "with a top hat"),
        "cap": ("wearing a cap", "with an orange cap"), "crown": ("wearing a crown", "with a golden crown"),
    },
    "hand": {
        "none": ("no hands visible", "hands down"), "waving": ("waving", "with a raised hand", "waving a hand"),
    },
    "style": {
        "flat": ("flat illustration", "flat style"), "comic": ("comic drawing", "comic style"),
        "shaded": ("shaded painting", "shaded style"), "poster": ("sunburst poster", "poster style"),
    },
    "outfit": {
        "casual": ("in a plain sweater", "in casual clothes"), "doctor": ("doctor", "in a doctor's coat"),
        "firefighter": ("firefighter", "in a firefighter's jacket"), "gardener": ("gardener", "in gardener's overalls"),
    },
}  # fmt: skip

_HAVING = ("age", "eye_size", "brow_angle", "hair_length", "skin_tone", "face_width", "hair_colour")
_LIGHT = ("brightness", "saturation")
_NOUNS = ("person", "portrait", "face", "someone", "character")
_JOBS = ("doctor", "firefighter", "gardener")


def level(value: float) -> int:
    """Index of the graded phrase for a value in [0, 1]."""
    return min(4, int(value * 5))


def phrase(attribute: str, value: str | float, rng: np.random.Generator) -> tuple[str, str | Interval]:
    """A phrase for an attribute's value, and what it asks for. The loose words take one use in six."""
    if attribute in CATEGORICAL:
        options = NAMED[attribute][str(value)]
        return options[int(rng.integers(len(options)))], str(value)
    v = float(value)
    loose = [(w, span) for w, (name, span) in LOOSE.items() if name == attribute and span[0] <= v <= span[1]]
    if loose and rng.random() < 1 / 6:
        return loose[int(rng.integers(len(loose)))]
    at = level(v)
    options = GRADED[attribute][at]
    return options[int(rng.integers(len(options)))], LEVELS[at]


def caption(
    a: Attributes, rng: np.random.Generator, share: float | Mapping[str, float] | None = None,
    always: frozenset[str] = frozenset(), never: frozenset[str] = frozenset(),
) -> tuple[str, Asked]:  # fmt: skip
    """A caption naming a random subset of the attributes, and what it asks for.

    share: chance of each attribute to be named (of those in a mapping; the others stay out); by default drawn for each
    caption from 0.1 to 0.5. always, never: what is named and what is left open whatever the chance.
    """
    chance = rng.uniform(0.1, 0.5) if share is None else share
    of = chance if isinstance(chance, Mapping) else dict.fromkeys((*CONTINUOUS, *CATEGORICAL), chance)
    by_chance = {name: rng.random() < of.get(name, 0.0) for name in (*CONTINUOUS, *CATEGORICAL)}
    named = [name for name, drawn in by_chance.items() if (drawn or name in always) and name not in never]
    asked: Asked = {}
    words: dict[str, str] = {}
    for name in named:
        words[name], asked[name] = phrase(name, a[name], rng)
    noun = _NOUNS[int(rng.integers(len(_NOUNS)))]
    if words.get("outfit") in _JOBS:
        noun = words.pop("outfit")
    start = f"a {noun}" if noun != "someone" else noun
    if "style" in words and rng.random() < 0.6:
        start = f"{words.pop('style')} of {start}"
    clauses = []
    for name in rng.permutation(sorted(words)):
        text = words[str(name)]
        if name in _HAVING and text not in LOOSE and rng.random() < 0.5:
            text = f"with {text}"
        if name in _LIGHT and text not in LOOSE and rng.random() < 0.5:
            text = f"in {text}"
        clauses.append(text)
    return ", ".join([start, *clauses]), asked


@lru_cache(maxsize=1)
def _phrases() -> tuple[re.Pattern[str], dict[str, tuple[str, str | Interval]]]:
    table: dict[str, tuple[str, str | Interval]] = dict(LOOSE)
    for name, levels in GRADED.items():
        for at, options in enumerate(levels):
            table.update({p: (name, LEVELS[at]) for p in options})
    for name, values in NAMED.items():
        for value, options in values.items():
            table.update({p: (name, value) for p in options})
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"), table


def parse(prompt: str) -> Asked:
    """What a prompt asks for, found by its phrases (longest first). Words it does not know ask for nothing.

    Where a prompt names an attribute twice, the first phrase counts.
    """
    pattern, table = _phrases()
    asked: Asked = {}
    for match in pattern.finditer(prompt.lower()):
        name, value = table[match.group(1)]
        asked.setdefault(name, value)
    return asked


def vocabulary_text() -> list[str]:
    """Every phrase of the world, for growing the tokenizer."""
    return [*_phrases()[1], *_NOUNS, "a portrait of someone", "in with and of on a an the"]
