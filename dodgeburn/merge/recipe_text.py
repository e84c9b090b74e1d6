"""Recipes as text: read from TOML, YAML or JSON, and written as TOML that reads back as the same recipe."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError
from dodgeburn.merge.graph import VERSION, Graph, parse_graph

ENDINGS = (".toml", ".yaml", ".yml", ".json")
MAX_TEXT = 4_000_000  # bytes; a recipe with every block's share of a hundred steps takes a tenth of it
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def is_recipe_name(name: str | Path) -> bool:
    """Whether a file of this name is taken for a recipe; an index of shards is none."""
    return str(name).lower().endswith(ENDINGS) and not re.search(r"\.index(\.\w+)?\.json$", str(name))


def read_recipe(path: str | Path) -> Graph:
    """The recipe in a .toml, .yaml or .json file; UserError that names file, step and what is wrong."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_TEXT:
            raise UserError(f"{path} takes {path.stat().st_size:,} bytes: too long for a recipe")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: expected a recipe in UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a recipe") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return parse_graph(_parsed(text, path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parsed(text: str, path: Path) -> Any:
    if path.suffix.lower() == ".toml":
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid TOML: {_one_line(error)}") from None
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {_one_line(error)}") from None


def _loader() -> Any:
    """YAML's safe loader, which also refuses a name given twice (its last meaning would win) and aliases (a few bytes
    of which can stand for gigabytes).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise UserError("YAML aliases (*name) are not read: write it out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"the name {name!r} is given twice")
            return super().construct_mapping(node, deep)

    return Loader


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_toml(graph: Graph) -> str:
    """The recipe as TOML; `parse_graph(tomllib.loads(to_toml(g))) == g`."""
    plain = graph.as_dict()
    lines = [f"dodgeburn = {VERSION}"]
    for name, entry in plain["models"].items():
        lines += ["", f"[models.{_key(name)}]", *(f"{key} = {_value(value)}" for key, value in entry.items())]
    for name, step in plain["steps"].items():
        first = sorted(step.items(), key=lambda item: item[0] not in ("merge", "base_model", "bake"))
        lines += ["", f"[steps.{_key(name)}]", *(f"{key} = {_value(value)}" for key, value in first)]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # enough digits to read back as the same number
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(_value(inner) for inner in value) + "]"
