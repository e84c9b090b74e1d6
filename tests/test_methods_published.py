"""Merge methods against numbers worked out elsewhere: sd-mecha's published 4 x 4 cases, and the papers' equations.

sd-mecha's tests (github.com/ljleb/sd-mecha, MIT, tests/merge_methods) state tensors with four decimals. Where it
departs from the paper, the expected numbers here are the paper's for the same inputs; the docstring says what differs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import torch

from dodgeburn.merge.methods import merge_tensors
from dodgeburn.merge.methods.pieces import HeldPieces
from dodgeburn.merge.methods.statistics import stock_cosine
from dodgeburn.merge.methods.task_vectors import keep_probabilities, trim, trim_limits

T = torch.tensor
ONE = T([[3.0, 4.0, 1.0, -2.0], [2.0, 1.0, -4.0, 3.0], [-1.0, 2.0, 3.0, 4.0], [4.0, -3.0, 2.0, 1.0]])
TWO = T([[-1.0, 3.0, 4.0, 2.0], [4.0, 2.0, -3.0, 1.0], [3.0, -1.0, 2.0, 4.0], [2.0, 4.0, 1.0, -3.0]])
THREE = T([[-1.0, 3.0, 2.0, 0.0], [3.0, 0.0, 2.0, 1.0], [-1.0, 3.0, 1.0, 0.0], [3.0, 0.0, -4.0, 3.0]])
TURNED = ONE.roll(2, 0)  # rows 2, 3, 0, 1
ZERO = torch.zeros(4, 4)


def test_ties_case() -> None:
    """Keep half, elect, mean. sd-mecha keeps values from the 8th smallest on (2, 3, 4), which is 12 of the 16."""
    published = T([[3.0, 3.0, 3.0, 0.0], [3.0, -3.0, 0.0, 3.0], [3.0, 3.0, 3.0, 0.0], [3.0, -3.0, 0.0, 3.0]])
    found = merge_tensors([TURNED, ONE], 1.0, "ties", ZERO, {"density": 12 / 16})
    # It counts signs there: +4 and -2 are a draw and 0. The paper's sum elects the larger: +4, -4.
    draw = published == 0
    assert torch.equal(found[~draw], published[~draw])
    assert found[draw].tolist() == [4.0, -4.0, 4.0, -4.0]


def test_ties_case_with_half_of_the_values() -> None:
    """The paper's own trimming at density 0.5: 3s and 4s, eight of sixteen. By hand."""
    expected = T([[3.0, 4.0, 3.0, 4.0], [4.0, -3.0, -4.0, 3.0], [3.0, 4.0, 3.0, 4.0], [4.0, -3.0, -4.0, 3.0]])
    assert torch.equal(merge_tensors([TURNED, ONE], 1.0, "ties", ZERO, {"density": 0.5}), expected)
    pieces = HeldPieces([ONE, torch.randn(16)], torch.zeros(16))
    assert torch.equal(trim(ONE.clone(), trim_limits(pieces, density=0.5)[0]), ONE * (ONE.abs() >= 3))
    many = torch.randn(128, 64)  # mergekit's test of density
    limit = trim_limits(HeldPieces([many, many], torch.zeros_like(many)), density=0.5)[1]
    assert int((trim(many.clone(), limit) != 0).sum()) == 128 * 64 // 2


def test_model_stock_case() -> None:
    """t = N c / (1 + (N - 1) c), with c the mean cosine of all pairs: a whole tensor's numbers, in exact fractions."""
    models = [ONE, TWO, TURNED]
    dots = [ONE * TWO, ONE * TURNED, TWO * TURNED]
    squares = [int((m * m).sum()) for m in models]
    assert squares == [120, 120, 120]
    cosines = [Fraction(int(d.sum()), 120) for d in dots]
    c = sum(cosines) / 3
    assert c > 0 and math.isclose(stock_cosine(models), float(c), rel_tol=1e-6)
    t = 3 * c / (1 + 2 * c)
    expected = float(t) * (ONE + TWO + TURNED) / 3
    torch.testing.assert_close(merge_tensors(models, 1.0, "model_stock", ZERO), expected, rtol=1e-5, atol=1e-6)


