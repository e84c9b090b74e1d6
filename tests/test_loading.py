"""Models from names, files and folders, and back: nothing lost, diffusers loads what we write, errors in
one line.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    read_header,
    save_tensors,
    sha256_file,
    sha256_tensors,
)
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.models.latents import decode_pictures, denormalise, normalise
from dodgeburn.models.loading import _empty, assemble, find_model, is_stock, known_configs, load_model
from dodgeburn.models.model import Model, choose_device, choose_dtype
from dodgeburn.models.saving import save_diffusers_folder, save_single_file
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.prompts import token_chunks
from tests.tiny import tiny_model

LAYOUTS = ("sdxl", "sd15")
SETTINGS = GenerateSettings(steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {layout: tiny_model(layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def places(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each model as a single file and as a diffusers folder, and the tokenizer beside the
    files.
    """
    root = tmp_path_factory.mktemp("models")
    for layout, model in models.items():
        save_single_file(model, root / f"{layout}.safetensors", {"note": "kept"})
        save_diffusers_folder(model, root / layout)
    models["sdxl"].tokenizers[0].save_pretrained(str(root / "tokenizer"))
    return root


def pictures(model: Model) -> np.ndarray:
    made = generate(model, ["a hat", "green"], [1, 2], SETTINGS)
    return np.stack([np.asarray(m.image).astype(int) for m in made])


def same_weights(a: Model, b: Model) -> None:
    for part, module in a.components().items():
        other = b.components()[part].state_dict()
        state = module.state_dict()
        assert set(state) == set(other)
        assert all(torch.equal(state[key], other[key]) for key in state), part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_file_and_folder_hold_the_same_model(models: dict[str, Model], places: Path, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_file = load_model(places / f"{layout}.safetensors", "cpu")
        from_folder = load_model(places / layout, "cpu")
    wanted = pictures(models[layout])
    for loaded in (from_file, from_folder):
        same_weights(models[layout], loaded)
        assert loaded.layout.name == layout and loaded.name == layout
        assert not loaded.unet.training and not any(p.requires_grad for p in loaded.unet.parameters())
        assert np.abs(pictures(loaded) - wanted).max() <= 1
    assert from_file.sha256 == sha256_file(places / f"{layout}.safetensors")
    assert len(from_folder.sha256) == 64 and from_file.metadata["note"] == "kept"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_loads_the_folder_as_it_is(models: dict[str, Model], places: Path, layout: str) -> None:
    kind: Any = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}[layout]
    pipe = kind.from_pretrained(str(places / layout), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    images = pipe(
        ["a hat", "green"], num_inference_steps=3, guidance_scale=3.0, output_type="np", width=16, height=16,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
    ).images  # fmt: skip
    assert np.abs((images * 255).round() - pictures(models[layout])).max() <= 1
    assert (places / layout / "tokenizer" / "vocab.json").exists()
    names = read_header(places / layout / "text_encoder" / "model.safetensors").tensors
    assert all(name.startswith("text_model.") for name in names), "the names that all releases read"


def test_convert_there_and_back_changes_nothing(places: Path, tmp_path: Path) -> None:
    single = places / "sdxl.safetensors"
    assert main(["convert", str(single), "-o", str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), "-o", str(tmp_path / "again.safetensors")]) == 0
    assert sha256_tensors(tmp_path / "again.safetensors") == sha256_tensors(single)
    assert read_header(tmp_path / "again.safetensors").metadata["note"] == "kept"


