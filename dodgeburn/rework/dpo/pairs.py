"""Preference pairs: two pictures of one caption, of which one was preferred. Read, checked, counted, written.

Two forms are read. Pick-a-Pic's parquet files (arXiv 2305.01569): `caption`, `jpg_0`, `jpg_1` (encoded pictures) and
`label_0`: 1 where jpg_0 won, 0 where jpg_1 did, 0.5 for a tie, which says nothing and is dropped. And a folder of our
own: pictures with a `pairs.jsonl` of lines {"caption", "win", "lose", "weight"}, where weight may be left out and keys
of other names are kept.

What cannot be learned from is dropped and counted by reason; a pair is never repaired in silence. Pictures stay as they
are stored until they are asked for, so that many pairs fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.images.opening import LEAST_SIDE, cropped, open_picture

LIST = "pairs.jsonl"
ABOUT = "about.json"
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
OWN = ("caption", "win", "lose", "weight")

# Reasons for dropping a pair, as they are printed.
TIE = "ties"
MISSING = "with a picture missing"
UNREADABLE = "with a picture that cannot be read"
SAME = "with the same picture twice"
SIZES = "with pictures of different sizes"
SMALL = f"with a picture under {LEAST_SIDE} pixels"
LABEL = "without a label (expected 1, 0 or 0.5)"
WEIGHT = "with a weight that is no positive number"
LINE = "not understood (expected caption, win and lose)"

Stored = Path | bytes | np.ndarray
"""A picture: its file, its encoded bytes, or its pixels uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Preference:
    """One choice between two pictures of equal size."""

    caption: str
    winner: Stored
    loser: Stored
    weight: float = 1.0  # how much it counts, > 0
    name: str = ""  # in messages: the line or row that it came from
    notes: Mapping[str, Any] = field(default_factory=dict)  # JSON values that travel with it (seeds, scores)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """(winner, loser), uint8 [height, width, 3] each."""
        return _pixels(self.winner), _pixels(self.loser)


@dataclass
class PreferencePairs:
    """Pairs that can be learned from, and how many were dropped and why."""

    pairs: list[Preference]
    dropped: dict[str, int] = field(default_factory=dict)  # reason to count
    first: dict[str, str] = field(default_factory=dict)  # reason to the first pair that was dropped for it
    source: str = "pairs"
    about: dict[str, Any] = field(default_factory=dict)  # how they were made, where that is known
    sha256: str = ""  # of captions, pixels and weights; `checked` fills it

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Preference]:
        return iter(self.pairs)

    @property
    def captions(self) -> list[str]:
        return [pair.caption for pair in self.pairs]

    @property
    def weights(self) -> np.ndarray:
        """float32 [pairs]"""
        return np.array([pair.weight for pair in self.pairs], np.float32)

    def report(self) -> str:
        """One line: how many pairs there are, how many were dropped, why, and the first of each kind."""
        kept = f"{self.source}: {len(self)} pairs"
        if not self.dropped:
            return kept
        reasons = [f"{count} {reason} (first: {self.first[reason]})" for reason, count in self.dropped.items()]
        return f"{kept}, {sum(self.dropped.values())} dropped: {', '.join(reasons)}"


def read_pairs(path: str | Path, crop: bool = False, limit: int | None = None) -> PreferencePairs:
    """Pairs of a parquet file, of a folder of parquet files, or of a folder with `pairs.jsonl`.

    crop: pictures of different sizes are both scaled and cropped to the smaller of the two instead of being dropped.
    limit: stop at so many good pairs. Raises UserError for a path that holds neither form, and when no pair is left.
    """
    root = Path(path).expanduser()
    about: dict[str, Any] = {}
    if root.is_dir() and (root / LIST).is_file():
        read = _folder(root)
        about = _about(root)
    elif root.is_dir() and any(root.glob("*.parquet")):
        read = (pair for file in sorted(root.glob("*.parquet")) for pair in _parquet(file))
    elif root.is_file() and root.suffix == ".parquet":
        read = _parquet(root)
    else:
        raise UserError(
            f"{root} holds no pairs: expected a folder with {LIST} (lines of caption, win, lose), or parquet with "
            f"the columns {', '.join(COLUMNS)}"
        )
    found = checked(read, crop, limit, str(path))
    found.about = about
    return found


def read_sets(paths: Sequence[str | Path], crop: bool = False, limit: int | None = None) -> PreferencePairs:
    """The pairs of several places, one after the other, as one set: `read_pairs` of each, `limit` for each.

    `about` is then {"sets": [what each says]} and the hash that of their hashes; a single path is `read_pairs`. Raises
    UserError as that does, for no path, and for one that is named twice.
    """
    places = [Path(path).expanduser().resolve() for path in paths]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{paths[i]} is named twice: its pairs would count double")
    sets = [read_pairs(path, crop, limit) for path in paths]
    if len(sets) == 1:
        return sets[0]
    if not sets:
        raise UserError("no pairs: expected at least one folder or parquet file")
    out = PreferencePairs([pair for one in sets for pair in one], source=" and ".join(one.source for one in sets))
    for one in sets:
        for reason, count in one.dropped.items():
            out.dropped[reason] = out.dropped.get(reason, 0) + count
            out.first.setdefault(reason, f"{one.first[reason]} of {one.source}")
    out.about = {"sets": [one.about for one in sets]}
    out.sha256 = hashlib.sha256("".join(one.sha256 for one in sets).encode()).hexdigest()
    return out


