"""The same tensor of several checkpoints, read a tile at a time as wide numbers into memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.header import torch_dtype
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.checkpoint.tensorfile import byte_view

if TYPE_CHECKING:
    import torch

TILE = 1 << 15  # values; as float64 a few of them stay in a core's cache


class SideBySide:
    """Reads tensors of `sources` in tiles of at most `tile` values, in memory that depends on `tile` alone."""

    def __init__(self, sources: Sequence[Tensors], tile: int = TILE) -> None:
        import torch

        self.sources = list(sources)
        self._tile = tile
        self._wide = [torch.empty(tile, dtype=torch.float64) for _ in sources]
        self._raw = torch.empty(tile * 8, dtype=torch.uint8)

    def tiles(self, name: str) -> Iterator[list[torch.Tensor]]:
        """The values of tensor `name` in every source, as float64 [count]; the next tile overwrites the last.

        All must have as many values, of types that torch computes with. Nothing is yielded for empty tensors.
        """
        infos = [source.info(name) for source in self.sources]
        for start in range(0, infos[0].numel, self._tile):
            count = min(self._tile, infos[0].numel - start)
            out = []
            for source, info, wide in zip(self.sources, infos, self._wide, strict=True):
                dtype = torch_dtype(info.dtype)
                raw = self._raw[: count * dtype.itemsize].view(dtype)
                source.read_into(name, start * dtype.itemsize, byte_view(raw))
                values = wide[:count]
                values.copy_(raw)
                out.append(values)
            yield out
