"""Measures of sweeps on readings made by hand, whose answers are computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dodgeburn.errors import UserError
from dodgeburn.measure.intervals import bootstrap_statistics
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.slide import measures
from dodgeburn.slide.measures import Natural, natural_spread
from dodgeburn.slide.readings import SweepReadings, attribute_of, read_sweep, sweep_rows

SCALES = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
UNIT = Natural(dict.fromkeys(CONTINUOUS, 0.1), dict.fromkeys(CATEGORICAL, 0.5), dict.fromkeys(CONTINUOUS, 0.02))


def sweep(shape=(2, 2), scales=SCALES, unreadable=None, **values) -> SweepReadings:
    """Readings of which only the named attributes vary; others are 0.5 or their first value."""
    full = (*shape, len(scales))
    table = {name: np.full(full, 0.5) for name in CONTINUOUS}
    table |= {name: np.full(full, options[0], dtype=object) for name, options in CATEGORICAL.items()}
    for name, value in values.items():
        table[name] = np.broadcast_to(np.asarray(value), full).copy()
    return SweepReadings(scales, table, np.zeros(full, bool) if unreadable is None else unreadable)


def rising(per_scale: float = 0.1, base: float = 0.5) -> np.ndarray:
    return base + per_scale * SCALES


def blind(p: int, n: int, k: int, shape=(2, 2, 5)) -> np.ndarray:
    out = np.zeros(shape, bool)
    out[p, n, k] = True
    return out


# ------------------------------------------------------------------------------------------------------------ natural


def test_natural_spread_is_over_unedited_pictures() -> None:
    smile = np.zeros((2, 2, 5))
    smile[:, :, 2] = [[0.2, 0.4], [0.6, 0.8]]  # mean 0.5, sum of squares 0.2 -> /3
    hats = np.full((2, 2, 5), "none", dtype=object)
    hats[0, 1, 2] = "cap"  # of the two pairs (one a prompt) one differs
    found = natural_spread(sweep(smile=smile, hat=hats), targets=["hat=cap"])
    assert found.sigma["smile"] == pytest.approx(np.sqrt(0.2 / 3))
    assert found.differ["hat"] == pytest.approx(0.5)
    assert found.differ["style"] == pytest.approx(0.25)  # never differs: half a pair of two
    assert found.sigma["hat=cap"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1))
    assert found.sigma["age"] == measures.LEAST_SIGMA


def test_unreadable_pictures_have_no_spread() -> None:
    smile = np.zeros((2, 2, 5))
    smile[:, :, 2] = [[0.2, 0.4], [0.6, 99]]
    found = natural_spread(sweep(smile=smile, unreadable=blind(1, 1, 2)))
    assert found.sigma["smile"] == pytest.approx(np.std([0.2, 0.4, 0.6], ddof=1))


# ----------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("read, plain, strict", [
    ([0.3, 0.4, 0.5, 0.6, 0.7], True, True),
    ([0.5, 0.5, 0.5, 0.5, 0.5], False, False),  # flat
    ([0.7, 0.6, 0.5, 0.4, 0.3], False, False),  # falls
    ([0.3, 0.5, 0.461, 0.6, 0.7], True, True),  # falls by less than 2 x 0.02
    ([0.3, 0.5, 0.459, 0.6, 0.7], False, False),  # by more
    ([0.3, 0.6, 0.57, 0.54, 0.51], True, False),  # small steps down add up
    ([0.50, 0.52, 0.54, 0.56, 0.599], False, False),  # less than a sigma in all
    ([0.50, 0.52, 0.54, 0.56, 0.60], True, True),
])  # fmt: skip
def test_monotone(read, plain, strict) -> None:
    found = sweep((1, 1), smile=read)
    assert measures.monotone(found, UNIT, "smile").tolist() == [[plain]]
    assert measures.monotone(found, UNIT, "smile", drawdown=True).tolist() == [[strict]]


def test_an_unreadable_picture_fails_its_sweep_only() -> None:
    found = sweep(smile=rising(), unreadable=blind(0, 1, 3))
    assert measures.monotone(found, UNIT, "smile").tolist() == [[True, False], [True, True]]
    assert measures.spearman(found, "smile").tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert measures.end_to_end(found, UNIT, "smile") == pytest.approx(np.full((2, 2), 4.0))  # the ends are readable
    at_the_end = sweep(smile=rising(), unreadable=blind(0, 1, 4))
    assert measures.end_to_end(at_the_end, UNIT, "smile").tolist()[0] == pytest.approx([4.0, 0.0])


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_spearman_is_scipys(read) -> None:
    from scipy.stats import spearmanr

    wanted = 0.0 if np.ptp(read) == 0 else spearmanr(SCALES, read).statistic
    assert measures.spearman(sweep((1, 1), smile=read), "smile")[0, 0] == pytest.approx(wanted, abs=1e-12)


def test_linearity() -> None:
    assert measures.linearity(sweep(smile=rising()), "smile") == pytest.approx(1.0)
    assert np.isnan(measures.linearity(sweep(), "smile"))
    saturated = sweep((1, 1), smile=[0.4, 0.4, 0.5, 0.6, 0.6])  # moves -.1 -.1 .1 .1; slope .6/10; residuals .04 .02
    assert measures.linearity(saturated, "smile") == pytest.approx(1 - (2 * 0.04**2 + 2 * 0.02**2) / 0.04)


def test_calibration_error_is_of_a_prompts_mean() -> None:
    over = np.stack([rising(0.15), rising(0.05)])  # a prompt's two seeds: 1.5 and 0.5 sigma a scale
    found = sweep((1, 2), smile=over[None])
    assert measures.calibration_error(found, UNIT, "smile") == pytest.approx(0.0)
    assert measures.calibration_error(found, UNIT, "smile", per_picture=True) == pytest.approx(0.5)  # .25 .5 1
    steep = sweep((1, 1), smile=rising(0.12))  # off by 0.1 at a half, 0.2 at one and 0.4 at two
    assert measures.calibration_error(steep, UNIT, "smile") == pytest.approx(0.2)
    assert measures.calibration_error(steep, UNIT, "smile", up_to=1.0) == pytest.approx(0.15)
    assert np.isnan(measures.calibration_error(steep, UNIT, "smile", up_to=0.4))
    # In the deviation that a file declares, 0.12 a unit is right. Half a unit is on the line between 0 and one.
    assert measures.calibration_error(steep, UNIT, "smile", sigma=0.12) == pytest.approx(0.0)
    # A requested scale beyond the sweep's ends is no part of it, whatever the ends do.
    short = steep.within(-1, 1)
    assert measures.calibration_error(short, UNIT, "smile") == pytest.approx(0.15)
    bent = sweep((1, 1), smile=[0.1, 0.4, 0.5, 0.6, 0.9])  # exact to one, twice too far at two
    assert measures.calibration_error(bent, UNIT, "smile") == pytest.approx(0.0)
    assert measures.calibration_error(bent.within(1, 2), UNIT, "smile") == pytest.approx(0.0)


def test_symmetry() -> None:
    assert measures.symmetry(sweep(smile=rising()), "smile") == pytest.approx(1.0)
    uneven = [0.3, 0.45, 0.5, 0.6, 0.7]  # 0.1 against 0.05 at one, 0.2 against 0.2 at two
    assert measures.symmetry(sweep(smile=uneven), "smile") == pytest.approx(0.75)
    assert measures.symmetry(
        sweep(scales=np.array([-2, -1, 0, 1.5, 3]), smile=[0.4, 0.45, 0.5, 0.575, 0.65]), "smile"
    ) == pytest.approx(1.0)  # scales that do not pair up
    same_side = [0.7, 0.6, 0.5, 0.6, 0.7]
    assert measures.symmetry(sweep(smile=same_side), "smile") == 0.0


def test_parse_loss_is_against_the_unedited() -> None:
    bad = blind(0, 0, 4) | blind(0, 1, 4) | blind(1, 1, 2)
    assert measures.parse_rate(sweep(unreadable=bad)).tolist() == [1, 1, 0.75, 1, 0.5]
    assert measures.parse_loss(sweep(unreadable=bad)) == pytest.approx(0.25)
    assert measures.parse_loss(sweep()) == 0


# ---------------------------------------------------------------------------------------------- at equal displacement


def test_scale_at_interpolates_outwards() -> None:
    found = sweep(smile=[0.3, 0.45, 0.5, 0.54, 0.7])  # -2 -.5 0 .4 2 sigma
    assert measures.scale_at(found, UNIT, "smile", 1.0) == pytest.approx(1 + 0.6 / 1.6)
    assert measures.scale_at(found, UNIT, "smile", 0.2) == pytest.approx(0.5)
    assert measures.scale_at(found, UNIT, "smile", -1.0) == pytest.approx(-1 - 0.5 / 1.5)
    assert measures.scale_at(found, UNIT, "smile", 2.0) == pytest.approx(2.0)
    assert measures.scale_at(found, UNIT, "smile", 2.1) is None
    assert measures.scale_at(sweep(smile=rising(-0.1)), UNIT, "smile", 1.0) is None  # the wrong way


def test_leak_lets_seeds_cancel_but_not_prompts() -> None:
    # At scale 1 (1 sigma of smile) age moves by +1 and +3 sigma in prompt 0, by -2 and -2 in prompt 1.
    slopes = np.array([[0.1, 0.3], [-0.2, -0.2]])
    found = sweep(smile=rising(), age=0.5 + slopes[:, :, None] * SCALES)
    cell = measures.leak(found, UNIT, "smile", "age")
    assert cell.signed == pytest.approx(0.0)
    assert cell.absolute == pytest.approx(2.0)
    assert cell.strict == pytest.approx(2.0)
    assert cell.floor == pytest.approx(np.mean([np.sqrt(2 / np.pi) * np.sqrt(x / 2) for x in (5, 4)]))
    mixed = sweep(smile=rising(), age=0.5 + np.array([[0.1, -0.1], [0.1, -0.1]])[:, :, None] * SCALES)
    assert measures.leak(mixed, UNIT, "smile", "age").absolute == pytest.approx(0.0)
    assert measures.leak(mixed, UNIT, "smile", "age").strict == pytest.approx(1.0)


def test_leak_that_is_the_same_in_both_directions_is_seen() -> None:
    bump = sweep(smile=rising(), age=0.5 + 0.1 * np.abs(SCALES))  # older whichever way the smile goes
    cell = measures.leak(bump, UNIT, "smile", "age")
    assert cell.signed == pytest.approx(0.0) and cell.absolute == pytest.approx(1.0)


def test_one_direction_stands_alone_where_the_other_is_not_reached() -> None:
    found = sweep(smile=[0.5, 0.5, 0.5, 0.6, 0.7], age=rising(0.02))
    assert measures.leak(found, UNIT, "smile", "age").absolute == pytest.approx(0.2)
    assert np.isnan(measures.leak(found, UNIT, "smile", "age", 3.0).absolute)


def test_categorical_leak_is_over_what_differs_anyway() -> None:
    hats = np.full((2, 2, 5), "none", dtype=object)
    hats[0, 0, 3:] = "cap"  # of 4 pictures one has another hat at scale 1, none at -1: 0.25 / 0.5 and 0
    cell = measures.leak(sweep(smile=rising(), hat=hats), UNIT, "smile", "hat")
    assert cell.absolute == pytest.approx(0.25) and np.isnan(cell.signed)
    gone = sweep(smile=rising(), unreadable=blind(0, 0, 3))  # an unreadable picture has lost its hat too
    assert measures.leak(gone, UNIT, "smile", "hat").absolute == pytest.approx(0.25)


def chosen(found: SweepReadings, *others: str) -> float:
    own = measures.leak(found, UNIT, "smile", "smile")
    row = measures.leakage(found, UNIT, "smile")
    return measures.selectivity(own, [row[name] for name in others] if others else row.values())


def test_selectivity() -> None:
    found = sweep(smile=rising(), age=rising(0.05), zoom=rising(-0.02))
    assert chosen(found, "age", "zoom") == pytest.approx(1 / 0.35)
    assert chosen(found) == pytest.approx(1 / (0.7 / (len(CONTINUOUS) - 1 + len(CATEGORICAL))))
    # An edit half as strong at every scale is no more selective.
    half = sweep(smile=rising(0.05), age=rising(0.025), zoom=rising(-0.01))
    assert chosen(half) == pytest.approx(chosen(found))
    assert np.isnan(chosen(sweep(smile=rising())))  # nothing else moves: no ratio


def test_a_categorical_target() -> None:
    hats = np.full((1, 2, 5), "none", dtype=object)
    hats[:, :, 3:] = "crown"
    found = sweep((1, 2), hat=hats)
    natural = Natural({**UNIT.sigma, "hat=crown": 0.5}, UNIT.differ, UNIT.rmse)
    assert measures.monotone(found, natural, "hat=crown").all()
    assert measures.response(found, natural, "hat=crown").tolist() == [0, 0, 0, 2, 2]
    assert measures.leak(found, natural, "hat=crown", "hat=crown").absolute == pytest.approx(1.0)
    assert "hat" not in measures.leakage(found, natural, "hat=crown")


def test_identity_kept() -> None:
    others = len(CONTINUOUS) + len(CATEGORICAL) - 1
    age = np.full((2, 2, 5), 0.5)
    age[0, 0, 3] = 0.541  # more than 2 x 0.02 away at +1 sigma
    age[0, 1, 1] = 0.539
    found = measures.identity_kept(sweep(smile=rising(), age=age), UNIT, "smile")
    assert found == pytest.approx(np.array([[1 - 0.5 / others, 1], [1, 1]]))
    gone = measures.identity_kept(sweep(smile=rising(), unreadable=blind(1, 1, 1)), UNIT, "smile")
    assert gone == pytest.approx(np.array([[1, 1], [1, 0.5]]))


def test_off_class_effect() -> None:
    assert measures.off_class_effect(np.array([0.01, 0.03]), np.array([0.1])) == pytest.approx(0.2)
    assert np.isnan(measures.off_class_effect(np.array([0.1]), np.zeros(2)))


# --------------------------------------------------------------------------------------------------- around them


def test_within_keeps_zero_and_the_range() -> None:
    found = sweep(smile=rising()).within(0.5, 2)
    assert found.scales.tolist() == [0, 1, 2] and found.of("smile").shape == (2, 2, 3)


def test_take_resamples_prompts_with_their_seeds() -> None:
    ids = np.arange(4).reshape(2, 2, 1) / 10
    found = sweep(smile=np.broadcast_to(ids, (2, 2, 5))).take(np.array([1, 1]), np.array([[0, 0], [1, 0]]))
    assert found.of("smile")[:, :, 0] == pytest.approx(np.array([[0.2, 0.2], [0.3, 0.2]]))


def test_rows_and_sweeps_agree() -> None:
    class Echo:
        """Pictures whose red is the strength, green the seed; read back as smile and age."""

        def pictures(self, prompts, seeds, strengths):
            rows = zip(prompts, seeds, strengths, strict=True)
            return np.array([[[[s * 10 + 100, seed, len(p)]]] for p, seed, s in rows], np.uint8)

        def read(self, pictures, /):
            from dodgeburn.pocket.reader import Readings

            n, red = len(pictures), pictures[:, 0, 0]
            values = {name: np.zeros(n) for name in CONTINUOUS} | {
                name: np.full(n, options[0]) for name, options in CATEGORICAL.items()
            }
            return Readings({**values, "smile": red[:, 0] / 1.0, "age": red[:, 1] / 1.0, "zoom": red[:, 2] / 1.0}, {},
                            np.zeros(n, bool))  # fmt: skip

    echo = Echo()
    found = read_sweep(echo, echo, ["a", "bb"], [7, 8, 9], [2, -1])
    assert found.scales.tolist() == [-1, 0, 2] and found.shape == (2, 3)
    assert found.of("smile")[1, 2].tolist() == [90, 100, 120]
    assert found.of("age")[0, :, 0].tolist() == [7, 8, 9] and found.of("zoom")[:, 0, 0].tolist() == [1, 2]
    assert sweep_rows(["a"], [1, 2], [0, 1])[1] == [1, 1, 2, 2]


def test_bad_targets_and_scales() -> None:
    wrong = {"smil": "no attribute", "hat": "has values", "hat=wig": "has values", "age=old": "alone"}
    for target, said in wrong.items():
        with pytest.raises(UserError, match=said):
            attribute_of(target)
    with pytest.raises(ValueError, match="0 among them"):
        sweep((1, 1), scales=np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="rising"):
        sweep((1, 1), scales=np.array([1.0, 0.0]))


def test_bootstrap_covers_a_mean_of_magnitudes() -> None:
    """Resampling seeds pushes this statistic up; its interval still holds the truth about as often as it says."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(60):
        truth = rng.normal(0.5, 0.1, (12, 1))
        values = truth + rng.normal(0, 0.3, (12, 8))

        def statistic(prompts, seeds, values=values):
            return {"magnitude": float(np.abs(values[prompts[:, None], seeds].mean(1)).mean())}

        found = bootstrap_statistics(statistic, (12, 8), resamples=200, seed=trial)["magnitude"]
        hits += found.low <= 0.5 <= found.high
    assert hits / 60 >= 0.88


def test_bootstrap_of_one_picture_has_no_interval() -> None:
    found = bootstrap_statistics(lambda p, s: {"x": 1.0, "y": float("nan")}, (1, 1))
    assert found["x"].mean == 1.0 and found["x"].ends is None
    same = bootstrap_statistics(lambda p, s: {"x": 0.0}, (4, 4), resamples=20)["x"]
    assert same.mean == 0.0 and same.ends is None  # never seen is not never
    many = bootstrap_statistics(lambda p, s: {"x": float(s[0, 0]), "y": float("nan")}, (2, 3), resamples=20)
    assert many["y"].ends is None and many["x"].ends is not None
