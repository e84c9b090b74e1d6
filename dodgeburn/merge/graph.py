"""A recipe as a graph: models by name, and steps that merge them or bake LoRAs and deltas into them.

A step may use models and earlier steps; the last step is the output. This is the form in which recipes are read, run
and checked, whatever they were written in (recipe_text.py for text files, recipe.py for a file's metadata).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dodgeburn.errors import UserError, near_names
from dodgeburn.given_settings import first_problem, nearest
from dodgeburn.merge.presets import preset_name
from dodgeburn.merge.settings import DTYPES, MergeSettings

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelEntry(BaseModel):
    """A model, LoRA or delta: a packaged name or a path (relative to the recipe's folder), and its sha256 if known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    sha256: str | None = None

    @field_validator("sha256")
    @classmethod
    def _sha256(cls, value: str | None) -> str | None:
        found = None if value is None else value.strip().lower().removeprefix("0x")
        if found is not None and not _SHA256.fullmatch(found):
            raise UserError(f"sha256 is {value!r}: expected 64 hexadecimal digits")
        return found


class MergeStep(MergeSettings):
    """Models merged: `merge` names A, B and further ones, `base_model` the one they were tuned from."""

    merge: tuple[str, ...]
    base_model: str | None = None

    @field_validator("merge")
    @classmethod
    def _two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 2:
            raise UserError(f"merge names {len(value)} models: expected at least A and B")
        return value

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names used, the base last."""
        return (*self.merge, *([] if self.base_model is None else [self.base_model]))

    @property
    def settings(self) -> MergeSettings:
        """How they are merged, without their names."""
        return MergeSettings(**{name: getattr(self, name) for name in MergeSettings.model_fields})


class BakeStep(BaseModel):
    """LoRAs and deltas added to the model `bake`: W + strength x block weight x change, for each of `add` in order.

    Block weights are 1 where nothing is said; `preset` sets the U-Net's, then `blocks` replaces by name or pattern
    (`IN*`). `dtype` is the output's, in the last step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bake: str
    add: dict[str, float]
    preset: str | None = None
    blocks: dict[str, float] = {}
    dtype: str | None = None

    @field_validator("add")
    @classmethod
    def _add(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise UserError("add names nothing: expected LoRAs or deltas with strengths")
        for name, strength in value.items():
            if not math.isfinite(strength):
                raise UserError(f"the strength of {name} is {strength}: expected a finite number")
        return value

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: str | None) -> str | None:
        return None if value is None else preset_name(value)

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        return MergeSettings.of(dtype=value).dtype

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names used, the model first."""
        return (self.bake, *self.add)

    @property
    def weights(self) -> list[str]:
        """Block weights as `addends.block_weights` reads them."""
        preset = [] if self.preset is None else [self.preset]
        return preset + [f"{block}={weight!r}" for block, weight in self.blocks.items()]


Step = MergeStep | BakeStep
Use = Literal["model", "addend"]


class Graph(BaseModel):
    """Models and steps by name, checked: every name is known and used, every step uses only what stands before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    models: dict[str, ModelEntry]
    steps: dict[str, Step]

    @property
    def output(self) -> str:
        """The last step's name."""
        return list(self.steps)[-1]

    def primary(self, name: str | None = None) -> str:
        """The model whose tensor names, shapes and types the output (or this step) has: the first of the first."""
        name = self.output if name is None else name
        while name in self.steps:
            name = self.steps[name].inputs[0]
        return name

    def uses(self) -> dict[str, Use]:
        """What each model is used as: a whole model, or something added to one."""
        out: dict[str, Use] = {}
        for step in self.steps.values():
            for i, name in enumerate(step.inputs):
                use: Use = "addend" if isinstance(step, BakeStep) and i else "model"
                if name in self.models and out.setdefault(name, use) != use:
                    raise UserError(f"{name} is used both as a model and as what is added to one")
        return out

    def as_dict(self) -> dict[str, Any]:
        """The recipe without what has its default, as it would be written by hand."""
        return self.model_dump(mode="json", exclude_defaults=True)


def parse_graph(raw: Any) -> Graph:
    """A graph from plain values, as TOML and YAML give them.

    `models`: name -> path, or -> {path, sha256}. `steps`: name -> {merge: [A, B, ...], base_model, and the fields of
    MergeSettings} or {bake: MODEL, add: {NAME: strength}, preset, blocks}. Raises UserError that names the first step
    or model that is wrong, unknown, used before it is made, or not used.
    """
    tables = _table(raw, "the recipe")
    _known(tables, ("dodgeburn", "models", "steps"), "the recipe", "part")
    if (version := tables.get("dodgeburn", VERSION)) != VERSION:
        raise UserError(f"dodgeburn = {version!r}: this program reads recipes of version {VERSION}")
    models = {name: _model(name, entry) for name, entry in _table(tables.get("models"), "models").items()}
    steps = {name: _step(name, entry) for name, entry in _table(tables.get("steps"), "steps").items()}
    if not steps:
        raise UserError("the recipe has no steps: expected steps.NAME with merge or bake in it")
    for name in (*models, *steps):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"the name {name!r}: expected letters, digits, _ and - only")
    for name in steps:
        if name in models:
            raise UserError(f"{name} is both a model and a step: give one of them another name")
    graph = Graph(models=models, steps=steps)
    _check_order(graph)
    _check_used(graph)
    graph.uses()
    return graph


