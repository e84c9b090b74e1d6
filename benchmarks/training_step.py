"""One training step of the pocket's U-Net and text encoders on the CPU: torch's fused attention against plain products.

The loop in training/loop.py takes the faster one. Prints the median seconds of both, interleaved in one run, and
their ratio. `--json` prints one object as the last line, `--quick` takes fewer repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dodgeburn.measure.machine import machine
from dodgeburn.pocket.model import build, component_configs
from dodgeburn.training.pocket_text import encode_text


def step_of(modules: dict[str, Any], batch: int) -> Callable[[], None]:
    """A forward and backward pass on random latents and tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    tokens = torch.randint(0, 1500, (batch, 77), generator=generator)
    tokens[:, -1] = modules["text_encoder"].config.eos_token_id
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode_text(modules["text_encoder"], modules["text_encoder_2"], tokens)
            added = {"text_embeds": pooled, "time_ids": time_ids}
            out = modules["unet"](latents, timesteps, states, added_cond_kwargs=added).sample
        out.float().square().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    settings = parser.parse_args()
    torch.manual_seed(0)
    modules = build(component_configs())
    for name in ("unet", "text_encoder", "text_encoder_2"):
        modules[name].train()
    step = step_of(modules, settings.batch)
    seconds: dict[str, list[float]] = {"fused": [], "plain": []}
    for repeat in range((4 if settings.quick else 12) + 1):
        for kind, rows in seconds.items():
            with sdpa_kernel(SDPBackend.MATH) if kind == "plain" else nullcontext():
                start = time.perf_counter()
                step()
            if repeat:  # the first of each warms up
                rows.append(time.perf_counter() - start)
    median = {kind: statistics.median(rows) for kind, rows in seconds.items()}
    result = {"batch": settings.batch, "seconds": median, "ratio": median["plain"] / median["fused"],
              "machine": machine()}  # fmt: skip
    print(f"fused {median['fused']:.3f} s, plain {median['plain']:.3f} s a step: ratio {result['ratio']:.2f}")
    if settings.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
