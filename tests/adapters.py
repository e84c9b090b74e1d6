"""Random adapters of tiny models, for tests."""

from __future__ import annotations

import torch

from dodgeburn.models.adapters import Adapter, Factors, new_adapter, trained_layers
from dodgeburn.models.model import Model


def random_adapter(
    model: Model, seed: int = 0, layer_set: str = "full", text: bool = True, rank: int = 2, alpha: float = 1.0,
    size: float = 0.3, name: str = "adapter",
) -> Adapter:  # fmt: skip
    """An adapter that visibly changes every layer of a set, and of the text encoders if asked for."""
    components = model.components()
    made = new_adapter(components, trained_layers(components, layer_set, text), rank, alpha, seed, name).factors()
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
