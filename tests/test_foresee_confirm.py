"""The choice among many ways to save: what was lucky on one half of the prompts is not taken."""

import numpy as np
import pytest

from dodgeburn.foresee.confirm import bound, confirmed, halves


def test_halves_keep_the_slots_of_a_prompt_together() -> None:
    prompt = np.array(["b", "a", "b", "c", "d", "a"])
    assert halves(prompt).tolist() == [True, False, True, True, False, False]


def test_the_bound_by_hand_and_slots_of_one_prompt_count_as_one() -> None:
    off = np.array([0.0, 1.0, 2.0, 3.0])
    apart = bound(off, np.array(["a", "b", "c", "d"]))
    assert apart == pytest.approx(1.5 + 1.645 * np.std(off, ddof=1) / 2)
    # Four copies of each say no more than one: only the number of prompts counts.
    again = bound(np.repeat(off, 4), np.repeat(["a", "b", "c", "d"], 4))
    assert again == pytest.approx(apart)
    assert bound(np.ones(3), np.array(["a"] * 3)) == np.inf and bound(np.zeros(3), np.array(["a"] * 3)) == 0


def test_what_holds_on_both_halves_is_taken_and_the_cheapest_of_it() -> None:
    prompt = np.arange(8)
    good, odd = np.full(8, -1.0), np.where(halves(prompt), -2.0, 1.0)  # odd: lucky on the first half
    price = np.repeat([[4.0], [3.0], [2.0], [1.0]], 8, axis=1)
    off = np.array([good * 3, good * 2.5, good, -good])
    assert confirmed(price, off, prompt) == 2
    assert confirmed(price[:2], np.array([good * 3, odd]), prompt) == 0
    assert confirmed(price[:1], odd[None], prompt) is None
    assert confirmed(price[:0], off[:0], prompt) is None


def test_of_hundreds_that_are_all_too_bad_one_is_taken_at_most_as_often_as_the_bound_allows() -> None:
    """Every way is off by 0 or more in truth: with one half's luck alone nearly every trial would take one."""
    rng = np.random.default_rng(0)
    taken, lucky, trials, prompt = 0, 0, 300, np.arange(80)
    for _ in range(trials):
        price = np.repeat(rng.uniform(1, 8, (100, 1)), 80, axis=1)
        off = rng.normal(size=(100, 80))
        taken += confirmed(price, off, prompt) is not None
        lucky += any(bound(row, prompt) <= 0 for row in off)
    assert lucky > 0.9 * trials
    assert taken / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
