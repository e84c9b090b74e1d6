"""Tensors from one or more files written into another, one at a time: renamed, reshaped, cast, replaced.

Bytes that stay as they are are copied in pieces; only a transposed or cast tensor is held in memory whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.header import FLOAT_DTYPES, torch_dtype
from dodgeburn.checkpoint.metadata import NO_HASH
from dodgeburn.checkpoint.moves import Move
from dodgeburn.checkpoint.sources import Tensors, files_of
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    import torch

PIECE = 8 << 20  # bytes copied at once
STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


@dataclass(frozen=True)
class Piece:
    """One tensor to write: made from a source by a move (or given as bytes), stored as a safetensors dtype."""

    source: Tensors | None
    move: Move
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None


def piece_of(source: Tensors, move: Move, dtype: str = "stored") -> Piece:
    """The piece a move makes of a source's tensors; `dtype` a safetensors name, or "stored" for the source's own."""
    infos = [source.info(name) for name in move.sources]
    shape = move.shape({name: info.shape for name, info in zip(move.sources, infos, strict=True)})
    kinds = {info.dtype for info in infos}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(move.sources)} are of several types ({', '.join(sorted(kinds))}) and belong together"
        )
    own = infos[0].dtype
    return Piece(source, move, own if dtype == "stored" or own not in FLOAT_DTYPES else dtype, shape)


def chosen_dtype(option: str, component: str, shape: Sequence[int]) -> str:
    """The safetensors dtype of a tensor under `--dtype option` ("stored", fp32, fp16, bf16, fp8_e4m3fn, fp8_e5m2).

    fp8 is for the matrices and convolutions of the U-Net and the text encoders. What is small and fine-grained (norms,
    biases), and the VAE, whose pictures fp8 visibly spoils, stays fp16.
    """
    if option == "stored":
        return "stored"
    if option not in STORED:
        raise UserError(f"unknown dtype {option!r}: expected stored, {', '.join(STORED)}")
    if option.startswith("fp8") and (len(shape) < 2 or component not in ("unet", "text_encoder", "text_encoder_2")):
        return "F16"
    return STORED[option]


def write_pieces(
    path: str | Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str], inputs: Iterable[str | Path] = (),
    hashes: Callable[[str], Mapping[str, str]] | None = None,
) -> None:  # fmt: skip
    """Write the pieces to a .safetensors file, atomically; `format: pt` is added. hashes: metadata that hold the sha256
    of all bytes after the header, which they are made of.

    The files read are inputs, which the output may not be. Raises UserError as TensorWriter, and for values that the
    new type cannot hold. NaN and infinite values of tensors whose bytes stay as they are count in a DodgeburnWarning.
    """
    from tqdm import tqdm

    sources = {id(piece.source): piece.source for piece in pieces.values() if piece.source is not None}
    read = [file for source in sources.values() for file in files_of(source)]
    infos = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
    said = {"format": "pt", **metadata}
    with TensorWriter(path, infos, said | dict(hashes(NO_HASH) if hashes else {}), [*inputs, *read]) as writer:
        total = sum(info.nbytes for info in writer.infos.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc=Path(path).name, disable=None) as bar:
            broken = []
            for name, piece in pieces.items():
                offset, finite = 0, True
                for data in _bytes_of(name, piece):
                    writer.write(name, offset, data)
                    offset += len(data)
                    bar.update(len(data))
                    finite = finite and _holds_numbers(data, piece.dtype)
                if not finite:
                    broken.append(name)
        for source in sources.values():
            source.check_unchanged()
        if hashes is not None:
            writer.replace_metadata(said | dict(hashes(writer.sha256_tensors())))
    if broken:
        what = f"{len(broken)} tensor{'s have' if len(broken) > 1 else ' has'} NaN or infinite values"
        warnings.warn(f"{what}, kept as they are (first {broken[0]}): the file is damaged, pictures by it will be "
                      "black or noise", DodgeburnWarning, stacklevel=3)  # fmt: skip


def _holds_numbers(data: bytes | memoryview, dtype: str) -> bool:
    import torch

    if dtype not in FLOAT_DTYPES or not len(data):
        return True
    return is_finite(torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=torch_dtype(dtype)))


def _bytes_of(name: str, piece: Piece) -> Iterator[bytes | memoryview]:
    if piece.data is not None:
        yield piece.data
        return
    assert piece.source is not None
    if piece.move.op != "transpose" and piece.source.info(piece.move.sources[0]).dtype == piece.dtype:
        yield from _copied(piece.source, piece.move)
        return
    made = piece.move.apply(piece.source.tensor)
    cast = cast_to(made, piece.dtype, name, piece.source.path.name).contiguous().reshape(-1)
    if cast.numel():
        yield byte_view(cast)


def _copied(source: Tensors, move: Move) -> Iterator[memoryview]:
    for key in move.sources:
        size = source.info(key).nbytes
        begin, end = (move.part * size // 3, (move.part + 1) * size // 3) if move.op == "third" else (0, size)
        for start in range(begin, end, PIECE):
            buffer = memoryview(bytearray(min(PIECE, end - start)))
            source.read_into(key, start, buffer)
            yield buffer


def cast_to(tensor: torch.Tensor, dtype: str, name: str, file: str) -> torch.Tensor:
    """The tensor in a safetensors float dtype, rounded once; UserError if a finite value does not fit into it."""
    import torch

    kind = torch_dtype(dtype)
    if tensor.dtype == kind:
        return tensor
    out = tensor.to(kind)
    # fp8 has no infinity: torch takes the largest value instead of what is larger.
    cut = kind.itemsize == 1 and tensor.numel() > 0 and float(tensor.abs().max()) > torch.finfo(kind).max
    if cut or not is_finite(out):
        if not is_finite(tensor):
            raise UserError(f"tensor {name} of {file} has NaN or infinite values: repair the file, or keep its types")
        raise UserError(f"tensor {name} of {file} is too large for {dtype}: a wider type is needed")
    return out


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, in one pass; True for integers and empty tensors."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # float8 has no reductions
    low, high = torch.aminmax(tensor)  # NaN wins in both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
