"""Adapters and deltas added to a checkpoint, streamed: W + strength * block weight * change, for every tensor.

One tensor is in memory at a time, as float32; what nothing changes is copied as bytes. The result is rounded once to
the model's own type. Files are written as merges are: exact header first, complete or not at all, never over an input.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from dodgeburn.checkpoint.derived import derived_metadata
from dodgeburn.checkpoint.header import FLOAT_DTYPES, TensorInfo
from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.checkpoint.metadata import recipe_of
from dodgeburn.checkpoint.rewrite import PIECE, cast_to, is_finite
from dodgeburn.checkpoint.sources import Tensors, files_of, hashing
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view, check_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.addends import Addend, open_addend
from dodgeburn.merge.addends import block_weights as weights_of
from dodgeburn.merge.recipe import Parent, tool_version
from dodgeburn.models.as_single_file import open_as_single_file


class Added(BaseModel):
    """One adapter or delta: its file, what it is, how strong, and how much of it is in the model."""

    file: str
    sha256: str
    title: str
    strength: float
    matched: int
    unmatched: int


class BakeRecipe(BaseModel):
    """How a file was made from a model and things added to it.

    `blocks` has every block's weight (BASE, IN00 …, M00, OUT00 …, VAE), by the conventions of checkpoint/layout.py.
    """

    kind: Literal["bake", "delta_apply"] = "bake"
    version: int = 1
    tool: str = ""
    layout: str
    model: Parent
    added: list[Added]
    blocks: dict[str, float]
    conventions: str = "dodgeburn"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and metadata."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class BakeResult:
    """A file made by `bake`: where it is, the sha256 of its tensors, its recipe, how many tensors changed, and how long
    it took.
    """

    path: Path
    sha256_tensors: str
    recipe: BakeRecipe
    changed: int
    tensors: int
    seconds: float


def bake(
    model: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    block_weights: Sequence[str] = (),
    kind: Literal["bake", "delta_apply"] = "bake",
) -> BakeResult:
    """Add adapters or full deltas, each with a strength, to a checkpoint and write the result to `out`.

    `model` is a single-file checkpoint (also sharded or .ckpt) or a packaged model's name; names, shapes and types of
    its tensors are the output's. `block_weights` multiply the strengths (see addends.block_weights). Strengths may be
    any finite number; negative ones take away. Raises UserError for an adapter of another architecture, one of which
    nothing is in the model, NaN, overflow, an output that is an input. Unmatched modules are counted in a
    DodgeburnWarning.
    """
    started = time.perf_counter()
    if not adapters:
        raise UserError("nothing to add: name at least one LoRA or delta file")
    for path, strength in adapters:
        if not math.isfinite(strength):
            raise UserError(f"{Path(path).name}: strength {strength} is no finite number")
    with ExitStack() as stack:
        source = stack.enter_context(open_as_single_file(model))
        layout = _layout(source)
        weights = weights_of(layout, block_weights)
        name = source.path.name
        addends = [stack.enter_context(open_addend(path, layout, source.header, name)) for path, _ in adapters]
        strengths = [float(strength) for _, strength in adapters]
        inputs = [file for one in (source, *(a.source for a in addends)) for file in files_of(one)]
        check_output(out, inputs)
        work = _work(source, layout, addends, strengths, weights)
        _warn(addends, work)
        hashes = [f"{i + 1:x}"[-1] * 64 for i in range(len(addends) + 1)]  # as wide as hashes, and unlike each other
        infos = {key: (info.dtype, info.shape) for key, info in source.header.tensors.items()}

        def recipe_with(found: Sequence[str]) -> BakeRecipe:
            added = [
                Added(
                    file=a.source.path.name, sha256=sha, title=a.title, strength=s, matched=a.matched,
                    unmatched=len(a.unmatched),
                )
                for a, s, sha in zip(addends, strengths, found[1:], strict=True)
            ]  # fmt: skip
            parent = Parent(file=name, sha256=found[0], recipe=recipe_of(source.header.metadata))
            return BakeRecipe(
                kind=kind, tool=tool_version(), layout=layout.name, model=parent, added=added, blocks=weights
            )

        def metadata(found: Sequence[str], digest: str = "0" * 64) -> dict[str, str]:
            files = [name, *(a.source.path.name for a in addends)]
            parents = list(zip(files, found, strict=True))
            return derived_metadata(source.header.metadata, recipe_with(found).as_dict(), parents, layout, out, digest)

        with TensorWriter(out, infos, metadata(hashes), inputs) as writer:
            with hashing([source, *(a.source for a in addends)]) as futures:
                _run(source, addends, work, writer)
                hashes = [future.result() for future in futures]
            digest = writer.sha256_tensors()
            writer.replace_metadata(metadata(hashes, digest))
            for one in (source, *(a.source for a in addends)):
                one.check_unchanged()
        changed = sum(bool(strength) for strength in work.values())
        return BakeResult(Path(out), digest, recipe_with(hashes), changed, len(infos), time.perf_counter() - started)


def _layout(source: Tensors) -> Layout:
    try:
        return detect_layout(source.header.tensors, {k: i.shape for k, i in source.header.tensors.items()})
    except UserError as error:
        raise UserError(f"{source.path.name}: {error}") from None


def _work(
    source: Tensors,
    layout: Layout,
    addends: Sequence[Addend],
    strengths: Sequence[float],
    weights: Mapping[str, float],
) -> dict[str, list[tuple[int, float]]]:
    """For every tensor of the model: which addends change it, and how strongly."""
    work: dict[str, list[tuple[int, float]]] = {}
    for key, info in source.header.tensors.items():
        weight = weights.get(layout.block(key) or "", 1.0)
        found = [(i, s * weight) for i, s in enumerate(strengths) if key in addends[i].targets and s * weight != 0.0]
        if found and info.dtype not in FLOAT_DTYPES:
            raise UserError(f"{source.path.name}: {key} is {info.dtype}, to which nothing can be added")
        work[key] = found
    return work


def _warn(addends: Sequence[Addend], work: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for i, addend in enumerate(addends):
        name = addend.source.path.name
        if addend.unmatched:
            total = addend.matched + len(addend.unmatched)
            warnings.warn(
                f"{name}: {len(addend.unmatched)} of {total} modules or keys are not in the model and are left out, "
                f"first {addend.unmatched[0]}",
                DodgeburnWarning,
                stacklevel=3,
            )
        if not any(number == i for found in work.values() for number, _ in found):
            warnings.warn(
                f"{name} changes nothing: its strength or the weights of its blocks are 0",
                DodgeburnWarning,
                stacklevel=3,
            )


def _run(
    source: Tensors,
    addends: Sequence[Addend],
    work: Mapping[str, Sequence[tuple[int, float]]],
    writer: TensorWriter,
) -> None:
    from tqdm import tqdm

    total = sum(info.nbytes for info in writer.infos.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="bake", disable=None) as bar:
        for key, found in work.items():
            info = source.info(key)
            if found:
                _add(source, key, info, addends, found, writer)
            else:
                for start in range(0, info.nbytes, PIECE):
                    buffer = memoryview(bytearray(min(PIECE, info.nbytes - start)))
                    source.read_into(key, start, buffer)
                    writer.write(key, start, buffer)
            bar.update(info.nbytes)


def _add(
    source: Tensors,
    key: str,
    info: TensorInfo,
    addends: Sequence[Addend],
    found: Sequence[tuple[int, float]],
    writer: TensorWriter,
) -> None:
    import torch

    stored = source.tensor(key)
    wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    total = torch.zeros_like(wide)  # summed apart, so that changes of opposite strength cancel exactly
    for number, strength in found:
        addends[number].add(key, total, strength)
    wide.add_(total)
    if not is_finite(wide):
        if not is_finite(source.tensor(key)):  # read again: `wide` may be the same memory as `stored`
            raise UserError(f"tensor {key} of {source.path.name} has NaN or infinite values: repair the file")
        raise UserError(f"tensor {key} becomes infinite: choose a smaller strength")
    rounded = cast_to(wide, info.dtype, key, "the result").contiguous().reshape(-1)
    writer.write(key, 0, byte_view(rounded))
