"""Trouble in the middle of a run, for everything that writes checkpoints: an input that changes, a full disk, SIGKILL.

After each the inputs are as they were, an older file under the output's name is untouched, and nothing is left behind.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import configs, single_file

from dodgeburn.checkpoint.metadata import CONFIGS
from dodgeburn.checkpoint.tensorfile import TensorWriter, read_header, save_tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.merge.run import merge
from dodgeburn.models.convert import ConvertSettings, convert

VERBS = ("merge", "bake", "convert", "delta")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    for name, seed in (("a", 1), ("b", 2)):
        save_tensors(folder / f"{name}.safetensors", single_file("sdxl", seed), {CONFIGS: json.dumps(configs("sdxl"))})
    extract(folder / "b.safetensors", folder / "a.safetensors", folder / "delta.safetensors", "full")
    save_tensors(folder / "out.safetensors", {"older": torch.ones(3)}, {})
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a.safetensors, b.safetensors and their delta, and an older output."""
    for path in template.iterdir():
        shutil.copy(path, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path


def run(verb: str, place: Path) -> None:
    a, b, out = (place / f"{name}.safetensors" for name in ("a", "b", "out"))
    if verb == "merge":
        merge(a, b, out, base=0.4)
    elif verb == "bake":
        bake(a, [(place / "delta.safetensors", 0.5)], out)
    elif verb == "convert":
        convert(a, out, ConvertSettings(dtype="bf16"))
    else:
        extract(b, a, out, "full", dtype="fp32")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("verb", VERBS)
def test_jobs_succeed_when_nothing_happens(verb: str, place: Path) -> None:
    before = contents(place)
    run(verb, place)
    after = contents(place)
    assert after.pop("out.safetensors") != before.pop("out.safetensors") and after == before
    assert len(read_header(place / "out.safetensors").tensors) > 100


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"!!")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewrite,
    "longer": lambda path: path.open("ab").write(b"more"),
    "cut": lambda path: os.truncate(path, 60_000),
    "replaced": replace,
    "removed": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", VERBS)
def test_an_input_that_changes_meanwhile(verb: str, change: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = TensorWriter.write, []

    def changing(self: TensorWriter, name: str, offset: int, data: Any) -> None:
        write(self, name, offset, data)
        if not done:
            done.append(name)
            CHANGES[change](place / "a.safetensors")

    before = contents(place)
    monkeypatch.setattr(TensorWriter, "write", changing)
    with pytest.raises(UserError, match=r"a.safetensors (was changed while|ended early)") as caught:
        run(verb, place)
    assert done and "\n" not in str(caught.value)
    after = contents(place)
    for files in (before, after):
        files.pop("a.safetensors", None)  # ours to change here, not theirs
    assert after == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("limit", [1_000, 150_000])
def test_a_real_limit_of_size(verb: str, limit: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, where space can be reserved, and in the middle of writing, where it cannot."""
    resource = pytest.importorskip("resource")
    before = contents(place)
    if limit > 1_000:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(UserError, match="out.safetensors cannot be written: .*larger than the system allows"):
            run(verb, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(place) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("when", [0, 3, 100])
def test_a_disk_that_fills_up(verb: str, when: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.pwrite, 0

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > when:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    before = contents(place)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="out.safetensors cannot be written: the disk is full"):
        run(verb, place)
    monkeypatch.undo()
    assert contents(place) == before


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c(verb: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = TensorWriter.write, 0

    def interrupted(self: TensorWriter, name: str, offset: int, data: Any) -> None:
        nonlocal count
        count += 1
        if count > 20:
            raise KeyboardInterrupt
        write(self, name, offset, data)

    before = contents(place)
    monkeypatch.setattr(TensorWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(verb, place)
    assert contents(place) == before


@pytest.mark.parametrize("verb", ["merge", "bake", "delta"])
def test_nan_in_an_input(verb: str, place: Path) -> None:
    tensors = single_file("sdxl", 1)
    name = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    tensors[name][0] = float("nan")
    save_tensors(place / "a.safetensors", tensors, {CONFIGS: json.dumps(configs("sdxl"))})
    before = contents(place)
    with pytest.raises(UserError, match=f"{name}.*(NaN|infinite)"):
        run(verb, place)
    assert contents(place) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_sigkill_at_random_moments() -> None:
    """The benchmark's trial, a few times; 50 times for each of the four verbs is for the benchmark."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_merge.py"
    done = subprocess.run(
        [sys.executable, str(script), "--times", "4", "--verb", "merge", "--json"],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["merge"]["clean"] == 4 and not found["merge"]["problems"]
