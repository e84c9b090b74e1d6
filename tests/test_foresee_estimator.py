"""The estimator: learns a planted signal, says so honestly, is refused where it must be."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foresee_store import SPACE, made_up_store
from tiny import tiny_model

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee import scores
from dodgeburn.foresee.estimator import KNOTS, Calibration, Estimator, judge_all
from dodgeburn.foresee.feed import Feed, check_labels, load, targets_of, whole, words_of
from dodgeburn.foresee.labels import opinions
from dodgeburn.foresee.network import LOG_SNR, Network, NetworkSettings, at_least, expert_gates
from dodgeburn.foresee.observe import Seen, space_of
from dodgeburn.foresee.policy import on_grid
from dodgeburn.foresee.shards import Store, read_shard, write_shard
from dodgeburn.foresee.train import FitSettings, collapse_alarm, fit, losses_of, pairwise, parts_of

SMALL = NetworkSettings(inputs=("features", "scalars"), width=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_up_store(tmp_path_factory.mktemp("store"), prompts=40)


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Estimator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dodgeburn.foresee.train.LEAST_STEPS", 450)  # the made-up signal is plain: 450 steps find it
        settings = FitSettings(network=SMALL, steps=450, prompts=3, per_prompt=4, moments=2, exit_steps=60)
        return fit(store, tmp_path_factory.mktemp("fit"), settings)


def judged(estimator: Estimator, store: Store) -> dict[str, np.ndarray]:
    rows, records = judge_all(estimator, whole(store, lambda r: r.split == "test", (*estimator.tensors, "progress")))
    grid = {name: np.stack([on_grid(r[name], r["progress"]) for r in rows]) for name in ("bad", "rank", "severity")}
    labels = [r.label for r in records if r.label]
    return grid | {
        "is_bad": np.array([label.bad for label in labels]), "true": np.array([label.severity for label in labels]),
        "group": np.array([r.prompt_id for r in records]),
    }  # fmt: skip


def test_it_finds_the_planted_signal_on_new_prompts(trained: Estimator, store: Store) -> None:
    found = judged(trained, store)
    early, late = (scores.within_prompt_spearman(found["rank"][:, g], found["true"], found["group"]) for g in (2, 19))
    assert late > 0.75 and late > early + 0.2
    assert scores.auroc(found["bad"][:, 19], found["is_bad"]) > 0.9
    assert 0.5 < scores.spread_ratio(found["severity"][:, 19], found["true"]) < 1.2


def test_a_file_gives_the_same_answers(trained: Estimator, store: Store, tmp_path: Path) -> None:
    trained.save(tmp_path / "e.safetensors")
    again = Estimator.load(tmp_path / "e.safetensors")
    assert again.record == trained.record and again.network.settings == trained.network.settings
    a, b = judged(trained, store), judged(again, store)
    assert np.abs(a["bad"] - b["bad"]).max() < 0.02  # fp16


def test_records_say_what_it_was_trained_on(trained: Estimator) -> None:
    record = trained.record
    assert record["generators"] == ["damaged", "sound"] and record["seed"] == 0 and record["sd_ratio"] > 0.3
    assert (
        record["trajectories"]["fit"] + record["trajectories"]["calibration"] + record["trajectories"]["choice"] == 240
    )


def test_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match="50 optimiser steps: give at least 1500"):
        FitSettings(steps=50)


@pytest.mark.parametrize(
    "inputs",
    [
        ("x_t",),
        ("x0", "text"),
        ("features",),
        ("maps", "change"),
        ("x_t", "x0", "change", "maps", "features", "scalars", "text"),
    ],
)
@pytest.mark.parametrize("experts, memory, head", [(1, False, "coral"), (3, True, "histogram")])
def test_every_choice_of_inputs_runs(
    inputs: tuple[str, ...], experts: int, memory: bool, head: str, store: Store
) -> None:
    settings = NetworkSettings(inputs, 16, (4, 4), experts=experts, memory=memory, head=head)  # type: ignore[arg-type]
    estimator = Estimator(Network(SPACE, settings))
    batch = whole(store, lambda r: r.split == "test", (*estimator.tensors, "progress"))[0]
    found = estimator.judge_batch(batch)
    assert found.bad.shape == batch.there.shape and found.types.shape == (*batch.there.shape, 6)
    assert bool(((found.bad > 0) & (found.bad < 1) & (found.severity > 0) & (found.severity < 5)).all())


def test_inputs_left_out_have_no_effect(store: Store) -> None:
    estimator = Estimator(Network(SPACE, NetworkSettings(("scalars",), 16)))
    names = ("log_snr", "x_t", "x0", "cond", "delta", "scalars", "near", "far", "progress")
    batch = whole(store, lambda r: r.split == "test", names)[0]
    before = estimator.judge_batch(batch).rank
    for name in ("x_t", "x0", "cond", "delta", "near", "far"):
        batch.tensors[name] = torch.randn_like(batch.tensors[name].float())
    assert torch.equal(before, estimator.judge_batch(batch).rank)
    batch.tensors["scalars"] = batch.tensors["scalars"] + 1
    assert not torch.equal(before, estimator.judge_batch(batch).rank)


def test_experts_have_about_as_many_weights_and_windows_that_add_up() -> None:
    one, three = (Network(SPACE, NetworkSettings(("features", "scalars"), 16, experts=n)).weights for n in (1, 3))
    assert 0.75 * one < three <= 1.02 * one
    gates = expert_gates(torch.linspace(LOG_SNR[0] - 3, LOG_SNR[1] + 3, 50), 4)
    assert torch.allclose(gates.sum(1), torch.ones(50)) and bool((gates >= 0).all())
    assert gates[0].tolist() == [1, 0, 0, 0] and gates[-1].tolist() == [0, 0, 0, 1]


def test_moments_one_by_one_are_the_whole_way(store: Store) -> None:
    """With a memory, moments handed in one after another give what the whole way gives at once."""
    torch.manual_seed(0)
    network = Network(SPACE, NetworkSettings(("features",), 16, memory=True)).eval()
    batch = whole(store, lambda r: r.split == "test", ("log_snr", "cond", "delta"))[0]
    with torch.no_grad():
        at_once = network(batch.tensors).rank
        memory, steps = None, []
        for k in range(at_once.shape[1]):
            out = network({name: t[:, k : k + 1] for name, t in batch.tensors.items()}, memory)
            memory = out.memory
            steps.append(out.rank)
    assert torch.allclose(torch.cat(steps, 1), at_once, atol=1e-5)


def test_looks_one_by_one_are_the_whole_way(store: Store) -> None:
    """What sampling sees, step by step and with a picture taken out, is what a stored trajectory says; so are batches
    that training draws."""
    torch.manual_seed(0)
    estimator = Estimator(Network(SPACE, NetworkSettings(("x0", "change", "scalars"), 8, (4, 4))))
    names = ("log_snr", "x_t", "x0", "cond", "delta", "scalars", "near", "far", "progress")
    batch = whole(store, lambda r: r.split == "test", names, 3)[0]
    for tensor in batch.tensors.values():
        tensor[:] = tensor.float()
    at_once, state = estimator.judge_batch(batch).rank, None
    for k in range(int(batch.there.sum(1).min())):
        rows = (0, 1, 2) if k < 2 else (0, 2)
        level = float(batch.tensors["log_snr"][0, k])
        same = [r for r in rows if float(batch.tensors["log_snr"][r, k]) == level]
        parts = [batch.tensors[n][list(rows), k].float()
                 for n in ("x_t", "x0", "cond", "delta", "scalars", "near", "far")]  # fmt: skip
        judged, state = estimator.judge(Seen(rows, k, 6, 0.5, level, *parts), [""] * len(rows), state)
        for row in same:
            assert judged.rank[rows.index(row)] == pytest.approx(float(at_once[row, k]), abs=1e-4)
    feed = Feed(store, lambda r: True, estimator.fed, 2, 2, None)
    tensors, _ = feed(0, torch.Generator().manual_seed(0))
    assert torch.equal(tensors["x0_before"][:, 1:5], tensors["x0"][:, :4])
    assert torch.equal(tensors["x0_before"][:, 0], tensors["x0"][:, 0])


def test_heatmaps_have_the_latents_size_and_learn_from_masks(store: Store) -> None:
    network = Network(SPACE, NetworkSettings(("x0",), 8, (4, 4)))
    batch = whole(store, lambda r: True, (*Estimator(network).tensors, "progress", "mask"))[0]
    heat = Estimator(network).judge_batch(batch).heatmap
    assert heat is not None and heat.shape[-2:] == (4, 4)
    small = Estimator(Network(SPACE, SMALL))
    there = whole(store, lambda r: True, (*small.tensors, "progress"))[0]
    assert small.judge_batch(there).heatmap is None
    tensors = {**batch.tensors, "there": batch.there}
    out, targets = network(tensors), targets_of(batch.records)
    found = {}
    for value in (0, 255):
        tensors["mask"] = torch.full_like(tensors["mask"], value)
        network.zero_grad()
        losses_of(out, tensors, targets, FitSettings())["heat"].backward(retain_graph=True)
        assert network.picture is not None
        bias = network.picture.heat.bias
        assert bias is not None and bias.grad is not None
        found[value] = float(bias.grad)
    assert found[0] > 0 > found[255], "an empty mask lowers the map, a full one raises it"


def test_both_heads_say_at_least() -> None:
    p = at_least(torch.log(torch.tensor([0.1, 0.2, 0.3, 0.2, 0.1, 0.1])))
    assert torch.allclose(p, torch.tensor([0.9, 0.7, 0.4, 0.2, 0.1]))
    assert torch.allclose(at_least(torch.zeros(5)), torch.full((5,), 0.5))


def test_calibration_mends_overconfidence_at_one_noise_level_only() -> None:
    g = torch.Generator().manual_seed(0)
    n = 20_000
    log_snr = torch.where(torch.rand(n, generator=g) < 0.5, KNOTS[1], KNOTS[-2])
    truth = torch.randn(n, generator=g) * 1.5
    bad = (torch.rand(n, generator=g) < truth.sigmoid()).float()
    raw = torch.where(log_snr < 0, 3 * truth + 1, truth)  # overconfident and shifted where noise is strong
    found = Calibration.fit(raw, log_snr, bad)
    p = found(raw, log_snr).sigmoid()
    for level in (KNOTS[1], KNOTS[-2]):
        rows = log_snr == level
        assert scores.calibration_error(p[rows].numpy(), bad[rows].numpy()) < 0.02
    rows = log_snr < 0
    assert scores.calibration_error(raw[rows].sigmoid().numpy(), bad[rows].numpy()) > 0.1


def test_ranks_are_compared_within_a_prompt_only(store: Store) -> None:
    targets = targets_of(store.records[:16])  # two prompts of eight
    there = torch.ones(16, 1)
    right = targets.severity[:, None].clone()
    shifted = right + 100 * targets.group[:, None]
    assert torch.allclose(pairwise(right, targets, there), pairwise(shifted, targets, there))
    assert float(pairwise(right * 10, targets, there)) < float(pairwise(-right, targets, there)) / 10


def test_ratings_count_as_shares_and_single_opinions_as_they_are(store: Store) -> None:
    record = store.records[0]
    several = type(record)(**{**vars(record), "label": opinions((0, 0, 1, 0, 0, 1), "raters")})
    found = targets_of([several])
    assert found.at_least.tolist() == [[1, 1, 0.5, 0.5, 0.5]] and found.bad.tolist() == [1]
    assert set(targets_of([record]).at_least.flatten().tolist()) <= {0.0, 1.0}


def test_batches_depend_on_their_number_alone(store: Store) -> None:
    def batch(feed: Feed, i: int) -> torch.Tensor:
        return feed(i, torch.Generator().manual_seed(i))[0]["cond"]

    small = {"prompts": 3, "per_prompt": 2, "memory": 60_000, "visits": 2}
    one, two = (Feed(store, lambda r: True, ("log_snr", "cond"), **small) for _ in range(2))  # type: ignore[arg-type]
    assert len(one.groups) > 2, "the store is read in groups"
    there = [batch(one, i) for i in range(9)]
    assert torch.equal(there[7], batch(two, 7)) and torch.equal(there[1], batch(two, 1))


def test_words_are_hashed_alike_and_tell_order() -> None:
    a, b = words_of("red hair, blue wall", 256), words_of("blue hair, red wall", 256)
    assert torch.equal(a, words_of("Red hair; blue WALL", 256)) and not torch.equal(a, b)
    assert float(a @ a) == pytest.approx(1)


def test_prompts_keep_their_part(store: Store) -> None:
    parts = parts_of(store, FitSettings())
    assert [list(parts.values()).count(p) for p in ("fit", "calibration", "choice")] == [20, 4, 6]
    assert not set(parts) & {r.prompt_id for r in store.records if r.split == "test"}
    assert parts == parts_of(Store(*store.folders), FitSettings())


# ------------------------------------------------------------------------------------------------- bad input


def relabelled(store: Store, folder: Path, severity: float | None) -> Store:
    """The store with one label for all."""
    from dodgeburn.foresee.labels import one_opinion

    folder.mkdir()
    for path in store.paths:
        shard = read_shard(path)
        label = None if severity is None else one_opinion(severity, "made up")
        shard.records = [type(r)(**{**vars(r), "label": label}) for r in shard.records]
        write_shard(folder / path.name, shard)
    return Store(folder)


@pytest.mark.parametrize(
    "severity, message", [(2.0, "all .* labels are 2: nothing can be learned"), (None, "0 labelled trajectories")]
)
def test_labels_that_teach_nothing(severity: float | None, message: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(relabelled(store, tmp_path / "s", severity), tmp_path / "fit")


def test_one_class_only(store: Store) -> None:
    good = [r for r in store.records if r.label and not r.label.bad]
    with pytest.raises(UserError, match="pictures are good .*: both kinds are needed"):
        check_labels(good, "there")


def test_nan_features_are_named(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    shard = read_shard(store.paths[0])
    shard.tensors["cond"][3, 2] = float("nan")
    write_shard(folder / store.paths[0].name, shard)
    with pytest.raises(UserError, match="trajectory '0-0' of sound has NaN or infinite cond"):
        load(Store(folder), [0], lambda r: True, ("log_snr", "cond"))


def test_an_estimator_of_another_model_is_refused(trained: Estimator) -> None:
    with pytest.raises(UserError, match="trained on made-up with 28 features of 3 blocks, tiny-sdxl is"):
        trained.check(tiny_model())


def test_other_weights_of_the_same_kind_are_told_of() -> None:
    model = tiny_model()
    estimator = Estimator(Network(space_of(model), SMALL), record={"model": "pocket", "model_sha256": "abc"})
    with pytest.warns(DodgeburnWarning, match="it still ranks"):
        estimator.check(model)


def test_files_that_are_no_estimators(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no estimator of artifacts"):
        Estimator.load(store.paths[0])
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.safetensors"):
        Estimator.load(tmp_path / "x.safetensors")


def test_unknown_inputs_are_named() -> None:
    with pytest.raises(UserError, match="inputs are x0, pixels: expected some of x_t, x0, change, maps, features"):
        NetworkSettings(("x0", "pixels"))


def test_the_alarm_tells_too_few_steps_from_no_signal() -> None:
    rng = np.random.default_rng(0)
    severity, groups = rng.uniform(0, 5, 200), np.repeat(np.arange(20), 10)
    with pytest.warns(DodgeburnWarning, match="trained too briefly"):
        assert collapse_alarm(2.5 + 0.01 * severity, severity, groups) == pytest.approx(0.01)
    with pytest.warns(DodgeburnWarning, match="no signal"):
        collapse_alarm(2.5 + 0.01 * rng.normal(size=200), severity, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse_alarm(severity * 0.5, severity, groups)


def test_a_training_is_of_its_data_and_drawings(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of the same names with other labels, or drawings besides, are no training to go on with."""
    from dodgeburn.foresee import train as module
    from dodgeburn.foresee.labels import one_opinion

    keys: list[tuple[str, dict]] = []
    monkeypatch.setattr(module, "train", lambda name, *args: keys.append((name, args[4].settings)))
    settings = FitSettings(network=SMALL, prompts=3, per_prompt=4, moments=2, exit_steps=60)
    folder = tmp_path / "turned"
    folder.mkdir()
    for path in store.paths:
        shard = read_shard(path)
        for i, record in enumerate(shard.records):
            label = record.label and one_opinion(5 - record.label.severity, "made up")
            shard.records[i] = replace(record, label=label)
        write_shard(folder / path.name, shard)
    turned = Store(folder)
    assert [r.id for r in turned.records] == [r.id for r in store.records] and turned.digest != store.digest
    assert Store(*store.folders).digest == store.digest
    for one in (store, turned, store):
        fit(one, tmp_path / "fit", settings)
    first, second, again = (
        [key for name, key in keys if name == wanted] for wanted in ("estimator", "exits", "estimator")
    )
    assert first[0] != first[1] and first[0] == again[2] and second[0] != second[1]

    drawn = SimpleNamespace(labels=[1, 2])
    monkeypatch.setattr(module, "batches", lambda *args: None)
    fit(store, tmp_path / "fit", settings, drawings=drawn)  # type: ignore[arg-type]
    assert [key for name, key in keys if name == "estimator"][-1] == {**first[0], "drawings": 2}


def test_seeds_below_0_are_refused() -> None:
    with pytest.raises(UserError, match="seed is -1"):
        FitSettings(seed=-1)
