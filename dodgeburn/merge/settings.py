"""What a merge is told besides its models: one set of settings for the Python API, the command line and recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dodgeburn.checkpoint.outside import Outside
from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem
from dodgeburn.merge.blocks import check_share
from dodgeburn.merge.methods import find_method
from dodgeburn.merge.presets import Convention, preset_name

KEEPABLE = ("text", "vae")
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8_e4m3fn": "F8_E4M3"}


class MergeSettings(BaseModel):
    """How models are merged. All shares are model B's: 0 = all A, 1 = all B.

    `preset` sets the U-Net's blocks (two as `NAME:NAME:SHARE`, between which they lie), `base` everything else (time
    and label embeddings, text encoders, VAE), `blocks` single blocks by name; without a preset every block is `base`
    (None: the method's default). `outside` names the rule for keys outside the U-Net's blocks (checkpoint/outside.py).
    `components` (unet, clip_l, clip_g, vae) and then `rules` (rules.py) replace shares; `keep` takes parts
    ("text", "vae") from A whatever the shares say. `params` are the method's numbers (methods/table.py), `seed` of
    random ones, which depend on it and on tensor names alone. `clip` bounds every value by A's and B's; `dtype`
    (fp32, fp16, bf16, fp8_e4m3fn) is the output's, A's for each tensor by default.

    Names are brought to one spelling. What needs the models' layout (block names, rules) is checked by the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "weighted_sum"
    preset: str | None = None
    base: float | None = None
    blocks: dict[str, float] = {}
    keep: tuple[str, ...] = ()
    xl_presets: Convention = "curve"
    outside: Outside = "dodgeburn"
    params: dict[str, float] = {}
    components: dict[str, float] = {}
    rules: tuple[str, ...] = ()
    seed: int = 0
    clip: bool = False
    dtype: str | None = None

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Settings from keywords; UserError that names the first wrong one."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UserError(first_problem(error, cls)) from None

    def but(self, **options: Any) -> MergeSettings:
        """These settings with some replaced, checked again."""
        return MergeSettings.of(**(self.model_dump() | options)) if options else self

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return find_method(value).name

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: str | None) -> str | None:
        return None if value is None else preset_name(value)

    @field_validator("base", mode="before")
    @classmethod
    def _base(cls, value: Any) -> float | None:
        return None if value is None else check_share(value, "base")

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return {} if value is None else value
        return {str(name).strip().upper(): check_share(share, f"block {name}") for name, share in value.items()}

    @field_validator("params", "components", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("keep", mode="before")
    @classmethod
    def _keep(cls, value: Any) -> Any:
        return check_keep(value)

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in DTYPES:
            raise UserError(f"no output type is named {value!r}: expected one of {', '.join(DTYPES)}")
        return value


def check_keep(keep: Iterable[str]) -> tuple[str, ...]:
    """The parts to keep of A, checked and in fixed order: any of "text" and "vae"."""
    wanted = [keep] if isinstance(keep, str) else list(keep)
    parts = {part.strip().lower() for text in wanted for part in text.split(",") if part.strip()}
    unknown = parts - set(KEEPABLE)
    if unknown:
        raise UserError(f"cannot keep {min(unknown)!r}: expected {' or '.join(KEEPABLE)}")
    return tuple(part for part in KEEPABLE if part in parts)
