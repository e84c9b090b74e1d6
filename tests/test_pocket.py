"""The shipped pocket models and the verb `pocket`, end to end."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.packaged import CACHE
from dodgeburn.checkpoint.tensorfile import read_header, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.cli.pocket import _numbers
from dodgeburn.errors import DodgeburnWarning
from dodgeburn.merge.run import merge
from dodgeburn.models.loading import find_model, load_model
from dodgeburn.models.saving import save_diffusers_folder
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.model import ADAPTED, NAMES, TOKENIZER, WEIGHTS, weights_path
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings, generate


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ADAPTED])
def test_shipped_files_have_sdxl_names_and_say_how_they_were_made(name: str) -> None:
    header = read_header(weights_path(name))
    layout = detect_layout(header.tensors, {k: t.shape for k, t in header.tensors.items()})
    assert layout.name == "sdxl" and len(layout.blocks) == 9 + 1 + 9
    training = json.loads(header.metadata["dodgeburn.training"])
    assert training["config"]["seed"] == 0 and training["logs"]
    assert {t.dtype for t in header.tensors.values()} == {"F16"}


@pytest.mark.parametrize("name", ADAPTED)
def test_a_model_that_ships_as_a_lora_is_made_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    lora, base = weights_path(name), weights_path(ADAPTED[name])
    assert lora.stat().st_size <= 3e6
    training = json.loads(read_header(lora).metadata["dodgeburn.training"])
    assert training["config"]["seed"] == 0 and training["logs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DodgeburnWarning)  # other bytes than elsewhere
        found = find_model(name)
    assert found == find_checkpoint(name) and found.is_relative_to(tmp_path / "cache")
    assert sha256_tensors(found) == read_header(lora).metadata["dodgeburn.packaged.sha256_tensors"]
    model, plain = load_model(name, "cpu"), load_model(base, "cpu")
    assert model.name == name
    changed = 0
    for part, module in model.components().items():
        before = plain.components()[part].state_dict()
        moved = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
        assert part == "unet" or not moved
        changed += len(moved)
    assert changed > 50
    merge("pocket-style", name, tmp_path / "merged.safetensors", preset="Cosine", base=0.4)
    recipe = json.loads(read_header(tmp_path / "merged.safetensors").metadata["dodgeburn.recipe"])
    assert recipe["b"]["file"] == f"{name}.safetensors" and recipe["b"]["sha256"] == model.sha256


def test_what_ships_is_small() -> None:
    assert max(p.stat().st_size for p in WEIGHTS.iterdir()) < 30e6
    assert sum(p.stat().st_size for p in [*WEIGHTS.iterdir(), *TOKENIZER.iterdir()]) < 60e6


def test_the_unet_has_the_promised_size() -> None:
    weights = sum(p.numel() for p in load_model("pocket", "cpu").unet.parameters())
    assert 6e6 <= weights <= 12e6


def test_the_pipeline_of_diffusers_loads_the_folder_as_it_is(tmp_path: Path) -> None:
    save_diffusers_folder(load_model("pocket", "cpu"), tmp_path / "pocket")
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pocket", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a doctor", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert made.size == (64, 64)


def test_pictures_show_what_prompts_ask_for() -> None:
    prompts = ["a doctor, on a purple background", "a firefighter, wearing a crown", "poster style, gardener"] * 4
    made = generate(load_model("pocket", "cpu"), prompts, list(range(12)), GenerateSettings(steps=10))
    seen = Reader.load("reader").read(np.stack([np.asarray(g.image) for g in made]))
    right = [seen.values[k][i] == v for i, p in enumerate(prompts) for k, v in parse(p).items()]
    assert np.mean(right) >= 0.85 and seen.unreadable.mean() < 0.2


def test_evaluate_prints_the_promised_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pocket", "evaluate", "-n", "12", "--json", "-o", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("categorical_accuracy", "categorical_worst", "spearman_mean", "spearman_worst", "unreadable",
                 "marginal_tv_worst", "planted_shares", "vae_mse"):  # fmt: skip
        assert name in result
    assert Image.open(tmp_path / "pocket-sheet.png").width > 1000


def test_evaluate_readers_prints_the_promised_names(capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.training.pocket_gate import evaluate_readers

    result = evaluate_readers(load_model("pocket", "cpu"), n=40, generated=4)
    for name in ("categorical_accuracy", "finger_accuracy", "rmse_worst", "junk_unreadable", "roundtrip_drop",
                 "agreement"):  # fmt: skip
        assert isinstance(result[name], float)
    assert main(["pocket", "evaluate", "--reader", "--model", "poket"]) == 2
    assert "did you mean pocket" in capsys.readouterr().err
    for more in ([], ["--reader"]):
        assert main(["pocket", "evaluate", "-n", "0", *more]) == 2
        assert "-n 0: give a number" in capsys.readouterr().err


def test_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pocket", "draw", "-o", str(tmp_path / "w.png"), "--n", "9", "--size", "64"]) == 0
    assert Image.open(tmp_path / "w.png").width > 8 * 64
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert main(["pocket", "draw", "--n", "0"]) == 2
    assert main(["pocket", "paint"]) == 2
    assert main(["pocket", "draw", "-o", str(tmp_path / "x.png"), "--seed", "-1"]) == 2
    assert "--seed -1: give a number" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_training_runs_through_and_a_second_call_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                              ) -> None:  # fmt: skip
    tiny = {"steps": 2, "checkpoint_every": 1, "warmup": 1}
    config = {"pictures": 24, "vae_pictures": 24, "vae_batch": 2, "text_batch": 4, "unet_batch": 2,
              "vae": tiny, "vae_polish": tiny, "vae_decoder": tiny, "text": tiny, "unet": tiny, "unet_polish": tiny,
              "finetune": tiny, "finetune_pictures": 8, "compiled": False}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    command = ["pocket", "train", "-o", str(tmp_path / "run"), "--config", str(tmp_path / "c.json"), "--device", "cpu"]
    assert main([*command, "--only", "base"]) == 0
    first = (tmp_path / "run" / "pocket.safetensors").read_bytes()
    assert main([*command, "--only", "base"]) == 0
    assert (tmp_path / "run" / "pocket.safetensors").read_bytes() == first
    assert main([*command, "--only", "pocket-bold"]) == 0
    assert load_model(tmp_path / "run" / "pocket-bold.safetensors", "cpu").native_size == 64
    assert (tmp_path / "run" / "pocket" / "model_index.json").exists()
    # A folder is a run with one config: what the files say of their making stays true.
    (tmp_path / "c.json").write_text(json.dumps({**config, "seed": 7}))
    capsys.readouterr()
    assert main([*command, "--only", "pocket-bold"]) == 2
    assert "pocket train.seed was 0, now 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"unet": {"stepz": 3}}', "'unet' has no setting 'stepz'"),
        ('{"sise": 64}', "unknown setting 'sise'"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not a readable JSON file"),
        ('{"unet": 3}', "'unet' is 3: expected an object"),
        ('{"size": 100}', "expected 64 or 128"),
        ('{"size": "x"}', "size is 'x': expected a whole number"),
        ('{"unet": {"steps": 0}}', "unet.steps is 0: expected a finite number from 1 up"),
        ('{"unet": {"lr": NaN}}', "unet.lr is nan"),
        ('{"finetune": {"precision": "foo"}}', "precision is 'foo'"),
        ('{"finetune": {"betas": [2, 3]}}', "betas[0] is 2"),
        ('{"finetune": {"ema": 5}}', "ema is 5"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(config: str, said: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "c.json").write_text(config)
    assert main(["pocket", "train", "-o", str(tmp_path / "run"), "--config", str(tmp_path / "c.json")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_no_picture_shows_is_null_in_the_json() -> None:
    assert _numbers({"a": [math.nan, 1.5, {"b": math.inf}], "c": (2, "x")}) == {
        "a": [None, 1.5, {"b": None}],
        "c": [2, "x"],
    }
