"""Adapters between files and memory: every spelling of LoRA read, kohya's, PEFT's and sgm's written.

Read by `checkpoint/lora_file.py`, so what `bake` reads `load_adapter` reads, and both mean the same: scale = alpha /
rank, alpha = rank where none is said. LoRA and LoCon are taken as they are, factor for factor; LoCon with a core tensor
(Tucker) has the core multiplied into its `down`, which is exact. What is no product of two factors (LoHa, LoKr, full
differences) cannot be scaled sample by sample at a low rank and is refused: `dodgeburn bake` adds it to a model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dodgeburn.checkpoint import lora_file
from dodgeburn.checkpoint.lora_file import AdapterModule, architecture_title, open_adapter
from dodgeburn.checkpoint.lora_keys import write_key
from dodgeburn.checkpoint.lora_write import adapter_metadata, check_spelling
from dodgeburn.checkpoint.metadata import NO_HASH
from dodgeburn.checkpoint.rewrite import STORED, cast_to, is_finite
from dodgeburn.checkpoint.slider_card import SliderCard, slider_of
from dodgeburn.checkpoint.sources import sha256_source
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view, dtype_name, sha256_tensors
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.adapters import Adapter, Factors, Origin, layer_at

if TYPE_CHECKING:
    from dodgeburn.models.model import Model


def load_adapter(path: str | Path, model: Model | None = None) -> Adapter:
    """An adapter file or folder as an `Adapter` in fp32, named after the file; its `origin` has hashes and slider card.

    With a model it is fitted to it at once (`fitted`). Raises UserError for files that are no adapter, are damaged,
    hold NaN, LoHa, LoKr or full differences, or are for another architecture. Keys of no module are counted in a
    DodgeburnWarning.
    """
    path = Path(path).expanduser()
    with open_adapter(path) as file:
        _check_kinds(file)
        factors = {name: _factors(file, module) for name, module in file.modules.items()}
        source = file.source.path
        whole = sha256_source(file.source)
        tensors = sha256_tensors(source) if source.suffix == ".safetensors" else whole
        file.source.check_unchanged()
        origin = Origin(source.name, whole, tensors, file.architecture, _card(file))
        name = path.name if path.is_dir() else source.stem
        if file.unmatched:
            total = len(file.unmatched) + sum(len(m.keys) for m in file.modules.values())
            _warn(f"{file.name}: {len(file.unmatched)} of {total} keys are no module's, first {file.unmatched[0]}")
    adapter = Adapter(factors, name, origin)
    return adapter if model is None else fitted(adapter, model)


def _check_kinds(file: lora_file.Adapter) -> None:
    others = Counter(module.kind for module in file.modules.values() if module.kind != "lora")
    if others:
        what = ", ".join(f"{count} {kind}" for kind, count in others.items())
        raise UserError(
            f"{file.name} is a {file.title} ({what} of {len(file.modules)} modules): only LoRA and LoCon can be "
            f"applied while pictures are made; add it to a model with: dodgeburn bake MODEL {file.name} -o OUT"
        )


def _factors(file: lora_file.Adapter, module: AdapterModule) -> Factors:
    parts = {role: file.source.tensor(key).float() for role, key in module.keys.items()}
    for role, tensor in parts.items():
        if not is_finite(tensor):
            raise UserError(f"{file.name} has NaN or infinite values in {role} of {module.name}: the file is damaged")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = torch.einsum("ij...,jn->in...", parts["mid"], down.flatten(1))
        up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))
    assert module.rank is not None
    return Factors(down, up, float(module.rank) if module.alpha is None else module.alpha)


def _card(file: lora_file.Adapter) -> SliderCard | None:
    try:
        return slider_of(file.metadata)
    except UserError as error:
        _warn(f"{file.name}: {error}; it is applied as a plain LoRA")
        return None


def fitted(adapter: Adapter, model: Model) -> Adapter:
    """The adapter with those of its modules that the model has.

    Raises UserError if its file is for another architecture, if the model has none of its modules, or if one is of
    another width. Modules that are missing are counted in a DodgeburnWarning.
    """
    origin = adapter.origin
    if origin is not None and origin.architecture not in (None, model.layout.name):
        raise UserError(
            f"{origin.file} is for {architecture_title(origin.architecture)}, but {model.name} is {model.layout.title}"
        )
    components = model.components()
    found, missing = {}, []
    for module, factors in adapter.factors().items():
        try:
            weight = layer_at(components, module).weight
        except UserError:
            missing.append(module)
            continue
        inputs, outputs = factors.down.shape[1:].numel(), factors.up.shape[0]
        if inputs != weight.shape[1:].numel() or outputs != weight.shape[0]:
            raise UserError(
                f"{adapter.name} changes {module} from {inputs} to {outputs} values, but the layer of {model.name} "
                f"goes from {weight.shape[1:].numel()} to {weight.shape[0]}: the adapter is for another model"
            )
        found[module] = factors
    total = len(found) + len(missing)
    if not found:
        raise UserError(
            f"{adapter.name} changes nothing in {model.name} ({model.layout.title}): none of its {total} modules is in "
            f"the model, first {missing[0]}"
        )
    if not missing:
        return adapter
    _warn(f"{adapter.name}: {len(missing)} of {total} modules, left out, are not in {model.name}, first {missing[0]}")
    return Adapter(found, adapter.name, origin)


def _warn(line: str) -> None:
    warnings.warn(line, DodgeburnWarning, stacklevel=4)


# -------------------- writing


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    layout: str,
    spelling: str = "kohya",
    dtype: str = "fp16",
    card: SliderCard | None = None,
    metadata: Mapping[str, str] | None = None,
    inputs: tuple[str | Path, ...] = (),
) -> None:
    """Write an adapter as .safetensors, atomically: the same adapter gives the same bytes.

    layout: "sdxl" or "sd15" (`model.layout.name`); spelling: kohya (diffusers' block names and an alpha for every
    module; every program reads it), peft or sgm; dtype: fp32 or fp16. The card goes into the metadata with ModelSpec's
    and kohya's keys; `metadata` adds to them or replaces them. `inputs`: files that the output may not be. Raises
    UserError for an unknown spelling or dtype, NaN, values too large for fp16, and as TensorWriter.
    """
    check_spelling(spelling)
    if dtype not in ("fp32", "fp16"):
        raise UserError(f"unknown dtype {dtype!r} for an adapter: expected fp32 or fp16")
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for name, factors in adapter.factors().items():
        try:
            keys = {role: write_key(name, role, spelling, layout) for role in ("down", "up")}
            for role, tensor in (("down", factors.down), ("up", factors.up)):
                tensors[keys[role]] = cast_to(tensor, STORED[dtype], f"{role} of {name}", adapter.name).cpu()
            if spelling != "peft":
                tensors[write_key(name, "alpha", spelling, layout)] = torch.tensor(factors.alpha, dtype=torch.float32)
        except KeyError:
            raise UserError(f"{adapter.name}: {name} has no {spelling} name in {layout}") from None
        if not all(map(is_finite, (factors.down, factors.up))):
            raise UserError(f"{adapter.name} has NaN or infinite values in {name}")
        size = factors.up.shape[0] * factors.down.shape[1:].numel()
        modules.append(AdapterModule(name, "lora", keys, factors.rank, factors.alpha, size))
    title = card.name if card is not None else Path(path).stem

    def said(digest: str) -> dict[str, str]:
        made = adapter_metadata(modules, layout, spelling, title, digest, card)
        return made | dict(metadata or {})

    infos = {key: (dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(path, infos, said(NO_HASH), inputs) as writer:
        for key, tensor in tensors.items():
            writer.write(key, 0, byte_view(tensor.contiguous().reshape(-1)))
        writer.replace_metadata(said(writer.sha256_tensors()))
