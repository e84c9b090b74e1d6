"""Where tensors come from: one .safetensors file, a sharded one with its index, or a pickle that is read safely.

All three look like a `TensorFile`: a checked header, and each tensor or part of one when asked for. A pickle (.ckpt,
.pt, .pth, .bin) is read by `torch.load(weights_only=True)` only, which builds tensors and plain containers and refuses
everything else, so nothing in the file can run.
"""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dodgeburn.checkpoint.hash_cache import cached
from dodgeburn.checkpoint.header import Header, TensorInfo, bounded_json, dtype_name, tensor_bytes
from dodgeburn.checkpoint.opened import Tensors
from dodgeburn.checkpoint.tensorfile import TensorFile, byte_view, sha256_file, stamp_of
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    import torch

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_INDEX = 100_000_000  # bytes; as long as the longest header
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_REFUSED = re.compile(r"(?:GLOBAL|[Gg]lobal|[Cc]lass|function)\s+([A-Za-z_][\w.]*\.[\w.]+)")


def open_tensors(path: str | Path) -> Tensors:
    """Open a checkpoint file of any kind for reading.

    `path` is a .safetensors file, the .json index of a sharded one (or the name that the whole file would have), or a
    pickle by its ending. Raises UserError for a file that is missing, damaged or hostile.
    """
    path = Path(path)
    if is_index(path):
        return ShardedFile(path)
    beside = path.parent / (path.name + ".index.json")  # not with_name, which the root of a disk has none for
    if not path.exists() and beside.is_file():
        return ShardedFile(beside)
    if path.suffix.lower() in PICKLES and path.is_file() and _is_pickle(path):
        return PickleFile(path)
    return TensorFile(path)


def is_index(path: Path) -> bool:
    """Whether the name is that of a sharded checkpoint's index."""
    return _INDEX.search(path.name) is not None


def files_of(source: Tensors) -> list[Path]:
    """The files that a source reads, its index among them."""
    files: Callable[[], list[Path]] | None = getattr(source, "files", None)
    return [source.path] if files is None else files()


def sha256_source(
    source: Tensors,
    progress: Callable[[int], object] | None = None,
    kept: Literal["ignore", "use", "renew"] = "ignore",
) -> str:
    """sha256 (hex) of the file; of a sharded checkpoint or a folder, over one line `NAME SHA256` for each weight file,
    by name. `kept`: what to do with hashes of large files that are kept between runs (hash_cache.py).
    """

    def sha256(file: Path) -> str:
        if kept == "ignore":
            return sha256_file(file, progress)
        return cached(file, lambda: sha256_file(file, progress), fresh=kept == "renew")

    files = files_of(source)
    if files == [source.path]:
        return sha256(files[0])
    root = source.path if source.path.is_dir() else source.path.parent
    weights = [path for path in sorted(files) if not is_index(path)]
    lines = [f"{path.relative_to(root).as_posix()} {sha256(path)}\n" for path in weights]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def hashing(sources: Sequence[Tensors], rehash: bool = False) -> Iterator[list[Future[str]]]:
    """sha256 of whole files in the background, given up when the block fails. Large files that did not change since
    they were hashed are not read (hash_cache.py), but for `rehash`.
    """
    stop = threading.Event()

    def go_on(_: int) -> None:
        if stop.is_set():
            raise CancelledError

    with ThreadPoolExecutor(2, thread_name_prefix="sha256") as pool:
        try:
            yield [pool.submit(sha256_source, source, go_on, "renew" if rehash else "use") for source in sources]
        except BaseException:
            stop.set()
            raise


