"""Which published preset, base and rule for keys outside the blocks an estimate of shares comes nearest to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dodgeburn.checkpoint.outside import NOT_MERGED, RULES, Outside
from dodgeburn.merge.estimate import TEXT_OTHER, Estimate, Part
from dodgeburn.merge.presets import CONVENTIONS, Convention, preset_alphas, preset_names

CLOSE = 0.01  # shares within it are the same
ERRORS = 4.0  # or within so many standard errors
NOTHING = "none"  # every block at one share


@dataclass(frozen=True)
class Nearest:
    """The preset nearest to the estimated shares of the U-Net's blocks.

    `names` are those whose numbers are the same in all blocks that are determined, with the SDXL convention ("none" for
    one share everywhere). `apart` is the root mean square distance of the shares, weighted as the fit's error would
    grow; `worst` the largest, in `block`. `fits`: no block is further than CLOSE or ERRORS standard errors.
    """

    names: tuple[tuple[str, Convention | None], ...]
    apart: float
    worst: float
    block: str
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "presets": [{"name": name, "xl_presets": rule} for name, rule in self.names],
            "apart": self.apart, "worst": self.worst, "block": self.block, "fits": self.fits,
        }  # fmt: skip


def nearest_preset(found: Estimate) -> Nearest | None:
    """The nearest of all 38 presets, in both SDXL conventions, and of one share everywhere; None if no block's share is
    determined.
    """
    parts = {block: found.parts[block] for block in found.layout.blocks if block in found.parts}
    known = {block: part for block, part in parts.items() if part.share is not None}
    if not known:
        return None
    candidates: dict[tuple[float, ...], list[tuple[str, Convention | None]]] = {}
    rules: tuple[Convention, ...] = CONVENTIONS if found.layout.name == "sdxl" else ("curve",)
    for rule in rules:
        for name in preset_names("published"):
            values = dict(zip(found.layout.blocks, _numbers(found, name, rule), strict=True))
            numbers = tuple(values[block] for block in known)
            candidates.setdefault(numbers, []).append((name, rule if found.layout.name == "sdxl" else None))
    candidates.setdefault((_mean(known.values()),) * len(known), []).append((NOTHING, None))
    ranked = sorted((_judge(numbers, names, known) for numbers, names in candidates.items()), key=lambda n: n.apart)
    fitting = [one for one in ranked if one.fits]
    # One share everywhere has a number to choose and so is always a little nearer: a preset that fits comes first.
    return next((one for one in fitting if one.names[0][0] != NOTHING), (fitting or ranked)[0])


def _numbers(found: Estimate, name: str, rule: Convention) -> list[float]:
    return preset_alphas(name, found.layout.n_in, found.layout.n_out, rule)


def _mean(parts: Iterable[Part]) -> float:
    """The one share that fits best, by least squares over all parts."""
    of_parts = list(parts)
    total = sum(part.weight for part in of_parts)
    return sum(part.weight * (part.share or 0.0) for part in of_parts) / total


def _judge(numbers: tuple[float, ...], names: list[tuple[str, Convention | None]], known: dict[str, Part]) -> Nearest:
    apart = {
        block: abs((part.share or 0.0) - number) for (block, part), number in zip(known.items(), numbers, strict=True)
    }
    total = sum(part.weight for part in known.values())
    mean = (sum(known[block].weight * far**2 for block, far in apart.items()) / total) ** 0.5
    worst = max(apart, key=lambda block: apart[block])
    fits = all(far <= max(CLOSE, ERRORS * (known[block].error or 0.0)) for block, far in apart.items())
    return Nearest(tuple(names), mean, apart[worst], worst, fits)


# -------------------- what else a merge is told


@dataclass(frozen=True)
class Rest:
    """The settings besides the preset: the rule for keys outside the blocks, base (None where nothing depends on it),
    and the parts kept from A.
    """

    outside: Outside
    base: float | None
    keep: tuple[str, ...]


_PARTS = {
    "time_embed": ("time_embed",), "label_emb": ("label_emb",), "out": ("out",), "text": ("clip_l", "clip_g"),
    "text_other": (TEXT_OTHER,), "vae": ("VAE",),
}  # fmt: skip


def rest_of(found: Estimate, near: Nearest) -> Rest | None:
    """Settings that give the parts outside the U-Net's blocks their shares, the project's own rule first; None if there
    are none: several bases, for instance, or shares by component.
    """
    for outside in RULES:
        rest = _by_rule(found, near, outside)  # type: ignore[arg-type]
        if rest is not None:
            return rest
    return None


def _by_rule(found: Estimate, near: Nearest, outside: Outside) -> Rest | None:
    layout = replace(found.layout, outside=outside)
    homes = {kind: block for block, kinds in layout.held.items() for kind in kinds}
    bare = RULES[outside].weights_only and layout.name == "sdxl"
    homes["text_other"] = NOT_MERGED if bare else homes["text"]
    free: dict[str, list[Part]] = {}  # follow base, by kind
    for kind, home in homes.items():
        parts = [found.parts[name] for name in _PARTS[kind] if name in found.parts]
        parts = [part for part in parts if part.share is not None]
        home_share = found.parts[home].share if home in layout.blocks and home in found.parts else None
        if home == NOT_MERGED or home_share is not None:
            if not all(_is(part, home_share or 0.0) for part in parts):
                return None
        elif home not in layout.blocks:
            free[kind] = parts
    text = free.get("text", []) + free.pop("text_other", [])
    kept = []
    for word, parts in (("text", text), ("vae", free.get("vae", []))):
        if parts and all(_is(part, 0.0) for part in parts):
            kept.append(word)
            free.pop(word)
    if "text" in free:
        free["text"] = text
    rest = [part for parts in free.values() for part in parts]
    flat = _mean(found.parts[block] for block in layout.blocks if _known(found, block))
    base = flat if near.names[0][0] == NOTHING else rest[0].share if rest else 0.0 if kept else None
    if base is None:
        return Rest(outside, None, ())
    if not all(_is(part, base) for part in rest):
        return None
    # A base of 0 keeps everything by itself.
    return Rest(outside, min(1.0, max(0.0, base)), tuple(kept) if abs(base) > CLOSE else ())


def _known(found: Estimate, block: str) -> bool:
    return block in found.parts and found.parts[block].share is not None


def _is(part: Part, share: float) -> bool:
    return abs((part.share or 0.0) - share) <= max(CLOSE, ERRORS * (part.error or 0.0))
