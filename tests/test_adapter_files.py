"""Adapters between files and memory: every spelling, exactly, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dodgeburn.checkpoint.lora_file import open_adapter
from dodgeburn.checkpoint.lora_keys import parse_key
from dodgeburn.checkpoint.lora_write import rewrite_adapter
from dodgeburn.checkpoint.slider_card import SLIDER, Certificate, SliderCard, Training, card_lines, slider_of
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, sha256_file, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.bake import bake
from dodgeburn.models.adapter_file import fitted, load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from tests.adapters import change, random_adapter
from tests.lora_files import kohya_name, random_lora
from tests.tiny import tiny_model

pytestmark = pytest.mark.adapters
KINDS = ("sdxl", "sd15")
CARD = SliderCard(
    name="smile", method="text", target="a portrait", positive="smiling", negative="frowning", attribute="smile",
    unit="one natural standard deviation of smile, read exactly", sigma=0.29, safe_range=(-3, 3), start=700,
    curve=[(-1, -1.02), (0, 0), (1, 0.98)], base="pocket", base_sha256="ab" * 32,
    certificate=Certificate(
        reader="judge", n=64, seeds=[5, 6], prompts_sha256="cd" * 32, monotone=0.99, spearman=0.998, selectivity=4.5,
        leakage={"age": 0.1, "zoom": -0.2}, intervals={"monotone": (0.97, 1.0), "leakage.age": (0.05, 0.15)},
    ),
    training=Training(
        settings={"name": "smile", "rank": 4, "lr": 2e-4, "alpha": None}, forwards=2800, seconds=18.5, seed=3
    ),
)  # fmt: skip


def same(one: Adapter, two: Adapter) -> None:
    assert one.modules_changed == two.modules_changed or set(one.modules_changed) == set(two.modules_changed)
    ours, theirs = one.factors(), two.factors()
    for module, f in ours.items():
        assert torch.equal(f.down, theirs[module].down) and torch.equal(f.up, theirs[module].up), module
        assert f.alpha == theirs[module].alpha, module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["kohya", "sgm", "peft"])
def test_what_is_saved_is_loaded_bit_for_bit(kind: str, spelling: str, tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model(kind), alpha=1.5)
    path = tmp_path / "smile.safetensors"
    save_adapter(adapter, path, kind, spelling, "fp32", CARD, {"more": "said"})
    again = load_adapter(path)
    same(adapter, again)
    assert again.name == "smile" and again.origin is not None
    assert again.origin.card == CARD and again.origin.sha256 == sha256_file(path)
    assert again.origin.sha256_tensors == sha256_tensors(path) and again.origin.architecture == kind
    metadata = read_header(path).metadata
    assert metadata["more"] == "said" and metadata["sshs_model_hash"] == sha256_tensors(path)
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "1.5"
    first = path.read_bytes()
    save_adapter(again, path, kind, spelling, "fp32", CARD, {"more": "said"})
    assert path.read_bytes() == first


def test_keys_are_kohyas(tmp_path: Path) -> None:
    """Spelled out by hand: what A1111, ComfyUI and diffusers look for."""
    save_adapter(random_adapter(tiny_model("sdxl")), tmp_path / "a.safetensors", "sdxl")
    found = load_tensors(tmp_path / "a.safetensors")
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert found[f"{stem}.lora_down.weight"].shape == (2, 16) and found[f"{stem}.lora_up.weight"].shape == (16, 2)
    assert found[f"{stem}.alpha"].item() == 1 and found[f"{stem}.lora_up.weight"].dtype == torch.float16
    assert found["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (2, 8, 3, 3)
    assert found["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (8, 2, 1, 1)
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc2.lora_up.weight" in found
    save_adapter(random_adapter(tiny_model("sdxl")), tmp_path / "s.safetensors", "sdxl", "sgm")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in load_tensors(
        tmp_path / "s.safetensors"
    )


def test_fp16_rounds_once(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model())
    save_adapter(adapter, tmp_path / "a.safetensors", "sdxl", dtype="fp16")
    for module, f in load_adapter(tmp_path / "a.safetensors").factors().items():
        assert torch.equal(f.up, adapter.up(module).detach().half().float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["kohya", "sgm", "peft", "mixed", "pickle", "folder"])
def test_every_spelling_is_read(kind: str, spelling: str, tmp_path: Path) -> None:
    tensors = random_lora(kind, rank=3, alpha=1.5)
    save_file(tensors, tmp_path / "k.safetensors")
    wanted = load_adapter(tmp_path / "k.safetensors")
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert torch.equal(wanted.down(module), tensors[f"{kohya_name(module, kind)}.lora_down.weight"])
    assert wanted.factors()[module].alpha == 1.5
    path = tmp_path / "other.safetensors"
    if spelling == "pickle":  # as the Concept Sliders trainer writes
        path = path.with_suffix(".pt")
        torch.save(tensors, path)
    elif spelling == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        with open_adapter(tmp_path / "k.safetensors") as file:
            rewrite_adapter(file, path / "adapter_model.safetensors", "peft")
        unet = load_tensors(path / "adapter_model.safetensors")
        kept = {f"base_model.model.{k[5:]}": v for k, v in unet.items() if k.startswith("unet.")}
        save_file(kept, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 1.5}))
        wanted = Adapter({m: f for m, f in wanted.factors().items() if m.startswith("unet.")})
    else:
        with open_adapter(tmp_path / "k.safetensors") as file:
            rewrite_adapter(file, path, "sgm" if spelling == "mixed" else spelling)
        assert read_header(path).metadata["sshs_model_hash"] == sha256_tensors(path)
        if spelling == "mixed":
            made = {k: v for k, v in load_tensors(path).items() if "input_blocks" in k}
            there = {parse_key(key).module for key in made}  # type: ignore[union-attr]
            made |= {k: v for k, v in tensors.items() if parse_key(k).module not in there}  # type: ignore[union-attr]
            assert len(made) == len(tensors) and len(there) > 10
            save_file(made, path)
    same(wanted, load_adapter(path))


def test_a_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    save_file(random_lora("sd15", rank=3, alpha=None), tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").alphas.values()) == {3.0}


def test_a_core_tensor_is_multiplied_in(tmp_path: Path) -> None:
    """LoCon in Tucker form: the product of the factors is what bake computes of the three."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=generator) for s in ((2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    wanted = torch.zeros(8, 8, 3, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            outer = up[:, i, 0, 0, None, None, None] * down[j, :, 0, 0, None, None]
            wanted += (outer * mid[i, j]).double() / 2
    found = change(load_adapter(tmp_path / "a.safetensors"), "unet.down_blocks.0.resnets.0.conv1")
    assert torch.allclose(found, wanted.flatten(1), atol=1e-6)


