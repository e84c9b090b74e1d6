"""Merge methods as plain functions, and the one table of them.

A method takes the models' values of one tensor (or of one tile of it), in float32 or wider, and an alpha,
and writes the result. To add one: write the function, put it into METHODS, say whether it works value by
value (then it is run in tiles, in bounded memory) or needs whole tensors, and which models it takes.
tests/test_merge.py runs every entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch

# (values of each model, alpha, where to write) -> None. `out` is never one of the inputs, and inputs stay
# as they are.
Function = Callable[[Sequence["torch.Tensor"], float, "torch.Tensor"], None]


@dataclass(frozen=True)
class Method:
    """A merge method: name, function, the models it takes ("a", "b", later "c"), and how it may be run.

    `elementwise`: each output value depends on the inputs at the same place only, so tensors may be cut
    into tiles. `copies_at_ends`: alpha 0 gives A and alpha 1 gives B exactly, so that those tensors are
    copied as bytes.
    """

    name: str
    function: Function
    summary: str
    models: tuple[str, ...] = ("a", "b")
    elementwise: bool = True
    copies_at_ends: bool = True


def weighted_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """(1 - alpha) A + alpha B, for alpha in 0..1: torch.lerp, the form that other tools use too.

    It computes A + alpha (B - A) below one half and B - (1 - alpha) (B - A) from there on: exact at both
    ends, exactly A where A and B agree, the same under exchange of A and B up to rounding.
    """
    import torch

    a, b = models
    torch.lerp(a, b, alpha, out=out)


METHODS: dict[str, Method] = {
    "weighted_sum": Method("weighted_sum", weighted_sum, "(1 - alpha) A + alpha B"),
}


def find_method(name: str) -> Method:
    """The method of this name; UserError that lists all of them."""
    if name not in METHODS:
        raise UserError(f"no merge method is named {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def merge_tensors(models: Sequence[torch.Tensor], alpha: float, method: str = "weighted_sum") -> torch.Tensor:
    """One tensor merged in memory, exactly as a merged file would hold it.

    Computed in float32 (float64 if the first model is), rounded once to the first model's dtype; any device.
    """
    import torch

    first = models[0]
    width = torch.float64 if first.dtype == torch.float64 else torch.float32
    wide = [tensor.to(device=first.device, dtype=width) for tensor in models]
    out = torch.empty_like(wide[0])
    find_method(method).function(wide, alpha, out)
    return out.to(first.dtype)
