"""Adapter files: every spelling read, written back exactly, the change by hand-made formulas, hostile files refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import kohya_name, module_shapes, random_lora
from safetensors.torch import save_file

from dodgeburn.checkpoint.lora_delta import bias_delta, weight_delta
from dodgeburn.checkpoint.lora_file import Adapter, open_adapter
from dodgeburn.checkpoint.lora_keys import parse_key, write_key
from dodgeburn.checkpoint.lora_write import rewrite_adapter
from dodgeburn.checkpoint.modules import is_module, modules, tensor_moves
from dodgeburn.checkpoint.tensorfile import load_tensors, save_tensors, sha256_file, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError

KINDS = ("sdxl", "sd15")
Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
# Names seen in files of sd-scripts, diffusers, PEFT and the Concept Sliders code, with what they mean.
SEEN = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (Q, "down", "kohya"),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight": (Q, "up", "sgm"),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha": (Q, "alpha", "sgm"),
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight": (Q, "up", "sgm"),
    f"{Q}.lora_A.weight": (Q, "down", "peft"),
    f"{Q}.lora_B.default.weight": (Q, "up", "peft"),
    f"base_model.model.{Q.removeprefix('unet.')}.lora_A.weight": (Q, "down", "peft"),
    f"{Q}.lora.down.weight": (Q, "down", "diffusers"),
    f"{Q.replace('.to_q', '.processor.to_q')}_lora.up.weight": (Q, "up", "diffusers"),
    f"{Q.replace('.to_q', '.processor.to_out')}_lora.up.weight": (Q.replace("to_q", "to_out.0"), "up", "diffusers"),
    f"{Q.removeprefix('unet.')}.lora.up.weight": (Q, "up", "diffusers"),
    "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": ("unet.down_blocks.0.resnets.0.conv1", "down", "sgm"),
    "lora_unet_input_blocks_3_0_op.lora_down.weight": ("unet.down_blocks.0.downsamplers.0.conv", "down", "sgm"),
    "lora_unet_middle_block_1_proj_in.lora_up.weight": ("unet.mid_block.attentions.0.proj_in", "up", "sgm"),
    "lora_unet_output_blocks_0_1_proj_in.lora_up.weight": ("unet.up_blocks.0.attentions.0.proj_in", "up", "sgm"),
    "lora_unet_output_blocks_2_2_conv.lora_up.weight": ("unet.up_blocks.0.upsamplers.0.conv", "up", "sgm"),
    "lora_unet_output_blocks_2_1_conv.lora_up.weight": ("unet.up_blocks.0.upsamplers.0.conv", "up", "sgm"),
    "lora_unet_label_emb_0_0.lora_up.weight": ("unet.add_embedding.linear_1", "up", "sgm"),
    "lora_unet_time_embedding_linear_1.lora_up.weight": ("unet.time_embedding.linear_1", "up", "kohya"),
    "lora_unet_conv_in.hada_w1_a": ("unet.conv_in", "hada_w1_a", "kohya"),
    "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight": (
        "text_encoder.text_model.encoder.layers.11.mlp.fc1", "down", "kohya"),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_mid.weight": (
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj", "mid", "kohya"),
    "lora_te2_text_model_encoder_layers_31_self_attn_q_proj.lokr_w1": (
        "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj", "lokr_w1", "kohya"),
    "lora_te2_text_projection.lora_up.weight": ("text_encoder_2.text_projection", "up", "kohya"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "up", "diffusers"),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2.lora_linear_layer.down.weight": (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2", "down", "diffusers"),
    "text_encoder.encoder.layers.0.mlp.fc2.lora_A.weight": (
        "text_encoder.text_model.encoder.layers.0.mlp.fc2", "down", "peft"),
    f"{Q}.lora_magnitude_vector": (Q, "dora", "peft"),
    "lora_unet_conv_in.dora_scale": ("unet.conv_in", "dora", "kohya"),
}  # fmt: skip


@pytest.mark.parametrize("key", SEEN)
def test_spellings_seen_in_the_wild(key: str) -> None:
    found = parse_key(key)
    assert found is not None and (found.module, found.role, found.spelling) == SEEN[key]


def test_other_keys_are_not_taken_for_a_module() -> None:
    assert parse_key("model.diffusion_model.out.2.weight") is None
    assert parse_key("lora_unet_down_blocks_9_resnets_0_conv1.lora_up.weight").module is None  # type: ignore[union-attr]
    assert parse_key("transformer.single_blocks.0.lora_A.weight").module is None  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_of_the_architecture_has_a_name_and_keys_come_back(kind: str) -> None:
    assert set(module_shapes(kind)) <= modules(kind)
    for module in modules(kind):
        assert f"{module}.weight" in tensor_moves(kind)
        for spelling in ("kohya", "sgm", "peft"):
            found = parse_key(write_key(module, "up", spelling, kind))
            assert found is not None and found.module == module and found.role == "up"
    assert not is_module("vae.encoder.conv_in")


def read(path: Path) -> tuple[dict[str, Any], Adapter]:
    with open_adapter(path) as adapter:
        return {n: (m.kind, m.rank, m.alpha) for n, m in adapter.modules.items()}, adapter


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_between_spellings_are_exact(kind: str, tmp_path: Path) -> None:
    tensors = {k: v.half() if "lora" in k.split(".", 1)[1] else v for k, v in random_lora(kind, 3, 0.7).items()}
    save_tensors(tmp_path / "start.safetensors", tensors, {"ss_output_name": "x"})
    paths = [tmp_path / "start.safetensors"]
    for i, spelling in enumerate(("sgm", "peft", "kohya", "peft", "sgm", "kohya")):
        with open_adapter(paths[-1]) as adapter:
            assert not adapter.unmatched and adapter.metadata["ss_output_name"] == "x"
            assert adapter.architecture == kind
            paths.append(tmp_path / f"{i}.safetensors")
            rewrite_adapter(adapter, paths[-1], spelling)
    back = load_tensors(paths[-1])
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in back)
    assert sha256_file(paths[3]) == sha256_file(paths[-1]), "what we wrote ourselves comes back byte for byte"
    sgm = load_tensors(paths[1])
    assert any(k.startswith("lora_unet_input_blocks_") for k in sgm) and not any("down_blocks" in k for k in sgm)
    assert all(k.startswith(("unet.", "text_encoder")) for k in load_tensors(paths[2]))


def test_mixed_spellings_and_missing_alphas(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
        f"{Q}.lora_A.weight": torch.ones(4, 16), f"{Q}.lora_B.weight": torch.ones(16, 4),
        "lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(1, 32),
        "lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(32, 1),
        "lora_unet_middle_block_1_proj_in.alpha": torch.tensor(3.0, dtype=torch.bfloat16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "mixed.safetensors")
    with open_adapter(tmp_path / "mixed.safetensors") as adapter:
        assert dict(adapter.spellings) == {"kohya": 2, "peft": 2, "sgm": 2}
        assert adapter.missing_alphas() == ["unet.conv_in", Q]
        assert sorted(m.scale for m in adapter.modules.values()) == [1.0, 1.0, 3.0]
        rewrite_adapter(adapter, tmp_path / "out.safetensors")
    out = load_tensors(tmp_path / "out.safetensors")
    assert out["lora_unet_conv_in.alpha"] == 2 and out[kohya_name(Q, "sdxl") + ".alpha"] == 4, "explicit now"


def test_peft_folders_bring_their_alphas(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{name}.lora_{x}.weight": torch.ones(*shape)
        for name in ("mid_block.attentions.0.proj_in", "conv_in")
        for x, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"conv_in": 2}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with open_adapter(tmp_path) as adapter:
        assert {n: m.scale for n, m in adapter.modules.items()} == {
            "unet.mid_block.attentions.0.proj_in": 2.0,
            "unet.conv_in": 0.5,
        }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    with open_adapter(tmp_path / "adapter_model.safetensors") as adapter:
        assert adapter.modules["unet.conv_in"].scale == pytest.approx(1.0)  # 2 / sqrt(4)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match="adapter_config.json cannot be read"), open_adapter(tmp_path):
        pass


def test_sliders_saved_as_pickles(tmp_path: Path) -> None:
    torch.save(random_lora("sd15", only="attn1"), tmp_path / "slider.pt")
    with open_adapter(tmp_path / "slider.pt") as adapter:
        assert len(adapter.modules) == 64 and adapter.architecture == "sd15"
        assert adapter.modules["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].scale == 0.5


# -------------------- what is added, by formulas written out here


def delta_of(tmp_path: Path, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    save_file({f"lora_unet_conv_in.{k}": v.contiguous() for k, v in parts.items()}, tmp_path / "one.safetensors")
    with open_adapter(tmp_path / "one.safetensors") as adapter:
        found = weight_delta(adapter, adapter.modules["unet.conv_in"], shape)
        assert found is not None and found.dtype == torch.float32
        return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_locon_as_two_convolutions(tmp_path: Path) -> None:
    down, up = draw(3, 4, 3, 3), draw(8, 3, 1, 1)
    made = delta_of(
        tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(6.0)}, (8, 4, 3, 3)
    )
    x = draw(1, 4, 7, 7)
    one = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up) * 2
    assert torch.allclose(torch.nn.functional.conv2d(x, made, padding=1), one, atol=1e-4)


def test_tucker_locon_as_three_convolutions(tmp_path: Path) -> None:
    down, mid, up = draw(3, 4, 1, 1), draw(3, 3, 3, 3), draw(8, 3, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    made = delta_of(tmp_path, parts, (8, 4, 3, 3))
    x, conv = draw(1, 4, 7, 7), torch.nn.functional.conv2d
    assert torch.allclose(conv(x, made, padding=1), conv(conv(conv(x, down), mid, padding=1), up), atol=1e-4)


def test_loha_and_lokr_by_loops(tmp_path: Path) -> None:
    a1, b1, a2, b2 = draw(6, 2), draw(2, 36), draw(6, 2, seed=1), draw(2, 36, seed=1)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    made = delta_of(tmp_path, parts, (6, 4, 3, 3))
    assert torch.allclose(made, (((a1 @ b1) * (a2 @ b2)) / 2).reshape(6, 4, 3, 3), atol=1e-6)

    w1, w2 = draw(2, 2), draw(3, 2, 3, 3)
    made = delta_of(tmp_path, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)}, (6, 4, 3, 3))
    for o in range(6):
        for i in range(4):  # two whole factors: no rank, so the alpha has nothing to be divided by
            assert torch.allclose(made[o, i], w1[o // 3, i // 2] * w2[o % 3, i % 2])
    a, b = draw(3, 2), draw(2, 18)
    made = delta_of(tmp_path, {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, (6, 4, 3, 3))
    assert torch.allclose(made[4, 3], 0.5 * w1[1, 1] * (a @ b).reshape(3, 2, 3, 3)[1, 1], atol=1e-6)

    core, a, b = draw(2, 2, 3, 3), draw(2, 3), draw(2, 2, seed=5)
    made = delta_of(tmp_path, {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}, (6, 4, 3, 3))
    wanted = sum(core[i, j] * a[i, 1] * b[j, 1] for i in range(2) for j in range(2))
    assert torch.allclose(made[1, 1], w1[0, 0] * wanted, atol=1e-6)


def test_full_differences_and_biases(tmp_path: Path) -> None:
    weight, bias = draw(8, 4, 3, 3), draw(8)
    save_file({"lora_unet_conv_in.diff": weight, "lora_unet_conv_in.diff_b": bias}, tmp_path / "full.safetensors")
    with open_adapter(tmp_path / "full.safetensors") as adapter:
        module = adapter.modules["unet.conv_in"]
        assert adapter.title == "full difference" and module.rank is None
        assert torch.equal(weight_delta(adapter, module, (8, 4, 3, 3)), weight)  # type: ignore[arg-type]
        assert torch.equal(bias_delta(adapter, module, (8,)), bias)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="for another model"):
            bias_delta(adapter, module, (9,))


# -------------------- hostile files


def test_what_is_refused_and_why(tmp_path: Path) -> None:
    good = {
        "lora_unet_conv_in.lora_down.weight": draw(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": draw(8, 2, 1, 1),
    }

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message) as caught, open_adapter(tmp_path / "bad.safetensors"):
            pass
        assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)

    refused({"some.weight": draw(2, 2)}, "none of its 1 keys")
    refused({"lora_transformer_blocks_0.lora_up.weight": draw(2, 2)}, "no adapter for SD1.5 or SDXL")
    refused({k: v for k, v in good.items() if "up" in k}, "no complete LoRA")
    refused(good | {"lora_unet_conv_in.lora_up.weight": draw(8, 3, 1, 1)}, "do not fit each other")
    refused(good | {"lora_unet_conv_in.lora_up.weight": draw(8)}, "shape")
    refused(good | {"unet.conv_in.lora_B.weight": draw(8, 2, 1, 1)}, "twice")
    refused(good | {"lora_unet_conv_in.alpha": draw(2)}, "expected one number")
    refused(good | {"lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, "alpha nan")
    refused(good | {"lora_unet_conv_in.dora_scale": draw(8, 1, 1, 1)}, "DoRA in 1 modules")
    refused(good | {"lora_unet_conv_in.oft_blocks": draw(8, 1)}, "OFT in 1 modules")
    refused(good | {"unet.conv_in.lora_B.bias": draw(8)}, "LoRA bias")
    refused({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "none of its 1 keys")
    with pytest.raises(UserError, match="does not exist"), open_adapter(tmp_path / "none.safetensors"):
        pass
    with pytest.raises(UserError, match="holds no adapter"), open_adapter(tmp_path):
        pass


def test_values_that_cannot_be_added(tmp_path: Path) -> None:
    parts = {"lora_down.weight": draw(2, 4, 3, 3), "lora_up.weight": draw(8, 2, 1, 1)}
    with pytest.raises(UserError, match="for another model"):
        delta_of(tmp_path, parts, (8, 5, 3, 3))
    parts["lora_up.weight"][0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinite values in module unet.conv_in"):
        delta_of(tmp_path, parts, (8, 4, 3, 3))


def test_small_files_cannot_ask_for_huge_products(tmp_path: Path) -> None:
    cases = [
        {"lora_down.weight": torch.ones(1, 10**6), "lora_up.weight": torch.ones(10**6, 1)},
        {"lokr_w1": torch.ones(1000, 1000), "lokr_w2": torch.ones(1000, 1000)},
        {"hada_w1_a": torch.ones(10**6, 1), "hada_w1_b": torch.ones(1, 10**6)}
        | {"hada_w2_a": torch.ones(10**6, 1), "hada_w2_b": torch.ones(1, 10**6)},
    ]
    for parts in cases:  # a product of 10^12 values would not fit into any memory
        with pytest.raises(UserError, match="1,000,000,000,000 values.*for another model"):
            delta_of(tmp_path, parts, (8, 4, 3, 3))


def test_factors_that_torch_would_stumble_over(tmp_path: Path) -> None:
    one = {"lora_down.weight": draw(2, 4, 3, 3), "lora_up.weight": draw(8, 2, 3, 3)}
    two = {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 36), "hada_w2_a": draw(6, 2), "hada_w2_b": draw(2, 9)}
    three = {"lokr_w1_a": draw(6, 2, 1), "lokr_w1_b": draw(2, 36), "lokr_w2": draw(2, 2)}
    four = {"lora_down.weight": draw(2, 4, 3, 3), "lora_up.weight": draw(8, 2), "lora_mid.weight": draw(2, 2, 3, 3)}
    for parts in (one, two, three, four):
        with pytest.raises(UserError, match="do not fit each other"):
            delta_of(tmp_path, parts, (8, 4, 3, 3))


def test_writing_refuses_what_would_be_lost(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_conv_in.lokr_w1": draw(2, 2), "lora_unet_conv_in.lokr_w2": draw(4, 2, 3, 3)},
        tmp_path / "k.safetensors",
    )
    with open_adapter(tmp_path / "k.safetensors") as adapter:
        with pytest.raises(UserError, match="peft has no key"):
            rewrite_adapter(adapter, tmp_path / "out.safetensors", "peft")
        with pytest.raises(UserError, match="unknown LoRA spelling"):
            rewrite_adapter(adapter, tmp_path / "out.safetensors", "civitai")
        with pytest.raises(UserError, match="also an input"):
            rewrite_adapter(adapter, tmp_path / "k.safetensors")
        rewrite_adapter(adapter, tmp_path / "out.safetensors", "sgm")
    assert set(load_tensors(tmp_path / "out.safetensors")) == {
        "lora_unet_input_blocks_0_0.lokr_w1", "lora_unet_input_blocks_0_0.lokr_w2",
    }  # fmt: skip
    tensors = random_lora("sdxl", only="conv_in") | {"lora_unet_new_thing.lora_up.weight": draw(2, 2)}
    save_file(tensors, tmp_path / "more.safetensors")
    with open_adapter(tmp_path / "more.safetensors") as adapter, pytest.raises(UserError, match="would be lost"):
        rewrite_adapter(adapter, tmp_path / "lost.safetensors")


# -------------------- the verbs


def test_inspect_and_convert_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(random_lora("sdxl", 4, 1.0) | {"lora_unet_odd.lora_up.weight": draw(2, 2)}, path)
    assert main(["inspect", str(path), "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])["adapter"]
    assert (
        found["kind"] == "LoRA"
        and found["architecture"] == "sdxl"
        and found["unmatched"] == ["lora_unet_odd.lora_up.weight"]
    )
    assert found["modules"] == len(module_shapes("sdxl")) and found["ranks"] == {"4": found["modules"]}
    assert found["alphas"] == {"1.0": found["modules"]} and found["scales"] == [0.25]
    assert (
        found["hashes"]["AutoV2"] == sha256_file(path)[:10] and found["hashes"]["AutoV3"] == sha256_tensors(path)[:12]
    )
    assert "LoRA for SDXL" in text and "unmatched: 1 keys" in text and "spelling: kohya" in text

    save_file(random_lora("sdxl", 4, 1.0), path)
    assert main(["convert", str(path), "-o", str(tmp_path / "p.safetensors"), "--lora", "peft"]) == 0
    assert f"{len(module_shapes('sdxl'))} modules" in capsys.readouterr().out
    assert main(["convert", str(path), "-o", str(tmp_path / "q.safetensors"), "--dtype", "fp16"]) == 2
    assert "no effect on a LoRA" in capsys.readouterr().err


def test_reading_an_adapter_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(random_lora("sd15", only="attn2"), path)
    code = (
        "import sys\nfrom dodgeburn.cli.main import main\n"
        f"assert main(['inspect', {str(path)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and "Stable Diffusion 1.5" in out.stdout, out.stderr


def test_a_damaged_lora_is_said(tmp_path: Path) -> None:
    tensors = random_lora("sd15", 3, 0.7)
    name = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[name][0] = float("inf")
    save_tensors(tmp_path / "start.safetensors", tensors, {})
    with (
        open_adapter(tmp_path / "start.safetensors") as adapter,
        pytest.warns(DodgeburnWarning, match="1 tensor has NaN or infinite values"),
    ):
        rewrite_adapter(adapter, tmp_path / "out.safetensors", "peft")
    assert (tmp_path / "out.safetensors").exists()
