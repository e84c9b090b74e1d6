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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.header import FLOAT_DTYPES, torch_dtype
from dodgeburn.checkpoint.metadata import NO_HASH, merged_metadata, recipe_of
from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.tensorfile import TensorFile, TensorWriter, byte_view, check_output, sha256_file
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.blocks import alphas
from dodgeburn.merge.methods import Method, find_method
from dodgeburn.merge.methods.table import apply
from dodgeburn.merge.plan import Plan, Work, check_keep, check_layouts, describe, make_plan, peak_memory
from dodgeburn.merge.presets import Convention, find_preset
from dodgeburn.merge.recipe import MergeRecipe, Parent, tool_version
from dodgeburn.merge.rules import check_components, parse_rules

if TYPE_CHECKING:
    import torch

TILE = 1 << 20  # values; 4 MB in float32, so that a thread's tiles stay near its core
DIGITS = "abcdef0123456789"
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
    preset: str | None = None,
    base: float | None = None,
    blocks: Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
    method: str = "weighted_sum",
    xl_presets: Convention = "curve",
    threads: int | None = None,
    *,
    more: Sequence[str | Path] = (),
    base_model: str | Path | None = None,
    params: Mapping[str, float] | None = None,
    components: Mapping[str, float] | None = None,
    rules: Sequence[str] = (),
    seed: int = 0,
    clip: bool = False,
    dtype: str | None = None,
) -> MergeResult:
    """Merge checkpoints A and B block by block into the file `out`.

    All shares are B's: 0 = all A, 1 = all B. `preset` sets the U-Net's blocks, `base` everything else (time
    and label embeddings, text encoders, VAE), `blocks` single blocks by name; without a preset every block
    is `base` (None: the method's default). `more` are models after A and B, `base_model` the one they were
    tuned from, `params` the method's numbers (methods/table.py). `components` (unet, clip_l, clip_g, vae) and
    then `rules` (rules.py) replace shares; `clip` bounds every value by A's and B's; `dtype` is the output's,
    A's for each tensor by default. Random methods depend on `seed` and tensor names alone.
    `keep=("text", "vae")` takes the text encoders and the VAE from A. The output has A's tensor names and
    shapes.

    `a` and `b` are single-file checkpoints of one architecture, or names of packaged models. Raises
    UserError for anything that would give a wrong file (see plan.make_plan; also NaN and infinite values,
    overflow, an output that is an input, a full disk); then nothing is written. Missing and extra tensors
    are counted in a DodgeburnWarning.
    """
    started = time.perf_counter()
    path_a, path_b = find_checkpoint(a), find_checkpoint(b)
    found = find_method(method)
    base = found.alpha if base is None else base
    with ExitStack() as stack:
        file_a, file_b, others, original = _open(stack, path_a, path_b, more, base_model)
        files = [file_a, file_b, *others, *original]
        options = _Options(params, components, rules, seed, clip, dtype)
        plan = _plan(files, len(original), preset, base, blocks, keep, found, xl_presets, options)
        paths = [file.path for file in files]
        check_output(out, paths)
        for line in plan.warnings():
            warnings.warn(line, DodgeburnWarning, stacklevel=2)
        parents = [
            Parent(file=file.path.name, sha256=digit * 64, recipe=recipe_of(file.header.metadata))
            for file, digit in zip(files, DIGITS, strict=False)  # as wide as hashes, and unlike each other
        ]
        recipe = MergeRecipe(
            tool=tool_version(),
            method=plan.method.name,
            layout=plan.layout.name,
            a=parents[0],
            b=parents[1],
            preset=find_preset(preset).name if preset is not None else None,
            base=base,
            xl_presets=xl_presets,
            blocks=plan.blocks,
            keep=list(plan.keep),
            counts=plan.counts,
            more=parents[2 : 2 + len(others)],
            base_model=parents[-1] if original else None,
            params=plan.params,
            components=plan.components,
            rules=[rule.text for rule in plan.rules],
            seed=seed if found.random else 0,
            clip=clip,
            dtype=dtype,
        )

        def metadata(tensors_sha256: str = NO_HASH) -> dict[str, str]:
            meta_a, meta_b = file_a.header.metadata, file_b.header.metadata
            return merged_metadata(meta_a, meta_b, recipe.as_dict(), plan.layout, out, tensors_sha256)

        infos = {w.name: (w.out_dtype, w.info.shape) for w in plan.work}
        with TensorWriter(out, infos, metadata(), inputs=paths) as writer:
            with _hashing(paths) as hashes:
                _run(plan, files, writer, _thread_count(threads))
                for parent, future in zip(parents, hashes, strict=True):
                    parent.sha256 = future.result()
            recipe = recipe.model_copy(update=_parents(parents, bool(original)))
            digest = writer.sha256_tensors()
            writer.replace_metadata(metadata(digest))
            for file in files:
                file.check_unchanged()
    return MergeResult(Path(out), digest, recipe, plan, time.perf_counter() - started)


