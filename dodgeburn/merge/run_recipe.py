"""Running a recipe: a graph of merges and bakes into one file, in bounded memory and without files in between."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dodgeburn.checkpoint.derived import derived_metadata, write_derived
from dodgeburn.checkpoint.metadata import NO_HASH
from dodgeburn.checkpoint.sources import files_of
from dodgeburn.checkpoint.tensorfile import check_weights_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.describe import describe
from dodgeburn.merge.graph import Graph
from dodgeburn.merge.open_graph import Find, OpenGraph, beside, in_order, open_graph
from dodgeburn.merge.recipe import GraphRecipe, Parent, tool_version
from dodgeburn.merge.recipe_text import read_recipe
from dodgeburn.merge.run import write_source


@dataclass(frozen=True)
class RecipeResult:
    """A file made by a recipe: where it is, the sha256 of its tensors, the recipe in full, tensors, and seconds."""

    path: Path
    sha256_tensors: str
    recipe: GraphRecipe
    tensors: int
    seconds: float


def run_recipe(
    recipe: str | Path | Graph,
    out: str | Path,
    threads: int | None = None,
    find: Find | None = None,
    rehash: bool = False,
) -> RecipeResult:
    """Run a recipe (a .toml, .yaml or .json file, or a graph) and write its last step's result to `out`.

    Nothing is rounded between steps: what lies between is float32, and only the output has types again, those of the
    first model of the first step it goes back to, or the last step's `dtype`. Paths count from the recipe's folder
    (the current one for a graph). Raises UserError, then nothing is written, for whatever a merge or a bake refuses,
    and for a model whose sha256 is not the recipe's. `rehash` as in `merge`.
    """
    started = time.perf_counter()
    graph, find = _graph_and_places(recipe, find)
    with ExitStack() as stack:
        opened = open_graph(stack, graph, find)
        _check_output(opened, out)
        for line in opened.warnings:
            warnings.warn(line, DodgeburnWarning, stacklevel=2)
        sources = list(in_order(opened).values())
        output, layout = opened.output, opened.layout
        assert layout is not None

        def metadata(hashes: Sequence[str], digest: str) -> dict[str, str]:
            made = graph_recipe(opened, hashes)
            if digest != NO_HASH:
                check_hashes(opened, hashes)
            return derived_metadata(sources, hashes, made.as_dict(), made.a1111(), layout, out, digest)

        infos = {name: (info.dtype, info.shape) for name, info in output.as_written.tensors.items()}
        count = threads if opened.elementwise else 1
        hashes, digest = write_derived(
            out, infos, sources, metadata, lambda writer: write_source(output, layout, writer, count), rehash
        )
        made = graph_recipe(opened, hashes)
    return RecipeResult(Path(out), digest, made, len(infos), time.perf_counter() - started)


def describe_recipe(recipe: str | Path | Graph, out: str | Path | None = None, find: Find | None = None) -> str:
    """What `run_recipe` would do, step by step; reads only headers, writes nothing."""
    graph, find = _graph_and_places(recipe, find)
    with ExitStack() as stack:
        opened = open_graph(stack, graph, find)
        if out is not None:
            _check_output(opened, out)
        parts = []
        for name, step in opened.resolved.items():
            if name in opened.plans:
                text = describe(opened.plans[name], opened.models(graph.steps[name]))  # type: ignore[arg-type]
            else:
                weights = ", ".join(f"{block} x {weight:g}" for block, weight in step["blocks"].items() if weight != 1)
                added = [
                    f"  + {strength:g} x {used}: {step['added'][used]['title']}, "
                    f"{step['added'][used]['matched']} matched, {step['added'][used]['unmatched']} unmatched"
                    for used, strength in step["add"].items()
                ]
                text = "\n".join([f"added to {step['bake']}; block weights: {weights or 'all 1'}", *added])
            parts.append(f"step {name}: {text}")
        size = sum(info.nbytes for info in opened.output.as_written.tensors.values())
        last = f"{len(opened.output.keys())} tensors, {size / 1e6:,.2f} MB to write"
        return "\n\n".join([*parts, *(f"warning: {line}" for line in opened.warnings), last])


def graph_recipe(opened: OpenGraph, hashes: Sequence[str]) -> GraphRecipe:
    """The recipe in full, for the metadata; `hashes` are those of `in_order`'s files."""
    assert opened.layout is not None
    parents = {
        name: Parent.of(source, sha256) for (name, source), sha256 in zip(in_order(opened).items(), hashes, strict=True)
    }
    return GraphRecipe(
        tool=tool_version(),
        layout=opened.layout.name,
        models={name: parents[name] for name in opened.graph.models},
        steps=opened.resolved,
    )


def check_hashes(opened: OpenGraph, hashes: Sequence[str]) -> None:
    """UserError if a file is not the one that the recipe was made with."""
    for (name, source), sha256 in zip(in_order(opened).items(), hashes, strict=True):
        wanted = opened.graph.models[name].sha256
        if wanted is not None and wanted != sha256:
            raise UserError(
                f"model {name}: {source.path} has sha256 {sha256[:16]}…, the recipe says {wanted[:16]}…: "
                "it is another file"
            )


def _graph_and_places(recipe: str | Path | Graph, find: Find | None) -> tuple[Graph, Find]:
    if isinstance(recipe, Graph):
        return recipe, find or beside(".")
    return read_recipe(recipe), find or beside(Path(recipe).parent)


def _check_output(opened: OpenGraph, out: str | Path) -> None:
    check_weights_output(out, [file for source in opened.files.values() for file in files_of(source)])
