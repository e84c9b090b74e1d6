"""How users name a checkpoint file: a path, or a model that comes with the package."""

from __future__ import annotations

import re
from pathlib import Path

from dodgeburn.errors import UserError, near_names

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(name: str | Path) -> Path:
    """The file that `name` means: a packaged model such as "pocket" or "pocket-style", or else a path.

    A packaged name comes first, as in `models.loading`; write ./pocket for a file of that name.
    """
    from dodgeburn.pocket.model import NAMES

    if str(name) in NAMES:
        from dodgeburn.checkpoint.packaged import packaged_checkpoint

        return packaged_checkpoint(str(name))
    path = Path(name).expanduser()
    if not path.exists() and (near := near_names(str(name), NAMES, 1, 0.8)):
        raise UserError(f"{name} does not exist: perhaps you meant the packaged {near[0]}")
    if HUB_ID.fullmatch(str(name)) and not path.suffix and not path.parent.exists():
        raise UserError(f"{name} does not exist; of a model of the hub `dodgeburn convert {name} -o FILE` makes a file")
    return path  # what does not exist is told of where it is read