def test_stored_types_stay_and_others_are_cast(places: Path, tmp_path: Path) -> None:
    mixed = {
        key: value.half() if key.startswith("model.") else value
        for key, value in load_tensors(places / "sdxl.safetensors").items()
    }
    metadata = read_header(places / "sdxl.safetensors").metadata
    save_tensors(tmp_path / "mixed.safetensors", mixed, metadata)
    folder = str(places / "tokenizer")
    stored = load_model(tmp_path / "mixed.safetensors", "cpu", "stored", folder)
    assert stored.unet.dtype == stored.dtype == torch.float16 and stored.vae.dtype == torch.float32
    save_diffusers_folder(stored, tmp_path / "folder")
    again = load_model(tmp_path / "folder", "cpu", "stored")
    assert again.unet.dtype == torch.float16 and again.vae.dtype == torch.float32
    same_weights(stored, again)
    for name in ("unet", "vae"):
        weights = tmp_path / "folder" / name / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    same_weights(stored, load_model(tmp_path / "folder", "cpu", "stored"))
    assert load_model(tmp_path / "folder", "cpu").unet.dtype == torch.float32
    save_single_file(stored, tmp_path / "half.safetensors", dtype=torch.float16)
    assert {i.dtype for i in read_header(tmp_path / "half.safetensors").tensors.values()} == {"F16"}


def test_the_pocket_needs_no_folder(tmp_path: Path) -> None:
    from dodgeburn.pocket.model import build, component_configs, tokenizer

    configs = component_configs()
    model = assemble("mine", None, configs, build(configs), [tokenizer(), tokenizer()])
    save_single_file(model, tmp_path / "mine.safetensors", {}, torch.float16)
    loaded = load_model(tmp_path / "mine.safetensors", "cpu")
    assert loaded.native_size == configs["vae"]["sample_size"] and loaded.name == "mine"
    assert loaded.layout.blocks[0] == "IN00" and len(loaded.layout.blocks) == 19
    assert not is_stock(loaded)


def test_real_configs_have_the_published_sizes() -> None:
    counts = {}
    for layout in LAYOUTS:
        for part, config in known_configs(layout).items():
            if part != "scheduler":
                with init_empty_weights(include_buffers=True):
                    module = _empty(part, config)
                counts[layout, part] = sum(p.numel() for p in module.parameters())
    assert counts["sd15", "unet"] == 859_520_964
    assert counts["sdxl", "unet"] == 2_567_463_684
    assert counts["sd15", "vae"] == counts["sdxl", "vae"] == 83_653_863
    assert counts["sd15", "text_encoder"] == counts["sdxl", "text_encoder"] == 123_060_480
    assert counts["sdxl", "text_encoder_2"] == 694_659_840


# ------------------------------------------------------------------------------------------------- latents


def test_latents_normalise_both_ways(models: dict[str, Model]) -> None:
    z = torch.randn(2, 4, 3, 3)
    for config in ({"scaling_factor": 0.5}, dict(models["sdxl"].vae.config)):
        assert torch.allclose(denormalise(normalise(z, config), config), z, atol=1e-6)
    with_moments = normalise(z, {"scaling_factor": 2.0, "latents_mean": [1.0] * 4, "latents_std": [4.0] * 4})
    assert torch.allclose(with_moments, (z - 1) / 4 * 2)


