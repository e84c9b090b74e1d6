"""The work of a merge: values read, merged in float32, rounded once, checked and written, by a few threads.

Methods that allow it work on tiles: a part of a large tensor, or several small tensors that are treated alike. Other
methods take whole tensors, one or several at a time: together no more than four times the largest, as float32, or else
one alone. Tiles are read with pread and written with pwrite; the bytes do not depend on who does what when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dodgeburn.checkpoint.header import FLOAT_DTYPES, torch_dtype
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view
from dodgeburn.errors import UserError
from dodgeburn.merge.buffers import Buffers, Memory
from dodgeburn.merge.finite import finite, largest_of, not_finite
from dodgeburn.merge.methods.draws import Draws
from dodgeburn.merge.methods.table import apply
from dodgeburn.merge.plan import Plan, Work
from dodgeburn.merge.streamed import Streamed

if TYPE_CHECKING:
    import torch

TILE = 1 << 17  # values; 512 KB in float32, so that what a method computes stays in its core's cache
WHOLE = 4  # largest tensors, as float32, that whole tensors may take in memory


@dataclass(frozen=True)
class Tile:
    """`count` values from `start` on of a tensor, or several small tensors whole; `number` in the order of the plan."""

    number: int
    works: tuple[Work, ...]
    start: int
    count: int


def tiles(plan: Plan, files: Sequence[Tensors]) -> Iterator[Tile]:
    """The plan's work in pieces for threads, empty tensors left out."""
    number = 0
    group: list[Work] = []
    of_group: object = None
    held = 0

    def closed() -> Iterator[Tile]:
        nonlocal number, held
        if group:
            yield Tile(number, tuple(group), 0, held)
            number, held = number + 1, 0
            group.clear()

    for work in plan.work:
        total = work.info.numel
        kind = _kind(plan, work, files)
        if kind is None or kind != of_group or held + total > TILE:
            yield from closed()
        of_group = kind
        if kind is not None and total < TILE:
            group += [work] if total else []
            held += total
            continue
        step = TILE if kind is not None or work.action != "merge" or plan.method.elementwise else max(1, total)
        for start in range(0, total, step):
            yield Tile(number, (work,), start, min(step, total - start))
            number += 1
    yield from closed()


def _kind(plan: Plan, work: Work, files: Sequence[Tensors]) -> object:
    """Tensors of one kind may lie in one tile; None if the tensor must be alone."""
    if work.action in ("copy_a", "copy_b"):
        return work.action, work.out_dtype
    if work.action == "merge" and (not plan.method.elementwise or plan.method.random or plan.method.uneven):
        return None
    used = files[:1] if work.action == "cast_a" else files
    return (work.action, work.alpha, work.out_dtype, *(file.header.tensors[work.name].dtype for file in used))


def whole_memory(plan: Plan, models: int) -> tuple[int, int]:
    """Bytes that whole tensors may take together, and that the largest takes by itself; (0, 0) for methods that hold
    none. `models` counts the base.
    """
    largest = max((w.info.numel for w in plan.work if w.action == "merge"), default=0)
    if not (copies := _copies(plan, models)):
        return 0, 0
    return WHOLE * 4 * largest, copies * 4 * largest


