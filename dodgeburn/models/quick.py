"""Where bf16 products are quick: frozen networks asked many times may then be asked in bf16.

A processor with a matrix unit for bf16 (AMX) does the U-Net's products about twice as fast in it as in fp32; one
without does them slower. Weights stay as they are; only products are rounded (`torch.autocast`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from dodgeburn.models.model import Model


def bf16_is_quick(model: Model) -> bool:
    """Whether this is an fp32 model on a processor with bf16's matrix unit."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    has_unit = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public question for it
    return bool(has_unit is not None and has_unit())


def quick_products(model: Model, wanted: bool = True) -> AbstractContextManager[object]:
    """Within the context products are in bf16 where that is quick, and as ever elsewhere or unless `wanted`."""
    if not (wanted and bf16_is_quick(model)):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
