"""A recipe in a file's metadata as a tree of words: every step with how it was done, every parent with its own recipe.

The metadata may come from anybody: what isn't as expected is shown as it is or left out, never an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dodgeburn.checkpoint.outside import OWN
from dodgeburn.errors import UserError
from dodgeburn.merge.presets import preset_alphas
from dodgeburn.merge.settings import MergeSettings

MAX_DEPTH = 40
_STEP = "    "
_SHOWN = 6  # single blocks' shares


def recipe_lines(recipe: Mapping[str, Any], indent: str = "  ", depth: int = 0) -> list[str]:
    """A recipe of ours as a tree of parents; other recipes as their plain values."""
    if depth > MAX_DEPTH:
        return [f"{indent}… (parents of parents, not shown)"]
    kind = recipe.get("kind")
    if kind == "graph" and isinstance(recipe.get("steps"), dict) and recipe["steps"]:
        return _Graph(recipe, depth).lines(indent)
    if kind in ("bake", "delta_apply") and isinstance(recipe.get("added"), list):
        return _bake(recipe, indent, depth)
    if kind == "merge":
        parents = {"A": recipe.get("a"), "B": recipe.get("b")}
        more = recipe.get("more")
        parents |= {chr(ord("C") + i % 20): one for i, one in enumerate(more if isinstance(more, list) else [])}
        parents |= {"base": recipe["base_model"]} if recipe.get("base_model") else {}
        lines = [indent + _how(recipe)]
        for name, parent in parents.items():
            lines += _parent(f"{indent}{name} = ", parent, indent, depth)
        return lines
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict | list)}
    lines = [f"{indent}{_plain(key)}: {_plain(value)}" for key, value in plain.items()]
    for name in ("tuned", "base"):  # of a delta
        if isinstance(recipe.get(name), dict):
            lines += _parent(f"{indent}{name} = ", recipe[name], indent, depth)
    return lines


def _parent(begin: str, parent: Any, indent: str, depth: int) -> list[str]:
    parent = parent if isinstance(parent, dict) else {}
    lines = [f"{begin}{_plain(parent.get('file'))} (sha256 {_plain(parent.get('sha256'))[:10]})"]
    if isinstance(parent.get("recipe"), dict):
        lines += recipe_lines(parent["recipe"], indent + _STEP, depth + 1)
    return lines


def _plain(value: Any) -> str:
    """One line of printable text, whatever the value is."""
    return "".join(c if c.isprintable() else "?" for c in str(value))[:300]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else _plain(value)


def _how(step: Mapping[str, Any]) -> str:
    """A merge's settings in words, those left out that have their defaults."""
    keep = step.get("keep")
    words = [_plain(step.get("preset") or "no preset"), f"base {_number(step.get('base'))}"]
    words.append(f"kept of A: {', '.join(map(_plain, keep)) if isinstance(keep, list) and keep else 'nothing'}")
    words += _own_blocks(step)
    told = ("method", "preset", "base", "blocks", "keep")
    for name, field in MergeSettings.model_fields.items():
        value = step.get(name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if name not in told and value != field.default:
            words.append(f"{name.replace('_', ' ')}: {_listed(value)}")
    return f"{_plain(step.get('method'))}: {', '.join(words)}"


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_plain(key)}={_number(inner)}" for key, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, tuple) else _number(value)


def _own_blocks(step: Mapping[str, Any]) -> list[str]:
    """Shares of single blocks that neither preset nor base explains."""
    blocks = step.get("blocks")
    if not isinstance(blocks, dict):
        return []
    unet = [name for name in blocks if name not in ("BASE", "VAE", *OWN)]
    shares: Sequence[Any] = [step.get("base")] * len(unet)
    if step.get("preset"):
        n_in, n_out = (sum(name.startswith(side) for name in unet) for side in ("IN", "OUT"))
        try:
            shares = preset_alphas(str(step["preset"]), n_in, n_out, step.get("xl_presets", "curve"))
        except (UserError, ArithmeticError):
            return []
    own = [name for name, share in zip(unet, shares, strict=False) if blocks[name] != share]
    if len(own) > _SHOWN:
        return [f"{len(own)} blocks with shares of their own"]
    return [f"{_plain(name)}={_number(blocks[name])}" for name in own]


def _weights(step: Mapping[str, Any]) -> str:
    blocks = step.get("blocks")
    items = blocks.items() if isinstance(blocks, dict) else ()
    said = [f"{_plain(name)} x {_number(weight)}" for name, weight in items if weight != 1.0]
    return ", ".join(said) or "all blocks x 1"


def _bake(recipe: Mapping[str, Any], indent: str, depth: int) -> list[str]:
    lines = [f"{indent}{_plain(recipe['kind'])}: {_weights(recipe)}"]
    lines += _parent(f"{indent}model = ", recipe.get("model"), indent, depth)
    for one in recipe["added"]:
        one = one if isinstance(one, dict) else {}
        sha256 = _plain(one.get("sha256"))[:10]
        title = _plain(one.get("title"))
        lines.append(f"{indent}+ {_plain(one.get('strength'))} x {_plain(one.get('file'))} ({title}, sha256 {sha256})")
    return lines


class _Graph:
    """A recipe of several steps, from its output down; a step that is used again is not told again."""

    def __init__(self, recipe: Mapping[str, Any], depth: int) -> None:
        self._steps: Mapping[str, Any] = recipe["steps"]
        models = recipe.get("models")
        self._models: Mapping[str, Any] = models if isinstance(models, dict) else {}
        self._depth = depth
        self._told: set[str] = set()

    def lines(self, indent: str) -> list[str]:
        return list(self._node("", list(self._steps)[-1], indent, self._depth))

    def _node(self, role: str, name: str, indent: str, depth: int) -> Iterator[str]:
        step = self._steps.get(name)
        if not isinstance(step, dict):
            yield from _parent(f"{indent}{role}{_plain(name)} = ", self._models.get(name), indent, depth)
            return
        if name in self._told or depth > MAX_DEPTH:
            yield f"{indent}{role}step {_plain(name)}, as above"
            return
        self._told.add(name)
        if "bake" in step:
            yield f"{indent}{role}step {_plain(name)} = bake: {_weights(step)}"
            yield from self._node("model: ", str(step["bake"]), indent + _STEP, depth + 1)
            strengths = step.get("add")
            for used, strength in strengths.items() if isinstance(strengths, dict) else ():
                role = f"+ {_plain(strength)} x "
                yield from self._node(role, str(used), indent + _STEP, depth + 1)
            return
        yield f"{indent}{role}step {_plain(name)} = {_how(step)}"
        inputs = step.get("merge")
        for i, used in enumerate(inputs if isinstance(inputs, list) else []):
            yield from self._node(f"{chr(ord('A') + i % 26)}: ", str(used), indent + _STEP, depth + 1)
        if step.get("base_model"):
            yield from self._node("base: ", str(step["base_model"]), indent + _STEP, depth + 1)
