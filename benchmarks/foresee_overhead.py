"""What looking at pictures on their way costs, in processor time against making them. Part of `foresee.py`; by itself:

python benchmarks/foresee_overhead.py --json

overhead: pooling, observing and judging against all the rest of making 32 pictures of 20 guided steps in one batch.
per_look, per_look_half: one look against one guided U-Net call (both halves) of the same pictures, and against one half
of it. decoding, reading: what decoding and the critic's reading cost for a picture, against one guided call for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dodgeburn.foresee import features
from dodgeburn.foresee.ahead import pocket_critic
from dodgeburn.foresee.collect import moments
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.observe import Observer
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings, Step, generate

PICTURES, STEPS = 32, 20
PROMPT = "a waving old person"


class Clock:
    """Processor time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return call(*args, **kwargs)

        return counted


def overhead(model: Model, estimator: Estimator) -> dict[str, float]:
    """The figures above."""
    settings, prompts = GenerateSettings(steps=STEPS), [PROMPT] * PICTURES
    generate(model, prompts[:2], [0, 1], settings.model_copy(update={"steps": 2}))  # warm up
    clock = Clock()
    looked = 0
    forward, pool = model.unet.forward, features.pooled
    model.unet.forward, features.pooled = clock.timed("unet", forward), clock.timed("pool", pool)
    try:
        inputs, looks = estimator.inputs, estimator.looks
        with Observer(model, settings.guidance, lambda i, total: i in moments(total, looks), "features" in inputs,
                      "maps" in inputs) as observer:  # fmt: skip
            state: Any = None

            def callback(step: Step) -> None:
                nonlocal state, looked
                if step.i not in moments(step.total, looks):
                    with clock("observe"):
                        observer(step)
                    return
                with clock("look"):
                    _, state = estimator.judge(observer(step), prompts, state)
                looked += 1

            with clock("whole"):
                made = generate(model, prompts, list(range(PICTURES)), settings, callback, PICTURES)
    finally:
        model.unet.forward, features.pooled = forward, pool
    latents = torch.randn(PICTURES, *_latents(model), generator=torch.Generator().manual_seed(0))
    with clock("decode"):
        decode_pictures(model.vae, latents)
    pictures = np.stack([np.asarray(g.image) for g in made])
    critic = pocket_critic()
    critic(pictures[:2], prompts[:2])
    with clock("read"):
        critic(pictures, prompts)
    s = {"pool": 0.0, "observe": 0.0, **clock.seconds}
    own = s["pool"] + s["observe"] + s["look"]
    call = (s["unet"] - s["pool"]) / STEPS
    look = (s["look"] + s["pool"]) / looked
    return {"overhead": own / (s["whole"] - own), "looks": looked, "steps": STEPS, "per_look": look / call,
            "per_look_half": 2 * look / call, "decoding": s["decode"] / call, "reading": s["read"] / call,
            "whole_s": s["whole"]}  # fmt: skip


def _latents(model: Model) -> tuple[int, int, int]:
    side = int(model.unet.config["sample_size"])
    return int(model.unet.config["in_channels"]), side, side


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the same: it takes half a minute")
    options = parser.parse_args()
    found = overhead(load_model("pocket", device="cpu", dtype="fp32"), Estimator.load())
    for name, value in found.items():
        print(f"{name:<16} {value:.4g}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
