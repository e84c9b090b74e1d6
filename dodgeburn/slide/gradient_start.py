"""A start for training: the loss's own gradient, by singular values, in place of random factors.

LoRA-GA (Wang et al. 2024, arXiv 2407.05000) begins with the leading singular vectors of the full weights' gradient. A
slider changes nothing at first, so that gradient, averaged over cached points, is the direction of the edit itself:

    G = mean_i dL_i / dW = U S V^T      down = V_r^T,  up = 0  or  -U_r S_r times a step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Factors, layer_at


def mean_gradients(
    components: Mapping[str, nn.Module], layers: Iterable[str], loss: Callable[[int], Tensor], count: int
) -> dict[str, Tensor]:
    """Mean gradient of loss(0) ... loss(count - 1) by each layer's weight, on the CPU in fp32, in the weight's shape.

    layers: full names (`unet.…`). The model ends as it was; peak memory is a gradient of every layer. Raises UserError
    for a layer that isn't there, and for a loss that depends on none of them.
    """
    if count < 1:
        raise UserError(f"a gradient over {count} losses: expected at least 1")
    weights = {name: layer_at(components, name).weight for name in layers}
    frozen = {name: weight.requires_grad for name, weight in weights.items()}
    kept = {name: weight.grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        with torch.enable_grad():
            for i in range(count):
                loss(i).backward()
        found = {name: w.grad.detach().float().cpu() / count for name, w in weights.items() if w.grad is not None}
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(frozen[name])
            weight.grad = kept[name]
    if not any(bool(gradient.any()) for gradient in found.values()):
        raise UserError("the loss doesn't depend on the layers: there is no gradient to start from")
    return found


def gradient_start(
    components: Mapping[str, nn.Module],
    layers: Iterable[str],
    loss: Callable[[int], Tensor],
    count: int,
    rank: int = 4,
    alpha: float | None = None,
    step: float = 0.0,
    name: str = "slider",
) -> Adapter:
    """An adapter that begins in the leading directions of the mean gradient of `count` losses at scale 1.

    loss(i): differentiable by the base weights, without the adapter. alpha: the rank by default. step 0: up is zero and
    nothing is changed yet; above 0, scale 1 already goes down the gradient, so far that the changes' norm over all
    layers is that share of the weights' (a few 1e-4; on pocket 3e-3 is far too much). Layers that get no
    gradient are left out. Raises UserError for a rank below 1 or a negative step, and as `mean_gradients`.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: expected at least 1")
    if not step >= 0:
        raise UserError(f"step {step:g}: expected 0 or more")
    gradients = {k: g for k, g in mean_gradients(components, layers, loss, count).items() if bool(g.any())}
    parts = {k: _leading(g.flatten(1), rank) for k, g in gradients.items()}
    length = sum(float(s.square().sum()) for _, s, _ in parts.values()) ** 0.5
    weights = sum(float(layer_at(components, k).weight.detach().float().square().sum()) for k in parts) ** 0.5
    made = {}
    for layer, (u, s, v) in parts.items():
        shape = gradients[layer].shape
        scaling = (alpha if alpha is not None else len(s)) / len(s)
        size = (1 / 3) ** 0.5  # of a row as `new_adapter` draws them
        up = -u * s * (step * weights / length / size / scaling)
        down = (v * size).reshape(len(s), *shape[1:])
        made[layer] = Factors(down, up.reshape(shape[0], len(s), *[1] * (len(shape) - 2)), scaling * len(s))
    return Adapter(made, name)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` parts of the SVD: [out, r], [r], [r, in]."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank].float(), s[:rank].float(), v[:rank].float()
