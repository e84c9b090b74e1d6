"""What a checkpoint's metadata says, and what a merged file's says: recipe, parents, ModelSpec.

safetensors metadata maps text to text, so everything structured is JSON text. A merged file carries

- `format: pt`, which tools look for when they load;
- `dodgeburn.recipe`: our recipe, enough to repeat and to check the merge (content hashes, no local paths);
- `sd_merge_recipe`, `sd_merge_models`: the two keys of A1111 (PR #9312), parents by sha256, with their own
  recipes;
- `modelspec.*`: Stability's ModelSpec 1.0.1, with `merged_from` and the hash of all bytes after the header;
- every other key of A as it was, above all `dodgeburn.configs` (component configs, so that a model loads
  offline).

No dates: the same inputs and recipe give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.layout import Layout

RECIPE = "dodgeburn.recipe"
CONFIGS = "dodgeburn.configs"
A1111_RECIPE = "sd_merge_recipe"
A1111_MODELS = "sd_merge_models"
SPEC_HASH = "modelspec.hash_sha256"
NO_HASH = "0" * 64  # as wide as the hash that replaces it when the file is complete

ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1"}
_RESOLUTIONS = {"sdxl": "1024x1024", "sd15": "512x512"}
# What says something about A's bytes or making that is not true of the merged file.
STALE = ("modelspec.date", "modelspec.merged_from", "sshs_model_hash", "sshs_legacy_hash", SPEC_HASH)


def json_of(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON value under `key`; None if there is none, it is not JSON or nested beyond reason."""
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        return None


def recipe_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Our recipe in the metadata, or None."""
    value = json_of(metadata, RECIPE)
    return value if isinstance(value, dict) else None


def configs_of(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Component configs (unet, vae, text_encoder, …) that a file written by us carries, or None."""
    value = json_of(metadata, CONFIGS)
    return value if isinstance(value, dict) and all(isinstance(c, dict) for c in value.values()) else None


def to_json(value: object) -> str:
    """JSON text, the same for the same value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def resolution(metadata: Mapping[str, str], layout: Layout) -> str:
    """The native picture size as WIDTHxHEIGHT: as the file says it, from its configs, or the architecture's
    own.
    """
    said = metadata.get("modelspec.resolution")
    if said:
        return said
    configs = configs_of(metadata) or {}
    sample = configs.get("unet", {}).get("sample_size")
    levels = configs.get("vae", {}).get("block_out_channels")
    if isinstance(sample, int) and isinstance(levels, list):
        size = sample * 2 ** (len(levels) - 1)
        return f"{size}x{size}"
    return _RESOLUTIONS[layout.name]


def made_from(
    model: Mapping[str, str],
    recipe: Mapping[str, Any],
    a1111: Mapping[str, Any],
    models: Mapping[str, Any],
    files: Sequence[str],
    layout: Layout,
    out: str | Path,
    tensors_sha256: str,
) -> dict[str, str]:
    """A model's metadata with what is no longer true replaced: recipe, A1111's two keys, ModelSpec. `files` are the
    parents' names.
    """
    kept = {key: value for key, value in model.items() if key not in STALE}
    return kept | {
        "format": "pt",
        RECIPE: to_json(recipe),
        A1111_RECIPE: to_json(a1111),
        A1111_MODELS: to_json(models),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model.get("modelspec.architecture") or ARCHITECTURES[layout.name],
        "modelspec.implementation": model.get("modelspec.implementation") or "sgm",
        "modelspec.title": Path(out).stem,
        "modelspec.resolution": resolution(model, layout),
        "modelspec.merged_from": ", ".join(Path(file).stem for file in files),
        SPEC_HASH: "0x" + tensors_sha256,
    }
