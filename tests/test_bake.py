"""Adapters and deltas added to checkpoints: sums by hand, blocks, metadata, refusals; extract then apply = tuned."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import kohya_name, module_shapes, random_lora
from tiny_checkpoints import single_file

from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.modules import tensor_moves
from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    read_header,
    save_tensors,
    sha256_file,
    sha256_tensors,
)
from dodgeburn.cli.bake import parse_strength
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.addends import block_weights
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract, rounding_energy
from dodgeburn.merge.low_rank import low_rank

KINDS = ("sdxl", "sd15")
KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pico models of each kind in fp32 and fp16, and a LoRA of every module."""
    root = tmp_path_factory.mktemp("bake")
    for kind in KINDS:
        for seed in (0, 1):
            for name, dtype in (("32", torch.float32), ("16", torch.float16)):
                save_tensors(root / f"{kind}-{seed}-{name}.safetensors", single_file(kind, seed, dtype), {"note": "x"})
        save_tensors(root / f"{kind}-lora.safetensors", random_lora(kind, 2, 1.0), {})
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_gets_its_own_product(kind: str, place: Path, tmp_path: Path) -> None:
    model, lora = place / f"{kind}-0-32.safetensors", place / f"{kind}-lora.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = bake(model, [(lora, 0.5)], tmp_path / "out.safetensors")
    before, after, factors = load_tensors(model), load_tensors(result.path), load_tensors(lora)
    assert list(after) == list(before) and result.recipe.added[0].matched == len(module_shapes(kind))
    touched = set()
    for module, shape in module_shapes(kind).items():
        name = kohya_name(module, kind)
        down, up = factors[f"{name}.lora_down.weight"], factors[f"{name}.lora_up.weight"]
        wanted = 0.5 * 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(shape)  # strength x alpha / rank
        move = tensor_moves(kind)[f"{module}.weight"]
        touched.add(move.sources[0])
        change = move.apply(after.__getitem__) - move.apply(before.__getitem__)
        assert torch.allclose(change, wanted, atol=1e-5), module
    assert result.changed == len(touched)
    assert all(torch.equal(after[key], before[key]) for key in before if key not in touched)


def test_openclip_parts_land_in_their_third(place: Path, tmp_path: Path) -> None:
    module = "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj"
    save_tensors(tmp_path / "k.safetensors", random_lora("sdxl", only=module), {})
    bake(place / "sdxl-0-32.safetensors", [(tmp_path / "k.safetensors", 1.0)], tmp_path / "out.safetensors")
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    before, after = load_tensors(place / "sdxl-0-32.safetensors"), load_tensors(tmp_path / "out.safetensors")
    changed = (before[key] != after[key]).any(dim=1)
    assert not changed[:16].any() and changed[16:32].all() and not changed[32:].any()


def test_strengths_add_up_and_cancel(place: Path, tmp_path: Path) -> None:
    model, lora = place / "sdxl-0-16.safetensors", place / "sdxl-lora.safetensors"
    two = bake(model, [(lora, 0.25), (lora, 0.5)], tmp_path / "two.safetensors")
    one = bake(model, [(lora, 0.75)], tmp_path / "one.safetensors")
    a, b = load_tensors(two.path), load_tensors(one.path)
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-2, rtol=2e-3) for k in a)
    none = bake(model, [(lora, 0.7), (lora, -0.7)], tmp_path / "none.safetensors")
    assert none.sha256_tensors == sha256_tensors(model), "not a bit is left"
    with pytest.warns(DodgeburnWarning, match="changes nothing"):
        zero = bake(model, [(lora, 0.0)], tmp_path / "zero.safetensors")
    assert zero.changed == 0 and zero.sha256_tensors == sha256_tensors(model)


