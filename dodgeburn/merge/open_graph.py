"""A graph's files opened and its steps planned: everything is known and checked, nothing is computed yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.addends import Addend, block_weights, open_addend
from dodgeburn.merge.bake import bake_warnings, bake_work, layout_of
from dodgeburn.merge.graph import BakeStep, Graph, MergeStep, ModelEntry
from dodgeburn.merge.lazy import Lazy, LazyBake, LazyMerge, header_as_written
from dodgeburn.merge.plan import Models, Plan, plan_merge
from dodgeburn.merge.recipe import resolved_settings
from dodgeburn.models.as_single_file import open_as_single_file
from dodgeburn.pocket.model import NAMES

Find = Callable[[str, ModelEntry], str | Path]  # a model's name in the recipe and its entry -> where it is


@dataclass
class OpenGraph:
    """The opened files by model name, the steps' results, and each step as the recipe in the metadata says it."""

    graph: Graph
    files: dict[str, Tensors] = field(default_factory=dict)
    steps: dict[str, Lazy] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)  # of merge steps
    resolved: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout: Layout | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def output(self) -> Lazy:
        return self.steps[self.graph.output]

    @property
    def elementwise(self) -> bool:
        """Whether all of it may be cut into tiles, which several threads may then work on."""
        return all(step.elementwise for step in self.steps.values())

    def source(self, name: str) -> Tensors:
        """A step's result, or an opened model."""
        return self.steps[name] if name in self.steps else self.files[name]

    def models(self, step: MergeStep) -> Models:
        """What a merge step is planned from."""
        return [(self.source(name).path.name, header_as_written(self.source(name))) for name in step.inputs]


def beside(folder: str | Path) -> Find:
    """Finds packaged models by name and other files by their path from `folder`."""

    def find(_: str, entry: ModelEntry) -> str | Path:
        return entry.path if entry.path in NAMES else Path(folder) / Path(entry.path).expanduser()

    return find


def open_graph(stack: ExitStack, graph: Graph, find: Find) -> OpenGraph:
    """Open every file (until `stack` closes) and plan every step; reads only headers.

    Raises UserError, naming the model or step, for files that are missing or damaged and for whatever a merge or a bake
    refuses before it begins.
    """
    found = OpenGraph(graph)
    for name, use in graph.uses().items():
        if use == "model":
            with _named(f"model {name}"):
                found.files[name] = stack.enter_context(open_as_single_file(find(name, graph.models[name])))
    for name, step in graph.steps.items():
        with _named(f"step {name}"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DodgeburnWarning)
            if isinstance(step, MergeStep):
                _open_merge(found, name, step)
            else:
                _open_bake(found, name, step, stack, find)
        found.warnings += [f"step {name}: {warning.message}" for warning in caught]
    return found


def _open_merge(found: OpenGraph, name: str, step: MergeStep) -> None:
    plan = plan_merge(found.models(step), step.settings, step.base_model is not None)
    found.layout = plan.layout
    found.plans[name] = plan
    found.steps[name] = LazyMerge(f"step {name}", plan, [found.source(used) for used in step.inputs])
    names = {"merge": list(step.merge), "base_model": step.base_model}
    found.resolved[name] = names | resolved_settings(plan) | {"counts": plan.counts}
    found.warnings += [f"step {name}: {line}" for line in plan.warnings()]


def _open_bake(found: OpenGraph, name: str, step: BakeStep, stack: ExitStack, find: Find) -> None:
    source = found.source(step.bake)
    header = header_as_written(source)
    found.layout = layout = layout_of(source)
    weights = block_weights(layout, step.weights)
    addends: dict[str, Addend] = {}
    for used in step.add:
        if used not in found.graph.models:
            raise UserError(f"{used} is a step's result, which is a whole model: only LoRAs and deltas can be added")
        place = find(used, found.graph.models[used])
        if not Path(place).exists():
            raise UserError(f"model {used}: {place} does not exist: expected a LoRA or a delta")
        addends[used] = stack.enter_context(open_addend(place, layout, header, source.path.name))
        found.files.setdefault(used, addends[used].source)
    work = bake_work(source, layout, list(addends.values()), list(step.add.values()), weights)
    found.steps[name] = LazyBake(f"step {name}", source, list(addends.values()), work, step.dtype)
    found.warnings += [f"step {name}: {line}" for line in bake_warnings(list(addends.values()), work)]
    found.resolved[name] = {
        "bake": step.bake,
        "add": dict(step.add),
        "preset": step.preset,
        "blocks": weights,
        "dtype": step.dtype,
        "added": {
            used: {"title": addend.title, "matched": addend.matched, "unmatched": len(addend.unmatched)}
            for used, addend in addends.items()
        },
    }


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Puts the part of the recipe in front of what is wrong."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def in_order(found: OpenGraph) -> Mapping[str, Tensors]:
    """The opened files by model name, the one that gives the output its tensors' names first, else as in the recipe."""
    first = found.graph.primary()
    return {name: found.files[name] for name in (first, *(n for n in found.graph.models if n != first))}
