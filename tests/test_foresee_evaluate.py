"""Savings at equal quality, ceilings, baselines, the first attempt's recipe: on worlds whose answer is known."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foresee_store import SPACE, made_up_store
from tiny import tiny_model

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee import original, savings, scores, tiny_vae
from dodgeburn.foresee.branching import branches, ceiling
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.evaluate import (
    against_baselines,
    curves,
    figures,
    judge,
    new_generators,
    rounded,
)
from dodgeburn.foresee.labels import one_opinion
from dodgeburn.foresee.limits import limits
from dodgeburn.foresee.network import Network, NetworkSettings
from dodgeburn.foresee.policy import GRID
from dodgeburn.foresee.rules import RULES_ONLY, choose_rules, saved
from dodgeburn.foresee.savings import Funnel, Slots
from dodgeburn.foresee.shards import Shard, Space, Store, Trajectory, shard_name, write_shard
from dodgeburn.foresee.train import FitSettings
from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.foresee.wise import interpolate, wise
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.pocket.reader import Reader
from dodgeburn.pocket.world import render
from dodgeburn.sampling.loop import GenerateSettings


def slots(signal: float, n: int = 300, seed: int = 0) -> Slots:
    """Eight pictures a slot; estimates get better along the way and are the truth at its end if `signal` is large."""
    rng = np.random.default_rng(seed)
    severity = rng.uniform(0, 5, (n, 8))
    shares = (np.arange(GRID) + 1) / GRID
    noise = rng.normal(size=(n, 8, GRID))
    return Slots(signal * shares * severity[..., None] + noise, severity, np.arange(n))


def test_best_of_is_exact() -> None:
    one = Slots(np.zeros((1, 3, GRID)), np.array([[3.0, 1.0, 2.0]]), np.zeros(1))
    # best of 2: pairs (1,2), (1,3), (2,3) give 1, 1, 2
    assert savings.best_of(one)[0].tolist() == pytest.approx([2.0, 4 / 3, 1.0])


def test_prices_and_equal_prices_by_hand() -> None:
    assert Funnel(4).price == 4 and Funnel(8, ((0.25, 4), (0.5, 1))).price == pytest.approx(8 / 4 + 4 / 4 + 0.5)
    curve = np.array([3.0, 2.0, 1.5, 1.25])
    assert savings.equal_price(2.0, curve) == 2 and savings.equal_price(1.75, curve) == pytest.approx(2.5)
    assert savings.equal_price(3.5, curve) == 1 and savings.equal_price(1.0, curve) == 4
    assert savings.gain(2.0, curve, 3) == pytest.approx(1 / 1.5)


def test_good_estimates_save_and_worthless_ones_do_not() -> None:
    for signal, least, most in ((20.0, 0.4, 1.0), (0.0, -0.05, 0.05)):
        choice, test = slots(signal), slots(signal, seed=1)
        wanted = savings.best_of(choice)[:, 3]
        funnel = savings.cheapest(choice, wanted, 8)
        reached = savings.run(funnel, test)
        equal = savings.equal_price(float(reached.mean()), savings.best_of(test).mean(0))
        assert least <= 1 - funnel.price / equal <= most, f"signal {signal}: {funnel}"


def test_slots_are_of_one_size() -> None:
    groups = ["a"] * 8 + ["b"] * 8 + ["c"] * 3
    found = savings.slots_of(np.zeros((19, GRID)), np.arange(19.0), groups, groups)
    assert found is not None and found.severity.shape == (2, 8) and found.prompt.tolist() == ["a", "b"]
    assert savings.slots_of(np.zeros((3, GRID)), np.arange(3.0), ["a"] * 3, ["a"] * 3) is None


# ---------------------------------------------------------------------------------------------- whole evaluation


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_up_store(tmp_path_factory.mktemp("store"), prompts=32)


def reading_scalars() -> Estimator:
    """An estimator that reads the planted signal off one scalar and knows nothing else."""
    network = Network(SPACE, NetworkSettings(("scalars",), 8, dropout=0.0))
    return Estimator(network)


def test_an_evaluation_has_all_figures(store: Store) -> None:
    estimator, settings = reading_scalars(), FitSettings()
    rules = choose_rules(estimator, store, settings)
    assert rules["chosen"] in rules["rules"] and set(estimator.record["funnels"]) <= {"2", "4", "8"}
    found = judge(estimator, store, lambda r: r.split == "test")
    assert len(found.records) == 64 and found.bad.shape == (64, GRID)
    numbers = figures(found, 20)
    assert {"srcc_25", "auroc_50", "ece_25", "sd_ratio_50"} <= set(numbers)
    assert all(len(values) == GRID for values in curves(found).values())
    assert "good_rejected" in saved(estimator, found, 20)
    compared = against_baselines(store, store, found, settings, 20)
    assert set(compared["baselines"]) == {
        "prompt only", "settings only", "x0 statistics", "guidance difference (ASD)", "x0 variance (Hal)",
    }  # fmt: skip
    # ASD's and Hal's scalars carry the planted signal, prompts a little of it, settings none.
    assert compared["baselines"]["guidance difference (ASD)"]["auroc_50"] > 0.5
    assert abs(compared["baselines"]["settings only"]["srcc_50"]) < 0.2
    json_like = rounded(numbers)
    assert set(json_like["srcc_25"]) == {"value", "low", "high"}


def test_rules_need_good_and_bad_pictures_to_be_chosen_on(tmp_path: Path) -> None:
    store = made_up_store(tmp_path / "few", prompts=5)
    for shard, path in zip(store.shards(), store.paths, strict=True):
        records = [replace(r, split="train", label=one_opinion(4.0, "made up")) for r in shard.records]
        write_shard(path, Shard(records, shard.tensors, shard.space))
    network = Network(store.space, NetworkSettings(("scalars",), 8))
    with pytest.raises(UserError, match=r"trajectories to choose rules on\): all 24 labels are 4"):
        choose_rules(Estimator(network), Store(tmp_path / "few"), RULES_ONLY)


def test_generators_that_are_new_are_told_apart(store: Store) -> None:
    found = judge(reading_scalars(), store, lambda r: r.split == "test")
    new = new_generators(found, ["sound"])
    assert 0 < new.sum() < len(new)
    assert {r.generator for r in found.rows(new).records} == {"damaged"}


def test_nothing_to_evaluate_on(store: Store) -> None:
    with pytest.raises(UserError, match="no trajectories to evaluate on"):
        judge(reading_scalars(), store, lambda r: False)


def test_wise_interpolates_between_both_ends(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = (Network(SPACE, NetworkSettings(("x0",), 8, (4, 4))) for _ in range(2))
    middle = interpolate(a, b, 0.25)
    for x, y, z in zip(a.parameters(), b.parameters(), middle.parameters(), strict=True):
        assert torch.allclose(z, 0.75 * x + 0.25 * y, atol=1e-6)
    with pytest.raises(UserError, match="no generator 'pruned' to hold out: there are damaged, sound"):
        wise(store, tmp_path, FitSettings(network=NetworkSettings(("x0",))), "pruned")
    with pytest.raises(UserError, match="add x0"):
        wise(store, tmp_path, FitSettings(network=NetworkSettings(("scalars",))), "sound")


def test_wise_chooses_alpha_on_the_generator_held_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dodgeburn.foresee.train.LEAST_STEPS", 40)
    monkeypatch.setattr("dodgeburn.foresee.train.WARMUP", 8)
    settings = FitSettings(
        network=NetworkSettings(("x0", "scalars", "text"), 8, (4, 4)), steps=40, prompts=2, exit_steps=5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DodgeburnWarning)  # so few steps may well collapse
        found = wise(store, tmp_path, settings, "sound", pretrain_steps=10, alphas=(0.0, 0.5, 1.0))
    assert set(found.auroc) == {0.0, 0.5, 1.0} and found.auroc[found.alpha] == max(found.auroc.values())
    assert found.estimator.record["generators"] == ["damaged"]
    assert found.estimator.record["wise"] == {"alpha": found.alpha, "held_out": "sound"}


# ------------------------------------------------------------------------------------------------------ ceilings


def test_the_ceiling_of_planted_outcomes() -> None:
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(80), 6)
    state = rng.normal(size=480) + rng.normal(size=80)[prompt]
    outcomes = state[:, None] + rng.normal(size=(480, 3)) * 0.5
    found = ceiling(outcomes, prompt, 0.25)
    assert found.reliability == pytest.approx(1 / 1.25, abs=0.05), "prompts' differences are not in it"
    assert found.correlation == pytest.approx(np.sqrt(0.8), abs=0.03) and 0.6 < found.srcc < found.correlation
    lost = ceiling(rng.normal(size=(480, 3)), prompt, 0.25)
    assert lost.reliability < 0.05 and abs(lost.srcc) < 0.1
    assert ceiling(np.repeat(state[:, None], 2, 1), prompt, 0.5).correlation == 1


@pytest.mark.parametrize("layout", ["sdxl", "sd1"])
def test_branches_part_where_they_are_told_to(layout: str) -> None:
    model = tiny_model(layout)
    settings = GenerateSettings(steps=6, sampler="euler_a", guidance=2.0)
    late, early = (
        branches(model, ["a", "b"], [1, 2], settings, share, 3, batch=4).astype(float) for share in (0.66, 0.17)
    )
    assert late.shape == (2, 3, 16, 16, 3)

    def apart(pictures: np.ndarray) -> float:
        return float(np.abs(pictures[:, 0] - pictures[:, 1]).mean())

    assert 0 < apart(late) < apart(early), "what is carried on for longer goes further apart"
    again = branches(model, ["a", "b"], [1, 2], settings, 0.66, 3, batch=32)
    assert np.abs(again.astype(float) - late).max() <= 1, "batches don't matter"


def test_a_sampler_without_noise_has_no_branches() -> None:
    with pytest.raises(UserError, match="dpmpp_2m adds no noise"):
        branches(tiny_model(), ["a"], [0], GenerateSettings(), 0.5, 2)


# ---------------------------------------------------------------------------------------------- the first attempt


def test_the_preview_matrix_is_found_again() -> None:
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(20, 4, 8, 8, generator=g)
    matrix = torch.tensor([[0.2, 0.1, 0.0], [0.1, -0.2, 0.1], [0.0, 0.1, 0.2], [-0.1, 0.0, 0.1], [0.05, 0.0, -0.05]])
    pictures = original.preview(latents, matrix).repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = original.fit_preview(latents, pictures)
    assert (found - matrix).abs().max() < 0.02  # 8 bits, and cut off at black and white
    assert original.preview(latents, matrix).dtype == torch.uint8


def test_a_tiny_vae_is_fitted_loaded_and_seen_by(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(24, 4, 4, 4, generator=g)
    level = ((latents[:, 0] / 3).tanh() * 100 + 128).round().to(torch.uint8)  # brightness is the first channel
    pictures = level.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].repeat(1, 1, 1, 3)
    tiny = tiny_vae.fit_tiny(latents, pictures, tmp_path / "fit", steps=150)
    shown = tiny_vae.show(tiny, latents)
    assert shown.shape == pictures.shape and shown.dtype == torch.uint8
    apart = (shown.float() - pictures.float()).square().mean().sqrt()
    assert apart < 0.5 * pictures.float().std()
    tiny.save_pretrained(tmp_path / "taesd")
    assert (tiny_vae.show(tiny_vae.load_tiny(tmp_path / "taesd"), latents) == shown).all()

    data = original.Finished(latents, torch.arange(24) % 6.0, ["a", "b"] * 12, pictures)
    quick = original.OriginalSettings(4, width=8, encoder_steps=2, encoder_batch=4, tiny=True)
    made = original.train_original(data, tmp_path / "route", quick)
    assert made.show(latents).shape == pictures.shape and made.score(latents).shape == (24,)
    with pytest.raises(UserError, match="no tiny VAE's folder"):
        tiny_vae.load_tiny(tmp_path)
    with pytest.raises(UserError, match="power of two"):
        tiny_vae.fit_tiny(latents, pictures[:, :12, :12], tmp_path / "no")


def test_five_linear_layers_are_one_linear_function() -> None:
    torch.manual_seed(0)
    head = original.five_layers(6, 16)
    x, y = torch.randn(2, 5, 6)
    zero = head(torch.zeros(1, 6))
    assert torch.allclose(head(x + y) - zero, head(x) - zero + head(y) - zero, atol=1e-5)


def test_its_recipe_collapses_and_steps_alone_cure_it(tmp_path: Path) -> None:
    """The same vectors, the same head; a planted signal that explains a third of the variance."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(2000, 128, generator=g), dim=1)
    signal = x @ torch.randn(128, generator=g)
    noise = torch.randn(2000, generator=g)
    severity = (1.8 + 1.3 * (0.6 * signal / signal.std() + 0.8 * noise)).clamp(0, 5).round()
    fit, test = slice(0, 1500), slice(1500, 2000)
    found = {}
    for name, settings in (
        ("its recipe", original.OriginalSettings(50, width=128)),
        ("1500 steps", original.OriginalSettings(1500, 64, balanced=False, width=128)),
    ):
        head = original.train_head(x[fit], severity[fit], tmp_path / name, settings)
        with torch.no_grad():
            score = head(x[test])[:, 0].numpy()
        found[name] = (score.mean(), scores.spread_ratio(score, severity[test].numpy()),
                       scores.spearman(score, severity[test].numpy()))  # fmt: skip
    assert found["its recipe"][1] < 0.3 and abs(found["its recipe"][0] - 2.5) < 0.4, found
    assert found["1500 steps"][1] > 2 * found["its recipe"][1], found
    assert found["1500 steps"][1] > 0.35 and found["1500 steps"][2] > 0.4


