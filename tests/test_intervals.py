import numpy as np
import pytest

from dodgeburn.measure.intervals import binomial_interval, bootstrap_mean


def test_mean_and_reproducible_ends() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, (8, 4))
    one, two = bootstrap_mean(values), bootstrap_mean(values)
    assert one == two
    assert one.mean == pytest.approx(values.mean()) and one.low < one.mean < one.high
    assert bootstrap_mean(values, seed=1) != one
    wide = bootstrap_mean(values, level=0.99)
    assert wide.low < one.low and wide.high > one.high


def test_prompts_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    within = rng.normal(0.5, 0.1, (8, 4))
    between = within + np.linspace(-0.3, 0.3, 8)[:, None]
    assert np.ptp(bootstrap_mean(between).ends) > 2 * np.ptp(bootstrap_mean(within).ends)


def test_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(150):  # 12 prompts with means of their own, 4 seeds each
        values = 0.6 + rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 0.1, (12, 4))
        found = bootstrap_mean(values, resamples=400, seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 0.88 <= hits / 150 <= 1.0


def test_nan_is_left_out() -> None:
    values = np.array([[0.5, np.nan], [np.nan, np.nan], [1.0, 1.0]])
    found = bootstrap_mean(values)
    assert found.mean == pytest.approx(2.5 / 3) and 0.5 <= found.low <= found.high <= 1


def test_nothing_to_resample() -> None:
    assert np.isnan(bootstrap_mean(np.full((2, 2), np.nan)).mean)
    single = bootstrap_mean(np.array([[0.5]]))
    assert single.mean == 0.5 and single.ends is None
    with pytest.raises(ValueError):
        bootstrap_mean(np.zeros(3))


def test_all_right_is_not_certain() -> None:
    found = bootstrap_mean(np.ones((8, 4)), shares=True)
    assert found.mean == 1 and found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 32))
    assert bootstrap_mean(np.ones((8, 4))).low == 1
    assert binomial_interval(0, 10)[0] == 0 and binomial_interval(5, 10)[0] == pytest.approx(0.187, abs=1e-3)
