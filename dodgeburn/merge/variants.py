"""The merges that a comparison looks at: a grid of methods, presets and bases, and variants described one by one."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem
from dodgeburn.merge.methods import find_method
from dodgeburn.merge.presets import Convention
from dodgeburn.merge.settings import MergeSettings

UNIFORM = "none"  # the preset that is none: every block has the base's share
FOUND = "search-"  # how the names of merges that a search proposed begin
_NAME = re.compile(r"[^\w.+-]+")
_LONGEST = 80  # letters of a name, which is a file's too


class MethodChoice(BaseModel):
    """A method with its numbers: `NAME[:PARAMETER=NUMBER ...][:seed=N][:clip]`, such as ties:density=0.1:clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str = "weighted_sum"
    params: dict[str, float] = {}
    seed: int = 0
    clip: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """The choice from its text; UserError for unknown methods and parameters and numbers out of range."""
        name, *options = (part.strip() for part in text.split(":"))
        found = find_method(name)
        params: dict[str, float] = {}
        seed, clip = 0, False
        for option in options:
            key, equals, number = (part.strip() for part in option.partition("="))
            try:
                if key == "clip" and not equals:
                    clip = True
                elif key == "seed":
                    seed = int(number)
                else:
                    params[key] = float(number)
            except ValueError:
                raise UserError(
                    f"method {text!r}: {option!r} is not NAME=NUMBER, seed=N or clip, as in ties:density=0.1:clip"
                ) from None
        found.check_params(params)
        return cls(method=found.name, params=params, seed=seed, clip=clip)

    def __str__(self) -> str:
        parts = [self.method, *(f"{name}={value:g}" for name, value in sorted(self.params.items()))]
        parts += [f"seed={self.seed}"] if self.seed else []
        return ":".join([*parts, "clip"] if self.clip else parts)


class Variant(BaseModel):
    """One merge to look at: its name (also that of its pictures' file), how it is merged, and the models it takes
    besides A and B, as they were given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    merge: MergeSettings
    more: tuple[str, ...] = ()
    base_model: str | None = None

    @property
    def choice(self) -> MethodChoice:
        """Its method with the numbers."""
        merge = self.merge
        return MethodChoice(method=merge.method, params=merge.params, seed=merge.seed, clip=merge.clip)

    @property
    def base(self) -> float:
        """Its base, resolved."""
        return find_method(self.merge.method).alpha if self.merge.base is None else self.merge.base


def grid(
    methods: Sequence[MethodChoice],
    presets: Sequence[str],
    bases: Sequence[float | None],
    keep: tuple[str, ...],
    xl_presets: Convention,
    more: Sequence[str] = (),
    base_model: str | None = None,
) -> list[Variant]:
    """Every method with every base and preset, in this order. A base of None is the method's default, the preset
    "none" is every block at the base. Methods take as many of `more` as they can, and the base model if they need it.
    """
    out: dict[str, Variant] = {}
    for choice in methods:
        extra, original = models_for(choice.method, more, base_model)
        for base in bases:
            for preset in presets:
                named = None if preset == UNIFORM else preset
                merge = MergeSettings.of(
                    **choice.model_dump(), preset=named, base=base, keep=keep,
                    xl_presets=xl_presets if named else "curve",
                )  # fmt: skip
                name = grid_name(choice, named, find_method(choice.method).alpha if base is None else base)
                out.setdefault(name, Variant(name=name, merge=merge, more=extra, base_model=original))
    return list(out.values())


def grid_name(choice: MethodChoice, preset: str | None, base: float) -> str:
    """GradV-0.4 for the weighted sum, ties-density-0.1-GradV-0.4 for others."""
    words = [] if str(choice) == "weighted_sum" and preset else [re.sub("[:=]", "-", str(choice))]
    return _NAME.sub("-", "-".join([*words, *([preset] if preset else []), f"{base:g}"]))


def models_for(method: str, more: Sequence[str], base_model: str | None) -> tuple[tuple[str, ...], str | None]:
    """Which of the further models the method takes, and the base model if it needs one."""
    found = find_method(method)
    return tuple(more[: found.models[1] - 2]), base_model if found.needs_base else None


# ------------------------------------------------------------------------------------------- a file of variants


def read_variants(path: str | Path, more: Sequence[str] = (), base_model: str | None = None) -> tuple[Variant, ...]:
    """Variants from a .toml, .yaml, .yml or .json file: a list `variant` of tables with a `name` and any of the
    settings of a merge (method, preset, base, blocks, keep, params, components, rules, seed, clip, dtype, xl_presets),
    and a table `defaults` for all. `also` and `base_model` replace the command line's models for a variant.

    Raises UserError that names the file, the variant and what is wrong.
    """
    found = _load(Path(path))
    if not isinstance(found, Mapping) or not isinstance(found.get("variant"), list) or not found["variant"]:
        raise UserError(f"{path} has no list of variants: expected [[variant]] tables, each with a name")
    for key in found.keys() - {"variant", "defaults"}:
        raise UserError(f"{path}: there is no {key!r}: expected [[variant]] tables and [defaults]")
    defaults = found.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise UserError(f"{path}: defaults is not a table")
    return tuple(_described(Path(path), found["variant"], dict(defaults), more, base_model))


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if path.suffix.lower() == ".json":
            return json.loads(text)
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise UserError(f"{path} cannot be read: {error}") from None
    raise UserError(f"{path}: expected a file of variants that ends in .toml, .yaml or .json")


def _described(
    path: Path, tables: Sequence[Any], defaults: Mapping[str, Any], more: Sequence[str], base_model: str | None
) -> Iterator[Variant]:
    for number, table in enumerate(tables, 1):
        if not isinstance(table, Mapping):
            raise UserError(f"{path}: variant {number} is not a table")
        options = {**defaults, **table}
        name = str(options.pop("name", "")).strip()
        if not name:
            raise UserError(f"{path}: variant {number} has no name")
        try:
            given, original = options.pop("also", None), options.pop("base_model", None)
            merge = MergeSettings.of(**options)
            extra, base = models_for(merge.method, more, base_model)
            if given is not None:
                extra = (given,) if isinstance(given, str) else tuple(given)
            yield Variant(name=name, merge=merge, more=extra, base_model=base if original is None else original)
        except ValidationError as error:
            raise UserError(f"{path}: variant {name}: {first_problem(error)}") from None
        except (UserError, TypeError) as error:
            raise UserError(f"{path}: variant {name}: {error}") from None


def check_names(variants: Sequence[Variant]) -> None:
    """UserError for a name that is taken, or that cannot be a file's."""
    seen = {"a", "b"}
    for variant in variants:
        if _NAME.search(variant.name) or variant.name.startswith((".", "-")) or len(variant.name) > _LONGEST:
            raise UserError(
                f"{variant.name!r} cannot name a variant: expected at most {_LONGEST} letters, digits, and . _ - + "
                "within, as files have"
            )
        if variant.name.startswith(FOUND):
            raise UserError(f"{variant.name!r} cannot name a variant: {FOUND} begins the names that a search gives")
        if variant.name.lower() in seen:
            raise UserError(f"two variants are named {variant.name}: names must differ, and A and B are taken")
        seen.add(variant.name.lower())
