"""Weights moved without a picture being learned: away from what an overtrained copy learned, or towards nothing at all.

Task negation (Ilharco et al. 2023, arXiv 2212.04089): theta_0 - s (theta_1 - theta_0), where theta_1 was trained on the
tie itself. Shrink and perturb (Ash and Adams 2020, arXiv 1910.08475): a theta_0 + noise, a fresher start for training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def set_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a copy back."""
    module.load_state_dict(dict(state))


def negated(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], strength: float) -> State:
    """theta_0 - strength (theta_1 - theta_0); 0 gives theta_0 bit for bit, -1 theta_1 up to rounding."""
    if strength == 0:
        return {name: value.clone() for name, value in start.items()}
    return {
        name: (value.double() - strength * (trained[name].double() - value.double())).to(value.dtype)
        if value.is_floating_point() else value.clone()
        for name, value in start.items()
    }  # fmt: skip


def shrunk(start: Mapping[str, Tensor], shrink: float = 0.95, noise: float = 0.05, seed: int = 0) -> State:
    """shrink x theta_0 + noise x (deviation of the tensor's values) x standard normal draws, for tensors of two
    dimensions and more; vectors (norms and biases) stay, or nothing would come out."""
    generator = torch.Generator().manual_seed(seed)
    out: State = {}
    for name, value in start.items():
        if value.ndim < 2 or not value.is_floating_point():
            out[name] = value.clone()
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device)
        deviation = float(value.float().std()) if value.numel() > 1 else 0.0
        out[name] = (shrink * value.float() + noise * deviation * drawn).to(value.dtype)
    return out


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a - b| / |a| over all floating tensors."""
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a if a[n].is_floating_point())
    size = sum(float(a[n].double().square().sum()) for n in a if a[n].is_floating_point())
    return float((difference / size) ** 0.5) if size else 0.0