def test_exact_reading_is_exact_at_the_end_and_blind_at_the_beginning(tmp_path: Path) -> None:
    """Portraits of two people, from sound to ruined, whose guesses come out of the mean of both."""
    model = load_model("pocket", "cpu", "fp32")
    clean = [render({**attributes_of(i, 77), "hand": "none", "fingers": 0}) for i in (0, 1)]
    pictures = np.repeat(clean, 6, 0)
    for i, picture in enumerate(pictures):  # a green patch on the cheek, larger and larger
        side = (0, 3, 5, 8, 12, 18)[i % 6]
        picture[30 : 30 + side, 24 : 24 + side] = (40, 200, 60)
    finished = encode_pictures(model.vae, torch.from_numpy(pictures))
    way = finished.mean(0) + torch.tensor([0.0, 0.3, 0.7, 1.0])[:, None, None, None, None] * (
        finished - finished.mean(0)
    )
    n, k = len(pictures), 4
    tensors = {name: torch.zeros(n * k, *shape) for name, shape in
               (("x_t", (1,)), ("cond", (0,)), ("delta", (0,)), ("scalars", (1,)), ("log_snr", ()))}  # fmt: skip
    tensors |= {
        "trajectory": torch.arange(n, dtype=torch.int32).repeat_interleave(k),
        "step": torch.arange(k, dtype=torch.int32).repeat(n), "progress": torch.linspace(0.25, 1, k).repeat(n),
        "x0": way.transpose(0, 1).flatten(0, 1), "picture": torch.from_numpy(pictures),
    }  # fmt: skip
    found = find_artifacts(pictures, [""] * n, Reader.load("reader"))
    records = [
        Trajectory(str(i), "", f"person {i // 6}", i, "drawn", "ddim", k, 4.0, found[i].label("reader"))
        for i in range(n)
    ]
    write_shard(tmp_path / shard_name(0), Shard(records, tensors, Space((), ("nothing",), 4, "made-up")))
    said = limits(model, Store(tmp_path), lambda r: r.seed != 5, 11)
    assert said["pictures"] == 11 and said["prompts"] == 1
    assert said["oracle_100"]["srcc"] > 0.9 and said["oracle_100"]["auroc"] > 0.95 and said["noise"]["srcc"] > 0.9
    assert said["oracle_25"]["srcc"] == 0  # all pictures are the same there
    assert said["judge"]["auroc"] > 0.9
