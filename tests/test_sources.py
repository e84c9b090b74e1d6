"""Shards and pickles: read as one checkpoint, hostile ones refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dodgeburn.checkpoint.sources import files_of, open_tensors, sha256_source, weights_in
from dodgeburn.checkpoint.tensorfile import save_tensors, sha256_file
from dodgeburn.errors import DodgeburnWarning, UserError

TENSORS = {f"layer.{i}": torch.randn(4, i + 1, generator=torch.Generator().manual_seed(i)) for i in range(6)}


def write_shards(folder: Path, places: dict[str, str] | None = None) -> Path:
    names = list(TENSORS)
    files = {"m-00001-of-00002.safetensors": names[:3], "m-00002-of-00002.safetensors": names[3:]}
    for file, inside in files.items():
        save_tensors(folder / file, {name: TENSORS[name] for name in inside}, {})
    whole = {name: file for file, inside in files.items() for name in inside}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": whole if places is None else places}))
    return index


def same(source: Any) -> None:
    assert set(source.keys()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)
        part = bytearray(8)
        source.read_into(name, 4, memoryview(part))
        assert bytes(part) == tensor.numpy().tobytes()[4:12]


def test_shards_read_as_one(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for name in (index, tmp_path / "m.safetensors"):
        with open_tensors(name) as source:
            same(source)
            assert len(files_of(source)) == 3
            assert sha256_source(source) != sha256_file(index)
    assert weights_in(tmp_path) == index


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "c:x", "..", "", "x.index.json", 3, None],
)
def test_path_tricks_in_an_index_are_refused(tmp_path: Path, file: object) -> None:
    save_tensors(tmp_path.parent / "secret.safetensors", {"layer.0": TENSORS["layer.0"]}, {})
    index = write_shards(tmp_path, {"layer.0": file})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="plain file names beside the index"):
        open_tensors(index)


def test_indexes_that_do_not_fit(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    good = json.loads(index.read_text())["weight_map"]

    def refused(content: str, message: str) -> None:
        index.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            open_tensors(index)
        assert "\n" not in str(caught.value)

    refused(
        json.dumps({"weight_map": {k: v for k, v in good.items() if k != "layer.0"}}), "layer.0, which the index has"
    )
    refused(json.dumps({"weight_map": good | {"layer.9": good["layer.0"]}}), "layer.9")
    refused(json.dumps({"weight_map": good | {"layer.0": good["layer.5"]}}), "layer.0")
    refused(json.dumps({"weight_map": {"layer.0": "none.safetensors"}}), "none.safetensors does not exist")
    refused("[]", "no weight_map")
    refused("{", "not valid JSON")
    refused("[" * 100_000, "not valid JSON")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False])
def test_pickles_of_tensors_are_read(tmp_path: Path, zipped: bool, nested: bool) -> None:
    content: dict[str, Any] = {"state_dict": TENSORS, "epoch": 3} if nested else TENSORS
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    with open_tensors(tmp_path / "m.ckpt") as source:
        same(source)
        source.check_unchanged()
        assert sha256_source(source) == sha256_file(tmp_path / "m.ckpt")


def test_entries_that_are_no_tensors_are_counted(tmp_path: Path) -> None:
    torch.save({**TENSORS, "step": 7}, tmp_path / "m.pt")
    with (
        pytest.warns(DodgeburnWarning, match="1 entries that are not tensors"),
        open_tensors(tmp_path / "m.pt") as source,
    ):
        same(source)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("way", ["torch zip", "torch legacy", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, way: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    content = {"state_dict": {"w": Evil(mark)}}
    if way == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch zip")
    # A pickle of newer protocol is refused at its first instruction, before it names what it wants to run.
    what = "" if way == "plain pickle" else "system.*"
    with pytest.raises(UserError, match=f"could run code.*{what}refused") as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value) and not mark.exists()


def test_damaged_pickles_are_one_line(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "m.ckpt")
    whole = (tmp_path / "m.ckpt").read_bytes()
    for cut in (5, 40, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.ckpt").write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            open_tensors(tmp_path / "cut.ckpt")
        assert "\n" not in str(caught.value) and "cut.ckpt" in str(caught.value)
    torch.save(TENSORS, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.ckpt").read_bytes()
    for cut in range(1, len(whole) - 1, 7):
        (tmp_path / "cut.ckpt").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.ckpt"):
            open_tensors(tmp_path / "cut.ckpt")
    for content, message in (([1, 2], "expected tensors by name"), ({"a": 1}, "no tensors"), ({}, "no tensors")):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path / "odd.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="sparse"):
        open_tensors(tmp_path / "sparse.pt")


def test_which_weights_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        weights_in(tmp_path)
    for better in ("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors"):
        (tmp_path / better).touch()
        assert weights_in(tmp_path).name == better
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").touch()
    assert weights_in(tmp_path).name == "model.safetensors"
