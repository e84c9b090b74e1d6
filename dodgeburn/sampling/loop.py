"""The denoising loop: prompts and seeds in, pictures out, one callback a step.

Progress bars, previews and early stopping all hang on the callback. A picture depends on its prompt, seed
and settings alone: noise is drawn per seed on the CPU, also the noise of stochastic solvers, so batch
size and batch mates change it by rounding at most (1/255), and not at all when the batches are the same.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.model import Model
from dodgeburn.sampling.adapted import Adapted, Applied
from dodgeburn.sampling.brownian import BrownianPath, Noise
from dodgeburn.sampling.clip_skip import resolve_clip_skip
from dodgeburn.sampling.effects import read_as_words, without_effect
from dodgeburn.sampling.guidance import Blend, Denoiser, Tuned
from dodgeburn.sampling.pictures import Generated, Planned
from dodgeburn.sampling.prompts import EncodedPrompt, encode
from dodgeburn.sampling.schedules import Schedule, initial_noise, schedule
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.sampling.solvers import SOLVERS, History
from dodgeburn.sampling.text_cache import text_cache

__all__ = [
    "Applied", "Callback", "GenerateSettings", "Generated", "Step", "Tuned", "default_batch_size", "generate",
    "planned", "stream",
]  # fmt: skip


def _nobody(x: Tensor, sigma: float) -> Tensor:
    raise RuntimeError("this step was not made by a sampler: there is no model to ask")


@dataclass(frozen=True)
class Step:
    """What a callback sees after each model call of a batch of n pictures.

    The tensors are inference tensors: `.clone()` them outside the callback before anything that needs
    gradients.
    """

    i: int  # 0-based step
    total: int  # steps in all
    sigma: float  # noise level of `latents` (variance exploding, 0.03 to 15)
    timestep: float  # the same level as the model's training time, 0..999
    latents: Tensor  # [n, c, h, w], what the model saw, about unit variance
    denoised: Tensor  # [n, c, h, w], its guess of the clean latents, guidance applied
    indices: tuple[int, ...]  # the n pictures' positions in `prompts`
    batch: int  # 0-based batch
    batches: int
    ask: Callable[[Tensor, float], Tensor] = _nobody
    """`ask(x, sigma)`: the model's guess of the clean latents for other latents [n, c, h, w] (variance exploding) of
    these pictures at another noise level; a model call like the sampler's own."""


Callback = Callable[[Step], bool | Sequence[bool] | Tensor | None]
"""None or True: go on. False: end the whole generation. n booleans: drop the pictures that have False."""


