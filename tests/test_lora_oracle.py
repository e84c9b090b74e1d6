"""Adapters against diffusers and PEFT: what they load and fuse is what we bake, what they save we read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from dodgeburn.checkpoint.lora_file import open_adapter
from dodgeburn.checkpoint.lora_write import rewrite_adapter
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, save_tensors
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_diffusers_folder, save_single_file
from tests.tiny import tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.oracle
KINDS = ("sdxl", "sd15")
PIPES: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("oracle")
    for kind in KINDS:
        model = tiny_model(kind)
        save_single_file(model, root / f"{kind}.safetensors")
        save_diffusers_folder(model, root / kind)
        model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
    return root


def pipeline(place: Path, kind: str) -> Any:
    return PIPES[kind].from_pretrained(str(place / kind), local_files_only=True)


def random_adapter(pipe: Any, kind: str, mixed: bool = True, skip: str = "none") -> dict[str, torch.Tensor]:
    """A kohya LoRA for U-Net and text encoders, `mixed`: with another rank and alpha for every third module."""
    generator = torch.Generator().manual_seed(3)
    out: dict[str, torch.Tensor] = {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if kind == "sdxl" else "lora_te"}
    prefixes |= {"text_encoder_2": "lora_te2"} if kind == "sdxl" else {}
    count = 0
    for part, prefix in prefixes.items():
        for name, module in getattr(pipe, part).named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or name == "text_projection" or skip in name:
                continue
            tail = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
            rank, alpha = ((2, 1.0), (2, 1.0), (3, 2.0))[count % 3 if mixed else 0]
            count += 1
            shape = module.weight.shape
            key = f"{prefix}_{tail.replace('.', '_')}"
            out[f"{key}.lora_down.weight"] = 0.1 * torch.randn(rank, *shape[1:], generator=generator)
            ones = [1] * (len(shape) - 2)
            out[f"{key}.lora_up.weight"] = 0.1 * torch.randn(shape[0], rank, *ones, generator=generator)
            out[f"{key}.alpha"] = torch.tensor(alpha)
    return out


def compare(pipe: Any, baked: Path, place: Path) -> None:
    ours = load_model(baked, "cpu", tokenizer=place / "tokenizer")
    for part, module in ours.components().items():
        found = getattr(pipe, part).state_dict()
        wanted = module.state_dict()
        assert set(found) == set(wanted), part
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, atol=2e-6, rtol=1e-5), f"{part} {key}"


@pytest.mark.parametrize("spelling", ["kohya", "sgm", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_fuses_what_we_bake(kind: str, spelling: str, place: Path, tmp_path: Path) -> None:
    if (kind, spelling) == ("sd15", "sgm"):
        pytest.skip("diffusers reads sgm block names of SDXL only")
    pipe = pipeline(place, kind)
    # diffusers 0.42.1 gives kohya's alphas that differ between modules to none of them (it looks for
    # `…to_q_lora.down.weight` among module names), and does not know `lora_unet_add_embedding_…`.
    tensors = random_adapter(pipe, kind, spelling == "peft", "add_embedding" if spelling == "kohya" else "none")
    save_file(tensors, tmp_path / "start.safetensors")
    with open_adapter(tmp_path / "start.safetensors") as adapter:
        rewrite_adapter(adapter, tmp_path / "lora.safetensors", spelling)
    result = bake(place / f"{kind}.safetensors", [(tmp_path / "lora.safetensors", 0.7)], tmp_path / "out.safetensors")
    assert result.recipe.added[0].unmatched == 0
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    compare(pipe, tmp_path / "out.safetensors", place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha_in", ["metadata", "folder"])
def test_what_peft_and_diffusers_save_we_read(kind: str, alpha_in: str, place: Path, tmp_path: Path) -> None:
    pipe = pipeline(place, kind)
    targets = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    lora = tmp_path / "lora"
    if alpha_in == "folder":
        model = peft.get_peft_model(pipe.unet, config)
        model.save_pretrained(str(lora))
        pipe.unet = model.merge_and_unload()
    else:
        pipe.unet.add_adapter(config)
        layers = peft.utils.get_peft_model_state_dict(pipe.unet)
        metadata = pipe.unet.peft_config["default"].to_dict()
        PIPES[kind].save_lora_weights(str(lora), unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    with open_adapter(lora) as adapter:
        assert {m.scale for m in adapter.modules.values()} == {1.5} and not adapter.unmatched
    bake(place / f"{kind}.safetensors", [(lora, 1.0)], tmp_path / "out.safetensors")
    compare(pipe, tmp_path / "out.safetensors", place)


def test_our_metadata_are_a_peft_config(place: Path, tmp_path: Path) -> None:
    pipe = pipeline(place, "sdxl")
    save_file(random_adapter(pipe, "sdxl"), tmp_path / "start.safetensors")
    with open_adapter(tmp_path / "start.safetensors") as adapter:
        rewrite_adapter(adapter, tmp_path / "lora.safetensors", "peft")
        said = json.loads(open_metadata(tmp_path / "lora.safetensors")["lora_adapter_metadata"])
    unet = {key.removeprefix("unet."): value for key, value in said.items() if key.startswith("unet.")}
    config = peft.LoraConfig(**unet)
    assert (config.r, config.lora_alpha) == (2, 1) and set(config.rank_pattern.values()) == {3}


def open_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return dict(file.metadata())


def test_diffusers_fuses_an_extracted_lora(place: Path, tmp_path: Path) -> None:
    """Ranks by energy differ between modules; one alpha for all of them keeps diffusers right."""
    tensors = load_tensors(place / "sdxl.safetensors")
    generator = torch.Generator().manual_seed(1)
    tuned = {
        key: value + 0.01 * torch.randn(value.shape, generator=generator) if key.endswith("proj_in.weight") else value
        for key, value in tensors.items()
    }
    save_tensors(tmp_path / "tuned.safetensors", tuned, read_header(place / "sdxl.safetensors").metadata)
    lora = tmp_path / "lora.safetensors"
    report = extract(tmp_path / "tuned.safetensors", place / "sdxl.safetensors", lora, "lora", energy=0.9, dtype="fp32")
    assert len(set(report.ranks.values())) > 1
    bake(place / "sdxl.safetensors", [(lora, 1.0)], tmp_path / "out.safetensors")
    pipe = pipeline(place, "sdxl")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    compare(pipe, tmp_path / "out.safetensors", place)
