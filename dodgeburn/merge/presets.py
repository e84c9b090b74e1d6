"""The 38 published block-weight presets, among them the 16 of the Proteus x DPO model card, from their formulas.

A preset gives every U-Net block its alpha, the share of model B. It says nothing about BASE or VAE: those
are numbers of their own. The published tables (first: bbc-mc/sdweb-merge-block-weighted-gui, 25 numbers for
SD1.5) put a BASE of 0 in front, which some tools let overwrite the user's; we never do.

Curves are functions of t = i / N, with i counting IN00 … OUT11 (N = 24 for SD1.5's 25 blocks). For SDXL's
19 blocks there are two conventions, and the recipe says which was used:

- "curve" (default): the same formulas at N = 18, as SD.Next does. The cubic Hermite tangents S = 100/N and the
  start value 1/N scale with N too. Presets made of steps keep their number of blocks: WRAP and OUT stay at the ends,
  as SD.Next has them (OUT12 is all nine OUT blocks then); MID and RING keep their distance from M00 (no other tool
  has these for SDXL). SD.Next's SDXL_ONE_THIRD_SMOOTHSTEP is another curve than its formula's; ours is the formula's.
- "cut": the SD1.5 numbers with IN09-11 and OUT09-11 dropped, bit for bit what supermerger and Chattiori do.
  Curves get a jump at M00 this way.

Traps in the names: "reverse" has no fixed sense (Cosine falls from 1 to 0, Smoothstep rises from 0 to 1);
SMOOTHSTEP*2 is twice the curve, folded back at 1, and SMOOTHSTEP/2 the curve run twice as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dodgeburn.errors import UserError, near_names

Convention = Literal["curve", "cut"]
CONVENTIONS: tuple[Convention, ...] = ("curve", "cut")

# Position of a block: (i, n_in, n_out) -> alpha in 0..1; i = 0 is IN00, i = n_in is M00, i = n_in + n_out
# the last OUT.
Formula = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Preset:
    """A preset: its name (the card's spelling, or in its manner), the published one, its formula, the shape in words,
    and SD.Next's name where that is another.
    """

    name: str
    published: str
    formula: Formula
    shape: str
    sdnext: str = ""


def _curve(function: Callable[[float, int], float]) -> Formula:
    def formula(i: int, n_in: int, n_out: int) -> float:
        steps = n_in + n_out
        return function(i / steps, steps)

    return formula


def _flat(value: float) -> Formula:
    return lambda i, n_in, n_out: value


def _ends(first: int, last: int) -> Formula:
    """1 on the first and the last so many blocks, 0 between; M00 is never reached."""
    return lambda i, n_in, n_out: float(i < min(first, n_in) or i > n_in + n_out - min(last, n_out))


def _around_middle(inner: dict[int, float], outer: dict[int, float], middle: float = 0.0) -> Formula:
    """Alphas by distance from M00: `inner` for the IN side, `outer` for the OUT side."""

    def formula(i: int, n_in: int, n_out: int) -> float:
        if i == n_in:
            return middle
        return inner.get(n_in - i, 0.0) if i < n_in else outer.get(i - n_in, 0.0)

    return formula


def _smoothstep(t: float, _: int) -> float:
    return 3 * t**2 - 2 * t**3


def _cosine(t: float, _: int) -> float:
    return (1 + math.cos(math.pi * t)) / 2


def _fake_hermite(t: float, steps: int) -> float:
    """Cubic Hermite from 0 to 1 with both tangents S = 100 / steps (h01 + S (h10 + h11))."""
    h01 = 3 * t**2 - 2 * t**3
    h10 = t**3 - 2 * t**2 + t
    h11 = t**3 - t**2
    return h01 + 100 / steps * (h10 + h11)


def _true_hermite(t: float, steps: int) -> float:
    """The same from 1 / steps to 1 (h00 / steps more), and 0 at t = 0 as published."""
    return 0.0 if t == 0 else _fake_hermite(t, steps) + (2 * t**3 - 3 * t**2 + 1) / steps


def _triangle(x: float) -> float:
    """0 at even whole numbers, 1 at odd ones, straight between."""
    return 1 - abs(1 - x % 2)


def _folded(times: int) -> Callable[[float, int], float]:
    """The smoothstep times a whole number, folded back into 0..1."""
    return lambda t, steps: _triangle(times * _smoothstep(t, steps))


def _faster(times: int) -> Callable[[float, int], float]:
    """The smoothstep up and down, `times` runs along all blocks."""
    return lambda t, steps: _smoothstep(_triangle(times * t), steps)


def _same(distances: range, value: float) -> dict[int, float]:
    return dict.fromkeys(distances, value)


_SOFT = {3: 0.5, 4: 1.0, 5: 1.0, 6: 1.0, 7: 0.5}
_MID_IN, _MID_OUT = _same(range(1, 8), 0.5), _same(range(1, 7), 0.5)
_RING = _same(range(3, 7), 1.0)
_FAR, _NEAR = _same(range(3, 8), 1.0), _same(range(2, 7), 1.0)


def _reverse(function: Callable[[float, int], float]) -> Formula:
    return _curve(lambda t, steps: 1 - function(t, steps))


_CARD = (
    Preset("GradV", "GRAD_V", _curve(lambda t, n: abs(1 - 2 * t)), "1 at both ends, 0 at M00, straight"),
    Preset("GradA", "GRAD_A", _curve(lambda t, n: 1 - abs(1 - 2 * t)), "0 at both ends, 1 at M00, straight"),
    Preset("Flat_25", "FLAT_25", _flat(0.25), "0.25 everywhere"),
    Preset("Wrap2", "WRAP12", _ends(6, 6), "1 on the first and last 6 blocks"),
    Preset(
        "Mid2_50", "MID12_50", _around_middle(_MID_IN, _MID_OUT, 0.5), "0.5 on 7 IN, M00 and 6 OUT blocks"
    ),
    Preset("Out07", "OUT07", _ends(0, 7), "1 on the last 7 blocks"),
    Preset("Ring08Soft", "RING08_SOFT", _around_middle(_SOFT, _SOFT), "0.5 1 1 1 0.5 on each side of M00"),
    Preset("Ring08_5", "RING08_5", _around_middle(_RING, _RING), "1 1 1 1 on each side of M00"),
    Preset("Smoothstep", "SMOOTHSTEP", _curve(_smoothstep), "rises smoothly from 0 to 1"),
    Preset("ReverseSmoothstep", "REVERSE-SMOOTHSTEP", _reverse(_smoothstep), "falls smoothly from 1 to 0"),
    Preset("Cosine", "COSINE", _curve(_cosine), "falls as a cosine from 1 to 0"),
    Preset("ReverseCosine", "REVERSE_COSINE", _reverse(_cosine), "rises as a cosine from 0 to 1"),
    Preset("TrueCubicHermite", "TRUE_CUBIC_HERMITE", _curve(_true_hermite), "0, then up fast, sags, up to 1"),
    Preset("TrueReverseCubicHermite", "TRUE_REVERSE_CUBIC_HERMITE", _reverse(_true_hermite), "1 minus that"),
    Preset("FakeCubicHermite", "FAKE_CUBIC_HERMITE", _curve(_fake_hermite), "from 0 up fast, sags, up to 1",
           "CUBIC_HERMITE"),
    Preset("FakeReverseCubicHermite", "FAKE_REVERSE_CUBIC_HERMITE", _reverse(_fake_hermite), "1 minus that",
           "REVERSE_CUBIC_HERMITE"),
)  # fmt: skip


def _smoothsteps(n: int, over: str) -> tuple[Preset, ...]:
    """Four presets: the smoothstep and its reverse, times n and over n; `over` is SD.Next's word for the latter."""
    folded, faster = _folded(n), _faster(n)
    up, again = f"from 0, the curve times {n}, folded back at 1", f"from 0 to 1 and back, {n} runs"
    return (
        Preset(f"SmoothstepTimes{n}", f"SMOOTHSTEP*{n}", _curve(folded), up, f"{n}SMOOTHSTEP"),
        Preset(f"ReverseSmoothstepTimes{n}", f"R_SMOOTHSTEP*{n}", _reverse(folded), "1 minus that", f"{n}R_SMOOTHSTEP"),
        Preset(f"SmoothstepOver{n}", f"SMOOTHSTEP/{n}", _curve(faster), again, f"{over}_SMOOTHSTEP"),
        Preset(
            f"ReverseSmoothstepOver{n}", f"R_SMOOTHSTEP/{n}", _reverse(faster), "1 minus that", f"{over}_R_SMOOTHSTEP"
        ),
    )  # fmt: skip


_OTHERS = (
    Preset("Flat_75", "FLAT_75", _flat(0.75), "0.75 everywhere"),
    Preset("Wrap08", "WRAP08", _ends(4, 4), "1 on the first and last 4 blocks"),
    Preset("Wrap14", "WRAP14", _ends(7, 7), "1 on the first and last 7 blocks"),
    Preset("Wrap16", "WRAP16", _ends(8, 8), "1 on the first and last 8 blocks"),
    Preset("Out12", "OUT12", _ends(0, 12), "1 on the last 12 blocks, all OUT"),
    Preset("Out12_5", "OUT12_5", _around_middle({}, _same(range(1, 13), 1.0), 0.5), "0.5 on M00, 1 on all OUT"),
    Preset("Ring10_5", "RING10_5", _around_middle(_FAR, _FAR), "1 1 1 1 1 on each side of M00, two blocks off"),
    Preset("Ring10_3", "RING10_3", _around_middle(_NEAR, _NEAR), "1 1 1 1 1 on each side of M00, one block off"),
    *_smoothsteps(2, "HALF"),
    *_smoothsteps(3, "ONE_THIRD"),
    *_smoothsteps(4, "ONE_FOURTH"),
    Preset("AllA", "ALL_A", _flat(0.0), "0 everywhere"),
    Preset("AllB", "ALL_B", _flat(1.0), "1 everywhere"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_CARD, *_OTHERS)}


def _fold(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c in "*/")


_BY_SPELLING = {_fold(n): p for p in PRESETS.values() for n in (p.name, p.published, p.sdnext) if n}


def preset_names(which: Literal["card", "published"] = "card") -> list[str]:
    """The card's 16 names in its spelling, or those of all 38 published ones, the card's first."""
    return [preset.name for preset in _CARD] if which == "card" else list(PRESETS)


def find_preset(name: str) -> Preset:
    """The preset of this name: ours, the published one or SD.Next's; case, `_` and `-` do not matter.

    Raises UserError that lists near names.
    """
    found = _BY_SPELLING.get(_fold(name))
    if found is None:
        near = near_names(_fold(name), _BY_SPELLING)
        names = list(dict.fromkeys(_BY_SPELLING[n].name for n in near)) or preset_names()
        raise UserError(f"no preset is named {name!r}: did you mean {', '.join(names)}?")
    return found


def parse_preset(text: str) -> tuple[tuple[Preset, float], ...]:
    """The preset that a text names, or the two of `NAME:NAME:SHARE` with their weights: 1 - SHARE and SHARE, which is
    the second's, 0 to 1.

    Raises UserError for unknown names and anything else.
    """
    if ":" not in text:
        return ((find_preset(text), 1.0),)
    parts = text.split(":")
    try:
        share = float(parts[2]) if len(parts) == 3 else math.nan
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise UserError(
            f"preset {text!r} is not NAME:NAME:SHARE, such as Cosine:GradV:0.3 for 0.7 Cosine + 0.3 GradV: "
            "SHARE is the second's, 0 to 1"
        )
    return (find_preset(parts[0]), 1.0 - share), (find_preset(parts[1]), share)


def preset_name(text: str) -> str:
    """The text of a preset, or of two and a share, in our spelling; UserError as parse_preset."""
    found = parse_preset(text)
    if len(found) == 1:
        return found[0][0].name
    (one, _), (two, share) = found
    return f"{one.name}:{two.name}:{share!r}"


def preset_alphas(name: str, n_in: int = 12, n_out: int = 12, convention: Convention = "curve") -> list[float]:
    """The preset's alphas for IN00 …, M00, OUT00 …: n_in + 1 + n_out numbers in 0..1. Of two presets and a share
    (parse_preset), the weighted mean, block by block.

    For SD1.5's 12 + 1 + 12 blocks both conventions give the published 25 numbers.
    """
    found = [(_alphas(preset, n_in, n_out, convention), weight) for preset, weight in parse_preset(name)]
    if len(found) == 1:
        return found[0][0]
    (one, _), (two, share) = found
    return [a + share * (b - a) if share < 1 else b for a, b in zip(one, two, strict=True)]


def _alphas(preset: Preset, n_in: int, n_out: int, convention: Convention) -> list[float]:
    if convention not in CONVENTIONS:
        raise UserError(f"no convention is named {convention!r}: expected curve or cut")
    if convention == "curve":
        values = [preset.formula(i, n_in, n_out) for i in range(n_in + 1 + n_out)]
    else:
        if n_in > 12 or n_out > 12:
            raise UserError(f"the cut convention knows at most 12 + 1 + 12 blocks, the model has {n_in} + 1 + {n_out}")
        full = [preset.formula(i, 12, 12) for i in range(25)]
        values = [*full[:n_in], full[12], *full[13 : 13 + n_out]]
    return [min(1.0, max(0.0, value)) for value in values]  # rounding may leave 1e-17 outside
