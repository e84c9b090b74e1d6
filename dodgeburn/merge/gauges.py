"""Who reads a comparison's pictures: the pocket's reader, or a proxy where nobody knows the world.

reader      fidelity: share of the named attributes that are shown; resemblance: 1 - reader distance
CLIP        fidelity: cosine of picture and prompt (the CLIP score of arXiv 2104.08718 without factor 2.5 and
            clipping); resemblance: cosine of the two pictures
one's own   fidelity: what a function of the user's says; resemblance: of pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dodgeburn.checkpoint.tensorfile import sha256_file
from dodgeburn.measure.clip import ClipScore
from dodgeburn.measure.distances import pixel_distance, reader_distance
from dodgeburn.measure.fidelity import fidelity
from dodgeburn.measure.own_scorer import own_scorer
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Readings


class PictureReader(Protocol):
    """What reads pictures of the pocket world: uint8 [n, h, w, 3] -> Readings."""

    def read(self, pictures: np.ndarray, /) -> Readings: ...


class Gauge(Protocol):
    """What measures pictures against prompts and against other pictures; more is better in both."""

    @property
    def name(self) -> str:
        """Who reads."""

    @property
    def proxy(self) -> bool:
        """Whether figures are scores of something that was made for something else, and no shares."""

    @property
    def score(self) -> str:
        """What fidelity is called where it is shown."""

    @property
    def means(self) -> tuple[str, str]:
        """What fidelity is, and what resemblance is ("... A's picture"), in words."""

    @property
    def job(self) -> dict[str, str]:
        """What names it among the settings of a search, which goes by what is read; {} for what ships."""

    def see(self, pictures: np.ndarray) -> Any:
        """uint8 [n, h, w, 3] -> what is seen in them, for the other methods."""

    def knows(self, prompts: Sequence[str]) -> list[bool]:
        """Whether a picture can be measured against a prompt."""

    def fidelity(self, prompts: Sequence[str], seen: Any) -> np.ndarray:
        """How well each picture follows its prompt, float64 [n]; NaN for a prompt that can't be measured against."""

    def resemblance(self, seen: Any, others: Any) -> np.ndarray:
        """How like each picture is to the one in its place among others, float64 [n], 1 for the same; NaN where one
        can't be read."""

    def unreadable(self, seen: Any) -> np.ndarray | None:
        """Which pictures can't be read, bool [n]; None where every picture can."""


class ByReader:
    """The pocket's reader or judge, or another with the same readings."""

    proxy = False
    score = "prompt fidelity"
    means = "share of what the prompts name that the pictures show", "1 - reader distance to"
    job: dict[str, str] = {}

    def __init__(self, reader: PictureReader) -> None:
        self.reader = reader
        self.name = str(getattr(reader, "name", type(reader).__name__))

    def see(self, pictures: np.ndarray) -> Readings:
        """As `Gauge`."""
        return self.reader.read(pictures)

    def knows(self, prompts: Sequence[str]) -> list[bool]:
        """As `Gauge`: whether it names an attribute."""
        return [bool(parse(prompt)) for prompt in prompts]

    def fidelity(self, prompts: Sequence[str], seen: Readings) -> np.ndarray:
        """As `Gauge`."""
        return fidelity([parse(prompt) for prompt in prompts], seen)

    def resemblance(self, seen: Readings, others: Readings) -> np.ndarray:
        """As `Gauge`."""
        return 1 - reader_distance(seen, others)

    def unreadable(self, seen: Readings) -> np.ndarray:
        """As `Gauge`."""
        return np.asarray(seen.unreadable, dtype=bool)


class ByClip:
    """A CLIP model of a local folder."""

    proxy = True
    score = "CLIP score"

    def __init__(self, clip: ClipScore) -> None:
        self.clip, self.name = clip, clip.name
        self.means = f"cosine of picture and prompt, {clip.name}", "cosine with"

    @property
    def job(self) -> dict[str, str]:
        """As `Gauge`."""
        return {"clip": self.clip.sha256}

    def see(self, pictures: np.ndarray) -> np.ndarray:
        """As `Gauge`: embeddings [n, width] of length 1."""
        return self.clip.seen(pictures)

    def knows(self, prompts: Sequence[str]) -> list[bool]:
        """As `Gauge`."""
        return [True] * len(prompts)

    def fidelity(self, prompts: Sequence[str], seen: np.ndarray) -> np.ndarray:
        """As `Gauge`."""
        texts = list(dict.fromkeys(prompts))
        said = self.clip.said(texts)[[texts.index(prompt) for prompt in prompts]]
        return np.sum(seen * said, axis=1)

    def resemblance(self, seen: np.ndarray, others: np.ndarray) -> np.ndarray:
        """As `Gauge`."""
        return np.sum(seen * others, axis=1)

    def unreadable(self, seen: np.ndarray) -> None:
        """As `Gauge`."""
        return None


class ByOwn:
    """A function of the user's, FILE.py:FUNCTION, of pictures and prompts."""

    proxy = True

    def __init__(self, said: str) -> None:
        """Raises UserError as `own_scorer`."""
        self._scores, self.score, file = own_scorer(said)
        self.name = f"{file}:{self.score}"
        self.means = f"what {self.name} says of picture and prompt", "1 - RMS pixel difference to"
        self.job = {"scorer": sha256_file(Path(said.rpartition(":")[0]).expanduser())}

    def see(self, pictures: np.ndarray) -> np.ndarray:
        """As `Gauge`."""
        return pictures

    def knows(self, prompts: Sequence[str]) -> list[bool]:
        """As `Gauge`."""
        return [True] * len(prompts)

    def fidelity(self, prompts: Sequence[str], seen: np.ndarray) -> np.ndarray:
        """As `Gauge`."""
        return self._scores(seen, prompts)

    def resemblance(self, seen: np.ndarray, others: np.ndarray) -> np.ndarray:
        """As `Gauge`."""
        return 1 - pixel_distance(seen, others)

    def unreadable(self, seen: np.ndarray) -> None:
        """As `Gauge`."""
        return None


def gauge_of(reader: PictureReader | Gauge | None) -> Gauge | None:
    """What measures by it."""
    if reader is None or hasattr(reader, "see"):
        return reader  # type: ignore[return-value]
    return ByReader(reader)
