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

from dodgeburn.checkpoint.derived import derived_metadata, write_derived
from dodgeburn.checkpoint.header import FLOAT_DTYPES
from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.checkpoint.sources import Tensors, files_of
from dodgeburn.checkpoint.tensorfile import check_weights_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.addends import Addend, open_addend
from dodgeburn.merge.addends import block_weights as weights_of
from dodgeburn.merge.lazy import LazyBake, header_as_written
from dodgeburn.merge.recipe import Parent, tool_version
from dodgeburn.merge.run import write_source
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

    def a1111(self) -> dict[str, Any]:
        """What A1111's own recipe has words for."""
        added = [one.model_dump(include={"file", "sha256", "strength"}) for one in self.added]
        none = {"secondary_model_hash": None, "tertiary_model_hash": None}  # these are models, which adapters are not
        return {**none, "interp_method": self.kind, "multiplier": self.added[0].strength, "added": added}

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
        layout = layout_of(source)
        weights = weights_of(layout, block_weights)
        name = source.path.name
        addends = [stack.enter_context(open_addend(path, layout, source.header, name)) for path, _ in adapters]
        strengths = [float(strength) for _, strength in adapters]
        check_weights_output(out, [file for one in (source, *(a.source for a in addends)) for file in files_of(one)])
        work = bake_work(source, layout, addends, strengths, weights)
        for line in bake_warnings(addends, work):
            warnings.warn(line, DodgeburnWarning, stacklevel=2)
        baked = LazyBake(Path(out).name, source, addends, work)
        sources = [source, *(addend.source for addend in addends)]

        def recipe(hashes: Sequence[str]) -> BakeRecipe:
            added = [
                Added(
                    file=a.source.path.name, sha256=sha, title=a.title, strength=s, matched=a.matched,
                    unmatched=len(a.unmatched),
                )
                for a, s, sha in zip(addends, strengths, hashes[1:], strict=True)
            ]  # fmt: skip
            parent = Parent.of(source, hashes[0])
            return BakeRecipe(
                kind=kind, tool=tool_version(), layout=layout.name, model=parent, added=added, blocks=weights
            )

        def metadata(hashes: Sequence[str], digest: str) -> dict[str, str]:
            made = recipe(hashes)
            return derived_metadata(sources, hashes, made.as_dict(), made.a1111(), layout, out, digest)

        infos = {key: (info.dtype, info.shape) for key, info in source.header.tensors.items()}
        hashes, digest = write_derived(
            out, infos, sources, metadata, lambda writer: write_source(baked, layout, writer, threads=1)
        )
        changed = sum(bool(strength) for strength in work.values())
        return BakeResult(Path(out), digest, recipe(hashes), changed, len(infos), time.perf_counter() - started)


def layout_of(source: Tensors) -> Layout:
    """The architecture of an opened model; UserError that names the file if it is none."""
    try:
        return detect_layout(source.header.tensors, {k: i.shape for k, i in source.header.tensors.items()})
    except UserError as error:
        raise UserError(f"{source.path.name}: {error}") from None


def bake_work(
    source: Tensors,
    layout: Layout,
    addends: Sequence[Addend],
    strengths: Sequence[float],
    weights: Mapping[str, float],
) -> dict[str, list[tuple[int, float]]]:
    """For every tensor of the model: which addends change it, and how strongly."""
    work: dict[str, list[tuple[int, float]]] = {}
    for key, info in header_as_written(source).tensors.items():
        weight = weights.get(layout.block(key) or "", 1.0)
        found = [(i, s * weight) for i, s in enumerate(strengths) if key in addends[i].targets and s * weight != 0.0]
        if found and info.dtype not in FLOAT_DTYPES:
            raise UserError(f"{source.path.name}: {key} is {info.dtype}, to which nothing can be added")
        work[key] = found
    return work


def bake_warnings(addends: Sequence[Addend], work: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """What a user should hear of before things are added: what is left out, and what changes nothing."""
    lines = []
    for i, addend in enumerate(addends):
        name = addend.source.path.name
        if addend.unmatched:
            total = addend.matched + len(addend.unmatched)
            lines.append(
                f"{name}: {len(addend.unmatched)} of {total} modules or keys are not in the model and are left out, "
                f"first {addend.unmatched[0]}"
            )
        if not any(number == i for found in work.values() for number, _ in found):
            lines.append(f"{name} changes nothing: its strength or the weights of its blocks are 0")
    return lines
