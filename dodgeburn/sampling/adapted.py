"""Adapters (LoRA, sliders) at work while pictures are made: a scale for every picture, and when to begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Attachment, attached
from dodgeburn.models.model import Model
from dodgeburn.sampling.prompts import EncodedPrompt, encode

ALWAYS = 1000.0  # above every training time step


@dataclass(frozen=True)
class Applied:
    """An adapter and how it is to be applied.

    scale: one for all pictures or one each. start: the U-Net's part is off at time steps above it (Concept Sliders'
    late start, which keeps the layout; 1000 is from the beginning). strengths: factors by module name. Both halves of
    guided calls are adapted, as ComfyUI and A1111 do.
    """

    adapter: Adapter
    scale: float | Sequence[float] = 1.0
    start: float = ALWAYS
    strengths: Mapping[str, float] = field(default_factory=dict)


class Adapted:
    """The adapters of one call of `generate`, with scales [adapters, pictures]."""

    def __init__(self, applied: Sequence[Applied], pictures: int) -> None:
        self.applied = list(applied)
        rows = []
        for one in self.applied:
            scales = [float(one.scale)] if isinstance(one.scale, (int, float)) else [float(s) for s in one.scale]
            if len(scales) not in (1, pictures):
                raise UserError(f"{len(scales)} scales of {one.adapter.name} for {pictures} pictures: give one or each")
            if not 0 <= one.start <= ALWAYS:
                raise UserError(f"{one.adapter.name} starts at time step {one.start:g}: expected 0 to 1000")
            rows.append(scales * (pictures if len(scales) == 1 else 1))
        self.scales = torch.tensor(rows, dtype=torch.float32) if rows else torch.zeros(0, pictures)
        self.starts = torch.tensor([one.start for one in self.applied])
        self._text = [
            any(module.startswith("text_encoder") for module in one.adapter.modules_changed) for one in self.applied
        ]

    def text_key(self, index: int) -> tuple[float, ...]:
        """What a picture's texts depend on: the scales of adapters that change text encoders."""
        return tuple(float(self.scales[i, index]) for i, changes in enumerate(self._text) if changes)

    def encode(
        self, model: Model, index: int, texts: Sequence[str], clip_skip: int, syntax: str
    ) -> dict[str, EncodedPrompt]:
        """The texts as the adapted text encoders of picture `index` see them."""
        with attached(model.components(), [a.adapter for a in self.applied], [a.strengths for a in self.applied]) as at:
            at.set(self.scales[:, index])
            return encode(model, texts, clip_skip, syntax)

    @contextmanager
    def on(self, model: Model, indices: Sequence[int]) -> Iterator[LiveScales | None]:
        """The model adapted for a batch of these pictures; None if there is nothing to do."""
        if not self.applied:
            yield None
            return
        with attached(model.components(), [a.adapter for a in self.applied], [a.strengths for a in self.applied]) as at:
            yield LiveScales(at, self.scales[:, list(indices)], self.starts)


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
