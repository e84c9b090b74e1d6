"""Merging files: closed forms, exact ends, determinism, everything odd counted, nothing half-written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CONV_IN, configs, single_file, small

import dodgeburn.merge
from dodgeburn.checkpoint.convert import clip_key_map, open_clip_key_map, unet_key_map, vae_key_map
from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.metadata import CONFIGS, configs_of, recipe_of
from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    read_header,
    save_tensors,
    sha256_file,
    sha256_tensors,
)
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.methods import merge_tensors
from dodgeburn.merge.presets import preset_alphas
from dodgeburn.merge.recipe import MergeRecipe
from dodgeburn.merge.run import dry_run, merge

Tensors = dict[str, torch.Tensor]
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Read-only parents: SDXL and SD1.5 shaped, A and B, fp16."""
    folder = tmp_path_factory.mktemp("parents")
    out = SimpleNamespace(folder=folder)
    for kind in ("sdxl", "sd15"):
        for name, seed in (("a", 1), ("b", 2)):
            path = folder / f"{kind}-{name}.safetensors"
            save_tensors(path, single_file(kind, seed), {CONFIGS: json.dumps(configs(kind)), "author": name})
            setattr(out, f"{kind}_{name}", path)
    return out


def pair(folder: Path, a: Tensors, b: Tensors, **metadata: str) -> tuple[Path, Path]:
    save_tensors(folder / "a.safetensors", a, metadata)
    save_tensors(folder / "b.safetensors", b, {})
    return folder / "a.safetensors", folder / "b.safetensors"


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- values


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_every_tensor_is_the_lerp_of_its_block(files: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    a, b = getattr(files, f"{kind}_a"), getattr(files, f"{kind}_b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge(a, b, tmp_path / "m.safetensors", preset="ReverseSmoothstep", base=0.4)
    one, two, out = load_tensors(a), load_tensors(b), load_tensors(tmp_path / "m.safetensors")
    layout = detect_layout(one)
    shares = dict(zip(layout.blocks, preset_alphas("ReverseSmoothstep", layout.n_in, layout.n_out), strict=True))
    shares |= {"BASE": 0.4, "VAE": 0.4}
    assert result.plan.blocks == shares
    assert list(read_header(tmp_path / "m.safetensors").tensors) == list(read_header(a).tensors)
    for key in one:
        if key == IDS:
            assert torch.equal(out[key], one[key]) and out[key].dtype == torch.int64
            continue
        block = layout.block(key)
        assert block is not None
        exact = one[key].double() + shares[block] * (two[key].double() - one[key].double())
        assert out[key].dtype == torch.float16
        # one rounding to fp16, from float32 values that are exact to 1e-6
        torch.testing.assert_close(out[key].double(), exact, rtol=2**-11 + 1e-6, atol=1e-6)
        assert torch.equal(bits(out[key]), bits(merge_tensors([one[key], two[key]], shares[block])))


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_ends_are_bytes_of_the_parents(files: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    a, b = getattr(files, f"{kind}_a"), getattr(files, f"{kind}_b")
    with pytest.warns(DodgeburnWarning, match="no tensor takes anything from B"):
        merge(a, b, tmp_path / "0.safetensors", base=0)
    merge(a, b, tmp_path / "1.safetensors", base=1)
    assert same(load_tensors(tmp_path / "0.safetensors"), load_tensors(a))
    assert sha256_tensors(tmp_path / "0.safetensors") == sha256_tensors(a)
    assert same(load_tensors(tmp_path / "1.safetensors"), load_tensors(b))


def test_keep_takes_text_encoders_and_vae_from_a(files: SimpleNamespace, tmp_path: Path) -> None:
    merge(files.sdxl_a, files.sdxl_b, tmp_path / "m.safetensors", preset="Flat_25", base=1, keep=("text", "vae"))
    one, two, out = load_tensors(files.sdxl_a), load_tensors(files.sdxl_b), load_tensors(tmp_path / "m.safetensors")
    for key in one:
        if key.startswith(("first_stage_model.", "conditioner.")):
            assert torch.equal(out[key], one[key]), key
        elif "time_embed" in key or "label_emb" in key:
            assert torch.equal(out[key], two[key]), key
        else:
            assert not torch.equal(out[key], one[key]) and not torch.equal(out[key], two[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["weighted_sum"])
@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_properties_of_every_method(method: str, dtype: torch.dtype, alpha: float, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = (10 * torch.randn(31)).to(dtype), torch.randn(31).to(dtype)
    before = a.clone(), b.clone()
    out = merge_tensors([a, b], alpha, method)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    assert out.dtype == dtype and bool(torch.isfinite(out).all())
    assert torch.equal(merge_tensors([a, a], alpha, method), a)
    assert torch.equal(merge_tensors([a, b], 0.0, method), a)
    assert torch.equal(merge_tensors([a, b], 1.0, method), b)
    if method == "weighted_sum":
        swapped = merge_tensors([b, a], 1 - alpha, method)
        # one step of the type itself, and float32's (float64's) rounding of the larger where both cancel
        wide = 2**-52 if dtype == torch.float64 else 2**-23
        torch.testing.assert_close(out, swapped, rtol=torch.finfo(dtype).eps, atol=100 * wide)
        low, high = torch.minimum(a, b).double(), torch.maximum(a, b).double()
        slack = 100 * wide + torch.maximum(low.abs(), high.abs()) * torch.finfo(dtype).eps
        assert bool(((out.double() >= low - slack) & (out.double() <= high + slack)).all())


def test_bit_for_bit_a_float32_lerp_rounded_once() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(10_007).half(), torch.randn(10_007).half()
    for alpha in (0.1, 0.3, 0.5, 0.9):
        lerp = torch.lerp(a.float(), b.float(), alpha).half()
        assert torch.equal(merge_tensors([a, b], alpha), lerp)


def test_equal_blocks_are_a_plain_sum(files: SimpleNamespace, tmp_path: Path) -> None:
    merge(files.sdxl_a, files.sdxl_b, tmp_path / "plain.safetensors", base=0.25)
    merge(files.sdxl_a, files.sdxl_b, tmp_path / "flat.safetensors", preset="FLAT_25", base=0.25)
    assert same(load_tensors(tmp_path / "plain.safetensors"), load_tensors(tmp_path / "flat.safetensors"))


def test_swapped_parents_give_the_same_within_rounding(tmp_path: Path) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    merge(a, b, tmp_path / "x.safetensors", base=0.3)
    merge(b, a, tmp_path / "y.safetensors", base=0.7)
    x, y = load_tensors(tmp_path / "x.safetensors"), load_tensors(tmp_path / "y.safetensors")
    for key in x:
        torch.testing.assert_close(x[key], y[key], rtol=2**-10, atol=1e-6)


def test_merging_a_file_with_itself_changes_nothing(files: SimpleNamespace, tmp_path: Path) -> None:
    merge(files.sd15_a, files.sd15_a, tmp_path / "m.safetensors", preset="TrueCubicHermite", base=0.37)
    assert same(load_tensors(tmp_path / "m.safetensors"), load_tensors(files.sd15_a))


def test_mixed_types_keep_those_of_a(tmp_path: Path) -> None:
    a = {k: t.to(torch.bfloat16 if "out" in k else torch.float16) for k, t in small(1).items()}
    a, b_tensors = a, small(2, torch.float32)
    path_a, path_b = pair(tmp_path, a, b_tensors)
    for alpha in (0.5, 1.0):
        result = merge(path_a, path_b, tmp_path / "m.safetensors", base=alpha)
        out = load_tensors(tmp_path / "m.safetensors")
        assert result.plan.counts == {"dtype_differs": len(a)}
        for key in a:
            assert torch.equal(out[key], merge_tensors([a[key], b_tensors[key]], alpha))
            assert out[key].dtype == a[key].dtype


def test_float8_is_merged_too(tmp_path: Path) -> None:
    a = {k: t.clamp(-4, 4).to(torch.float8_e4m3fn) for k, t in small(1).items()}
    b = {k: t.clamp(-4, 4).to(torch.float8_e4m3fn) for k, t in small(2).items()}
    merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors", base=0.5)
    out = load_tensors(tmp_path / "m.safetensors")
    assert torch.equal(out[CONV_IN].float(), merge_tensors([a[CONV_IN], b[CONV_IN]], 0.5).float())


@pytest.mark.parametrize("dtype", [None, "fp8_e4m3fn"])
def test_what_float8_cannot_hold_is_never_cut_off(tmp_path: Path, dtype: str | None) -> None:
    tensors = small(1, torch.float8_e4m3fn if dtype is None else torch.float16)
    other = small(2, torch.float32)
    other[CONV_IN][0, 0] = 2000.0
    paths = pair(tmp_path, tensors, other)
    with pytest.raises(UserError, match=f"{CONV_IN} of the result is too large for F8_E4M3"):
        merge(*paths, tmp_path / "m.safetensors", base=0.5, dtype=dtype)
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


# ---- determinism and pieces


def test_bytes_do_not_depend_on_threads_or_tiles(
    files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for i, (threads, tile) in enumerate([(1, 1 << 20), (4, 1 << 20), (3, 97), (1, 64)]):
        monkeypatch.setattr("dodgeburn.merge.tiles.TILE", tile)
        out = tmp_path / str(i) / "m.safetensors"
        out.parent.mkdir()
        merge(files.sdxl_a, files.sdxl_b, out, preset="Cosine", base=0.3, threads=threads)
        digests.add(sha256_file(out))
    assert len(digests) == 1


# ---- recipe and metadata


def test_the_file_explains_itself(files: SimpleNamespace, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    merge(files.sdxl_a, files.sdxl_b, first, preset="grad_v", base=0.4, keep="vae")
    merge(first, files.sdxl_b, tmp_path / "second.safetensors", base=0.1)
    metadata = read_header(first).metadata
    assert metadata["format"] == "pt" and metadata["author"] == "a" and configs_of(metadata) == configs("sdxl")
    recipe = MergeRecipe.from_json(metadata["dodgeburn.recipe"])
    assert (recipe.preset, recipe.base, recipe.xl_presets, recipe.keep) == ("GradV", 0.4, "curve", ("vae",))
    assert recipe.a.sha256 == sha256_file(files.sdxl_a) and recipe.b.sha256 == sha256_file(files.sdxl_b)
    assert recipe.a.file == "sdxl-a.safetensors"
    assert recipe.blocks["VAE"] == 0 and recipe.blocks["BASE"] == 0.4 and recipe.blocks["M00"] == 0
    assert metadata["modelspec.hash_sha256"] == "0x" + sha256_tensors(first)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.merged_from"] == "sdxl-a, sdxl-b"
    assert metadata["modelspec.resolution"] == "64x64"  # from the configs it carries: 8 x 8 latents, factor 8
    assert str(files.folder) not in json.dumps(metadata)
    models = json.loads(metadata["sd_merge_models"])
    assert {m["name"] for m in models.values()} == {"sdxl-a.safetensors", "sdxl-b.safetensors"}
    assert json.loads(metadata["sd_merge_recipe"])["primary_model_hash"] == recipe.a.sha256

    again = read_header(tmp_path / "second.safetensors").metadata
    found = recipe_of(again)
    assert found is not None and found["a"]["recipe"]["preset"] == "GradV"
    assert len(json.loads(again["sd_merge_models"])) == 3


def real_sdxl_names() -> list[str]:
    """All 2 515 tensor names of SDXL base 1.0."""
    unet = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
    }
    vae = configs("sdxl")["vae"] | {"block_out_channels": [128, 256, 512, 512]}
    clip_l = [*clip_key_map({"num_hidden_layers": 12})]
    clip_l.append("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
    clip_g = [*open_clip_key_map({"num_hidden_layers": 32}), "conditioner.embedders.1.model.logit_scale"]
    for i in range(32):
        block = f"conditioner.embedders.1.model.transformer.resblocks.{i}.attn.in_proj_"
        clip_g += [block + "weight", block + "bias"]
    return [*unet_key_map(unet), *vae_key_map(vae), *clip_l, *clip_g]


def test_all_names_of_real_sdxl(tmp_path: Path) -> None:
    names = real_sdxl_names()
    assert len(names) == len(set(names)) == 2515
    a = {name: torch.full((2,), 1.0).half() for name in names}
    b = {name: torch.full((2,), 3.0).half() for name in names}
    ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    a[ids] = b[ids] = torch.arange(77)
    result = merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors", preset="RING08_5", base=0.25)
    assert result.plan.counts == {"integers": 1} and result.plan.layout.name == "sdxl"
    out = load_tensors(tmp_path / "m.safetensors")
    u = "model.diffusion_model."
    ring = tuple(
        f"{u}{k}"
        for k in (
            "input_blocks.3.",
            "input_blocks.4.",
            "input_blocks.5.",
            "input_blocks.6.",
            "output_blocks.2.",
            "output_blocks.3.",
            "output_blocks.4.",
            "output_blocks.5.",
        )
    )
    rest = (u + "input_blocks.", u + "middle_block.", u + "output_blocks.", u + "out.")
    for name, tensor in out.items():
        if name != ids:
            expected = 3.0 if name.startswith(ring) else 1.0 if name.startswith(rest) else 1.5
            assert tensor.tolist() == [expected] * 2, name


def test_a_recipe_repeats_the_merge(files: SimpleNamespace, tmp_path: Path) -> None:
    one = merge(
        files.sdxl_a, files.sdxl_b, tmp_path / "x.safetensors", preset="TRUE_CUBIC_HERMITE", base=0.6, xl_presets="cut"
    )
    recipe = MergeRecipe.from_json(one.recipe.to_json())
    assert recipe == one.recipe
    two = merge(files.sdxl_a, files.sdxl_b, tmp_path / "y.safetensors", blocks=recipe.blocks, keep=recipe.keep)
    assert one.sha256_tensors == two.sha256_tensors
    with pytest.raises(UserError, match="not a merge recipe: blocks"):
        MergeRecipe.from_json('{"layout": "sdxl", "a": {"file": "a"}, "b": {"file": "b"}, "base": 0.5}')


def test_dry_run_says_all_and_writes_nothing(files: SimpleNamespace, tmp_path: Path) -> None:
    plan, text = dry_run(files.sd15_a, files.sd15_b, tmp_path / "m.safetensors", preset="Wrap2", base=0.4, keep=["vae"])
    assert left(tmp_path) == []
    assert "shares are B's" in text and "kept from A" in text and "1 tensor of integers" in text
    lines = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[:2] in ("IN", "OU", "BA")}
    assert lines == {k: v for k, v in plan.blocks.items() if k not in ("VAE", "M00")}
    assert f"{plan.bytes_written / 1e6:,.2f} MB to write" in text


def test_the_package_itself_can_be_called(tmp_path: Path) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    result = dodgeburn.merge(a, b, tmp_path / "m.safetensors", base=0.5)  # type: ignore[operator]
    assert result.path == tmp_path / "m.safetensors"


def test_diffusers_loads_what_we_write(files: SimpleNamespace, tmp_path: Path) -> None:
    """A merged SD1.5 U-Net, through diffusers' own single-file converter into its own class."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    merge(files.sd15_a, files.sd15_b, tmp_path / "m.safetensors", preset="Cosine")
    unet = UNet2DConditionModel(**configs("sd15")["unet"])
    state_dict = convert_ldm_unet_checkpoint(load_file(tmp_path / "m.safetensors"), dict(unet.config))
    unet.load_state_dict(state_dict, strict=True)


# ---- the verbs


def run(verb: str, *args: str, capsys: Any) -> tuple[int, str]:
    import importlib

    code = importlib.import_module(f"dodgeburn.cli.{verb}").main(list(args))
    return code, capsys.readouterr().out


def test_verbs(files: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    a, b, out = str(files.sdxl_a), str(files.sdxl_b), str(tmp_path / "m.safetensors")
    code, text = run("merge", a, b, "-o", out, "--preset", "GradA", "--block", "IN00=1,IN01=0", "--json", capsys=capsys)
    found = json.loads(text.splitlines()[-1])
    assert code == 0 and found["recipe"]["blocks"]["IN00"] == 1 and found["sha256_tensors"] == sha256_tensors(out)
    code, text = run("inspect", out, "--json", capsys=capsys)
    found = json.loads(text.splitlines()[-1])
    assert code == 0 and found["layout"] == "sdxl" and found["recipe"]["preset"] == "GradA"
    assert set(found["components"]) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert "A = sdxl-a.safetensors" in text
    code, text = run("merge", a, b, "--dry-run", "--json", capsys=capsys)
    assert code == 0 and json.loads(text.splitlines()[-1])["dry_run"] is True
    with pytest.raises(UserError, match="-o"):
        run("merge", a, b, capsys=capsys)


def test_inspect_of_any_safetensors_file(tmp_path: Path, capsys: Any) -> None:
    save_tensors(tmp_path / "x.safetensors", {"t": torch.zeros(3)}, {"note": "n" * 500})
    code, text = run("inspect", str(tmp_path / "x.safetensors"), capsys=capsys)
    assert code == 0 and "unknown: not a Stable Diffusion" in text and "(500 characters)" in text
