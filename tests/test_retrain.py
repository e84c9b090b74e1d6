"""Stage 4 of a deconstruction: weights, goal, and what is typical."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deconstruct_tiny import (
    reading,
    short_materials,
    short_panel,
    short_spec,
)
from tiny import tiny_model

from dodgeburn.errors import DodgeburnWarning
from dodgeburn.rework.bias.concept import make_concept
from dodgeburn.rework.bias.pocket_concept import pocket_concept
from dodgeburn.rework.bias.weighing import followed, held, importance
from dodgeburn.rework.deconstruct.retrain import ASKED, _asking, _Goal, _lesson, _shown, _teacher, balanced, typical
from dodgeburn.rework.deconstruct.spec import Retrain
from dodgeburn.sampling.predict import Predictor
from dodgeburn.training.examples import Pictures, encode_examples

NAN = math.nan


def test_importance_weights_by_hand() -> None:
    weights = importance(["dark"] * 9 + ["light"] + ["strange"], ("dark", "light"), (0.5, 0.5))
    assert weights[:9] == pytest.approx([5 / 9] * 9) and weights[9] == 5.0 and weights[10] == 0.0
    assert importance(["dark"] * 99 + ["light"], ("dark", "light"), (0.5, 0.5))[99] == 10.0


def test_checks_move_the_weights_by_hand() -> None:
    values, own = ["dark", "dark", "light", ""], torch.tensor([1.0, 1.0, 1.0, 3.0])

    def moved(read: list[dict[str, float]], power: float = 0.5) -> torch.Tensor:
        return followed(own, values, ("dark", "light"), (0.5, 0.5), read, power)

    assert moved([]) is own and moved([{"dark": 0.8, "light": 0.2}], 0.0) is own
    # sqrt(0.5 / 0.8) and sqrt(0.5 / 0.2): light counts twice as much as dark; 2 x 0.75 + 1.5 = 3, as before
    assert moved([{"dark": 0.8, "light": 0.2}]).tolist() == pytest.approx([0.75, 0.75, 1.5, 3.0])
    twice = moved([{"dark": 0.8, "light": 0.2}] * 2)
    assert float(twice[2] / twice[0]) == pytest.approx(4.0)
    never = moved([{"dark": 1.0}] * 9)
    assert float(never[2] / never[0]) == pytest.approx(100.0)  # 10 against 1 / 10


def test_other_attributes_are_held_by_hand() -> None:
    values = ["dark", "dark", "light", "light", ""]
    shown = {"hat": ["cap", "none", "cap", "none", "cap"]}
    before, now = {"hat": {"cap": 0.5, "none": 0.5}}, [{"hat": {"cap": 0.8, "none": 0.2}}]
    own = torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0])
    # sqrt(0.5 / 0.8) and sqrt(0.5 / 0.2): caps count half of what bare heads do, in each value's own sum
    got = held(own, values, shown, before, now, 0.5)
    assert got.tolist() == pytest.approx([2 / 3, 4 / 3, 4 / 3, 8 / 3, 5.0])
    assert held(own, values, shown, before, [], 0.5).tolist() == own.tolist()
    assert held(own, values, shown, before, now, 0.0).tolist() == own.tolist()
    assert held(own, values, {}, {}, now, 0.5).tolist() == own.tolist()
    # However far it is off, a weight changes threefold at most, before the sums are restored: 78 without that.
    far = held(own[:4], values[:4], {"hat": ["cap", "none"] * 2}, before, [{"hat": {"cap": 0.99, "none": 0.01}}] * 3, 1)
    assert float(far[1] / far[0]) <= 9 and float(far[:2].sum()) == pytest.approx(2)
    # Where caps are dark pictures' alone, values keep their sums: the concept's target is not undone.
    tied = held(own, values, {"hat": ["cap", "cap", "none", "none", ""]}, before, now, 0.5)
    assert tied.tolist() == pytest.approx(own.tolist())


def test_balanced_pictures_hold_the_shares() -> None:
    materials, spec = short_materials(), short_spec()
    made = balanced(materials, short_panel(spec).concept, spec.retrain)
    inside = np.array([c == ("a doctor",) for c in made.captions])
    assert inside.mean() == 0.5
    light = np.array([v == "light" for v in made.columns["light"]])
    assert made.weights[inside & light].sum() == pytest.approx(made.weights[inside & ~light].sum(), rel=0.2)
    more = balanced(materials, short_panel(spec).concept, spec.retrain.model_copy(update={"concept_share": 0.2}))
    assert np.mean([c == ("a doctor",) for c in more.captions]) == pytest.approx(0.2, abs=0.02)


def test_goal_plateau_and_quality() -> None:
    s = short_spec(retrain={"plateau": 2, "tv": 0.1, "quality": 0.1}).retrain
    goal = _Goal(s, reading(fidelity=0.98, grain=0.5, colour=1.0))
    assert goal.distance(reading(tv=0.1, loss=1.02, fidelity=0.97)) == 0
    assert goal.distance(reading(tv=0.2, loss=1.12, fidelity=0.87)) == pytest.approx(0.3)
    there, away = reading(tv=0.1, fidelity=0.97), reading(tv=0.2)
    assert goal.reached([away, there, there]) and not goal.reached([there]) and not goal.reached([there, away, there])
    assert not goal.plateau([reading(tv=0.3), reading(tv=0.3)])
    assert goal.plateau([reading(tv=0.3), reading(tv=0.3), reading(tv=0.299)])
    assert not goal.plateau([reading(tv=0.3), reading(tv=0.3), reading(tv=0.2)])
    assert goal.clean(reading(grain=0.55, colour=1.09)) and not goal.clean(reading(grain=0.45, colour=1.0))
    assert not goal.clean(reading(grain=0.55, colour=1.12)) and goal.clean(reading(grain=NAN, colour=1.0))


def test_typical_pictures_leave_out_the_grainy_one() -> None:
    rng = np.random.default_rng(0)
    calm = rng.integers(100, 110, (9, 32, 32, 3)).astype(np.uint8)
    wild = rng.integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    pictures = Pictures(np.concatenate([calm[:4], wild, calm[4:]]), [("x",)] * 10)
    assert 4 not in typical(pictures, 0.9) and len(typical(pictures, 0.9)) == 9


def test_a_taught_picture_is_asked_for_its_value_and_other_pictures_are_not() -> None:
    concept = make_concept(["a doctor"], "light", ["dark", "bright"], {"dark": ["at night", "in the dark"]})
    asks = _asking(["dark", "", "bright", "dark"], concept)
    assert [asks(row, "a doctor") for row in range(4)] == [
        "a doctor, at night", "a doctor", "a doctor, bright", "a doctor, in the dark",
    ]  # fmt: skip


def test_the_teacher_is_the_untouched_model_whatever_the_stages_before_made() -> None:
    model = tiny_model()
    base = {name: value.clone() for name, value in model.unet.state_dict().items()}
    pictures = Pictures(np.zeros((2, 16, 16, 3), np.uint8), [("a doctor",)] * 2)
    examples = encode_examples(model, pictures)
    concept = make_concept(["a doctor"], "light", ["dark", "bright"])
    x, times = torch.randn(2, *examples.latents.shape[1:]), torch.tensor([10, 500])
    said = Predictor(model, *examples.size).frozen(x, times, ["a doctor"] * 2)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.add_(0.3)
    teacher = _teacher(model, base, examples, ["dark", "bright"], concept, 2.0)
    assert torch.equal(teacher.predictor.frozen(x, times, ["a doctor"] * 2), said)
    with torch.no_grad():
        next(model.unet.parameters()).add_(1.0)  # training goes on; the teacher stays
    assert torch.equal(teacher.predictor.frozen(x, times, ["a doctor"] * 2), said)


def test_a_model_that_does_not_show_what_it_is_asked_for_is_a_poor_teacher() -> None:
    concept = pocket_concept(["a gardener"], "background")
    with pytest.warns(DodgeburnWarning, match="asked for background, the untouched model shows it in 94% of pictures"):
        assert _lesson(Retrain(taught=1.0), concept, 0.94).taught == 1.0  # as it was asked to
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers, pictures = _lesson(Retrain(), concept, 0.96), _lesson(Retrain(), concept, 0.94)
        assert (answers.taught, pictures.taught, answers.why) == (2.0, 0.0, "") and "in 94% of pictures" in pictures.why
        assert _lesson(Retrain(taught=0.0), concept, 1.0).why == ""
        levels = pocket_concept(["a gardener"], "age")
        assert _lesson(Retrain(), levels, 0.54).taught == 2.0  # a neighbouring level is near


def test_pictures_are_learned_faster_than_answers() -> None:
    concept = pocket_concept(["a gardener"], "background")
    answers, pictures = _lesson(Retrain(), concept, 1.0), _lesson(Retrain(taught=0), concept, 1.0)
    assert pictures.lr > answers.lr and pictures.noise_power < answers.noise_power
    told = _lesson(Retrain(taught=0, lr=2e-4, noise_power=0.0), concept, 1.0)
    assert (told.lr, told.noise_power) == (2e-4, 0.0)


def test_whether_the_untouched_model_is_a_teacher_is_seen_in_its_own_pictures(tmp_path) -> None:
    """Of a concept of two values it shows one always: half, whatever weights the model has come to."""
    model = tiny_model()
    base = {name: value.clone() for name, value in model.unet.state_dict().items()}
    with torch.no_grad():
        next(model.unet.parameters()).add_(1.0)
    drawn: list[str] = []

    class Fixed:
        panel = SimpleNamespace(concept=make_concept(["a doctor"], "light", ["dark", "bright"]))
        classifier = SimpleNamespace(labels=lambda pictures: {"light": np.full(len(pictures), "bright")})

        @staticmethod
        def sampled(prompts, seeds):
            assert all(torch.equal(value, base[name]) for name, value in model.unet.state_dict().items())
            drawn.extend(prompts)
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    assert _shown(model, base, Fixed, tmp_path) == 0.5 and len(drawn) == 2 * ASKED
    assert _shown(model, base, Fixed, tmp_path) == 0.5 and len(drawn) == 2 * ASKED  # kept