def dry_run(
    a: str | Path,
    b: str | Path,
    out: str | Path | None = None,
    preset: str | None = None,
    base: float | None = None,
    blocks: Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
    method: str = "weighted_sum",
    xl_presets: Convention = "curve",
    *,
    more: Sequence[str | Path] = (),
    base_model: str | Path | None = None,
    params: Mapping[str, float] | None = None,
    components: Mapping[str, float] | None = None,
    rules: Sequence[str] = (),
    seed: int = 0,
    clip: bool = False,
    dtype: str | None = None,
) -> tuple[Plan, str]:
    """What `merge` with the same arguments would do, as a plan and in words; reads only headers, writes
    nothing.
    """
    path_a, path_b = find_checkpoint(a), find_checkpoint(b)
    found = find_method(method)
    base = found.alpha if base is None else base
    with ExitStack() as stack:
        file_a, file_b, others, original = _open(stack, path_a, path_b, more, base_model)
        files = [file_a, file_b, *others, *original]
        options = _Options(params, components, rules, seed, clip, dtype)
        plan = _plan(files, len(original), preset, base, blocks, keep, found, xl_presets, options)
        if out is not None:
            check_output(out, [file.path for file in files])
        rest = [(file.path.name, file.header) for file in files[2:]]
        memory = peak_memory(plan, len(files), _thread_count(None), TILE)
        return plan, describe(plan, file_b.header, path_a.name, path_b.name, rest, memory)


@dataclass(frozen=True)
class _Options:
    params: Mapping[str, float] | None
    components: Mapping[str, float] | None
    rules: Sequence[str]
    seed: int
    clip: bool
    dtype: str | None


def _open(
    stack: ExitStack, path_a: Path, path_b: Path, more: Sequence[str | Path], base_model: str | Path | None
) -> tuple[TensorFile, TensorFile, list[TensorFile], list[TensorFile]]:
    a, b = (stack.enter_context(TensorFile(path)) for path in (path_a, path_b))
    others = [stack.enter_context(TensorFile(find_checkpoint(path))) for path in more]
    original = [] if base_model is None else [stack.enter_context(TensorFile(find_checkpoint(base_model)))]
    return a, b, others, original


def _parents(parents: list[Parent], has_base: bool) -> dict[str, object]:
    end = len(parents) - has_base
    return {"a": parents[0], "b": parents[1], "more": parents[2:end], "base_model": parents[-1] if has_base else None}


