"""Stage 3: bucketing. What the noise states changed is merged back into the untouched model, bucket by bucket.

A bucket is a block of the U-Net (IN00 .., M00, OUT00 ..) and a kind of layer in it: keys and values of cross-attention,
other attention, convolutions and residual layers, time embedding, norms and biases (these always by weighted sums).
With W0 the untouched model, W1 overtrained, W2 nightshaded from there, W2' nightshaded from W0:

    slerp     slerp(W0, W2; s_b)
    lerp      the same along the straight line: a control
    bislerp   W0 + s_b slerp(W1 - W0, W2' - W0; v), s_b in [-0.5, 1]: in the space of differences, where angles mean
              something; a negative scale moves away from both noise states (task negation)
    bislerp4  slerp(slerp(W0, W1; v), slerp(W2', W2; v); s_b): bilinear over four corners. The order of the two axes
              matters: the relative difference of both orders is reported

Searched are s and v over a grid, then s_b bucket by bucket, largest change first. A merge is feasible if
L <= loss_high and its fidelity is at least `fidelity_low` of the untouched model's; of the feasible ones the least B
(unreadable pictures counted as the majority) wins. If none is, it is the least L among those that lower B. All that
were looked at are kept, and which of them no other beats in all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.checkpoint.convert import unet_key_map
from dodgeburn.measure.pareto import pareto_front
from dodgeburn.merge.methods.angles import arc_of
from dodgeburn.merge.methods.table import merge_tensors
from dodgeburn.models.model import Model
from dodgeburn.rework.deconstruct.meters import Meters, Reading
from dodgeburn.rework.deconstruct.overtrain import Tell
from dodgeburn.rework.deconstruct.spec import Bucket, DeconstructSpec
from dodgeburn.rework.deconstruct.stage_log import StageLog, StageResult, State, load_unet

KINDS = ("cross-attention keys and values", "other attention", "convolution and residual", "time embedding",
         "norms and biases")  # fmt: skip
LERPED = KINDS[4]


def kind_of(name: str) -> str:
    """The kind of a U-Net tensor by its name in diffusers."""
    if name.endswith(".bias") or ".norm" in name or "norm_out" in name or "conv_norm" in name:
        return KINDS[4]
    if "time_emb" in name or "add_embedding" in name:
        return KINDS[3]
    if ".attn2.to_k" in name or ".attn2.to_v" in name:
        return KINDS[0]
    return KINDS[1] if "attentions" in name or ".attn" in name else KINDS[2]


def buckets_of(model: Model) -> dict[str, str]:
    """U-Net tensor name (diffusers) -> its bucket, "IN04: other attention"."""
    single = {mine: theirs for theirs, mine in unet_key_map(model.configs["unet"]).items()}
    out = {}
    for name in model.unet.state_dict():
        block = model.layout.block(single[name]) if name in single else None
        out[name] = f"{block or 'outside'}: {kind_of(name)}"
    return out


@dataclass(frozen=True)
class States:
    """The corners: untouched, overtrained, nightshaded from there, nightshaded from untouched. Those that a run hasn't
    are stood for by the nearest that it has."""

    base: State
    overtrained: State | None
    nightshaded: State | None
    nightshaded_base: State | None

    def corners(self) -> tuple[State, State, State, State]:
        """W0, W1, W2', W2"""
        last = self.nightshaded or self.overtrained
        assert last is not None, "nothing to merge"
        return self.base, self.overtrained or last, self.nightshaded_base or last, last


@dataclass(frozen=True)
class Mix:
    """A merge: v, and s for every bucket."""

    v: float
    s: float
    of: Mapping[str, float]  # buckets with an s of their own

    def scale(self, bucket: str) -> float:
        """s of a bucket."""
        return self.of.get(bucket, self.s)


