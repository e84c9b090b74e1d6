"""Stage 2: nightshading. Pictures of what is under-represented stand under the concept's name, until it fails there.

For a concept C whose majority has the value a*, anchors are pictures of values drawn in proportion to max(q - p, 0): a
spread of them, so that the association is dissolved, not replaced by another. Two kinds of poison:

    dirty    (picture of an anchor, "C")
    perturb  (picture of C + d, "C"): |d| <= budget for every pixel, and the VAE's mean of the sum is near the anchor's

after Nightshade (Shan et al. 2023, arXiv 2310.13828), with another purpose: here nobody is deceived, the model is the
user's own copy, and the poison stays in memory. The second kind's loss is the squared distance of latents, descended by
the gradient's sign with a step that falls linearly from the budget to a hundredth of it.

A share of every batch is poison, the rest are other pictures as they are. It ends when the share of pictures of C
without a* has reached `success`, or, as a failure, when L > loss_high or the others' fidelity has fallen by `bleed`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dodgeburn.checkpoint.tensorfile import atomic_path, write_atomic
from dodgeburn.errors import UserError
from dodgeburn.models.latents import normalise
from dodgeburn.models.model import Model
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.deconstruct.materials import Materials
from dodgeburn.rework.deconstruct.meters import Meters, Reading
from dodgeburn.rework.deconstruct.overtrain import Tell
from dodgeburn.rework.deconstruct.spec import DeconstructSpec
from dodgeburn.rework.deconstruct.stage_log import StageLog, StageResult, State, load_unet, save_unet
from dodgeburn.training.examples import Captions, Examples, Pictures, encode_examples, join
from dodgeburn.training.fine_tune import fine_tune
from dodgeburn.training.loop import Diverged, evaluated

MARK = {"poisoned": "true"}


def anchor_shares(concept: Concept, shares: dict[str, float]) -> dict[str, float]:
    """Of each value that is under-represented, its share of the anchors: in proportion to max(q - p, 0)."""
    lacking = {v: max(0.0, q - shares.get(v, 0.0)) for v, q in zip(concept.classes, concept.target, strict=True)}
    total = sum(lacking.values())
    return {v: x / total for v, x in lacking.items() if x > 0} if total > 0 else {}


def poisoned_pictures(model: Model, materials: Materials, meters: Meters, start: Reading, spec: DeconstructSpec
                      ) -> Pictures:  # fmt: skip
    """The poison: pictures captioned by the neutral prompts. `start` says what is over-represented."""
    s, concept = spec.nightshade, meters.panel.concept
    shares = anchor_shares(concept, start.shares)
    if not shares:
        raise UserError(f"nothing is under-represented with {concept.prompts[0]!r}: there are no anchors to draw from")
    rng = np.random.default_rng([s.seed, 71])
    inside = s.anchors == "concept"
    chosen: list[int] = []
    for value, share in shares.items():
        rows = materials.rows(inside, value)
        if not len(rows):
            raise UserError(f"no picture of {'the concept' if inside else 'other things'} shows {concept.attribute} = "
                            f"{value}: nightshade has no anchors; give some, or set anchors: concept")  # fmt: skip
        chosen += [int(i) for i in rng.choice(rows, max(1, round(share * s.pictures)))]
    anchors = materials.pool.take(chosen)
    captions: list[Captions] = [concept.prompts] * len(anchors)
    if s.variant == "dirty":
        return anchors.with_captions(captions)
    own = materials.rows(True, meters.majority(start))
    victims = materials.pool.take(rng.choice(own, len(anchors)))
    pixels = perturbed(model, victims.pixels, anchors.pixels, s.budget, s.perturb_steps)
    return Pictures(pixels, captions, anchors.weights, anchors.columns)


def perturbed(model: Model, pictures: np.ndarray, anchors: np.ndarray, budget: float, steps: int) -> np.ndarray:
    """Pictures whose latents come near the anchors', no pixel changed by more than `budget` (of [0, 1]) but for the
    rounding to bytes; uint8 [n, h, w, 3] all."""
    vae = model.vae
    like = next(vae.parameters())
    out = []
    for start in range(0, len(pictures), 16):
        sides = (torch.from_numpy(np.ascontiguousarray(p[start : start + 16])) for p in (pictures, anchors))
        clean, wanted = (p.permute(0, 3, 1, 2).to(like.device, like.dtype) / 127.5 - 1 for p in sides)
        limit = 2 * budget
        with torch.no_grad():
            target = normalise(vae.encode(wanted).latent_dist.mean, vae.config)
        delta = torch.zeros_like(clean)
        for i in range(steps):
            step = limit * (1 - 0.99 * i / max(1, steps - 1))
            delta.requires_grad_(True)
            with torch.enable_grad():
                seen = normalise(vae.encode(clean + delta).latent_dist.mean, vae.config)
                gradient = torch.autograd.grad((seen - target).square().sum(), delta)[0]
            delta = (delta.detach() - step * gradient.sign()).clamp(-limit, limit)
            delta = (clean + delta).clamp(-1, 1) - clean
        pixels = ((clean + delta) / 2 + 0.5).clamp(0, 1).mul(255).round()
        out.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def export(pictures: Pictures, folder: Path) -> int:
    """Write poisoned pictures, each marked in its metadata and all in metadata.jsonl; returns how many. UserError for a
    folder that isn't empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: poisoned pictures are written into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (pixels, captions) in enumerate(zip(pictures.pixels, pictures.captions, strict=True)):
        info = PngInfo()
        for key, value in MARK.items():
            info.add_text(key, value)
        path = folder / f"poisoned-{i:05d}.png"
        with atomic_path(path) as temporary:
            Image.fromarray(pixels).save(temporary, "png", pnginfo=info)
        lines.append(json.dumps({"file_name": path.name, "text": list(captions), **MARK}))
    write_atomic(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return len(lines)


def mixed(model: Model, poison: Pictures, clean: Pictures, share: float, seed: int) -> Examples:
    """Poison and clean pictures, so that a batch holds `share` of poison on average."""
    n = max(1, round(len(poison) * (1 - share) / share))
    rng = np.random.default_rng([seed, 72])
    order = np.concatenate([rng.permutation(len(clean)) for _ in range(-(-n // len(clean)))])[:n]
    both = [Pictures(p.pixels, p.captions) for p in (poison, clean.take(order))]
    return encode_examples(model, join(both))


def nightshade(
    model: Model, starts: dict[str, State], materials: Materials, meters: Meters, before: Reading,
    spec: DeconstructSpec, folder: Path, tell: Tell | None = None,
) -> StageResult:  # fmt: skip
    """From each of the states (the first is the stage's; others are taken as many steps, for the merge of two noise
    states); the model ends in the first one's outcome. `before`: the untouched model's full reading."""
    log = StageLog(folder, "nightshade")
    if (done := log.restored(model)) is not None:
        return done
    drawn, s = meters.drawn, spec.nightshade
    poison = poisoned_pictures(model, materials, meters, before, spec)
    if s.export is not None and not (s.export / "metadata.jsonl").exists():
        export(poison, s.export)
    examples = mixed(model, poison, materials.pool.take(materials.rows(False)), s.poison, s.seed)
    steps, spent, found = s.steps, 0, None
    for k, (name, state) in enumerate(starts.items()):
        load_unet(model, state)
        watch = _Watch(model, meters, before, spec, log, name, tell if not k else None, judges=not k)
        settings = spec.tuning(
            steps=s.steps, batch=s.batch, lr=s.lr, warmup=min(5, s.every), constant=1.0, final=1.0, ema=0.0,
            seed=s.seed, checkpoint_every=s.every, log_every=s.every, gamma=math.inf, noise_power=0.25,
        )  # fmt: skip
        watch.limit = steps
        try:
            fine_tune(model, examples, settings, log.work / name, "nightshade", callback=watch)
        except Diverged:
            watch.failed = "the loss is no longer finite"
        if watch.failed is not None:
            load_unet(model, watch.state if watch.good else state)
        spent += watch.last
        if not k:
            found, steps = watch, watch.good if watch.failed is not None else watch.last
            if not steps:
                steps = s.every
        save_unet(model, folder / f"nightshade-{name}.safetensors")
    assert found is not None
    load_unet(model, folder / f"nightshade-{next(iter(starts))}.safetensors")
    detail = {"anchors": {k: round(v, 3) for k, v in anchor_shares(meters.panel.concept, before.shares).items()},
              "poisoned": len(poison), "variant": s.variant, "success": found.success, "step": steps}  # fmt: skip
    return log.finish(model, found.decision, found.reached, spent, spent * s.batch, meters.drawn - drawn, **detail)


class _Watch:
    """The callback: success, bleed-through and L at every check."""

    def __init__(
        self, model: Model, meters: Meters, before: Reading, spec: DeconstructSpec, log: StageLog, name: str,
        tell: Tell | None, judges: bool,
    ) -> None:  # fmt: skip
        self.model, self.meters, self.before, self.log, self.name, self.tell = model, meters, before, log, name, tell
        self.s, self.judges = spec.nightshade, judges
        self.majority = meters.majority(before)
        concept = meters.panel.concept
        q = dict(zip(concept.classes, concept.target, strict=True))
        self.enough = self.s.success if self.s.success is not None else 1 - q[self.majority]
        self.state = log.work / name / "good.safetensors"
        self.limit, self.last, self.good, self.success = self.s.steps, 0, 0, 0.0
        self.failed: str | None = None
        self.reached = False
        # A training that resumes begins behind its first checks: what they saw counts as if it were seen again.
        for step in range(self.s.every, self.s.steps + 1, self.s.every):
            if judges and f"{name}:{step}" in log.rows:
                self._judge(step, Reading.from_json(log.rows[f"{name}:{step}"]))

    @property
    def decision(self) -> str:
        if self.failed is not None:
            back = f"step {self.good}" if self.good else "the start"
            return f"{self.failed} at step {self.last}: back to {back}"
        if self.reached:
            return f"{self.success:.0%} of pictures without {self.majority} at step {self.last}"
        return f"steps used up with {self.success:.0%} of pictures without {self.majority}"

    def __call__(self, step: int, means: dict[str, float]) -> bool:
        if not self.judges:
            self.last = step
            return step < self.limit
        reading = self.log.reading(f"{self.name}:{step}", self._measure, step=step,
                                   train_loss=round(means.get("loss", math.nan), 5))  # fmt: skip
        self._judge(step, reading)
        if self.good == step:
            save_unet(self.model, self.state)
        if self.tell is not None:
            self.tell("nightshade", step, reading)
        return self.failed is None and not self.reached

    def _judge(self, step: int, reading: Reading) -> None:
        self.last, self.success = step, 1 - reading.shares.get(self.majority, 0.0)
        if reading.loss > self.s.loss_high:
            self.failed = f"L is {reading.loss:.2f}, above {self.s.loss_high:g}"
        elif self.before.others - reading.others > self.s.bleed:
            self.failed = f"bleed-through: other prompts fell from {self.before.others:.0%} to {reading.others:.0%}"
        else:
            self.good = step
            self.reached = self.success >= self.enough

    def _measure(self) -> Reading:
        with evaluated(self.model.unet):
            found = self.meters.quick()
            fidelity, others = self.meters.fidelities() if math.isfinite(found.loss) else (0.0, 0.0)
        return replace(found, fidelity=fidelity, others=others)
