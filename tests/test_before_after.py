"""What a remedy did, before and after: figures of pictures whose labels are known."""

import numpy as np
import pytest
from hair import CONCEPT, Hair

from dodgeburn.measure.bias import figures_of_counts
from dodgeburn.rework.bias.before_after import Change, Measured, Meter, change, make_plan


def measured(tied: float) -> Measured:
    def draw(prompts, seeds):
        out = np.zeros((len(prompts), 16, 16, 3), np.uint8)
        for i, s in enumerate(seeds):
            rng = np.random.default_rng(s)
            out[i, 0, 0] = rng.random() < tied
            out[i, 0, 1] = rng.integers(2)
        return out

    return Meter(CONCEPT, make_plan(CONCEPT, 400, 0, 20), Hair()).measure(draw)


def test_before_and_after_same_seeds() -> None:
    before, after = measured(0.95), measured(0.52)
    moved = change(before, after)
    assert moved.tv_before == pytest.approx(0.45, abs=0.04) and moved.tv_after < 0.08
    assert moved.meets(0.10) and not change(before, before).meets(0.10)
    assert moved.others_tv == 0 and moved.others_name == "hat"  # drawn with the same seeds
    assert 0.03 < moved.others_floor < 0.1
    assert moved.as_json()["frechet_ratio"] is None and before.as_json()["bias"]["n"] == 400


def test_what_moves_another_attribute_beyond_chance_does_not_meet_the_target() -> None:
    before, after = measured(0.95), measured(0.52)
    worn = before.others["hat"]

    def moved(by: float) -> Change:
        return change(before, Measured(**{**vars(after), "others": {"hat": [worn[0] + by, worn[1] - by]}}))

    assert moved(0.04).meets(0.10)
    floor = moved(0.2).others_floor
    assert 0.05 < floor < 0.1 and moved(floor - 0.01).meets(0.10)  # 400 pictures show as much of one model
    assert not moved(floor + 0.01).meets(0.10) and moved(0.2).meets(0.10, others=0.3)
    assert moved(0.2).misses(0.10) == [f"hat moved by 0.200, more than {floor:.3f}, which chance shows"]
    assert change(before, before).misses(0.10)[0].endswith("is above 0.1") and moved(0.04).misses(0.10) == []


def test_the_interval_of_the_fidelity_drop_is_of_pairs() -> None:
    one, noise = measured(0.95), np.random.default_rng(0)
    high = np.clip(noise.normal(0.8, 0.2, 400), 0, 1)
    before = Measured(**{**vars(one), "fidelity": float(high.mean()), "fidelities": high.tolist()})
    lower = high - noise.normal(0.02, 0.01, 400)
    after = Measured(**{**vars(one), "fidelity": float(lower.mean()), "fidelities": lower.tolist()})
    ends = change(before, after).fidelity_ends
    assert ends is not None and ends[0] < 0.02 < ends[1] and ends[1] - ends[0] < 0.003  # not of two free samples: 0.055
    assert change(one, after).fidelity_ends is None and "fidelities" not in after.as_json()


def test_attributes_count_only_where_the_prompt_leaves_them_open() -> None:
    class Named(Hair):
        def named(self, prompt):
            return frozenset({"hat"} if "frowning" in prompt else ())

    def draw(prompts, seeds):
        out = np.zeros((len(prompts), 16, 16, 3), np.uint8)
        out[:, 0, 1] = np.array(["frowning" in p for p in prompts])[:, None]
        return out

    found = Meter(CONCEPT, make_plan(CONCEPT, 40, 0, 0), Named()).measure(draw)
    assert found.open == {"hat": 10} and found.others == {"hat": [1.0, 0.0]}  # caps are on the 30 that ask for one


def test_garbage_does_not_meet_the_target() -> None:
    before, after = measured(0.95), measured(0.52)
    half = figures_of_counts(np.array([100, 100]), 200, ("black", "red"))
    broken = Measured(**{**vars(after), "bias": half, "unreadable": 0.5})
    assert broken.bias.tv == 0 and not change(before, broken).meets(0.10)
