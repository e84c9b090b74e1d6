"""The choice among many ways to save: what was lucky is not taken."""

import numpy as np
import pytest

from dodgeburn.foresee.confirm import surely_cheapest, surely_good

N = 200
PROMPT = np.arange(N)


def way(mean: float, seed: int = 0, n: int = N) -> np.ndarray:
    """One that is off by `mean` standard errors in the mean of n slots: [1, n]."""
    off = np.random.default_rng(seed).normal(size=(1, n))
    off = (off - off.mean()) / off.std(ddof=1)
    return off + mean / np.sqrt(n)


def test_one_way_alone_needs_its_own_bound() -> None:
    assert surely_good(way(-1.85), PROMPT).tolist() == [True]
    assert surely_good(way(-1.45), PROMPT).tolist() == [False]


def test_slots_of_one_prompt_count_as_one() -> None:
    four = np.repeat(way(-1.45), 4, axis=1)
    assert surely_good(four, np.arange(4 * N)).tolist() == [True]  # as if there were four times the prompts
    assert surely_good(four, np.repeat(PROMPT, 4)).tolist() == [False]


def test_what_else_was_tried_counts_where_it_could_have_been_lucky() -> None:
    mine = way(-1.9)
    doubtful, hopeless, sure = (
        np.concatenate([way(m, seed) for seed in range(1, 201)]) for m in (0.0, 8.0, -9.0)
    )  # fmt: skip
    assert surely_good(np.repeat(mine, 50, axis=0), PROMPT).all()  # copies of it
    assert not surely_good(np.concatenate([mine, doubtful]), PROMPT).any()
    assert surely_good(np.concatenate([mine, hopeless]), PROMPT).tolist() == [True] + [False] * 200
    assert surely_good(np.concatenate([mine, sure]), PROMPT).all()  # they pass first, then it has its own bound


def test_the_cheapest_that_is_good_enough_is_taken() -> None:
    off = np.concatenate([way(-20.0, 1), way(-8.0, 2), way(-0.5, 3), way(3.0, 4)])
    assert surely_cheapest(np.array([4.0, 3.0, 2.0, 1.0]), off, PROMPT) == 1
    assert surely_cheapest(np.array([1.0, 3.0, 2.0, 1.0]), off, PROMPT) == 0
    assert surely_cheapest(np.array([2.0, 1.0]), off[2:], PROMPT) is None
    assert surely_cheapest(np.zeros(0), off[:0], PROMPT) is None


@pytest.mark.parametrize("prompt, last", [(["a", "a", "a"], False), (["a", "b", "c"], True)])
def test_the_same_everywhere_needs_no_bound_and_one_prompt_gives_none(prompt: list[str], last: bool) -> None:
    off = np.array([[0.0] * 3, [-1.0] * 3, [1.0] * 3, [-1.0, -1.0, -1.1]])
    assert surely_good(off, np.array(prompt)).tolist() == [True, True, False, last]


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
