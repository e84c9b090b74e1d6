"""Shares by component and by rules on tensor names, over the shares of the blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.errors import UserError, near_names
from dodgeburn.merge.blocks import check_share

# What users call the components, and what layouts do.
COMPONENTS = {"unet": "unet", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "vae": "vae"}
_NOT = re.compile(r"not\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """`BLOCKS:WORDS:SHARE`: tensors of these blocks whose names have one of these words get this share.

    Either part may be empty (all), or begin with NOT (all others). Blocks are names and ranges in the model's
    order (IN04-IN08). As supermerger's elemental merge.
    """

    text: str
    blocks: frozenset[str] | None
    not_blocks: bool
    words: tuple[str, ...]
    not_words: bool
    share: float

    def matches(self, key: str, block: str) -> bool:
        if self.blocks is not None and (block in self.blocks) == self.not_blocks:
            return False
        return not self.words or any(word in key for word in self.words) != self.not_words


def parse_rules(texts: Sequence[str], layout: Layout) -> tuple[Rule, ...]:
    """Rules from their texts; UserError for anything that is not BLOCKS:WORDS:SHARE."""
    return tuple(_parse(text, layout) for text in texts)


def _parse(text: str, layout: Layout) -> Rule:
    parts = text.split(":")
    if len(parts) != 3:
        raise UserError(f"rule {text!r} is not BLOCKS:WORDS:SHARE, such as IN04-IN08:attn2:0.3 or ::0.3")
    not_blocks, names = _negated(parts[0])
    not_words, words = _negated(parts[1])
    if (not_blocks and not names) or (not_words and not words):
        raise UserError(f"rule {text!r} has NOT without anything after it")
    blocks = {block for name in names for block in _range(name.upper(), layout, text)}
    share = check_share(parts[2], f"the share of rule {text!r}")  # type: ignore[arg-type]
    return Rule(text, frozenset(blocks) if names else None, not_blocks, tuple(words), not_words, share)


def _negated(text: str) -> tuple[bool, list[str]]:
    text = text.strip()
    negated = _NOT.match(text + " ")
    rest = text[negated.end() :] if negated and negated.end() <= len(text) else "" if negated else text
    return negated is not None, [part.strip() for part in rest.split(",") if part.strip()]


def _range(name: str, layout: Layout, text: str) -> list[str]:
    first, dash, last = name.partition("-")
    order = list(layout.all_blocks)
    for one in (first, last) if dash else (first,):
        if one not in order:
            near = near_names(one, order, cutoff=0.6) or order[:3]
            raise UserError(f"rule {text!r}: {layout.title} has no block {one!r}: did you mean {', '.join(near)}?")
    start, end = order.index(first), order.index(last if dash else first)
    if end < start:
        raise UserError(f"rule {text!r}: {first} comes after {last}")
    return order[start : end + 1]


def check_components(shares: Mapping[str, float], layout: Layout) -> dict[str, float]:
    """Shares by component, named unet, clip_l, clip_g, vae; UserError for others and for shares outside 0..1."""
    out = {}
    for name, share in shares.items():
        wanted = name.strip().lower()
        if wanted not in COMPONENTS or (wanted == "clip_g" and len(layout.text_prefixes) < 2):
            has = [c for c in COMPONENTS if c != "clip_g" or len(layout.text_prefixes) > 1]
            raise UserError(f"{layout.title} has no component {name!r}: expected one of {', '.join(has)}")
        out[wanted] = check_share(share, f"component {wanted}")
    return out


def component_share(key: str, layout: Layout, shares: Mapping[str, float]) -> float | None:
    """The share that the tensor's component was given, if any."""
    component = layout.component(key)
    for name, share in shares.items():
        if COMPONENTS[name] == component:
            return share
    return None
