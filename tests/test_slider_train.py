"""Text sliders: specs, the shared cache, training, early stopping, the command."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.adapters import layers_of
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import draw_attributes
from dodgeburn.pocket.reader import Reader
from dodgeburn.pocket.world import render
from dodgeburn.sampling.predict import Predictor, alphas_cumprod
from dodgeburn.slide.cache import directions, make_points
from dodgeburn.slide.calibrate import reader_scorer
from dodgeburn.slide.natural import known_sigma, spread
from dodgeburn.slide.spec import SliderSpec, load_specs
from dodgeburn.slide.stopping import Watch
from dodgeburn.slide.train import QuickCalibration, SliderMaker

SMALL = {"latents": 3, "latent_steps": 2, "points": 6, "batch": 4, "rank": 2, "layers": "selfattn"}
WORDS = {
    "target": "a person",
    "positive": "a person, smiling broadly",
    "negative": "a person, frowning deeply",
    "preserve": ("", "wearing glasses", "black hair"),
}


@pytest.fixture(scope="module")
def pocket() -> Model:
    return load_model("pocket", device="cpu", dtype="fp32")


def small(name: str = "smile", **more: object) -> SliderSpec:
    return SliderSpec(**{"name": name, **WORDS, **SMALL, "steps": 4, **more})  # type: ignore[arg-type]


# -------------------- specs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- smile", "no mapping"),
        ("name: [", "YAML"),
        ("name: smile\ntarget: a\npositive: b", "negative is missing"),
        ("name: smile\ntarget: a\npositive: b\nnegative: b", "there is no direction"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\nlayers: all", "unknown layer set"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\nrank: 0", "rank is 0: expected a whole number from 1"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\nalpha: 0", "alpha is 0: expected a number above 0"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\neta: .inf", "eta is inf: expected a finite number"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\nlr: .nan", "lr is nan: expected a finite number"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\ncontexts: 2", "contexts is 2, but 0 attributes"),
        ("name: a/b\ntarget: a\npositive: b\nnegative: c", "no name for a file"),
        ("name: smile\ntarget: a\npositive: ''\nnegative: c", "positive is empty"),
        ("name: smile\ntarget: a\npositive: b\nnegative: c\nranks: 3", "ranks is not known"),
        ("target: a\nsliders: []", "empty"),
        ("target: a\npositive: b\nnegative: c\nsliders: [{name: x}, {name: x}]", "two sliders are named x"),
    ],
)
def test_bad_specs_are_one_line_that_names_the_thing(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_specs(path)
    assert "\n" not in str(caught.value)


def test_the_examples_are_valid() -> None:
    for path in sorted((Path(__file__).parents[1] / "examples" / "sliders").glob("*.yaml")):
        assert load_specs(path)


def test_a_class_shares_what_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "class.yaml"
    path.write_text(
        "target: a person\npreserve: [waving]\nsliders:\n"
        "- {name: smile, positive: a, negative: b}\n- {name: age, positive: c, negative: d, eta: 2}\n"
    )
    smile, age = load_specs(path)
    assert smile.cache_key() == age.cache_key() and age.eta == 2
    assert smile.prompts("waving") == ("a person, waving", "a, waving", "b, waving")


# -------------------- cache


def test_points_are_at_the_noise_level_that_the_network_is_told(pocket: Model) -> None:
    predictor = Predictor(pocket, 64, 64)
    points = make_points(pocket, predictor, small(points=12, unconditional=0.5))
    assert predictor.forwards == 3 * 2 * 2 + 12
    assert int(points.timesteps.max()) < small().start and len(set(points.timesteps.tolist())) == 12
    again = make_points(pocket, Predictor(pocket, 64, 64), small(points=12, unconditional=0.5))
    assert torch.equal(points.x, again.x) and torch.equal(points.neutral, again.neutral)
    # Clean latents have about unit variance, and so has every noised one.
    late = points.x[points.timesteps.argmax()]
    assert abs(float(late.std()) - 1) < 0.35
    assert {"", "a person"} & set(points.texts)


def test_directions_are_the_frozen_difference(pocket: Model) -> None:
    spec = small(contexts=1)
    predictor = Predictor(pocket, 64, 64)
    points = make_points(pocket, predictor, spec)
    found = directions(predictor, points, spec)
    i = 1
    _, plus, minus = spec.prompts(points.contexts[i])
    one = predictor.frozen(points.x[i : i + 1].repeat(2, 1, 1, 1), points.timesteps[i : i + 1].repeat(2), [plus, minus])
    assert torch.allclose(found[i], one[0] - one[1], atol=1e-4)
    both = directions(predictor, points, small(contexts=2))
    assert not torch.allclose(both, found) and float((both * found).sum()) > 0


def test_alpha_bar_falls_to_the_schedules_end(pocket: Model) -> None:
    alpha = alphas_cumprod(pocket)
    assert len(alpha) == 1000 and alpha[0] > 0.99 and abs(float(alpha[-1]) - 0.00466) < 1e-4


# -------------------- stopping


def test_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    values = iter([-1.0, -0.5, -0.499, -0.4989, -0.2])
    watch = Watch(lambda: next(values), tmp_path / "seen.json", int, 10, least=0.02, patience=2)
    assert [watch.look(step) for step in (5, 10, 20, 30, 40)] == [False, False, False, False, True]
    # A resumed run decides from what was seen, without measuring again.
    again = Watch(lambda: 1 / 0, tmp_path / "seen.json", int, 10, least=0.02, patience=2)
    assert [again.look(step) for step in (10, 20, 30, 40)] == [False, False, False, True]


def test_goes_on_while_it_gets_better(tmp_path: Path) -> None:
    values = iter([0.1, 0.2, 0.2, 0.3])
    watch = Watch(lambda: next(values), tmp_path / "seen.json", every=1, patience=2)
    assert not any(watch.look(step) for step in (1, 2, 3, 4))


# -------------------- natural spread


def test_the_shipped_units_are_the_shipped_models(pocket: Model) -> None:
    sigma = known_sigma(pocket, "smile")
    assert sigma is not None and 0.1 < sigma < 0.3
    assert known_sigma(load_model("pocket-style", device="cpu", dtype="fp32"), "smile") is None
    assert known_sigma(pocket, "charm") is None


def test_spread_leaves_out_prompts_that_name_the_attribute() -> None:
    blank = np.zeros((4, 64, 64, 3), np.uint8)
    readings = Reader.load("reader").read(blank)
    readings.values["smile"] = np.array([0.2, 0.4, 0.9, 0.0], np.float32)
    readings.unreadable[:] = [False, False, False, True]
    found = spread(readings, ["a person", "a face", "a person, smiling broadly", "a person"])
    assert found["smile"] == pytest.approx(np.std([0.2, 0.4], ddof=1))


# -------------------- training


def test_trains_what_it_promises_and_the_file_says_so(pocket: Model, tmp_path: Path) -> None:
    from dodgeburn.models.adapter_file import load_adapter

    spec = small(attribute="smile", layers="noxattn", steps=12, lr=4e-3, batch=8, points=16, stop="never")
    quick = QuickCalibration(pictures=2, steps=4)
    maker = SliderMaker(
        pocket, lambda a: reader_scorer(a, Reader.load("reader")), lambda a: known_sigma(pocket, a), quick
    )
    (made,) = maker.text([spec], lambda s: tmp_path / "smile.safetensors")
    assert made.card.sigma == known_sigma(pocket, "smile") and "smile" in made.card.unit
    assert made.training == 2 * 16 + 12 * 8 and made.shared == 3 * 2 * 2 + 16
    assert made.calibration % (4 * 2) == 0 and made.calibration > 0
    # What the file's alpha says of the unit decides whether a stronger target is proposed.
    raw = made.adapter.alphas[made.adapter.modules_changed[0]] / spec.rank
    assert made.raw == pytest.approx(raw) and made.better_eta is None
    assert replace(made, raw=1.6).better_eta == 2.0 and replace(made, raw=1.5).better_eta is None
    assert replace(made, raw=2.1, spec=spec.model_copy(update={"eta": 3.0})).better_eta == 8.0
    loaded = load_adapter(made.path, pocket)
    assert loaded.origin is not None and loaded.origin.card == made.card
    name = loaded.modules_changed[0]
    assert torch.allclose(loaded.down(name), made.adapter.down(name), atol=1e-3)
    assert not (tmp_path / "smile.safetensors.training").exists()


def test_a_slider_that_is_on_from_the_first_step_shares_the_cache(pocket: Model, tmp_path: Path) -> None:
    specs = [small("first"), small("late"), small("early", late=False)]
    _, late, early = SliderMaker(pocket).text(specs, lambda s: tmp_path / f"{s.name}.safetensors")
    assert specs[1].cache_key() == specs[2].cache_key() and early.shared == late.shared
    assert (late.card.start, early.card.start) == (specs[1].start, None)
    for name in late.adapter.modules_changed:  # trained alike: only its use differs
        assert torch.equal(late.adapter.up(name), early.adapter.up(name))


def test_a_killed_training_ends_with_the_same_file(tmp_path: Path) -> None:
    spec = tmp_path / "smile.yaml"
    lines = [f"{key}: {value}" for key, value in {**SMALL, "steps": 20, "name": "smile", "stop": "never"}.items()]
    spec.write_text("\n".join([*lines, "target: a person", "positive: a person, smiling broadly", "negative: sad"]))
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    command = [sys.executable, "-m", "dodgeburn", "slider", "train", str(spec), "-o"]
    assert subprocess.run([*command, str(whole)], capture_output=True).returncode == 0
    running = subprocess.Popen([*command, str(cut)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = cut.with_name(cut.name + ".training")
    while running.poll() is None and not (folder / "smile.checkpoint.pt").exists():
        pass
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not cut.exists() and (folder / "smile.checkpoint.pt").exists()
    assert subprocess.run([*command, str(cut)], capture_output=True).returncode == 0
    assert whole.read_bytes() == cut.read_bytes() and not folder.exists()


def test_a_loss_that_is_not_finite_stops_with_a_line(pocket: Model, tmp_path: Path) -> None:
    out = tmp_path / "smile.safetensors"
    with pytest.raises(UserError, match="no longer finite.*smaller lr"):
        list(SliderMaker(pocket).text([small(lr=1e30, steps=10, stop="never")], lambda s: out))
    assert not list(tmp_path.iterdir())


def test_a_rank_beyond_every_layer_is_refused(pocket: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank 600: expected 1 to"):
        list(SliderMaker(pocket).text([small(rank=600)], lambda s: tmp_path / "smile.safetensors"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "class.yaml"
    shared = "\n".join(f"{key}: {value}" for key, value in {**SMALL, "steps": 5}.items())
    spec.write_text(
        f"{shared}\ntarget: a person\nsliders:\n- {{name: smile, positive: smiling broadly, negative: frowning}}\n"
        "- {name: age, positive: a very old face, negative: a very young face}\n"
    )
    folder = tmp_path / "sliders"
    assert main(["slider", "train", str(spec), "-o", str(folder), "--strips", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sliders"]
    assert [one["name"] for one in found] == ["smile", "age"]
    assert found[0]["shared"] == found[1]["shared"] == 3 * 2 * 2 + 6
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["age.safetensors", "smile.safetensors"]
    strips = [path.stem for path in sorted((folder / "smile.safetensors.strips").iterdir())]
    assert strips == ["step-0002", "step-0004", "step-0005"]
    # The same again leaves what is finished.
    (folder / "age.safetensors").unlink()
    kept = (folder / "smile.safetensors").stat().st_mtime_ns
    assert main(["slider", "train", str(spec), "-o", str(folder), "--json"]) == 0
    said = capsys.readouterr().out
    assert "there already: smile" in said and [one["name"] for one in json.loads(said.splitlines()[-1])["sliders"]] == [
        "age"
    ]
    assert (folder / "smile.safetensors").stat().st_mtime_ns == kept
    assert main(["slider", "train", str(spec), "-o", str(folder), "--seed", "1", "--dtype", "fp32"]) == 0
    assert "there already" not in capsys.readouterr().out
    assert main(["slider", "train", str(spec), "-o", str(tmp_path / "one.safetensors")]) == 2
    assert "give a folder" in capsys.readouterr().err
    for option, value in (("--seed", "-1"), ("--strips", "-3")):
        assert main(["slider", "train", str(spec), "-o", str(folder), option, value]) == 2
        assert "expected 0 or more" in capsys.readouterr().err
    spec.write_text(spec.read_text().replace("smiling broadly,", "smiling broadly, attribute: grin,"))
    assert main(["slider", "train", str(spec), "-o", str(tmp_path / "new")]) == 2
    assert "no attribute 'grin'" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["slider", "train", str(tmp_path / "none.yaml"), "-o", str(folder)]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_repair_of_fingers_is_left_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = tmp_path / "hands.yaml", tmp_path / "hands.safetensors"
    shared = "\n".join(f"{key}: {value}" for key, value in {**SMALL, "steps": 2}.items())
    words = "target: a person, waving\npositive: a person, waving\nnegative: a person, no hands visible"
    spec.write_text(f"name: hands\nattribute: fingers\n{words}\n{shared}\n")
    for method in ((), ("--closed-form",)):
        assert main(["slider", "train", str(spec), "-o", str(out), *method, "--json"]) == 0
        said = capsys.readouterr().out
        assert "fingers are right or wrong and have no natural deviation; 1.0 is as trained" in said
        (found,) = json.loads(said.strip().splitlines()[-1])["sliders"]
        assert found["unit"] == "" and found["safe_range"] is None and found["calibration"] == 0


@pytest.mark.parametrize("begin", ["closed-form", "gradient"])
def test_other_beginnings_train_too(pocket: Model, tmp_path: Path, begin: str) -> None:
    spec = small(begin=begin, steps=5, stop="never")
    (made,) = SliderMaker(pocket).text([spec], lambda s: tmp_path / "smile.safetensors")
    own = {f"unet.{name}" for name in layers_of(pocket.unet, "selfattn")}
    changed = set(made.adapter.modules_changed)
    assert changed > own if begin == "closed-form" else changed <= own
    assert any(made.adapter.up(name).any() for name in changed & own)


def test_pairs_and_closed_form_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "smile.safetensors"
    spec = tmp_path / "smile.yaml"
    spec.write_text("name: smile\ntarget: a person\npositive: smiling broadly\nnegative: frowning deeply\n")
    assert main(["slider", "train", str(spec), "-o", str(out), "--closed-form", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sliders"]
    assert found["forwards"] == found["shared"] == 0 and out.exists()
    for side, smile in (("before", 0.1), ("after", 0.9)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(2):
            attributes = draw_attributes(np.random.default_rng(i)) | {"smile": smile}
            Image.fromarray(render(attributes, 64)).save(tmp_path / "pairs" / side / f"{i}.png")
    arguments = ["slider", "train", "--pairs", str(tmp_path / "pairs"), "-o", str(tmp_path / "p.safetensors"), "--json"]
    assert main(arguments) == 0
    (found,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sliders"]
    assert found["forwards"] > 0 and found["unit"] == ""
    capsys.readouterr()
    assert main([*arguments, "--attribute", "grin"]) == 2
    assert "no attribute 'grin'" in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors.training").exists()
    assert main(["slider", "train", str(spec), "-o", str(out), "--closed-form", "--strips", "5"]) == 2
    assert "which has no steps" in capsys.readouterr().err
    assert main(["slider", "train", "-o", str(out)]) == 2
    assert "give a YAML file or --pairs" in capsys.readouterr().err
    few = tmp_path / "few.yaml"
    few.write_text("steps: 2\nbatch: 1\nrank: 1\nlayers: selfattn\n")
    assert main([*arguments[:2], str(few), *arguments[2:]]) == 0
    (found,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sliders"]
    assert load_adapter(tmp_path / "p.safetensors").origin.card.training.settings["rank"] == 1
    few.write_text("stepps: 2\n")
    assert main([*arguments[:2], str(few), *arguments[2:]]) == 2
    assert "few.yaml" in (said := capsys.readouterr().err) and "did you mean steps" in said
    (tmp_path / "pairs" / "after" / "1.png").unlink()
    assert main(arguments) == 2
    assert "1.png" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_real_topologies_train_by_the_same_code(layout: str, tmp_path: Path) -> None:
    model = tiny_model(layout)
    made = []
    for checkpointing in (False, True):
        spec = small(layers="full", steps=3, stop="never", unconditional=0.5, checkpointing=checkpointing)
        out = tmp_path / f"{checkpointing}.safetensors"
        made += SliderMaker(model).text([spec], lambda s, out=out: out)  # type: ignore[misc]
    plain, checkpointed = (one.adapter for one in made)
    for name in plain.modules_changed:
        assert torch.allclose(plain.up(name), checkpointed.up(name), atol=1e-5)
    assert any(plain.up(name).any() for name in plain.modules_changed)
    assert not model.unet.training and not any(p.grad is not None for p in model.unet.parameters())
