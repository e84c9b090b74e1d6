"""Edits: parallel rows, unedited pictures made once, strengths that are the adapter's scales."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Factors, layers_of, new_adapter
from dodgeburn.sampling.adapted import Applied
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.slide import edits
from dodgeburn.slide.edits import AdapterEdit, Unedited

FAST = GenerateSettings(steps=2, guidance=2.0)


def strong_adapter(model, seed: int) -> Adapter:
    """Random factors that change pictures visibly."""
    layers = [f"unet.{name}" for name in layers_of(model.unet)][:6]
    fresh = new_adapter(model.components(), layers, rank=2, seed=seed, name=f"random {seed}")
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {m: Factors(f.down, torch.randn(f.up.shape, generator=generator), f.alpha) for m, f in fresh.factors().items()},
        fresh.name,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_rows_keep_their_order_and_match_generate(model) -> None:
    adapter = strong_adapter(model, 1)
    edit = AdapterEdit(model, adapter, settings=FAST)
    prompts, seeds, strengths = ["a", "b", "a", "b"], [1, 2, 1, 2], [0.0, 0.5, 1.0, 0.0]
    found = edit.pictures(prompts, seeds, strengths)
    wanted = generate(model, prompts, seeds, FAST, adapters=[Applied(adapter, strengths)])
    for got, made in zip(found, wanted, strict=True):
        assert np.abs(got.astype(int) - np.asarray(made.image).astype(int)).max() <= 1
    plain = generate(model, ["a"], [1], FAST)[0]
    assert np.abs(found[2].astype(int) - np.asarray(plain.image).astype(int)).max() > 3  # the adapter does something


def test_unedited_pictures_are_drawn_once_for_all_edits(model, monkeypatch) -> None:
    drawn: list[str] = []
    real = edits.draw
    monkeypatch.setattr(edits, "draw", lambda m, prompts, *a, **k: drawn.extend(prompts) or real(m, prompts, *a, **k))
    shared = Unedited(model, FAST)
    first = AdapterEdit(model, strong_adapter(model, 1), unedited=shared)
    second = AdapterEdit(model, strong_adapter(model, 2), unedited=shared)
    a = first.pictures(["x", "y"], [0, 0], [0, 0])
    b = second.pictures(["y", "x", "x"], [0, 0, 1], [0, 0, 0])
    assert drawn == ["x", "y", "x"]
    assert np.array_equal(a[0], b[1]) and np.array_equal(a[1], b[0])


def test_several_adapters_work_at_their_own_scales(model) -> None:
    one, two = strong_adapter(model, 1), strong_adapter(model, 2)
    both = AdapterEdit(model, [one, two], settings=FAST, scales=[1.0, -0.5]).pictures(["p"], [3], [2.0])
    wanted = generate(model, ["p"], [3], FAST, adapters=[Applied(one, 2.0), Applied(two, -1.0)])[0]
    assert np.array_equal(both[0], np.asarray(wanted.image))


def test_late_start_reaches_the_sampler(model) -> None:
    adapter = strong_adapter(model, 1)
    never = AdapterEdit(model, adapter, start=0.0, settings=FAST).pictures(["p"], [3], [2.0])
    plain = AdapterEdit(model, adapter, settings=FAST).pictures(["p"], [3], [0.0])
    assert np.array_equal(never, plain)


def test_progress_counts_pictures(model) -> None:
    told: list[int] = []
    edit = AdapterEdit(model, strong_adapter(model, 1), unedited=Unedited(model, FAST, progress=told.append))
    edit.pictures(["p", "p", "q"], [0, 0, 0], [0, 1, 2])
    assert sum(told) == 3


def test_bad_input(model) -> None:
    edit = AdapterEdit(model, strong_adapter(model, 1), settings=FAST)
    with pytest.raises(UserError, match="no pictures"):
        edit.pictures([], [], [])
    with pytest.raises(ValueError, match="3 strengths"):
        edit.pictures(["p"], [0], [1, 2, 3])
    with pytest.raises(ValueError, match="other settings"):
        AdapterEdit(model, strong_adapter(model, 1), settings=GenerateSettings(), unedited=Unedited(model, FAST))