def test_block_weights(place: Path, tmp_path: Path) -> None:
    layout = detect_layout(single_file("sdxl"))
    weights = block_weights(layout, ["*=0,OUT*=0.5", "out03 = -2"])
    assert weights["IN04"] == weights["BASE"] == weights["VAE"] == 0
    assert weights["OUT08"] == 0.5 and weights["OUT03"] == -2
    assert block_weights(layout, ["GRAD_V,IN00=3"])["IN00"] == 3 and block_weights(layout, ["GRAD_V"])["M00"] == 0
    for text, message in (("IN12=1", "no block 'IN12'"), ("IN00=x", "is not NAME=NUMBER"), ("IN00=nan", "NAME=NUMBER")):
        with pytest.raises(UserError, match=message):
            block_weights(layout, [text])
    with pytest.raises(UserError, match="preset"):
        block_weights(layout, ["nothing"])
    model, lora = place / "sdxl-0-32.safetensors", place / "sdxl-lora.safetensors"
    whole = load_tensors(bake(model, [(lora, 1.0)], tmp_path / "whole.safetensors").path)
    half = load_tensors(bake(model, [(lora, 1.0)], tmp_path / "half.safetensors", ["*=0,M00=0.5"]).path)
    before = load_tensors(model)
    assert torch.allclose(half[KEY] - before[KEY], 0.5 * (whole[KEY] - before[KEY]), atol=1e-5)
    for key in before:
        if layout.block(key) != "M00":
            assert torch.equal(half[key], before[key]), key