def test_decoding_in_parts_is_the_same(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        whole = decode_pictures(models["sdxl"].vae, z)
        monkeypatch.setattr("dodgeburn.models.latents.DECODE_PIXELS", 2 * 16 * 16)
        parts = decode_pictures(models["sdxl"].vae, z)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == torch.uint8
    assert (whole.int() - parts.int()).abs().max() <= 1


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pockett", "did you mean pocket"),
        ("nothing.safetensors", "does not exist"),
        ("/nowhere/model", "unknown model|does not exist"),
        ("", "unknown model"),
    ],
)
def test_unknown_names(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(name, "cpu")


def test_a_hub_id_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nobody/nothing from the Hub") as caught:
        load_model("nobody/nothing", "cpu")
    assert "\n" not in str(caught.value)


def test_damaged_files(places: Path, tmp_path: Path) -> None:
    tensors = load_tensors(places / "sdxl.safetensors")
    metadata = read_header(places / "sdxl.safetensors").metadata
    tokenizer = str(places / "tokenizer")

    def refused(changed: dict[str, torch.Tensor], notes: dict[str, str], message: str) -> None:
        save_tensors(tmp_path / "bad.safetensors", changed, notes)
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "bad.safetensors", "cpu", tokenizer=tokenizer)

    key = "model.diffusion_model.out.2.weight"
    refused({k: v for k, v in tensors.items() if k != key}, metadata, key)
    refused({**tensors, key: torch.zeros(9, 8, 3, 3)}, metadata, "its config asks for")
    refused(tensors, {"dodgeburn.configs": "[]"}, "damaged")
    refused({"a": torch.zeros(1)}, {}, "not a Stable Diffusion")
    (tmp_path / "cut.safetensors").write_bytes((places / "sdxl.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.safetensors"):
        load_model(tmp_path / "cut.safetensors", "cpu")


def test_no_tokenizer_says_what_to_do(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dodgeburn.models.tokenizers._CACHED", ())
    (tmp_path / "m.safetensors").write_bytes((places / "sdxl.safetensors").read_bytes())
    with pytest.raises(UserError, match="--tokenizer"):
        load_model(tmp_path / "m.safetensors", "cpu")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_model(tmp_path / "m.safetensors", "cpu", tokenizer=tmp_path)
    assert load_model(tmp_path / "m.safetensors", "cpu", tokenizer=places / "sdxl").name == "m"


def test_a_cache_without_the_tokenizer_gives_none(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 makes a tokenizer of two tokens out of nothing, with which no prompt could be read."""

    class Empty:
        model_max_length = 10**30

        @staticmethod
        def from_pretrained(*_: object, **__: object) -> "Empty":
            return Empty()

        def __len__(self) -> int:
            return 2

    monkeypatch.setattr("transformers.CLIPTokenizer", Empty)
    (tmp_path / "m.safetensors").write_bytes((places / "sdxl.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"no CLIP tokenizer found for m.safetensors.*--tokenizer"):
        load_model(tmp_path / "m.safetensors", "cpu")


def test_a_tokenizer_of_two_plain_files_reads_77_tokens(places: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as the error message asks for, do not say how long a prompt may be."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(places / "sdxl" / "tokenizer" / name, tmp_path / name)
    (tmp_path / "m.safetensors").write_bytes((places / "sdxl.safetensors").read_bytes())
    model = load_model(tmp_path / "m.safetensors", "cpu", tokenizer=tmp_path)
    assert model.tokenizers[0].model_max_length == 77
    assert len(token_chunks(model.tokenizers[0], "a")[0].ids) == 77


def test_incomplete_folders(places: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model_index.json"):
        load_model(tmp_path, "cpu")
    index = {"_class_name": "FluxPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="FluxPipeline"):
        load_model(tmp_path, "cpu")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="unet/config.json is missing"):
        load_model(tmp_path, "cpu")


def test_outputs_are_never_overwritten_or_half_written(
    models: dict[str, Model], places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(places / "sdxl.safetensors", "cpu")
    with pytest.raises(UserError):
        save_single_file(loaded, places / "sdxl.safetensors")
    with pytest.raises(UserError, match="exists already"):
        save_diffusers_folder(loaded, places / "sdxl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_diffusers_folder(loaded, tmp_path / "file" / "folder")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dodgeburn.models.saving.save_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        save_diffusers_folder(loaded, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_devices_and_types() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    assert choose_dtype(None, torch.device("cuda")) == torch.float16
    assert choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert choose_dtype("stored", torch.device("cpu")) is None
    with pytest.raises(UserError, match="expected auto"):
        choose_device("gpu")
    with pytest.raises(UserError, match="expected fp32"):
        choose_dtype("half", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pockett", "perhaps you meant the packaged pocket"),
        ("someone/model", "`dodgeburn convert someone/model -o FILE`"),
    ],
)
def test_jobs_on_weights_say_what_a_name_may_mean(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name} does not exist.*{said}"):
        find_checkpoint(name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert find_checkpoint(name) == Path(name)  # a file of that name is that file


def test_a_model_is_found_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert find_model("~/model.safetensors") == tmp_path / "model.safetensors"
