"""A model to a single .safetensors file (SDXL / SD1.5 key names) or to a diffusers folder."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dodgeburn.checkpoint.convert import diffusers_to_single_file
from dodgeburn.checkpoint.metadata import CONFIGS, SPEC_HASH
from dodgeburn.checkpoint.tensorfile import save_tensors
from dodgeburn.checkpoint.text_keys import classic_text_name
from dodgeburn.errors import UserError
from dodgeburn.models.model import Model

_PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
_INPAINTING = {"sdxl": "StableDiffusionXLInpaintPipeline", "sd15": "StableDiffusionInpaintPipeline"}
_SCHEDULER = "DPMSolverMultistepScheduler"  # what our default sampler, dpmpp_2m, is called there
_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


def save_single_file(
    model: Model,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one .safetensors file with ldm/sgm key names that A1111, ComfyUI and `load_model` read,
    atomically.

    Component configs go into the metadata key `dodgeburn.configs`, so that the file loads without a folder
    or network. `metadata` None keeps that of the file the model came from. `dtype` None keeps each
    tensor's. Raises UserError for an unwritable place, or one that is the model's own file.
    """
    components = {part: _state(module, dtype) for part, module in model.components().items()}
    tensors = diffusers_to_single_file(components, {part: model.configs[part] for part in components})
    inputs = [model.source] if model.source is not None and model.source.is_file() else []
    save_tensors(
        path,
        tensors,
        {**kept_metadata(model.metadata if metadata is None else metadata), CONFIGS: json.dumps(model.configs)},
        inputs,
    )


def save_diffusers_folder(model: Model, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `StableDiffusionXLPipeline.from_pretrained` (SD1.5: `StableDiffusionPipeline`)
    loads as it is: components, tokenizers, scheduler, model_index.json. It appears complete or not at all.

    Raises UserError if the folder exists already and is not empty, or cannot be written.
    """
    with new_folder(folder) as part:
        _write_components(model, part, dtype)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that gets the name `folder` at the end, and is removed if anything went wrong.

    Raises UserError if the folder exists already and is not empty, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: give a new folder")
    part = target.parent / f".dodgeburn-{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        part.mkdir(parents=True)
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_components(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    components = model.components()
    write_descriptions(folder, model.layout.name, components, model.tokenizers, model.scheduler_config)
    for part, module in components.items():
        state = _state(module, dtype)
        notes = kept_metadata(model.metadata) if part == "unet" else {}
        if part.startswith("text"):
            # The names of all releases but transformers >= 5.6 (which reads both).
            state = {classic_text_name(name): tensor for name, tensor in state.items()}
        save_tensors(folder / part / weights_name(part), state, notes)


def weights_name(part: str) -> str:
    """The name of a component's weight file in a diffusers folder."""
    return _WEIGHTS.get(part, "model.safetensors")


def write_descriptions(
    folder: Path,
    layout_name: str,
    modules: Mapping[str, Any],
    tokenizers: Sequence[Any],
    scheduler_config: Mapping[str, Any],
) -> None:
    """Everything of a diffusers folder but the weights: configs of the components (their modules may be empty),
    tokenizers, scheduler, model_index.json.
    """
    inpainting = int(modules["unet"].config.get("in_channels", 4)) == 9
    index: dict[str, Any] = {
        "_class_name": (_INPAINTING if inpainting else _PIPELINES)[layout_name],
        "_diffusers_version": _diffusers_version(),
    }
    for part, module in modules.items():
        (folder / part).mkdir()
        if part in _WEIGHTS:
            module.save_config(folder / part)
        else:
            module.config.save_pretrained(folder / part)
        index[part] = ["diffusers" if part in _WEIGHTS else "transformers", type(module).__name__]
    for i, tokenizer in enumerate(tokenizers):
        name = "tokenizer" if i == 0 else f"tokenizer_{i + 1}"
        _save_tokenizer(tokenizer, folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    scheduler = {**scheduler_config, "_class_name": _SCHEDULER, "_diffusers_version": _diffusers_version()}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", _SCHEDULER]
    if layout_name == "sdxl":
        index["force_zeros_for_empty_prompt"] = False  # an empty negative prompt is encoded, as we do
        index["feature_extractor"] = index["image_encoder"] = [None, None]
    else:
        index["requires_safety_checker"] = False
        index["feature_extractor"] = index["image_encoder"] = index["safety_checker"] = [None, None]
    _write_json(folder / "model_index.json", index)


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata without what is not true of its tensors under other names and types (the hash of them), and
    without `format`, which every writer adds.
    """
    return {key: value for key, value in metadata.items() if key not in ("format", SPEC_HASH)}


def _state(module: Any, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    if dtype is None:
        return state
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
    # transformers 5 writes tokenizer.json only; older ones and other tools want vocab.json and merges.txt.
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    _write_json(folder / "vocab.json", saved["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)
