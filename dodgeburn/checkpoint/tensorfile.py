"""safetensors files: tensors read one at a time or in pieces, files written atomically, hashes.

Reading headers and hashing needs no torch; only `TensorFile.tensor`, `load_tensors` and `save_tensors`
import it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dodgeburn.checkpoint.atomic import atomic_path, check_output, explain, open_part, sync_folder, write_atomic
from dodgeburn.checkpoint.header import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    MAX_HEADER,
    Header,
    TensorInfo,
    dtype_name,
    header_of,
    open_to_read,
    pread_into,
    read_header,
    tensor_bytes,
    torch_dtype,
)
from dodgeburn.checkpoint.opened import Tensors
from dodgeburn.checkpoint.running_hash import RunningHash
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "Header",
    "TensorFile",
    "TensorInfo",
    "TensorWriter",
    "atomic_path",
    "byte_view",
    "check_output",
    "dtype_name",
    "load_tensors",
    "read_header",
    "save_tensors",
    "sha256_file",
    "sha256_tensors",
    "tensor_bytes",
    "torch_dtype",
    "write_atomic",
]


def byte_view(flat: torch.Tensor) -> memoryview:
    """The bytes of a flat contiguous CPU tensor, without a copy; writable."""
    import torch

    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


class TensorFile(Tensors):
    """A safetensors file opened for reading; a context manager. Safe to read from several threads at once."""

    def __init__(self, path: str | Path) -> None:
        """Open and check the header; raises UserError like read_header."""
        self.path = Path(path)
        self._fd = open_to_read(self.path)
        try:
            self.header = header_of(self._fd, self.path)
        except BaseException:
            os.close(self._fd)
            raise
        self._stamp = stamp(os.fstat(self._fd))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        info = self.span(name, offset, buffer)
        pread_into(self._fd, self.header.data_start + info.start + offset, buffer, self.path)

    def bytes(self, name: str) -> memoryview:
        """All bytes of a tensor."""
        buffer = memoryview(bytearray(self.info(name).nbytes))
        self.read_into(name, 0, buffer)
        return buffer

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        info = self.info(name)
        flat = torch.empty(info.numel, dtype=torch_dtype(info.dtype))
        if info.nbytes:
            self.read_into(name, 0, byte_view(flat))
        return flat.reshape(info.shape)

    def check_unchanged(self) -> None:
        # By its name too: the hash in a recipe is of what has the name.
        if not stamp(os.fstat(self._fd)) == self._stamp == stamp_of(self.path):
            raise UserError(f"{self.path} was changed while it was being read: try again when it is complete")


def stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another: disk, inode, size, time of change."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def stamp_of(path: Path) -> tuple[int, ...]:
    """The stamp of the file that has this name now; empty if there is none."""
    try:
        return stamp(path.stat())
    except OSError:
        return ()


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, in file order."""
    with TensorFile(path) as file:
        return {name: file.tensor(name) for name in file.keys()}


# -------------------- writing


def check_weights_output(path: str | Path, inputs: Sequence[str | Path] = ()) -> Path:
    """`check_output` for a file of weights; UserError as well for a name that does not end in .safetensors.
    Other programs go by the ending: they do not list a file without one, and would unpickle a .ckpt."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors" and not path.is_dir():
        name = path.stem if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".gguf") else path.name
        raise UserError(f"{path}: what is written is a safetensors file, name it so: {name}.safetensors")
    return check_output(path, inputs)


class TensorWriter:
    """Writes a safetensors file whose names, dtypes and shapes are known beforehand; a context manager.

    The exact header is written first, so tensors may arrive in any order, in pieces, from any thread: the
    bytes of the file depend on what is written only. Tensors lie in the order given, wider dtypes first (so
    that every tensor is aligned). The file appears under its name when the block ends without an exception
    and every byte was written.

    Raises UserError if the output is one of `inputs`, its folder is missing or unwritable, or the disk is
    full.
    """

    def __init__(
        self,
        path: str | Path,
        infos: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str],
        inputs: Sequence[str | Path] = (),
    ) -> None:
        self.path = Path(path)
        self._target = check_output(path, inputs)
        self.infos = _place(infos)
        self._entries = _encode_entries(self.infos)
        self._head = head = _encode_header(self._entries, metadata)
        self.data_start = len(head)
        self._total = sum(info.nbytes for info in self.infos.values())
        self._written = 0
        self._lock = threading.Lock()
        self._hash: RunningHash | None = None
        try:
            self._fd, self._part = open_part(self._target)
        except OSError as error:
            raise explain(error, self.path) from None
        try:
            self._reserve(self.data_start + self._total)
            # The length of the header comes last: until then no program takes the file for a checkpoint.
            self._pwrite(head[8:], 8)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _reserve(self, size: int) -> None:
        # A full disk is better found now than after an hour. Not every system can reserve: then writing
        # finds out.
        if not hasattr(os, "posix_fallocate") or size == 0:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise explain(error, self.path) from None

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                raise explain(error, self.path) from None

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of tensor `name` from byte `offset` of it on; every byte exactly once. Thread-safe."""
        info = self.infos[name]
        if offset < 0 or offset + len(data) > info.nbytes:
            raise ValueError(f"bytes {offset}..{offset + len(data)} lie outside tensor {name}")
        self._pwrite(data, self.data_start + info.start + offset)
        with self._lock:
            self._written += len(data)
        if self._hash is not None:
            start = self.data_start + info.start + offset
            self._hash.written(start, start + len(data))

    def hash_meanwhile(self) -> None:
        """Hash the tensors in the background from now on, before the first is written: for sha256_tensors at the end,
        worth a thread where writing takes long.
        """
        if self._hash is None and self._written == 0 and hasattr(os, "preadv"):
            self._hash = RunningHash(self._fd, self.data_start, self.data_start + self._total)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a tensor that were written."""
        pread_into(self._fd, self.data_start + self.infos[name].start + offset, buffer, self._part)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Put other metadata, at most as long as the first when encoded, into the header.

        For hashes that are known only at the end; what is left of the space is filled with blanks.
        """
        self._head = _encode_header(self._entries, metadata, self.data_start)
        self._pwrite(self._head[8:], 8)

    def sha256_tensors(self, progress: Callable[[int], object] | None = None) -> str:
        """sha256 (hex) of all bytes after the header, read back from the unfinished file."""
        if self._hash is not None:
            try:
                return self._hash.hexdigest()
            except OSError as error:
                raise UserError(f"{self._part} cannot be read: {error.strerror or error}") from None
        return _sha256_fd(self._fd, self.data_start, self._part, progress)

    def commit(self) -> None:
        """Flush, check that the file reads back as intended, and give it its name."""
        try:
            if self._written != self._total:
                raise RuntimeError(f"{self._written} of {self._total} bytes were written to {self.path}")
            if self._hash is not None:
                self._hash.stop()
            os.fsync(self._fd)
            self._pwrite(self._head[:8], 0)
            os.fsync(self._fd)
            found = bytearray(self.data_start)
            pread_into(self._fd, 0, memoryview(found), self._part)
            if found != self._head:
                raise UserError(f"{self.path} did not read back as written: the disk may be faulty")
            os.close(self._fd)
            self._fd = -1
            os.replace(self._part, self._target)
        except OSError as error:
            self.abort()
            raise explain(error, self.path) from None
        except BaseException:
            self.abort()
            raise
        sync_folder(self._target.parent)

    def abort(self) -> None:
        """Close and remove what was written so far."""
        if self._hash is not None:
            self._hash.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._part.unlink(missing_ok=True)


