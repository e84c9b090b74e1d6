"""Figures of merit and rules for stopping, against values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.errors import UserError
from dodgeburn.foresee import scores
from dodgeburn.foresee.policy import (
    Exit,
    Fixed,
    Hazard,
    Induction,
    Never,
    backward_induction,
    choose,
    clustered_bound,
    described,
    exit_distribution,
    geometric_prior,
    on_grid,
    outcome,
    policy_of,
    strictest_last,
    upper_bound,
)


def way(bad: list[float], leave: float = 0.2, hazard: float = 0.1) -> dict[str, np.ndarray]:
    k = len(bad)
    return {
        "bad": np.array(bad), "exit": np.full(k, leave), "hazard": np.full(k, hazard),
        "progress": (np.arange(k) + 1) / k,
    }  # fmt: skip


def test_auroc_by_hand() -> None:
    assert scores.auroc(np.array([1, 2, 3, 4.0]), np.array([0, 0, 1, 1])) == 1
    assert scores.auroc(np.array([1, 3, 2, 4.0]), np.array([0, 0, 1, 1])) == 0.75
    assert scores.auroc(np.ones(4), np.array([0, 0, 1, 1])) == 0.5
    assert np.isnan(scores.auroc(np.ones(2), np.array([1, 1])))


def test_figures_within_prompts_ignore_how_hard_a_prompt_is() -> None:
    groups = np.repeat(["easy", "hard"], 4)
    severity = np.array([0, 1, 2, 1.5, 3, 4, 5, 4.5])
    by_prompt = np.repeat([0.0, 1.0], 4)
    assert scores.auroc(by_prompt, severity >= 3) == 1
    assert scores.within_prompt_spearman(by_prompt, severity, groups) == 0
    assert np.isnan(scores.within_prompt_auroc(by_prompt, severity >= 3, groups))
    mixed = np.array([0, 5, 0, 5, 0, 5, 0, 5.0])
    assert scores.within_prompt_auroc(by_prompt, mixed >= 3, groups) == 0.5
    assert scores.within_prompt_spearman(severity, severity, groups) == pytest.approx(1)


def test_spearman_agrees_with_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=40), rng.normal(size=40)
    assert scores.spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic))
    assert scores.spearman(np.ones(4), np.arange(4.0)) == 0


def test_calibration_error_by_hand() -> None:
    p, bad = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0, 0, 1, 1])
    assert scores.calibration_error(p, bad, 2) == pytest.approx(0.1)
    assert scores.calibration_error(np.array([0.5] * 4), bad, 1) == pytest.approx(0)


def test_chance_alone_leaves_a_calibration_error() -> None:
    # In one bin of n coins it is the mean absolute deviation of their share, sqrt(2 / (pi n)) / 2.
    for n in (50, 512):
        assert scores.calibration_floor(np.full(n, 0.5), 1) == pytest.approx(0.5 * np.sqrt(2 / (np.pi * n)), rel=0.15)
    assert scores.calibration_floor(np.array([0.0, 1.0] * 20)) == 0


def test_intervals_over_prompts_are_wider_than_over_pictures() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(size=12), 20)
    groups = np.repeat(np.arange(12), 20)
    clustered = scores.over_prompts(lambda rows: float(level[rows].mean()), groups)
    single = scores.over_prompts(lambda rows: float(level[rows].mean()), np.arange(240))
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_exit_distributions_sum_to_one(leave: list[float]) -> None:
    p = exit_distribution(torch.tensor([leave]), torch.ones(1, len(leave), dtype=torch.bool))
    assert torch.isclose(p.sum(), torch.tensor(1.0), atol=1e-5) and bool((p >= 0).all())


def test_exit_distribution_by_hand() -> None:
    there = torch.tensor([[True, True, True], [True, True, False]])
    p = exit_distribution(torch.full((2, 3), 0.5), there)
    assert p.tolist() == [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]
    assert torch.allclose(geometric_prior(there, 0.25)[0], torch.tensor([0.25, 0.1875, 0.5625]))


def test_each_rule_by_hand() -> None:
    one = way([0.2, 0.6, 0.9, 0.95])
    assert Never().first(one) is None
    assert Fixed(0.5, 0.55).first(one) == 1 and Fixed(0.5, 0.7).first(one) is None
    # CDF: 0.2, 0.36, 0.488, 0.59: ready at the fourth step for q = 0.5, at the second for 0.3
    assert Exit(0.5, 0.9).first(one) == 3 and Exit(0.3, 0.5).first(one) == 1
    assert Exit(0.3, 0.7).first(one) is None, "an answer that was ready and good is not asked for again"
    # 1 - 0.9^k: 0.1, 0.19, 0.271, 0.344
    assert Hazard(0.25).first(one) == 2 and Hazard(0.5).first(one) is None
    assert Induction((1.0, 1.0, 0.8, 0.8)).first(one) == 2


@pytest.mark.parametrize("policy", [Never(), Fixed(0.5, 0.3), Exit(0.5, 0.4), Hazard(0.2), Induction((0.5, 0.7))])
def test_rules_decide_alike_step_by_step_and_at_once(policy: object) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        whole = way(rng.random(9).tolist(), 0.15, 0.05)
        stop = policy.first(whole)  # type: ignore[attr-defined]
        for k in range(1, 10):
            part = {name: values[:k] for name, values in whole.items()}
            first = policy.first(part)  # type: ignore[attr-defined]
            assert first == (stop if stop is not None and stop < k else None)
    assert policy_of(described(policy)) == policy  # type: ignore[arg-type]


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(UserError, match="'guess' is not known: expected never"):
        policy_of({"kind": "guess"})


def test_outcome_by_hand() -> None:
    ways = [way([0.9, 0.9]), way([0.9, 0.9]), way([0.1, 0.1]), way([0.1, 0.1])]
    found = outcome(Fixed(0.5, 0.5), ways, np.array([1, 0, 0, 1]))
    assert (found.saved, found.good_rejected, found.bad_rejected) == (0.25, 0.5, 0.5)
    assert found.per_good == 3.0 and found.bad_delivered == 0.5  # 0.5 + 0.5 + 1 + 1 for one good picture


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))  # rule of three: 59 without failure reach 5 %
    assert upper_bound(0, 58) > 0.05 > upper_bound(0, 59)
    assert upper_bound(3, 3) == 1 and upper_bound(0, 0) == 1


def test_a_prompts_pictures_count_as_what_they_are_worth() -> None:
    # 40 prompts of 8 pictures, of two of them all are hit: as much as 2 of 40 say.
    groups = np.repeat(np.arange(40), 8)
    together = groups < 2
    effect = 40 / 39 * (2 * 8**2 * 0.95**2 + 38 * 8**2 * 0.05**2) / 320**2 / (0.05 * 0.95 / 320)
    assert clustered_bound(together, groups) == pytest.approx(upper_bound(16 / effect, 320 / effect))
    assert clustered_bound(together, groups) == pytest.approx(upper_bound(2, 40), abs=0.005)
    # The same number spread evenly is as good as independent, and never better.
    spread = np.zeros(320, bool)
    spread[np.arange(16) * 20] = True
    assert clustered_bound(spread, groups) == pytest.approx(upper_bound(16, 320))
    assert clustered_bound(np.zeros(59, bool), np.arange(59)) == pytest.approx(upper_bound(0, 59))


def made_up(n: int, seed: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Calibrated ways: the log-odds of a bad end walk to their end."""
    rng = np.random.default_rng(seed)
    bad = rng.random(n) < 0.4
    steps = rng.normal(np.where(bad, 0.35, -0.35)[:, None], 0.8, (n, 20)).cumsum(1)  # log-odds move 2 mu / sd^2 x
    odds = steps * (2 * 0.35 / 0.8**2) + np.log(0.4 / 0.6)
    return [way((1 / (1 + np.exp(-o))).tolist(), 0.2, 0.02) for o in odds], bad


