"""Looking ahead: the coarse way to a picture's end, what is made of a reading, and that nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_foresee_acting import WORDS, untrained
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.foresee import ahead as looking
from dodgeburn.foresee.acting import KEPT, REJECTED, Candidates, Counter, foresee, search_of
from dodgeburn.foresee.ahead import END, Ahead, Opinion, calls_for, critic_of, due, finish, hazy, with_readings
from dodgeburn.foresee.collect import CollectSettings, collect, unlabelled
from dodgeburn.foresee.evaluate import calls_of, readings_of
from dodgeburn.foresee.rules import fit_opinions
from dodgeburn.foresee.shards import Store
from dodgeburn.foresee.zoo import plain_zoo
from dodgeburn.models.loading import load_model
from dodgeburn.sampling.loop import GenerateSettings, Step, generate

PLAIN = Opinion((-5.0, 2.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0))  # believes the reading alone


def test_a_step_can_be_asked_about_other_latents() -> None:
    model = tiny_model()
    said: list[float] = []

    def callback(step: Step) -> None:
        x = step.latents * (step.sigma**2 + 1) ** 0.5
        said.append(float((step.ask(x, step.sigma) - step.denoised).abs().max()))
        assert not torch.equal(step.ask(0.5 * x, step.sigma), step.denoised)

    generate(model, [WORDS] * 2, [0, 1], GenerateSettings(steps=3, guidance=3.0), callback)
    assert max(said) < 1e-4
    with pytest.raises(RuntimeError, match="not made by a sampler"):
        Step(0, 1, 1.0, 500.0, torch.zeros(1), torch.zeros(1), (0,), 0, 1).ask(torch.zeros(1), 1.0)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_few_large_steps_come_nearer_to_the_picture_than_the_guess(share: float) -> None:
    model = load_model("pocket", device="cpu", dtype="fp32")
    ways: dict[int, torch.Tensor] = {}
    ends: list[torch.Tensor] = []

    def callback(step: Step) -> None:
        if step.i == round(step.total * share) - 1:
            ways[0] = step.denoised
            with Counter(model.unet) as counter:
                ways[3] = finish(step, 3)
            assert counter.samples == 3 * 2 * 4
            ways[8] = finish(step, 8)
        ends[:] = [step.denoised]

    settings = GenerateSettings(steps=12)
    words = ["a smiling woman with a hat", "an old man", "a waving person", "a person with glasses"]
    looked = generate(model, words, [0, 1, 2, 3], settings, callback)
    away = {calls: float((guess - ends[0]).square().mean()) for calls, guess in ways.items()}
    assert away[3] < 0.7 * away[0] and away[8] < away[0], away
    plain = generate(model, words, [0, 1, 2, 3], settings)
    for one, other in zip(looked, plain, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image)), "looking changes nothing"


def test_when_and_whether_to_look() -> None:
    assert [due(p, b, (0.25, 0.5)) for p, b in ((0.2, 0.1), (0.222, 0.1), (0.3, 0.222), (0.5, 0.3), (0.9, 0.1))] == [
        None, 0.25, None, 0.5, 0.5,
    ]  # fmt: skip
    assert [calls_for(3, steps) for steps in (3, 4, 7, 8, 11, 12, 50)] == [0, 1, 1, 2, 2, 3, 3] and not calls_for(0, 20)


def test_a_way_with_readings_by_hand() -> None:
    way = {"progress": np.array([0.222, 0.5, 0.75, 1.0]), "bad": np.full(4, 0.1), "severity": np.full(4, 1.0),
           "rank": np.array([5.0, 6, 7, 8])}  # fmt: skip
    ahead = Ahead(3, "pocket", {0.25: PLAIN, 0.5: PLAIN, END: PLAIN})
    found = with_readings(way, {0.25: 4.0, 0.5: 2.0, END: 0.5}, ahead, (0.25, 0.5), 18, 18)
    assert found["severity"].tolist() == [4, 2, 2, 2] and found["rank"].tolist() == [4, 2, 2, 2]
    np.testing.assert_allclose(found["bad"], 1 / (1 + np.exp(-np.array([3.0, -1, -1, -1]))))
    np.testing.assert_allclose(found["spent"], [0.222 + 3 / 18, 0.5 + 6 / 18, 0.75 + 6 / 18, 1 + 6 / 18])
    assert way["bad"].tolist() == [0.1] * 4, "the way handed in stays as it is"
    last = with_readings(way, {0.25: 4.0, END: 0.5}, ahead, (END,), 18, 18)
    assert last["severity"].tolist() == [1, 1, 1, 0.5] and last["spent"].tolist() == way["progress"].tolist()
    nobody = with_readings(way, {}, ahead, (0.25, 0.5), 18, 18)
    assert nobody["rank"].tolist() == way["rank"].tolist() and nobody["spent"].tolist() == way["progress"].tolist()


@given(st.integers(0, 1000))
def test_a_worse_reading_never_makes_a_picture_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 5, 60)
    read, bad, severity = rng.permutation(true), rng.uniform(0.01, 0.99, 60), rng.uniform(0, 5, 60)
    opinion = Opinion.fit(read, bad, severity, true, true >= 3)
    worse = [opinion(np.array(r), np.array(0.3), np.array(2.0)) for r in np.linspace(0, 5, 21)]
    assert np.all(np.diff([w[0] for w in worse]) >= -1e-9) and np.all(np.diff([w[1] for w in worse]) >= -1e-9)


def test_opinions_are_calibrated_where_readings_tell_something() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 5, 4000)
    read = (true + rng.normal(0, 1, 4000)).clip(0, 5)
    own = np.full(4000, 0.4)
    opinion = Opinion.fit(read, own, np.full(4000, 2.0), true, true >= 3)
    bad, severity = opinion(read, own, np.full(4000, 2.0))
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):
        rows = (bad >= low) & (bad < high)
        assert abs(bad[rows].mean() - (true[rows] >= 3).mean()) < 0.05
    assert np.abs(severity - true).mean() < 0.8


def test_files_of_looks() -> None:
    ahead = Ahead(3, "pocket", {0.25: PLAIN, END: PLAIN})
    assert Ahead.of(ahead.as_dict()) == ahead and ahead.plans == [(), (0.25,)]
    for broken in ({}, {"calls": 3, "critic": "pocket", "opinions": {"x": {}}}):
        with pytest.raises(UserError, match="looks ahead cannot be read"):
            Ahead.of(broken)
    with pytest.raises(UserError, match="critic 'nobody' is not known: expected pocket"):
        critic_of("nobody")


def brightness(pictures: np.ndarray, prompts: object) -> np.ndarray:
    """A critic of any picture: 0 black, 5 white."""
    return np.asarray(pictures.mean((1, 2, 3)) / 51)


@pytest.fixture
def critic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(looking.CRITICS, "pocket", lambda: brightness)


def searching(rounds: int, stop: float, plan: tuple[float, ...] = (END,), **more: object) -> dict[str, object]:
    ahead = Ahead(3, "pocket", {0.25: PLAIN, 0.5: PLAIN, END: PLAIN}).as_dict()
    return {"ahead": ahead, "searches": {"4": {"rounds": rounds, "looks": [], "stop": stop, "plan": plan}}, **more}


@pytest.mark.usefixtures("critic")
def test_seeds_are_tried_until_one_is_good() -> None:
    model = tiny_model()
    settings = GenerateSettings(steps=4)
    first = foresee(model, WORDS, 2, 7, settings, untrained(model, **searching(5, 5.0)), Candidates(4))
    assert [(f.seed, f.slot, f.fate) for f in first.fates] == [(7, 0, KEPT), (8, 1, KEPT)]
    assert first.full == 4 * first.evaluations
    never = foresee(model, WORDS, 2, 7, settings, untrained(model, **searching(5, -1.0)), Candidates(4))
    assert len(never.fates) == 10 and [f.round for f in never.fates] == sorted([0, 1, 2, 3, 4] * 2)
    for slot, picture in zip(never.slots, never.pictures, strict=True):
        own = {f.seed: f.read[END] for f in never.fates if f.slot == slot}
        assert picture.seed == min(own, key=lambda s: own[s]), "of the finished ones the best by its reading is kept"
        assert own[picture.seed] == pytest.approx(float(brightness(np.asarray(picture.image)[None], "")[0]))
    stop = float(np.median([f.read[END] for f in never.fates]))
    some = foresee(model, WORDS, 2, 7, settings, untrained(model, **searching(5, stop)), Candidates(4))
    assert all(f.read[END] <= stop for f in some.fates if f.fate == KEPT) and len(some.fates) < 10


@pytest.mark.usefixtures("critic")
@pytest.mark.parametrize("steps, looks, calls", [(12, 1, 3), (8, 1, 2), (3, 0, 0)])
def test_looks_are_paid_for_and_reject(steps: int, looks: int, calls: int) -> None:
    model = tiny_model()
    record = searching(3, -1.0, ahead_policy={"policy": {"kind": "fixed", "at": 0.25, "theta": 0.0},
                                              "policy_plan": [0.25]})  # fmt: skip
    settings = GenerateSettings(steps=steps, guidance=3.0)
    found = foresee(model, WORDS, 1, 0, settings, untrained(model, **record), Candidates(4, look_ahead=True))
    assert [len([s for s in f.read if s < END]) for f in found.fates] == [looks] * 3
    quarter = found.fates[0].step or 0
    assert [f.fate for f in found.fates] == [REJECTED, REJECTED, KEPT] and quarter == max(1, steps // 4)
    assert found.evaluations == 2 * (2 * quarter + steps + 3 * calls * looks)
    with pytest.raises(UserError, match="does not look ahead"):
        foresee(model, WORDS, 1, 0, settings, untrained(model), Candidates(4, look_ahead=True))


def test_searches_for_other_numbers() -> None:
    estimator = untrained(tiny_model(), **searching(6, 1.0))
    assert [getattr(search_of(estimator, n), "rounds", None) for n in (1, 2, 4, 8)] == [None, 3, 6, 12]
    assert search_of(untrained(tiny_model()), 4) is None


def test_collected_looks_and_who_reads_them(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    model = tiny_model("sdxl")
    zoo = plain_zoo(model)
    settings = CollectSettings(("a", "b"), ("default", "few-steps"), 3, 1, 3, pictures=False, ahead=3)
    with pytest.raises(UserError, match="give a critic"):
        collect(zoo, settings, folder / "nobody", unlabelled, "none")
    collect(zoo, settings, folder / "t", unlabelled, "none", critic=brightness)
    records = Store(folder / "t").records
    assert len(records) == 9
    for r in records:
        read = readings_of(r, 3)
        assert set(read) == ({0.25, 0.5, END} if r.steps >= 4 else {END}) and not readings_of(r, 2)
        assert calls_of(r) == (2 * r.steps - 1 if r.sampler in ("dpm2_a", "dpmpp_2s_a") else r.steps)
    with pytest.raises(UserError, match="ahead is -1"):
        CollectSettings(("a",), ("default",), 1, ahead=-1)


def test_opinions_need_looks_of_one_kind() -> None:
    from types import SimpleNamespace as Made

    def judged(*extras: dict[str, object]) -> object:
        records = [Made(extra=e, label=Made(severity=float(i), bad=i >= 3)) for i, e in enumerate(extras)]
        way = {"progress": np.array([0.25, 1.0]), "bad": np.array([0.2, 0.3]), "severity": np.array([1.0, 2.0])}
        return Made(records=records, ways=[way] * len(records))

    assert fit_opinions(judged({}, {})) is None  # type: ignore[arg-type]
    with pytest.raises(UserError, match="of 2 and of 3 calls"):
        fit_opinions(judged({"ahead": {"calls": 2}}, {"ahead": {"calls": 3}}))  # type: ignore[arg-type]
    found = fit_opinions(judged(*({"ahead": {"calls": 3, "0.25": i, "1.0": i}} for i in range(6))))  # type: ignore[arg-type]
    assert found is not None and set(found.opinions) == {0.25, END}


def test_haze_is_repeatable_and_faint() -> None:
    pictures = np.full((2, 8, 8, 3), 128, np.uint8)
    again = hazy(pictures, 3)
    assert np.array_equal(again, hazy(pictures, 3)) and not np.array_equal(again, hazy(pictures, 4))
    assert np.abs(again.astype(int) - 128).max() <= 12 and again.dtype == np.uint8
