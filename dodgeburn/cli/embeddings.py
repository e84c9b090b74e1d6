"""Textual inversions on the command line: files found for options, prompts and pictures' records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.reproduce import EmbeddingUse


@dataclass
class Embeddings:
    """Textual inversions in the prompts, positive or negative."""

    embedding: Annotated[list[Path], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = field(
        default_factory=list
    )
    """A textual inversion, which prompts name by its file's name (with --prompt-syntax comfy as embedding:NAME)."""
    embedding_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder whose textual inversions are taken where prompts name them."""


def find_embeddings(
    files: Sequence[Path], folder: Path | None, texts: Sequence[str], syntax: str,
    used: Sequence[EmbeddingUse] = (), exact: bool = False,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Those of `--embedding FILE` and of the files in `--embedding-dir` (and below) that `texts` name, and lines about
    those that a picture was made with (`used`) and that are not there; `exact`: that is an error. UserError for a file
    or folder that is not there, and for two files of one name."""
    from dodgeburn.checkpoint.embedding_file import ENDINGS
    from dodgeburn.sampling.embeddings import used_in

    for path in files:
        if not path.is_file():
            raise UserError(f"--embedding {path}: no such file")
    there = {path.stem.lower(): path for path in files}
    if len(there) < len(files):
        raise UserError("two --embedding files have one name: a prompt can't tell them apart")
    if folder is not None:
        if not folder.expanduser().is_dir():
            raise UserError(f"--embedding-dir {folder}: no such folder")
        for path in sorted(folder.expanduser().rglob("*")):
            if path.suffix.lower() in ENDINGS and path.is_file():
                there.setdefault(path.stem.lower(), path)
    names = list(there)
    found = [there[names[i]] for i in used_in(texts, syntax, names)]
    missed = [use for use in used if use.name.lower() not in there and used_in(texts, syntax, [use.name])]
    if missed and exact:
        raise UserError(
            f"the picture was made with the embedding {missed[0].file or missed[0].name} (sha256 "
            f"{missed[0].sha256[:10] or 'not known'}): say where it is with --embedding-dir or --embedding FILE"
        )
    return found, [f"embedding {use.name}: no such file, its name is read as words" for use in missed]


def check_named(files: Sequence[Path], found: Collection[Path], syntax: str) -> None:
    """UserError for one of `--embedding`'s files that is not among those `found` in prompts."""
    for path in files:
        if path not in found:
            how = f"embedding:{path.stem}" if syntax == "comfy" else path.stem
            raise UserError(f"--embedding {path} has no effect: no prompt names it, say {how!r} where it is to stand"
                            + (" (and --prompt-syntax a1111)" if syntax == "plain" else ""))  # fmt: skip


def put_on(model: Model, paths: Sequence[Path], used: Sequence[EmbeddingUse] = (), tell: bool = True) -> None:
    """Read the files for a model, which prompts can then name; a warning for one of another content than a picture was
    made with. UserError as `read_embedding`."""
    import warnings

    from dodgeburn.checkpoint.embedding_file import read_embedding
    from dodgeburn.errors import DodgeburnWarning

    model.embeddings = [read_embedding(path, model.text_widths) for path in paths]
    hashes = {use.name.lower(): use.sha256 for use in used}
    for one in model.embeddings:
        wanted = hashes.get(one.name.lower(), "")
        if not one.sha256.startswith(wanted):
            warnings.warn(f"the picture was made with another {one.name} ({wanted[:10]}), this one is "
                          f"{one.sha256[:10]}", DodgeburnWarning, stacklevel=2)  # fmt: skip
        if tell:
            print(f"embedding {one.name}: {len(one)} vector{'s' if len(one) > 1 else ''}")
