"""Merging two checkpoints of any size in bounded memory, with the same bytes at any number of threads.

The output's header is known from A's, so it is written first and every tensor has its place; tiles of at
most a million values are then read with pread, merged in float32, rounded once and written with pwrite by a
few threads, each with buffers of its own. The file appears under its name when it is complete and every
value in it is finite.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodgeburn.checkpoint.derived import derived_metadata, write_derived
from dodgeburn.checkpoint.header import FLOAT_DTYPES, torch_dtype
from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.sources import Tensors, files_of
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view, check_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.describe import describe, peak_memory
from dodgeburn.merge.methods import find_method
from dodgeburn.merge.methods.table import apply
from dodgeburn.merge.plan import Models, Plan, Work, plan_merge
from dodgeburn.merge.recipe import MergeRecipe, Parent
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.models.as_single_file import open_as_single_file

if TYPE_CHECKING:
    import torch

TILE = 1 << 20  # values; 4 MB in float32, so that a thread's tiles stay near its core
MAX_THREADS = 4  # the disk is the limit from here on, and each thread has some 20 to 40 MB of buffers


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: the file written, the sha256 of its tensors, its recipe and plan, and how long it
    took.
    """

    path: Path
    sha256_tensors: str
    recipe: MergeRecipe
    plan: Plan
    seconds: float


def merge(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    settings: MergeSettings | None = None,
    *,
    more: Sequence[str | Path] = (),
    base_model: str | Path | None = None,
    threads: int | None = None,
    **options: Any,
) -> MergeResult:
    """Merge checkpoints A and B block by block into the file `out`.

    How is said by `settings`, or by its fields as keywords (`preset="Cosine", base=0.4`; see MergeSettings), which
    replace the settings' own. `more` are models after A and B, `base_model` the one they were tuned from. The output
    has A's tensor names and shapes; its bytes do not depend on `threads`.

    Models are checkpoints of one architecture (a .safetensors file, an index of shards, a .ckpt that is read safely),
    or names of packaged models. Raises UserError for anything that would give a wrong file (see plan.plan_merge; also
    NaN and infinite values, overflow, an output that is an input, a full disk); then nothing is written. Missing and
    extra tensors are counted in a DodgeburnWarning.
    """
    started = time.perf_counter()
    count = _thread_count(threads)
    with ExitStack() as stack:
        sources, plan = _opened(stack, a, b, more, base_model, settings, options)
        check_output(out, [file for source in sources for file in files_of(source)])
        for line in plan.warnings():
            warnings.warn(line, DodgeburnWarning, stacklevel=2)

        def recipe(hashes: Sequence[str]) -> MergeRecipe:
            return MergeRecipe.of_plan(plan, [Parent.of(*pair) for pair in zip(sources, hashes, strict=True)])

        def metadata(hashes: Sequence[str], digest: str) -> dict[str, str]:
            made = recipe(hashes)
            return derived_metadata(sources, hashes, made.as_dict(), made.a1111(), plan.layout, out, digest)

        infos = {w.name: (w.out_dtype, w.info.shape) for w in plan.work}
        hashes, digest = write_derived(out, infos, sources, metadata, lambda writer: _run(plan, sources, writer, count))
    return MergeResult(Path(out), digest, recipe(hashes), plan, time.perf_counter() - started)


def dry_run(
    a: str | Path,
    b: str | Path,
    out: str | Path | None = None,
    settings: MergeSettings | None = None,
    *,
    more: Sequence[str | Path] = (),
    base_model: str | Path | None = None,
    **options: Any,
) -> tuple[Plan, str]:
    """What `merge` with the same arguments would do, as a plan and in words; reads only headers, writes
    nothing.
    """
    with ExitStack() as stack:
        sources, plan = _opened(stack, a, b, more, base_model, settings, options)
        if out is not None:
            check_output(out, [file for source in sources for file in files_of(source)])
        memory = peak_memory(plan, len(sources), _thread_count(None), TILE)
        return plan, describe(plan, _models(sources), memory)


def _opened(
    stack: ExitStack,
    a: str | Path,
    b: str | Path,
    more: Sequence[str | Path],
    base_model: str | Path | None,
    settings: MergeSettings | None,
    options: Mapping[str, Any],
) -> tuple[list[Tensors], Plan]:
    """The models, opened, the base last, and the plan of their merge."""
    settings = (settings or MergeSettings()).but(**options)
    names = [a, b, *more, *([] if base_model is None else [base_model])]
    sources = [stack.enter_context(open_as_single_file(name)) for name in names]
    return sources, plan_merge(_models(sources), settings, base_model is not None)


def _models(sources: Sequence[Tensors]) -> Models:
    return [(source.path.name, source.header) for source in sources]


def write_source(source: Tensors, layout: Layout, writer: TensorWriter, threads: int | None = None) -> None:
    """Write every tensor of a source: as bytes where its type is the writer's, else rounded once to the writer's.

    `threads` must be 1 for a source that works out whole tensors when a piece is asked for. Raises UserError for NaN
    and infinite values.
    """
    dtypes = {name: info.dtype for name, info in writer.infos.items()}
    work = [
        Work(name, info, "copy_a", 0.0, None) if dtypes[name] == info.dtype
        else Work(name, info, "cast_a", 0.0, None, dtypes[name])
        for name, info in source.header.tensors.items()
    ]  # fmt: skip
    plan = Plan(layout, find_method("weighted_sum"), MergeSettings(), {}, {}, {}, (), work)
    _run(plan, [source], writer, _thread_count(threads))


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return min(MAX_THREADS, os.cpu_count() or 1)
    if threads < 1:
        raise UserError(f"{threads} threads: expected at least 1")
    return threads


