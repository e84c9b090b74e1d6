"""Noise for stochastic solvers: one Brownian path a picture, the same however it is cut into steps.

A stochastic solver that goes from noise level s to t < s adds t^2 (B(1/t^2) - B(1/s^2)) with a Brownian motion B:
that has the variance t^2 (1 - t^2/s^2) of the reverse SDE with eta 1 (arXiv 2206.00364, eq. 6 with beta = 1/sigma).
Two steps then add exactly what one step over both would, so the same seed keeps its structure when the number of steps
changes. (k-diffusion runs its path along sigma instead; there two steps agree with one only in the limit of many.)

The path is a tree: its ends are drawn first, then middles of ever smaller stretches by the Brownian bridge. The noise
of a node is a function of the seed and the node alone, so no value depends on what was asked before.
"""

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

OCTAVES = 32  # the path covers sigma from 2^-16 to 2^16
CELLS_PER_OCTAVE = 2**13  # levels are told apart down to a factor 1.00008, a tenth of a step of 1000
CELLS = OCTAVES * CELLS_PER_OCTAVE

Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> unit normal noise of the stretch between them, sigma > sigma_next > 0."""


def _cell(sigma: float) -> int:
    """Position on the path, 0 at sigma 2^16 and CELLS at 2^-16."""
    if not 2.0 ** -(OCTAVES // 2) <= sigma <= 2.0 ** (OCTAVES // 2):
        raise ValueError(f"sigma is {sigma}: the noise path goes from 2^-16 to 2^16")
    return round((OCTAVES // 2 - math.log2(sigma)) * CELLS_PER_OCTAVE)


def _time(cell: int) -> float:
    """Brownian time 1 / sigma^2 of a position."""
    return 4.0 ** (cell / CELLS_PER_OCTAVE - OCTAVES // 2)


class BrownianPath:
    """The noise of one picture: `path(sigma, sigma_next)` is unit normal, [*shape], fp32, on the CPU.

    Stretches that don't overlap are independent; a stretch is the weighted sum of its parts. `seed`: 0 .. 2^64 - 1.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.seed = seed
        self.shape = shape
        self._nodes: dict[int, np.ndarray] = {}  # middles on the way to the latest position, which the next one shares

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        start = math.sqrt(_time(0)) * self._draw(0)
        return start, start + math.sqrt(_time(CELLS) - _time(0)) * self._draw(CELLS)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise of the stretch. Raises ValueError unless 2^16 >= sigma > sigma_next >= 2^-16."""
        if not sigma > sigma_next:
            raise ValueError(f"noise is drawn downwards, not from {sigma} to {sigma_next}")
        start = _cell(sigma)
        end = max(_cell(sigma_next), start + 1)  # levels closer than a cell still get noise
        before = self._at(start)
        unit = (self._at(end) - before) / math.sqrt(_time(end) - _time(start))
        return torch.from_numpy(unit.astype(np.float32))

    def _draw(self, node: int) -> np.ndarray:
        # Philox is a counter-based generator: a key (seed, node) is a stream of its own, with nothing to set up.
        bits = np.random.Philox(key=np.array([self.seed, node], dtype=np.uint64))
        return np.random.Generator(bits).standard_normal(self.shape)

    def _at(self, cell: int) -> np.ndarray:
        """B at a position, float64."""
        low, high = 0, CELLS
        a, b = self._ends
        way: dict[int, np.ndarray] = {}
        while low < cell < high:
            middle = (low + high) // 2
            value = self._nodes.get(middle)
            if value is None:
                before, whole = _time(middle) - _time(low), _time(high) - _time(low)
                share = before / whole
                value = a + share * (b - a) + math.sqrt(before * (1 - share)) * self._draw(middle)
            way[middle] = value
            if cell < middle:
                high, b = middle, value
            else:
                low, a = middle, value
        self._nodes = way
        return a if cell == low else b
