"""Settings as somebody gave them: read from YAML files, and what a schema (pydantic) refuses of them said in one line.

The line names the setting, what it was and what to give. Every schema of the package is spoken for here: options of the
command line, YAML and TOML files, metadata of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from dodgeburn.errors import UserError, near_names

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

_BOUNDS = ("gt", "ge", "lt", "le")
_NAMED = 8  # known names that are listed where none is near
_LONGEST = 80  # characters of a value that are shown
_WORDS = {
    "int": "a whole number", "float": "a number", "finite_number": "a finite number", "bool": "true or false",
    "string": "text", "list": "a list", "tuple": "a list", "dict": "a mapping", "model": "a mapping",
    "mapping": "a mapping", "path": "a path", "set": "a list",
}  # fmt: skip


def read_yaml(path: Path, what: str, wanted: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. what: which file was expected; wanted: what must stand in it. UserError."""
    import yaml

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: expected {what}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(said, dict) or not said:
        raise UserError(f"{path} is empty or no mapping: expected {wanted}")
    return said


def nearest(given: str, known: Sequence[str]) -> str:
    """What to say behind "X is not known": the name that was meant, or else what there is, not more than a few."""
    near = near_names(given, known, n=1, cutoff=0.6)
    if near:
        return f": did you mean {near[0]}?"
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return f": expected one of {', '.join(known[:_NAMED])}{more}" if known else ""


def first_problem(
    error: ValidationError, schema: type[BaseModel] | None = None, spelled: Callable[[str], str] = str
) -> str:
    """The first thing that pydantic found wrong, in one line.

    schema: what was filled in; with it, ranges are said whole and names that are near are proposed. spelled: how the
    setting is named where it was given, "rank" as "--lora", say.
    """
    first: Mapping[str, Any] = error.errors()[0]
    where: Sequence[Any] = first["loc"]
    name = spelled(".".join(str(part) for part in where)) if where else ""
    fields, field = _find(schema, where)
    kind, given = str(first["type"]), first.get("input")
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return f"{name} is not known{nearest(str(where[-1]), fields)}"
    if kind in ("value_error", "assertion_error"):  # one of our own checks has said it already
        said = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return f"{name}: {said}" if name else said
    return f"{name or 'the text'} is {_shown(given)}: expected {_expected(kind, first.get('ctx', {}), field, first)}"


def _find(schema: type[BaseModel] | None, where: Sequence[Any]) -> tuple[list[str], FieldInfo | None]:
    """The settings that there are beside the one at `where`, and that one."""
    for step, part in enumerate(where):
        if schema is None:
            break
        found = schema.model_fields.get(str(part))
        if step == len(where) - 1:
            return list(schema.model_fields), found
        schema = _schema_in(found.annotation) if found is not None else None
    return [], None


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """The schema that a field holds, also `Schema | None`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and get_origin(kind) is None and hasattr(kind, "model_fields"):
            return kind
    return None


def _expected(kind: str, context: Mapping[str, Any], field: FieldInfo | None, first: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return f"one of {str(context['expected']).replace(' or ', ', ')}"
    if kind == "string_too_short" and context.get("min_length") == 1:
        return "text"
    bounds = {key: context[key] for key in _BOUNDS if key in context}
    if bounds:
        for limit in field.metadata if field is not None else ():
            bounds |= {key: getattr(limit, key) for key in _BOUNDS if getattr(limit, key, None) is not None}
        whole = field is not None and int in (field.annotation, *get_args(field.annotation))
        return f"{'a whole number' if whole else 'a number'} {_range(bounds)}"
    word = _WORDS.get(kind) or _WORDS.get(kind.rpartition("_")[0]) or _WORDS.get(kind.partition("_")[0])
    message = str(first["msg"])
    return word or f"something else ({message[:1].lower()}{message[1:]})"


def _range(bounds: Mapping[str, Any]) -> str:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None:
        return f"of {high:g} at most" if "le" in bounds else f"below {high:g}"
    under = f"from {low:g}" if "ge" in bounds else f"above {low:g}"
    if high is None:
        return f"{under} up" if "ge" in bounds else under
    return f"{under} to {high:g}" if "le" in bounds else f"{under}, but below {high:g}"


def _shown(given: Any) -> str:
    if given == "":
        return "empty"
    if isinstance(given, float) and math.isfinite(given):
        return f"{given:g}"
    text = repr(given)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