def checked(
    pairs: Iterable[Preference | tuple[str, str]],
    crop: bool = False,
    limit: int | None = None,
    source: str = "pairs",
) -> PreferencePairs:
    """The pairs that can be learned from; those that cannot are counted (see `PreferencePairs.dropped`).

    A pair that its reader has given up stands as (reason, name). Every picture is opened once. Raises UserError when no
    pair is left.
    """
    good: list[Preference] = []
    dropped: dict[str, int] = {}
    first: dict[str, str] = {}
    digest = hashlib.sha256()
    for pair in pairs:
        if limit is not None and len(good) >= limit:
            break
        found = _check(pair, crop) if isinstance(pair, Preference) else pair
        if isinstance(found, Preference):
            good.append(found)
            row = json.dumps([found.caption, float(found.weight), [_digest(p) for p in found.pixels()]])
            digest.update(row.encode())
            continue
        reason, name = found
        dropped[reason] = dropped.get(reason, 0) + 1
        first.setdefault(reason, name)
    out = PreferencePairs(good, dropped, first, source, sha256=digest.hexdigest())
    if not good:
        raise UserError(f"{out.report()}; nothing is left to learn from")
    return out


def _check(pair: Preference, crop: bool) -> Preference | tuple[str, str]:
    if not (math.isfinite(pair.weight) and pair.weight > 0):
        return WEIGHT, pair.name
    if any(isinstance(side, Path) and not side.is_file() for side in (pair.winner, pair.loser)):
        return MISSING, pair.name
    images = []
    for side in (pair.winner, pair.loser):
        image = Image.fromarray(side) if isinstance(side, np.ndarray) else open_picture(side)
        if image is None:
            return UNREADABLE, pair.name
        if min(image.size) < LEAST_SIDE:
            return SMALL, pair.name
        images.append(image)
    if images[0].size != images[1].size:
        if not crop:
            return SIZES, f"{pair.name}, {' and '.join(f'{i.width}x{i.height}' for i in images)}"
        size = min(i.width for i in images), min(i.height for i in images)
        winner, loser = (cropped(image, size) for image in images)
        return Preference(pair.caption, winner, loser, pair.weight, pair.name, pair.notes)
    if np.array_equal(np.asarray(images[0]), np.asarray(images[1])):
        return SAME, pair.name
    return pair


def _pixels(stored: Stored) -> np.ndarray:
    if isinstance(stored, np.ndarray):
        return stored
    image = open_picture(stored)
    if image is None:  # it could be opened when it was checked
        raise UserError(f"{stored if isinstance(stored, Path) else 'a picture'} changed while it was being read")
    return np.asarray(image)


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


# -------------------- folders of our own


def _folder(root: Path) -> Iterator[Preference | tuple[str, str]]:
    for number, line in enumerate((root / LIST).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            row = json.loads(line)
            caption, win, lose = row["caption"], row["win"], row["lose"]
            weight = row.get("weight", 1.0)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            yield LINE, name
            continue
        if not isinstance(caption, str) or not all(isinstance(p, str) or p is None for p in (win, lose)):
            yield LINE, name
        elif not win or not lose:
            yield MISSING, name
        elif isinstance(weight, bool) or not isinstance(weight, int | float):
            yield WEIGHT, name
        else:
            notes = {key: value for key, value in row.items() if key not in OWN}
            yield Preference(caption, root / win, root / lose, float(weight), name, notes)


def _about(root: Path) -> dict[str, Any]:
    try:
        said = json.loads((root / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def write_pairs(folder: str | Path, pairs: Iterable[Preference], about: Mapping[str, Any] | None = None) -> Path:
    """Write the folder that `read_pairs` reads: `pairs.jsonl`, `pictures/`, and `about.json` if `about` says how they
    were made. A picture that stands in several pairs is stored once, as PNG. The folder appears whole or not at all.

    Raises UserError if the folder exists already and isn't empty, or cannot be written.
    """
    from dodgeburn.models.saving import new_folder

    with new_folder(folder) as part:
        (part / "pictures").mkdir()
        lines = []
        for pair in pairs:
            sides = {}
            for side, pixels in zip(("win", "lose"), pair.pixels(), strict=True):
                sides[side] = f"pictures/{_digest(pixels)[:16]}.png"
                if not (part / sides[side]).exists():
                    Image.fromarray(pixels).save(part / sides[side])
            row: dict[str, Any] = {"caption": pair.caption, **sides, **pair.notes}
            if pair.weight != 1.0:
                row["weight"] = pair.weight
            lines.append(json.dumps(row, ensure_ascii=False))
        (part / LIST).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if about:
            (part / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(folder)


# -------------------- Pick-a-Pic's parquet


def _parquet(path: Path) -> Iterator[Preference | tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None
    with file:
        lacking = [column for column in COLUMNS if column not in file.schema_arrow.names]
        if lacking:
            raise UserError(f"{path} has no column {' or '.join(lacking)}: expected {', '.join(COLUMNS)}")
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                yield _row(row, f"{path.name} row {number}")
                number += 1


def _row(row: dict[str, Any], name: str) -> Preference | tuple[str, str]:
    label, pictures = row["label_0"], [_bytes(row[column]) for column in ("jpg_0", "jpg_1")]
    if label == 0.5:
        return TIE, name
    if label not in (0, 1):
        return LABEL, name
    if not isinstance(row["caption"], str):
        return LINE, name
    if pictures[0] is None or pictures[1] is None:
        return MISSING, name
    winner, loser = pictures if label == 1 else reversed(pictures)
    assert winner is not None and loser is not None
    return Preference(row["caption"], winner, loser, name=name)


def _bytes(cell: Any) -> bytes | None:
    """Encoded pictures stand in the cell, or under "bytes" where the `datasets` library wrote it."""
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    return found if isinstance(found, bytes) and found else None
