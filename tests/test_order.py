"""Places in the order of their values, filters over frequencies, and the methods that need whole tensors for them:
against sorting and transforming all at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.merge.methods import METHODS, merge_tensors, order
from dodgeburn.merge.methods.draws import Draws
from dodgeburn.merge.methods.order import in_order, order_of
from dodgeburn.merge.methods.pieces import LARGE, PIECE, SAMPLE, HeldPieces, kth_of_pieces, stretches
from dodgeburn.merge.methods.spectrum import filtered
from dodgeburn.merge.methods.task_vectors import keep_probabilities

COUNT = 2 * PIECE + 1234  # three pieces, the last short


def normal(seed: int, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=60), st.integers(1, 9))
def test_order_is_that_of_a_stable_sort(values: list[float], most: int) -> None:
    array = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_LEAST", most)  # so that parts are small and values crowd
        patch.setattr(order, "PIECE", 7)
        parts = [places for _, places in in_order(array)]
        assert order_of(array).tolist() == np.argsort(array, kind="stable").tolist()
    assert all(len(part) <= max(most, 3) or len(set(array[part].tolist())) == 1 for part in parts)


@pytest.mark.parametrize("seen", ["halves", "many equal", "negative zero", "one value", "float64"])
def test_order_of_many_values(seen: str) -> None:
    values = normal(1).numpy()
    if seen == "halves":
        values = values.astype(np.float16).astype(np.float32)
    elif seen == "many equal":
        values = np.where(normal(2).numpy() > 0, np.float32(0.5), values)
    elif seen == "negative zero":
        values = np.where(normal(2).numpy() > 0, np.float32(-0.0), np.float32(0.0))
    elif seen == "one value":
        values[:] = -3
    else:
        values = values.astype(np.float64)
    found = order_of(values)
    assert np.array_equal(found, np.argsort(values, kind="stable"))


def test_places_that_were_given_may_be_overwritten_from_below() -> None:
    values = normal(3).abs().numpy()
    expected = np.argsort(values, kind="stable")
    ranks = []
    for _, where in in_order(values):
        ranks.append(where.copy())
        values[where] = -1
    assert np.array_equal(np.concatenate(ranks), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 4096, 4099, 30_030, 1280 * 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_is_that_of_one_large_transform(count: int, dtype: torch.dtype) -> None:
    values = normal(4, count).to(dtype)

    def weight(u: torch.Tensor) -> torch.Tensor:
        return (1.2 * u - 0.1).clamp(0, 1)

    spectrum = torch.fft.rfft(values.double())
    u = torch.arange(len(spectrum), dtype=torch.float64) / len(spectrum)
    expected = torch.fft.irfft(spectrum * weight(u), n=count)
    found = filtered(values.clone(), weight).double()
    assert float((found - expected).norm() / values.double().norm()) < (3e-7 if dtype == torch.float32 else 1e-13)


def test_top_k_sum_of_several_pieces() -> None:
    a, b = normal(5).half().float(), normal(6).half().float()  # many equal values
    found = merge_tensors([a, b], 0.5, "top_k_sum", params={"beta": 0.25})
    sizes = a.abs().sort().values
    least, most = sizes[round(0.25 * COUNT) - 1], sizes[round(0.75 * COUNT) - 1]
    places, wanted = torch.argsort(b, stable=True), a.sort().values
    inside = (wanted.abs() > least) & (wanted.abs() <= most)
    expected = a.clone()
    expected[places[inside]] = wanted[inside]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_crossover_of_several_pieces(tilt: float) -> None:
    a, b, base = normal(7), normal(8), normal(9).half().float()
    found = merge_tensors([a, b], 0.3, "distribution_crossover", base, {"tilt": tilt})
    places = torch.argsort(base, stable=True)
    spectrum = torch.fft.rfft((b - a)[places].double())
    u = torch.arange(len(spectrum)) / len(spectrum)
    centre = 0.7 * (1 + tilt) - tilt / 2
    weight = ((u - centre) / tilt + 0.5).clamp(0, 1) if tilt else (u >= centre).float()
    expected = a.double()
    expected[places] += torch.fft.irfft(spectrum * weight, n=COUNT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_della_of_several_pieces() -> None:
    models, base = [normal(seed) for seed in (10, 11, 12)], normal(13)
    found = merge_tensors(models, 1.0, "della", base, {"density": 0.4, "window": 0.2}, seed=5, key="k")
    kept = []
    for number, model in enumerate(models):
        delta = model - base
        ranks = torch.empty(COUNT)
        ranks[torch.argsort(delta.abs(), stable=True)] = torch.arange(COUNT, dtype=torch.float32)
        probability = (ranks / (COUNT - 1) - 0.5) * 0.2 + 0.4
        assert torch.equal(keep_probabilities(delta, 0.4, 0.2), probability)
        kept.append(delta / probability * (Draws(5, "k").uniform(number, base) < probability))
    stacked = torch.stack(kept)
    sign = stacked.sum(0).sign()
    agrees = stacked * sign > 0
    mean = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    torch.testing.assert_close(found, base + mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, SAMPLE, SAMPLE + 1, 3 * SAMPLE - 7, 1_000_003, LARGE - 1, LARGE, LARGE + 77])
def test_a_sample_is_spread_over_the_tensor(count: int) -> None:
    starts, length = stretches(count)
    part = count / len(starts)
    assert len(starts) * length == min(count, SAMPLE)
    assert (np.diff(starts) >= length).all() if len(starts) > 1 else starts[0] == 0
    assert starts[0] >= 0 and starts[-1] + length <= count
    np.testing.assert_array_less(np.abs(starts - np.arange(len(starts)) * part), 1 + part)


@pytest.mark.parametrize("sides", [(640, 1440), (1280, 1920)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_uneven_rows_and_columns_are_gone_through_once(share: float, sides: tuple[int, int]) -> None:
    """A sample of a few rows would guess the band wrong, and everything would be read again."""
    draw = torch.Generator().manual_seed(1)
    rows, columns = (torch.exp(0.6 * torch.randn(size, generator=draw)) for size in ((sides[0], 1), (1, sides[1])))
    values = (torch.randn(*sides, generator=draw) * rows * columns).abs().flatten()
    pieces, went = HeldPieces([values], None), []

    def through() -> Iterator[list[torch.Tensor]]:
        went.append(1)
        yield from pieces(0)

    k = round(share * len(values))
    assert kth_of_pieces(pieces.sample(0), through, k, len(values)) == [float(values.sort().values[k - 1])]
    assert len(went) == 1


def test_methods_that_hold_tensors_say_how_many() -> None:
    assert {name for name, m in METHODS.items() if m.held} == {
        "smooth_add", "top_k_sum", "distribution_crossover", "della",
    }  # fmt: skip
    assert all(m.survey is not None and m.held <= 4 for m in METHODS.values() if m.held)
