"""The tensors that live merges are made from: what is read is counted, and held in memory while there is room."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping

import torch

from dodgeburn.checkpoint.sources import Tensors


class Shelf:
    """Several models' tensors, and what was worked out from them, held in memory up to `limit` bytes (None: a quarter
    of what is free).

    What has no room is read or worked out again each time it is asked for. `bytes_read` counts what came from files.
    Tensors that it gives must not be written to.
    """

    def __init__(self, models: Mapping[str, Tensors], limit: int | None = None) -> None:
        self.models = dict(models)
        self.bytes_read = 0
        self._left = free_memory() // 4 if limit is None else limit
        self._held: dict[Hashable, torch.Tensor] = {}

    @property
    def full_reads(self) -> float:
        """Bytes read, in units of reading every tensor of every model once."""
        everything = sum(info.nbytes for m in self.models.values() for info in m.header.tensors.values())
        return self.bytes_read / everything

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU."""

        def read() -> torch.Tensor:
            self.bytes_read += self.models[model].header.tensors[name].nbytes
            return self.models[model].tensor(name)

        return self.held((model, name), read)

    def held(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, kept for the next time if there is room."""
        found = self._held.get(key)
        if found is None:
            found = make()
            if found.nbytes <= self._left:
                self._held[key] = found
                self._left -= found.nbytes
        return found

    def drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Forget what is held under such keys."""
        for key in [key for key in self._held if unwanted(key)]:
            self._left += self._held.pop(key).nbytes


def free_memory() -> int:
    """Bytes of memory that are free; 4 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**32
