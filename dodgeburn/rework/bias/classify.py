"""Who says what a picture shows, as one of a few classes per attribute: the pocket's readers, or CLIP as a proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.measure.bias import UNREAD
from dodgeburn.measure.clip import ClipScore
from dodgeburn.measure.fidelity import BINS
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Readings
from dodgeburn.slide.readings import ReadsPictures

LEVELS = tuple(f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS))
Labels = dict[str, np.ndarray]
"""By attribute the class of every picture [n], `UNREAD` where it cannot be read."""


class Classifier(Protocol):
    """What an audit asks."""

    name: str  # "reader", "judge", or "proxy: ..."
    classes: Mapping[str, tuple[str, ...]]  # by attribute

    @property
    def job(self) -> Mapping[str, Any]:
        """What its labels depend on, among the settings of a job that keeps them; {} for what ships."""
        ...

    def labels(self, pictures: np.ndarray, /) -> Labels:
        """Classes of uint8 pictures [n, h, w, 3]."""
        ...

    def named(self, prompt: str, /) -> frozenset[str]:
        """Attributes that the prompt itself decides: nothing about them is a bias."""
        ...


class PocketClassifier:
    """A reader of the pocket world; continuous attributes are cut into `BINS` equal classes."""

    job: Mapping[str, Any] = {}

    def __init__(self, reader: ReadsPictures, name: str = "reader") -> None:
        self.reader, self.name = reader, name
        self.classes: Mapping[str, tuple[str, ...]] = {**dict.fromkeys(CONTINUOUS, LEVELS), **CATEGORICAL}

    def labels(self, pictures: np.ndarray) -> Labels:
        """As `Classifier.labels`."""
        return labels_of(self.reader.read(pictures))

    def named(self, prompt: str) -> frozenset[str]:
        """As `Classifier.named`, by the world's phrases."""
        return frozenset(parse(prompt))


def labels_of(readings: Readings) -> Labels:
    """A pocket reader's readings as classes."""
    out: Labels = {}
    for name in CONTINUOUS:
        level = np.clip((np.asarray(readings.values[name], np.float64) * BINS).astype(int), 0, BINS - 1)
        out[name] = np.asarray(LEVELS)[level]
    for name in CATEGORICAL:
        out[name] = np.asarray(readings.values[name]).astype(str)
    return {name: np.where(readings.unreadable, UNREAD, values) for name, values in out.items()}


class ClipClassifier:
    """Zero-shot by CLIP: of an attribute's texts the one nearest to the picture. A proxy, and named as one.

    attributes: by attribute {class: text}. A picture whose best text leads by less than `margin` (100 x cosine) over
    the second is unreadable. CLIP has biases of its own, which no figure made with it can be told apart from.
    """

    def __init__(self, clip: ClipScore, attributes: Mapping[str, Mapping[str, str]], margin: float = 0.0) -> None:
        for name, texts in attributes.items():
            if len(texts) < 2:
                raise UserError(f"attribute {name} has {len(texts)} classes: give at least two, each with a text")
        self.clip, self.margin = clip, margin
        self.texts = {name: dict(texts) for name, texts in attributes.items()}
        self.name = f"proxy: {clip.name}"
        self.classes: Mapping[str, tuple[str, ...]] = {name: tuple(texts) for name, texts in attributes.items()}

    @property
    def job(self) -> Mapping[str, Any]:
        """As `Classifier.job`: CLIP's weights and the texts."""
        return {"clip_sha256": self.clip.sha256, "texts": self.texts}

    def labels(self, pictures: np.ndarray) -> Labels:
        """As `Classifier.labels`."""
        flat = [text for texts in self.texts.values() for text in texts.values()]
        scores = self.clip.similarities(pictures, flat)
        out: Labels = {}
        at = 0
        for name, texts in self.texts.items():
            of_name = scores[:, at : at + len(texts)]
            at += len(texts)
            ordered = np.sort(of_name, axis=1)
            best = np.asarray(tuple(texts))[of_name.argmax(1)]
            out[name] = np.where(ordered[:, -1] - ordered[:, -2] >= self.margin, best, UNREAD)
        return out

    def named(self, prompt: str) -> frozenset[str]:
        """Attributes of which a class is a word of the prompt."""
        words = prompt.lower().replace(",", " ").split()
        return frozenset(n for n, classes in self.classes.items() if any(c.lower() in words for c in classes))


def read_attributes(path: str | Path) -> dict[str, dict[str, str]]:
    """Attributes for `ClipClassifier` from a YAML file:

        gender: {woman: a photo of a woman, man: a photo of a man}

    Raises UserError for a file that isn't like this.
    """
    import yaml

    try:
        found: Any = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:160]}") from None
    good = isinstance(found, dict) and all(
        isinstance(texts, dict) and len(texts) > 1 and all(isinstance(t, str) and t.strip() for t in texts.values())
        for texts in found.values()
    )
    if not good or not found:
        raise UserError(f"{path}: expected attributes with at least two classes and their texts, such as "
                        "'gender: {woman: a photo of a woman, man: a photo of a man}'")  # fmt: skip
    return {str(name): {str(k): v.strip() for k, v in texts.items()} for name, texts in found.items()}


def open_attributes(classifier: Classifier, prompt: str, among: Sequence[str] | None = None) -> list[str]:
    """Attributes that the prompt leaves open, of those asked for. UserError for an unknown one."""
    for name in among or ():
        if name not in classifier.classes:
            raise UserError(
                f"no attribute {name!r}: "
                f"{did_you_mean(name, classifier.classes)}{classifier.name} knows {', '.join(classifier.classes)}"
            )
    named = classifier.named(prompt)
    return [name for name in (among or classifier.classes) if name not in named]
