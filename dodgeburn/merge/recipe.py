"""The recipe of a merge: everything that decides its bytes, by content hashes, never by local paths."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dodgeburn.checkpoint.metadata import NO_HASH
from dodgeburn.errors import UserError


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


class MergeRecipe(BaseModel):
    """How a file was merged. All shares are model B's: 0 = all A, 1 = all B.

    `blocks` has the resolved number of every block (BASE, IN00 …, M00, OUT00 …, VAE) and decides alone;
    `preset`, `base` and `xl_presets` say where the numbers came from. `keep` names the parts taken from A
    whatever the blocks say. `conventions` names the rule for keys outside the U-Net's blocks
    (checkpoint/layout.py). `counts` has the tensors that could not be merged, by kind.
    `components` and then `rules` replace blocks' numbers. `more` are the models after B, `base_model` the one
    that differences are taken from, `params` and `seed` the method's, `dtype` the output's where not A's.
    """

    model_config = ConfigDict(extra="ignore")
    kind: Literal["merge"] = "merge"
    version: int = 1
    tool: str = ""
    method: str = "weighted_sum"
    layout: str
    a: Parent
    b: Parent
    preset: str | None = None
    base: float
    xl_presets: Literal["curve", "cut"] = "curve"
    blocks: dict[str, float]
    keep: list[str] = []
    conventions: str = "dodgeburn"
    counts: dict[str, int] = {}
    more: list[Parent] = []
    base_model: Parent | None = None
    params: dict[str, float] = {}
    components: dict[str, float] = {}
    rules: list[str] = []
    seed: int = 0
    clip: bool = False
    dtype: str | None = None

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
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the text"
            raise UserError(f"not a merge recipe: {where}: {first['msg']}") from None
