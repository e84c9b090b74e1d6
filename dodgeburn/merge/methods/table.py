"""The table of merge methods: what each takes, how it may be run, and its parameters.

A method takes the models' values of one tensor (or of one tile of it), in float32 or wider, and an alpha,
and writes the result. To add one: write the function in a file of its family and put it into METHODS.
tests/test_methods.py runs every entry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dodgeburn.errors import UserError, near_names
from dodgeburn.merge.methods import angles, difference, linear, sets, statistics, task_vectors
from dodgeburn.merge.methods.draws import Draws
from dodgeburn.merge.methods.pieces import HeldPieces, Pieces

if TYPE_CHECKING:
    import torch

# (values of each model, alpha, where to write, base= draws= found= and parameters as the table says) -> None.
# `out` is never one of the inputs. Functions that take whole tensors may use them as scratch.
Function = Callable[..., None]
# (pieces of the tensor, alpha and draws and parameters that it names) -> what the function takes as found=, of which
# it gets the part that it works on where that is a flat tensor: a value for each place.
Survey = Callable[..., Any]
MAX_MODELS = 12


@dataclass(frozen=True)
class Param:
    """A method's number: name, default, the range it must be in (ends included), what it means."""

    name: str
    default: float
    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Method:
    """A merge method: name, function, formula in words, and how it may be run.

    `models` is the least and the greatest number of models, without the base. `elementwise`: each output value
    depends on the inputs at the same place only, so tensors may be cut into tiles. `survey`: so it is once that
    has gone through the whole tensor, holding at most `held` whole tensors as float32 at a time (0: a few pieces).
    All others take whole tensors, the models, the base and the result. `uneven`: torch rounds its functions (powers)
    in another way for the last values of a tensor, so that tensors must not be joined. `needs_base`: takes the
    model that the others were tuned from. `random`: takes draws. `lerps`: the result is (1 - alpha) A + alpha M
    with an M that does not depend on alpha, by torch.lerp. `zero_is_a` and `one_is_b`: alpha 0 gives A (alpha 1
    gives B) exactly, so that those tensors are copied as bytes. `alpha` is the default.
    """

    name: str
    function: Function
    summary: str
    models: tuple[int, int] = (2, 2)
    elementwise: bool = False
    needs_base: bool = False
    random: bool = False
    lerps: bool = False
    zero_is_a: bool = True
    one_is_b: bool = False
    alpha: float = 0.5
    params: tuple[Param, ...] = ()
    survey: Survey | None = None
    held: int = 0
    uneven: bool = False

    @property
    def tiles(self) -> bool:
        """Whether a tensor may be cut into tiles (after a survey, if there is one)."""
        return self.elementwise or self.survey is not None

    def look(self, pieces: Pieces, params: Mapping[str, float], alpha: float, draws: Draws) -> Any:
        """What the survey finds in a tensor; nothing for methods without one."""
        if self.survey is None:
            return None
        names = inspect.signature(self.survey).parameters
        given = {**params, "alpha": alpha, "draws": draws}
        return self.survey(pieces, **{name: value for name, value in given.items() if name in names})

    def check_params(self, given: Mapping[str, float]) -> dict[str, float]:
        """All parameters with their values; UserError for unknown names and values out of range."""
        known = {param.name: param for param in self.params}
        for name in given:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"{self.name} has no parameter {name!r}: {has}")
        out = {}
        for param in self.params:
            try:
                value = float(given.get(param.name, param.default))
            except (TypeError, ValueError):
                raise UserError(f"{param.name} is {given[param.name]!r}: expected a number") from None
            if not math.isfinite(value) or not param.low <= value <= param.high:
                raise UserError(f"{param.name} is {value}: {self.name} expects {param.low:g} to {param.high:g}")
            out[param.name] = value
        return out

    def check_models(self, count: int, has_base: bool) -> None:
        """UserError unless this is the number of models the method takes, with a base if it needs one."""
        least, most = self.models
        if not least <= count <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            beside = ", the base model not counted" if self.needs_base else ""
            more = "; name more with --also" if count < least else ""
            raise UserError(f"{self.name} takes {wanted} models{beside}, {count} were given{more}")
        if self.needs_base and not has_base:
            raise UserError(
                f"{self.name} needs the model that the others were tuned from: give it as base model (--base-model)"
            )
        if has_base and not self.needs_base:
            raise UserError(f"the base model has no effect: {self.name} takes none")


