"""convert and loading: every form a model comes in, bit for bit, and what may be changed on the way."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, save_tensors, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.convert import ConvertSettings, convert
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from tests.tiny import tiny_model

LAYOUTS = ("sdxl", "sd15")
IDS = {
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_ids",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of each layout with position ids, as real ones have, in fp16 and its VAE in fp32; a tokenizer."""
    root = tmp_path_factory.mktemp("formats")
    for layout in LAYOUTS:
        model = tiny_model(layout)
        save_single_file(model, root / "plain.safetensors", {"note": "kept"})
        metadata = read_header(root / "plain.safetensors").metadata
        tensors = {
            key: value if key.startswith("first_stage_model.") else value.half()
            for key, value in load_tensors(root / "plain.safetensors").items()
        }
        tensors[IDS[layout]] = torch.arange(77).reshape(1, 77)
        save_tensors(root / f"{layout}.safetensors", tensors, metadata)
        model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
        convert(root / f"{layout}.safetensors", root / layout)
    (root / "plain.safetensors").unlink()
    return root


def same(a: Path | dict[str, torch.Tensor], b: Path | dict[str, torch.Tensor]) -> bool:
    one, two = (load_tensors(x) if isinstance(x, Path) else x for x in (a, b))
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_file_to_folder_and_back_keeps_every_bit(layout: str, place: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(place / layout, tmp_path / "again.safetensors")
        convert(tmp_path / "again.safetensors", tmp_path / "folder", ConvertSettings(tokenizer=place / "tokenizer"))
        convert(tmp_path / "folder", tmp_path / "copy")
    assert same(place / f"{layout}.safetensors", tmp_path / "again.safetensors")
    assert read_header(tmp_path / "again.safetensors").metadata["note"] == "kept"
    for file in sorted((place / layout).rglob("*.safetensors")):
        for other in ("folder", "copy"):
            assert same(file, tmp_path / other / file.relative_to(place / layout)), file
    index = json.loads((place / layout / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "folder" / "model_index.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_loads_both(layout: str, place: Path) -> None:
    kind: Any = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}[layout]
    folder = str(place / layout)
    one = kind.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    extra = {} if layout == "sdxl" else {"safety_checker": None}
    two = kind.from_single_file(
        str(place / f"{layout}.safetensors"), config=folder, local_files_only=True, torch_dtype=torch.float32, **extra
    )
    ours = load_model(place / f"{layout}.safetensors", "cpu")
    for part, module in ours.components().items():
        wanted = module.state_dict()
        for pipe in (one, two):
            found = getattr(pipe, part).state_dict()
            assert set(found) == set(wanted), part
            assert all(torch.equal(found[key].float(), wanted[key].float()) for key in wanted), part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_and_pickles(layout: str, place: Path, tmp_path: Path) -> None:
    single = place / f"{layout}.safetensors"
    tensors, metadata = load_tensors(single), read_header(single).metadata
    names = list(tensors)
    places = {name: f"m-{1 + (i > 99):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_tensors(tmp_path / file, {name: tensors[name] for name in names if places[name] == file}, metadata)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    convert(tmp_path / "m.safetensors.index.json", tmp_path / "whole.safetensors")
    assert same(tensors, tmp_path / "whole.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", "cpu", "stored", place / "tokenizer")
    assert loaded.name == "m" and len(loaded.sha256) == 64 and loaded.unet.dtype == torch.float16
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "m.ckpt")
    convert(tmp_path / "m.ckpt", tmp_path / "from-ckpt.safetensors")
    assert same(tensors, tmp_path / "from-ckpt.safetensors")


def test_folders_with_bin_and_sharded_weights(place: Path, tmp_path: Path) -> None:
    convert(place / "sdxl", tmp_path / "folder")
    unet, text = tmp_path / "folder" / "unet", tmp_path / "folder" / "text_encoder"
    torch.save(load_tensors(text / "model.safetensors"), text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    whole = load_tensors(unet / "diffusion_pytorch_model.safetensors")
    places = {name: f"diffusion_pytorch_model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(whole)}
    for file in set(places.values()):
        save_tensors(unet / file, {name: whole[name] for name in whole if places[name] == file}, {"note": "kept"})
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(place / "sdxl.safetensors", tmp_path / "again.safetensors")
    a, b = load_model(tmp_path / "folder", "cpu", "stored"), load_model(place / "sdxl", "cpu", "stored")
    for part, module in a.components().items():
        assert same(dict(module.state_dict()), dict(b.components()[part].state_dict())), part


def test_fp8_there_and_back(place: Path, tmp_path: Path) -> None:
    single = place / "sdxl.safetensors"
    convert(single, tmp_path / "8.safetensors", ConvertSettings(dtype="fp8_e4m3fn"))
    small, before = load_tensors(tmp_path / "8.safetensors"), load_tensors(single)
    kinds = {key: tensor.dtype for key, tensor in small.items()}
    assert kinds["model.diffusion_model.middle_block.1.proj_in.weight"] == torch.float8_e4m3fn
    assert kinds["model.diffusion_model.middle_block.1.proj_in.bias"] == torch.float16
    assert kinds["first_stage_model.encoder.conv_in.weight"] == torch.float16 and kinds[IDS["sdxl"]] == torch.int64
    for key, tensor in small.items():
        assert torch.equal(tensor.float(), before[key].to(kinds[key]).float())
    loaded = load_model(tmp_path / "8.safetensors", "cpu", "stored", place / "tokenizer")
    assert loaded.unet.dtype == torch.float16
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(loaded.unet.mid_block.attentions[0].proj_in.weight.float(), small[key].float())
    convert(tmp_path / "8.safetensors", tmp_path / "8", ConvertSettings(tokenizer=place / "tokenizer"))
    convert(tmp_path / "8", tmp_path / "again.safetensors")
    assert same(tmp_path / "8.safetensors", tmp_path / "again.safetensors")
    save_tensors(tmp_path / "big.safetensors", before | {key: before[key] + 600}, read_header(single).metadata)
    with pytest.raises(UserError, match="middle_block.1.proj_in.weight of big.safetensors is too large for F8_E4M3"):
        convert(tmp_path / "big.safetensors", tmp_path / "x.safetensors", ConvertSettings(dtype="fp8_e4m3fn"))
    assert not (tmp_path / "x.safetensors").exists()


def test_ema_copies(place: Path, tmp_path: Path) -> None:
    single = place / "sd15.safetensors"
    tensors, metadata = load_tensors(single), read_header(single).metadata
    ema = {"model_ema.diffusion_modelout2weight": torch.ones(3), "model_ema.decay": torch.tensor(0.999)}
    save_tensors(tmp_path / "ema.safetensors", tensors | ema, metadata)
    convert(tmp_path / "ema.safetensors", tmp_path / "kept.safetensors")
    assert same(tensors | ema, tmp_path / "kept.safetensors")
    done = convert(tmp_path / "ema.safetensors", tmp_path / "pruned.safetensors", ConvertSettings(prune_ema=True))
    assert done.counts["pruned"] == 2 and same(tensors, tmp_path / "pruned.safetensors")
    with pytest.warns(DodgeburnWarning, match="--prune-ema has no effect"):
        convert(single, tmp_path / "none.safetensors", ConvertSettings(prune_ema=True))


@pytest.mark.parametrize(
    "form", ["checkpoint", "ldm", "diffusers file", "diffusers folder", "diffusers model", "pickle"]
)
def test_vae_replaced(form: str, place: Path, tmp_path: Path) -> None:
    single = place / "sdxl.safetensors"
    tensors, metadata = load_tensors(single), read_header(single).metadata
    other = {k: v + 1 if k.startswith("first_stage_model.") else v for k, v in tensors.items()}
    save_tensors(tmp_path / "other.safetensors", other, metadata)
    vae: Path = tmp_path / "other.safetensors"
    bare = {k.removeprefix("first_stage_model."): v for k, v in other.items() if k.startswith("first_stage_model.")}
    if form == "ldm":
        vae = tmp_path / "vae.safetensors"
        save_tensors(vae, bare | {"loss.logvar": torch.zeros(1)}, {})
    elif form == "pickle":
        vae = tmp_path / "vae.pt"
        torch.save({"state_dict": bare}, vae)
    elif form.startswith("diffusers"):
        convert(tmp_path / "other.safetensors", tmp_path / "o", ConvertSettings(tokenizer=place / "tokenizer"))
        vae = tmp_path / "o" / "vae"
        vae = vae / "diffusion_pytorch_model.safetensors" if form == "diffusers file" else vae
        vae = vae.parent if form == "diffusers model" else vae
    wanted = {k: other[k] if k.startswith("first_stage_model.") else v for k, v in tensors.items()}
    done = convert(single, tmp_path / "new.safetensors", ConvertSettings(vae=vae))
    assert same(wanted, tmp_path / "new.safetensors") and list(load_tensors(tmp_path / "new.safetensors")) == list(
        tensors
    )
    assert done.counts["vae"] == len(bare)
    convert(place / "sdxl", tmp_path / "folder", ConvertSettings(vae=vae))
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(wanted, tmp_path / "again.safetensors")


def test_vaes_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    single = place / "sdxl.safetensors"
    tensors = load_tensors(single)
    key = "first_stage_model.encoder.conv_in.weight"
    cases: list[tuple[Callable[[], dict[str, torch.Tensor]], str]] = [
        (lambda: tensors | {key: torch.zeros(9, 3, 3, 3)}, "VAE of another size"),
        (lambda: {k: v for k, v in tensors.items() if k != key}, "it lacks encoder.conv_in.weight"),
        (lambda: {"a": torch.zeros(1)}, "holds no VAE"),
    ]
    for make, message in cases:
        save_tensors(tmp_path / "v.safetensors", make(), {})
        with pytest.raises(UserError, match=message):
            convert(single, tmp_path / "x.safetensors", ConvertSettings(vae=tmp_path / "v.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_position_ids_are_repaired_on_request(layout: str, place: Path, tmp_path: Path) -> None:
    single = place / f"{layout}.safetensors"
    tensors, metadata = load_tensors(single), read_header(single).metadata
    broken = tensors | {IDS[layout]: (tensors[IDS[layout]].float() * 0.999).half()}
    save_tensors(tmp_path / "broken.safetensors", broken, metadata)
    with pytest.warns(DodgeburnWarning, match="spoils prompts: add --repair-position-ids"):
        convert(tmp_path / "broken.safetensors", tmp_path / "still.safetensors")
    assert same(broken, tmp_path / "still.safetensors"), "said, not changed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fix = ConvertSettings(repair_position_ids=True, tokenizer=place / "tokenizer")
        convert(tmp_path / "broken.safetensors", tmp_path / "fixed.safetensors", fix)
        convert(tmp_path / "broken.safetensors", tmp_path / "folder", fix)
        convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(tensors, tmp_path / "fixed.safetensors") and same(tensors, tmp_path / "again.safetensors")
    with pytest.warns(DodgeburnWarning, match="--repair-position-ids has no effect"):
        convert(single, tmp_path / "sound.safetensors", ConvertSettings(repair_position_ids=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inpainting_models_convert_and_are_named(layout: str, place: Path, tmp_path: Path) -> None:
    single = place / f"{layout}.safetensors"
    tensors, metadata = load_tensors(single), read_header(single).metadata
    key = "model.diffusion_model.input_blocks.0.0.weight"
    nine = torch.cat([tensors[key], torch.zeros(tensors[key].shape[0], 5, 3, 3).half()], dim=1)
    save_tensors(tmp_path / "inpaint.safetensors", tensors | {key: nine}, metadata)
    with pytest.raises(UserError, match="inpaint.safetensors is an inpainting model: its U-Net takes 9 input channels"):
        load_model(tmp_path / "inpaint.safetensors", "cpu", tokenizer=place / "tokenizer")
    convert(tmp_path / "inpaint.safetensors", tmp_path / "folder", ConvertSettings(tokenizer=place / "tokenizer"))
    assert "InpaintPipeline" in json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"]
    with pytest.raises(UserError, match="inpainting model"):
        load_model(tmp_path / "folder", "cpu")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(tmp_path / "inpaint.safetensors", tmp_path / "again.safetensors")


def test_the_pocket_converts_exactly_and_its_modules_have_names(tmp_path: Path) -> None:
    from dodgeburn.checkpoint.metadata import configs_of
    from dodgeburn.checkpoint.modules import modules
    from dodgeburn.models.loading import empty_module
    from dodgeburn.pocket.model import weights_path

    convert("pocket", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(weights_path("pocket"), tmp_path / "again.safetensors")
    configs = configs_of(read_header(weights_path("pocket")).metadata)
    assert configs is not None
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in empty_module(part, configs[part]).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                tail = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
                assert f"{part}.{tail}" in modules("sdxl"), name


def test_files_of_other_kinds_are_only_rewritten(place: Path, tmp_path: Path) -> None:
    torch.save({"encoder.conv_in.weight": torch.ones(2, 2)}, tmp_path / "vae.pt")
    done = convert(tmp_path / "vae.pt", tmp_path / "vae.safetensors")
    assert done.layout is None and load_tensors(tmp_path / "vae.safetensors")["encoder.conv_in.weight"].sum() == 4
    with pytest.raises(UserError, match="a VAE alone"):
        convert(tmp_path / "vae.pt", tmp_path / "folder")
    with pytest.raises(UserError, match="fp8 and --vae need"):
        convert(tmp_path / "vae.pt", tmp_path / "x.safetensors", ConvertSettings(dtype="fp8_e4m3fn"))


def test_the_verb_on_hostile_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": Evil()}}, tmp_path / "evil.ckpt")
    assert main(["convert", str(tmp_path / "evil.ckpt"), "-o", str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "could run code" in error and not (tmp_path / "ran").exists()
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert main(["convert", str(tmp_path / "m.safetensors.index.json"), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "plain file names" in capsys.readouterr().err
    single = str(place / "sdxl.safetensors")
    assert main(["convert", single, "-o", single]) == 2 and "also an input" in capsys.readouterr().err
    assert main(["convert", single, "-o", str(place / "sd15")]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["convert", single, "-o", str(tmp_path / "y.safetensors"), "--lora", "peft"]) == 2
    out = tmp_path / "fine.safetensors"
    assert main(["convert", single, "-o", str(out), "--dtype", "fp16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["layout"] == "sdxl" and found["counts"]["tensors"] == len(load_tensors(out))
    assert {i.dtype for i in read_header(out).tensors.values()} == {"F16", "I64"}
    assert sha256_tensors(out) != sha256_tensors(single)
    assert not list(tmp_path.glob(".dodgeburn*"))


def test_values_that_are_no_numbers_are_kept_and_said(place: Path, tmp_path: Path) -> None:
    tensors = load_tensors(place / "sdxl.safetensors")
    tensors["model.diffusion_model.input_blocks.0.0.bias"][0] = float("nan")
    save_tensors(tmp_path / "bad.safetensors", tensors, read_header(place / "sdxl.safetensors").metadata)
    with pytest.warns(DodgeburnWarning, match="1 tensor has NaN or infinite values.*first conv_in.bias") as said:
        convert(tmp_path / "bad.safetensors", tmp_path / "bad", ConvertSettings(tokenizer=place / "tokenizer"))
    assert len([w for w in said if "NaN" in str(w.message)]) == 1
    with pytest.warns(DodgeburnWarning, match="first model.diffusion_model.input_blocks.0.0.bias"):
        convert(tmp_path / "bad", tmp_path / "again.safetensors")
    again = load_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k].nan_to_num(7), tensors[k].nan_to_num(7)) for k in tensors)


@pytest.mark.parametrize("ending", [".safetensor", ".sft", ".ckpt"])
def test_a_mistyped_ending_makes_no_folder(ending: str, place: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(place / "sdxl.safetensors"), "-o", str(tmp_path / f"out{ending}")]) == 2
    assert "out.safetensors" in capsys.readouterr().err and not list(tmp_path.iterdir())
