"""The choice among many ways to save: what was lucky is not taken."""

import numpy as np
import pytest

from dodgeburn.foresee.confirm import surely_cheapest, upper_bounds


def test_one_way_alone_has_its_own_bound_and_slots_of_one_prompt_count_as_one() -> None:
    off = np.random.default_rng(0).normal(size=(1, 400))
    prompt = np.arange(400)
    alone = upper_bounds(off, prompt)[0]
    assert alone == pytest.approx(off.mean() + 1.645 * off.std(ddof=1) / 20, abs=0.01)
    # Four copies of each say no more than one: only the number of prompts counts.
    assert upper_bounds(np.repeat(off, 4, axis=1), np.repeat(prompt, 4))[0] == pytest.approx(alone)


def test_copies_of_one_way_cost_nothing_and_other_ways_do() -> None:
    rng = np.random.default_rng(1)
    one, others = rng.normal(size=(1, 200)), rng.normal(size=(300, 200))
    alone = upper_bounds(one, np.arange(200))[0]
    assert upper_bounds(np.repeat(one, 50, axis=0), np.arange(200))[0] == pytest.approx(alone)
    assert upper_bounds(np.concatenate([one, others]), np.arange(200))[0] > alone + 1 / np.sqrt(200)


def test_the_cheapest_that_is_good_enough_is_taken() -> None:
    rng = np.random.default_rng(2)
    mean = np.array([-3.0, -1.0, -0.05, 0.5])  # the third is better than wanted, but not surely
    off = mean[:, None] + 0.5 * rng.normal(size=(4, 60))
    assert surely_cheapest(np.array([4.0, 3.0, 2.0, 1.0]), off, np.arange(60)) == 1
    assert surely_cheapest(np.array([1.0, 3.0, 2.0, 1.0]), off, np.arange(60)) == 0
    assert surely_cheapest(np.array([2.0, 1.0]), off[2:], np.arange(60)) is None
    assert surely_cheapest(np.zeros(0), off[:0], np.arange(60)) is None


def test_the_same_everywhere_needs_no_bound() -> None:
    off = np.array([[0.0] * 3, [-1.0] * 3, [1.0] * 3, [-1.0, -1.0, -1.1]])
    assert upper_bounds(off, np.array(["a", "a", "a"])).tolist() == [0, -1, 1, np.inf]
    assert upper_bounds(off[:3], np.array(["a", "b", "c"])).tolist() == [0, -1, 1]


def test_of_hundreds_that_are_too_bad_one_is_taken_no_oftener_than_it_says() -> None:
    """Every way is off by 0 in truth: with bounds for one way each, nearly every trial would take one."""
    rng = np.random.default_rng(0)
    taken, lucky, trials, prompt = 0, 0, 300, np.arange(80)
    for _ in range(trials):
        off = rng.normal(size=(100, 80))
        taken += surely_cheapest(rng.uniform(1, 8, 100), off, prompt) is not None
        lucky += bool((off.mean(1) + 1.645 * off.std(1, ddof=1) / np.sqrt(80) <= 0).any())
    assert lucky > 0.9 * trials
    assert taken / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
