"""Metadata of a checkpoint made from one model and things added to it: recipe, parents by hash, ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.metadata import (
    A1111_MODELS,
    A1111_RECIPE,
    NO_HASH,
    RECIPE,
    SPEC_HASH,
    json_of,
    resolution,
    to_json,
)

_SPEC = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1"}
# What says something about the model's bytes or making that is not true of what was made from it.
STALE = ("modelspec.date", "modelspec.merged_from", "sshs_model_hash", "sshs_legacy_hash", SPEC_HASH)


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
    kept = {key: value for key, value in model.items() if key not in STALE}
    return kept | {
        "format": "pt",
        RECIPE: to_json(recipe),
        A1111_RECIPE: to_json(a1111),
        A1111_MODELS: to_json(models),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model.get("modelspec.architecture") or _SPEC[layout.name],
        "modelspec.implementation": model.get("modelspec.implementation") or "sgm",
        "modelspec.title": Path(out).stem,
        "modelspec.resolution": resolution(model, layout),
        "modelspec.merged_from": ", ".join(Path(file).stem for file, _ in parents),
        SPEC_HASH: "0x" + tensors_sha256,
    }
