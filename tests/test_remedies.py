"""Remedies against a tie: their sets, weights and rules on cases whose outcome is known."""

import numpy as np
import pytest
import torch
from hair import CONCEPT, Hair
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.measure.bias import UNREAD, figures_of_counts
from dodgeburn.pocket.captions import parse
from dodgeburn.rework.bias.balance import balanced, reweighted, self_pictures, shown_classes
from dodgeburn.rework.bias.before_after import Meter, make_plan
from dodgeburn.rework.bias.concept import make_concept
from dodgeburn.rework.bias.fix import Fixed, fix
from dodgeburn.rework.bias.pocket_concept import held_out_prompts, pocket_concept, world_pictures
from dodgeburn.rework.bias.remedies import (
    METHODS,
    Job,
    RemedySettings,
    apply_remedy,
    folder_source,
    world_sources,
)
from dodgeburn.rework.bias.uce import UceSettings, class_states, uce
from dodgeburn.rework.bias.undo import distance, negated, shrunk, state_of
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.training.examples import Pictures


def plain(classes: list[str]) -> Pictures:
    pixels = np.zeros((len(classes), 8, 8, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(len(classes))
    return Pictures(pixels, [("a doctor",)] * len(classes), columns={"hair": classes})


# -------------------- concepts


def test_concepts_ask_by_phrase_and_keep_to_the_target() -> None:
    assert CONCEPT.explicit("a doctor", "black", 1) == "a doctor, dark hair"
    assert CONCEPT.explicit("a doctor", "red", 5) == "a doctor, red"  # no phrase: the class's name
    assert CONCEPT.neutral(5, 0) == ["a doctor", *["a doctor, smiling"] * 3, "a doctor"]
    assert CONCEPT.neutral(2, 0, watched=True) == ["a doctor", "a doctor, frowning"]
    assert make_concept(["a", "b"], "x", ["p", "q"]).neutral(3, 0) == ["a", "b", "a"]
    third = make_concept(["a"], "x", ["p", "q", "r"], target=[0.5, 0.25, 0.25])
    drawn = third.drawn_classes(9, 3)
    assert sorted(drawn.count(c) for c in "pqr") == [2, 2, 5] and drawn == third.drawn_classes(9, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_concept([], "hair", ["a", "b"]), "no prompt"),
        (lambda: make_concept(["x"], "hair", ["a"]), "at least two"),
        (lambda: make_concept(["x"], "hair", ["a", "b"], target=[0.5, 0.6]), "target 0.5 0.6: expected 2 shares"),
        (
            lambda: pocket_concept(["a doctor"], "smile", ["broad"]),
            "smile has no value 'broad': expected some of 0.0-0.2",
        ),
        (lambda: pocket_concept(["a sad doctor"], "smile"), "itself names smile"),
        (lambda: pocket_concept(["a doctor"], "gender"), "no attribute"),
        (lambda: pocket_concept(["a doctor"], "glasses", ["monocle"]), "no value 'monocle'"),
        (lambda: pocket_concept(["a doctor, no glasses"], "glasses"), "itself names glasses"),
    ],
)
def test_what_is_no_concept(make, said) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_pocket_prompts_leave_the_attribute_open_and_no_two_lists_share_one() -> None:
    concept = pocket_concept(["a firefighter"], "hair_colour")
    trained, watched = set(concept.phrasings), set(concept.watched)
    assert len(trained) == 256 and len(watched) == 192
    assert not trained & watched and not (trained | watched) & held_out_prompts()
    for text in (*concept.phrasings, *concept.watched):
        asked = parse(text)
        assert asked["outfit"] == "firefighter" and "hair_colour" not in asked
    named = {name for text in concept.watched for name in parse(text)}
    assert len(named) == 18  # everything but hair colour is free, and said somewhere
    ways = ("of a firefighter", "a firefighter, ", "in a firefighter's jacket")  # after a style, a noun, a coat
    assert all(any(way in text for text in trained) for way in ways)
    assert len(concept.others) == 96 and all(parse(p).get("outfit") != "firefighter" for p in concept.others)
    assert parse(concept.explicit(concept.neutral(2, 0)[1], "red"))["hair_colour"] == "red"