def test_what_the_file_says_of_itself(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, lora = place / "sdxl-0-16.safetensors", place / "sdxl-lora.safetensors"
    first = bake(model, [(lora, 0.5)], tmp_path / "first.safetensors", ["IN04=0.25"])
    metadata = read_header(first.path).metadata
    recipe = json.loads(metadata["dodgeburn.recipe"])
    assert recipe["kind"] == "bake" and recipe["blocks"]["IN04"] == 0.25 and recipe["added"][0]["strength"] == 0.5
    assert recipe["model"]["sha256"] == sha256_file(model) and recipe["added"][0]["sha256"] == sha256_file(lora)
    assert metadata["modelspec.hash_sha256"] == "0x" + sha256_tensors(first.path) == "0x" + first.sha256_tensors
    assert metadata["note"] == "x" and metadata["format"] == "pt" and str(tmp_path) not in json.dumps(metadata)
    assert set(json.loads(metadata["sd_merge_models"])) == {sha256_file(model), sha256_file(lora)}
    again = bake(model, [(lora, 0.5)], tmp_path / "again.safetensors", ["IN04=0.25"])
    assert again.sha256_tensors == first.sha256_tensors
    second = bake(first.path, [(lora, 1.0)], tmp_path / "second.safetensors")
    assert second.recipe.model.recipe == recipe, "the tree goes on"
    assert main(["inspect", str(second.path)]) == 0
    text = capsys.readouterr().out
    assert "+ 1.0 x sdxl-lora.safetensors (LoRA, sha256" in text and "    bake: IN04 x 0.25" in text


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    model, out = place / "sd15-0-16.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="LoRA for SDXL, but sd15-0-16.safetensors is Stable Diffusion 1.5"):
        bake(model, [(place / "sdxl-lora.safetensors", 1.0)], out)
    with pytest.raises(UserError, match="also an input"):
        bake(model, [(place / "sd15-lora.safetensors", 1.0)], model)
    with pytest.raises(UserError, match="strength nan"):
        bake(model, [(place / "sd15-lora.safetensors", float("nan"))], out)
    with pytest.raises(UserError, match="it is a LoRA"):
        bake(place / "sd15-lora.safetensors", [(place / "sd15-lora.safetensors", 1.0)], out)
    with pytest.raises(UserError, match="becomes infinite|too large for F16"):
        bake(model, [(place / "sd15-lora.safetensors", 1e6)], out)
    with pytest.raises(UserError, match="no adapter for SD1.5 or SDXL"):
        bake(model, [(place / "sd15-1-16.safetensors", 1.0)], out)
    name = kohya_name("text_encoder.text_model.encoder.layers.11.mlp.fc1", "sd15")
    broken = load_tensors(model) | {KEY.replace("to_q", "to_k"): torch.full((32, 32), float("nan")).half()}
    save_tensors(tmp_path / "broken.safetensors", broken, {})
    with pytest.raises(UserError, match="to_k.weight of broken.safetensors has NaN"):
        bake(tmp_path / "broken.safetensors", [(place / "sd15-lora.safetensors", 1.0)], out)
    deep = {f"{name}.lora_{x}.weight": torch.ones(2, 2) for x in ("down", "up")}
    save_tensors(tmp_path / "deep.safetensors", deep, {})
    with pytest.raises(UserError, match="changes nothing in sd15-0-16.safetensors"):
        bake(model, [(tmp_path / "deep.safetensors", 1.0)], out)
    save_tensors(tmp_path / "mixed.safetensors", {**deep, **random_lora("sd15", only="conv_in")}, {})
    with pytest.warns(DodgeburnWarning, match="1 of 2 modules or keys are not in the model"):
        bake(model, [(tmp_path / "mixed.safetensors", 1.0)], tmp_path / "fine.safetensors")
    factors = {"down": torch.ones(1, 9, 3, 3), "up": torch.ones(8, 1, 1, 1)}
    wide = {f"lora_unet_conv_in.lora_{x}.weight": factor for x, factor in factors.items()}
    save_tensors(tmp_path / "wide.safetensors", wide, {})
    with pytest.raises(UserError, match="for another model"):
        bake(model, [(tmp_path / "wide.safetensors", 1.0)], out)
    assert not out.exists() and not list(tmp_path.glob(".dodgeburn*"))


def test_strengths_on_the_command_line(tmp_path: Path) -> None:
    assert parse_strength("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert parse_strength("a.safetensors:-1e-1") == ("a.safetensors", -0.1)
    assert parse_strength("C:\\x\\a.safetensors") == ("C:\\x\\a.safetensors", 1.0)
    (tmp_path / "odd:2").touch()
    assert parse_strength(str(tmp_path / "odd:2")) == (str(tmp_path / "odd:2"), 1.0)


def test_the_verbs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, lora, out = place / "sdxl-0-16.safetensors", place / "sdxl-lora.safetensors", tmp_path / "o.safetensors"
    assert main(["bake", str(model), f"{lora}:0.5", "-o", str(out), "--block-weights", "OUT*=0", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert f"{len(module_shapes('sdxl'))} matched, 0 unmatched" in text and found["recipe"]["blocks"]["OUT00"] == 0
    delta, back = tmp_path / "d.safetensors", tmp_path / "back.safetensors"
    assert main(["delta", "extract", str(out), str(model), "-o", str(delta), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["as"] == "full" and "OUT00" not in found["blocks"] and found["blocks"]["M00"]["kept_energy"] > 0.999
    assert main(["delta", "apply", str(out), str(delta), "-o", str(back), "--strength", "-1"]) == 0
    a, b = load_tensors(model), load_tensors(back)
    assert main(["delta", "apply", str(out), f"{delta}:-1", "-o", str(back)]) == 0
    assert all(torch.equal(value, b[key]) for key, value in load_tensors(back).items())
    capsys.readouterr()
    assert main(["delta", "apply", str(out), f"{delta}:-1", "-o", str(back), "--strength", "2"]) == 2
    assert "give one" in capsys.readouterr().err
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-2) for k in a), "unfused"
    assert json.loads(read_header(back).metadata["dodgeburn.recipe"])["kind"] == "delta_apply"
    assert main(["delta"]) == 0 and "extract" in capsys.readouterr().out, "help, as of every verb with verbs of its own"
    assert main(["delta", "extrct"]) == main(["delta", "extract", "a", "b"]) == 2
    for args in (["bake", str(model)], ["bake", str(model), str(lora)]):
        assert main(args) == 2
    assert main(["delta", "extract", str(out), str(model), "-o", str(delta), "--rank", "4"]) == 2
    assert "no effect on a full delta" in capsys.readouterr().err


# -------------------- deltas


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_low_rank_is_the_best_of_its_rank(m: int, n: int, rank: int, seed: int, scale: float) -> None:
    matrix = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    up, down, kept = low_rank(matrix, rank=rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert torch.allclose((up.double() @ down.double()), best, atol=1e-5 * float(s[0]))
    assert kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-9)
    assert up.shape[1] == down.shape[0] <= min(m, n, rank)


def test_energy_takes_as_few_components_as_it_needs() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # energies 9, 4, 1 of 14
    for energy, rank in ((0.5, 1), (9 / 14, 1), (0.65, 2), (13 / 14, 2), (0.99, 3), (1.0, 3)):
        assert low_rank(matrix, energy=energy).down.shape[0] == rank
    zero = low_rank(torch.zeros(3, 4), rank=2)
    assert zero.down.shape == (1, 4) and not zero.up.any()


def test_the_rounding_floor_is_what_rounding_does() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.05
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        stored = values.to(dtype).float()
        measured = float((stored - values).double().square().sum())
        assert rounding_energy(stored, name) == pytest.approx(measured, rel=0.1)
    assert rounding_energy(torch.zeros(4), "F16") == 0.0


def tuned_model(kind: str, dtype: torch.dtype, seed: int, weights_only: bool) -> dict[str, torch.Tensor]:
    """A pico model's fine-tune: a small change, everywhere or in what a LoRA can hold."""
    generator = torch.Generator().manual_seed(seed)
    held = {tensor_moves(kind)[f"{module}.weight"].sources[0] for module in module_shapes(kind)}
    out = {}
    for key, tensor in single_file(kind, 0, dtype).items():
        change = 0.01 * torch.randn(tensor.shape, generator=generator)
        touch = tensor.is_floating_point() and (not weights_only or key in held)
        out[key] = (tensor.float() + change).to(dtype) if touch else tensor
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_extract_then_apply_is_the_tuned_model(kind: str, seed: int, place: Path, tmp_path: Path) -> None:
    base = place / f"{kind}-0-16.safetensors"
    tuned = tuned_model(kind, torch.float16, seed, weights_only=False)
    save_tensors(tmp_path / "tuned.safetensors", tuned, {})
    report = extract(tmp_path / "tuned.safetensors", base, tmp_path / "d.safetensors")
    assert report.total.row()["kept_energy"] > 0.999999
    assert all(name.startswith("delta.") for name in load_tensors(tmp_path / "d.safetensors"))
    bake(base, [(tmp_path / "d.safetensors", 1.0)], tmp_path / "again.safetensors")
    again, before = load_tensors(tmp_path / "again.safetensors"), load_tensors(base)
    for key, tensor in tuned.items():  # half a step of the delta, and half a step of the result
        if tensor.is_floating_point():
            steps = (tensor.float() - before[key].float()).abs() + tensor.float().abs()
            error = (again[key].float() - tensor.float()).abs()
            assert bool((error <= steps * 2.0**-11 + 2.0**-24).all()), key
    extract(tmp_path / "tuned.safetensors", base, tmp_path / "d32.safetensors", dtype="fp32")
    exact = bake(base, [(tmp_path / "d32.safetensors", 1.0)], tmp_path / "exact.safetensors")
    assert exact.sha256_tensors == sha256_tensors(tmp_path / "tuned.safetensors"), "equal, bit for bit"

    tuned = tuned_model(kind, torch.float16, seed, weights_only=True)
    save_tensors(tmp_path / "tuned.safetensors", tuned, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = extract(
            tmp_path / "tuned.safetensors", base, tmp_path / "l.safetensors", "lora", energy=1.0, dtype="fp32"
        )
        bake(base, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "again.safetensors")
    assert set(report.ranks) == set(module_shapes(kind)) and not report.left
    again = load_tensors(tmp_path / "again.safetensors")
    for key, tensor in tuned.items():
        if tensor.is_floating_point():  # within rounding of fp16, or of fp32 where the weight is tiny
            error = (again[key].float() - tensor.float()).abs()
            assert bool((error <= tensor.float().abs() * 2.0**-10 + 1e-6).all()), key


def test_a_lora_of_low_rank_reports_what_it_keeps(place: Path, tmp_path: Path) -> None:
    base = place / "sdxl-0-32.safetensors"
    bake(base, [(place / "sdxl-lora.safetensors", 0.1)], tmp_path / "tuned.safetensors")
    whole = extract(tmp_path / "tuned.safetensors", base, tmp_path / "2.safetensors", "lora", rank=2, dtype="fp32")
    assert whole.total.row()["kept_energy"] == pytest.approx(1.0, abs=1e-4), "it was of rank 2"
    part = extract(tmp_path / "tuned.safetensors", base, tmp_path / "1.safetensors", "lora", rank=1)
    kept = part.total.row()["kept_energy"]
    assert 0.5 < kept < 0.99 and set(part.ranks.values()) == {1}
    stored = load_tensors(tmp_path / "1.safetensors")
    tuned, before = load_tensors(tmp_path / "tuned.safetensors"), load_tensors(base)
    name = kohya_name(MODULE, "sdxl")
    delta = tuned[KEY] - before[KEY]
    rest = delta - stored[f"{name}.lora_up.weight"].float() @ stored[f"{name}.lora_down.weight"].float()
    assert stored[f"{name}.lora_up.weight"].dtype == torch.float16 and stored[f"{name}.alpha"] == 1
    s = torch.linalg.svdvals(delta)
    lost = float(rest.square().sum() / delta.square().sum())
    assert lost == pytest.approx(float(s[1] ** 2 / s.square().sum()), abs=1e-3)


def test_what_a_lora_cannot_hold_is_said(place: Path, tmp_path: Path) -> None:
    base = place / "sd15-0-16.safetensors"
    save_tensors(tmp_path / "tuned.safetensors", tuned_model("sd15", torch.float16, 0, weights_only=False), {})
    with pytest.warns(DodgeburnWarning, match="changed tensors .* have no place in a LoRA and are left out: .*%"):
        report = extract(tmp_path / "tuned.safetensors", base, tmp_path / "l.safetensors", "lora", rank=4)
    assert "first_stage_model.quant_conv.weight" in report.left


def test_deltas_that_cannot_be(place: Path, tmp_path: Path) -> None:
    one, two, out = place / "sdxl-0-16.safetensors", place / "sdxl-1-16.safetensors", tmp_path / "d.safetensors"
    with pytest.raises(UserError, match="hold equal tensors"):
        extract(one, one, out)
    with pytest.raises(UserError, match="differ in no weight that a LoRA can hold"):
        extract(one, one, out, "lora")
    with pytest.raises(UserError, match="two models of one architecture"):
        extract(one, place / "sd15-0-16.safetensors", out)
    with pytest.raises(UserError, match="give one of them"):
        extract(one, two, out, "lora", 4, 0.5)
    with pytest.raises(UserError, match="also an input"):
        extract(one, two, one)
    extract(one, two, out)
    with pytest.raises(UserError, match="delta of sdxl models"):
        bake(place / "sd15-0-16.safetensors", [(out, 1.0)], tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="it is a delta, which `dodgeburn delta apply` adds to a model"):
        bake(out, [(out, 1.0)], tmp_path / "x.safetensors")
    fewer = {k: v for k, v in load_tensors(two).items() if k != KEY}
    save_tensors(tmp_path / "fewer.safetensors", fewer, {})
    with pytest.warns(DodgeburnWarning, match="1 tensors only in sdxl-0-16.safetensors"):
        extract(one, tmp_path / "fewer.safetensors", out)
    save_tensors(tmp_path / "nan.safetensors", load_tensors(two) | {KEY: torch.full((32, 32), float("nan")).half()}, {})
    with pytest.raises(UserError, match="NaN or infinite"):
        extract(tmp_path / "nan.safetensors", one, tmp_path / "x.safetensors")