def merge_states(states: States, mix: Mix, method: str, buckets: Mapping[str, str]) -> State:
    """The merged U-Net; tensors that are not floating are the untouched model's."""
    base, one, other, last = states.corners()
    return {
        name: _merged((tensor, one[name], other[name], last[name]), mix.v, mix.scale(buckets[name]), method,
                      buckets[name].endswith(LERPED)) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }  # fmt: skip


def _merged(corners: Sequence[Tensor], v: float, s: float, method: str, straight: bool) -> Tensor:
    base, one, other, last = corners
    if method == "bislerp":
        if straight:
            return base + s * torch.lerp(one - base, other - base, v)
        return merge_tensors([one, other], v, "bislerp", base, {"strength": s})
    way = "weighted_sum" if straight or method == "lerp" else "slerp"
    if method == "bislerp4":
        return merge_tensors([merge_tensors([base, one], v, way), merge_tensors([other, last], v, way)], s, way)
    return merge_tensors([base, last], s, way)


def order_difference(states: States, mix: Mix, buckets: Mapping[str, str]) -> float:
    """bislerp4: |one order of the axes - the other| over |merge - untouched|, over all tensors."""
    base, one, other, last = states.corners()
    apart = moved = 0.0
    for name, tensor in base.items():
        if not tensor.is_floating_point() or buckets[name].endswith(LERPED):
            continue
        v, s = mix.v, mix.scale(buckets[name])
        first = _merged((tensor, one[name], other[name], last[name]), v, s, "bislerp4", False)
        second = _merged((tensor, other[name], one[name], last[name]), s, v, "bislerp4", False)
        apart += float((first - second).double().square().sum())
        moved += float((first - tensor).double().square().sum())
    return math.sqrt(apart / moved) if moved else 0.0


def geometry(states: States, buckets: Mapping[str, str]) -> tuple[dict[str, dict[str, float]], int]:
    """By bucket: norms of the two differences as shares of the weights' norm, and the angle between them in degrees;
    and the number of tensors whose differences are opposite (no arc between them: merged along the straight line)."""
    base, one, other, _ = states.corners()
    sums: dict[str, list[float]] = {}
    opposite = 0
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        a, b = (one[name] - tensor).double().flatten(), (other[name] - tensor).double().flatten()
        opposite += arc_of(a, b).opposite
        row = sums.setdefault(buckets[name], [0.0] * 4)
        for i, x in enumerate((a @ a, b @ b, a @ b, tensor.double().square().sum())):
            row[i] += float(x)
    out = {}
    for bucket, (aa, bb, ab, ww) in sums.items():
        cos = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0
        degrees = math.degrees(math.acos(max(-1.0, min(1.0, cos))))
        first, second = (math.sqrt(x / ww) if ww else 0.0 for x in (aa, bb))
        out[bucket] = {"first": first, "second": second, "degrees": degrees, "size": math.sqrt(aa + bb)}
    return out, opposite


# -------------------- search


@dataclass(frozen=True)
class Trial:
    """A merge that was looked at."""

    mix: Mix
    reading: Reading
    key: str

    def rank(self, s: Bucket, before: Reading) -> tuple[int, float]:
        """The smaller the better."""
        r = self.reading
        if math.isnan(r.tv_cons):  # too far gone to be drawn
            return 3, r.loss
        if r.loss <= s.loss_high and r.fidelity >= s.fidelity_low * before.fidelity:
            return 0, r.tv_cons
        return (1, r.loss) if r.tv_cons < before.tv_cons else (2, r.loss)


