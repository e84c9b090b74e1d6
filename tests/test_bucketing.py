"""Stage 3 of a deconstruction: buckets, merges at their ends, and the search."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from deconstruct_tiny import (
    reading,
    short_run,
    short_spec,
)
from tiny import tiny_model

from dodgeburn.rework.deconstruct.bucketing import (
    KINDS,
    Mix,
    Search,
    States,
    buckets_of,
    geometry,
    kind_of,
    merge_states,
    order_difference,
)
from dodgeburn.rework.deconstruct.merge_map import merge_map, spoken
from dodgeburn.rework.deconstruct.meters import Reading
from dodgeburn.rework.deconstruct.report import deconstruct_report
from dodgeburn.rework.deconstruct.stage_log import unet_state

NAN = math.nan


def test_every_tensor_has_a_block_and_a_kind() -> None:
    for layout in ("sdxl", "sd15"):
        buckets = buckets_of(tiny_model(layout))
        blocks = {bucket.split(":")[0] for bucket in buckets.values()}
        assert {"IN00", "IN01", "M00", "OUT00", "OUT08"} <= blocks and "outside" not in blocks
        assert {bucket.split(": ")[1] for bucket in buckets.values()} == set(KINDS)
    assert kind_of("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight") == KINDS[0]
    assert kind_of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight") == KINDS[1]
    assert kind_of("mid_block.resnets.0.conv1.weight") == KINDS[2]
    assert kind_of("mid_block.resnets.0.time_emb_proj.weight") == KINDS[3]
    assert kind_of("mid_block.resnets.0.norm1.weight") == kind_of("conv_in.bias") == KINDS[4]


def corners(seed: int = 0) -> tuple[States, dict[str, str]]:
    model = tiny_model(seed=seed)
    base = unet_state(model)
    generator = torch.Generator().manual_seed(seed)
    moved = [{k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(3)]
    return States(base, *moved), buckets_of(model)


@pytest.mark.parametrize("method", ["bislerp", "slerp", "lerp", "bislerp4"])
def test_merges_at_their_ends(method: str) -> None:
    states, buckets = corners()
    assert states.overtrained and states.nightshaded and states.nightshaded_base
    nothing = merge_states(states, Mix(0.0, 0.0, {}), method, buckets)
    assert all(torch.equal(v, nothing[k]) for k, v in states.base.items())
    last, other = states.nightshaded, states.nightshaded_base
    ends = {"bislerp": (states.overtrained, other), "bislerp4": (other, last)}.get(method, (last, last))
    for v, end in zip((0.0, 1.0), ends, strict=True):
        made = merge_states(states, Mix(v, 1.0, {}), method, buckets)
        assert all(torch.allclose(x, made[k], atol=1e-6) for k, x in end.items()), (method, v)


def test_a_bucket_of_its_own_is_all_that_changes_and_negative_scales_move_away() -> None:
    states, buckets = corners()
    name = "mid_block.resnets.0.conv1.weight"
    made = merge_states(states, Mix(0.0, 0.0, {buckets[name]: -0.5}), "bislerp", buckets)
    changed = {k for k, v in made.items() if not torch.equal(v, states.base[k])}
    assert changed == {k for k, bucket in buckets.items() if bucket == buckets[name]}
    assert states.overtrained is not None
    away = states.base[name] - 0.5 * (states.overtrained[name] - states.base[name])
    assert torch.allclose(made[name], away, atol=1e-6)


def test_norms_and_biases_are_never_turned() -> None:
    states, buckets = corners()
    assert states.overtrained is not None and states.nightshaded_base is not None
    made = merge_states(states, Mix(0.3, 0.7, {}), "bislerp", buckets)
    name = "mid_block.resnets.0.norm1.weight"
    deltas = [s[name] - states.base[name] for s in (states.overtrained, states.nightshaded_base)]
    assert torch.allclose(made[name], states.base[name] + 0.7 * torch.lerp(*deltas, 0.3), atol=1e-6)


def test_the_order_of_two_axes_matters_unless_they_are_the_same() -> None:
    states, buckets = corners()
    assert 1e-4 < order_difference(states, Mix(0.3, 0.8, {}), buckets) < 0.5
    same = States(states.base, states.overtrained, states.nightshaded, states.overtrained)
    assert order_difference(same, Mix(0.4, 0.4, {}), buckets) == 0.0


def test_four_corners_with_perturbed_pictures(tmp_path: Path) -> None:
    """The variants that the plain run doesn't take."""
    spec = short_spec(
        stages=("overtrain", "nightshade", "bucket"),
        nightshade={"variant": "perturb", "perturb_steps": 2, "export": str(tmp_path / "poison"), "steps": 2},
        bucket={"method": "bislerp4", "scales": [0.5], "mixes": [0.5], "evaluations": 2}, overtrain={"steps": 2},
    )  # fmt: skip
    found = short_run(tmp_path / "run", spec)
    assert [s.stage for s in found.stages] == ["overtrain", "nightshade", "bucket"]
    assert 0 < found.stages[2].detail["order_difference"] < 1
    assert len(list((tmp_path / "poison").glob("*.png"))) == found.stages[1].detail["poisoned"] == 4
    assert "other order" in deconstruct_report(found, "tiny").html()