def weights_in(folder: Path) -> Path:
    """The weight file (or index) of one component's folder: .safetensors before .bin, full before fp16.

    Raises UserError if there is none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    names = [name for name in names if "non_ema" not in name]
    for kind in (".safetensors", ".bin"):
        for half in (False, True):
            found = [name for name in names if kind in name and (".fp16" in name) == half]
            indexes = [name for name in found if is_index(Path(name))]
            single = [name for name in found if name.endswith(kind) and not re.search(r"-\d+-of-\d+", name)]
            for name in indexes + sorted(single, key=lambda n: "model" not in n):
                return folder / name
    raise UserError(f"{folder} holds no weights: expected a .safetensors or .bin file, or an index of shards")


# -------------------- shards


class ShardedFile(Tensors):
    """A checkpoint in several files (safetensors or pickles) with a Hugging Face index of which tensor is where."""

    def __init__(self, index: Path) -> None:
        """Open every shard; raises UserError for an index that does not fit its shards or points elsewhere."""
        self.path = index
        places = _read_index(index)
        self._sources: dict[str, Tensors] = {}
        try:
            infos: dict[str, TensorInfo] = {}
            metadata: dict[str, str] = {}
            position = 0
            for file in sorted(set(places.values())):
                shard = self._sources[file] = open_tensors(index.parent / file)
                metadata |= shard.header.metadata
                for name, info in shard.header.tensors.items():
                    if places.get(name) != file:
                        where = f"in {places[name]}" if name in places else "nowhere"
                        raise UserError(f"{index}: {file} holds tensor {name}, which the index has {where}")
                    infos[name] = TensorInfo(info.dtype, info.shape, position, position + info.nbytes)
                    position += info.nbytes
            missing = [name for name in places if name not in infos]
            if missing:
                first = missing[0]
                raise UserError(
                    f"{index}: {len(missing)} tensors are not in their shards, first {first} in {places[first]}"
                )
        except BaseException:
            self.close()
            raise
        self._places = places
        self.header = Header(infos, metadata, 0, position)

    def close(self) -> None:
        for shard in self._sources.values():
            shard.close()

    def files(self) -> list[Path]:
        """The index and its shards."""
        return [self.path, *(shard.path for shard in self._sources.values())]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.info(name)
        self._sources[self._places[name]].read_into(name, offset, buffer)

    def tensor(self, name: str) -> torch.Tensor:
        self.info(name)
        return self._sources[self._places[name]].tensor(name)

    def check_unchanged(self) -> None:
        for shard in self._sources.values():
            shard.check_unchanged()


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, checked: the files may lie beside the index only."""
    try:
        if path.stat().st_size > MAX_INDEX:
            raise UserError(f"{path} is no index of shards: it takes {path.stat().st_size:,} bytes")
        raw = bounded_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected the index of a sharded checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no index of shards: not valid JSON") from None
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} is no index of shards: it has no weight_map")
    for name, file in places.items():
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\:\x00]+", file) and file not in (".", "..")
        if not plain or is_index(Path(file)):
            raise UserError(f"{path} points to {file!r} for {name}: shards must be plain file names beside the index")
    return places


# -------------------- pickles


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{")


class PickleFile(Tensors):
    """Tensors of a pickled checkpoint (`state_dict` inside or at the top), in memory or mapped from the file."""

    def __init__(self, path: Path) -> None:
        """Load it with weights_only=True; raises UserError for anything that is not tensors in plain containers."""
        self.path = path
        self._tensors, left = _tensors_in(load_pickle(path), path)
        infos: dict[str, TensorInfo] = {}
        position = 0
        for name, tensor in self._tensors.items():
            kind, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            infos[name] = TensorInfo(kind, shape, position, position := position + tensor_bytes(kind, shape))
        self.header = Header(infos, {}, 0, position)
        self._stamp = stamp_of(path)
        if left:
            warnings.warn(
                f"{path.name}: {len(left)} entries that are not tensors are left out, first {left[0]}",
                DodgeburnWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        self._tensors = {}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.span(name, offset, buffer)
        if len(buffer):
            buffer[:] = byte_view(self._tensors[name].contiguous().reshape(-1))[offset : offset + len(buffer)]

    def tensor(self, name: str) -> torch.Tensor:
        self.info(name)
        return self._tensors[name].clone()

    def check_unchanged(self) -> None:
        if stamp_of(self.path) != self._stamp:
            raise UserError(f"{self.path} was changed while it was being read: try again when it is complete")


def load_pickle(path: Path) -> Any:
    """What a pickle holds, read with weights_only=True; UserError for one that holds more than tensors in plain
    containers, or is damaged."""
    import pickle
    import struct

    import torch

    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols: what cannot be read is refused anyway
            # Mapping keeps a 7 GB checkpoint out of memory; only the zip form, in use since torch 1.6, can be mapped.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        what = f"it asks for {found.group(1)}" if found else "it holds more than tensors"
        raise UserError(
            f"{path} is a pickle that could run code when read ({what}): refused; look for a .safetensors of it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            AssertionError, struct.error) as error:  # fmt: skip
        raise UserError(f"{path} is a damaged pickle: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def _tensors_in(loaded: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    import torch

    if isinstance(loaded, dict):
        for inner in ("state_dict", "model_state_dict", "params_ema"):
            if isinstance(loaded.get(inner), dict):
                loaded = loaded[inner]
                break
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}: expected tensors by name")
    tensors: dict[str, torch.Tensor] = {}
    left: list[str] = []
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise UserError(f"{path}: tensor {name} is sparse, quantised or without data: only plain ones are read")
            tensors[name] = value.detach()
        else:
            left.append(str(name)[:80])
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: {len(left)} other entries")
    return tensors, left