def _place(infos: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, TensorInfo]:
    # Wider dtypes first keeps every tensor aligned to its own width, which readers that map files rely on.
    names = sorted(infos, key=lambda name: -DTYPE_BITS[infos[name][0]])
    placed: dict[str, TensorInfo] = {}
    position = 0
    for name in names:
        dtype, shape = infos[name]
        end = position + tensor_bytes(dtype, shape)
        placed[name] = TensorInfo(dtype, tuple(shape), position, end)
        position = end
    return placed


def _encode_entries(infos: Mapping[str, TensorInfo]) -> bytes:
    """The tensors' part of a header: what stands between its outer braces."""
    if "__metadata__" in infos:
        raise ValueError("a tensor cannot be named __metadata__")
    entries = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
        for name, info in infos.items()
    }
    return _json(entries)[1:-1]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _encode_header(entries: bytes, metadata: Mapping[str, str], size: int = 0) -> bytes:
    """Length and header, filled with blanks to `size` bytes in all, or to a multiple of 8 if there is no
    size.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata {key!r} must be text, not {type(value).__name__}")
    parts = [_json({"__metadata__": dict(metadata)})[1:-1]] if metadata else []
    text = b"{" + b",".join([*parts, *([entries] if entries else [])]) + b"}"
    text += b" " * (size - 8 - len(text) if size else -len(text) % 8)
    if size and len(text) + 8 != size:
        raise ValueError(f"the replacement header takes {len(text) + 8} bytes, the first has only {size}")
    if len(text) > MAX_HEADER:
        raise UserError(f"the header would take {len(text):,} bytes (limit {MAX_HEADER:,}): shorten the metadata")
    return struct.pack("<Q", len(text)) + text


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write tensors (any device, any strides) with metadata to a file, atomically. `format: pt` is added."""
    infos = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(path, infos, {"format": "pt", **metadata}, inputs) as writer:
        for name, tensor in tensors.items():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                writer.write(name, 0, byte_view(flat))


# -------------------- hashing


def _sha256_fd(fd: int, start: int, path: Path, progress: Callable[[int], object] | None = None) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    position = start
    while True:
        try:
            count = os.preadv(fd, [view], position)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if count == 0:
            return digest.hexdigest()
        digest.update(view[:count])
        position += count
        if progress is not None:
            progress(count)


def sha256_file(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """sha256 (hex) of the whole file; its first 10 digits are A1111's model hash and Civitai's AutoV2.

    `progress` is called with the number of bytes after each piece; an exception from it ends the reading.
    """
    path = Path(path)
    fd = open_to_read(path)
    try:
        return _sha256_fd(fd, 0, path, progress)
    finally:
        os.close(fd)


def sha256_tensors(path: str | Path) -> str:
    """sha256 (hex) of all bytes after the header: ModelSpec's hash without 0x, and Civitai's AutoV3.

    It does not change when only metadata changes.
    """
    path = Path(path)
    fd = open_to_read(path)
    try:
        return _sha256_fd(fd, header_of(fd, path).data_start, path)
    finally:
        os.close(fd)