def test_model_stock_case_by_rows() -> None:
    """sd-mecha works row by row and skips the pair of first and last: the published rows where that is the same."""
    published = T([[0.2727, 2.4545, 2.1818, 1.0909], [2.5, 0.0, -1.25, 1.25], [0.8696, 0.8696, 1.0435, 1.0435]])
    for i, row in enumerate(published):
        rows = [m[i] for m in (ONE, TWO, TURNED)]
        neighbours = float(sum(torch.cosine_similarity(one, two, dim=0) for one, two in pairwise(rows)) / 2)
        t = 3 * neighbours / (1 + 2 * neighbours)
        torch.testing.assert_close(t * sum(rows) / 3, row, rtol=0, atol=1e-4)
    # Two models have one pair, so ours is the same formula.
    for i in range(3):
        pair = [ONE[i], TWO[i]]
        c = max(0.0, float(torch.cosine_similarity(ONE[i], TWO[i], dim=0)))
        found = merge_tensors(pair, 1.0, "model_stock", torch.zeros(4))
        torch.testing.assert_close(found, 2 * c / (1 + c) * (pair[0] + pair[1]) / 2, rtol=1e-5, atol=1e-6)


def test_geometric_median_case() -> None:
    """sd-mecha stops when the sum of distances no longer changes in float32; ours lies lower and, in float64, exact."""
    published = T([
        [0.4791, 3.3698, 2.2343, -0.1354],
        [2.9323, 0.9739, -1.7289, 1.7395],
        [0.2082, 1.4220, 2.0416, 2.6873],
        [3.0677, 0.0989, -0.2711, 0.4481],
    ])  # fmt: skip
    found = merge_tensors([ONE, TWO, THREE], 1.0, "geometric_median")
    torch.testing.assert_close(found, published, rtol=0, atol=1.1e-3)
    models = [m.double() for m in (ONE, TWO, THREE)]

    def distances(x: torch.Tensor) -> float:
        return sum(float((m - x.double()).norm()) for m in models)

    centre = torch.stack(models).mean(0)
    for _ in range(100):
        weights = [1 / (m - centre).norm() for m in models]
        centre = sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)  # type: ignore[operator]
    torch.testing.assert_close(found.double(), centre, rtol=0, atol=2e-6)
    assert distances(found) < distances(published) - 3e-7


def test_geometric_median_is_where_no_step_helps() -> None:
    """At the minimum of a sum of distances the unit vectors to the models cancel."""
    generator = torch.Generator().manual_seed(0)
    for count in (3, 5, 8):
        models = [torch.randn(144, generator=generator) for _ in range(count)]
        found = merge_tensors(models, 1.0, "geometric_median").double()
        units = [(m.double() - found) / (m.double() - found).norm() for m in models]
        assert float(sum(units).norm()) < 1e-5  # type: ignore[union-attr]


def test_della_probabilities_case() -> None:
    """MagPrune, Deep et al. 2024, eq. 1 and 2: p grows by window / n with each rank, and is the density on average."""
    for delta in (ONE, TWO, THREE):
        ranks = delta.abs().flatten().argsort(stable=True).argsort().reshape(4, 4)
        found = keep_probabilities(delta, 0.6, 0.2)
        expected = 0.6 + (ranks / 15 - 0.5) * 0.2  # ours reach both ends of the window
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert math.isclose(float(found.mean()), 0.6, rel_tol=1e-6)


def test_della_and_dare_have_the_expectation_of_the_papers() -> None:
    """Values are divided by their probability, so the mean over masks is the unthinned merge: 4 standard errors."""
    runs = 4000
    for method, params in (("dare", {"density": 0.4}), ("della", {"density": 0.6, "window": 0.2})):
        total, squares = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
        for seed in range(runs):
            found = merge_tensors([ONE, ONE], 1.0, method, ZERO, params, seed=seed, key="k").double()
            total += found
            squares += found**2
        mean = total / runs
        error = ((squares / runs - mean**2) / runs).sqrt()
        if method == "dare":
            expected = ONE.double()
        else:  # the mean over models that kept a value: (kept by either) / p
            p = keep_probabilities(ONE, **params).double()
            expected = ONE * (1 - (1 - p) ** 2) / p
        assert bool(((mean - expected).abs() < 4 * error).all()), method
