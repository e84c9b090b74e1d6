"""Merging two checkpoints of any size in bounded memory, with the same bytes at any number of threads.

The output's header is known from A's, so it is written first and every tensor has its place; `tiles.fill` does the
rest. The file appears under its name when it is complete and every value in it is finite.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.derived import derived_metadata, write_derived
from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.sources import Tensors, files_of
from dodgeburn.checkpoint.tensorfile import TensorWriter, check_weights_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.describe import describe, peak_memory
from dodgeburn.merge.methods import find_method
from dodgeburn.merge.plan import Models, Plan, Work, plan_merge
from dodgeburn.merge.recipe import MergeRecipe, Parent
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.merge.tiles import fill
from dodgeburn.models.as_single_file import open_as_single_file

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
    rehash: bool = False,
    **options: Any,
) -> MergeResult:
    """Merge checkpoints A and B block by block into the file `out`.

    How is said by `settings`, or by its fields as keywords (`preset="Cosine", base=0.4`; see MergeSettings), which
    replace the settings' own. `more` are models after A and B, `base_model` the one they were tuned from. The output
    has A's tensor names and shapes; its bytes do not depend on `threads`. The models' sha256 go into the recipe: with
    `rehash` also those of large files that have not changed since they were hashed, otherwise these are remembered.

    Models are checkpoints of one architecture (a .safetensors file, an index of shards, a .ckpt that is read safely),
    or names of packaged models. Raises UserError for anything that would give a wrong file (see plan.plan_merge; also
    NaN and infinite values, overflow, an output that is an input, a full disk); then nothing is written. Missing and
    extra tensors are counted in a DodgeburnWarning.
    """
    started = time.perf_counter()
    count = _thread_count(threads)
    with ExitStack() as stack:
        sources, plan = _opened(stack, a, b, more, base_model, settings, options)
        check_weights_output(out, [file for source in sources for file in files_of(source)])
        for line in [*_given_twice(sources), *plan.warnings()]:
            warnings.warn(line, DodgeburnWarning, stacklevel=2)

        def recipe(hashes: Sequence[str]) -> MergeRecipe:
            return MergeRecipe.of_plan(plan, [Parent.of(*pair) for pair in zip(sources, hashes, strict=True)])

        def metadata(hashes: Sequence[str], digest: str) -> dict[str, str]:
            made = recipe(hashes)
            return derived_metadata(sources, hashes, made.as_dict(), made.a1111(), plan.layout, out, digest)

        infos = {w.name: (w.out_dtype, w.info.shape) for w in plan.work}
        hashes, digest = write_derived(
            out, infos, sources, metadata, lambda writer: fill(plan, sources, writer, count), rehash
        )
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
            check_weights_output(out, [file for source in sources for file in files_of(source)])
        memory = peak_memory(plan, len(sources), _thread_count(None))
        odd = [f"warning: {line}" for line in (*_given_twice(sources), *plan.remarks())]
        return plan, "\n".join([describe(plan, _models(sources), memory), *odd])


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


def _given_twice(sources: Sequence[Tensors]) -> list[str]:
    """A line for each file that is given as two models: rarely what was meant."""
    seen: dict[tuple[int, int], int] = {}
    lines = []
    for number, source in enumerate(sources):
        at = files_of(source)[0].stat()
        first = seen.setdefault((at.st_dev, at.st_ino), number)
        if first != number:
            lines.append(f"models {first + 1} and {number + 1} are the same file, {source.path.name}")
    return lines


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
    fill(plan, [source], writer, _thread_count(threads))


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return min(MAX_THREADS, os.cpu_count() or 1)
    if threads < 1:
        raise UserError(f"{threads} threads: expected at least 1")
    return threads
