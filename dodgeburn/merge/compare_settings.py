"""What a comparison is told: which merges, which prompts and seeds, how pictures are made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from dodgeburn.errors import UserError
from dodgeburn.merge.blocks import check_share
from dodgeburn.merge.presets import Convention, preset_name, preset_names
from dodgeburn.merge.settings import check_keep
from dodgeburn.merge.variants import UNIFORM, MethodChoice, Variant, check_names, grid
from dodgeburn.pocket.captions import caption
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.prompt_file import read_prompts
from dodgeburn.sampling.loop import GenerateSettings

DRAWN_LIST = 96  # picture list that prompts of searches are drawn from; no other use, and no part of the gate


class CompareSettings(BaseModel):
    """What is compared: a grid of `methods` x `bases` x `presets`, and `variants` described one by one.

    `presets` as names ("all": the card's 16, "published": all 38, "none": every block at the base), `bases` B's shares
    outside the U-Net's blocks (None: the method's default), `methods` as `variants.MethodChoice` or its text. Without
    presets, bases or methods there is no grid.

    Raises UserError for an unknown preset or method, a base outside 0..1, no prompts, and bad or repeated seeds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    presets: tuple[str, ...] = ("all",)
    bases: tuple[float | None, ...] = (0.4, 0.5, 0.6)
    methods: tuple[MethodChoice, ...] = (MethodChoice(),)
    variants: tuple[Variant, ...] = ()
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    keep: tuple[str, ...] = ("text", "vae")  # A's text encoders and VAE, as the card did
    xl_presets: Convention = "curve"
    generate: GenerateSettings = GenerateSettings()

    @field_validator("presets", mode="before")
    @classmethod
    def _presets(cls, value: Iterable[str]) -> tuple[str, ...]:
        names: list[str] = []
        for name in [value] if isinstance(value, str) else value:
            word = name.strip().lower()
            if word in ("all", "published"):
                names += preset_names("card" if word == "all" else "published")
            else:
                names.append(UNIFORM if word == UNIFORM else preset_name(name))
        return tuple(dict.fromkeys(names))

    @field_validator("bases", mode="before")
    @classmethod
    def _bases(cls, value: Iterable[float | None]) -> tuple[float | None, ...]:
        return tuple(dict.fromkeys(None if base is None else check_share(base, "base") for base in value))

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Iterable[Any]) -> tuple[Any, ...]:
        found = [value] if isinstance(value, str) else value
        return tuple({str(m): m for m in (MethodChoice.parse(m) if isinstance(m, str) else m for m in found)}.values())

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Iterable[str]) -> tuple[str, ...]:
        return check_prompts(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Iterable[int]) -> tuple[int, ...]:
        return check_seeds(value)

    @field_validator("keep", mode="before")
    @classmethod
    def _keep(cls, value: str | Iterable[str]) -> tuple[str, ...]:
        return check_keep(value)

    @model_validator(mode="after")
    def _something(self) -> CompareSettings:
        if not self.variants:
            if not self.presets:
                raise UserError("no presets to compare: name some, or all, or published, or none for no preset")
            if not self.bases:
                raise UserError("no bases to compare: give at least one number from 0 to 1")
            if not self.methods:
                raise UserError("no methods to compare: name at least one")
        return self

    def all_variants(self, more: Sequence[str] = (), base_model: str | None = None) -> list[Variant]:
        """The grid's variants and then the described ones; UserError for names that are taken twice, and for models
        that no variant takes.
        """
        found = grid(self.methods, self.presets, self.bases, self.keep, self.xl_presets, more, base_model)
        found += self.variants
        check_names(found)
        used = {name for variant in found for name in (*variant.more, variant.base_model)}
        for name in (*more, *([] if base_model is None else [base_model])):
            if name not in used:
                raise UserError(f"{name} has no effect: no variant's method takes it")
        return found


def check_prompts(value: Iterable[str]) -> tuple[str, ...]:
    """Prompts with single spaces, none twice; UserError if there are none."""
    prompts = tuple(dict.fromkeys(" ".join(prompt.split()) for prompt in value if prompt.strip()))
    if not prompts:
        raise UserError("no prompts to compare with: give at least one")
    return prompts


def check_seeds(value: Iterable[int]) -> tuple[int, ...]:
    """Seeds in 0..2^64 - 1; UserError for others, for none, and for one given twice."""
    seeds = tuple(int(seed) for seed in value)
    if not seeds:
        raise UserError("no seeds to compare with: give at least one")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed is {seed}: give a whole number from 0 to 2^64 - 1")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seed {max(seeds, key=seeds.count)} is given twice: each seed counts once")
    return seeds


def drawn_prompts(n: int) -> tuple[str, ...]:
    """The first n of a fixed list of pocket-world prompts that each name at least four attributes; never the gate's."""
    gate = json.loads(files("dodgeburn.pocket").joinpath("gate_prompts.json").read_text(encoding="utf-8"))
    never = {row["prompt"] for row in gate}
    found: list[str] = []
    for i in itertools.count():
        text, asked = caption(attributes_of(i, DRAWN_LIST), np.random.default_rng([DRAWN_LIST, i]))
        if len(asked) >= 4 and text not in never and text not in found:
            found.append(text)
            if len(found) >= n:
                break
    return tuple(found)


def packaged_prompts() -> tuple[str, ...]:
    """The package's own eight, which `examples/compare-prompts.txt` repeats."""
    with as_file(files("dodgeburn.pocket").joinpath("compare_prompts.txt")) as path:
        return read_prompts(path)
