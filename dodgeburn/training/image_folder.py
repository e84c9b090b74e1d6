"""A user's folder of pictures and captions, in the layout that Hugging Face datasets call `imagefolder`.

`metadata.jsonl` has one JSON object a line: `file_name` (relative to the folder), `text` (a caption, or a list of
them of which one is drawn each time), and where wanted `weight` (a number above 0; 1 where left out) and any further
columns, which are kept as attributes. `metadata.csv` with the same columns does as well. Without either, every
picture has its caption in a text file of the same name.

Pictures are scaled to cover the wanted size and cropped about the middle.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.images.opening import LEAST_SIDE, PICTURES, cropped, open_picture
from dodgeburn.training.examples import Captions, Pictures

METADATA = ("metadata.jsonl", "metadata.csv")
SHOWN = 8  # faults in one message
_OWN = ("file_name", "text", "weight")


def read_image_folder(folder: str | Path, size: tuple[int, int], skip_bad: bool = False) -> tuple[Pictures, list[str]]:
    """All pictures of a folder, cropped to `size` (width, height), and what was left out.

    Raises UserError that counts and lists what is wrong (pictures that are not there, damaged or too small, lines that
    are no JSON, without file name or caption, or with a weight that is none; the same file twice) unless `skip_bad`:
    then such lines are left out and reported. A folder without one good picture is always an error.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: expected pictures and a metadata.jsonl with file_name and text")
    faults: list[str] = []
    pixels: list[np.ndarray] = []
    captions: list[Captions] = []
    weights: list[float] = []
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for where, said in _lines(root, faults):
        try:
            name, texts, weight = _checked(said, root)
            if name in seen:
                raise ValueError(f"{name} is named a second time")
            seen.add(name)
            picture = _picture(root, name)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        pixels.append(cropped(picture, size))
        captions.append(texts)
        weights.append(weight)
        rows.append({k: "" if v is None else str(v) for k, v in said.items() if k not in _OWN and k is not None})
    if faults and not skip_bad:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        total = len(faults) + len(pixels)
        raise UserError(f"{root}: {len(faults)} bad of {total}: {'; '.join(faults[:SHOWN])}{more}")
    if not pixels:
        raise UserError(
            f"{root} holds no usable pictures: expected a metadata.jsonl with file_name and text, or captions in text "
            "files beside the pictures"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name, "") for row in rows] for name in names}
    return Pictures(np.stack(pixels), captions, np.asarray(weights, np.float32), columns), faults


# -------------------- what the folder says


def _lines(root: Path, faults: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, what is said) of each picture."""
    path = next((root / name for name in METADATA if (root / name).is_file()), None)
    if path is None:
        yield from _beside(root)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}") from None
    if path.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(text.splitlines()), 2):
            yield f"line {number}", {k: v for k, v in row.items() if v not in (None, "")}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            yield f"line {number}", said
        else:
            faults.append(f"line {number} is no JSON object")


def _beside(root: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES and p.is_file()):
        name, beside = path.relative_to(root).as_posix(), path.with_suffix(".txt")
        try:
            text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
        except (OSError, UnicodeDecodeError):
            text = ""
        yield name, {"file_name": name, "text": text}


def _checked(said: Mapping[str, Any], root: Path) -> tuple[str, Captions, float]:
    """(file name, captions, weight); ValueError says what is wrong."""
    name = said.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("no file_name")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not _inside(root, name):
        raise ValueError(f"{name} lies outside the folder")
    text = said.get("text")
    texts = tuple(text) if isinstance(text, list) else (text,)
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError(f"{name} has no text (a caption)")
    weight = said.get("weight", 1.0)
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} has the weight {weight!r}: expected a number above 0")
    return name, texts, number


def _inside(root: Path, name: str) -> bool:
    try:
        return (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, ValueError):
        return False


def _picture(root: Path, name: str) -> Image.Image:
    if not (root / name).is_file():
        raise ValueError(f"{name} is not there")
    image = open_picture(root / name)
    if image is None:
        raise ValueError(f"{name} cannot be read: damaged, too large, or no picture")
    if min(image.size) < LEAST_SIDE:
        raise ValueError(f"{name} is {image.width}x{image.height}: expected at least {LEAST_SIDE} pixels")
    return image
