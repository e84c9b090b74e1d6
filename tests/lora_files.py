"""Random adapter files for tests: the modules of a pico model, in any algorithm, under plain kohya keys."""

from __future__ import annotations

from functools import cache

import torch
from tiny_checkpoints import build


@cache
def module_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """`component.module` -> weight shape in diffusers, of all matrices and convolutions but embeddings and the VAE."""
    out: dict[str, tuple[int, ...]] = {}
    for part, model in build(kind).items():
        for name, module in model.named_modules():
            if part != "vae" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                tail = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
                out[f"{part}.{tail}"] = tuple(module.weight.shape)
    return out


def kohya_name(module: str, kind: str) -> str:
    """kohya's name of a module, spelled out here on its own for the tests to compare with."""
    component, _, name = module.partition(".")
    number = {"unet": "unet", "text_encoder": "te1" if kind == "sdxl" else "te", "text_encoder_2": "te2"}[component]
    return f"lora_{number}_{name.replace('.', '_')}"


def random_lora(
    kind: str, rank: int = 2, alpha: float | None = 1.0, seed: int = 0, only: str = ""
) -> dict[str, torch.Tensor]:
    """kohya LoRA (LoCon) of every module whose name holds `only`."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {}
    for module, shape in module_shapes(kind).items():
        if only in module:
            name, ones = kohya_name(module, kind), [1] * (len(shape) - 2)
            out[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator)
            out[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=generator)
            if alpha is not None:
                out[f"{name}.alpha"] = torch.tensor(alpha)
    return out
