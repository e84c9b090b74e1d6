"""The recipe of a merge: everything that decides its bytes, by content hashes, never by local paths."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dodgeburn.checkpoint.layout import VAE
from dodgeburn.checkpoint.metadata import NO_HASH, recipe_of
from dodgeburn.checkpoint.outside import OWN
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem
from dodgeburn.merge.graph import Graph, parse_graph
from dodgeburn.merge.plan import Plan
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.pocket.model import NAMES


def tool_version() -> str:
    """Name and version of this program, as recipes say it."""
    try:
        return f"dodgeburn {importlib.metadata.version('dodgeburn')}"
    except importlib.metadata.PackageNotFoundError:
        return "dodgeburn (not installed)"


class Parent(BaseModel):
    """One input: its file name without folders, the sha256 of the whole file, and its own recipe if it has
    one.
    """

    model_config = ConfigDict(extra="ignore")
    file: str
    sha256: str = NO_HASH
    recipe: dict[str, Any] | None = None

    @classmethod
    def of(cls, source: Tensors, sha256: str) -> Parent:
        """The parent that an opened file is."""
        return cls(file=source.path.name, sha256=sha256, recipe=recipe_of(source.header.metadata))


def resolved_settings(plan: Plan) -> dict[str, Any]:
    """A merge's settings as plain values, with every number that they left to defaults and presets."""
    base = plan.method.alpha if plan.settings.base is None else plan.settings.base
    resolved = {"base": base, "blocks": plan.blocks, "params": plan.params, "components": plan.components}
    return plan.settings.model_dump(mode="json") | resolved


class MergeRecipe(MergeSettings):
    """How a file was merged: the settings, resolved, and the models.

    `blocks` has the number of every block (BASE, IN00 …, M00, OUT00 …, VAE) and decides alone; `preset`, `base` and
    `xl_presets` say where the numbers came from. `counts` has the tensors that could not be merged, by kind. `more` are
    the models after B, `base_model` the one that differences are taken from.
    """

    model_config = ConfigDict(extra="ignore")
    kind: Literal["merge"] = "merge"
    version: int = 1
    tool: str = ""
    layout: str
    a: Parent
    b: Parent
    more: list[Parent] = []
    base_model: Parent | None = None
    base: float
    blocks: dict[str, float]
    counts: dict[str, int] = {}

    @classmethod
    def of_plan(cls, plan: Plan, parents: Sequence[Parent]) -> MergeRecipe:
        """The recipe of a merge of these models in the plan's order, the base last."""
        a, b, *more = parents
        return cls(
            **resolved_settings(plan),
            tool=tool_version(),
            layout=plan.layout.name,
            a=a,
            b=b,
            base_model=more.pop() if plan.method.needs_base else None,
            more=more,
            counts=plan.counts,
        )

    def a1111(self) -> dict[str, Any]:
        """What A1111's own recipe has words for."""
        return {
            "interp_method": "Weighted sum" if self.method == "weighted_sum" else self.method,
            "multiplier": self.base,
            "weights_alpha": ",".join(f"{share:g}" for name, share in self.blocks.items() if name not in OWN),
        }

    @property
    def models(self) -> list[Parent]:
        """A, B and further models, without the base."""
        return [self.a, self.b, *self.more]

    @property
    def files(self) -> list[str]:
        """File names of all models, the base last."""
        return [parent.file for parent in (*self.models, *([self.base_model] if self.base_model else []))]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and metadata."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> MergeRecipe:
        """Read a recipe; UserError that names the first wrong field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"not a merge recipe: {first_problem(error)}") from None


class GraphRecipe(BaseModel):
    """How a file was made by a recipe of several steps (graph.py): models by name, and steps in order, each resolved.

    A merge step has the fields of MergeSettings with every block's share, a bake step every block's weight.
    """

    model_config = ConfigDict(extra="ignore")
    kind: Literal["graph"] = "graph"
    version: int = 1
    tool: str = ""
    layout: str
    models: dict[str, Parent]
    steps: dict[str, dict[str, Any]]

    def a1111(self) -> dict[str, Any]:
        """What A1111's own recipe has words for."""
        return {"interp_method": "dodgeburn recipe", "multiplier": None, "steps": list(self.steps)}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and metadata."""
        return self.model_dump(mode="json")


def graph_of(recipe: Mapping[str, Any]) -> Graph:
    """The graph that a recipe in a file's metadata stands for, of any kind that can be run again.

    Models' paths are their file names, packaged models' their names. Raises UserError for recipes of other kinds and
    other programs, and for damaged ones.
    """
    kind = recipe.get("kind")
    try:
        if kind == "graph":
            models, steps = _of_graph(recipe)
        elif kind == "merge":
            models, steps = _of_merge(recipe)
        elif kind in ("bake", "delta_apply"):
            models, steps = _of_bake(recipe)
        else:
            raise UserError(f"a recipe of kind {kind!r} cannot be run: only merges, bakes and graphs of them")
        entries = {name: {"path": _path(parent.file), "sha256": parent.sha256} for name, parent in models.items()}
    except ValidationError as error:
        raise UserError(f"the recipe is damaged: {first_problem(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the recipe is damaged: {type(error).__name__} {error}") from None
    return parse_graph({"models": entries, "steps": steps})


def _of_graph(recipe: Mapping[str, Any]) -> tuple[dict[str, Parent], dict[str, dict[str, Any]]]:
    found = GraphRecipe.model_validate(recipe)
    steps = {}
    for name, step in found.steps.items():
        said = {key: value for key, value in step.items() if key not in ("counts", "added")}
        if "merge" in said:
            said |= {"blocks": _free(said.get("blocks") or {}, said.get("keep") or ())}
        else:
            said["preset"] = None  # the weights say it all
        steps[name] = said
    return found.models, steps


def _of_merge(recipe: Mapping[str, Any]) -> tuple[dict[str, Parent], dict[str, dict[str, Any]]]:
    found = MergeRecipe.model_validate(recipe)
    names = [chr(ord("a") + i) for i in range(2 + len(found.more))]
    models = dict(zip(names, [found.a, found.b, *found.more], strict=True))
    said: dict[str, Any] = {name: getattr(found, name) for name in MergeSettings.model_fields}
    said |= {"merge": names, "blocks": _free(found.blocks, found.keep)}
    if found.base_model is not None:
        models["base"] = found.base_model
        said["base_model"] = "base"
    return models, {"merged": said}


def _of_bake(recipe: Mapping[str, Any]) -> tuple[dict[str, Parent], dict[str, dict[str, Any]]]:
    models = {"model": Parent.model_validate(recipe["model"])}
    strengths = {}
    for i, one in enumerate(recipe["added"]):
        models[f"added{i + 1}"] = Parent.model_validate(one)
        strengths[f"added{i + 1}"] = one["strength"]
    return models, {"baked": {"bake": "model", "add": strengths, "blocks": recipe["blocks"]}}


def _free(blocks: Mapping[str, float], keep: Iterable[str]) -> dict[str, float]:
    """Block shares without the VAE's where it is kept anyway, which would be refused as a contradiction."""
    return {name: share for name, share in blocks.items() if name != VAE or "vae" not in keep}


def _path(file: str) -> str:
    name = Path(file).name
    stem = name.removesuffix(".safetensors")
    return stem if stem in NAMES and name != stem else name
