"""What looking at pictures on their way costs, in processor time against making them. Part of `foresee.py`; by itself:

python benchmarks/foresee_overhead.py --json
python benchmarks/foresee_overhead.py --layout sd15 --json     real size, random weights, a few minutes

The second makes one picture of 4 steps with a look at each by a model of SD1.5's (or SDXL's) keys and shapes and an
untrained estimator of the packaged one's form: costs don't depend on weights. Its overhead is that of 8 looks in 20
steps, by these costs.

overhead: pooling, observing and judging against all the rest of making 32 pictures of 20 guided steps in one batch.
per_look, per_look_half: one look against one guided U-Net call (both halves) of the same pictures, and against one half
of it. decoding, reading: what decoding and the critic's reading cost for a picture, against one guided call for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import write_random

from dodgeburn.foresee import features
from dodgeburn.foresee.ahead import pocket_critic
from dodgeburn.foresee.collect import moments
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.network import Network
from dodgeburn.foresee.observe import Observer, space_of
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.model import TOKENIZER
from dodgeburn.sampling.loop import GenerateSettings, Step, generate

PICTURES, STEPS, LOOKS = 32, 20, 8
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


def overhead(model: Model, estimator: Estimator, pictures: int = PICTURES, steps: int = STEPS) -> dict[str, float]:
    """The figures above; those of the critic only for the pocket, which has one."""
    settings, prompts = GenerateSettings(steps=steps), [PROMPT] * pictures
    generate(model, prompts[:2], [0, 1][:pictures], settings.model_copy(update={"steps": min(steps, 2)}))  # warm up
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
                made = generate(model, prompts, list(range(pictures)), settings, callback, pictures)
    finally:
        model.unet.forward, features.pooled = forward, pool
    s = {"pool": 0.0, "observe": 0.0, **clock.seconds}
    own = s["pool"] + s["observe"] + s["look"]
    call = (s["unet"] - s["pool"]) / steps
    look = (s["look"] + s["pool"]) / looked
    found = {"overhead": own / (s["whole"] - own), "looks": looked, "steps": steps, "per_look": look / call,
             "per_look_half": 2 * look / call, "whole_s": s["whole"], "call_s": call, "look_s": look}  # fmt: skip
    if model.layout.name == "pocket":
        found |= reading(model, np.stack([np.asarray(g.image) for g in made]), call)
    else:
        found["overhead"] = LOOKS * look / (STEPS * call)
    return found


def reading(model: Model, pictures: np.ndarray, call: float) -> dict[str, float]:
    """Seconds of decoding and reading so many pictures, over those of a guided call for them."""
    clock, n = Clock(), len(pictures)
    side = int(model.unet.config["sample_size"])
    latents = torch.randn(
        n, int(model.unet.config["in_channels"]), side, side, generator=torch.Generator().manual_seed(0)
    )
    with clock("decode"):
        decode_pictures(model.vae, latents)
    critic = pocket_critic()
    critic(pictures[:2], [PROMPT] * 2)
    with clock("read"):
        critic(pictures, [PROMPT] * n)
    return {"decoding": clock.seconds["decode"] / call, "reading": clock.seconds["read"] / call}


def at_real_size(layout: str, dtype: str) -> dict[str, float]:
    """Of a model of these keys and shapes with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        write_random(path, layout)
        model = load_model(path, "cpu", dtype, TOKENIZER)
    settings = Estimator.load().network.settings
    estimator = Estimator(Network(space_of(model), settings), record={"looks": LOOKS})
    return overhead(model, estimator, pictures=1, steps=4)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the same: it takes half a minute")
    parser.add_argument("--layout", choices=("pocket", "sd15", "sdxl"), default="pocket")
    parser.add_argument("--dtype", default="fp32", help="of sd15 and sdxl: fp32, fp16 or bf16")
    options = parser.parse_args()
    if options.layout == "pocket":
        found = overhead(load_model("pocket", device="cpu", dtype="fp32"), Estimator.load())
    else:
        found = at_real_size(options.layout, options.dtype)
    for name, value in found.items():
        print(f"{name:<16} {value:.4g}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
