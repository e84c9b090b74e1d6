"""Our denoising loop against diffusers' StableDiffusionXLPipeline: same model, prompts, steps, batch, in
one run.

Both encode the prompts, denoise, decode and give PIL pictures. Repeats alternate, and who goes first
alternates too, so that a machine that slows down or speeds up does both alike. The ratio (ours / theirs,
lower is better) is the median over pairs, with the interval of the median at 95 % from resampling the
pairs. Pictures are compared too.

    python benchmarks/generate.py --json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from tqdm import tqdm

from dodgeburn.errors import UserError
from dodgeburn.measure.machine import machine
from dodgeburn.models.loading import assemble, load_model
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings, generate

PROMPTS = [
    "a doctor, smiling broadly, with red hair",
    "an old man with a beard and a hat",
    "a young woman waving, blue background",
    "a sad clown with big eyes",
]


def model_of(name: str, random: bool) -> Model:
    """The named model, or one of the pocket's configs with random weights (it takes the same time)."""
    if not random:
        return load_model(name)
    from dodgeburn.pocket.model import build, component_configs, tokenizer

    torch.manual_seed(0)
    configs = component_configs()
    return assemble("random pocket", None, configs, build(configs), [tokenizer(), tokenizer()])


def pipeline_of(model: Model) -> Any:
    """diffusers' pipeline around the same modules, with the scheduler that our settings stand for."""
    scheduler = DPMSolverMultistepScheduler.from_config({**model.scheduler_config, "timestep_spacing": "trailing"})
    pipe: Any = StableDiffusionXLPipeline(
        model.vae, *model.text_encoders, *model.tokenizers, model.unet, scheduler,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timed(work: Callable[[], np.ndarray], device: torch.device) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    pictures = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, pictures


def run(model: Model, batch: int, steps: int, repeats: int, guidance: float) -> dict[str, object]:
    """Seconds of both, `repeats` pairs after one unmeasured warm-up each."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    seeds = list(range(batch))
    settings = GenerateSettings(steps=steps, guidance=guidance, sampler="dpmpp_2m", spacing="trailing")
    pipe = pipeline_of(model)

    def ours() -> np.ndarray:
        made = generate(model, prompts, seeds, settings, batch_size=batch)
        return np.stack([np.asarray(m.image) for m in made])

    def theirs() -> np.ndarray:
        out = pipe(
            prompts, negative_prompt=[""] * batch, num_inference_steps=steps, guidance_scale=guidance,
            width=model.native_size, height=model.native_size,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )  # fmt: skip
        return np.stack([np.asarray(image) for image in out.images])

    first_ours, first_theirs = ours(), theirs()
    times: list[tuple[float, float]] = []
    for i in tqdm(range(repeats), unit="pair", disable=None, file=sys.stderr, leave=False):
        pair = {}
        for side in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):
            pair[side], _ = timed(ours if side == "ours" else theirs, model.device)
        times.append((pair["ours"], pair["theirs"]))
    table = np.array(times)
    ratios = table[:, 0] / table[:, 1]
    draws = np.random.default_rng(0).integers(0, repeats, (2000, repeats))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    difference = np.abs(first_ours.astype(int) - first_theirs.astype(int))
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_ci": [round(float(low), 4), round(float(high), 4)],
        "seconds_ours": round(float(np.median(table[:, 0])), 4),
        "seconds_theirs": round(float(np.median(table[:, 1])), 4),
        "largest_pixel_difference": int(difference.max()),
        "model": model.name,
        "batch": batch,
        "steps": steps,
        "guidance": guidance,
        "repeats": repeats,
        "device": model.device.type,
        "machine": machine(str(model.device)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="packaged name, file or folder of an SDXL-shaped model")
    parser.add_argument("--random", action="store_true", help="random weights in the pocket's shape")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="5 repeats: wider interval")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    repeats = min(options.repeats, 5) if options.quick else options.repeats
    try:
        if options.batch < 1 or repeats < 1:
            raise UserError("batch and repeats must be at least 1")
        model = model_of(options.model, options.random)
        if not model.has_added_conditions:
            raise UserError(f"{options.model} is no SDXL-shaped model: the benchmark compares with its pipeline")
        found = run(model, options.batch, options.steps, repeats, options.guidance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"ours {found['seconds_ours']} s, diffusers {found['seconds_theirs']} s for {options.batch} pictures")
    print(f"ratio {found['ratio']} (95 % interval {found['ratio_ci']}), pixels differ by at most "
          f"{found['largest_pixel_difference']}/255")  # fmt: skip
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
