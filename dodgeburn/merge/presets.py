"""The 16 block-weight presets of the Proteus x DPO model card, generated from their formulas.

A preset gives every U-Net block its alpha, the share of model B. It says nothing about BASE or VAE: those
are numbers of their own. The published tables (first: bbc-mc/sdweb-merge-block-weighted-gui, 25 numbers for
SD1.5) put a BASE of 0 in front, which some tools let overwrite the user's; we never do.

Curves are functions of t = i / N, with i counting IN00 … OUT11 (N = 24 for SD1.5's 25 blocks). For SDXL's
19 blocks there are two conventions, and the recipe says which was used:

- "curve" (default): the same formulas at N = 18, as SD.Next does. The cubic Hermite tangents S = 100/N and
  the start
  value 1/N scale with N too. Presets made of steps keep their number of blocks: WRAP and OUT stay at the
  ends, as SD.Next has them; MID and RING keep their distance from M00 (no other tool has these for SDXL).
- "cut": the SD1.5 numbers with IN09-11 and OUT09-11 dropped, bit for bit what supermerger and Chattiori do.
  Curves get a
  jump at M00 this way.

Trap in the names: "reverse" has no fixed sense (Cosine falls from 1 to 0, Smoothstep rises from 0 to 1).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dodgeburn.errors import UserError

Convention = Literal["curve", "cut"]
CONVENTIONS: tuple[Convention, ...] = ("curve", "cut")

# Position of a block: (i, n_in, n_out) -> alpha in 0..1; i = 0 is IN00, i = n_in is M00, i = n_in + n_out
# the last OUT.
Formula = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Preset:
    """A preset: the card's spelling, the published one, its formula, and the shape in words."""

    name: str
    published: str
    formula: Formula
    shape: str


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


def _same(distances: range, value: float) -> dict[int, float]:
    return dict.fromkeys(distances, value)


_SOFT = {3: 0.5, 4: 1.0, 5: 1.0, 6: 1.0, 7: 0.5}
_MID_IN, _MID_OUT = _same(range(1, 8), 0.5), _same(range(1, 7), 0.5)
_RING = _same(range(3, 7), 1.0)


def _reverse(function: Callable[[float, int], float]) -> Formula:
    return _curve(lambda t, steps: 1 - function(t, steps))


_PRESETS = (
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
    Preset("FakeCubicHermite", "FAKE_CUBIC_HERMITE", _curve(_fake_hermite), "from 0 up fast, sags, up to 1"),
    Preset("FakeReverseCubicHermite", "FAKE_REVERSE_CUBIC_HERMITE", _reverse(_fake_hermite), "1 minus that"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def _fold(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_BY_SPELLING = {_fold(spelling): p for p in _PRESETS for spelling in (p.name, p.published)}


def preset_names() -> list[str]:
    """The 16 names as the card spells them, in its order of listing here."""
    return list(PRESETS)


def find_preset(name: str) -> Preset:
    """The preset of this name; the card's and the published spelling, case and `_`/`-` do not matter.

    Raises UserError that lists near names.
    """
    found = _BY_SPELLING.get(_fold(name))
    if found is None:
        near = difflib.get_close_matches(_fold(name), list(_BY_SPELLING), n=3, cutoff=0.5)
        names = list(dict.fromkeys(_BY_SPELLING[n].name for n in near)) or preset_names()
        raise UserError(f"no preset is named {name!r}: did you mean {', '.join(names)}?")
    return found


def preset_alphas(
    name: str, n_in: int = 12, n_out: int = 12, convention: Convention = "curve"
) -> list[float]:
    """The preset's alphas for IN00 …, M00, OUT00 …: n_in + 1 + n_out numbers in 0..1.

    For SD1.5's 12 + 1 + 12 blocks both conventions give the published 25 numbers.
    """
    preset = find_preset(name)
    if convention not in CONVENTIONS:
        raise UserError(f"no convention is named {convention!r}: expected curve or cut")
    if convention == "curve":
        values = [preset.formula(i, n_in, n_out) for i in range(n_in + 1 + n_out)]
    else:
        if n_in > 12 or n_out > 12:
            raise UserError(
                f"the cut convention knows at most 12 + 1 + 12 blocks, the model has {n_in} + 1 + {n_out}"
            )
        full = [preset.formula(i, 12, 12) for i in range(25)]
        values = [*full[:n_in], full[12], *full[13 : 13 + n_out]]
    return [min(1.0, max(0.0, value)) for value in values]  # rounding may leave 1e-17 outside