def test_a_graded_attributes_classes_are_its_levels() -> None:
    concept = pocket_concept(["a doctor"], "age")
    assert concept.classes == ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0") and concept.target == (0.2,) * 5
    for i, value in enumerate(concept.classes):  # asked for in the world's words, which mean that level
        for which in range(2):
            low, high = parse(concept.explicit("a doctor", value, which))["age"]
            assert (low, high) == pytest.approx((i / 5, (i + 1) / 5))
    made = world_pictures(concept, list(concept.classes) * 12, 64, 0)
    assert made.columns["age"] == list(concept.classes) * 12
    assert all("age" not in parse(text) for captions in made.captions for text in captions)
    from dodgeburn.pocket.reader import Reader

    read = np.asarray(Reader.load("reader").read(made.pixels).values["age"])
    for i, value in enumerate(concept.classes):  # spread within its level, not all in its middle
        of_level = read[np.array(made.columns["age"]) == value]
        assert abs(of_level.mean() - (i + 0.5) / 5) < 0.08 and of_level.std() > 0.02


def test_where_all_is_the_concept_other_things_say_the_attribute() -> None:
    concept = pocket_concept(["a person"], "age")
    assert len(concept.others) == 96 and all("age" in parse(p) for p in concept.others)
    assert not any("age" in parse(p) for p in (*concept.phrasings, *concept.watched))


# -------------------- sets


def test_world_pictures_show_what_is_asked_and_never_say_it() -> None:
    concept = pocket_concept(["a firefighter", "a person, smiling broadly, firefighter"], "hair_colour")
    made = world_pictures(concept, ["red", "blue"] * 4, 64, 0)
    assert made.pixels.shape == (8, 64, 64, 3) and made.columns["hair_colour"] == ["red", "blue"] * 4
    for captions in made.captions:
        assert 4 <= len(captions) <= 7 and not set(captions) & (held_out_prompts() | set(concept.watched))
        assert all("hair_colour" not in parse(c) and parse(c)["outfit"] == "firefighter" for c in captions)
    from dodgeburn.pocket.reader import Reader

    read = Reader.load("reader").read(made.pixels)
    assert (read.values["hair_colour"] == made.columns["hair_colour"]).mean() >= 7 / 8
    assert (read.values["outfit"] == "firefighter").mean() >= 7 / 8


def test_balanced_by_hand() -> None:
    """8 of 10 black, 2 red: of 12 drawn 6 are red, each red picture three times, and no black one twice."""
    found = plain(["black"] * 8 + ["red"] * 2)
    even = balanced(found, found.columns["hair"], CONCEPT, 12)
    assert sorted(even.columns["hair"]) == ["black"] * 6 + ["red"] * 6
    picked = even.pixels[:, 0, 0, 0]
    assert sorted(np.bincount(picked, minlength=10)[8:]) == [3, 3] and np.bincount(picked)[:8].max() == 1
    with pytest.raises(UserError, match="no picture shows hair = red"):
        balanced(plain(["black"] * 4), ["black"] * 4, CONCEPT, 4)


def test_importance_weights_by_hand_and_cut() -> None:
    classes = ["black"] * 8 + ["red"] * 2 + [UNREAD]
    weights = reweighted(plain(classes), classes, CONCEPT).weights
    assert weights.tolist() == pytest.approx([0.625] * 8 + [2.5] * 2 + [0])
    rare = ["black"] * 99 + ["red"]
    assert reweighted(plain(rare), rare, CONCEPT).weights[-1] == 10  # 50, cut


def drawer(right: float = 1.0):
    def draw(prompts, seeds):
        out = np.zeros((len(prompts), 8, 8, 3), np.uint8)
        for i, (p, s) in enumerate(zip(prompts, seeds, strict=True)):
            rng = np.random.default_rng(s)
            out[i, 0, 0] = ("red" in p) if rng.random() < right else 0
            out[i, 0, 1] = rng.integers(2)
        return out

    return draw


