"""Pictures as files of `dodgeburn generate`: their names, the folder, the contact sheet."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.pictures import Generated, Planned

SHEET = 64  # pictures on a contact sheet: it is for looking at


def writable_folder(folder: Path) -> None:
    """UserError unless a file can be written in the folder, or where it would be made: now rather than after the work.

    Does not make it, so that nothing is left behind where something else turns out to be wrong.
    """
    try:
        there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder {folder}: {error.strerror or error}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, and taken away again after an error that left nothing in it."""
    there = folder.exists()
    writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                folder.rmdir()
        raise


def slug(prompt: str) -> str:
    """A prompt as a file name: lower case words with hyphens, 60 characters at most."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:60].rstrip("-") or "picture"


def held_in(path: Path, record: dict[str, object]) -> dict[str, Any] | None:
    """The record of the picture in a file where it is the one with this record, but for the batch that it was made in:
    that moves the last bit only. Its pixels are not looked at: a name is tried for every picture of a grid before."""
    from dodgeburn.images.png import read_png

    try:
        there = read_png(path, pixels=False).own or {}
    except UserError:
        return None  # something else under this name: leave it alone
    return there if {**there, "batch": None} == {**json.loads(json.dumps(record)), "batch": None} else None


def free_name(folder: Path, stem: str, ending: str, record: dict[str, object]) -> Path:
    """A file name that is free, or holds the same picture already: nothing else is overwritten."""
    number = 1
    while True:
        path = folder / (f"{stem}.{ending}" if number == 1 else f"{stem}-{number}.{ending}")
        if not path.exists() or held_in(path, record) is not None:
            return path
        number += 1


def picture_path(out: Path, prompt: str, ending: str, picture: Planned, model: Model) -> Path:
    """Where a picture is written: the output itself where that names a picture, else a name of the prompt and its seed
    that is free in that folder, or holds the same picture."""
    from dodgeburn.sampling.saving import record_of

    if is_picture_name(out):
        return out
    return free_name(out, f"{slug(prompt)}-{picture.seed}", ending, record_of(picture, model))


def made_before(path: Path, picture: Planned, model: Model) -> Generated | None:
    """The picture out of its file, where it is there already and can be read."""
    from dodgeburn.images.opening import open_picture
    from dodgeburn.sampling.saving import record_of

    record = held_in(path, record_of(picture, model)) if path.exists() else None
    image = None if record is None else open_picture(path)
    if record is None or image is None:
        return None  # not there, or damaged: made again
    match record.get("batch"):
        case [int(row), int(of)]:
            return replace(picture, batch=(row, of)).made(image)
    return None  # where it was made is no part of the comparison, so it can be anything


def is_picture_name(out: Path) -> bool:
    """Whether an output names a picture rather than a folder. UserError for a kind of picture that is not written."""
    from dodgeburn.images.png import KINDS

    ending = out.suffix.lower()
    if ending in (".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".jfif", ".heic") and not out.is_dir():
        raise UserError(f"-o {out}: pictures are written as {', '.join(KINDS)}; or name a folder")
    return ending in KINDS and not out.is_dir()


def check_picture_name(path: Path, given: str | None) -> None:
    """UserError where another's file stands (only pictures that dodgeburn made are written over), or where the format
    given is another than the name's."""
    from dodgeburn.images.png import KINDS, read_png

    if given is not None and KINDS[f".{given}"] != KINDS[path.suffix.lower()]:
        raise UserError(f"-o {path} and --format {given} contradict each other: leave --format out")
    if path.exists():
        try:
            ours = read_png(path).own is not None
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"{path} is there already and was not made by dodgeburn: name another file, or a folder")


def write_sheet(folder: Path, ending: str, prompt: str, made: Sequence[Generated], model: Model) -> Path:
    """A contact sheet of the first pictures, with the settings of the first in its metadata; its path."""
    from dodgeburn.images.png import write_picture
    from dodgeburn.images.sheet import contact_sheet
    from dodgeburn.sampling.saving import infotext_of, record_of

    columns = min(len(made), 8)
    shown = made[:SHEET]
    rows = [[m.image for m in shown[i : i + columns]] for i in range(0, len(shown), columns)]
    seeds = [[f"seed {m.seed}" for m in shown[i : i + columns]] for i in range(0, len(shown), columns)]
    sheet = contact_sheet(rows, title=prompt, captions=seeds)
    record = {**record_of(made[0], model), "seeds": [m.seed for m in shown]}
    if len({m.prompt for m in shown}) > 1:
        record["prompts"] = [m.prompt for m in shown]
    path = free_name(folder, f"{slug(prompt)}-sheet", ending, record)
    write_picture(path, sheet, infotext_of(made[0], model), record)
    return path
