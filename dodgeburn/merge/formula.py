"""The formula that a merge applies, in words and numbers: what becomes of which blocks, equal ones in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dodgeburn.merge.plan import Plan, Work
from dodgeburn.merge.rules import COMPONENTS

_LETTERS = "ABCDEFGHIJKLM"
_TITLES = {theirs: ours for ours, theirs in COMPONENTS.items()}
# Tensors of these issues keep A's values whatever their block's share; the issues themselves are told of elsewhere.
_LEFT = ("outside", "missing_in_b", "missing_elsewhere", "integers")
Words = Callable[[float, Mapping[str, float], int], str]  # alpha, parameters, number of models without the base


@dataclass(frozen=True)
class Line:
    """One formula and the places it is applied in: blocks, and the text encoders by name."""

    formula: str
    alpha: float
    places: tuple[str, ...]
    tensors: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values. `alpha` is the share, as the method means it."""
        return {"formula": self.formula, "alpha": self.alpha, "in": list(self.places), "tensors": self.tensors}


def formula_lines(plan: Plan, models: int) -> list[Line]:
    """What the plan does, in the order of the model's blocks; `models` is their number without the base.

    A place that a line has only some tensors of says how many. Tensors that keep A's values because they cannot be
    merged are left out.
    """
    left = {name for kind in _LEFT for name in plan.issues.get(kind, ())}
    totals: Counter[str] = Counter()
    found: dict[tuple[str, float], Counter[str]] = {}
    for work in plan.work:
        if work.name in left or work.block is None:
            continue
        place = place_of(work, plan)
        totals[place] += 1
        found.setdefault((_said(work, plan, models), work.alpha), Counter())[place] += 1
    order = {place: i for i, place in enumerate([*plan.layout.all_blocks, *_TITLES.values()])}
    lines = []
    # Files that other programs write have their tensors in the alphabet's order: IN10 before IN02.
    for (formula, alpha), places in sorted(found.items(), key=lambda item: min(order[place] for place in item[1])):
        whole = sorted((p for p, n in places.items() if n == totals[p]), key=lambda place: order[place])
        parts = sorted((p for p, n in places.items() if n < totals[p]), key=lambda place: order[place])
        partly = [f"{p} ({places[p]} of {totals[p]} tensors)" for p in parts]
        lines.append(Line(formula, alpha, (*_ranges(whole, plan), *partly), sum(places.values())))
    return lines


def place_of(work: Work, plan: Plan) -> str:
    """The text encoder, or the block."""
    return _TITLES[plan.layout.component(work.name)] if plan.layout.is_text(work.name) else work.block or ""


def _ranges(places: Sequence[str], plan: Plan) -> list[str]:
    """Neighbouring U-Net blocks as ranges: IN04-IN08."""
    blocks = plan.layout.blocks
    out: list[list[str]] = []
    for place in places:
        last = out[-1][-1] if out else ""
        if last in blocks and place in blocks and blocks.index(place) == blocks.index(last) + 1:
            out[-1].append(place)
        else:
            out.append([place])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in out]


def formula_text(plan: Plan, names: Sequence[str]) -> list[str]:
    """The formulas as lines of text, under what the letters stand for: `names` of A, B, further models, and last the
    base if the method takes one.
    """
    models = len(names) - plan.method.needs_base
    letters = [*_LETTERS[:models], *(["base"] if plan.method.needs_base else [])]
    lines = [", ".join(f"{letter} = {name}" for letter, name in zip(letters, names, strict=True))]
    found = formula_lines(plan, models)
    width = max((len(line.formula) for line in found), default=0)
    lines += [f"  {line.formula:<{width}}  in {', '.join(line.places)}" for line in found]
    if plan.settings.clip:
        lines.append("  then every value brought between A's and B's")
    return lines


def _said(work: Work, plan: Plan, models: int) -> str:
    if work.action in ("copy_a", "cast_a"):
        return "A" if work.action == "copy_a" else f"A as {plan.settings.dtype}"
    if work.action == "copy_b":
        return "B"
    words = _WORDS.get(plan.method.name)
    if words is not None:
        return words(work.alpha, plan.params, models)
    params = "".join(f", {name} = {value:g}" for name, value in plan.params.items())
    return f"{plan.method.summary} with alpha = {work.alpha:.4g}{params}"


