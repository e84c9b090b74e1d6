"""Pairs as training sees them: what a pair shares, how points are spread, what an error is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dpo_runs import picture, points_of, quick, run, some_pairs
from tiny import tiny_model

from dodgeburn.rework.dpo.pair_points import PairPoints, encode_pairs
from dodgeburn.rework.dpo.pairs import Preference, checked
from dodgeburn.rework.dpo.reference import Copy, make_bank
from dodgeburn.rework.dpo.train import align


def test_a_pair_shares_time_step_noise_caption_and_flip() -> None:
    points = points_of(tiny_model(), flips=True, dropout=0.4)
    rows = points.rows(0, range(40))
    n, bucket = 40, points.buckets[0]
    assert torch.equal(rows.timesteps[:n], rows.timesteps[n:]) and torch.equal(rows.noise[:n], rows.noise[n:])
    assert rows.texts[:n] == rows.texts[n:] and 4 < rows.texts[:n].count("") < 28
    assert bucket.mirrored is not None
    turned = 0
    for i in range(n):
        sides = [(bucket.winners, bucket.losers), bucket.mirrored]
        found = [
            (flip, pair) for flip, (winners, losers) in enumerate(sides) for pair in range(len(bucket))
            if torch.equal(rows.clean[i], winners[pair]) and torch.equal(rows.clean[n + i], losers[pair])
        ]  # fmt: skip
        assert len(found) == 1, "winner and loser of one pair, both flipped or neither"
        turned += found[0][0]
    assert 8 < turned < 32


def test_every_round_has_each_pair_once_and_time_steps_are_spread() -> None:
    points = points_of(tiny_model())
    rows = points.rows(0, range(200))
    clean = [bytes(z.numpy().tobytes()) for z in rows.clean[:200]]
    for start in range(0, 200, 5):
        assert len(set(clean[start : start + 5])) == 5
    assert [clean[i : i + 5] for i in range(0, 200, 5)].count(clean[:5]) < 8  # orders differ
    counts = np.histogram(rows.timesteps[:200].numpy(), 8, (0, 1000))[0]
    assert counts.min() >= 20 and counts.max() <= 30
    again = points.rows(0, [7])  # a point depends on its number alone
    assert torch.equal(again.x, rows.x[[7, 207]])


def test_pairs_of_several_sizes_are_batched_by_size(tmp_path: Path) -> None:
    model = tiny_model()
    mixed = checked([
        Preference("a", picture(0, 32, 16), picture(1, 32, 16)), Preference("b", picture(2), picture(3)),
        Preference("c", picture(4, 40, 20), picture(5, 40, 20)),
    ])  # fmt: skip
    buckets = encode_pairs(model, mixed)
    assert [(len(b), tuple(b.winners.shape[-2:])) for b in buckets] == [(1, (8, 8)), (2, (6, 11))]
    assert (buckets[1].predictor.height, buckets[1].predictor.width) == (12, 22)
    assert len(align(model, mixed, quick(steps=6), tmp_path, log_every=2).history) == 3


def test_the_error_of_v_is_that_of_the_noise() -> None:
    """A network that says v of the true noise plus a known error in the noise."""
    model = tiny_model(prediction_type="v_prediction")
    points = points_of(model)
    rows = points.rows(0, range(6))
    a = points.alpha_bar[rows.timesteps].view(-1, 1, 1, 1)
    error = torch.randn(rows.noise.shape, generator=torch.Generator().manual_seed(0))
    # eps = sqrt(a) v + sqrt(1 - a) x_t, solved for v
    said = (rows.noise + error - (1 - a).sqrt() * rows.x) / a.sqrt()
    assert torch.allclose(points.residuals(rows, said), error, atol=2e-3)
    plain = points_of(tiny_model())
    assert torch.equal(plain.residuals(rows, rows.noise + error), (rows.noise + error) - rows.noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_emphasis_turns_errors_of_the_noise_into_errors_of_the_picture(kind: str) -> None:
    model = tiny_model(prediction_type=kind)
    plain, weighed = points_of(model), points_of(model, emphasis=2.0)
    rows = plain.rows(0, range(8))
    a = plain.alpha_bar[rows.timesteps].view(-1, 1, 1, 1)
    said = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(1))
    eps = rows.noise + plain.residuals(rows, said)
    # x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a), arXiv 2010.02502, eq. 12
    clean = (rows.x - (1 - a).sqrt() * eps) / a.sqrt()
    assert torch.allclose(weighed.residuals(rows, said), rows.clean - clean, atol=1e-3)
    half = points_of(model, emphasis=1.0).residuals(rows, said).square()
    assert torch.allclose(half, plain.residuals(rows, said).square() * ((1 - a) / a).sqrt(), rtol=1e-4)


def test_time_steps_lie_between_end_and_start() -> None:
    found = points_of(tiny_model(), start=700, end=300).rows(0, range(200)).timesteps
    assert int(found.min()) >= 300 and int(found.max()) < 700
    counts = np.histogram(found[:200].numpy(), 4, (300, 700))[0]
    assert counts.min() >= 40
    with pytest.raises(ValueError, match="there are none"):
        quick(start=300, end=300)


def test_emphasis_reaches_training_and_every_reference(tmp_path: Path) -> None:
    made = [run(tmp_path / kind, quick(reference=kind, emphasis=1.0, end=300, bank=8)) for kind in ("off", "copy")]
    assert made[0].history[0] == pytest.approx(made[1].history[0], rel=1e-4)
    plain = run(tmp_path / "plain", quick(end=300))
    assert made[0].history[-1]["margin"] != pytest.approx(plain.history[-1]["margin"], rel=1e-2)


def test_with_guidance_the_guided_predictions_are_compared(tmp_path: Path) -> None:
    model = tiny_model()
    plain, guided = (PairPoints(model, encode_pairs(model, some_pairs(), guidance=g)) for g in (1.0, 4.0))
    rows = plain.rows(0, range(3))
    with torch.no_grad():
        told, bare = (plain.buckets[0].predictor(rows.x, rows.timesteps, texts) for texts in (rows.texts, [""] * 6))
        found = guided.buckets[0].predictor(rows.x, rows.timesteps, rows.texts)
    assert torch.allclose(found, bare + 4 * (told - bare), atol=1e-5) and not torch.allclose(found, told, atol=1e-3)
    error = (bare + 4 * (told - bare) - rows.noise).square().mean((1, 2, 3))
    assert torch.allclose(Copy(guided, model).errors(rows, 0), error, atol=1e-5)
    assert guided.buckets[0].predictor.forwards == 2 * len(rows.x)
    settings = quick(guidance=4.0)
    made = [run(tmp_path / kind, settings.model_copy(update={"reference": kind})) for kind in ("off", "copy")]
    assert made[0].history[0] == pytest.approx(made[1].history[0], rel=1e-4)
    bank = make_bank(guided, 3, tmp_path, "dpo", "some settings")
    assert torch.allclose(bank.errors(rows, 0)[[0, 3]], error[[0, 3]], atol=1e-5)
    assert made[0].forwards == 2 * run(tmp_path / "plain", quick()).forwards