@pytest.mark.parametrize(
    "tensors",
    [
        {".hada_w1_a": (8, 2), ".hada_w1_b": (2, 8), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 8)},
        {".lokr_w1": (2, 2), ".lokr_w2": (4, 4)},
        {".diff": (8, 8)},
    ],
)
def test_what_is_no_product_of_two_is_sent_to_bake(tensors: dict[str, Any], tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({name + role: torch.ones(shape) for role, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="dodgeburn bake MODEL a.safetensors"):
        load_adapter(tmp_path / "a.safetensors")


def test_nan_and_overflow_are_refused(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model())
    module = adapter.modules_changed[0]
    with torch.no_grad():
        adapter.up(module)[0] = 1e6
    with pytest.raises(UserError, match="too large for F16"):
        save_adapter(adapter, tmp_path / "a.safetensors", "sdxl")
    with torch.no_grad():
        adapter.up(module)[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        save_adapter(adapter, tmp_path / "a.safetensors", "sdxl", dtype="fp32")
    assert not list(tmp_path.iterdir())
    save_file({"lora_unet_conv_in.lora_down.weight": torch.full((1, 4, 3, 3), torch.nan),
               "lora_unet_conv_in.lora_up.weight": torch.ones(8, 1, 1, 1)}, tmp_path / "n.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="NaN or infinite values in down of unet.conv_in"):
        load_adapter(tmp_path / "n.safetensors")


def test_another_architecture_another_width_and_no_match_are_errors(tmp_path: Path) -> None:
    sdxl, sd15 = tiny_model("sdxl"), tiny_model("sd15")
    save_adapter(random_adapter(sdxl), tmp_path / "a.safetensors", "sdxl")
    with pytest.raises(UserError, match="a.safetensors is for SDXL, but tiny-sd15 is Stable Diffusion 1.5"):
        load_adapter(tmp_path / "a.safetensors", sd15)
    wide = {m: Factors(torch.ones(1, 99), f.up[:, :1], 1.0) for m, f in random_adapter(sdxl).factors().items()}
    with pytest.raises(UserError, match="from 99 to 8 values"):
        fitted(Adapter(wide, "wide"), sdxl)
    alien = {"unet.up_blocks.3.resnets.0.conv1": Factors(torch.ones(1, 8, 3, 3), torch.ones(8, 1, 1, 1), 1.0)}
    with pytest.raises(UserError, match="none of its 1 modules is in the model"):
        fitted(Adapter(alien, "alien"), sdxl)
    some = random_adapter(sdxl).factors() | alien
    with pytest.warns(DodgeburnWarning, match=f"1 of {len(some)} modules, left out"):
        assert len(fitted(Adapter(some, "some"), sdxl).modules_changed) == len(some) - 1


def test_keys_of_no_module_are_counted(tmp_path: Path) -> None:
    tensors = random_lora("sd15", only="mid_block") | {"lora_unet_joint_blocks_0.lora_up.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(DodgeburnWarning, match=r"a.safetensors: 1 of \d+ keys are no module's, first lora_unet_joint"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_baked_model_is_the_adapted_one(tmp_path: Path) -> None:
    """Two ways to one model: the file baked in, and the hooks; also for matrices where the model has convolutions."""
    from dodgeburn.models.adapters import attached

    model = tiny_model("sd15")
    save_single_file(model, tmp_path / "m.safetensors")
    model.tokenizers[0].save_pretrained(str(tmp_path / "tokenizer"))
    adapter = random_adapter(model).factors()
    proj = "unet.mid_block.attentions.0.proj_in"  # a 1x1 convolution in SD1.5
    adapter[proj] = Factors(torch.ones(1, 16) / 16, torch.ones(16, 1), 1.0)
    save_adapter(Adapter(adapter), tmp_path / "a.safetensors", "sd15", dtype="fp32")
    bake(tmp_path / "m.safetensors", [(tmp_path / "a.safetensors", 0.7)], tmp_path / "b.safetensors")
    baked = load_model(tmp_path / "b.safetensors", "cpu", tokenizer=tmp_path / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 16, generator=generator)
    with torch.no_grad(), attached(model.components(), [load_adapter(tmp_path / "a.safetensors", model)]) as at:
        plain = model.unet(x, 500, text).sample
        at.set(0.7)
        ours = model.unet(x, 500, text).sample
        theirs = baked.unet(x, 500, text).sample
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)


# -------------------- the card


def test_the_card_is_read_back_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slider_of(CARD.as_metadata()) == CARD
    save_adapter(random_adapter(tiny_model()), tmp_path / "smile.safetensors", "sdxl", card=CARD)
    assert main(["inspect", str(tmp_path / "smile.safetensors"), "--json"]) == 0
    out = capsys.readouterr().out
    for line in (
        "1.0 = one natural standard deviation of smile, read exactly (0.29)", "safe range: -3 to 3",
        "start: from time step 700 on", "-1: -1.02, 0: +0.00, 1: +0.98",
        "certificate (judge, 64 sweeps, 2 seeds): monotone 99.0% [97.0%, 100.0%], Spearman 0.998, selectivity 4.50",
        "leakage at one deviation: zoom 0.20, age 0.10",
        "trained: 2,800 U-Net samples, 18.5 s, seed 3, rank 4, lr 0.0002\n",
        "made for pocket",
    ):  # fmt: skip
        assert line in out
    found = json.loads(out.splitlines()[-1])
    assert found["slider"]["certificate"]["selectivity"] == 4.5
    metadata = read_header(tmp_path / "smile.safetensors").metadata
    assert metadata["modelspec.title"] == "smile" and "off above time step 700" in metadata["modelspec.usage_hint"]


def test_fields_of_a_later_version_are_kept() -> None:
    said = {"version": 2, "name": "x", "new": [1], "certificate": {"reader": "r", "n": 1, "seeds": [1],
            "prompts_sha256": "", "newer": 2}}  # fmt: skip
    card = slider_of({SLIDER: json.dumps(said)})
    assert card is not None and json.loads(card.as_metadata()[SLIDER]) == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "no JSON object"),
        ("{", "no JSON object"),
        ("{}", "name"),
        ('{"name": "x", "safe_range": [2, 1]}', "safe range"),
        ('{"name": "x", "start": 2000}', "start 2000"),
        ('{"name": "x", "curve": [[1, "a"]]}', "curve.0.1"),
        ('{"name": "x", "sigma": NaN}', "sigma"),
    ],
)
def test_a_damaged_card_is_said_and_the_file_still_read(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        slider_of({SLIDER: text})
    save_adapter(random_adapter(tiny_model()), tmp_path / "a.safetensors", "sdxl", metadata={SLIDER: text})
    with pytest.warns(DodgeburnWarning, match="applied as a plain LoRA"):
        origin = load_adapter(tmp_path / "a.safetensors").origin
    assert origin is not None and origin.card is None
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0


def test_a_short_card_says_that_nothing_is_calibrated() -> None:
    assert card_lines(SliderCard(name="x")) == ["slider: x", "  1.0 = not calibrated"]
