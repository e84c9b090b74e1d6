"""Edits with a strength, behind one interface: sliders and what they are compared with are measured by the same code.

An edit makes pictures of prompts and seeds at given strengths; at strength 0 it makes the model's own, unedited ones.
What a strength means is each edit's own affair until it is calibrated (`slide/calibrate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.models.quick import quick_products
from dodgeburn.sampling.adapted import ALWAYS, Applied
from dodgeburn.sampling.loop import GenerateSettings, stream
from dodgeburn.sampling.prompts import EncodedPrompt

Progress = Callable[[int], None]
"""Told the number of pictures that were just finished."""


class Edit(Protocol):
    """What can be swept over a strength."""

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """n pictures uint8 [n, h, w, 3] of n prompts, seeds and strengths. Strength 0 leaves the picture unedited."""
        ...


def draw(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateSettings | None = None,
    adapters: Sequence[Applied] = (), batch_size: int | None = None, progress: Progress | None = None,
    encoded: Mapping[str, EncodedPrompt] | None = None, quick: bool = False,
) -> np.ndarray:  # fmt: skip
    """Pictures uint8 [n, h, w, 3] of n prompts and seeds, by a model with adapters; `encoded` as for `generate`.

    quick: in bf16 where that is quicker. Raises what `generate` raises.
    """
    found: list[np.ndarray | None] = [None] * len(prompts)
    with quick_products(model, quick):
        for made in stream(model, prompts, seeds, settings, None, batch_size, encoded, adapters):
            found[made.index] = np.asarray(made.image)
            if progress is not None:
                progress(1)
    pictures = [picture for picture in found if picture is not None]
    if not pictures:
        raise UserError("no pictures asked for: give at least one prompt and seed")
    return np.stack(pictures)


class Unedited:
    """The model's own pictures, each made once: every edit of the same prompts and seeds shares them, and how they are
    drawn. quick: in bf16 where that is quicker.
    """

    def __init__(
        self, model: Model, settings: GenerateSettings | None = None, batch_size: int | None = None,
        progress: Progress | None = None, quick: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.settings = model, settings or GenerateSettings()
        self.batch_size, self.progress, self.quick = batch_size, progress, quick
        self._made: dict[tuple[str, int], np.ndarray] = {}

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """uint8 [n, h, w, 3]; what was made before is not made again."""
        pairs = list(zip(prompts, seeds, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._made]
        if new:
            drawn = draw(self.model, [p for p, _ in new], [s for _, s in new], self.settings,
                         batch_size=self.batch_size, progress=self.progress, quick=self.quick)  # fmt: skip
            self._made.update(zip(new, drawn, strict=True))
        if not pairs:
            raise UserError("no pictures asked for: give at least one prompt and seed")
        return np.stack([self._made[pair] for pair in pairs])


def with_unedited(
    unedited: Unedited, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float],
    edited: Callable[[list[int]], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Pictures of all rows: those with strength 0 from the shared unedited ones, the rest from `edited(rows)`."""
    if not len(prompts) == len(seeds) == len(strengths):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds, {len(strengths)} strengths")
    plain = [i for i, s in enumerate(strengths) if s == 0]
    changed = [i for i, s in enumerate(strengths) if s != 0]
    parts = []
    if plain or not changed:
        parts.append(unedited.pictures([prompts[i] for i in plain], [seeds[i] for i in plain]))
    if changed:
        parts.append(edited(changed))
    return np.concatenate(parts)[np.argsort(plain + changed)]


class AdapterEdit:
    """Adapters as an edit. With several, each works at its factor of `scales` times the strength.

    start: as in `Applied` (late start). unedited: share one among edits of the same model and settings; made if None.
    """

    def __init__(
        self, model: Model, adapter: Adapter | Sequence[Adapter], start: float = ALWAYS,
        settings: GenerateSettings | None = None, unedited: Unedited | None = None,
        scales: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.start = model, start
        self.adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
        self.scales = list(scales) if scales is not None else [1.0] * len(self.adapters)
        if len(self.scales) != len(self.adapters):
            raise ValueError(f"{len(self.scales)} scales for {len(self.adapters)} adapters")
        self.unedited = unedited or Unedited(model, settings)
        if settings is not None and settings != self.unedited.settings:
            raise ValueError("the unedited pictures are made with other settings than the edit's")

    @property
    def name(self) -> str:
        """The adapters' names."""
        return " + ".join(adapter.name for adapter in self.adapters)

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """As `Edit.pictures`."""

        def edited(rows: list[int]) -> np.ndarray:
            applied = [
                Applied(adapter, [strengths[i] * scale for i in rows], self.start)
                for adapter, scale in zip(self.adapters, self.scales, strict=True)
            ]
            base = self.unedited
            return draw(self.model, [prompts[i] for i in rows], [seeds[i] for i in rows], base.settings, applied,
                        base.batch_size, base.progress, quick=base.quick)  # fmt: skip

        return with_unedited(self.unedited, prompts, seeds, strengths, edited)
