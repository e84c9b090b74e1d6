"""A folder of before and after pictures: which belong together, what is wrong with them, and how they are cropped.

Three layouts, told apart by what is there:

- two subfolders with the same file names: `before/` and `after/` (or low/high, negative/positive, minus/plus, off/on);
- subfolders named by scale: `-1/` and `1/`, or `-2/`, `-1/`, `1/`, `2/`, with the same file names;
- one folder of files that end in their scale: `anna_-1.png` and `anna_+1.png`.

Every picture at a scale has its counterpart at minus that scale. Pictures keep their shape: each is scaled to about the
area that the model was trained on and cropped about its middle to multiples of what the model can make.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.images.opening import LEAST_SIDE, PICTURES, cropped, fitted, open_picture

BESIDE = (".txt", ".md", ".json", ".yaml", ".yml", ".caption", ".db", ".ini")  # notes and captions, left alone
BEFORE = ("before", "low", "negative", "neg", "minus", "off")
AFTER = ("after", "high", "positive", "pos", "plus", "on")
SHOWN = 8  # faults in one message

_SCALE = re.compile(r"[+-]?\d+(?:\.\d+)?")
_NAMED = re.compile(r"(?P<name>.*?)[_ ](?P<scale>[+-]?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Pair:
    """The same subject twice: `before` at scale -magnitude and `after` at +magnitude; uint8 [h, w, 3], equal sizes."""

    name: str
    magnitude: float
    before: np.ndarray
    after: np.ndarray


def read_pairs(folder: str | Path, area: int, multiple: int) -> list[Pair]:
    """All pairs of a folder, scaled to about `area` pixels and cropped to multiples of `multiple`.

    Raises UserError with a list of everything that is wrong: pictures without a counterpart, unreadable ones, sizes
    that differ within a pair, pairs of the same picture twice, layouts mixed, or no pairs at all.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: expected one with pictures before and after")
    places, faults = _places(root)
    names = list(dict.fromkeys(name for name, _ in places))
    pairs = []
    for name in names:
        scales = sorted({abs(scale) for n, scale in places if n == name})
        for magnitude in scales:
            sides = {sign: places.get((name, sign * magnitude)) for sign in (-1, 1)}
            found = [path for path in sides.values() if path is not None]
            if len(found) < 2:
                lacking = next(sign for sign, path in sides.items() if path is None) * magnitude
                faults.append(f"{_shown(found[0], root)} has no counterpart at {lacking:+g}")
                continue
            pictures = [_read(path, root, faults) for path in found]
            if None in pictures:
                continue
            before, after = (picture for picture in pictures if picture is not None)
            if before.size != after.size:
                faults.append(
                    f"{_shown(found[0], root)} is {before.width}x{before.height}, its counterpart "
                    f"{after.width}x{after.height}"
                )
                continue
            size = fitted(before.width, before.height, area, multiple)
            pair = Pair(name, magnitude, *(cropped(picture, size) for picture in (before, after)))
            if np.array_equal(pair.before, pair.after):
                faults.append(f"{_shown(found[0], root)} and its counterpart are the same picture")
            pairs.append(pair)
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{root}: {'; '.join(faults[:SHOWN])}{more}")
    if not pairs:
        raise UserError(
            f"{root} holds no pairs: expected before/ and after/ with the same file names, folders named by scale "
            "(-1/ and 1/), or files like anna_-1.png and anna_+1.png"
        )
    return pairs


# -------------------- which pictures


def _places(root: Path) -> tuple[dict[tuple[str, float], Path], list[str]]:
    """Picture by (name, scale), and what is wrong with the folder."""
    inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir()]
    faults: list[str] = []
    loose = _pictures(inside, root, faults)
    if folders and loose:
        return {}, [f"both subfolders ({folders[0].name}/) and pictures ({loose[0].name}): expected one layout"]
    places: dict[tuple[str, float], Path] = {}
    if not folders:
        for path in loose:
            parts = _NAMED.fullmatch(path.stem)
            scale = float(parts["scale"]) if parts else 0.0
            if parts is None or scale == 0:
                faults.append(f"{path.name} doesn't end in its scale: expected a name like anna_-1.png or anna_+1.png")
            else:
                _put(places, (parts["name"], scale), path, root, faults)
        return places, faults
    for sub in folders:
        folder_scale = _folder_scale(sub.name)
        if folder_scale is None:
            faults.append(f"{sub.name}/ is named neither by a scale (-1, 2) nor {BEFORE[0]}/ or {AFTER[0]}/")
            continue
        for path in _pictures(sorted(p for p in sub.iterdir() if not p.name.startswith(".")), root, faults):
            _put(places, (path.stem, folder_scale), path, root, faults)
    return places, faults


def _pictures(paths: list[Path], root: Path, faults: list[str]) -> list[Path]:
    out = []
    for path in paths:
        if path.suffix.lower() in PICTURES and path.is_file():
            out.append(path)
        elif path.is_file() and path.suffix.lower() not in BESIDE:
            faults.append(f"{_shown(path, root)} is no picture ({', '.join(s[1:] for s in PICTURES[:4])})")
        elif path.is_dir() and path.parent != root:
            faults.append(f"{_shown(path, root)}/ lies too deep: expected pictures")
    return out


def _folder_scale(name: str) -> float | None:
    lower = name.lower()
    if lower in BEFORE or lower in AFTER:
        return -1.0 if lower in BEFORE else 1.0
    scale = float(name) if _SCALE.fullmatch(name) else 0.0
    return scale or None


def _put(
    places: dict[tuple[str, float], Path], key: tuple[str, float], path: Path, root: Path, faults: list[str]
) -> None:
    if key in places:
        faults.append(f"{_shown(path, root)} and {_shown(places[key], root)} stand for the same picture at {key[1]:+g}")
    else:
        places[key] = path


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


# -------------------- their pixels


def _read(path: Path, root: Path, faults: list[str]) -> Image.Image | None:
    """The picture as RGB; None (and a fault) if it can't be read or is too small."""
    image = open_picture(path)
    if image is None:
        faults.append(f"{_shown(path, root)} cannot be read: damaged, too large, or no picture")
    elif min(image.size) < LEAST_SIDE:
        faults.append(f"{_shown(path, root)} is {image.width}x{image.height}: expected at least {LEAST_SIDE} pixels")
        return None
    return image
