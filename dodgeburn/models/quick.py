"""Where bf16 products are quick: frozen networks asked many times may then be asked in bf16.

A processor with a matrix unit for bf16 (AMX) does the U-Net's products about twice as fast in it as in fp32, one with
AVX-512's dot products of bf16 (AMD's Zen 4 and 5) 1.3 to 1.5 times; one with neither does them slower. Weights stay as
they are; only products are rounded (`torch.autocast`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from dodgeburn.models.model import Model


def bf16_is_quick(model: Model) -> bool:
    """Whether this is an fp32 model on a processor with instructions for products of bf16."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    # torch has no public question for either
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask() for ask in asked if ask is not None)


def quick_products(model: Model, wanted: bool = True) -> AbstractContextManager[object]:
    """Within the context products are in bf16 where that is quick, and as ever elsewhere or unless `wanted`."""
    if not (wanted and bf16_is_quick(model)):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
