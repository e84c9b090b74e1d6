"""Calibration on edits whose response is known in closed form."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dodgeburn.errors import UserError
from dodgeburn.slide.calibrate import Calibration, CalibrationSettings, Scorer, calibrate, reader_scorer

PROMPTS, SEEDS = ["a", "bb", "ccc"], [1, 2, 3, 4]
# Natural values: what the unedited picture of a seed is worth.
NATURAL = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8}
SIGMA = float(np.std([NATURAL[s] for s in SEEDS] * len(PROMPTS), ddof=1))


class Known:
    """Pictures of one pixel in float32, whose value is the natural one plus `move(strength)`; NaN cannot be read."""

    def __init__(self, move, lost=lambda strength: False) -> None:
        self.move, self.lost, self.calls = move, lost, []

    def pictures(self, prompts, seeds, strengths):
        self.calls += list(strengths)
        rows = [
            np.nan if self.lost(strength) else NATURAL[seed] + self.move(strength)
            for seed, strength in zip(seeds, strengths, strict=True)
        ]
        return np.array(rows, np.float64)[:, None, None, None]


READ = Scorer("smile", "reader", lambda pictures: pictures.ravel())


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 3).filter(lambda slope: abs(slope) > 0.02))
def test_the_unit_of_a_straight_edit(slope) -> None:
    found = calibrate(Known(lambda s: slope * s), READ, PROMPTS, SEEDS)
    assert found.sigma == pytest.approx(SIGMA)
    assert found.factor == pytest.approx(SIGMA / slope, rel=0.031)
    assert found.safe_range == (-4.0, 4.0)
    for scale, move in found.curve:
        assert move == pytest.approx(scale * found.factor * slope / SIGMA, abs=1e-3)


def test_a_curve_that_flattens_ends_the_safe_range() -> None:
    # Unit slope up to 2 sigma, then flat; on the left it goes on to 3.
    found = calibrate(Known(lambda s: float(np.clip(s, -3, 2)) * SIGMA), READ, PROMPTS, SEEDS)
    assert found.factor == pytest.approx(1.0)
    assert found.safe_range == (-3.0, 2.0)


def test_lost_pictures_end_the_safe_range() -> None:
    found = calibrate(Known(lambda s: s * SIGMA, lambda s: s > 1.6), READ, PROMPTS, SEEDS)
    assert found.safe_range == (-4.0, 1.5)
    assert dict(found.readable)[2.0] == 0.0 and dict(found.readable)[1.5] == 1.0


def test_a_few_lost_pictures_are_borne() -> None:
    class OneLost(Known):
        def pictures(self, prompts, seeds, strengths):
            out = super().pictures(prompts, seeds, strengths)
            for i, (p, n, s) in enumerate(zip(prompts, seeds, strengths, strict=True)):
                if p == "a" and n == 1 and s == 2.0:
                    out[i] = np.nan  # one of twelve
            return out

    edit = OneLost(lambda s: s * SIGMA)
    assert calibrate(edit, READ, PROMPTS, SEEDS).safe_range == (-4.0, 1.5)
    relaxed = CalibrationSettings(parse_loss=0.1)
    assert calibrate(edit, READ, PROMPTS, SEEDS, settings=relaxed).safe_range == (-4.0, 4.0)


def test_saturation_before_a_unit_at_scale_one_is_walked_back() -> None:
    """At raw 1 the attribute is far past a sigma and saturated: the unit is found below."""
    found = calibrate(Known(lambda s: 1.5 * SIGMA * float(np.tanh(20 * s))), READ, PROMPTS, SEEDS)
    assert found.factor == pytest.approx(np.arctanh(1 / 1.5) / 20, rel=0.1)


def test_pairs_of_a_prompt_and_a_seed_are_drawn_once_each() -> None:
    edit = Known(lambda s: 0.5 * s)
    found = calibrate(edit, READ, ["a", "b", "c", "d"], SEEDS, sigma=SIGMA, paired=True)
    assert found.factor == pytest.approx(SIGMA / 0.5, rel=0.031)
    assert edit.calls.count(1.0) == 4 and edit.calls.count(0.0) == 4
    with pytest.raises(ValueError, match="are no pairs"):
        calibrate(edit, READ, ["a"], SEEDS, paired=True)


def test_few_pictures_tell_the_shape_and_all_the_strength() -> None:
    """The first two pictures move twice as far as the other four; all respond along the same curve."""

    class Uneven(Known):
        def pictures(self, prompts, seeds, strengths):
            self.calls += list(strengths)
            moves = [
                (2.4 if p in ("a", "b") else 1.2) * SIGMA * np.tanh(s) for p, s in zip(prompts, strengths, strict=True)
            ]
            return np.array(moves, np.float64)[:, None, None, None] + 0.5

    prompts, pairs = list("abcdef"), list(range(6))
    settings = CalibrationSettings(step=0.5, furthest=1.0, few=2)
    edit = Uneven(None)
    found = calibrate(edit, READ, prompts, pairs, settings=settings, sigma=SIGMA, paired=True)
    assert 1.6 * np.tanh(found.factor) == pytest.approx(1.0, abs=0.03)  # the mean of all six
    counts = [edit.calls.count(s) for s in dict.fromkeys(edit.calls)]
    assert set(counts) == {2, 6} and counts.count(6) == 2  # all six at one pair of scales
    every = calibrate(Uneven(None), READ, prompts, pairs, settings=CalibrationSettings(step=0.5, furthest=1.0),
                      sigma=SIGMA, paired=True)  # fmt: skip
    for scale, move in found.curve:
        assert move == pytest.approx(1.6 * np.tanh(scale * found.factor), abs=0.01)
    assert found.pictures < every.pictures


@settings(max_examples=30, deadline=None)
@example(7.0, -1, 0.75, 0.5)
@given(st.floats(0.02, 8), st.sampled_from([-1, 1]), st.floats(0.7, 1.4), st.floats(0.0, 0.5))
def test_few_pictures_first_whatever_the_strength(slope, sign, apart, bend) -> None:
    """The few respond `apart` times as strongly as the rest, the response bends: the unit is that of all."""
    few = [1.0 + (apart - 1) * 0.5] * 4 + [1.0 - (apart - 1) * 0.5] * 4

    class Bent(Known):
        def pictures(self, prompts, seeds, strengths):
            rows = [
                0.5 + few[n] * sign * SIGMA * (np.tanh(bend * slope * s) / bend if bend > 0.05 else slope * s)
                for n, s in zip(seeds, strengths, strict=True)
            ]
            return np.array(rows, np.float64)[:, None, None, None]

    search = CalibrationSettings(step=1.5, furthest=3.0, rounds=4, first=0.7, few=4)
    found = calibrate(Bent(None), READ, list("abcdefgh"), range(8), settings=search, sigma=SIGMA, paired=True)
    raw = np.arctanh(bend) / bend / slope if bend > 0.05 else 1 / slope
    assert found.factor == pytest.approx(sign * raw, rel=0.05)


@given(st.floats(0.05, 8), st.floats(1.05, 4), st.floats(0.3, 3), st.floats(1.3, 4))
def test_the_unit_along_a_curve_through_two_points(c, top, scale, apart) -> None:
    """A response of top x tanh(s / c) is found again from any two points, if 1 is not far from the first."""
    from dodgeburn.slide.calibrate import FURTHER, _reaches_1

    def move(s: float) -> float:
        return top * float(np.tanh(s / c))

    exact = c * float(np.arctanh(1 / top))
    here, there = exact * (1 + 0.3 * (scale - 1)), exact * apart * (1 + 0.3 * (scale - 1))
    assert _reaches_1((here, move(here)), (there, move(there)), FURTHER) == pytest.approx(exact, rel=0.02)
    straight = float(np.clip(here / 0.8, here / FURTHER, here * FURTHER))
    assert _reaches_1((here, 0.8), (2 * here, 1.6), FURTHER) == pytest.approx(straight)
    assert _reaches_1((here, 0.8), (2 * here, 2.0), FURTHER) == pytest.approx(
        straight
    )  # upwards: no further than straight
    assert _reaches_1((here, 0.8), (1.1 * here, 0.6), FURTHER) == pytest.approx(straight)  # too near: chance
    assert _reaches_1((here, 0.8), (2 * here, 0.81), FURTHER) == pytest.approx(FURTHER * here)  # never gets there
    # Of a top below 1, most will do.
    seen = [(x, 0.9 * float(np.tanh(x / c))) for x in (0.5 * c, 1.5 * c)]
    assert _reaches_1(seen[1], seen[0], 9.0, 0.97) == pytest.approx(c * float(np.arctanh(0.97)), rel=0.02)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 4), st.floats(0.9, 3), st.floats(0.5, 2))
@example(4.0, 0.9375, 0.5)  # one deviation is out of reach, and all scales tried are on flat ground
def test_a_response_that_flattens_about_one_unit_gets_a_scale_near_those_measured(slope, ceiling, apart) -> None:
    """Whatever the few say of the bend, the unit is no further than nature's slope can tell."""

    class Flat(Known):
        def pictures(self, prompts, seeds, strengths):
            self.calls += list(strengths)
            rows = [
                0.5 + SIGMA * ceiling * np.tanh((apart if n < 3 else 1.0) * slope * s / ceiling)
                for n, s in zip(seeds, strengths, strict=True)
            ]
            return np.array(rows, np.float64)[:, None, None, None]

    search = CalibrationSettings(step=1.5, furthest=3.0, rounds=4, first=0.7, few=3)
    edit = Flat(None)
    try:
        found = calibrate(edit, READ, list("abcdefgh"), range(8), settings=search, sigma=SIGMA, paired=True)
    except UserError as error:
        assert ceiling < 1.2 and "no scale to call 1.0" in str(error)
    else:
        assert 0.5 / slope < found.factor < 5 / slope and max(np.abs(edit.calls)) < 40 / slope


