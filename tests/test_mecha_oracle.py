"""Merge methods against sd-mecha 1.1.8, tensor for tensor, wherever both mean the same.

sd-mecha needs packages under the GPL, so it lives in an environment of its own (CONTRIBUTING.md) and runs as another
process. Tensors are small, names are the real ones of SDXL and SD1.5, and both programs read and write files.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import real_sdxl_names
from tiny_checkpoints import single_file

from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.tensorfile import load_tensors, save_tensors
from dodgeburn.merge.methods.task_vectors import keep_probabilities
from dodgeburn.merge.run import merge

PYTHON = os.environ.get("DODGEBURN_MECHA_PYTHON", "")
VERSION = "1.1.8"
Tensors = dict[str, torch.Tensor]

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not PYTHON, reason="sd-mecha: set DODGEBURN_MECHA_PYTHON to an interpreter that has it (CONTRIBUTING.md)"
    ),
]

# All of 144 values, so that one density means the same place of the cut in both programs.
SHAPES = ((144,), (12, 12), (16, 9), (4, 4, 3, 3), (24, 6), (4, 36))
# Tolerances, absolute and relative. sd-mecha's median stops when the sum of distances no longer changes in float32:
# within 1e-3 of the place (test_methods_published.py holds ours to 1e-6 of it in float64).
ONE_STEP, SUMS, ANGLES, MEDIAN = 2e-7, 2e-6, 2e-5, 2e-3


def some_names(names: list[str]) -> list[str]:
    """One weight of every block of the U-Net and of every other part of a model."""
    found: dict[str, str] = {}
    for name in names:
        words = name.split(".")
        if words[-1] == "weight":
            found.setdefault(".".join(words[: 4 if words[2].endswith("_blocks") else 3]), name)
    return list(found.values())


def write(folder: Path, kind: str, names: list[str], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    for seed, letter in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(shapes[i % len(shapes)], generator=generator) for i, n in enumerate(names)}
        path = folder / f"{kind}-{letter}.safetensors"
        save_tensors(path, {name: t.to(dtype) for name, t in tensors.items()}, {})


def shares_of(names: list[str]) -> dict[str, float]:
    """Another share for every block, as B's part; sd-mecha's SD1.5 counts the VAE to BASE, its SDXL does not."""
    layout = detect_layout(names)
    blocks = {block: (i + 1) / (len(layout.all_blocks) + 1) for i, block in enumerate(layout.all_blocks)}
    if layout.name == "sd15":
        blocks["VAE"] = blocks["BASE"]
    return blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mecha")
    sdxl = real_sdxl_names()
    sd15 = [name for name in single_file("sd15") if "position_ids" not in name]
    write(root, "sdxl-some", some_names(sdxl), SHAPES, torch.float32)
    write(root, "sd15-some", some_names(sd15), SHAPES, torch.float32)
    write(root, "sdxl-fp16", some_names(sdxl), SHAPES, torch.float16)
    write(root, "sdxl-bf16", some_names(sdxl), SHAPES, torch.bfloat16)
    write(root, "sdxl-all", sdxl, ((2, 2),), torch.float16)
    write(root, "sd15-all", sd15, ((2, 2),), torch.float16)
    few = some_names(sdxl)
    write(root, "many", few, ((100_000,),) * 3 + ((2,),) * (len(few) - 3), torch.float32)
    shares = {kind: shares_of(names) for kind, names in (("sdxl", sdxl), ("sd15", sd15))}
    (root / "shares.json").write_text(
        json.dumps(shares | {"sd15": {k: v for k, v in shares["sd15"].items() if k != "VAE"}})
    )
    version = subprocess.run(
        [PYTHON, "-c", "from importlib.metadata import version; print(version('sd-mecha'))"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert version.stdout.strip() == VERSION, f"{PYTHON}: {version.stdout}{version.stderr}"
    script = Path(__file__).with_name("mecha_recipes.py")
    done = subprocess.run([PYTHON, str(script), str(root)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def ours(folder: Path, files: str, letters: str, **settings: Any) -> Tensors:
    """Our merge of FILES-a, FILES-b and further models; C is the base when `base_model` says so."""
    paths = {letter: folder / f"{files}-{letter}.safetensors" for letter in "abc"}
    more = [paths[letter] for letter in letters[2:]]
    if settings.pop("over_c", False):
        settings["base_model"] = paths["c"]
    merge(paths[letters[0]], paths[letters[1]], folder / "ours.safetensors", more=more, **settings)
    return load_tensors(folder / "ours.safetensors")


def compare(found: Tensors, expected: Tensors, tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    for name in found:
        if tolerance == 0:
            assert torch.equal(found[name], expected[name]), name
        else:
            torch.testing.assert_close(
                found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


# Job of mecha_recipes.py -> (models, our settings, tolerance). 0: bit for bit.
JOBS: dict[str, tuple[str, dict[str, Any], float]] = {
    "weighted_sum": ("ab", {"base": 0.3}, 0),
    "sum_twice": ("abc", {"base": 0.3, "params": {"beta": 0.6}}, 0),
    "triple_sum": ("abc", {"base": 0.3, "params": {"beta": 0.5}}, SUMS),
    "average": ("abc", {}, SUMS),
    "add_difference": ("ab", {"base": 0.7, "over_c": True}, ONE_STEP),
    "clipped": ("ab", {"method": "add_difference", "base": 0.7, "over_c": True, "clip": True}, ONE_STEP),
    "train_difference": ("ab", {"base": 0.7, "over_c": True}, SUMS),
    "slerp": ("ab", {"base": 0.3}, ANGLES),
    "bislerp": ("ab", {"base": 0.3, "over_c": True, "params": {"strength": 0.8}}, ANGLES),
    "cosine_a": ("ab", {"base": 0.2}, SUMS),
    "cosine_b": ("ab", {"base": 0.2}, SUMS),
    "tensor_sum": ("ab", {"base": 0.5, "params": {"beta": 0.25}}, 0),
    "tensor_sum_around": ("ab", {"method": "tensor_sum", "base": 0.5, "params": {"beta": 0.75}}, 0),
    "top_k_sum": ("ab", {"base": 0.5}, 0),
    "ties": ("ab", {"over_c": True, "params": {"density": 1.0}}, SUMS),
    # sd-mecha keeps what is not smaller than the floor((1 - k) n)th value: of 144 and k = 0.4, 59 instead of 58
    "ties_trimmed": ("ab", {"method": "ties", "over_c": True, "params": {"density": 59 / 144}}, SUMS),
    "geometric_median": ("abc", {}, MEDIAN),
}


@pytest.mark.parametrize("job", JOBS)
def test_equal_tensor_for_tensor(job: str, folder: Path) -> None:
    letters, settings, tolerance = JOBS[job]
    found = ours(folder, "sdxl-some", letters, **{"method": job} | settings)
    compare(found, load_tensors(folder / "mecha" / f"sdxl-{job}.safetensors"), tolerance)


@pytest.mark.parametrize("job", ["weighted_sum", "add_difference"])
def test_equal_under_the_names_of_sd15(job: str, folder: Path) -> None:
    letters, settings, tolerance = JOBS[job]
    found = ours(folder, "sd15-some", letters, **{"method": job} | settings)
    compare(found, load_tensors(folder / "mecha" / f"sd15-{job}.safetensors"), tolerance)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_bit_for_bit(dtype: str, folder: Path) -> None:
    expected = load_tensors(folder / "mecha" / f"sdxl-{dtype}.safetensors")
    compare(ours(folder, f"sdxl-{dtype}", "ab", base=0.3), expected, 0)


@pytest.mark.parametrize(("kind", "count"), [("sdxl", 2515), ("sd15", 900)])
def test_every_tensor_of_a_model_is_in_the_same_block(kind: str, count: int, folder: Path) -> None:
    """Another share for each block: bit for bit in every tensor of a whole model."""
    expected = load_tensors(folder / "mecha" / f"{kind}-blocks.safetensors")
    found = ours(folder, f"{kind}-all", "ab", base=0.0, blocks=shares_of(list(expected)))
    assert len(expected) >= count
    compare(found, expected, 0)


def test_rotations_of_tall_matrices(folder: Path) -> None:
    """Both turn the shorter side of a tall matrix (with sd-mecha's centring off). Others it turns on another side."""
    expected = load_tensors(folder / "mecha" / "sdxl-rotate.safetensors")
    found = ours(folder, "sdxl-some", "ab", method="rotate", base=1.0)
    tall = [name for name, t in found.items() if t.ndim == 2 and t.shape[0] > t.shape[1]]
    assert len(tall) >= 3
    compare({n: found[n] for n in tall}, {n: expected[n] for n in tall}, ANGLES)


def test_model_stock_of_vectors(folder: Path) -> None:
    """sd-mecha takes a cosine for each row, we (and mergekit) one for the tensor: the same for vectors, two models."""
    expected = load_tensors(folder / "mecha" / "sdxl-model_stock.safetensors")
    found = ours(folder, "sdxl-some", "ab", method="model_stock", over_c=True)
    flat = [name for name, t in found.items() if t.ndim == 1]
    assert len(flat) >= 3
    compare({n: found[n] for n in flat}, {n: expected[n] for n in flat}, SUMS)
    wide = next(name for name, t in found.items() if t.shape == (12, 12))
    assert not torch.allclose(found[wide], expected[wide], atol=1e-2)


def test_ties_elects_by_value_where_sd_mecha_counts_signs_by_default(folder: Path) -> None:
    """The paper's algorithm 1 sums values. With two models, signs that differ are a draw: 0 in sd-mecha, never ours."""
    base = load_tensors(folder / "sdxl-some-c.safetensors")
    by_count = load_tensors(folder / "mecha" / "sdxl-ties_by_count.safetensors")
    found = ours(folder, "sdxl-some", "ab", method="ties", over_c=True, params={"density": 1.0})
    draws = sum(int((by_count[n] == base[n]).sum()) for n in base)
    assert draws > 0.3 * sum(t.numel() for t in base.values())
    assert not any(bool((found[n] == base[n]).any()) for n in base)


def test_della_keeps_the_same_shares_by_size(folder: Path) -> None:
    """Masks are random; how often values of each tenth by size are kept is not. Two equal models: kept by either."""
    expected = load_tensors(folder / "mecha" / "della.safetensors")
    params = {"density": 0.4, "window": 0.4}
    found = ours(folder, "many", "aa", method="della", over_c=True, params=params)
    a, base = (load_tensors(folder / f"many-{n}.safetensors") for n in "ac")
    many = [name for name, t in found.items() if t.numel() == 100_000]
    assert len(many) == 3
    for name in many:
        delta = a[name] - base[name]
        order = delta.abs().argsort()
        kept_by_us, kept_by_them = ((x[name] - base[name])[order].abs() > 1e-6 for x in (found, expected))
        probability = keep_probabilities(delta, **params)[order]
        for tenth in range(10):
            part = slice(tenth * 10_000, (tenth + 1) * 10_000)
            share = float((1 - (1 - probability[part]) ** 2).mean())
            error = 4.5 * math.sqrt(share * (1 - share) / 10_000)  # 60 comparisons: one in 2 000 runs by chance
            assert abs(float(kept_by_us[part].float().mean()) - share) < error
            assert abs(float(kept_by_them[part].float().mean()) - share) < error
