"""Merges of a loaded model are those of the files, bit for bit, and can be taken back."""

from pathlib import Path

import pytest
import torch
from compare_pair import live_merge, same, tiny_pair, weights
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.merge.run import merge
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_diffusers_folder, save_single_file


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("keep", [("text", "vae"), ()])
def test_live_model_is_the_written_and_reloaded_file_bit_for_bit(pair, tmp_path, keep) -> None:
    a, b = pair
    model = load_model(a, "cpu")
    before = weights(model)
    live = live_merge(model, b)
    for preset, base in (("ReverseSmoothstep", 0.4), ("Wrap2", 1.0), ("GradV", 0.0)):
        live.apply(live.plan(MergeSettings(preset=preset, base=base, keep=keep)))
        merge(a, b, tmp_path / "m.safetensors", preset=preset, base=base, keep=keep)
        written = load_model(tmp_path / "m.safetensors", "cpu", tokenizer=a.parent / "tokenizer")
        assert same(weights(model), weights(written))
        assert not same(weights(model), before)
    live.restore()
    assert same(weights(model), before)


def test_all_shares_one_is_b_and_only_what_changes_is_touched(pair) -> None:
    a, b = pair
    model, other = load_model(a, "cpu"), load_model(b, "cpu")
    live = live_merge(model, b)
    assert live.apply(live.plan(MergeSettings(base=1.0))) == set(model.components())
    assert same(weights(model), weights(other))
    assert live.apply(live.plan_b()) == set()
    assert live.apply(live.plan(MergeSettings(base=1.0, blocks={"IN03": 0.5}))) == {"unet"}
    touched: list[str] = []
    live.apply(live.plan(MergeSettings(base=1.0, blocks={"IN04": 0.5})), touched.append)
    assert {model.layout.block(name) for name in touched} == {"IN03", "IN04"}


def test_folders_merge_like_files_and_stay_as_they_are(pair, tmp_path) -> None:
    a, b = pair
    save_diffusers_folder(load_model(a, "cpu"), tmp_path / "folder")
    model = load_model(tmp_path / "folder", "cpu")
    before = weights(model)
    live = live_merge(model, b)
    live.apply(live.plan(MergeSettings(preset="Cosine", base=0.5)))
    merge(tmp_path / "folder", b, tmp_path / "m.safetensors", preset="Cosine", base=0.5)
    written = load_model(tmp_path / "m.safetensors", "cpu", tokenizer=a.parent / "tokenizer")
    assert same(weights(model), weights(written))
    live.restore()
    assert same(weights(model), before)


def test_nan_in_b_is_an_error_and_leaves_a(pair, tmp_path) -> None:
    a, _ = pair
    broken = tiny_model(seed=2)
    broken.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = float("nan")
    save_single_file(broken, tmp_path / "nan.safetensors", dtype=torch.float16)
    model = load_model(a, "cpu")
    before = weights(model)
    live = live_merge(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="middle_block.0.*nan.safetensors"):
        live.apply(live.plan(MergeSettings(preset="Flat_25", base=0.5, keep=("text", "vae"))))
    assert same(weights(model), before)