def test_few_that_say_nothing_of_the_shape_cost_the_range_and_not_the_slider() -> None:
    """The few stay where they are beyond a unit: safe as far as all were seen, unless they could not be read there."""
    search = CalibrationSettings(step=1.5, furthest=3.0, rounds=4, first=0.7, few=2)

    class Stuck(Known):
        def pictures(self, prompts, seeds, strengths):
            rows = [
                0.5 + SIGMA * (np.clip(s, -0.2, 0.2) if n < 2 else s) for n, s in zip(seeds, strengths, strict=True)
            ]
            lost = [self.lost(s) and n == 5 for n, s in zip(seeds, strengths, strict=True)]
            return np.where(lost, np.nan, rows)[:, None, None, None]

    def found(lost=lambda strength: False) -> Calibration:
        return calibrate(Stuck(None, lost), READ, list("abcdef"), range(6), settings=search, sigma=SIGMA, paired=True)

    assert found().factor == pytest.approx(1.4, abs=0.05)  # (2 x 0.2 + 4 x 1.4) / 6 is one
    assert found().safe_range == (-1.0, 1.0)
    with pytest.raises(UserError, match="not safe at any scale"):
        found(lambda strength: strength != 0)


def test_more_seeds_for_sigma_alone() -> None:
    edit = Known(lambda s: s * 0.1)
    found = calibrate(edit, READ, ["a"], [2, 3], spread_seeds=[1, 2, 3, 4])
    assert found.sigma == pytest.approx(np.std([0.2, 0.4, 0.6, 0.8], ddof=1))
    assert sum(1 for s in edit.calls if s == 0) == 4  # one prompt, four seeds, once
    assert found.pictures == 2 * (len(found.curve) - 1)


