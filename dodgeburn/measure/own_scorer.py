"""A user's own scorer, FILE.py:FUNCTION: from pictures uint8 [n, h, w, 3] and their prompts to n numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dodgeburn.errors import UserError

OwnScores = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Pictures and their prompts -> float64 [n], NaN for a picture that cannot be rated."""


def is_own_scorer(said: str) -> bool:
    """Whether a text names a function of a Python file."""
    path, colon, _ = said.rpartition(":")
    return bool(colon) and path.endswith(".py")


def own_scorer(said: str) -> tuple[OwnScores, str, str]:
    """The function, its name and its file's name. Its answers are checked whenever it is called. Its file may import
    what lies beside it. Raises UserError for what is no function of a file, and for a function that fails or answers
    with anything but one number a picture. It gets copies: what it does to them is not done to the pictures."""
    place, _, function = said.rpartition(":")
    path = Path(place).expanduser()
    if not is_own_scorer(said) or not path.is_file():
        raise UserError(f"{place or said}: no such file; a scorer is named FILE.py:FUNCTION")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    try:
        with _beside(path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise UserError(f"{path} cannot be imported: {_said(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{path} has no function {function}")
    own = found

    def scores(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        try:
            with _beside(path):
                answer = np.asarray(own(pictures.copy(), list(prompts)), dtype=np.float64)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path.name}:{function} failed: {_said(error)}") from error
        if answer.shape != (len(pictures),):
            raise UserError(
                f"{path.name}:{function} answered with shape {list(answer.shape)}: expected one number for each of "
                f"{len(pictures)} pictures"
            )
        if np.isinf(answer).any():
            raise UserError(f"{path.name}:{function} answered with {answer[np.isinf(answer)][0]:g}: expected numbers, "
                            "or NaN for a picture that cannot be rated")  # fmt: skip
        return answer

    return scores, function, path.name


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Within the context a file's neighbours can be imported: while it is, and by what it imports when it is called."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
