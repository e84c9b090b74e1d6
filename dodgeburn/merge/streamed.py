"""A tensor's pieces for a method's survey, read from the files each time they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.header import torch_dtype
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.merge.buffers import Buffers
from dodgeburn.merge.finite import finite, not_finite
from dodgeburn.merge.methods.pieces import BASE, PIECE, SAMPLE, stretches
from dodgeburn.merge.plan import Work

if TYPE_CHECKING:
    import numpy as np
    import torch


class Streamed:
    """`methods.pieces.Pieces` of the files, the base last. `read(number of the file, start, count)` gives values in the
    type `wide`; `checked`: pieces with values that are not finite are refused.
    """

    def __init__(
        self, work: Work, files: Sequence[Tensors], based: bool,
        read: Callable[[int, int, int], torch.Tensor], wide: torch.dtype, buffers: Buffers, checked: bool,
    ) -> None:  # fmt: skip
        self.shape = tuple(work.info.shape)
        self.count = work.info.numel
        self.models = len(files) - based
        self._name, self._files, self._read, self._wide = work.name, files, read, wide
        self._buffers, self._checked = buffers, checked

    def __call__(self, *which: int) -> Iterator[list[torch.Tensor]]:
        for start in range(0, self.count, PIECE):
            yield [self._piece(number, start, min(PIECE, self.count - start)) for number in self._numbers(which)]

    def sample(self, *which: int) -> list[torch.Tensor]:
        starts, length = stretches(self.count)
        pick = self._all if len(starts) == 1 else self._single if length == 1 else self._stretches
        found = []
        for number in self._numbers(which):
            dtype = torch_dtype(self._files[number].header.tensors[self._name].dtype)
            found.append(pick(number, dtype, starts, length).to(self._wide).view(len(starts), length))
        return found

    def _all(self, number: int, dtype: torch.dtype, starts: np.ndarray, length: int) -> torch.Tensor:
        return self._read(number, 0, length).clone()

    def _stretches(self, number: int, dtype: torch.dtype, starts: np.ndarray, length: int) -> torch.Tensor:
        raw, view = self._buffers.viewed(("raw", number), SAMPLE, dtype)
        size = length * dtype.itemsize
        for at, start in enumerate(starts.tolist()):
            self._files[number].read_into(self._name, start * dtype.itemsize, view[at * size : (at + 1) * size])
        return raw.clone()

    def _single(self, number: int, dtype: torch.dtype, starts: np.ndarray, length: int) -> torch.Tensor:
        """All of it is read: one long reading takes less time than some ten thousand short ones."""
        import numpy as np
        import torch

        # float8 has no indexing
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        drawn = torch.empty(len(starts), dtype=bits)
        done = 0
        for start in range(0, self.count, PIECE):
            count = min(PIECE, self.count - start)
            raw, view = self._buffers.viewed(("raw", number), count, dtype)
            self._files[number].read_into(self._name, start * dtype.itemsize, view)
            end = int(np.searchsorted(starts, start + count))
            torch.index_select(raw.view(bits), 0, torch.from_numpy(starts[done:end] - start), out=drawn[done:end])
            done = end
        return drawn.view(dtype)

    def _numbers(self, which: Sequence[int]) -> list[int]:
        return [self.models if number == BASE else number for number in which]

    def _piece(self, number: int, start: int, count: int) -> torch.Tensor:
        values = self._read(number, start, count)
        if self._checked and not finite(values):
            not_finite(self._name, self._files[number].path.name)
        return values