def test_each_scale_is_drawn_once() -> None:
    edit = Known(lambda s: s * SIGMA)
    calibrate(edit, READ, ["a"], SEEDS)
    strengths, counts = np.unique(edit.calls, return_counts=True)
    assert set(counts) == {4}, dict(zip(strengths, counts, strict=True))


@pytest.mark.parametrize("edit, said", [
    (Known(lambda s: 0.0), "by 0.00 natural standard deviations at most"),
    (Known(lambda s: 0.0, lambda s: True), "0 of 12 unedited pictures can be read"),
    (Known(lambda s: abs(s) * 0.3), "no scale to call 1.0"),  # both signs push the same way
])  # fmt: skip
def test_what_cannot_be_calibrated(edit, said) -> None:
    with pytest.raises(UserError, match=said):
        calibrate(edit, READ, PROMPTS, SEEDS)


def test_an_attribute_that_does_not_vary_has_no_unit() -> None:
    with pytest.raises(UserError, match="the same in all 2 unedited"):
        calibrate(Known(lambda s: s), Scorer("smile", "reader", lambda p: np.zeros(len(p))), ["a", "b"], [1])


def test_reader_scorer_reads_values_and_shares() -> None:
    from dodgeburn.pocket.reader import Readings

    class Fixed:
        def read(self, pictures, /):
            values = {"smile": np.array([0.2, 0.9]), "hat": np.array(["cap", "crown"])}
            return Readings(values, {}, np.array([False, True]))

    assert reader_scorer("smile", Fixed()).scores(np.zeros(2)).tolist()[0] == pytest.approx(0.2)
    assert np.isnan(reader_scorer("smile", Fixed()).scores(np.zeros(2))[1])
    assert reader_scorer("hat=cap", Fixed()).scores(np.zeros(2))[0] == 1.0
    with pytest.raises(UserError, match="no attribute"):
        reader_scorer("grin", Fixed())


def test_the_factor_is_folded_into_alpha() -> None:
    import torch

    from dodgeburn.models.adapters import Adapter, Factors

    raw = Adapter({"unet.x": Factors(torch.ones(2, 3), torch.ones(4, 2), 2.0)})
    found = Calibration("smile", "reader", -2.5, 0.1, (-1, 1), [], [])
    made = found.applied(raw).factors()["unet.x"]
    product = (made.up @ made.down) * made.alpha / made.rank
    assert torch.allclose(product, torch.full((4, 3), -2.5 * 2.0))
    assert found.unit == "one natural standard deviation of smile, by the reader"
    assert Calibration("detail", "proxy: contrast", 1, 1, (-1, 1), [], []).unit.endswith("by proxy: contrast")
