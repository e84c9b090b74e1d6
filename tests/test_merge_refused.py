"""Merging files: everything odd is counted, what is wrong is refused, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_merge import IDS, files, left, pair
from tiny_checkpoints import CONV_IN, single_file, small

from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    save_tensors,
)
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.run import dry_run, merge

__all__ = ["files"]  # a fixture


# ---- what is odd


def test_integers_are_copied_never_averaged(tmp_path: Path) -> None:
    a, b = single_file("sd15", 1), single_file("sd15", 2)
    b[IDS] = b[IDS] + 100
    result = merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors", base=0.5)
    assert torch.equal(load_tensors(tmp_path / "m.safetensors")[IDS], a[IDS])
    assert result.plan.issues["integers"] == [IDS]


def test_missing_and_extra_tensors_are_counted(tmp_path: Path) -> None:
    a, b = small(1), small(2)
    u = "model.diffusion_model."
    del b[u + "out.2.bias"], b[u + "time_embed.0.weight"]
    b[u + "middle_block.1.extra"] = torch.zeros(2)
    b["unrelated"] = torch.zeros(2)
    a["model_ema.decay"] = torch.tensor(0.5)
    with pytest.warns(DodgeburnWarning) as caught:
        result = merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors", base=0.5)
    said = " | ".join(str(w.message) for w in caught)
    assert "2 tensors not in B" in said and "1 tensor only in B" in said and "1 tensor outside" in said
    out = load_tensors(tmp_path / "m.safetensors")
    assert out.keys() == a.keys()
    assert torch.equal(out[u + "out.2.bias"], a[u + "out.2.bias"])
    assert result.plan.counts == {"missing_in_b": 2, "extra_in_b": 1, "outside": 1}
    assert result.recipe.counts == result.plan.counts


def test_kept_parts_may_be_missing_or_of_another_size_in_b(tmp_path: Path) -> None:
    a, b = small(1), small(2)
    b = {k: t for k, t in b.items() if not k.startswith("conditioner.")}
    b["first_stage_model.decoder.conv_out.bias"] = torch.zeros(9).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors", base=0.5, keep=["text", "vae"])
    assert result.plan.counts == {"shape_differs": 1}


def test_architectures_are_never_mixed(files: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sdxl-a.safetensors is SDXL, sd15-b.safetensors is Stable Diffusion 1.5"):
        merge(files.sdxl_a, files.sd15_b, tmp_path / "m.safetensors")
    save_tensors(tmp_path / "lora", {"lora_unet_x.lora_down.weight": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="lora: .*it is a LoRA"):
        merge(files.sdxl_a, tmp_path / "lora", tmp_path / "m.safetensors")
    assert left(tmp_path) == ["lora"]


def test_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    a, b = small(1), small(2)
    b[CONV_IN] = torch.zeros(4, 9).half()
    with pytest.raises(UserError, match=r"1 tensors of b.safetensors .*input_blocks.0.0.weight: \[4, 9\] instead of"):
        merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors")
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_an_inpainting_model_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Its first convolution takes 9 channels: it has to be A, and to keep that one."""
    inpainting, other = small(1) | {CONV_IN: torch.zeros(4, 9, 3, 3)}, small(2) | {CONV_IN: torch.ones(4, 4, 3, 3)}
    a, b = pair(tmp_path, inpainting, other)
    with pytest.raises(
        UserError, match=r"a.safetensors is an inpainting model.* 9 channels instead of 4; keep"
    ) as said:
        merge(a, b, tmp_path / "m.safetensors")
    rule = str(said.value).rpartition("--rule ")[2]
    with pytest.raises(UserError, match=r"a.safetensors is an inpainting model.*name a.safetensors first"):
        merge(b, a, tmp_path / "m.safetensors")
    merge(a, b, tmp_path / "m.safetensors", base=1.0, rules=[rule])
    assert torch.equal(load_tensors(tmp_path / "m.safetensors")[CONV_IN], inpainting[CONV_IN])


def test_models_that_predict_different_things_are_warned_of(tmp_path: Path) -> None:
    """v_pred is the marker of SDXL models that predict velocity."""
    a, b = pair(tmp_path, small(1), small(2) | {"v_pred": torch.tensor([])})
    out, same, other = (tmp_path / f"{name}.safetensors" for name in ("m", "same", "other"))
    shutil.copy(b, same)
    shutil.copy(a, other)
    with pytest.warns(DodgeburnWarning, match="a.safetensors predicts epsilon, b.safetensors v_prediction"):
        merge(a, b, out)
    assert "\nwarning: a.safetensors predicts epsilon, b.safetensors v_prediction" in dry_run(a, b)[1]
    quiet = [
        {"components": {"unet": 0.0}},  # text encoders and VAE do not predict noise
        {"method": "add_difference", "base_model": same},  # what B learned beyond a base of its kind
    ]
    for options in quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DodgeburnWarning)
            merge(a, b, out, **options)
    with pytest.warns(DodgeburnWarning, match="other.safetensors predicts epsilon, b.safetensors v_prediction"):
        merge(a, b, out, method="add_difference", base_model=other)


