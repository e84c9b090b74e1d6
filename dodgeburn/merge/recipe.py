"""The recipe of a merge: everything that decides its bytes, by content hashes, never by local paths."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dodgeburn.checkpoint.metadata import NO_HASH, recipe_of
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.plan import Plan
from dodgeburn.merge.settings import MergeSettings, first_problem


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


class MergeRecipe(MergeSettings):
    """How a file was merged: the settings, resolved, and the models.

    `blocks` has the number of every block (BASE, IN00 …, M00, OUT00 …, VAE) and decides alone; `preset`, `base` and
    `xl_presets` say where the numbers came from. `conventions` names the rule for keys outside the U-Net's blocks
    (checkpoint/layout.py). `counts` has the tensors that could not be merged, by kind. `more` are the models after B,
    `base_model` the one that differences are taken from.
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
    conventions: str = "dodgeburn"
    counts: dict[str, int] = {}

    @classmethod
    def of_plan(cls, plan: Plan, parents: Sequence[Parent]) -> MergeRecipe:
        """The recipe of a merge of these models in the plan's order, the base last."""
        a, b, *more = parents
        resolved = {"blocks": plan.blocks, "params": plan.params, "components": plan.components}
        base = plan.method.alpha if plan.settings.base is None else plan.settings.base
        return cls(
            **(plan.settings.model_dump() | resolved | {"base": base}),
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
            "weights_alpha": ",".join(f"{share:g}" for share in self.blocks.values()),
        }

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
