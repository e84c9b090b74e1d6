"""Preference losses: values by hand, gradients against formulas in double precision, symmetry, the safeguard."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dodgeburn.rework.dpo.losses import LOSSES, PairErrors, safe_share, scaled_beta, scaled_gradient

BETA = 7.0
AT_ZERO = {"sigmoid": math.log(2), "ipo": 0.25, "hinge": 1.0, "linear": 0.0, "kto": 0.5}


def derivatives(name: str, w: float, x: float, rw: float, rx: float, others: list[float]) -> tuple[float, float]:
    """(d loss / d winner, d loss / d loser), written out; `others` are the rewards of the whole batch for KTO."""
    m = (w - x) - (rw - rx)
    z = -BETA / 2 * m
    s = 1 / (1 + math.exp(-z))
    if name == "sigmoid":
        return BETA / 2 * (1 - s), -BETA / 2 * (1 - s)
    if name == "ipo":
        return -BETA * (z - 0.5), BETA * (z - 0.5)
    if name == "hinge":
        return (BETA / 2, -BETA / 2) if z < 1 else (0.0, 0.0)
    if name == "linear":
        return BETA / 2, -BETA / 2
    if name == "kto":
        q = max(0.0, float(np.mean(others)))
        liked = 1 / (1 + math.exp(-(-BETA / 2 * (w - rw) - q)))
        disliked = 1 / (1 + math.exp(-(q + BETA / 2 * (x - rx))))
        return liked * (1 - liked) * BETA / 4, -disliked * (1 - disliked) * BETA / 4
    if name == "sft":
        return 1.0, 0.0

    def phi(v: float) -> float:
        return 0.5 * v / math.expm1(0.5 * v)

    def slope(v: float) -> float:
        e = math.expm1(0.5 * v)
        return 0.5 / e - 0.25 * v * math.exp(0.5 * v) / e**2

    away = 1 / (1 + math.exp(1000 * (phi(w) - phi(x))))  # 1 - sigmoid
    return 1 - BETA * away * 1000 * slope(w), BETA * away * 1000 * slope(x)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_formula_s(name: str) -> None:
    values = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.05
    if name == "mapo":  # else its sigmoid is saturated and the test sees little
        values[1] = values[0] + 1e-3 * (values[1] - 0.25)
    values.requires_grad_(True)
    w, x, rw, rx = values
    LOSSES[name].function(PairErrors(w, x, rw.detach(), rx.detach()), BETA).sum().backward()
    assert values.grad is not None
    rewards = [float(v) for v in (-(BETA / 2) * torch.cat([w - rw, x - rx])).detach()]
    for i in range(6):
        a, b, ra, rb = values.detach()[:, i].tolist()
        wanted = derivatives(name, a, b, ra, rb, rewards)
        assert values.grad[:2, i].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert values.grad[2:, i].tolist() == [0, 0]


@pytest.mark.parametrize("name", AT_ZERO)
def test_value_at_zero_difference(name: str) -> None:
    e = torch.tensor([0.3, 0.01], dtype=torch.float64)
    for beta in (1.0, 5000.0):
        assert LOSSES[name].function(PairErrors(e, 2 * e, e, 2 * e), beta).tolist() == pytest.approx(
            [AT_ZERO[name]] * 2
        )


def test_value_at_zero_difference_without_reference() -> None:
    e = torch.tensor([0.3, 0.0], dtype=torch.float64)
    nothing = torch.full_like(e, float("nan"))
    found = LOSSES["mapo"].function(PairErrors(e, e, nothing, nothing), 0.1)
    assert found.tolist() == pytest.approx([0.3 + 0.1 * math.log(2), 0.1 * math.log(2)])
    assert LOSSES["sft"].function(PairErrors(e, nothing, nothing, nothing), 1.0).tolist() == [0.3, 0.0]


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "linear", "kto"])
def test_swapping_winner_and_loser_turns_the_gradient_round(name: str) -> None:
    """At the reference; away from it the size differs, not the side."""
    e = torch.tensor([0.2, 0.4], dtype=torch.float64)

    def gradient(swap: bool) -> Tensor:
        picture_a, picture_b = e.clone().requires_grad_(True), (e + 0.1).requires_grad_(True)
        sides = (picture_b, picture_a) if swap else (picture_a, picture_b)
        errors = PairErrors(*sides, *(side.detach() for side in sides))
        LOSSES[name].function(errors, BETA).sum().backward()
        assert picture_a.grad is not None and picture_b.grad is not None
        return torch.stack([picture_a.grad, picture_b.grad])

    assert torch.allclose(gradient(False), -gradient(True)) and bool((gradient(False)[0] > 0).all())


def test_beta_is_scaled_with_the_elements() -> None:
    assert scaled_beta(5000, 4 * 64 * 64) == 5000 and scaled_beta(5000, 4 * 16 * 16) == 312.5
    # The same sum of errors gives the same loss at any size.
    for size in (16, 64):
        n = 4 * size * size
        e = PairErrors(*(torch.tensor([total / n]) for total in (90.0, 100.0, 95.0, 96.0)))
        loss = LOSSES["sigmoid"].function(e, scaled_beta(5000, n))
        assert float(loss) == pytest.approx(math.log1p(math.exp(-5000 / 16384 / 2 * 9)), rel=1e-4)


# -------------------- safeguard


def test_safe_share_by_hand() -> None:
    winner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).view(4, 2, 1, 1)
    loser = torch.tensor([[4.0, 3.0], [0.5, 9.0], [-4.0, 1.0], [1.0, 1.0]]).view(4, 2, 1, 1)
    assert safe_share(winner, loser).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert safe_share(winner, loser, slack=0.5).tolist() == [0.125, 1.0, 1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from(["sigmoid", "linear", "ipo"]))
def test_the_winner_s_error_does_not_rise_to_first_order(seed: int, slack: float, name: str) -> None:
    """Both predictions moved by one shared change, as the paper's analysis has it."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=g)
    true, base_w, base_l = (shared + torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=g) for _ in range(3))
    step = torch.zeros(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def gradient(share: Tensor | None) -> Tensor:
        residuals = base_w + step - true, base_l + step - true
        w, x = (r.square().mean(dim=(1, 2, 3)) for r in residuals)
        if share is not None:
            x = scaled_gradient(x, share)
        e = PairErrors(w, x, w.detach(), x.detach())
        return torch.autograd.grad(LOSSES[name].function(e, BETA).sum(), step)[0]

    toward = 2 * (base_w - true) / 16  # gradient of the winner's error
    share = safe_share(base_w - true, base_l - true, slack)
    change = -(gradient(share) * toward).sum(dim=(1, 2, 3))
    assert bool((change <= 1e-12).all())
    held = share < 1
    if slack == 0 and bool(held.any()):  # and no more is held back than is needed
        assert change[held].tolist() == pytest.approx([0.0] * int(held.sum()), abs=1e-12)
        assert bool((-(gradient(None) * toward).sum(dim=(1, 2, 3))[held] > 0).all())


def test_scaled_gradient_keeps_the_value() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scaled_gradient(x.square(), torch.tensor([0.5, 0.0]))
    y.sum().backward()
    assert y.tolist() == [4.0, 9.0] and x.grad is not None and x.grad.tolist() == [2.0, 0.0]
