"""How users name a checkpoint file: a path, or a model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from dodgeburn.errors import UserError


def find_checkpoint(name: str | Path) -> Path:
    """The file that `name` means: a path, or a packaged model such as "pocket" or "pocket-style".

    A file of that name in the working folder comes first. Raises UserError if there is neither.
    """
    path = Path(name).expanduser()
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path  # a path that does not exist is told of where it is read
    from dodgeburn.pocket.model import weights_path

    found = Path(weights_path(str(name)))
    if not found.exists():
        raise UserError(
            f"{name} does not exist: expected a .safetensors file or the name of a packaged model"
        )
    return found