def test_good_pictures_lost_stay_under_the_limit_on_new_data() -> None:
    ways, bad = made_up(1500, 0)
    name, policy, _ = choose(ways, bad, limit=0.05)
    new = outcome(policy, *made_up(4000, 1))
    assert new.good_rejected < 0.055 and new.bad_rejected > 0.4 and new.saved > 0.1
    assert new.per_good < 1 / 0.6, f"{name} made good pictures dearer"


def test_too_few_pictures_permit_no_rule() -> None:
    ways, bad = made_up(60, 2)
    assert strictest_last([Fixed(0.5, 0.999), Fixed(0.5, 0.5)], ways, bad, 0.05, 0.95) == Never()


def test_backward_induction_beats_every_single_threshold_where_nothing_is_lost() -> None:
    """Without a price for good pictures its expected cost is the least; on its own data it is hard to beat."""
    ways, bad = made_up(3000, 3)
    best = outcome(backward_induction(ways, bad, 0.0), ways, bad).per_good
    singles = [outcome(Fixed(at, t), ways, bad).per_good for at in (0.1, 0.25, 0.5, 0.75) for t in (0.3, 0.5, 0.7, 0.9)]
    assert best <= min(singles) * 1.01
    assert backward_induction(ways, bad, 1e6).thetas[10] > backward_induction(ways, bad, 0.0).thetas[10]


def test_values_on_a_grid() -> None:
    assert on_grid(np.array([1.0, 2.0]), np.array([0.5, 1.0]), 4).tolist() == [1, 1, 1, 2]