def test_the_map_of_merges_names_every_point() -> None:
    rows = [
        {"name": "a", "v": 0.0, "s": 1.0, "of": {}, "loss": 2.0, "tv": 0.4},
        {"name": "b", "v": 0.0, "s": 0.5, "of": {}, "loss": 1.0, "tv": 0.2},
        {"name": "c", "v": 1.0, "s": 0.5, "of": {}, "loss": 9.0, "tv": None},  # too far gone to be drawn
        {"name": "d", "v": 0.0, "s": 0.5, "of": {"M00": 0.25, "IN<1>": 0.75}, "loss": 1.5, "tv": 0.1},
    ]
    found = merge_map(rows, "d")
    assert found.count("<title>") == 3 and "<title>0: v 0, s 1; L 2.000, B 0.400</title>" in found
    assert "<title>3: v 0, s 0.5, but IN&lt;1&gt; s 0.75 (2 buckets apart); L 1.500, B 0.100</title>" in found
    (line,) = re.findall(r'<polyline points="(\S+) (\S+)"', found)  # b, then a: s grows
    (x, y), (x2, y2) = (tuple(map(float, point.split(","))) for point in line)
    assert x < x2 and y > y2  # more loss to the right, more variation up
    assert found.count('r="9"') == 1 and merge_map(rows[2:3], "c") == ""
    assert spoken(rows[1]) == "v 0, s 0.5"


def test_opposite_changes_are_counted() -> None:
    states, buckets = corners()
    assert states.overtrained is not None
    back = {k: 2 * v - states.overtrained[k] for k, v in states.base.items()}
    found, opposite = geometry(States(states.base, states.overtrained, back, back), buckets)
    # float32 keeps W - d and W + d only nearly opposite; all but the smallest are within the limit
    assert opposite > 0.9 * len(states.base) and min(row["degrees"] for row in found.values()) > 179
    assert geometry(states, buckets)[1] == 0


def test_the_search_takes_the_least_bias_among_feasible_merges() -> None:
    """B is least at a mean s of 0.38 and v 1, which no point of the grid has; L = 1 + s^2 forbids s 1."""
    s = short_spec(bucket={"evaluations": 30, "scales": [-0.5, 0.25, 0.5, 1.0], "mixes": [0.0, 1.0]}).bucket
    looked = []

    def look(mix: Mix, key: str) -> Reading:
        looked.append(key)
        scale = np.mean([mix.scale(bucket) for bucket in ("x", "y")])
        return reading(tv_cons=abs(scale - 0.38) / 2 + 0.1 * abs(mix.v - 1), loss=1 + scale**2, fidelity=0.9)

    search = Search(look, s, reading(), {"x": 2.0, "y": 1.0, "still": 0.0})
    best = search.run()
    assert best.mix.v == 1.0 and best.rank(s, reading())[0] == 0 and best.reading.loss <= 1.25
    grid = [t for t in search.trials if not t.mix.of]
    assert len(grid) == 8 and best.reading.tv_cons < min(t.reading.tv_cons for t in grid if t.reading.loss <= 1.25)
    assert len(looked) == len(set(looked)) <= 30 and "still" not in " ".join(looked)
    front = search.pareto()
    assert best in front and all(
        not (t.reading.tv_cons <= f.reading.tv_cons and t.reading.loss < f.reading.loss)
        for f in front
        for t in search.trials
    )


def test_without_a_feasible_merge_the_least_loss_that_lowers_bias() -> None:
    s = short_spec(bucket={"evaluations": 4, "scales": [-0.5, 0.5], "mixes": [0.0, 1.0]}).bucket
    table = {(0.0, -0.5): (0.5, 1.3), (0.0, 0.5): (0.3, 1.9), (1.0, -0.5): (0.35, 1.6), (1.0, 0.5): (NAN, 9.0)}
    search = Search(
        lambda mix, key: reading(tv_cons=table[mix.v, mix.s][0], loss=table[mix.v, mix.s][1]), s, reading(), {}
    )
    best = search.run()
    assert (best.mix.v, best.mix.s) == (1.0, -0.5) and best.rank(s, reading())[0] == 1
    assert len(search.pareto()) == 3