class Search:
    """Grid, then one pass over the buckets, within the evaluations allowed."""

    def __init__(
        self, look: Callable[[Mix, str], Reading], s: Bucket, before: Reading, sizes: Mapping[str, float]
    ) -> None:
        self.look, self.s, self.before = look, s, before
        self.order = sorted((b for b, size in sizes.items() if size > 0), key=lambda b: -sizes[b])
        self.trials: list[Trial] = []

    def run(self) -> Trial:
        """The best merge."""
        s = self.s
        mixes = s.mixes if s.method in ("bislerp", "bislerp4") else (0.0,)
        for v in mixes:
            for scale in s.scales:
                if len(self.trials) < s.evaluations:
                    self._try(Mix(v, scale, {}), f"v {v:g} s {scale:g}")
        low = -0.5 if s.method == "bislerp" else 0.0
        for bucket in self.order:
            for factor in (1 - s.step, 1 + s.step):
                best = self.best
                value = max(low, min(1.0, best.mix.scale(bucket) * factor))
                if len(self.trials) >= s.evaluations or value == best.mix.scale(bucket):
                    continue
                mix = replace(best.mix, of={**best.mix.of, bucket: value})
                self._try(mix, f"v {mix.v:g} s {mix.s:g}, {len(mix.of)} buckets apart, last {bucket} s {value:g}")
                if self.best is not best:
                    break
        return self.best

    @property
    def best(self) -> Trial:
        """Of those so far; the first of equals."""
        return min(self.trials, key=lambda t: t.rank(self.s, self.before))

    def pareto(self) -> list[Trial]:
        """Merges that no other beats in B, L and fidelity together."""
        known = [t for t in self.trials if not math.isnan(t.reading.tv_cons)]
        if not known:
            return []
        points = np.array([(-t.reading.tv_cons, -t.reading.loss, t.reading.fidelity) for t in known])
        return [t for t, best in zip(known, pareto_front(points), strict=True) if best]

    def _try(self, mix: Mix, key: str) -> None:
        self.trials.append(Trial(mix, self.look(mix, key), key))


def bucket(
    model: Model, states: States, meters: Meters, before: Reading, spec: DeconstructSpec, folder: Path,
    tell: Tell | None = None,
) -> StageResult:  # fmt: skip
    """Search for the merge; the model ends as the best one. `before`: the untouched model's full reading."""
    log = StageLog(folder, "bucket")
    if (done := log.restored(model)) is not None:
        return done
    s, drawn = spec.bucket, meters.drawn
    buckets = buckets_of(model)
    found, opposite = geometry(states, buckets)
    looker = meters.with_panel(replace(meters.panel, neutral=s.neutral, each=s.each, others=()))

    def look(mix: Mix, key: str) -> Reading:
        def measure() -> Reading:
            load_unet(model, merge_states(states, mix, s.method, buckets))
            loss = looker.loss()
            return looker.full(loss) if loss <= s.hopeless else Reading.of_loss(loss)

        reading = log.reading(f"{len(search.trials)}", measure, step=len(search.trials), name=key, v=mix.v, s=mix.s,
                              of=dict(mix.of))  # fmt: skip
        if tell is not None:
            tell("bucket", len(search.trials) + 1, reading)
        return reading

    search = Search(look, s, before, {b: row["size"] for b, row in found.items()})
    best = search.run()
    rank, _ = best.rank(s, before)
    said = ("feasible", "not feasible: least L among those that lower B", "not feasible, and none lowers B",
            "nothing could be drawn")[rank]  # fmt: skip
    load_unet(model, merge_states(states, best.mix, s.method, buckets))
    detail: dict[str, Any] = {
        "method": s.method, "best": _row(best), "trials": len(search.trials), "opposite": opposite,
        "pareto": [_row(t) for t in search.pareto()], "buckets": {b: _rounded(row) for b, row in found.items()},
    }  # fmt: skip
    if s.method == "bislerp4":
        detail["order_difference"] = round(order_difference(states, best.mix, buckets), 6)
    return log.finish(model, f"{best.key}: {said}", rank == 0, 0, 0, meters.drawn + looker.drawn - drawn, **detail)


def _row(trial: Trial) -> dict[str, Any]:
    return {"name": trial.key, "v": trial.mix.v, "s": trial.mix.s, "of": dict(trial.mix.of), **trial.reading.as_json()}


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {k: round(x, 5) for k, x in row.items()}
