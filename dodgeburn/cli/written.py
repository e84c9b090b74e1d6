"""What verbs say of a model file that they have written, as the beginning of their JSON line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Written(Protocol):
    """A finished file, as `merge`, `bake` and recipes return it."""

    @property
    def path(self) -> Path: ...
    @property
    def sha256_tensors(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def said_of(result: Written, tensors: int, **more: Any) -> dict[str, Any]:
    """Where the file is, the sha256 of its tensors, how long it took and how large it is; then `more`."""
    return {
        "out": str(result.path), "sha256_tensors": result.sha256_tensors, "seconds": round(result.seconds, 3),
        "bytes": result.path.stat().st_size, "tensors": tensors, **more,
    }  # fmt: skip
