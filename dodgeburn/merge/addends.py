"""What is added to a model's tensors: an adapter's changes, or a full delta, matched to the tensors they change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dodgeburn.checkpoint.header import FLOAT_DTYPES, Header
from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.lora_delta import bias_delta, weight_delta
from dodgeburn.checkpoint.lora_file import Adapter, architecture_title, open_adapter
from dodgeburn.checkpoint.metadata import json_of
from dodgeburn.checkpoint.modules import tensor_moves
from dodgeburn.checkpoint.moves import Move
from dodgeburn.checkpoint.rewrite import is_finite
from dodgeburn.checkpoint.sources import Tensors, open_tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.blocks import LORA_LISTS, listed

if TYPE_CHECKING:
    import torch

DELTA = "delta."  # before a single-file key: no program takes a delta for a model
DELTA_INFO = "dodgeburn.delta"


class Addend(Protocol):
    """Something that can be added to a model, opened and matched to it."""

    source: Tensors
    title: str  # "LoRA", "full delta", ...
    matched: int  # modules or tensors that are in the model

    @property
    def unmatched(self) -> Sequence[str]:
        """Modules, tensors or keys that are not in the model."""

    @property
    def targets(self) -> Mapping[str, object]:
        """Tensors of the model that it changes."""

    def add(self, key: str, wide: torch.Tensor, strength: float) -> None:
        """Add strength times the change of tensor `key` to `wide` (float32 of its shape, in place)."""


@contextmanager
def open_addend(path: str | Path, layout: Layout, model: Header, model_name: str) -> Iterator[Addend]:
    """Open an adapter or a full delta for a model with these tensors.

    Raises UserError if it is neither, of another architecture, or if nothing in it is in the model.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        with open_tensors(path) as source:
            if _is_delta(source.header):
                yield _matched(DeltaAddend(source, layout, model), model_name, layout)
                return
    with open_adapter(path) as adapter:
        if adapter.architecture is not None and adapter.architecture != layout.name:
            raise UserError(
                f"{adapter.name} is a {adapter.title} for {architecture_title(adapter.architecture)}, "
                f"but {model_name} is {layout.title}"
            )
        yield _matched(AdapterAddend(adapter, layout, model), model_name, layout)


def _is_delta(header: Header) -> bool:
    return any(name.startswith(DELTA) for name in header.tensors)


def _matched(addend: Addend, model_name: str, layout: Layout) -> Addend:
    if not addend.matched:
        raise UserError(
            f"{addend.source.path.name} changes nothing in {model_name} ({layout.title}): none of its "
            f"{len(addend.unmatched)} modules or tensors is in the model, first {addend.unmatched[0]}"
        )
    return addend


class AdapterAddend:
    """LoRA, LoCon, LoHa, LoKr or full differences of modules."""

    def __init__(self, adapter: Adapter, layout: Layout, model: Header) -> None:
        self.adapter = adapter
        self.source = adapter.source
        self.title = adapter.title
        self.targets: dict[str, list[tuple[str, Move]]] = {}
        self.unmatched: list[str] = list(adapter.unmatched)
        self.matched = 0
        moves = tensor_moves(layout.name)
        for name, module in adapter.modules.items():
            found = [
                (kind, moves[f"{name}.{kind}"])
                for kind, wanted in (("weight", set(module.keys) != {"diff_b"}), ("bias", "diff_b" in module.keys))
                if wanted and f"{name}.{kind}" in moves
            ]
            found = [(kind, move) for kind, move in found if move.sources[0] in model.tensors]
            if not found:
                self.unmatched.append(name)
                continue
            self.matched += 1
            for _, move in found:
                self.targets.setdefault(move.sources[0], []).append((name, move))

    def add(self, key: str, wide: torch.Tensor, strength: float) -> None:
        for name, move in self.targets[key]:
            part = wide.chunk(3, dim=0)[move.part] if move.op == "third" else wide
            part = part.T if move.op == "transpose" else part
            make = bias_delta if key.endswith("bias") else weight_delta
            delta = make(self.adapter, self.adapter.modules[name], tuple(part.shape))
            if delta is not None:
                part.add_(delta.mul_(strength))  # rounded before it is added: opposite strengths cancel


class DeltaAddend:
    """Whole differences of tensors, under the model's own names."""

    def __init__(self, source: Tensors, layout: Layout, model: Header) -> None:
        self.source = source
        self.title = "full delta"
        said = json_of(source.header.metadata, DELTA_INFO)
        made_for = said.get("layout") if isinstance(said, dict) else None
        if made_for is not None and made_for != layout.name:
            raise UserError(f"{source.path.name} is a delta of {made_for} models, but the model is {layout.title}")
        names = [name.removeprefix(DELTA) for name in source.keys() if name.startswith(DELTA)]
        self.targets = {name: name for name in names if name in model.tensors}
        self.unmatched = [name for name in names if name not in model.tensors]
        self.unmatched += [name for name in source.keys() if not name.startswith(DELTA)]
        self.matched = len(self.targets)
        for name in self.targets:
            ours, theirs = source.info(DELTA + name), model.tensors[name]
            if ours.shape != theirs.shape:
                raise UserError(
                    f"{source.path.name} changes {name} by a {list(ours.shape)} tensor, but the model's is "
                    f"{list(theirs.shape)}: the delta is of another model"
                )
            if ours.dtype not in FLOAT_DTYPES:
                raise UserError(f"{source.path.name}: {DELTA}{name} is {ours.dtype}, expected floating point numbers")

    def add(self, key: str, wide: torch.Tensor, strength: float) -> None:
        delta = self.source.tensor(DELTA + key).float()
        if not is_finite(delta):
            raise UserError(f"{self.source.path.name} has NaN or infinite values in {DELTA}{key}: the file is damaged")
        wide.add_(delta.mul_(strength))


def block_weights(layout: Layout, texts: Sequence[str]) -> dict[str, float]:
    """Weight by block (BASE, IN00 …, M00, OUT00 …, VAE), 1 where nothing is said.

    Each text holds items apart by commas, later ones replacing earlier ones: `NAME=NUMBER`, where NAME may be a pattern
    (`IN*=0.5`, `*=0`), or the name of a preset, which sets the U-Net's blocks; or it is a list of bare numbers, as
    A1111's LoRA block weights. Any finite number will do. Raises UserError for anything else, and for a name that no
    block has.
    """
    from dodgeburn.merge.presets import preset_alphas

    out = dict.fromkeys(layout.all_blocks, 1.0)
    found = [[part.strip() for part in text.split(",") if part.strip()] for text in texts]
    for item in (item for items in found for item in listed(items, LORA_LISTS) or items):
        name, equals, number = item.partition("=")
        if not equals:
            if ":" in item and any(fnmatchcase(block, item.partition(":")[0].upper()) for block in layout.all_blocks):
                raise UserError(f"block weight {item!r} is not NAME=NUMBER: write {item.replace(':', '=', 1)}")
            out |= dict(zip(layout.blocks, preset_alphas(item, layout.n_in, layout.n_out), strict=True))
            continue
        blocks = [block for block in layout.all_blocks if fnmatchcase(block, name.strip().upper())]
        if not blocks:
            raise UserError(
                f"{layout.title} has no block {name.strip()!r}: expected BASE, {layout.blocks[0]} … "
                f"{layout.blocks[-1]}, VAE, or a pattern such as IN*"
            )
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"block weight {item!r} is not NAME=NUMBER, such as IN04=0.5 or OUT*=0")
        out |= dict.fromkeys(blocks, weight)
    return out
