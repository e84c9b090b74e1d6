"""Our adapter files in diffusers and PEFT: the same U-Net and text encoder outputs as our own hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from dodgeburn.checkpoint.tensorfile import load_tensors, read_header
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, attached
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.models.saving import save_diffusers_folder
from dodgeburn.slide.compose import concatenated
from tests.adapters import random_adapter
from tests.tiny import tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
pytestmark = [pytest.mark.oracle, pytest.mark.adapters]
PIPES: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
KINDS = ("sdxl", "sd15")
SCALE = -1.3


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {"sdxl": tiny_model("sdxl"), "sd15": tiny_model("sd15"), "pocket": load_model("pocket", "cpu")}


@pytest.fixture(scope="module")
def folders(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for kind, model in models.items():
        save_diffusers_folder(model, root / kind)
    return {kind: root / kind for kind in models}


def pipeline(folder: Path, model: Model) -> Any:
    return PIPES[model.layout.name].from_pretrained(str(folder), local_files_only=True)


def outputs(parts: dict[str, Any], model: Model) -> dict[str, Tensor]:
    """What U-Net and text encoders say of fixed inputs, in double precision: hidden states and predictions."""
    generator = torch.Generator().manual_seed(0)
    config = model.unet.config
    x = torch.randn(2, 4, 8, 8, generator=generator).double()
    text = torch.randn(2, 77, config["cross_attention_dim"], generator=generator).double()
    added = None
    if model.has_added_conditions:
        pooled = model.text_encoders[1].config.projection_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=generator).double(), "time_ids": torch.ones(2, 6)}
    ids = torch.randint(2, 100, (2, 77), generator=generator)
    with torch.no_grad():
        out = {"unet": parts["unet"](x, 400, text, added_cond_kwargs=added).sample}
        for name in ("text_encoder", "text_encoder_2"):
            if parts.get(name) is not None:
                out[name] = parts[name](ids, output_hidden_states=True).hidden_states[-1]
    return out


def ours(model: Model, adapter: Adapter, scale: float) -> dict[str, Tensor]:
    components = {name: part.double() for name, part in model.components().items()}
    try:
        with attached(components, [adapter]) as at:
            at.set(scale)
            return outputs(components, model)
    finally:
        for part in components.values():
            part.float()


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        size = float(tensor.abs().max())
        assert float((found[name] - tensor).abs().max()) <= 1e-5 * max(1.0, size), name
        assert float((plain[name] - tensor).abs().max()) > 1e-2 * size, f"{name} is not changed at all"


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [("sdxl", "kohya"), ("sdxl", "sgm"), ("sdxl", "peft"), ("sd15", "kohya"), ("sd15", "peft"), ("pocket", "kohya")],
)  # sgm names are SDXL's: diffusers reads no others
def test_diffusers_loads_what_we_save(
    kind: str, spelling: str, models: dict[str, Model], folders: dict[str, Path], tmp_path: Path
) -> None:
    model = models[kind]
    save_adapter(random_adapter(model, 1, alpha=1.5), tmp_path / "a.safetensors", model.layout.name, spelling)
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    wanted, plain = ours(model, adapter, SCALE), ours(model, adapter, 0.0)
    pipe = pipeline(folders[kind], model)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="smile")
    pipe.set_adapters("smile", SCALE)
    parts = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    found = outputs({name: part.double() for name, part in parts.items() if part is not None}, model)
    agree(found, wanted, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_a_composition(
    kind: str, models: dict[str, Model], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks differ between modules; one alpha for all keeps diffusers' kohya reader right."""
    model = models[kind]
    parts = [random_adapter(model, 1, "noxattn", rank=3), random_adapter(model, 2, "xattn", alpha=2.5)]
    made = concatenated(parts, [1.5, -0.7])
    assert len({f.rank for f in made.factors().values()}) > 1
    save_adapter(made, tmp_path / "a.safetensors", model.layout.name, dtype="fp32")
    pipe = pipeline(folders[kind], model)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="both")
    names = ("unet", "text_encoder", "text_encoder_2")
    found = outputs({n: getattr(pipe, n).double() for n in names if getattr(pipe, n, None) is not None}, model)
    agree(found, ours(model, made, 1.0), ours(model, made, 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(kind: str, models: dict[str, Model], folders: dict[str, Path], tmp_path: Path) -> None:
    model = models[kind]
    adapter = random_adapter(model, 5, text=False, alpha=3.0)
    save_adapter(adapter, tmp_path / "a.safetensors", model.layout.name, "peft", "fp32")
    said = json.loads(read_header(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    config = peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in said.items()})
    unet = pipeline(folders[kind], model).unet
    peft.inject_adapter_in_model(config, unet)
    tensors = {key.removeprefix("unet."): value for key, value in load_tensors(tmp_path / "a.safetensors").items()}
    result = peft.set_peft_model_state_dict(unet, tensors)
    assert not result.unexpected_keys
    agree({"unet": outputs({"unet": unet.double()}, model)["unet"]}, {"unet": ours(model, adapter, 1.0)["unet"]},
          {"unet": ours(model, adapter, 0.0)["unet"]})  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_diffusers_saves(
    kind: str, models: dict[str, Model], folders: dict[str, Path], tmp_path: Path
) -> None:
    model = models[kind]
    pipe = pipeline(folders[kind], model)
    torch.manual_seed(2)
    pipe.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_v", "conv1", "ff.net.0.proj"],
                                          init_lora_weights=False))  # fmt: skip
    PIPES[model.layout.name].save_lora_weights(
        str(tmp_path), unet_lora_layers=peft.utils.get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors", model)
    found = outputs({"unet": pipe.unet.double()}, model)
    agree(found, {"unet": ours(model, adapter, 1.0)["unet"]}, {"unet": ours(model, adapter, 0.0)["unet"]})
