"""Adapters (LoRA, sliders) at work while pictures are made: a scale for every picture, and when to begin."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.modules import tensor_moves
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.adapters import Adapter, Attachment, attached
from dodgeburn.models.model import Model
from dodgeburn.sampling.loras import ALWAYS, LoraUse
from dodgeburn.sampling.prompts import EncodedPrompt, encode

__all__ = ["ALWAYS", "Adapted", "Applied", "LiveScales", "applied_file"]


@dataclass(frozen=True)
class Applied:
    """An adapter and how it is to be applied.

    scale: one for all pictures or one each. start: the U-Net's part is off at time steps above it (Concept Sliders'
    late start, which keeps the layout; 1000 is from the beginning). strengths: factors by module name. blocks: factors
    by the merge's block names (BASE with time embedding and text encoders, IN00 …, M00, OUT00 …). Both halves of guided
    calls are adapted, as ComfyUI and A1111 do.
    """

    adapter: Adapter
    scale: float | Sequence[float] = 1.0
    start: float = ALWAYS
    strengths: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)


def applied_file(path: str | Path, use: LoraUse, model: Model) -> Applied:
    """An adapter file applied to a model as `use` says; where it says no start, the file's slider card decides.

    Raises UserError as `load_adapter`. A DodgeburnWarning tells of a scale outside the card's safe range, and of a file
    whose content isn't what `use` asks for.
    """
    adapter = load_adapter(path, model)
    origin = adapter.origin
    assert origin is not None
    for wanted, found in ((use.sha256, origin.sha256), (use.sha256_tensors, origin.sha256_tensors)):
        if wanted and not found.startswith(wanted):
            _warn(f"the picture was made with another {use.name}: hash {wanted[:12]}, {origin.file} is {found[:12]}")
            break
    card = origin.card
    start = use.start
    if start is None:
        start = ALWAYS if card is None or card.start is None else card.start
    if card is not None and card.safe_range is not None and not card.safe_range[0] <= use.scale <= card.safe_range[1]:
        low, high = card.safe_range
        _warn(f"{adapter.name} at scale {use.scale:g}: its safe range is {low:g} to {high:g}")
    return Applied(adapter, use.scale, start, use.strengths, use.blocks)


def _warn(line: str) -> None:
    warnings.warn(line, DodgeburnWarning, stacklevel=3)


class Adapted:
    """The adapters of one call of `generate`, with scales [adapters, pictures]."""

    def __init__(self, applied: Sequence[Applied], pictures: int, layout: Layout) -> None:
        self.applied = list(applied)
        rows = []
        for one in self.applied:
            scales = [float(one.scale)] if isinstance(one.scale, (int, float)) else [float(s) for s in one.scale]
            if len(scales) not in (1, pictures):
                raise UserError(f"{len(scales)} scales of {one.adapter.name} for {pictures} pictures: give one or each")
            if not 0 <= one.start <= ALWAYS:
                raise UserError(f"{one.adapter.name} starts at time step {one.start:g}: expected 0 to 1000")
            rows.append(scales * (pictures if len(scales) == 1 else 1))
        self.values = rows
        self.scales = torch.tensor(rows, dtype=torch.float32) if rows else torch.zeros(0, pictures)
        if not bool(torch.isfinite(self.scales).all()):
            raise UserError("a scale is NaN or infinite: give a number")
        self.starts = torch.tensor([one.start for one in self.applied])
        self.strengths = [_strengths(one, layout) for one in self.applied]
        self._text = [one.adapter.changes_text for one in self.applied]

    def texts(
        self, model: Model, prompts: Sequence[str], negative: str, plain: Mapping[str, EncodedPrompt],
        clip_skip: int, syntax: str,
    ) -> list[Mapping[str, EncodedPrompt]]:  # fmt: skip
        """For each picture its prompt, the negative one and "" as its text encoders see them: `plain` ones where no
        adapter changes them, else encoded once for all pictures of the same scales.
        """
        # What a picture's texts depend on: the scales of adapters that change text encoders.
        keys = [
            tuple(self.values[a][i] for a, changes in enumerate(self._text) if changes) for i in range(len(prompts))
        ]
        found: dict[tuple[float, ...], Mapping[str, EncodedPrompt]] = {}
        for index, key in enumerate(keys):
            if not any(key):
                found[key] = plain
            elif key not in found:
                wanted = [prompt for prompt, other in zip(prompts, keys, strict=True) if other == key]
                with attached(model.components(), [a.adapter for a in self.applied], self.strengths) as at:
                    at.set(self.scales[:, index])
                    found[key] = encode(model, dict.fromkeys([*wanted, negative, ""]), clip_skip, syntax)
        return [found[key] for key in keys]

    @contextmanager
    def on(self, model: Model, indices: Sequence[int]) -> Iterator[LiveScales | None]:
        """The model adapted for a batch of these pictures; None if there is nothing to do."""
        if not self.applied:
            yield None
            return
        with attached(model.components(), [a.adapter for a in self.applied], self.strengths) as at:
            yield LiveScales(at, self.scales[:, list(indices)], self.starts)

    def uses(self, index: int) -> tuple[LoraUse, ...]:
        """What picture `index` was made with, for its record."""
        out = []
        for one, scales in zip(self.applied, self.values, strict=True):
            origin, name = one.adapter.origin, one.adapter.name
            file, whole, tensors = (origin.file, origin.sha256, origin.sha256_tensors) if origin else ("", "", "")
            blocks = {block: weight for block, weight in one.blocks.items() if weight != 1}
            out.append(LoraUse(name, scales[index], one.start, blocks, dict(one.strengths), file, whole, tensors))
        return tuple(out)


def _strengths(one: Applied, layout: Layout) -> dict[str, float]:
    """Factors by module: those of `strengths` times those of the module's block."""
    if unknown := [block for block in one.blocks if block not in layout.all_blocks]:
        raise UserError(
            f"{one.adapter.name}: {layout.title} has no block {unknown[0]!r}: expected BASE, {layout.blocks[0]} … "
            f"{layout.blocks[-1]}"
        )
    out = dict(one.strengths)
    if any(weight != 1 for weight in one.blocks.values()):
        moves = tensor_moves(layout.name)
        for module in one.adapter.modules_changed:
            move = moves.get(f"{module}.weight")
            block = layout.block(move.sources[0]) if move is not None else None
            out[module] = out.get(module, 1.0) * one.blocks.get(block or "", 1.0)
    return out


class LiveScales:
    """A running batch's scales: set before each call of the U-Net."""

    def __init__(self, attachment: Attachment, scales: Tensor, starts: Tensor) -> None:
        self.attachment, self.scales, self.starts = attachment, scales, starts
        self._active: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        """Go on with these pictures only (int64 [m])."""
        self.scales = self.scales[:, rows.cpu()]

    def prepare(self, timestep: float, copies: int) -> bool:
        """Set the scales for a call at this time step with the batch `copies` times in it; whether other adapters are
        at work than at the last call (what depends on text alone is to be computed anew then).
        """
        active = self.starts >= timestep
        self.attachment.set((self.scales * active[:, None]).repeat(1, copies))
        changed = self._active is not None and not torch.equal(active, self._active)
        self._active = active
        return changed
