"""Parents of every form give the bytes that their conversion to a single file would give."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from dodgeburn.checkpoint.metadata import recipe_of
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, save_tensors, sha256_file
from dodgeburn.errors import UserError
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.merge.run import MergeResult, merge
from dodgeburn.models.as_single_file import FolderAsFile, open_as_single_file
from dodgeburn.models.convert import convert
from dodgeburn.models.saving import save_diffusers_folder, save_single_file


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A and B as diffusers folders, and A as what `convert` makes of it, as shards and as a pickle."""
    folder = tmp_path_factory.mktemp("parents")
    for name, seed in (("a", 1), ("b", 2)):
        save_diffusers_folder(tiny_model(seed=seed), folder / name, dtype=torch.float16)
        convert(folder / name, folder / f"{name}.safetensors")
    tensors, metadata = load_tensors(folder / "a.safetensors"), read_header(folder / "a.safetensors").metadata
    names = list(tensors)
    places = {}
    for i, part in enumerate((names[:100], names[100:])):
        save_tensors(folder / f"a-{i}.safetensors", {n: tensors[n] for n in part}, metadata)
        places |= dict.fromkeys(part, f"a-{i}.safetensors")
    (folder / "a-shards.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({"state_dict": tensors}, folder / "a.ckpt")
    return {
        "file": folder / "a.safetensors",
        "folder": folder / "a",
        "shards": folder / "a-shards.safetensors",
        "index": folder / "a-shards.safetensors.index.json",
        "pickle": folder / "a.ckpt",
        "b": folder / "b.safetensors",
        "b folder": folder / "b",
    }


def merged(a: Path, b: Path, out: Path, method: str) -> MergeResult:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return merge(a, b, out, preset="Cosine", base=0.3, method=method, threads=2)


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
@pytest.mark.parametrize("form", ["folder", "shards", "index", "pickle"])
def test_every_form_merges_to_the_same_bytes(
    parents: dict[str, Path], tmp_path: Path, form: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dodgeburn.merge.tiles.TILE", 1 << 10)  # so that joined and transposed tensors are cut
    wanted = merged(parents["file"], parents["b"], tmp_path / "wanted.safetensors", method)
    other = parents["b folder"] if form == "folder" else parents["b"]
    found = merged(parents[form], other, tmp_path / "found.safetensors", method)
    one, two = read_header(tmp_path / "wanted.safetensors"), read_header(tmp_path / "found.safetensors")
    assert one.tensors == two.tensors
    assert found.sha256_tensors == wanted.sha256_tensors
    if form == "folder":
        assert found.recipe.a.file == "a" and two.metadata["dodgeburn.configs"] == one.metadata["dodgeburn.configs"]
    if form == "pickle":
        recipe = recipe_of(two.metadata)
        assert recipe is not None and recipe["a"]["sha256"] == sha256_file(parents["pickle"])


def test_a_folder_reads_as_its_conversion(parents: dict[str, Path]) -> None:
    wanted = load_tensors(parents["file"])
    with open_as_single_file(parents["folder"]) as source:
        assert isinstance(source, FolderAsFile) and set(source.keys()) == set(wanted)
        ops = {piece.move.op for piece in source.pieces.values()}
        assert {"join", "transpose", "unflatten"} <= ops
        for name, tensor in wanted.items():
            assert torch.equal(source.tensor(name), tensor), name
            raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            for begin in range(0, len(raw), step := max(2, len(raw) // 7)):
                part = memoryview(bytearray(min(step, len(raw) - begin)))
                source.read_into(name, begin, part)
                assert bytes(part) == raw[begin : begin + step], name
        with pytest.raises(UserError, match="has no tensor nothing"):
            source.info("nothing")


def test_folders_may_be_baked_into_and_compared(parents: dict[str, Path], tmp_path: Path) -> None:
    extract(parents["b folder"], parents["folder"], tmp_path / "d.safetensors", dtype="fp32")
    result = bake(parents["folder"], [(tmp_path / "d.safetensors", 1.0)], tmp_path / "m.safetensors")
    found, wanted = load_tensors(result.path), load_tensors(parents["b"])
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-10, atol=1e-6)


def test_a_hostile_pickle_and_an_incomplete_folder_are_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state_dict": Hostile()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="could run code"):
        merge(tmp_path / "bad.ckpt", parents["b"], tmp_path / "m.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model_index.json"):
        merge(tmp_path / "empty", parents["b"], tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="also an input"):
        merge(parents["folder"], parents["b"], parents["folder"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ckpt", "empty"]


def test_a_folder_has_the_hash_of_the_loaded_model(tmp_path: Path) -> None:
    from dodgeburn.models.loading import load_model

    save_diffusers_folder(tiny_model(seed=1), tmp_path / "a")
    save_single_file(tiny_model(seed=2), tmp_path / "b.safetensors")
    result = merge(tmp_path / "a", tmp_path / "b.safetensors", tmp_path / "m.safetensors")
    assert result.recipe.a.sha256 == load_model(tmp_path / "a", "cpu").sha256
