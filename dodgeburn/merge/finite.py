"""Whether values are finite, and the error that says where they are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch


def largest_of(dtype: torch.dtype) -> float:
    """The largest finite value of a type."""
    import torch

    return float(torch.finfo(dtype).max)


def finite(values: torch.Tensor, limit: float = math.inf) -> bool:
    """Whether all values are finite, and no larger than the limit; in one pass without a copy."""
    import torch

    if values.dtype.itemsize == 1:
        values = values.float()  # float8 has no reductions
    low, high = (bound.item() for bound in torch.aminmax(values))  # NaN wins in both
    return math.isfinite(low) and math.isfinite(high) and -limit <= low and high <= limit


def not_finite(name: str, file: str) -> None:
    raise UserError(f"tensor {name} of {file} has NaN or infinite values: repair the file, or keep that part of A")