def _copies(plan: Plan, models: int) -> int:
    return plan.method.held if plan.method.tiles else models + 1


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: its own would only compete with ours, and sums over several may round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fill(plan: Plan, files: Sequence[Tensors], writer: TensorWriter, threads: int) -> None:
    """Work out every tensor of the plan from `files` (the base last) and write it.

    Raises UserError for NaN and infinite values and for results that the output's type cannot hold, the first in the
    plan's order at any number of threads.
    """
    from tqdm import tqdm

    waiting = tiles(plan, files)
    memory = Memory(whole_memory(plan, len(files))[0])
    lock = threading.Lock()
    failed: dict[int, BaseException] = {}

    def work(progress: Callable[[int], object]) -> None:
        job = _Job(plan, files, writer, memory)
        while True:
            with lock:
                tile = next(waiting, None) if not failed else None
            if tile is None:
                return
            try:
                job.do(tile)
            except BaseException as error:
                with lock:
                    failed[tile.number] = error
                return
            with lock:
                progress(sum(w.info.nbytes for w in tile.works) * tile.count // sum(w.info.numel for w in tile.works))

    with one_thread():
        # disable=None: no bar unless stderr is a terminal
        with tqdm(
            total=sum(w.info.nbytes for w in plan.work), unit="B", unit_scale=True, desc="merge", disable=None
        ) as bar:
            with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
                futures: list[Future[None]] = [pool.submit(work, bar.update) for _ in range(threads)]
                try:
                    for future in futures:
                        future.result()
                except BaseException as error:  # Ctrl-C: let the threads finish their tile, no more
                    with lock:
                        failed[-1] = error
                    raise
    if failed:
        # Tiles are handed out in order, so the first failure is the same at any number of threads.
        raise failed[min(failed)]


class _Job:
    """One thread's part of the work."""

    def __init__(self, plan: Plan, files: Sequence[Tensors], writer: TensorWriter, memory: Memory) -> None:
        self.plan = plan
        self.files = files
        self.writer = writer
        self.memory = memory
        self.buffers = Buffers()

    def do(self, tile: Tile) -> None:
        work, method = tile.works[0], self.plan.method
        if work.action in ("copy_a", "copy_b"):
            self._copy(tile, self.files[0 if work.action == "copy_a" else 1])
        elif work.action == "cast_a" or method.elementwise:
            self._tile(tile)
        else:
            with self.memory.taken(_wide(work).itemsize * work.info.numel * _copies(self.plan, len(self.files))):
                (self._whole if method.survey is None else self._surveyed)(work)

    def _copy(self, tile: Tile, source: Tensors) -> None:
        """Bytes as they are: types of less than a byte have no torch values. Tiles begin at multiples of 8 values."""
        import torch

        dtype = tile.works[0].out_dtype  # also the source's: B's may be another than A's
        spans = []
        for work in tile.works:
            total, size = work.info.numel, work.out_nbytes
            count = tile.count if len(tile.works) == 1 else total
            first = size * tile.start // total
            spans.append((work.name, first, size * (tile.start + count) // total - first))
        raw, view = self.buffers.viewed("copy", sum(size for _, _, size in spans), torch.uint8)
        at = 0
        for name, first, size in spans:
            source.read_into(name, first, view[at : at + size])
            at += size
        if dtype in FLOAT_DTYPES and not finite(raw.view(torch_dtype(dtype))):
            self._blame(tile, [source], dtype)
        at = 0
        for name, first, size in spans:
            self.writer.write(name, first, view[at : at + size])
            at += size

    def _tile(self, tile: Tile, found: Any = None, surveyed: bool = False) -> None:
        work = tile.works[0]
        wide = _wide(work)
        used = self.files[:1] if work.action == "cast_a" else self.files
        inputs = [self._read(file, i, tile, wide) for i, file in enumerate(used)]
        if self.plan.settings.clip and not all(finite(values) for values in inputs):
            self._blame(tile, used, work.out_dtype)  # an infinite value would come out as a bound
        result = inputs[0]
        if work.action == "merge":
            result = self.buffers.values("result", tile.count, wide)
            self._apply(work, inputs, result, tile.start, found, surveyed)
        self._write(tile, result, used)

    def _apply(
        self,
        work: Work,
        inputs: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int = 0,
        found: Any = None,
        surveyed: bool = False,
        scratch: bool = False,
    ) -> None:
        plan = self.plan
        models, base = (inputs[:-1], inputs[-1]) if plan.method.needs_base else (inputs, None)
        seed, clip = plan.settings.seed, plan.settings.clip
        known = {"start": start, "found": found, "surveyed": surveyed, "scratch": scratch}
        apply(plan.method, models, work.alpha, out, base, plan.params, seed, work.name, clip, **known)

    def _surveyed(self, work: Work) -> None:
        """Go through the tensor once or more for the method's survey, then merge it in tiles. It is read again each
        time: from memory, where the system keeps what was read, stored types come faster than float32.
        """
        plan = self.plan

        def read(number: int, start: int, count: int) -> torch.Tensor:
            return self._read(self.files[number], number, Tile(0, (work,), start, count), _wide(work))

        checked = plan.method.held > 0  # not all of a tensor's values need to reach the result
        pieces = Streamed(work, self.files, plan.method.needs_base, read, _wide(work), self.buffers, checked)
        found = plan.method.look(pieces, plan.params, work.alpha, Draws(plan.settings.seed, work.name))
        for tile in _cut(work):
            self._tile(tile, found, surveyed=True)

    def _whole(self, work: Work) -> None:
        """Whole tensors, read and written piece by piece, so that stored types take no memory beside float32."""
        import torch

        wide = _wide(work)
        inputs = [torch.empty(work.info.shape, dtype=wide) for _ in self.files]
        for file, values in zip(self.files, inputs, strict=True):
            flat = values.view(-1)
            for tile in _cut(work):
                self._read(file, 0, tile, wide, flat[tile.start : tile.start + tile.count])
            # Not all of a tensor's values need to reach the result.
            if not finite(flat):
                not_finite(work.name, file.path.name)
        result = torch.empty(work.info.shape, dtype=wide)
        self._apply(work, inputs, result, scratch=True)
        del inputs
        for tile in _cut(work):
            self._write(tile, result.view(-1)[tile.start : tile.start + tile.count], self.files)

    def _read(
        self, file: Tensors, number: int, tile: Tile, wide: torch.dtype, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A file's values of the tile, put `into`, or in memory that the next call for this number uses again."""
        dtype = torch_dtype(file.header.tensors[tile.works[0].name].dtype)
        raw, view = self.buffers.viewed(("raw", number), tile.count, dtype)
        if len(tile.works) == 1:
            file.read_into(tile.works[0].name, tile.start * dtype.itemsize, view)
        else:
            at = 0
            for work in tile.works:
                size = work.info.numel * dtype.itemsize
                file.read_into(work.name, 0, view[at : at + size])
                at += size
        if into is None:
            if dtype == wide:
                return raw
            into = self.buffers.values(("wide", number), tile.count, wide)
        return into.copy_(raw)

    def _write(self, tile: Tile, result: torch.Tensor, used: Sequence[Tensors]) -> None:
        dtype = torch_dtype(tile.works[0].out_dtype)
        if dtype != result.dtype:
            rounded, view = self.buffers.viewed("rounded", tile.count, dtype)
            rounded.copy_(result)
        else:
            rounded, view = result, byte_view(result)
        # Float8 has no infinity, so its range must be looked at before it is rounded.
        if not (finite(result, largest_of(dtype)) if dtype.itemsize == 1 else finite(rounded)):
            self._blame(tile, used, tile.works[0].out_dtype)
        if len(tile.works) == 1:
            self.writer.write(tile.works[0].name, tile.start * dtype.itemsize, view)
            return
        at = 0
        for work in tile.works:
            size = work.info.numel * dtype.itemsize
            self.writer.write(work.name, 0, view[at : at + size])
            at += size

    def _blame(self, tile: Tile, used: Sequence[Tensors], dtype: str) -> None:
        """Say which tensor of which file it was, by reading again."""
        for work in tile.works:
            count = tile.count if len(tile.works) == 1 else work.info.numel
            alone = Tile(0, (work,), tile.start, count)
            inputs = [self._read(file, i, alone, torch_dtype(file.header.tensors[work.name].dtype))
                      for i, file in enumerate(used)]  # fmt: skip
            for values, file in zip(inputs, used, strict=True):
                if not finite(values):
                    not_finite(work.name, file.path.name)
        names = [work.name for work in tile.works]
        if len(names) > 1:  # not the files' fault: do them one by one, and the one that fails says so
            for work in tile.works:
                self._tile(Tile(0, (work,), 0, work.info.numel))
        raise UserError(
            f"tensor {names[0]} of the result is too large for {dtype}: convert the model to a wider type first"
        )


def _cut(work: Work) -> Iterator[Tile]:
    """A tensor's tiles."""
    for start in range(0, work.info.numel, TILE):
        yield Tile(0, (work,), start, min(TILE, work.info.numel - start))


def _wide(work: Work) -> torch.dtype:
    import torch

    return torch.float64 if work.info.dtype == "F64" else torch.float32
