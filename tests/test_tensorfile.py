"""safetensors files: ours are readable by others, writes are all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dodgeburn.checkpoint.tensorfile import (
    TensorFile,
    TensorWriter,
    atomic_path,
    load_tensors,
    read_header,
    save_tensors,
    sha256_file,
    sha256_tensors,
    write_atomic,
)
from dodgeburn.errors import UserError


def every_dtype() -> dict[str, torch.Tensor]:
    return {
        "half": torch.randn(3, 5).half(),
        "bfloat": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 3, 4),
        "double": torch.randn(3).double(),
        "ids": torch.arange(77).reshape(1, 77),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "eight": torch.randn(9).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "turned": torch.randn(4, 6).T,
    }


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )  # fmt: skip


def test_written_files_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = every_dtype()
    save_tensors(tmp_path / "ours", tensors, {"note": "größer"})
    theirs = load_file(tmp_path / "ours")
    ours = load_tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys() == tensors.keys()
    assert all(equal(tensors[k], theirs[k]) and equal(tensors[k], ours[k]) for k in tensors)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "größer"}
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    again = load_tensors(tmp_path / "theirs")
    assert all(equal(tensors[k], again[k]) for k in tensors)


def test_tensors_are_aligned_to_their_width(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(1).double()}, {})
    header = read_header(tmp_path / "x")
    assert header.data_start % 8 == 0 and header.tensors["wide"].start % 8 == 0


def test_pieces_in_any_order(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    with TensorWriter(tmp_path / "x", {"t": ("F32", (10,))}, {}) as writer:
        writer.write("t", 20, values[5:].tobytes())
        writer.write("t", 0, values[:5].tobytes())
    with TensorFile(tmp_path / "x") as file:
        assert bytes(file.bytes("t")) == values.tobytes()
        assert torch.equal(file.tensor("t"), torch.arange(10.0))
        with pytest.raises(UserError, match="no tensor u"):
            file.tensor("u")


def test_hashes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"t": torch.arange(4.0)}, {"a": "1"})
    save_tensors(tmp_path / "y", {"t": torch.arange(4.0)}, {"a": "2"})
    assert sha256_tensors(tmp_path / "x") == sha256_tensors(tmp_path / "y")
    assert sha256_tensors(tmp_path / "x") == hashlib.sha256(torch.arange(4.0).numpy().tobytes()).hexdigest()
    assert sha256_file(tmp_path / "x") == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert sha256_file(tmp_path / "x") != sha256_file(tmp_path / "y")


def test_metadata_replaced_in_place_never_grows(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", {"t": ("U8", (1,))}, {"hash": "0" * 64}) as writer:
        writer.write("t", 0, b"!")
        with pytest.raises(ValueError, match="has only"):
            writer.replace_metadata({"hash": "0" * 640})
        writer.replace_metadata({"hash": ""})
        writer.replace_metadata({"hash": writer.sha256_tensors()})
    assert read_header(tmp_path / "x").metadata["hash"] == hashlib.sha256(b"!").hexdigest()


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_incomplete_writes_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0 of 4 bytes"):
        with TensorWriter(tmp_path / "x", {"t": ("F32", (1,))}, {}):
            pass
    with pytest.raises(KeyboardInterrupt):
        with TensorWriter(tmp_path / "x", {"t": ("F32", (1,))}, {}) as writer:
            writer.write("t", 0, bytes(4))
            raise KeyboardInterrupt
    assert only(tmp_path) == []


def test_a_part_is_no_checkpoint_before_it_is_complete(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    with TensorWriter(tmp_path / "x", {"t": ("F32", (1,))}, {}) as writer:
        writer.write("t", 0, bytes(4))
        writer.replace_metadata({})
        (part,) = tmp_path.iterdir()
        with pytest.raises(SafetensorError):
            safe_open(str(part), "pt")
        with pytest.raises(UserError, match="broken header"):
            read_header(part)
    assert read_header(tmp_path / "x").tensors["t"].shape == (1,)


def test_parts_of_killed_runs_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    abandoned = tmp_path / ".dodgeburn-1-0.part"
    abandoned.write_bytes(bytes(100))
    (tmp_path / ".dodgeburn-2-0.part").mkdir()  # a folder that another run is filling
    (tmp_path / ".dodgeburn-3-0.tmp").write_bytes(b"")
    with TensorWriter(tmp_path / "x", {"t": ("F32", (1,))}, {}) as writer:
        assert not abandoned.exists()
        save_tensors(tmp_path / "y", {"t": torch.ones(1)}, {})
        writer.write("t", 0, bytes(4))
    assert only(tmp_path) == [".dodgeburn-2-0.part", ".dodgeburn-3-0.tmp", "x", "y"]


def test_an_older_file_survives_a_failure(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"t": torch.ones(1)}, {})
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "x", {"t": torch.zeros(1)}, {"a": 1})  # type: ignore[dict-item]
    assert (tmp_path / "x").read_bytes() == before and only(tmp_path) == ["x"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="x cannot be written: .*(disk is full|Input/output)"):
        save_tensors(tmp_path / "x", {"t": torch.ones(1)}, {})
    assert only(tmp_path) == []


def test_disk_full_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="disk is full"):
        save_tensors(tmp_path / "x", {"t": torch.ones(1)}, {})
    assert only(tmp_path) == []


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder"):
        save_tensors(tmp_path, {}, {})
    with pytest.raises(UserError, match="no/such is not a folder"):
        save_tensors(tmp_path / "no" / "such" / "x", {}, {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        save_tensors(tmp_path / "file" / "x", {}, {})
    with pytest.raises(UserError, match="cannot be written"):
        save_tensors("/proc/x.safetensors", {}, {})


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink", "input is a symlink", "dots"])
def test_an_output_is_never_an_input(tmp_path: Path, link: str) -> None:
    source, out = tmp_path / "a", tmp_path / "b"
    save_tensors(source, {"t": torch.ones(1)}, {})
    before = source.read_bytes()
    if link == "itself":
        out = source
    elif link == "dots":
        out = tmp_path / ".." / tmp_path.name / "a"
    elif link == "symlink":
        out.symlink_to(source)
    elif link == "hardlink":
        os.link(source, out)
    else:
        out.symlink_to(source)
        source, out = out, source
    with pytest.raises(UserError, match="also an input"):
        save_tensors(out, {"t": torch.zeros(1)}, {}, inputs=[source])
    assert (tmp_path / "a").read_bytes() == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "real" / "x")
    save_tensors(tmp_path / "x", {"t": torch.ones(1)}, {})
    assert (tmp_path / "x").is_symlink() and only(tmp_path / "real") == ["x"]


def test_atomic_path(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"one")
    with pytest.raises(ZeroDivisionError):
        with atomic_path(tmp_path / "x") as part:
            part.write_bytes(b"two")
            raise ZeroDivisionError
    assert (tmp_path / "x").read_bytes() == b"one" and only(tmp_path) == ["x"]
    write_atomic(tmp_path / "x", b"three")
    assert (tmp_path / "x").read_bytes() == b"three" and only(tmp_path) == ["x"]
    with pytest.raises(UserError, match="not a folder"):
        write_atomic(tmp_path / "none" / "x", b"")
    with pytest.raises(FileNotFoundError):  # trouble with other files is not called trouble with ours
        with atomic_path(tmp_path / "x"):
            (tmp_path / "elsewhere").read_bytes()


def test_a_file_changed_while_open_is_noticed(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"t": torch.ones(4)}, {})
    with TensorFile(tmp_path / "x") as file:
        file.check_unchanged()
        with open(tmp_path / "x", "ab") as other:
            other.write(b"more")
        with pytest.raises(UserError, match="changed"):
            file.check_unchanged()
    save_tensors(tmp_path / "x", {"t": torch.ones(4)}, {})
    with TensorFile(tmp_path / "x") as file:
        save_tensors(tmp_path / "x", {"t": torch.ones(4)}, {})  # another file under the same name
        with pytest.raises(UserError, match="changed"):
            file.check_unchanged()
