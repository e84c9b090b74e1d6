"""Unmixing on matrices computed by hand, on edits whose effects add, and on real low-rank factors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slider_measures import sweep

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.slide.unmix import Mixing, check_targets, mixing_of, unmixed, unmixing


def mixing(matrix, error=0.0) -> Mixing:
    matrix = np.array(matrix, float)
    return Mixing(["smile", "age", "zoom"][: len(matrix)], matrix, np.full_like(matrix, error), 8, 4)


def test_two_by_two_by_hand() -> None:
    # R = [[1, .5], [0, 1]]; R^-1 = [[1, -.5], [0, 1]]
    assert unmixing(mixing([[1, 0.5], [0, 1]]), ridge=0) == pytest.approx(np.array([[1, -0.5], [0, 1]]))
    # A slider of half strength is brought to 1.
    assert unmixing(mixing([[0.5, 0], [0, 1]]), ridge=0) == pytest.approx(np.array([[2, 0], [0, 1]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-0.4, 0.4), min_size=6, max_size=6))
def test_the_inverse_undoes_the_mixing(leaks) -> None:
    r = np.eye(3)
    r[~np.eye(3, dtype=bool)] = leaks
    w = unmixing(mixing(r), ridge=0)
    assert np.diag(w @ r) == pytest.approx(np.ones(3), abs=0.06)
    assert np.abs(w @ r - np.eye(3)).max() < 0.06  # what dropping weights below 0.02 leaves


def test_ridge_draws_towards_the_sliders_as_they_are() -> None:
    r = mixing([[1, 0.5], [0.2, 1]])
    leaks = [np.abs((unmixing(r, ridge) @ r.matrix)[0, 1]) for ridge in (0.0, 0.1, 1.0, 1e6)]
    assert leaks == sorted(leaks) and leaks[0] < 1e-9 and leaks[-1] == pytest.approx(0.5, abs=1e-3)


def test_noise_is_not_corrected() -> None:
    assert np.array_equal(unmixing(mixing([[1, 0.1], [-0.1, 1]], error=0.06), 0), np.eye(2))
    assert unmixing(mixing([[1, 0.1], [-0.1, 1]], error=0.04), 0)[0, 1] < 0


def test_the_matrix_from_sweeps() -> None:
    scales = np.array([-2.0, 0.0, 2.0])
    natural = np.array([[0.3, 0.5], [0.5, 0.7]])[:, :, None]  # standard deviation sqrt(0.08 / 3)
    sigma = np.sqrt(0.08 / 3)

    def one(smile, age):
        return sweep((2, 2), scales, smile=natural + smile * scales, age=natural + age * scales)

    found = mixing_of([one(0.1, 0.05), one(-0.02, 0.2)], ["smile", "age"])
    assert found.matrix == pytest.approx(np.array([[0.1, 0.05], [-0.02, 0.2]]) / sigma)
    assert found.error == pytest.approx(np.zeros((2, 2)), abs=1e-12)


def test_combinations_are_exact_products() -> None:
    torch.manual_seed(0)
    adapters = [Adapter({"unet.x": Factors(torch.randn(2, 6), torch.randn(5, 2), 3.0)}, f"s{i}") for i in range(2)]

    def change(adapter: Adapter) -> torch.Tensor:
        f = adapter.factors()["unet.x"]
        return f.up @ f.down * f.alpha / f.rank

    weights = np.array([[1.0, -0.5], [0.0, 2.0]])
    first, second = unmixed(adapters, weights)
    assert torch.allclose(change(first), change(adapters[0]) - 0.5 * change(adapters[1]), atol=1e-5)
    assert torch.allclose(change(second), 2 * change(adapters[1]), atol=1e-5)
    assert first.factors()["unet.x"].rank == 4 and second.factors()["unet.x"].rank == 2
    assert [a.name for a in (first, second)] == ["s0", "s1"]
    assert unmixed(adapters, weights, rank=1)[0].factors()["unet.x"].rank == 1


def test_what_cannot_be_unmixed() -> None:
    with pytest.raises(UserError, match="two sliders move smile"):
        check_targets(["smile", "age", "smile"])
    with pytest.raises(UserError, match="at least two"):
        check_targets(["smile"])
    with pytest.raises(UserError, match="calibrate it first"):
        unmixing(mixing([[1, 0], [0, -1]]))
    with pytest.raises(UserError, match="ridge"):
        unmixing(mixing([[1, 0], [0, 1]]), -1)
