"""The merges that stage 3 looked at, as a picture: held-out loss across, total variation up.

Every point has the number that it has in the table; resting on it tells the rest. Merges of one v are joined in the
order of s; those that set a bucket apart stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDE, HIGH = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 96, 18, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8f4f87", "#7a6a00")  # after Okabe and Ito; seen on white and on black
APART = "var(--muted)"


def spoken(row: Mapping[str, Any]) -> str:
    """A merge in words: v, s, and the bucket that was set apart last."""
    of = dict(row.get("of") or {})
    said = f"v {row['v']:g}, s {row['s']:g}"
    if not of:
        return said
    last = next(reversed(of))
    more = f" ({len(of)} buckets apart)" if len(of) > 1 else ""
    return f"{said}, but {last} s {of[last]:g}{more}"


def merge_map(rows: Sequence[Mapping[str, Any]], taken: str) -> str:
    """SVG of the merges in the order they were looked at; `taken` is the name of the one that was taken.

    A merge that was too far gone to be drawn has no total variation, and no point; "" where none has one.
    """
    known = [(i, row) for i, row in enumerate(rows) if _finite(row["loss"]) and _finite(row["tv"])]
    if not known:
        return ""
    right, top = max(row["loss"] for _, row in known), max(row["tv"] for _, row in known)
    x = _Scale(min(row["loss"] for _, row in known), right, LEFT, WIDE - RIGHT)
    y = _Scale(0.0, max(top, 0.05), HIGH - BOTTOM, TOP)
    parts = [*_axes(x, y)]
    grid = [(i, row) for i, row in known if not row.get("of")]
    mixes = sorted({row["v"] for _, row in grid})
    colours = {v: COLOURS[k % len(COLOURS)] for k, v in enumerate(mixes)}
    for v in mixes:
        line = sorted((row for _, row in grid if row["v"] == v), key=lambda row: row["s"])
        path = " ".join(f"{x(row['loss']):.1f},{y(row['tv']):.1f}" for row in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[v]}" stroke-width="1.5"/>')
    for k, v in enumerate(mixes):
        at = TOP + 14 + 18 * k
        parts.append(f'<circle cx="{WIDE - RIGHT + 24}" cy="{at - 4}" r="4" fill="{colours[v]}"/>'
                     f'<text x="{WIDE - RIGHT + 34}" y="{at}">v {v:g}</text>')  # fmt: skip
    if len(grid) < len(known):
        at = TOP + 14 + 18 * len(mixes)
        parts.append(f'<circle cx="{WIDE - RIGHT + 24}" cy="{at - 4}" r="4" fill="none" stroke="{APART}"/>'
                     f'<text x="{WIDE - RIGHT + 34}" y="{at}">buckets</text>')  # fmt: skip
    parts += [_point(i, row, x(row["loss"]), y(row["tv"]), colours, row["name"] == taken) for i, row in known]
    return (
        f'<figure><div class="frame"><div class="scroll"><svg viewBox="0 0 {WIDE} {HIGH}" role="img" '
        'aria-label="Merges: held-out loss against total variation" fill="currentColor" font-size="12" '
        f'style="display:block;width:100%;min-width:560px;max-width:980px">{"".join(parts)}</svg></div></div>'
        "<figcaption>Numbers are those of the table below; rest on a point for what it is. Lines join merges of one v "
        "as s grows; rings are single buckets set apart. The thick ring is what was taken.</figcaption></figure>"
    )


def _point(
    i: int, row: Mapping[str, Any], at: float, up: float, colours: Mapping[float, str], is_taken: bool
) -> str:  # fmt: skip
    said = f"{i}: {spoken(row)}; L {row['loss']:.3f}, B {row['tv']:.3f}"
    colour = colours.get(row["v"], COLOURS[0])
    fill = f'fill="none" stroke="{APART}" stroke-width="1.5"' if row.get("of") else f'fill="{colour}"'
    ring = f'<circle cx="{at:.1f}" cy="{up:.1f}" r="9" fill="none" stroke="currentColor" stroke-width="2.5"/>'
    return (
        f"<g><title>{escape(said)}</title>{ring if is_taken else ''}"
        f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4" {fill}/>'
        f'<text x="{at + 8:.1f}" y="{up - 6 - 11 * (bool(row.get("of")) * (1 + i % 3)):.1f}">{i}</text></g>'
    )


def _axes(x: _Scale, y: _Scale) -> list[str]:
    out, low, right = [], HIGH - BOTTOM, WIDE - RIGHT
    for value in _ticks(x.low, x.high):
        at = f"{x(value):.1f}"
        out.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{low}" stroke="var(--line)"/>')
        out.append(f'<text x="{at}" y="{low + 16}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(y.low, y.high):
        at = f"{y(value):.1f}"
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}" stroke="var(--line)"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{value:g}</text>')
    middle = f"translate(14 {(TOP + low) / 2}) rotate(-90)"
    out.append(f'<text x="{(LEFT + right) / 2}" y="{HIGH - 8}" text-anchor="middle">L: held-out loss</text>')
    out.append(f'<text transform="{middle}" text-anchor="middle">B: total variation</text>')
    return out


class _Scale:
    """Numbers from low to high (a little more) on pixels from start to end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between, some five."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