_MANY = (2, MAX_MODELS)
_DENSITY = Param("density", 0.2, 1e-6, 1, "share of each task vector's values that are kept")
_STRENGTH = Param("strength", 1, 0, 4, "factor of the combined task vectors")
_TABLE = (
    Method("weighted_sum", linear.weighted_sum, "(1 - alpha) A + alpha B", elementwise=True, one_is_b=True),
    Method(
        "sum_twice", linear.sum_twice, "(1 - beta) ((1 - alpha) A + alpha B) + beta C", (3, 3), True,
        zero_is_a=False, params=(Param("beta", 0.5, 0, 1, "share of C"),),
    ),
    Method(
        "triple_sum", linear.triple_sum, "(1 - alpha - beta) A + alpha B + beta C", (3, 3), True,
        zero_is_a=False, alpha=1 / 3, params=(Param("beta", 1 / 3, 0, 1, "share of C"),),
    ),
    Method("average", linear.average, "(1 - alpha) A + alpha mean of all", _MANY, True, alpha=1.0),
    Method(
        "add_difference", difference.add_difference, "A + alpha (B - base)", elementwise=True, needs_base=True,
        alpha=1.0,
    ),
    Method(
        "train_difference", difference.train_difference,
        "A + 1.8 alpha (B - base) |B - A| / (|B - base| + |B - A|)", elementwise=True, needs_base=True,
    ),
    Method(
        "multiply_difference", difference.multiply_difference,
        "base + sign |A - base|^(1 - alpha) |B - base|^alpha", elementwise=True, needs_base=True, zero_is_a=False,
        params=(Param("beta", 0.5, 0, 1, "share of B in what decides the sign"),), uneven=True,
    ),
    Method(
        "similarity_add_difference", difference.similarity_add_difference,
        "mean where A and B are similar, A + alpha (B - base) elsewhere", elementwise=True, needs_base=True,
        params=(Param("beta", 1, 0, 1, "weight of similarity"),),
    ),
    Method("smooth_add", difference.smooth_add, "A + alpha gauss(median(B - base))", needs_base=True,
           survey=difference.smoothed, held=3),
    Method("cosine_a", angles.cosine_a, "B + clamp(cos - alpha, 0, 1) (A - B), cos by column",
           zero_is_a=False, one_is_b=True),
    Method("cosine_b", angles.cosine_b, "the same, cos the mean of the column's and the tensor's",
           zero_is_a=False, one_is_b=True),
    Method("slerp", angles.slerp, "along the arc from A to B, norms linearly", one_is_b=True, survey=angles.arc),
    Method(
        "bislerp", angles.bislerp, "base + strength slerp(A - base, B - base; alpha)", needs_base=True,
        zero_is_a=False, params=(Param("strength", 1, -1, 2, "factor of the difference; negative moves away"),),
        survey=angles.arc_from_base,
    ),
    Method("rotate", angles.rotate, "A turned towards B (Procrustes)"),
    Method(
        "tensor_sum", sets.tensor_sum, "rows from B for a share alpha, the others from A", one_is_b=True,
        params=(Param("beta", 0, 0, 1, "where B's rows begin"),),
    ),
    Method(
        "top_k_sum", sets.top_k_sum, "A's values in B's order, for a share alpha by size",
        params=(Param("beta", 0, 0, 1, "where the sizes begin"),), survey=sets.values_in_order,
        held=4,
    ),
    Method(
        "distribution_crossover", sets.distribution_crossover, "low frequencies from A, high ones from B",
        needs_base=True, one_is_b=True, params=(Param("tilt", 0, 0, 1, "width of the crossover"),),
        survey=sets.crossed_change, held=4,
    ),
    Method(
        "ties", task_vectors.ties, "(1 - alpha) A + alpha (base + strength TIES of all)", _MANY,
        needs_base=True, lerps=True, alpha=1.0, params=(_DENSITY, _STRENGTH), survey=task_vectors.trim_limits,
    ),
    Method(
        "dare", task_vectors.dare, "(1 - alpha) A + alpha (base + strength mean of thinned differences)", _MANY, True,
        needs_base=True, random=True, lerps=True, alpha=1.0, params=(_DENSITY, _STRENGTH),
    ),
    Method(
        "della", task_vectors.della, "(1 - alpha) A + alpha (base + strength DELLA of all)", _MANY,
        needs_base=True, random=True, lerps=True, alpha=1.0,
        params=(_DENSITY, Param("window", 0.1, 0, 1, "spread of the probabilities to be kept"), _STRENGTH),
        survey=task_vectors.della_mean, held=3,
    ),
    Method(
        "model_stock", statistics.model_stock, "(1 - alpha) A + alpha (t mean + (1 - t) base)", _MANY,
        needs_base=True, lerps=True, alpha=1.0, survey=statistics.stock_share,
    ),
    Method(
        "geometric_median", statistics.geometric_median, "(1 - alpha) A + alpha geometric median of all", _MANY,
        alpha=1.0, survey=statistics.median_weights,
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def find_method(name: str) -> Method:
    """The method of this name (`-` and `_` do not matter); UserError that lists near ones."""
    folded = name.strip().lower().replace("-", "_")
    if folded not in METHODS:
        near = near_names(folded, METHODS, cutoff=0.6) or list(METHODS)
        raise UserError(f"no merge method is named {name!r}: expected one of {', '.join(near)}")
    return METHODS[folded]


def apply(
    method: Method,
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    base: torch.Tensor | None,
    params: Mapping[str, float],
    seed: int,
    key: str,
    clip: bool = False,
    start: int = 0,
    found: Any = None,
    surveyed: bool = False,
    scratch: bool = False,
) -> None:
    """Run a method on wide values; `params` as from `check_params`. With `scratch` it may overwrite them.

    `clip` bounds the result by A and B. For a part of a tensor, `start` is its first value's number; where the whole
    was `surveyed`, `found` is what came of it. Otherwise what is given is taken for the whole.
    """
    more: dict[str, Any] = dict(params)
    bounds = [model.clone() for model in models[:2]] if clip and scratch else models[:2]
    if not scratch and not method.tiles:
        models = [model.clone() for model in models]
        base = None if base is None else base.clone()
    if method.needs_base:
        more["base"] = base
    draws = Draws(seed, key, start)
    if method.survey is not None:
        if not surveyed:
            found = method.look(HeldPieces(models, base), params, alpha, draws)
        more["found"] = part_of(found, start, out)
    elif method.random:
        more["draws"] = draws
    method.function(models, alpha, out, **more)
    if clip:
        sets.clip_between(bounds[0], bounds[1], out)


def part_of(found: Any, start: int, like: torch.Tensor) -> Any:
    """What a survey found, for the values from `start` on; of a finding for each place only theirs, in their shape."""
    import torch

    if not isinstance(found, torch.Tensor):
        return found
    return found[start : start + like.numel()].view(like.shape).to(like.device)


def merge_tensors(
    models: Sequence[torch.Tensor],
    alpha: float,
    method: str = "weighted_sum",
    base: torch.Tensor | None = None,
    params: Mapping[str, float] | None = None,
    seed: int = 0,
    key: str = "",
    clip: bool = False,
) -> torch.Tensor:
    """One tensor merged in memory, exactly as a merged file would hold it.

    Computed in float32 (float64 if the first model is), rounded once to the first model's dtype; any device.
    `key` is the tensor's name, on which random methods depend. Raises UserError for a wrong number of models,
    a missing or useless base, tensors of different shapes or of integers, and parameters unknown or out of range.
    """
    import torch

    found = find_method(method)
    found.check_models(len(models), base is not None)
    first = models[0]
    for tensor in (*models, *([] if base is None else [base])):
        if tensor.shape != first.shape or not tensor.is_floating_point():
            raise UserError(
                f"{key or 'a tensor'} cannot be merged: {list(first.shape)} with {list(tensor.shape)} of "
                f"{str(tensor.dtype)[6:]}; expected one shape, of floating point"
            )
    width = torch.float64 if first.dtype == torch.float64 else torch.float32
    wide = [tensor.to(device=first.device, dtype=width) for tensor in models]
    wide_base = None if base is None else base.to(device=first.device, dtype=width)
    out = torch.empty_like(wide[0], memory_format=torch.contiguous_format)
    apply(found, wide, alpha, out, wide_base, found.check_params(params or {}), seed, key, clip)
    return out.to(first.dtype)