def test_self_pictures_keep_what_was_drawn_right() -> None:
    made, counts = self_pictures(CONCEPT, drawer(), Hair(), 20)
    assert counts == {"black": 10, "red": 10} and len(made) == 20
    assert all("hair" not in c and "red" not in c for (c,) in made.captions)
    some, counts = self_pictures(CONCEPT, drawer(0.5), Hair(), 40)
    assert counts["black"] == 20 and 4 <= counts["red"] <= 16 and len(some) == sum(counts.values())
    with pytest.raises(UserError, match="never draws hair = red"):
        self_pictures(CONCEPT, drawer(0.0), Hair(), 20)


def test_a_users_column_is_believed_and_captions_lose_the_class() -> None:
    found = Pictures(np.zeros((3, 8, 8, 3), np.uint8), [("a doctor, dark hair",), ("red",), ("a doctor",)],
                     columns={"hair": ["red", "", "green"]})  # fmt: skip
    assert shown_classes(found, CONCEPT) == ["red", UNREAD, UNREAD]
    assert shown_classes(found, CONCEPT, Hair()) == ["red", "black", UNREAD]
    cleaned = folder_source(found, CONCEPT)(3, 0)
    assert cleaned.captions == [("a doctor",), ("a doctor",), ("a doctor",)]
    with pytest.raises(UserError, match="no column 'hair'"):
        shown_classes(Pictures(found.pixels, found.captions), CONCEPT)


def test_tied_drawings_have_the_models_shares() -> None:
    concept = pocket_concept(["a doctor"], "glasses")
    fair, tied = world_sources(concept, 64, [0.02, 0.98])
    assert fair(10, 0).columns["glasses"].count("none") == 5
    drawn = tied(60, 0).columns["glasses"]
    assert 1 <= drawn.count("none") <= 6


# -------------------- weights


def test_negation_by_hand() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}, {"w": torch.tensor([2.0, 2.0]), "n": torch.tensor(3)}
    assert negated(a, b, 0.5)["w"].tolist() == [0.5, 2.0] and int(negated(a, b, 0.5)["n"]) == 3
    assert torch.equal(negated(a, b, 0)["w"], a["w"]) and negated(a, b, -1)["w"].tolist() == [2.0, 2.0]


def test_shrink_and_perturb_moves_matrices_by_what_it_says() -> None:
    start = {"w": torch.randn(400, 300, generator=torch.Generator().manual_seed(0)), "b": torch.ones(5)}
    same = shrunk(start, 1.0, 0.0)
    assert torch.equal(same["w"], start["w"]) and torch.equal(same["b"], start["b"])
    moved = shrunk(start, 0.9, 0.2, seed=1)
    assert distance(start, moved) == pytest.approx((0.1**2 + 0.2**2) ** 0.5, rel=0.01)
    assert torch.equal(moved["w"], shrunk(start, 0.9, 0.2, seed=1)["w"]) and torch.equal(moved["b"], start["b"])


# -------------------- the closed form


def test_uce_moves_neutral_keys_towards_the_class_and_leaves_the_rest() -> None:
    model = tiny_model()
    concept = make_concept(["a doc"], "hair", ["a", "b"], {"a": ["dark"], "b": ["red"]}, others=["zebra"])
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    looks = iter([[30, 2], [20, 12], [16, 16]])
    found = uce(model, concept, lambda: (figures_of_counts(np.array(next(looks)), 0, ("a", "b")), 0.0),
                UceSettings(keep=1.0, ridge=1e-4))  # fmt: skip
    assert len(found.curve) == 3 and found.strengths["b"] > 0 > found.strengths["a"]
    assert sum(found.strengths.values()) == pytest.approx(0)
    after = model.unet.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for k in changed)
    name = sorted(changed)[0]
    states, towards = class_states(model, concept, ["a doc"])
    weight, edited = before[name].float(), after[name].float()
    strengths = torch.tensor(list(found.strengths.values()), dtype=torch.float32)
    wished = torch.einsum("k,knd->nd", strengths, towards - states)
    got = states @ (edited - weight).T
    aim = wished @ weight.T
    rows = aim.norm(dim=1) > 1e-3 * aim.norm()
    cosine = torch.nn.functional.cosine_similarity(got[rows].flatten(), aim[rows].flatten(), dim=0)
    assert float(cosine) > 0.5  # what the model's own states allow while the explicit prompts are held
    with pytest.raises(StopIteration):
        next(looks)


