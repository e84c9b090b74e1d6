"""A tensor's values of several models, piece by piece, for methods that must look at a whole tensor before they merge.

Such a method has a survey, which goes through the pieces as often as it needs and returns a few numbers; with these its
function works on any part of the tensor. So a tensor of any size is merged in little memory. Pieces have a fixed size,
so that sums over them are the same to the last bit wherever the values come from.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

PIECE = 1 << 17  # values; a few of them in float32 stay in a core's cache
SAMPLE = 1 << 15  # values of a tensor that a sample consists of
STRETCH, LARGE = 128, 1 << 21  # of a tensor of so many values, a sample's come in stretches: it need not be read whole
_DOUBT = 3  # standard errors that a sample's quantile may be off; if it is off by more, only time is lost
_spare = threading.local()
BASE = -1  # the number of the base, after those of the models


class Pieces(Protocol):
    """`count` values, in tensors of this shape, in each of `models` models, and perhaps in a base."""

    shape: tuple[int, ...]
    count: int
    models: int

    def __call__(self, *which: int) -> Iterator[list[torch.Tensor]]:
        """From first to last, flat pieces of these models (from 0 on; BASE), float32 or wider; not to be changed."""
        ...

    def sample(self, *which: int) -> list[torch.Tensor]:
        """Values of these models at the same places, from all over the tensor, [stretches, values]; all of a small
        tensor, in one stretch."""
        ...


def stretches(count: int) -> tuple[np.ndarray, int]:
    """Where a sample's stretches begin, int64 and never falling, and how many values each has: one stretch drawn from
    each of equal parts of the tensor, by always the same draws; all of a small tensor in one.

    Drawn, because at even distances they would fall on few columns of a matrix; from parts all over the tensor,
    because its rows differ in size.
    """
    import numpy as np

    if count <= SAMPLE:
        return np.zeros(1, np.int64), count
    length = STRETCH if count >= LARGE else 1
    number = SAMPLE // length
    part = count / number
    within = np.random.default_rng(0).random(number)
    return (np.arange(number) * part + within * (part - length)).astype(np.int64), length


class HeldPieces:
    """Pieces of tensors in memory."""

    def __init__(self, models: Sequence[torch.Tensor], base: torch.Tensor | None) -> None:
        self.shape = tuple(models[0].shape)
        self.count = models[0].numel()
        self.models = len(models)
        self._flat = [tensor.reshape(-1) for tensor in (*models, *([] if base is None else [base]))]

    def __call__(self, *which: int) -> Iterator[list[torch.Tensor]]:
        for start in range(0, self.count, PIECE):
            yield [self._flat[i][start : start + PIECE] for i in which]

    def sample(self, *which: int) -> list[torch.Tensor]:
        import torch

        starts, length = stretches(self.count)
        at = torch.from_numpy(starts)[:, None] + torch.arange(length)
        return [self._flat[i][at.to(self._flat[i].device)] for i in which]


def whole(pieces: Pieces, *which: int, of: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """All of a model's values, flat and on the CPU, or what `of` makes of several models' pieces."""
    import torch

    found, start = None, 0
    for parts in pieces(*which):
        part = parts[0] if of is None else of(*parts)
        if found is None:
            found = torch.empty(pieces.count, dtype=part.dtype)
        found[start : start + part.numel()] = part
        start += part.numel()
    return torch.empty(0) if found is None else found


def kth_smallest(values: torch.Tensor, k: int) -> float:
    """The value of rank k (from 1 on) of flat values, which are put into another order. NaN ranks last."""
    if values.device.type != "cpu":
        return float(values.kthvalue(k).values)
    array = values.numpy()
    array.partition(k - 1)  # some ten times faster than kthvalue
    return float(array[k - 1])


def kth_of_pieces(
    samples: Sequence[torch.Tensor], pieces: Callable[[], Iterator[Sequence[torch.Tensor]]], k: int, count: int
) -> list[float]:
    """The values of rank k (from 1 on) of some series of `count` values that come in pieces, exactly. NaN ranks last.

    `samples` are some of each series' values, [stretches, values], from which a narrow band is guessed that the wanted
    one lies in: values below it are counted and only those in it are kept. Where it was guessed wrong, all are.
    """
    import numpy as np
    import torch

    bounds = [_band(sample.cpu().numpy(), k / count) for sample in samples]
    found: list[float | None] = [None] * len(samples)
    for _ in range(2):
        below = [0] * len(samples)
        kept: list[list[Any]] = [[] for _ in samples]
        for parts in pieces():
            for i, (part, (least, most)) in enumerate(zip(parts, bounds, strict=True)):
                array = part.cpu().numpy()
                few, inside = _within(array, least, most)
                below[i] += few
                kept[i].append(inside)
        for i in range(len(samples)):
            band, rank = np.concatenate(kept[i]), k - below[i]
            if found[i] is None and 1 <= rank <= len(band):
                found[i] = kth_smallest(torch.from_numpy(band), rank)
        bounds = [(-math.inf, math.inf) if value is None else (math.inf, math.inf) for value in found]
        if None not in found:
            break
    return [math.nan if value is None else value for value in found]


def _within(values: Any, least: float, most: float) -> tuple[int, Any]:
    """How many values lie below two bounds, and those that lie between them."""
    import numpy as np

    below = values < least
    few, inside = int(np.count_nonzero(below)), values <= most
    inside ^= below
    # Few lie between, at places that a processor cannot guess: so first the eights with any, then those of them. Half
    # the time of values[inside].
    even = len(values) - len(values) % 8
    eights = inside[:even].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    rows = values[:even].reshape(-1, 8).take(some, axis=0).ravel()
    found = rows.take(np.flatnonzero(eights.take(some).view(bool)))
    return few, np.append(found, values[even:][inside[even:]])


def _band(sample: Any, share: float) -> tuple[float, float]:
    """Bounds that the value at this share of all very likely lies between, from a sample, [stretches, values]. A
    stretch counts as what it is worth: neighbours are alike where rows differ in size.
    """
    import numpy as np

    ordered, size = np.sort(sample, axis=None), sample.size
    guess = ordered[min(size - 1, math.floor(share * size))]
    spread = float(np.mean(sample < guess, axis=1).std())  # of one stretch's share
    margin = _DOUBT * size * spread / math.sqrt(len(sample)) + 2
    low, high = math.floor(share * size - margin), math.ceil(share * size + margin)
    return float(ordered[low]) if low >= 0 else -math.inf, float(ordered[high]) if high < size else math.inf


def spare(like: torch.Tensor, number: int) -> torch.Tensor:
    """Memory of the shape and type of a tile, to write to: for each number the same again in the same thread, because
    new memory costs more than what is computed in it. The number of a use must be its own within a method.
    """
    import torch

    if like.numel() > PIECE or like.device.type != "cpu":
        return torch.empty_like(like)
    held: dict[Any, tuple[torch.Tensor, torch.Tensor]] = _spare.__dict__
    key = number, like.dtype
    if key not in held:
        flat = torch.empty(PIECE, dtype=like.dtype)
        held[key] = flat, flat
    flat, last = held[key]
    if last.shape != like.shape:  # tiles of one size follow each other
        last = flat[: like.numel()].view(like.shape)
        held[key] = flat, last
    return last


def gram(pieces: Pieces, origin: int) -> torch.Tensor:
    """Scalar products of the models' differences from model `origin` (or BASE): models x models, float64."""
    import torch

    total = torch.zeros(pieces.models, pieces.models, dtype=torch.float64)
    for parts in pieces(*range(pieces.models), *([BASE] if origin == BASE else [])):
        start = parts[origin]
        deltas = torch.stack([part - start for part in parts[: pieces.models]]).double()
        total += (deltas @ deltas.T).cpu()
    return total
