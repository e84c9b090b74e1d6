"""Every block's alpha, the share of model B, from a preset, a base and single numbers.

Which key is in which block is the layout's knowledge (`Layout.block`), by the rule that `Layout.outside` names.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.outside import NOT_MERGED
from dodgeburn.errors import UserError, near_names
from dodgeburn.merge.presets import Convention, preset_alphas


def check_share(value: float, what: str) -> float:
    """The value as float; UserError unless it is a number in 0..1."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{what} is {value!r}: expected a number from 0 (all A) to 1 (all B)") from None
    if not math.isfinite(number) or not 0.0 <= number <= 1.0:
        raise UserError(f"{what} is {value}: expected a number from 0 (all A) to 1 (all B)")
    return number


def alphas(
    layout: Layout,
    preset: str | None = None,
    base: float = 0.5,
    blocks: Mapping[str, float] | None = None,
    xl_presets: Convention = "curve",
) -> dict[str, float]:
    """Alpha by block name, for every block of the layout: BASE, IN00 …, M00, OUT00 …, VAE; 0 = all A, 1 =
    all B.

    The preset sets the U-Net's blocks and nothing else; without one they are all `base`. All others are `base`, but
    NOT_MERGED, which is 0. `blocks` then replaces single blocks by name, or those that a pattern matches (`OUT*`); in
    whatever order they stand, a pattern of fewer blocks wins over one of more, and a name over patterns. `xl_presets`
    says how the SD1.5 presets become 19 blocks (see presets). Raises UserError for shares outside 0..1, unknown presets
    and unknown block names.
    """
    base = check_share(base, "base")
    if preset is None:
        shares = [base] * len(layout.blocks)
    else:
        shares = preset_alphas(preset, layout.n_in, layout.n_out, xl_presets)
    out = dict.fromkeys(layout.all_blocks, base) | dict(zip(layout.blocks, shares, strict=True))
    if NOT_MERGED in out:
        out[NOT_MERGED] = 0.0
    given = [
        (_find_blocks(layout, name), check_share(share, f"block {name}")) for name, share in (blocks or {}).items()
    ]
    for found, share in sorted(given, key=lambda one: -len(one[0])):
        out |= dict.fromkeys(found, share)
    return out


def _find_blocks(layout: Layout, name: str) -> list[str]:
    wanted = name.strip().upper()
    if found := fnmatch.filter(layout.all_blocks, wanted):
        return found
    near = near_names(wanted, layout.all_blocks, cutoff=0.6) or [
        layout.blocks[0],
        "…",
        layout.blocks[-1],
    ]
    raise UserError(f"{layout.title} has no block {name!r}: did you mean {', '.join(near)}?")


def _names(n_in: int, n_out: int) -> list[str]:
    return [*(f"IN{i:02d}" for i in range(n_in)), "M00", *(f"OUT{i:02d}" for i in range(n_out))]


# Block weights as lists of bare numbers, as other programs' users pass them on: what each stands for, by how many.
LISTS: dict[int, Sequence[str]] = {
    25: _names(12, 12), 26: ["BASE", *_names(12, 12)],  # MBW and supermerger, SD1.5
    19: _names(9, 9), 20: ["BASE", *_names(9, 9)],  # the same, SDXL
}  # fmt: skip
# Those of LoRAs leave out blocks without attention (sd-webui-lora-block-weight).
LORA_LISTS = LISTS | {
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02d}" for i in range(3, 12))),
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02d}" for i in range(6))),
}


def listed(items: Sequence[str], lists: Mapping[int, Sequence[str]]) -> list[str] | None:
    """`NAME=NUMBER` for a list of bare numbers; None where there is no list of them. UserError for a list of another
    length than any of `lists`."""
    try:
        [float(item) for item in items]
    except ValueError:
        return None
    if len(items) < 2:
        return None
    if len(items) not in lists:
        known = ", ".join(f"{n} ({names[0]} … {names[-1]})" for n, names in sorted(lists.items()))
        raise UserError(f"{len(items)} block weights without names: expected NAME=NUMBER, or a list of {known}")
    return [f"{name}={item.strip()}" for name, item in zip(lists[len(items)], items, strict=True)]


def parse_blocks(texts: Sequence[str]) -> dict[str, float]:
    """`IN04=0.3` texts (also several in one, comma-separated) as a dict, or a list of bare numbers as MBW has it;
    UserError for anything else."""
    out: dict[str, float] = {}
    found = [[part for part in text.split(",") if part.strip()] for text in texts]
    for item in (item for items in found for item in listed(items, LISTS) or items):
        name, equals, number = item.partition("=")
        if not equals:
            raise UserError(f"block share {item!r} is not NAME=NUMBER, such as IN04=0.3")
        out[name.strip().upper()] = check_share(number, f"block {name.strip()}")  # type: ignore[arg-type]
    return out