def test_uce_keeps_the_best_round_and_nothing_when_nothing_helps() -> None:
    model = tiny_model()
    concept = make_concept(["a doc"], "hair", ["a", "b"], {"a": ["dark"], "b": ["red"]})
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    uce(model, concept, lambda: (figures_of_counts(np.array([30, 2]), 0, ("a", "b")), 0.0), UceSettings(rounds=2))
    assert all(torch.equal(before[k], v) for k, v in model.unet.state_dict().items())


# -------------------- the methods on a tiny model


class Bright:
    """Two classes by whether the first pixel's red is even: any model draws both."""

    name = "bright"
    classes = {"hair": ("black", "red")}

    def labels(self, pictures):
        return {"hair": np.where(pictures[:, 0, 0, 0] % 2 == 0, "black", "red")}

    def named(self, prompt):
        return frozenset()


def tiny_job(folder) -> Job:
    concept = make_concept(["a doc"], "hair", ["black", "red"], {"black": ["dark"]}, others=["zebra", "cat"])
    reading = Bright()
    settings = RemedySettings(steps=2, batch=4, pictures=12, kept=4, look=8, strengths=(0.5,), lr=1e-3, every=1)
    job = Job(tiny_model(), concept, reading, Meter(concept, make_plan(concept, 8, 0, 0), reading),
              GenerateSettings(steps=1, guidance=1.0), folder, settings)  # fmt: skip

    def some(n: int, seed: int) -> Pictures:
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
        return Pictures(pixels, [("a doc",)] * n, columns={"hair": ["black"] * (n - 2) + ["red"] * 2})

    job.fair = job.tied = some
    return job


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("random-prompt", "uce")])
def test_every_training_method_changes_the_unet_and_says_its_steps(method, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dodgeburn.rework.dpo.pairs.LEAST_SIDE", 8)
    job = tiny_job(tmp_path)
    before = {k: v.clone() for k, v in job.model.unet.state_dict().items()}
    done = apply_remedy(method, job)
    assert done.steps == 2 and done.weights and done.seconds > 0 and done.as_json()["method"] == method
    assert done.rate == pytest.approx(1e-4 if method == "dpo" else 1e-3)
    if method != "negation" or done.notes["strength"]:
        assert any(not torch.equal(before[k], v) for k, v in job.model.unet.state_dict().items())
    else:
        assert all(torch.equal(before[k], v) for k, v in job.model.unet.state_dict().items())
    assert all(bool(torch.isfinite(v).all()) for v in job.model.unet.state_dict().values())


def test_answers_of_few_classes_are_learned_more_slowly_than_pictures() -> None:
    own, said = RemedySettings(), RemedySettings(lr=7e-4)
    for method in METHODS:
        rates = [own.rate(method, classes) for classes in (2, 3, 6, 40)]
        assert rates == sorted(rates) and rates[-1] == own.rate("balanced", 2)
        assert (rates[0] < rates[-1]) == (method in ("taught", "self"))
        assert said.rate(method, 2) == 7e-4


def test_looks_on_the_way_move_the_weights_and_are_not_made_again(tmp_path) -> None:
    """Half of a batch is the concept's, and a run that resumes goes by the looks that it took before."""
    job = tiny_job(tmp_path)
    tuning = job.settings.tuning(True, 1e-3)
    assert (tuning.batch, tuning.prior_batch, tuning.prior, tuning.empty) == (2, 2, 1.0, 0.0)
    start = {k: v.clone() for k, v in job.model.unet.state_dict().items()}
    apply_remedy("balanced", job)
    first = {k: v.clone() for k, v in job.model.unet.state_dict().items()}
    rows = (tmp_path / "balanced" / "looks.jsonl").read_text().splitlines()
    assert len(rows) == 1 and '"step": 1' in rows[0]  # after the last step there is nothing to steer
    (tmp_path / "balanced" / "balanced.checkpoint.pt").unlink()
    other = tiny_job(tmp_path)
    other.model.unet.load_state_dict(start)
    other.meter.neutral = None  # no look is taken again
    apply_remedy("balanced", other)
    assert all(torch.equal(first[k], v) for k, v in other.model.unet.state_dict().items())


def test_a_method_without_what_it_needs_says_so(tmp_path) -> None:
    job = tiny_job(tmp_path)
    job.fair = job.tied = None
    for method in ("balanced", "reweight", "shrink-perturb", "dpo"):
        with pytest.raises(UserError, match="--data FOLDER"):
            apply_remedy(method, job)
    with pytest.raises(UserError, match="no method 'magic'"):
        apply_remedy("magic", job)


def test_auto_passes_over_what_cannot_and_restores_between(tmp_path) -> None:
    job = tiny_job(tmp_path)
    job.fair = job.tied = None
    before = {k: v.clone() for k, v in job.model.unet.state_dict().items()}
    said: list[str] = []
    found = fix(job, ["random-prompt", "balanced", "negation"], target=-1.0, say=said.append)
    assert "balanced" in found.refused and [t.done.method for t in found.tried] == ["random-prompt", "negation"]
    assert found.chosen is not None and found.chosen.done.method == "negation" and not found.chosen.meets
    assert found.as_json()["meets"] is False and any("passed over" in line for line in said)
    alone = fix(tiny_job(tmp_path / "b"), ["random-prompt"], weights=False, say=said.append)
    assert alone.chosen is not None and not alone.chosen.done.weights
    with pytest.raises(UserError, match="--data FOLDER"):
        fix(job, ["balanced"], say=said.append)
    assert set(before) == set(job.model.unet.state_dict())


TRIED = ["random-prompt", "negation", "dpo", "reweight", "balanced"]


def tried_all(job: Job, keep=None) -> Fixed:
    return fix(job, TRIED, target=-1.0, say=lambda line: None, keep=keep)


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_fix_goes_on_to_the_same_end(at: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dodgeburn.rework.dpo.pairs.LEAST_SIDE", 8)
    job = tiny_job(tmp_path / "whole")
    whole, weights = tried_all(job), state_of(job.model.unet)
    calls = []

    def counted(method, job):
        calls.append(method)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return apply_remedy(method, job)

    monkeypatch.setattr("dodgeburn.rework.bias.fix.apply_remedy", counted)
    keep = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        tried_all(tiny_job(keep / "work"), keep)
    again = tiny_job(keep / "work")
    monkeypatch.setattr(again.meter, "measure", again.meter.measure)
    found = tried_all(again, keep)
    assert calls == [*TRIED[: at + 1], *TRIED[at:]], "nothing is made a second time"

    def figures(fixed: Fixed) -> dict:
        said = fixed.as_json()
        for row in said["tried"]:
            row["done"].pop("seconds")
        return said

    assert figures(found) == figures(whole)
    assert all(torch.equal(weights[k], v) for k, v in again.model.unet.state_dict().items())
    pairs = zip(found.tried, whole.tried, strict=True)
    assert all(np.array_equal(a.after.pictures, b.after.pictures) for a, b in pairs)


def test_best_weights_that_were_written_over_are_made_again(tmp_path, monkeypatch) -> None:
    """A kill between the weights of a better method and its row leaves weights that no row is about."""
    monkeypatch.setattr("dodgeburn.rework.dpo.pairs.LEAST_SIDE", 8)
    job = tiny_job(tmp_path / "work")
    whole, weights = tried_all(job, tmp_path), state_of(job.model.unet)
    assert whole.chosen is not None and whole.chosen.done.weights
    (tmp_path / "best.safetensors").unlink()
    for name, damage in (("before", b""), ("negation", b"\x93NUMPY")):
        (tmp_path / f"{name}.npy").write_bytes(damage)
    again = tiny_job(tmp_path / "work")
    found = tried_all(again, tmp_path)
    assert found.chosen is not None and found.chosen.done.method == whole.chosen.done.method
    assert np.array_equal(found.before.pictures, whole.before.pictures)
    assert all(torch.equal(weights[k], v) for k, v in again.model.unet.state_dict().items())
