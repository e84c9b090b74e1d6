"""What the U-Net's blocks say while it works, pooled: free, because the sampler makes the call anyway.

Every down block, the middle and every up block of a U-Net is asked for the mean and the deviation of each channel over
the picture. The last two up blocks are also kept as maps, since a defect is somewhere. The blocks are found by
diffusers' names, so SD1.5, SDXL and the pocket go through the same lines. Sources: average-pooled stages as an input
are LRM's (arXiv 2502.01051); Probe-Select (2603.02829) reads one up block as a map.
"""

from __future__ import annotations

from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dodgeburn.errors import UserError

MAP_CHANNELS = 64  # of a map; wider blocks are mixed down to so many
MAP_SIDE = 16  # the last block's map has at most so many cells a side, the one before half of that
MAPS = ("near", "far")  # of the last up block, and of the one before


def stages_of(unet: nn.Module) -> tuple[tuple[str, int], ...]:
    """(name, channels) of each block that is pooled, in the order in which they work: down0, ..., mid, up0, ..."""
    config: Any = unet.config
    widths = [int(w) for w in config["block_out_channels"]]
    stages = [(f"down{i}", width) for i, width in enumerate(widths)]
    if getattr(unet, "mid_block", None) is not None:
        stages.append(("mid", widths[-1]))
    return (*stages, *((f"up{i}", width) for i, width in enumerate(reversed(widths))))


def pooled(hidden: Tensor) -> Tensor:
    """Means and then deviations of the channels of [n, c, h, w] over the picture: fp32 [n, 2c]."""
    flat = hidden.flatten(2).float()
    mean = flat.mean(2)
    # torch.std_mean takes eight times as long on the CPU (looking at every step cost 5 % of sampling instead of 1.3 %).
    deviation = torch.linalg.vector_norm(flat - mean[..., None], dim=2) / flat.shape[2] ** 0.5
    return torch.cat([mean, deviation], 1)


def map_stages(unet: nn.Module) -> tuple[tuple[str, int], ...]:
    """(name, channels of the map) of the up blocks whose maps are kept, the last one first."""
    widths = list(reversed([int(w) for w in _config(unet)["block_out_channels"]]))
    last = len(widths) - 1
    return tuple((f"up{i}", min(widths[i], MAP_CHANNELS)) for i in (last, last - 1) if i >= 0)


def _config(unet: nn.Module) -> Any:
    return unet.config


def mapped(hidden: Tensor, side: int) -> Tensor:
    """A block's activations [n, c, h, w] as a map, fp32: pooled to at most `side` cells a side, each group of channels
    at unit variance over the picture (their scale differs from block to block), more than MAP_CHANNELS mixed."""
    h, w = hidden.shape[-2:]
    shrink = max(1.0, max(h, w) / side)
    x = hidden.float()
    if shrink > 1:
        x = F.adaptive_avg_pool2d(x, (max(1, round(h / shrink)), max(1, round(w / shrink))))
    x = F.group_norm(x, 8 if x.shape[1] % 8 == 0 else 1)
    if x.shape[1] > MAP_CHANNELS:
        x = torch.einsum("oc,nchw->nohw", mixing(x.shape[1]).to(x.device), x)
    return x


@lru_cache
def mixing(channels: int) -> Tensor:
    """[MAP_CHANNELS, channels] of random signs, at unit length: a fixed projection that keeps distances (Achlioptas
    2003), the same on every machine."""
    signs = np.random.default_rng(channels).integers(0, 2, (MAP_CHANNELS, channels)) * 2 - 1
    return torch.from_numpy((signs / channels**0.5).astype(np.float32))


class Probe:
    """Hooks on a U-Net's blocks, in a `with` block: afterwards the U-Net is as before.

    After each U-Net call, `features` is fp32 [rows, f] of that call (rows of both guidance halves), `output` its raw
    output, `maps()` what the last two up blocks gave. While `on` is False blocks are not looked at, the output is.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.stages = stages_of(unet)
        self.on = True
        self.pool = True  # whether features are wanted
        self.output: Tensor | None = None
        self._mapped = [name for name, _ in map_stages(unet)]
        self._found: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def _block(self, name: str) -> nn.Module:
        unet: Any = self.unet
        if name == "mid":
            return unet.mid_block
        blocks = unet.down_blocks if name.startswith("down") else unet.up_blocks
        return blocks[int(name.lstrip("downup"))]

    def __enter__(self) -> Probe:
        for name, _ in self.stages:
            self._handles.append(self._block(name).register_forward_hook(self._hook(name)))
        self._handles.append(self.unet.register_forward_hook(self._end))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()
        self._hidden.clear()
        self.output = None

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.on:
                hidden = output[0] if isinstance(output, tuple) else output
                if self.pool:
                    self._found[name] = pooled(hidden)
                if name in self._mapped:
                    self._hidden[name] = hidden

        return keep

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output.sample

    @property
    def features(self) -> Tensor:
        """Of the last call. Raises UserError if there was none."""
        if len(self._found) != len(self.stages):
            raise UserError("the U-Net has not been called yet: there are no features")
        return torch.cat([self._found[name] for name, _ in self.stages], 1)

    def maps(self, rows: int) -> list[Tensor]:
        """Of the last call's last `rows` rows (those with the prompt): fp32 [rows, c, h, w] of each of `map_stages`."""
        sides = (MAP_SIDE, MAP_SIDE // 2)
        return [mapped(self._hidden[name][-rows:], side) for name, side in zip(self._mapped, sides, strict=False)]
