"""Metadata of a checkpoint made from one model and things added to it: recipe, parents by hash, ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.metadata import A1111_MODELS, A1111_RECIPE, NO_HASH, json_of, made_from


def derived_metadata(
    model: Mapping[str, str],
    recipe: Mapping[str, Any],
    parents: Sequence[tuple[str, str]],
    layout: Layout,
    out: str | Path,
    tensors_sha256: str = NO_HASH,
) -> dict[str, str]:
    """The metadata of a file made from a model with metadata `model` by `recipe`; `parents` are (file, sha256), the
    model first. Its encoded length does not grow when hashes replace placeholders of the same width.
    """
    models: dict[str, Any] = {}
    older = json_of(model, A1111_MODELS)
    if isinstance(older, dict):
        models |= {key: value for key, value in older.items() if isinstance(value, dict)}
    for i, (file, sha256) in enumerate(parents):
        own = json_of(model, A1111_RECIPE) if i == 0 else None
        models[sha256] = {"name": file, "legacy_hash": "", "sd_merge_recipe": own}
    a1111 = {
        "type": "dodgeburn",
        "primary_model_hash": parents[0][1],
        "secondary_model_hash": None,
        "tertiary_model_hash": None,
        "interp_method": recipe["kind"],
        "multiplier": recipe["added"][0]["strength"],
        "added": [{key: one[key] for key in ("file", "sha256", "strength")} for one in recipe["added"]],
        "custom_name": Path(out).stem,
    }
    return made_from(model, recipe, a1111, models, [file for file, _ in parents], layout, out, tensors_sha256)
