"""Random adapters of tiny models, for tests."""

from __future__ import annotations

import torch

from dodgeburn.models.adapters import Adapter, Factors, layers_of, new_adapter, text_layers_of
from dodgeburn.models.model import Model


def random_adapter(
    model: Model, seed: int = 0, layer_set: str = "full", text: bool = True, rank: int = 2, alpha: float = 1.0,
    size: float = 0.3, name: str = "adapter",
) -> Adapter:  # fmt: skip
    """An adapter that visibly changes every layer of a set, and of the text encoders if asked for."""
    components = model.components()
    layers = [f"unet.{layer}" for layer in layers_of(model.unet, layer_set)]
    for part, encoder in components.items():
        if text and part.startswith("text_encoder"):
            tails = [t if t.startswith("text_") else f"text_model.{t}" for t in text_layers_of(encoder)]
            layers += [f"{part}.{tail}" for tail in tails]
    made = new_adapter(components, layers, rank, alpha, seed, name).factors()
    generator = torch.Generator().manual_seed(seed + 1)
    filled = {
        module: Factors(f.down, size * torch.randn(f.up.shape, generator=generator), f.alpha)
        for module, f in made.items()
    }
    return Adapter(filled, name)


def change(adapter: Adapter, module: str) -> torch.Tensor:
    """up @ down * alpha / rank as [out, inputs], in float64."""
    f = adapter.factors()[module]
    return f.up.flatten(1).double() @ f.down.flatten(1).double() * (f.alpha / f.rank)
