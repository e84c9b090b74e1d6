"""Textual inversion: files of a few vectors that stand for a word in front of the text encoders (arXiv 2208.01618).

| written by | tensors |
|---|---|
| A1111, SD1.5 (.pt) | `string_to_param` -> `*` [n, 768] |
| A1111 and others, SD1.5 (.safetensors) | `emb_params` [n, 768] |
| SDXL (.safetensors) | `clip_l` [n, 768], `clip_g` [n, 1280] |
| diffusers | the word itself [768] or [n, 768] |

A prompt names it by the file's name. Tensors come in the order of the model's text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.header import FLOAT_DTYPES
from dodgeburn.checkpoint.sources import load_pickle
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dodgeburn.checkpoint.header import TensorInfo

ENDINGS = (".safetensors", ".pt", ".bin", ".ckpt", ".pth")
MOST_VECTORS = 1000
_NAMED = ("clip_l", "clip_g")
_WORD = re.compile(r"emb_params|<[^<>]+>")  # the word as diffusers has it


@dataclass(frozen=True)
class TextEmbedding:
    """Vectors that stand for a word."""

    name: str  # in prompts: the file's name without its ending
    vectors: tuple[Tensor, ...]  # float32 [n, width], one for each text encoder
    file: str = ""
    sha256: str = ""  # of the file

    def __len__(self) -> int:
        """Tokens that it takes the place of."""
        return max(len(v) for v in self.vectors)


def read_embedding(path: str | Path, widths: Sequence[int]) -> TextEmbedding:
    """An embedding's file for a model whose text encoders have these widths. Raises UserError for a file that is none,
    for one of another architecture, and for NaN."""
    import torch

    from dodgeburn.checkpoint.tensorfile import sha256_file

    path = Path(path)
    found = _tensors(path)
    names = list(_NAMED if set(found) == set(_NAMED) else found)
    # Shapes before values: a pickle's tensor can claim any shape and have a few bytes.
    if [found[name].shape[1] for name in names] != list(widths):
        raise UserError(
            f"{path} is an embedding for text encoders {' and '.join(str(found[name].shape[1]) for name in names)} "
            f"wide, the model's are {' and '.join(map(str, widths))}: it was trained for another architecture"
        )
    own = tuple(found[name].float() for name in names)
    for name, tensor in zip(names, own, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} has NaN or infinite values: the file is damaged")
    return TextEmbedding(path.stem, own, path.name, sha256_file(path))


def embedding_title(tensors: Mapping[str, TensorInfo]) -> str | None:
    """A safetensors file's kind in words if its header is that of a textual inversion, else None."""
    if set(tensors) != set(_NAMED) and (len(tensors) != 1 or not _WORD.fullmatch(next(iter(tensors)))):
        return None
    shapes = [info.shape if len(info.shape) == 2 else (1, *info.shape) for info in tensors.values()]
    known = {(768,): "SD1.5", (768, 1280): "SDXL", (1024,): "SD2"}
    widths = tuple(sorted(shape[-1] for shape in shapes))
    if any(len(shape) != 2 or not 1 <= shape[0] <= MOST_VECTORS for shape in shapes):
        return None
    if any(info.dtype not in FLOAT_DTYPES for info in tensors.values()):
        return None
    n = max(shape[0] for shape in shapes)
    what = known.get(widths, f"text encoders {' and '.join(map(str, widths))} wide")
    return f"textual inversion of {n} vector{'s' if n > 1 else ''} for {what}"


def _tensors(path: Path) -> Mapping[str, Tensor]:
    """What the file holds, one vector as [1, width]."""
    import torch

    from dodgeburn.checkpoint.tensorfile import load_tensors, read_header

    if not path.is_file():
        raise UserError(f"embedding {path} is not there")
    plain = path.suffix.lower() == ".safetensors"
    if plain:
        infos = read_header(path).tensors
        if len(infos) > len(_NAMED):
            raise UserError(f"{path} is no textual inversion but has {len(infos)} tensors")
        for name, info in infos.items():
            _check_shape(path, name, info.shape)  # before a whole file is read
    said = load_tensors(path) if plain else load_pickle(path)
    if isinstance(said, dict) and isinstance(said.get("string_to_param"), dict):
        said = said["string_to_param"]
    tensors = {k: v for k, v in said.items() if isinstance(v, torch.Tensor)} if isinstance(said, dict) else {}
    if not 1 <= len(tensors) <= 2 or any(not isinstance(name, str) or not v.is_floating_point() for name, v in
                                         tensors.items()):  # fmt: skip
        raise UserError(f"{path} is no textual inversion: expected string_to_param, emb_params, clip_l and clip_g, or "
                        "one tensor under its word")  # fmt: skip
    for name, v in tensors.items():
        if v.layout != torch.strided or v.is_nested or v.device.type != "cpu":
            raise UserError(f"{path}: tensor {name} is sparse, nested or without data: this is no textual inversion")
        _check_shape(path, name, v.shape)
    return {name: v.detach()[None] if v.ndim == 1 else v.detach() for name, v in tensors.items()}


def _check_shape(path: Path, name: str, shape: Sequence[int]) -> None:
    """UserError unless these are a few vectors."""
    if len(shape) not in (1, 2) or (len(shape) == 2 and not 1 <= shape[0] <= MOST_VECTORS):
        raise UserError(f"{path}: {name} has the shape {list(shape)}, expected [vectors, width]: this is no textual "
                        "inversion")  # fmt: skip
