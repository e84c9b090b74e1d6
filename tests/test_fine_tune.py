"""Fine-tuning: the loss by hand, weights, prior preservation, LoRA, resumed runs, captions, bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.models.model import Model
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.sampling.predict import Predictor, alphas_cumprod
from dodgeburn.training.examples import Examples, Pictures, encode_examples, join, join_examples, pocket_pictures
from dodgeburn.training.fine_tune import FineTuneSettings, fine_tune, make_prior, make_teacher
from dodgeburn.training.noise_loss import loss_weights, wanted


def examples(model: Model, n: int = 6, seed: int = 0, text: str = "a doctor") -> Examples:
    rng = np.random.default_rng(seed)
    pixels = np.repeat(rng.integers(0, 256, (n, 1, 1, 3), np.uint8), 16, 1).repeat(16, 2)
    return encode_examples(model, Pictures(pixels, [(text, f"{text}, {i}") for i in range(n)]))


def quick(**changes: object) -> FineTuneSettings:
    base = {"steps": 6, "batch": 4, "lr": 1e-3, "precision": "no", "checkpoint_every": 2, "log_every": 2, "ema": 0.5}
    return FineTuneSettings(**{**base, **changes})  # type: ignore[arg-type]


def state(model: Model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.unet.state_dict().items()}


def error_on(model: Model, made: Examples) -> float:
    generator = torch.Generator().manual_seed(5)
    rows = torch.arange(64) % len(made)
    t = torch.arange(64) * 15
    noise = torch.randn(64, *made.latents.shape[1:], generator=generator)
    a = alphas_cumprod(model)[t].view(-1, 1, 1, 1)
    x = a.sqrt() * made.latents[rows] + (1 - a).sqrt() * noise
    texts = [made.captions[int(i)][0] for i in rows]
    said = Predictor(model, *made.size).frozen(x, t, texts)
    return float((said - wanted(str(model.scheduler_config["prediction_type"]), made.latents[rows], noise,
                                a.flatten())).square().mean())  # fmt: skip


@pytest.mark.parametrize("layout,prediction", [("sdxl", "epsilon"), ("sd15", "v_prediction")])
def test_the_unet_learns_its_examples_and_nothing_else_changes(tmp_path: Path, layout: str, prediction: str) -> None:
    model = tiny_model(layout, prediction_type=prediction)
    others = {k: v.clone() for m in (model.vae, *model.text_encoders) for k, v in m.state_dict().items()}
    made = examples(model)
    before = error_on(model, made)
    found = fine_tune(model, made, quick(steps=24, batch=8, lr=3e-3, ema=0.5), tmp_path)
    assert error_on(model, made) < 0.9 * before
    assert found.adapter is None and found.steps == 24 and found.forwards == 24 * 8
    for module in (model.vae, *model.text_encoders):
        assert all(torch.equal(v, others[k]) for k, v in module.state_dict().items())
    assert not any(p.requires_grad for p in model.unet.parameters()) and not model.unet.training


def test_a_lora_leaves_the_weights_alone(tmp_path: Path) -> None:
    model = tiny_model()
    before = state(model)
    found = fine_tune(model, examples(model), quick(layers="xattn", rank=2), tmp_path)
    assert found.adapter is not None and all("attn2" in name for name in found.adapter.modules_changed)
    assert any(float(f.up.abs().max()) > 0 for f in found.adapter.factors().values())
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_first_logged_loss_is_the_formula_by_hand(tmp_path: Path) -> None:
    """One step, its parts worked out again from the definition."""
    from dodgeburn.training.fine_tune import _Draw
    from dodgeburn.training.loop import step_generator

    model = tiny_model()
    made = examples(model)
    made = Examples(made.latents, made.captions, torch.tensor([1.0, 2, 3, 4, 5, 6]), made.size)
    settings = quick(steps=1, prior=2.0, prior_batch=3, empty=0.0, gamma=5.0, noise_power=0.25)
    prior = make_prior(model, examples(model, seed=1, text="a cat"), 10)
    with torch.no_grad():  # so that the prior's error isn't 0
        model.unet.conv_out.bias += 0.1
    drawn = _Draw(model, made, settings, prior)(0, step_generator(settings.seed, 0))
    said = Predictor(model, *made.size).frozen(drawn.x, drawn.timesteps, drawn.texts)
    alpha = alphas_cumprod(model)
    error = (said - drawn.targets).square().mean(dim=(1, 2, 3))
    found = fine_tune(model, made, settings, tmp_path, prior=prior)
    assert found.loss == pytest.approx(float((drawn.weights * error[:4]).mean()), rel=1e-4)
    ratio = drawn.weights / loss_weights(alpha)[drawn.timesteps[:4]]
    assert all(any(abs(float(r) - w / 3.5) < 1e-4 for w in range(1, 7)) for r in ratio)
    row = json.loads((tmp_path / "fine_tune.jsonl").read_text())
    assert row["prior"] == pytest.approx(float(2.0 * error[4:].mean()), rel=1e-4)
    assert float(error[4:].mean()) == pytest.approx(0.01, rel=1e-3)  # a bias of 0.1, squared


def test_prior_preservation_holds_other_prompts(tmp_path: Path) -> None:
    drift = {}
    for weight in (0.0, 10.0):
        model = tiny_model()
        others = examples(model, seed=1, text="a cat")
        prior = make_prior(model, others, 64, seed=3, empty=0.0)
        fine_tune(model, examples(model), quick(steps=16, batch=8, lr=3e-3, prior=weight, prior_batch=8),
                  tmp_path / str(weight), prior=prior)  # fmt: skip
        held = make_prior(tiny_model(), others, 32, seed=4)  # other points of the same prompts
        said = Predictor(model, *others.size).frozen(held.x, held.timesteps, held.texts)
        drift[weight] = float((said - held.targets).square().mean())
    assert drift[10.0] < 0.5 * drift[0.0]


def test_some_of_the_priors_captions_are_left_out() -> None:
    model = tiny_model()
    others = examples(model, seed=1, text="a cat")
    bare = make_prior(model, others, 400, seed=3, empty=0.25).texts.count("")
    assert 70 <= bare <= 130 and make_prior(model, others, 8, seed=3, empty=0.0).texts.count("") == 0


def test_weights_say_what_is_learned(tmp_path: Path) -> None:
    """Two sets pull apart under one caption: the heavier one wins."""
    errors = {}
    for heavy in (0, 1):
        model = tiny_model()
        sets = [
            Examples(torch.full((2, 4, 8, 8), side), [("a doctor",)] * 2, torch.ones(2), (16, 16))
            for side in (-1.0, 1.0)
        ]
        both = join_examples(sets)
        weights = torch.tensor([20.0, 20.0, 1.0, 1.0] if heavy == 0 else [1.0, 1.0, 20.0, 20.0])
        both = Examples(both.latents, both.captions, weights, both.size)
        fine_tune(model, both, quick(steps=12, batch=8, lr=1e-2, ema=0.0), tmp_path / str(heavy))
        errors[heavy] = error_on(model, sets[0]) - error_on(model, sets[1])
    assert errors[0] < errors[1]


def test_every_example_is_seen_once_a_round() -> None:
    from dodgeburn.training.fine_tune import _Draw

    model = tiny_model()
    made = examples(model, 6)
    draw = _Draw(model, made, quick(batch=4), None)
    seen = [draw._row(i, 6) for i in range(18)]
    assert all(sorted(seen[i : i + 6]) == list(range(6)) for i in (0, 6, 12))
    assert seen[:6] != seen[6:12]


@pytest.mark.parametrize("layers", ["all", "full"])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path, layers: str) -> None:
    def run(folder: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        model = tiny_model()
        prior = make_prior(model, examples(model, seed=1, text="a cat"), 8)

        def stop(step: int, _: dict[str, float]) -> None:
            if step == stop_at:
                raise RuntimeError("cut off")  # not the loop's own KeyboardInterrupt: nothing is saved on the way out

        found = fine_tune(model, examples(model), quick(layers=layers, prior=1.0), tmp_path / folder, prior=prior,
                          callback=stop)  # fmt: skip
        return state(model) if found.adapter is None else dict(found.adapter.state_dict())

    whole = run("a")
    with pytest.raises(RuntimeError):
        run("b", stop_at=4)
    again = run("b")
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


SCRIPT = """
import os, signal, sys, hashlib
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_fine_tune import examples, quick, state
from tiny import tiny_model
from dodgeburn.training.fine_tune import fine_tune
model = tiny_model()
def stop(step, means):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
fine_tune(model, examples(model), quick(), Path(sys.argv[1]), callback=stop)
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in state(model).values())).hexdigest())
"""


def test_sigkill_and_again_give_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def run(folder: str, kill: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(script), str(tmp_path / folder), str(kill)], capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip

    assert run("b", 4).returncode == -signal.SIGKILL
    whole, again = run("a", 0), run("b", 0)
    assert whole.returncode == again.returncode == 0, whole.stderr + again.stderr
    assert whole.stdout == again.stdout


def test_bad_settings_are_one_line(tmp_path: Path) -> None:
    model = tiny_model()
    made = examples(model)
    with pytest.raises(UserError, match="no pictures"):
        fine_tune(model, made.take([]), quick(), tmp_path)
    with pytest.raises(UserError, match="prior preservation"):
        fine_tune(model, made, quick(prior=1.0), tmp_path)
    with pytest.raises(UserError, match="unknown layer set"):
        fine_tune(model, made, quick(layers="nonsense"), tmp_path)
    with pytest.raises(UserError, match="weights are negative or all 0"):
        fine_tune(model, Examples(made.latents, made.captions, torch.zeros(6), made.size), quick(), tmp_path)
    with pytest.raises(UserError, match="smaller lr"):
        fine_tune(model, Examples(made.latents * float("nan"), made.captions, made.weights, made.size), quick(),
                  tmp_path / "nan")  # fmt: skip
    model = tiny_model()
    fine_tune(model, made, quick(), tmp_path / "a")
    with pytest.raises(UserError, match="other settings"):
        fine_tune(model, made, quick(lr=2e-3), tmp_path / "a")
    half = tiny_model()
    half.dtype = torch.float16
    with pytest.raises(UserError, match="load it with dtype fp32"):
        fine_tune(half, made, quick(), tmp_path)


def test_false_from_the_callback_ends_the_training(tmp_path: Path) -> None:
    model = tiny_model()
    found = fine_tune(model, examples(model), quick(steps=100), tmp_path, callback=lambda step, _: step < 4)
    assert found.steps == 4


def test_pictures_of_the_pocket_world_have_true_captions() -> None:
    from dodgeburn.measure.fidelity import satisfied
    from dodgeburn.pocket.captions import parse

    attributes = [attributes_of(i, 3) for i in range(6)]
    made = pocket_pictures(attributes, 64, seed=1, captions=3)
    assert made.pixels.shape == (6, 64, 64, 3) and made.columns["outfit"] == [a["outfit"] for a in attributes]
    for a, captions in zip(attributes, made.captions, strict=True):
        assert len(set(captions)) == len(captions) <= 3
        for text in captions:
            for name, wish in parse(text).items():
                assert satisfied(name, wish, np.array([a[name]]))[0], (name, text)
    held = frozenset(made.captions[0])
    again = pocket_pictures(attributes, 64, seed=1, captions=3, never=held)
    assert not held & {text for captions in again.captions for text in captions}


def test_sets_join_and_columns_fill_up() -> None:
    one = Pictures(np.zeros((2, 16, 16, 3), np.uint8), [("a",), ("b",)], columns={"hat": ["cap", "none"]})
    two = Pictures(np.ones((1, 16, 16, 3), np.uint8), [("c",)], np.array([3.0], np.float32))
    both = join([one, two])
    assert both.columns == {"hat": ["cap", "none", ""]} and both.weights.tolist() == [1, 1, 3]
    assert both.take([2, 0]).captions == [("c",), ("a",)] and int(both.take([2]).pixels.max()) == 1
    with pytest.raises(ValueError, match="different lengths"):
        Pictures(np.zeros((2, 16, 16, 3), np.uint8), [("a",)])


def test_a_teacher_that_is_asked_the_same_is_met_and_one_that_is_asked_more_is_followed(tmp_path: Path) -> None:
    model = tiny_model()
    own = examples(model, text="a doctor")
    start = state(model)
    same = make_teacher(model, own, lambda row, text: text)
    found = fine_tune(model, own, quick(steps=1), tmp_path / "same", teacher=same)
    assert found.loss < 1e-8  # one step: Adam makes steps of full length out of rounding
    asked: set[tuple[int, str]] = set()

    def asks(row: int, text: str) -> str:
        asked.add((row, text))
        return "a cat"

    model.unet.load_state_dict(start)
    other = make_teacher(model, own, asks)
    with torch.no_grad():
        other.predictor.model.unet.conv_out.weight.mul_(2)  # one that says something else
    held = make_prior(model, examples(model, seed=1), 32, seed=4)
    wanted_of = other.predictor.frozen(held.x, held.timesteps, ["a cat"] * 32)

    def apart() -> float:
        said = Predictor(model, *own.size).frozen(held.x, held.timesteps, ["a doctor, 0"] * 32)
        return float((said - wanted_of).square().mean())

    before = apart()
    fine_tune(model, own, quick(steps=24, batch=8, lr=2e-3, ema=0.0), tmp_path / "other", teacher=other)
    assert apart() < 0.6 * before
    assert {row for row, _ in asked} == set(range(len(own)))  # every example, with a caption of its own
    assert all(text in own.captions[row] for row, text in asked)


def test_a_teachers_strength_by_hand() -> None:
    model = tiny_model()
    own = examples(model, text="a doctor")
    held = make_prior(model, own, 3, seed=4)
    ask = Predictor(model, *own.size).frozen

    def says(strength: float) -> torch.Tensor:
        teacher = make_teacher(model, own, lambda row, text: "a cat" if row else text, strength)
        return teacher.says(held.x, held.timesteps, [0, 1, 2], ["a doctor", "a doctor", ""])

    plain, cat = ask(held.x, held.timesteps, ["a doctor"] * 3), ask(held.x, held.timesteps, ["a cat"] * 3)
    empty = ask(held.x, held.timesteps, [""] * 3)
    for strength in (1.0, 2.0):
        wanted = plain + strength * (cat - plain)
        expected = torch.stack([plain[0], wanted[1], empty[2]])  # not asked for more; asked; its caption left out
        assert torch.allclose(says(strength), expected, atol=1e-5)
    assert not torch.allclose(says(1.0)[1], says(2.0)[1], atol=1e-4)