def default_batch_size(height: int, width: int) -> int:
    """Pictures a batch for latents of this size: 32 for the pocket's 16 x 16, 1 for SDXL's 128 x 128."""
    return max(1, min(32, 16 * 1024 // (height * width)))


def generate(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerateSettings | None = None,
    callback: Callback | None = None,
    batch_size: int | None = None,
    encoded: Mapping[str, EncodedPrompt] | None = None,
    adapters: Sequence[Applied] = (),
    tuned: Tuned | None = None,
) -> list[Generated]:
    """One picture for each (prompt, seed) pair, in that order; pictures that `callback` dropped are left out.

    `encoded` (from `prompts.encode`, with the same text encoders) spares encoding; texts missing there are
    encoded. `adapters` (LoRAs, sliders) change the model meanwhile, each picture by scales of its own. `tuned`: another
    model whose difference is added to every guess. Raises UserError for lists of unequal length, bad seeds, a size that
    the model cannot make, or an adapter or tuned model of another kind.
    """
    found = stream(model, prompts, seeds, settings, callback, batch_size, encoded, adapters, tuned)
    return sorted(found, key=lambda g: g.index)


def stream(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerateSettings | None = None,
    callback: Callback | None = None,
    batch_size: int | None = None,
    encoded: Mapping[str, EncodedPrompt] | None = None,
    adapters: Sequence[Applied] = (),
    tuned: Tuned | None = None,
    there: Collection[int] = (),
) -> Iterator[Generated]:
    """As `generate`, but each batch's pictures come as soon as they are made; `index` tells their place. Those
    whose index is among `there` are left out of their batches."""
    settings = settings or GenerateSettings()
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give at least 1")
    settings = _with_size(model, settings)
    plan = schedule(settings.sampler, settings.spacing, settings.steps, model.scheduler_config, settings.zero_snr)
    said = without_effect(model, settings, plan)
    markup = read_as_words([*prompts, settings.negative], settings.prompt_syntax, [e.name for e in model.embeddings])
    for line in [*said, *markup]:
        warnings.warn(line, DodgeburnWarning, stacklevel=3)
    shape = _latent_shape(model, settings)
    for seed in seeds:
        initial_noise(seed, (1, 1, 1))  # refuse a bad seed now, not after an hour
    texts = dict(encoded or {})
    skip = resolve_clip_skip(model, settings.clip_skip)
    _check_encoded(texts, skip, settings.prompt_syntax)
    missing = (t for t in [*prompts, settings.negative, ""] if t not in texts)
    texts.update(encode(model, missing, skip, settings.prompt_syntax))
    guides = settings.guidance != 1.0 or settings.thresholding is not None
    at_least = texts[settings.negative].chunks if guides else 1
    batches = _batches(prompts, texts, at_least, batch_size or default_batch_size(*shape[1:]))
    adapted = Adapted(adapters, len(prompts), model.layout)
    of_each = adapted.texts(model, prompts, settings.negative, texts, skip, settings.prompt_syntax)
    asked = [_Asked(model, plan.prediction_type, of_each)]
    if tuned is not None:
        asked.append(_tuned(model, tuned, prompts, settings, skip, adapted))
    thresholded = examined = 0
    for number, (indices, chunks) in enumerate(batches):
        if not (indices := [i for i in indices if i not in there]):
            continue
        job = _Batch(model, settings, plan, shape, indices, number, len(batches), tuned)
        finished, stop = job.run(prompts, seeds, asked, chunks, callback, adapted)
        thresholded, examined = thresholded + job.thresholded, examined + job.examined
        yield from finished
        if stop:
            return
    expected = any(line.startswith("dynamic thresholding") for line in said)
    if examined and (expected or not thresholded):
        part = "channels" if settings.thresholding and settings.thresholding.separate_feature_channels else "guesses"
        plain = "" if thresholded else ": these pictures are those of plain CFG"
        line = f"dynamic thresholding changed {thresholded} of {examined} {part}{plain}"
        warnings.warn(line, DodgeburnWarning, stacklevel=3)


def planned(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerateSettings,
    adapters: Sequence[Applied] = (),
    tuned: Tuned | None = None,
) -> list[Planned]:
    """What `generate` would make of the same, in that order; nothing is drawn, and the batches are not told.

    Raises UserError for a size that the model cannot make, or as many scales as there are not pictures.
    """
    settings, adapted = _with_size(model, settings), Adapted(adapters, len(prompts), model.layout)
    return [
        Planned(prompt, seed, settings, i, adapters=adapted.uses(i), tuned=tuned)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _check_encoded(encoded: Mapping[str, EncodedPrompt], clip_skip: int, syntax: str) -> None:
    for text, prompt in encoded.items():
        if prompt.syntax not in (None, syntax):
            raise UserError(
                f"the prompt {text[:60]!r} was encoded with prompt syntax {prompt.syntax}, but the settings ask for "
                f"{syntax}: encode it with the same"
            )
        if prompt.clip_skip not in (None, clip_skip):
            raise UserError(
                f"the prompt {text[:60]!r} was encoded with CLIP skip {prompt.clip_skip}, but the settings ask for "
                f"{clip_skip}: encode it with the same"
            )


def _with_size(model: Model, settings: GenerateSettings) -> GenerateSettings:
    width, height = settings.width or model.native_size, settings.height or model.native_size
    factor = model.vae_factor
    if width % factor or height % factor:
        raise UserError(
            f"size {width}x{height}: this model makes pictures whose sides are multiples of {factor} pixels, "
            f"try {max(1, round(width / factor)) * factor}x{max(1, round(height / factor)) * factor}"
        )
    return settings.model_copy(update={"width": width, "height": height})


def _latent_shape(model: Model, settings: GenerateSettings) -> tuple[int, int, int]:
    assert settings.width is not None and settings.height is not None
    channels = int(model.unet.config["in_channels"])
    return channels, settings.height // model.vae_factor, settings.width // model.vae_factor


def _batches(
    prompts: Sequence[str], texts: Mapping[str, EncodedPrompt], at_least: int, size: int
) -> list[tuple[list[int], int]]:
    """(indices, chunks) of each batch. Pictures whose prompts need the same number of text chunks go
    together: padding a short prompt to a long batch mate's length would change its picture.
    """
    by_chunks: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_chunks.setdefault(max(texts[prompt].chunks, at_least), []).append(i)
    return [
        (rows[start : start + size], chunks)
        for chunks, rows in sorted(by_chunks.items())
        for start in range(0, len(rows), size)
    ]


@dataclass(frozen=True)
class _Asked:
    """A model that is asked at every step, what its output means, and each picture's texts as it sees them."""

    model: Model
    prediction_type: str
    texts: Sequence[Mapping[str, EncodedPrompt]]


def _tuned(
    model: Model, tuned: Tuned, prompts: Sequence[str], settings: GenerateSettings, skip: int, adapted: Adapted
) -> _Asked:
    tuned.check(model)
    syntax = settings.prompt_syntax
    texts = encode(tuned.model, dict.fromkeys([*prompts, settings.negative, ""]), skip, syntax)
    of_each = adapted.texts(tuned.model, prompts, settings.negative, texts, skip, syntax)
    own = schedule(
        settings.sampler, settings.spacing, settings.steps, tuned.model.scheduler_config, settings.zero_snr
    )  # fmt: skip
    return _Asked(tuned.model, own.prediction_type, of_each)


class _Batch:
    """One batch on its way from noise to pictures."""

    def __init__(
        self,
        model: Model,
        settings: GenerateSettings,
        plan: Schedule,
        shape: tuple[int, int, int],
        indices: list[int],
        number: int,
        batches: int,
        tuned: Tuned | None = None,
    ) -> None:
        self.model = model
        self.tuned = tuned
        self.settings = settings
        self.plan = plan
        self.shape = shape
        self.indices = indices
        self.rows = {index: (row, len(indices)) for row, index in enumerate(indices)}
        self.number = number
        self.batches = batches
        self.noises: list[Noise] = []  # one a picture
        self.thresholded = self.examined = 0  # channels that dynamic thresholding changed, and saw, over all steps

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        asked: Sequence[_Asked],
        chunks: int,
        callback: Callback | None,
        adapted: Adapted,
    ) -> tuple[list[Generated], bool]:
        """The finished pictures, and whether the callback ended the whole generation."""
        drawn = [initial_noise(seeds[i], self.shape) for i in self.indices]
        if self.settings.noise == "brownian":
            self.noises = [_brownian(seeds[i], self.shape) for i in self.indices]
        else:
            self.noises = [_fresh(generator, self.shape) for _, generator in drawn]
        x = torch.stack([noise for noise, _ in drawn]).to(self.model.device) * self.plan.initial_scale
        with ExitStack() as stack:
            denoisers = [self._denoiser(one, prompts, chunks, adapted, stack) for one in asked]
            denoiser: Denoiser | Blend = denoisers[0]
            if self.tuned is not None:
                denoiser = Blend(denoisers[0], denoisers[1], self.tuned.strength)
            x, stop = self._denoise(x, denoiser, callback)
            self.thresholded, self.examined = int(denoiser.thresholded), denoiser.examined
        if stop or not self.indices:
            return [], stop
        x = x / math.sqrt(self.plan.sigmas[-1] ** 2 + 1)
        broken = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        if broken:
            warnings.warn(
                f"{broken} of {len(x)} pictures came out as NaN or infinite latents: try dtype fp32 or less guidance",
                DodgeburnWarning,
                stacklevel=4,
            )
        pixels = decode_pictures(self.model.vae, x).numpy()
        return [
            Planned(prompts[i], seeds[i], self.settings, i, self.rows[i], adapted.uses(i), self.tuned).made(
                Image.fromarray(picture)
            )
            for i, picture in zip(self.indices, pixels, strict=True)
        ], False  # fmt: skip

    def _denoiser(
        self, asked: _Asked, prompts: Sequence[str], chunks: int, adapted: Adapted, stack: ExitStack
    ) -> Denoiser:
        """What asks one model for this batch; adapted and with its text cache until the stack closes."""
        live = stack.enter_context(adapted.on(asked.model, self.indices))
        cache = stack.enter_context(text_cache(asked.model.unet))
        texts, negative = asked.texts, self.settings.negative
        return Denoiser(
            asked.model,
            _stack([(texts[i][prompts[i]], texts[i][""]) for i in self.indices], chunks),
            _stack([(texts[i][negative], texts[i][""]) for i in self.indices], chunks),
            self.settings,
            asked.prediction_type,
            cache,
            live,
        )

    def _noise(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.stack([noise(sigma, sigma_next) for noise in self.noises]).to(self.model.device)

    def _denoise(self, x: Tensor, denoiser: Denoiser | Blend, callback: Callback | None) -> tuple[Tensor, bool]:
        solver = SOLVERS[self.settings.sampler]
        plan = self.plan

        def ask(x: Tensor, sigma: float) -> Tensor:
            return denoiser(x, sigma, plan.timestep_at(sigma), i)

        history = History(self._noise, ask)
        for i, timestep in enumerate(plan.timesteps):
            sigma, sigma_next = plan.sigmas[i], plan.sigmas[i + 1]
            denoised = denoiser(x, sigma, timestep, i)
            if callback is not None:
                seen = x * (1 / math.sqrt(sigma * sigma + 1))
                step = Step(i, len(plan.timesteps), sigma, timestep, seen, denoised, tuple(self.indices),
                            self.number, self.batches, ask)  # fmt: skip
                rows = _kept(callback(step), len(x))
                if rows is None:
                    return x, True
                if len(rows) < len(x):
                    self.indices = [self.indices[r] for r in rows]
                    self.noises = [self.noises[r] for r in rows]
                    if not rows:
                        return x, False
                    keep = torch.tensor(rows, device=x.device)
                    x, denoised = x[keep], denoised[keep]
                    history.keep(keep)
                    denoiser.keep(keep)
            x = solver(x, denoised, sigma, sigma_next, history)
        return x, False


def _brownian(seed: int, shape: tuple[int, int, int]) -> Noise:
    return BrownianPath(seed, shape)


def _fresh(generator: torch.Generator, shape: tuple[int, int, int]) -> Noise:
    """Noise drawn anew whenever it is asked for, whatever the stretch, as diffusers does."""
    return lambda sigma, sigma_next: torch.randn(shape, generator=generator, dtype=torch.float32)


def _stack(encoded: list[tuple[EncodedPrompt, EncodedPrompt]], chunks: int) -> tuple[Tensor, Tensor | None]:
    """(prompt, empty prompt) of each picture -> token embeddings and pooled ones."""
    pooled = [prompt.pooled for prompt, _ in encoded if prompt.pooled is not None]
    embeds = torch.stack([prompt.padded(chunks, empty) for prompt, empty in encoded])
    return embeds, torch.stack(pooled) if pooled else None


def _kept(answer: bool | Sequence[bool] | Tensor | None, n: int) -> list[int] | None:
    """Rows to go on with, or None when the callback ends everything."""
    if answer is None or answer is True:
        return list(range(n))
    if answer is False:
        return None
    flags = [bool(flag) for flag in answer]
    if len(flags) != n:
        raise ValueError(f"the step callback returned {len(flags)} flags for {n} pictures")
    return [row for row, flag in enumerate(flags) if flag]