def test_nothing_in_common(tmp_path: Path) -> None:
    u = "model.diffusion_model."
    names = ("input_blocks.0.0.", "output_blocks.0.0.", "label_emb.0.0.")
    a = {f"{u}{n}weight": torch.zeros(1) for n in names}
    b = {f"{u}{n}bias": torch.zeros(1) for n in names}
    with pytest.raises(UserError, match="none of A's 3 tensors"):
        merge(*pair(tmp_path, a, b), tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad", ["a.safetensors", "b.safetensors"])
@pytest.mark.parametrize("base", [0.0, 0.5, 1.0])
def test_nan_and_infinity_are_errors(tmp_path: Path, value: float, bad: str, base: float) -> None:
    a, b = small(1), small(2)
    (a if bad.startswith("a") else b)[CONV_IN][1, 2] = value
    paths = pair(tmp_path, a, b)
    used = bad.startswith("a") if base == 0 else bad.startswith("b") if base == 1 else True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DodgeburnWarning)
        if used:
            with pytest.raises(UserError, match=f"tensor {CONV_IN} of {bad} has NaN"):
                merge(*paths, tmp_path / "m.safetensors", base=base)
            assert left(tmp_path) == ["a.safetensors", "b.safetensors"]
        else:
            merge(*paths, tmp_path / "m.safetensors", base=base)


def test_overflow_is_an_error(tmp_path: Path) -> None:
    b = small(2, torch.float32)
    b[CONV_IN][0, 0] = 1e6
    paths = pair(tmp_path, small(1), b)
    with pytest.raises(UserError, match=f"{CONV_IN} of the result is too large for F16"):
        merge(*paths, tmp_path / "m.safetensors", base=0.9)
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_the_first_bad_tensor_is_named_at_any_number_of_threads(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dodgeburn.merge.tiles.TILE", 2)
    a = {k: torch.full_like(t, float("nan")) for k, t in small(1).items()}
    paths = pair(tmp_path, a, small(2))
    for threads in (1, 4):
        with pytest.raises(UserError, match=CONV_IN):
            merge(*paths, tmp_path / "m.safetensors", threads=threads)


# ---- bad input and trouble


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink", "b"])
def test_output_is_never_an_input(tmp_path: Path, link: str) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    out = {"itself": a, "b": b}.get(link, tmp_path / "m.safetensors")
    if link == "symlink":
        out.symlink_to(a)
    elif link == "hardlink":
        os.link(b, out)
    before = a.read_bytes(), b.read_bytes()
    with pytest.raises(UserError, match="also an input"):
        merge(a, b, out)
    assert (a.read_bytes(), b.read_bytes()) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"preset": "GradX"}, "GradX"),
        ({"base": 1.5}, "base"),
        ({"base": float("nan")}, "base"),
        ({"blocks": {"IN12": 0.5}}, "IN12"),
        ({"keep": "unet"}, "unet"),
        ({"method": "sum"}, "weighted_sum"),
        ({"xl_presets": "stretch"}, "stretch"),
        ({"threads": 0}, "threads"),
        ({"a": "none.safetensors"}, "none.safetensors does not exist"),
        ({"out": "no/such/folder/x.safetensors"}, "not a folder"),
    ],
)
def test_wrong_settings_write_nothing(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    settings = {"a": a, "b": b, "out": tmp_path / "m.safetensors", "preset": "GradV"} | change
    with pytest.raises(UserError, match=what):
        merge(**settings)
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    real, count = os.pwrite, 0

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="m.safetensors cannot be written: the disk is full"):
        merge(a, b, tmp_path / "m.safetensors")
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    a, b = pair(tmp_path, small(1), small(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="larger than the system allows"):
            merge(a, b, tmp_path / "m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        merge(a, b, tmp_path / "closed" / "m.safetensors")


def test_unwritable_place_even_for_root(tmp_path: Path) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    with pytest.raises(UserError, match="cannot be written"):
        merge(a, b, "/proc/m.safetensors")


def test_one_file_given_as_two_models_is_said(tmp_path: Path) -> None:
    a, b = pair(tmp_path, small(1), small(2))
    (tmp_path / "link.safetensors").symlink_to(a)
    with pytest.warns(DodgeburnWarning, match="models 1 and 3 are the same file, link.safetensors"):
        merge(a, b, tmp_path / "m.safetensors", method="average", more=[tmp_path / "link.safetensors"])
    assert "\nwarning: models 1 and 2 are the same file" in dry_run(a, a)[1]
    assert "\nwarning: no tensor takes anything from B" in dry_run(a, b, base=0)[1]