def _plan(
    files: Sequence[TensorFile],
    bases: int,
    preset: str | None,
    base: float,
    blocks: Mapping[str, float] | None,
    keep: Iterable[str],
    found: Method,
    xl_presets: Convention,
    options: _Options,
) -> Plan:
    keep = check_keep(keep)
    found.check_models(len(files) - bases, bases > 0)
    a, b, *rest = files
    layout = check_layouts(a.header, b.header, a.path.name, b.path.name)
    for other in rest:
        check_layouts(a.header, other.header, a.path.name, other.path.name)
    shares = alphas(layout, preset, base, blocks, xl_presets)
    components = check_components(options.components or {}, layout)
    if "vae" in keep and ("VAE" in (blocks or {}) or "vae" in components):
        raise UserError("the VAE is kept from A and given a share of B: leave out one of the two")
    if "text" in keep and {"clip_l", "clip_g"} & set(components):
        raise UserError("the text encoders are kept from A and given a share of B: leave out one of the two")
    if "unet" in components and preset is not None:
        raise UserError("component unet replaces every share of the preset: leave out one of the two")
    if xl_presets != "curve" and (preset is None or layout.name != "sdxl"):
        raise UserError(f"--xl-presets {xl_presets} has no effect: it says how a preset becomes SDXL's blocks")
    if options.clip and found.name == "weighted_sum":
        raise UserError("clipping has no effect: a weighted sum lies between A and B already")
    if options.seed and not found.random:
        raise UserError(f"the seed has no effect: {found.name} is not random")
    return make_plan(
        a.header, b.header, layout, shares, found, keep, b.path.name,
        more=[(file.path.name, file.header) for file in rest],
        params=options.params, components=components, rules=parse_rules(options.rules, layout),
        seed=options.seed, clip=options.clip, dtype=options.dtype,
    )  # fmt: skip


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return min(MAX_THREADS, os.cpu_count() or 1)
    if threads < 1:
        raise UserError(f"{threads} threads: expected at least 1")
    return threads


@contextmanager
def _hashing(paths: Iterable[Path]) -> Iterator[list[Future[str]]]:
    """sha256 of whole files in the background, given up when the block fails."""
    stop = threading.Event()

    def go_on(_: int) -> None:
        if stop.is_set():
            raise CancelledError

    with ThreadPoolExecutor(2, thread_name_prefix="sha256") as pool:
        try:
            yield [pool.submit(sha256_file, path, go_on) for path in paths]
        except BaseException:
            stop.set()
            raise


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


def _run(plan: Plan, files: Sequence[TensorFile], writer: TensorWriter, threads: int) -> None:
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


def _write_tile(plan: Plan, files: Sequence[TensorFile], writer: TensorWriter, tile: _Tile, buffers: _Buffers) -> None:
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
        apply(plan.method, shaped, work.alpha, result.view(shape), base, plan.params, plan.seed, work.name, plan.clip)
    rounded = result
    if dtype != wide:
        rounded = buffers.values("rounded", tile.count, dtype)
        rounded.copy_(result)
    if not _finite(rounded):
        _blame(work.name, inputs, [file.path.name for file in used], work.out_dtype)
    writer.write(work.name, tile.start * dtype.itemsize, byte_view(rounded))


def _read_wide(file: TensorFile, tile: _Tile, wide: torch.dtype, buffers: _Buffers, label: str) -> torch.Tensor:
    dtype = torch_dtype(file.info(tile.work.name).dtype)
    raw = buffers.values(f"raw {label}", tile.count, dtype)
    file.read_into(tile.work.name, tile.start * dtype.itemsize, byte_view(raw))
    if dtype == wide:
        return raw
    values = buffers.values(f"wide {label}", tile.count, wide)
    values.copy_(raw)
    return values


def _copy_tile(source: TensorFile, writer: TensorWriter, tile: _Tile, buffers: _Buffers) -> None:
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


def _not_finite(name: str, file: str) -> None:
    raise UserError(f"tensor {name} of {file} has NaN or infinite values: repair the file, or keep that part of A")


def _blame(name: str, inputs: list[torch.Tensor], files: Sequence[str], dtype: str) -> None:
    for values, file in zip(inputs, files, strict=True):
        if not _finite(values):
            _not_finite(name, file)
    raise UserError(f"tensor {name} of the result is too large for {dtype}: convert A to a wider type first")