def _table(raw: Any, what: str) -> Mapping[Any, Any]:
    if raw is None:
        raise UserError(f"{what} is missing: expected names with what they mean")
    if not isinstance(raw, Mapping):
        raise UserError(f"{what} is {_short(raw)}: expected names with what they mean")
    return raw


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _known(table: Mapping[Any, Any], names: Iterable[str], where: str, what: str) -> None:
    names = list(names)
    for key in table:
        if key not in names:
            raise UserError(f"{where} has no {what} {key!r}{nearest(str(key), names)}")


def _model(name: Any, entry: Any) -> ModelEntry:
    if isinstance(entry, str):
        entry = {"path": entry}
    table = _table(entry, f"model {name}")
    _known(table, ModelEntry.model_fields, f"model {name}", "setting")
    return _built(ModelEntry, table, f"model {name}")


def _step(name: Any, entry: Any) -> Step:
    table = _table(entry, f"step {name}")
    if ("merge" in table) == ("bake" in table):
        raise UserError(f'step {name}: expected either merge = ["A", "B"] or bake = "MODEL"')
    kind: type[Step] = MergeStep if "merge" in table else BakeStep
    _known(table, kind.model_fields, f"step {name}", "setting")
    return _built(kind, table, f"step {name}")


def _built(kind: Any, table: Mapping[Any, Any], where: str) -> Any:
    try:
        return kind(**table)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, kind)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_order(graph: Graph) -> None:
    names = [*graph.models, *graph.steps]
    made = set(graph.models)
    for name, step in graph.steps.items():
        for used in step.inputs:
            if used not in names:
                near = near_names(used, names, cutoff=0.6) or names
                hint = f"did you mean {', '.join(near)}?"
                raise UserError(f"step {name} uses {used!r}, which is no model or step: {hint}")
            if used not in made:
                if circle := _way(graph, used, name, set()):
                    raise UserError(f"the steps go in a circle: {' <- '.join([name, *circle])}")
                raise UserError(f"step {name} uses {used}, which comes later: write {used} before {name}")
        made.add(name)
    for name, step in graph.steps.items():
        if step.dtype is not None and name != graph.output:
            raise UserError(
                f"step {name}: dtype {step.dtype} has no effect: only the last step is rounded "
                f"({', '.join(DTYPES)}, or A's types)"
            )


def _way(graph: Graph, start: str, end: str, seen: set[str]) -> list[str]:
    """Names from `start` to `end` along what each step uses; empty if there is no way."""
    if start == end:
        return [end]
    seen.add(start)
    for used in graph.steps[start].inputs if start in graph.steps else ():
        if used not in seen and (rest := _way(graph, used, end, seen)):
            return [start, *rest]
    return []


def _check_used(graph: Graph) -> None:
    used = {name for step in graph.steps.values() for name in step.inputs}
    for what, names in (("model", graph.models), ("step", list(graph.steps)[:-1])):
        for name in names:
            if name not in used:
                raise UserError(f"{what} {name} is used by no step: leave it out, or use it")