@dataclass(frozen=True)
class _Tile:
    work: Work
    start: int  # first value
    count: int  # values


def _tiles(plan: Plan) -> Iterator[_Tile]:
    for work in plan.work:
        total = work.info.numel
        step = TILE if plan.method.elementwise or work.action != "merge" else max(1, total)
        for start in range(0, total, step):
            yield _Tile(work, start, min(step, total - start))


class _Buffers:
    """One thread's memory, grown to the largest tile it met and used again for every tile."""

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def values(self, what: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        size = count * dtype.itemsize
        flat = self._flat.get(what)
        if flat is None or flat.numel() < size:
            flat = self._flat[what] = torch.empty(size, dtype=torch.uint8)
        return flat[:size].view(dtype)


def _run(plan: Plan, files: Sequence[Tensors], writer: TensorWriter, threads: int) -> None:
    import torch
    from tqdm import tqdm

    if not plan.method.elementwise:
        threads = 1  # whole tensors, one at a time: memory is bounded by the largest
    tiles = enumerate(_tiles(plan))
    lock = threading.Lock()
    failed: dict[int, BaseException] = {}

    def work(progress: Callable[[int], object]) -> None:
        buffers = _Buffers()
        while True:
            with lock:
                number, tile = next(tiles, (-1, None)) if not failed else (-1, None)
            if tile is None:
                return
            try:
                _write_tile(plan, files, writer, tile, buffers)
            except BaseException as error:
                with lock:
                    failed[number] = error
                return
            with lock:
                progress(tile.count * tile.work.info.nbytes // tile.work.info.numel)

    # Threads of our own: torch's would only compete with them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
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
    finally:
        torch.set_num_threads(before)
    if failed:
        # Tiles are handed out in order, so the first failure is the same at any number of threads.
        raise failed[min(failed)]


def _write_tile(plan: Plan, files: Sequence[Tensors], writer: TensorWriter, tile: _Tile, buffers: _Buffers) -> None:
    import torch

    work = tile.work
    if work.action in ("copy_a", "copy_b"):
        _copy_tile(files[0 if work.action == "copy_a" else 1], writer, tile, buffers)
        return
    stored, dtype = torch_dtype(work.info.dtype), torch_dtype(work.out_dtype)
    wide = torch.float64 if stored == torch.float64 else torch.float32
    used = files[:1] if work.action == "cast_a" else files
    inputs = [_read_wide(file, tile, wide, buffers, str(i)) for i, file in enumerate(used)]
    result = inputs[0]
    if work.action == "merge":
        result = buffers.values("result", tile.count, wide)
        shape = (tile.count,) if plan.method.elementwise else work.info.shape
        shaped = [values.view(shape) for values in inputs]
        base = shaped.pop() if plan.method.needs_base else None
        seed, clip = plan.settings.seed, plan.settings.clip
        apply(plan.method, shaped, work.alpha, result.view(shape), base, plan.params, seed, work.name, clip)
    rounded = result
    if dtype != wide:
        rounded = buffers.values("rounded", tile.count, dtype)
        rounded.copy_(result)
    if not _finite(rounded) or _cut(result, dtype):
        _blame(work.name, inputs, [file.path.name for file in used], work.out_dtype)
    writer.write(work.name, tile.start * dtype.itemsize, byte_view(rounded))


def _read_wide(file: Tensors, tile: _Tile, wide: torch.dtype, buffers: _Buffers, label: str) -> torch.Tensor:
    dtype = torch_dtype(file.info(tile.work.name).dtype)
    raw = buffers.values(f"raw {label}", tile.count, dtype)
    file.read_into(tile.work.name, tile.start * dtype.itemsize, byte_view(raw))
    if dtype == wide:
        return raw
    values = buffers.values(f"wide {label}", tile.count, wide)
    values.copy_(raw)
    return values


def _copy_tile(source: Tensors, writer: TensorWriter, tile: _Tile, buffers: _Buffers) -> None:
    import torch

    info, name = tile.work.info, tile.work.name
    # By bytes, for types of less than a byte have no torch values; tiles begin at multiples of 8 values.
    begin = info.nbytes * tile.start // info.numel
    end = info.nbytes * (tile.start + tile.count) // info.numel
    raw = buffers.values("copy", end - begin, torch.uint8)
    source.read_into(name, begin, byte_view(raw))
    if info.dtype in FLOAT_DTYPES and not _finite(raw.view(torch_dtype(info.dtype))):
        _not_finite(name, source.path.name)
    writer.write(name, begin, byte_view(raw))


def _finite(values: torch.Tensor) -> bool:
    import torch

    if values.dtype.itemsize == 1:
        values = values.float()  # float8 has no reductions
    low, high = torch.aminmax(values)  # NaN wins in both; one pass, no copy
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _cut(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding cut values off: fp8 has no infinity, torch takes its largest value for whatever is larger."""
    import torch

    if dtype.itemsize > 1 or not values.numel():
        return False
    low, high = torch.aminmax(values)
    return max(-float(low), float(high)) > torch.finfo(dtype).max


def _not_finite(name: str, file: str) -> None:
    raise UserError(f"tensor {name} of {file} has NaN or infinite values: repair the file, or keep that part of A")


def _blame(name: str, inputs: list[torch.Tensor], files: Sequence[str], dtype: str) -> None:
    for values, file in zip(inputs, files, strict=True):
        if not _finite(values):
            _not_finite(name, file)
    raise UserError(f"tensor {name} of the result is too large for {dtype}: convert A to a wider type first")
