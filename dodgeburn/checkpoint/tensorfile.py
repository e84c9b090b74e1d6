"""safetensors files: tensors read one at a time or in pieces, files written atomically, hashes.

Reading headers and hashing needs no torch; only `TensorFile.tensor`, `load_tensors` and `save_tensors`
import it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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


class TensorFile:
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
        self._stamp = self._stat()

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def keys(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.header.tensors)

    def info(self, name: str) -> TensorInfo:
        """The tensor's entry; UserError if the file has none of that name."""
        try:
            return self.header.tensors[name]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {name}") from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with the tensor's bytes from `offset` on."""
        info = self.info(name)
        if offset < 0 or offset + len(buffer) > info.nbytes:
            raise ValueError(f"bytes {offset}..{offset + len(buffer)} lie outside tensor {name}")
        pread_into(self._fd, self.header.data_start + info.start + offset, buffer, self.path)

    def bytes(self, name: str) -> memoryview:
        """All bytes of a tensor."""
        buffer = memoryview(bytearray(self.info(name).nbytes))
        self.read_into(name, 0, buffer)
        return buffer

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, in memory of its own (CPU)."""
        import torch

        info = self.info(name)
        flat = torch.empty(info.numel, dtype=torch_dtype(info.dtype))
        if info.nbytes:
            self.read_into(name, 0, byte_view(flat))
        return flat.reshape(info.shape)

    def check_unchanged(self) -> None:
        """UserError if the file was changed since it was opened."""
        if self._stat() != self._stamp:
            raise UserError(f"{self.path} was changed while it was being read: try again when it is complete")


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, in file order."""
    with TensorFile(path) as file:
        return {name: file.tensor(name) for name in file.keys()}


# -------------------- writing


def _explain(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path} cannot be written: the disk is full; free some space or write elsewhere")
    if error.errno == errno.EFBIG:
        return UserError(f"{path} cannot be written: the file would be larger than the system allows")
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def check_output(path: str | Path, inputs: Sequence[str | Path] = ()) -> Path:
    """The real path to write to, after following links; UserError if it is a folder, in no folder, or one
    of `inputs`.

    The same file under another name (symbolic or hard link) counts as an input too.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"{path} is not a file name to write to")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"{path} is a folder: expected the name of a file to write")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is not a folder: make it first, or write {path.name} elsewhere")
    for source in inputs:
        same = os.path.realpath(source) == str(target)
        if not same and target.exists() and Path(source).exists():
            same = os.path.samefile(source, target)
        if same:
            raise UserError(f"{path} is also an input ({source}): choose another output name")
    return target


def _temporary(target: Path) -> Path:
    # Short and in the same folder: a rename must not cross disks, and long names must not grow past 255
    # bytes.
    return target.parent / f".dodgeburn-{os.getpid()}-{secrets.token_hex(4)}.part"


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open folders; the file itself is on disk already
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: str | Path, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, removed if anything went
    wrong.

    Raises UserError for an output that is an input, an unwritable folder and a full disk.
    """
    target = check_output(path, inputs)
    part = _temporary(target)
    try:
        yield part
        fd = os.open(part, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        # Only trouble with our own file is ours to explain; anything else happened inside the caller's block.
        if error.filename in (None, str(part), str(target)):
            raise _explain(error, Path(path)) from None
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write bytes to a file so that it is either complete or not there; UserError as in atomic_path."""
    with atomic_path(path) as part:
        part.write_bytes(data)


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
        self._metadata = dict(metadata)
        head = _encode_header(self.infos, self._metadata)
        self.data_start = len(head)
        self._total = sum(info.nbytes for info in self.infos.values())
        self._written = 0
        self._lock = threading.Lock()
        self._part = _temporary(self._target)
        try:
            self._fd = os.open(
                self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
            )
        except OSError as error:
            raise _explain(error, self.path) from None
        try:
            self._reserve(self.data_start + self._total)
            self._pwrite(head, 0)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
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
                raise _explain(error, self.path) from None

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                raise _explain(error, self.path) from None

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of tensor `name` from byte `offset` of it on; every byte exactly once. Thread-safe."""
        info = self.infos[name]
        if offset < 0 or offset + len(data) > info.nbytes:
            raise ValueError(f"bytes {offset}..{offset + len(data)} lie outside tensor {name}")
        self._pwrite(data, self.data_start + info.start + offset)
        with self._lock:
            self._written += len(data)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a tensor that were written."""
        pread_into(self._fd, self.data_start + self.infos[name].start + offset, buffer, self._part)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Put other metadata, at most as long as the first when encoded, into the header.

        For hashes that are known only at the end; what is left of the space is filled with blanks.
        """
        head = _encode_header(self.infos, metadata, self.data_start)
        self._metadata = dict(metadata)
        self._pwrite(head, 0)

    def sha256_tensors(self, progress: Callable[[int], object] | None = None) -> str:
        """sha256 (hex) of all bytes after the header, read back from the unfinished file."""
        return _sha256_fd(self._fd, self.data_start, self._part, progress)

    def commit(self) -> None:
        """Flush, check that the file reads back as intended, and give it its name."""
        try:
            if self._written != self._total:
                raise RuntimeError(f"{self._written} of {self._total} bytes were written to {self.path}")
            os.fsync(self._fd)
            header = header_of(self._fd, self._part)
            if header.tensors != {n: i for n, i in self.infos.items()} or header.metadata != self._metadata:
                raise UserError(f"{self.path} did not read back as written: the disk may be faulty")
            os.close(self._fd)
            self._fd = -1
            os.replace(self._part, self._target)
        except OSError as error:
            self.abort()
            raise _explain(error, self.path) from None
        except BaseException:
            self.abort()
            raise
        _sync_folder(self._target.parent)

    def abort(self) -> None:
        """Close and remove what was written so far."""
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


def _encode_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """Length and header, filled with blanks to `size` bytes in all, or to a multiple of 8 if there is no
    size.
    """
    entries: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata {key!r} must be text, not {type(value).__name__}")
        entries["__metadata__"] = dict(metadata)
    for name, info in infos.items():
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__")
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (size - 8 - len(text) if size else -len(text) % 8)
    if size and len(text) + 8 != size:
        raise ValueError(f"the replacement header takes {len(text) + 8} bytes, the first has only {size}")
    if len(text) > MAX_HEADER:
        raise UserError(
            f"the header would take {len(text):,} bytes (limit {MAX_HEADER:,}): shorten the metadata"
        )
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
