"""An aligned model as a file: a LoRA, or a whole checkpoint, with what it was made from in its metadata.

The recipe (metadata key `dodgeburn.recipe`, kind "dpo") says the loss and where it is from, beta in every convention,
all settings, the base by name, hash and its own recipe, the pairs by hash and number, and the last line of the log. No
dates and no paths, so the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dodgeburn.checkpoint.metadata import A1111_MODELS, A1111_RECIPE, RECIPE, STALE, recipe_of, to_json
from dodgeburn.errors import UserError
from dodgeburn.merge.recipe import Parent, tool_version
from dodgeburn.models.adapter_file import save_adapter
from dodgeburn.models.model import DTYPES, Model
from dodgeburn.models.saving import save_single_file
from dodgeburn.rework.dpo.losses import LOSSES
from dodgeburn.rework.dpo.pairs import PreferencePairs
from dodgeburn.rework.dpo.settings import betas
from dodgeburn.rework.dpo.train import Aligned

DROPPED = (*STALE, A1111_RECIPE, A1111_MODELS, "dodgeburn.training")  # of the base's metadata: no longer true


def recipe(model: Model, pairs: PreferencePairs, aligned: Aligned) -> dict[str, Any]:
    """What made an aligned model, as JSON values."""
    settings = aligned.settings
    last = {key: round(value, 6) for key, value in aligned.last.items()}
    beta = {key: round(value, 6) for key, value in betas(aligned.beta, aligned.elements).items()}
    file = model.source.name if model.source is not None else model.name
    base = Parent(file=file, sha256=model.sha256, recipe=recipe_of(model.metadata))
    return {
        "kind": "dpo", "version": 1, "tool": tool_version(), "loss": settings.loss,
        "source": LOSSES[settings.loss].source, "as": "model" if aligned.adapter is None else "lora",
        "base": base.model_dump(mode="json"),
        "pairs": {"sha256": pairs.sha256, "count": len(pairs), "dropped": pairs.dropped, "about": pairs.about},
        "beta": beta, "lr": settings.rate, "reference": settings.kind_of_reference, "settings": settings.model_dump(),
        "last": last, "alarms": aligned.alarms, "forwards": aligned.forwards,
    }  # fmt: skip


def save_aligned(
    model: Model,
    pairs: PreferencePairs,
    aligned: Aligned,
    path: str | Path,
    spelling: str = "kohya",
    dtype: str | None = None,
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write the LoRA, or the whole model where its U-Net was trained, as .safetensors.

    dtype: of the numbers written; None is fp16 for a LoRA and fp32 for a model: alignment moves weights by less than
    fp16 resolves, and what is taken out of a rounded file as a delta is mostly noise. Raises UserError as the writers.
    """
    said = {RECIPE: to_json(recipe(model, pairs, aligned)), "modelspec.title": Path(path).stem}
    if aligned.adapter is not None:
        spelt, kind = spelling, dtype or "fp16"
        save_adapter(aligned.adapter, path, model.layout.name, spelt, kind, metadata=said, inputs=tuple(inputs))
        return
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: expected {', '.join(DTYPES)}")
    kept = {key: value for key, value in model.metadata.items() if key not in DROPPED}
    save_single_file(model, path, kept | said, DTYPES[dtype] if dtype else torch.float32)