def _percent(share: float) -> str:
    return f"{round(100 * share, 2):g} %"


def _number(value: float) -> str:
    return f"{round(value, 4):g}"


def _mix(shares: Sequence[float]) -> str:
    """Shares of A, B, C ... as a sum; those of 0 are left out."""
    parts = [f"{letter} {_percent(share)}" for letter, share in zip(_LETTERS, shares, strict=False) if share]
    return " + ".join(parts).replace("+ -", "- ") or "0"


def _weighted_sum(alpha: float, params: Mapping[str, float], models: int) -> str:
    return _mix([1 - alpha, alpha])


def _sum_twice(alpha: float, params: Mapping[str, float], models: int) -> str:
    beta = params["beta"]
    return _mix([(1 - beta) * (1 - alpha), (1 - beta) * alpha, beta])


def _triple_sum(alpha: float, params: Mapping[str, float], models: int) -> str:
    return _mix([1 - alpha - params["beta"], alpha, params["beta"]])


def _average(alpha: float, params: Mapping[str, float], models: int) -> str:
    return _mix([1 - alpha + alpha / models, *[alpha / models] * (models - 1)])


def _towards(what: str) -> Words:
    """(1 - alpha) A + alpha (something made of all models)."""

    def words(alpha: float, params: Mapping[str, float], models: int) -> str:
        settings = ", ".join(f"{name} {value:g}" for name, value in params.items())
        all_of = f"{what}({', '.join(_LETTERS[:models])}{'; ' + settings if settings else ''})"
        return all_of if alpha == 1 else f"A {_percent(1 - alpha)} + {all_of} {_percent(alpha)}"

    return words


_WORDS: dict[str, Words] = {
    "weighted_sum": _weighted_sum,
    "sum_twice": _sum_twice,
    "triple_sum": _triple_sum,
    "average": _average,
    "add_difference": lambda alpha, params, n: f"A + {_number(alpha)} (B - base)",
    "train_difference": lambda alpha, params, n: (
        f"A + {_number(1.8 * alpha)} (B - base) |B - A| / (|B - base| + |B - A|)"
    ),
    "multiply_difference": lambda alpha, params, n: (
        f"base +/- |A - base|^{_number(1 - alpha)} |B - base|^{_number(alpha)}, signs of "
        f"{_mix([1 - params['beta'], params['beta']])} - base"
    ),
    "similarity_add_difference": lambda alpha, params, n: (
        f"A + {_number(alpha)} (B - base) where A and B differ, {_mix([1 - alpha / 2, alpha / 2])} where they are alike"
        f" (weight {_number(params['beta'])})"
    ),
    "smooth_add": lambda alpha, params, n: f"A + {_number(alpha)} gauss(median(B - base))",
    "cosine_a": lambda alpha, params, n: f"B + clamp(cos - {_number(alpha)}, 0, 1) (A - B), cos by column",
    "cosine_b": lambda alpha, params, n: f"B + clamp(cos - {_number(alpha)}, 0, 1) (A - B), cos by column and tensor",
    "slerp": lambda alpha, params, n: f"{_percent(alpha)} of the arc from A to B",
    "bislerp": lambda alpha, params, n: (
        f"base + {_number(params['strength'])} x ({_percent(alpha)} of the arc from A - base to B - base)"
    ),
    "rotate": lambda alpha, params, n: f"A turned {_percent(alpha)} of the way to B",
    "tensor_sum": lambda alpha, params, n: (
        f"{_percent(alpha)} of the rows from B, beginning at {_percent(params['beta'])}; the others A's"
    ),
    "top_k_sum": lambda alpha, params, n: (
        f"A's values in B's order, {_percent(alpha)} of them by size, beginning at {_percent(params['beta'])}"
    ),
    "distribution_crossover": lambda alpha, params, n: (
        f"the highest {_percent(alpha)} of the frequencies from B, the others from A (tilt {_number(params['tilt'])})"
    ),
    "ties": _towards("TIES"),
    "dare": _towards("DARE"),
    "della": _towards("DELLA"),
    "model_stock": _towards("model stock"),
    "geometric_median": _towards("geometric median"),
}
