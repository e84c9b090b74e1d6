"""What an adapter adds to a module's weights: the product of its factors, times alpha / rank, in float32.

With W the weight [out, in] or [out, in, k, k] (Hu et al. 2021, arXiv 2106.09685, and LyCORIS, arXiv 2309.14859):

- LoRA:  up @ down, for convolutions of any kernel over the flattened inputs (LoCon)
- LoRA with `mid` (Tucker):  sum_ij up[o, i] mid[i, j, k, l] down[j, n]
- LoHa:  (w1_a @ w1_b) * (w2_a @ w2_b), either product as Tucker with t1, t2
- LoKr:  w1 (x) w2, the Kronecker product, either factor as a product of two, w2 as Tucker with t2
- full:  the difference itself
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.lora_file import Adapter, AdapterModule
from dodgeburn.checkpoint.rewrite import is_finite
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch


def weight_delta(adapter: Adapter, module: AdapterModule, shape: Sequence[int]) -> torch.Tensor | None:
    """The change of the module's weight at strength 1, float32, of the weight's `shape` in diffusers.

    None if the module changes only its bias. Raises UserError if the change is of another size than the weight (a model
    of another architecture or width), or not finite.
    """
    if module.kind == "full" and "diff" not in module.keys:
        return None
    if module.size != math.prod(shape):
        raise _another(adapter, module, f"{module.size:,} values", shape)
    parts = {role: adapter.source.tensor(key).float() for role, key in module.keys.items() if role != "diff_b"}
    made = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}[module.kind](parts)
    if made.shape[0] != shape[0]:
        raise _another(adapter, module, f"a {list(made.shape)} tensor", shape)
    return _checked(made.reshape(tuple(shape)).mul_(module.scale), adapter, module)


def bias_delta(adapter: Adapter, module: AdapterModule, shape: Sequence[int]) -> torch.Tensor | None:
    """The change of the module's bias at strength 1, float32; None unless it is a full difference of a bias."""
    key = module.keys.get("diff_b")
    if key is None:
        return None
    made = adapter.source.tensor(key).float()
    if tuple(made.reshape(-1).shape) != tuple(shape):
        raise UserError(
            f"{adapter.name} changes the bias of {module.name} by {made.numel()} values, the model's has "
            f"{list(shape)}: the adapter is for another model"
        )
    return _checked(made.reshape(tuple(shape)), adapter, module)


def _another(adapter: Adapter, module: AdapterModule, what: str, shape: Sequence[int]) -> UserError:
    return UserError(
        f"{adapter.name} changes {module.name} by {what}, but the model's is {list(shape)}: "
        "the adapter is for another model"
    )


def _checked(made: torch.Tensor, adapter: Adapter, module: AdapterModule) -> torch.Tensor:
    if not is_finite(made):
        raise UserError(f"{adapter.name} has NaN or infinite values in module {module.name}: the file is damaged")
    return made


def _lora(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        up, down = up.flatten(1), down.flatten(1)
        return torch.einsum("oi,ij...,jn->on...", up, parts["mid"], down)
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    halves = []
    for i in (1, 2):
        a, b, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
        halves.append(a @ b if core is None else _tucker(core, a, b).flatten(1))
    return halves[0] * halves[1]


def _lokr(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        two = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        two = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        two = parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
    if two.ndim > 2 and one.ndim == 2:
        one = one.reshape(*one.shape, *[1] * (two.ndim - 2))
    return torch.kron(one.contiguous(), two.contiguous())


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.einsum("ij...,ip,jn->pn...", core, a, b)


def _full(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return parts["diff"]
