"""Drawings with defects: labelled rightly, noised as trajectories are, and of use to the estimator's network."""

import numpy as np
import pytest
import torch

from dodgeburn.foresee import drawn
from dodgeburn.foresee.drawn import CLEAN, Drawings, Filter, batches, defective, draw
from dodgeburn.foresee.network import BEFORE, Network, NetworkSettings
from dodgeburn.foresee.observe import space_of
from dodgeburn.foresee.train import FitSettings, losses_of
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.pictures import attributes_of


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return draw(load_model("pocket", "cpu"), 40, batch=20)


def test_what_is_put_in_is_labelled_and_pointed_at(drawings: Drawings) -> None:
    assert drawings.latents.shape == (40, 4, 16, 16) and drawings.mask.shape == (40, 64, 64)
    for i, label in enumerate(drawings.labels):
        a = attributes_of(i, drawn.LIST)
        clean, picture = defective(a, np.random.default_rng([drawn.LIST, 0, i]))
        if np.array_equal(clean, picture) and a["fingers"] in (0, 5):
            assert label.severity == 0 and not drawings.mask[i].any()
        elif np.array_equal(clean, picture):
            assert label.severity >= 3 and label.named == ("fingers",)
        elif label.severity >= 3 and label.types is not None and label.types[1] == 0:
            hit = np.abs(picture.astype(float) - clean).max(-1)
            assert hit[drawings.mask[i].numpy() > 0].mean() > 2 * hit.mean() or drawings.mask[i].float().mean() > 100
    severity = np.array([label.severity for label in drawings.labels])
    assert (severity == 0).mean() > CLEAN / 2 and (severity >= 3).mean() > 0.2


def test_a_portrait_depends_on_seed_and_number_alone(drawings: Drawings) -> None:
    fewer = draw(load_model("pocket", "cpu"), 5, batch=5)
    assert [a == b for a, b in zip(fewer.labels, drawings.labels, strict=False)] == [True] * 5
    other = draw(load_model("pocket", "cpu"), 5, seed=1)
    assert [label.severity for label in other.labels] != [label.severity for label in fewer.labels]


def test_the_linear_guess_is_sharp_without_noise_and_the_mean_in_much_of_it(drawings: Drawings) -> None:
    spectrum = Filter.of(drawings.latents)
    noise = torch.randn(drawings.latents.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for level in (12.0, 3.0, 0.0, -3.0):
        x_t, x0 = spectrum.estimate(drawings.latents, noise, torch.full((40,), level))
        errors.append(float((x0 - drawings.latents).square().mean()))
        bar = 1 / (1 + np.exp(-level))
        assert torch.allclose(x_t, bar**0.5 * drawings.latents + (1 - bar) ** 0.5 * noise, atol=1e-4)
    assert errors == sorted(errors) and errors[0] < 1e-4
    assert errors[-1] < float((drawings.latents - spectrum.mean).square().mean()) * 1.2


def test_batches_go_through_every_kind_of_network(drawings: Drawings) -> None:
    space = space_of(load_model("pocket", "cpu"))
    for inputs in (("x_t",), ("x0", "change", "maps", "scalars", "features", "text")):
        network = Network(space, NetworkSettings(inputs, 8, (8, 8)))
        feed = batches(drawings, network, 6)
        tensors, targets = feed(0, torch.Generator().manual_seed(3))
        again, _ = feed(1, torch.Generator().manual_seed(3))
        assert all(torch.equal(t, again[name]) for name, t in tensors.items())
        found = losses_of(network(tensors), tensors, targets, FitSettings(network=network.settings))
        assert set(found) == {"severity", "types", "rank", "heat"} and all(v.isfinite() for v in found.values())
    assert (tensors[BEFORE] - tensors["x0"]).abs().mean() > 0
