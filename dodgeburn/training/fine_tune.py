"""Fine-tune a model's U-Net on latents with captions: all of its weights, or a LoRA.

    loss = mean_i w_i g(t_i) |f(x_t, c_i, t_i) - target|^2  +  prior * mean_j |f(x_t, c_j, t_j) - f_0(x_t, c_j, t_j)|^2

f says noise or v, whichever the model does; w are the examples' weights, scaled to mean 1; g weighs noise levels
(noise_loss.py). The target is what was added, or what a `Teacher` says. The second term keeps a model near what f_0,
the model before it was touched, says about other prompts (prior preservation in output space): its targets are worked
out once, so no second U-Net is held.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, attached, layers_of, new_adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.predict import Predictor, add_noise, alphas_cumprod
from dodgeburn.training.examples import Examples
from dodgeburn.training.loop import LoopSettings, train
from dodgeburn.training.noise_loss import loss_weights, spread_timesteps, wanted

TEXT_BYTES = 1024**3  # encoded captions that are held
Callback = Callable[[int, dict[str, float]], "bool | None"]


class FineTuneSettings(BaseModel):
    """How to fine-tune. Lengths are in optimizer steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    layers: str = "all"  # all weights of the U-Net, or a layer set (models/adapters.py): a LoRA on these layers
    rank: int = Field(default=16, ge=1)  # of the LoRA
    alpha: float | None = None  # of the LoRA; None: the rank
    empty: float = Field(default=0.1, ge=0, le=1)  # share of captions left out, which guidance needs
    gamma: float = Field(default=5.0, gt=0)  # signal-to-noise ratio above which noise levels count less; inf: none do
    noise_power: float = Field(default=0.25, ge=0)  # weights over alpha_bar to this power
    prior: float = Field(default=0.0, ge=0)  # weight of prior preservation; needs a Prior
    prior_batch: int = Field(default=8, ge=1)  # rows of it a step
    warmup: int = Field(default=10, ge=0)
    constant: float = Field(default=0.5, ge=0, le=1)  # share of the steps at the peak of the learning rate
    final: float = Field(default=0.05, ge=0, le=1)  # last learning rate, as a share of the peak
    weight_decay: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.99, ge=0, lt=1)  # of the averaged weights that are kept; 0: none
    grad_clip: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "no"] = "bf16"
    checkpointing: bool = False  # work activations out twice instead of keeping them
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=50, ge=1)
    log_every: int = Field(default=10, ge=1)


@dataclass(frozen=True)
class Prior:
    """What the model said before it was touched, about noised latents of other prompts."""

    x: Tensor  # [n, c, h, w]
    timesteps: Tensor  # [n]
    texts: list[str]
    targets: Tensor  # [n, c, h, w]
    size: tuple[int, int]


def make_prior(model: Model, examples: Examples, points: int, seed: int = 0, empty: float = 0.25) -> Prior:
    """`points` of them, from the model as it is now. Time steps are evenly spread; examples are taken in turn. empty:
    share of captions left out, since guidance goes by what is said of no prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(points) % len(examples)
    alpha_bar = alphas_cumprod(model)
    # A random order, so that a stretch of examples (and a batch) covers all noise levels.
    timesteps = spread_timesteps(len(alpha_bar), points, generator)[torch.randperm(points, generator=generator)]
    clean = examples.latents[rows].float()
    x = add_noise(clean, torch.randn(clean.shape, generator=generator), alpha_bar[timesteps])
    texts = [_drawn(examples.captions[int(i)], generator) for i in rows]
    bare = (torch.rand(points, generator=generator) < empty).tolist()
    texts = ["" if leave else text for leave, text in zip(bare, texts, strict=True)]
    targets = Predictor(model, *examples.size).frozen(x, timesteps, texts)
    return Prior(x, timesteps, texts, targets, examples.size)


@dataclass(frozen=True)
class Teacher:
    """Says what is to be learned in place of the noise that was added: a copy of the model, asked with another text."""

    predictor: Predictor
    asks: Callable[[int, str], str]  # number of the example and its drawn caption -> the text that the copy is asked
    strength: float = 1.0  # times what the other text changes: f(x_t, c) + strength (f(x_t, asked) - f(x_t, c))

    def says(self, x: Tensor, timesteps: Tensor, rows: Sequence[int], texts: Sequence[str]) -> Tensor:
        """The targets [n, c, h, w] of these examples, drawn with these captions."""
        asked = [self.asks(i, text) if text else "" for i, text in zip(rows, texts, strict=True)]
        _encode_alone(self.predictor, [*asked, *texts])
        found = self.predictor.frozen(x, timesteps, asked)
        others = [i for i, (a, text) in enumerate(zip(asked, texts, strict=True)) if a != text]
        if self.strength != 1 and others:
            plain = self.predictor.frozen(x[others], timesteps[others], [texts[i] for i in others])
            found[others] = plain + self.strength * (found[others] - plain)
        return found


def make_teacher(
    model: Model, examples: Examples, asks: Callable[[int, str], str], strength: float = 1.0
) -> Teacher:  # fmt: skip
    """The model as it is now; holds a second U-Net. A caption that is left out is left out for the teacher as well."""
    still = replace(model, unet=copy.deepcopy(model.unet).eval().requires_grad_(False))
    return Teacher(Predictor(still, *examples.size, text_bytes=TEXT_BYTES), asks, strength)


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tune made and cost. The model's U-Net holds the new weights, unless an adapter does."""

    adapter: Adapter | None
    loss: float
    steps: int  # the last one that was told to the callback
    forwards: int  # samples through the U-Net
    seconds: float


def fine_tune(
    model: Model,
    examples: Examples,
    settings: FineTuneSettings,
    folder: Path,
    name: str = "fine_tune",
    prior: Prior | None = None,
    callback: Callback | None = None,
    told: dict[str, Any] | None = None,
    show_average: bool = False,
    weights: Callable[[int], Tensor] | None = None,
    teacher: Teacher | None = None,
) -> FineTuned:
    """Train `model.unet` in place (or an adapter beside it), from the weights that it has.

    folder: for the checkpoint (`<name>.checkpoint.pt`) that the same call resumes from, and the log. callback: told
    (step, mean losses) every `log_every` steps with the U-Net as it then is (`show_average`: as it would be kept);
    False ends the training. told: what else decides the outcome, for the resume's check. weights: of the examples at a
    step [n], instead of their own; a function of the step and of what the callback was told before it, so that a run
    that resumes finds them again. teacher: gives the examples' targets. Raises UserError for no examples, a half-
    precision U-Net, prior > 0 without a Prior, layers that are not known, or a folder with another run's checkpoint,
    and where the loss is no longer finite (the last good state is kept).
    """
    began = time.perf_counter()
    _check(model, examples, settings, prior)
    predictor = Predictor(model, *examples.size, text_bytes=TEXT_BYTES)
    encode = _Texts(predictor, examples, prior)
    draw = _Draw(model, examples, settings, prior, weights)
    unet, components = model.unet, model.components()
    start = digest_of(unet)
    for module in components.values():
        module.requires_grad_(False)
    adapter = None
    if settings.layers == "all":
        unet.requires_grad_(True)
    else:
        layers = [f"unet.{layer}" for layer in layers_of(unet, settings.layers)]
        adapter = new_adapter(components, layers, settings.rank, settings.alpha, settings.seed, name)
    reached = 0

    def losses(drawn: _Rows, generator: torch.Generator) -> dict[str, Tensor]:
        encode(drawn.texts)
        said = predictor(drawn.x, drawn.timesteps, drawn.texts)
        n = len(drawn.weights)
        targets = drawn.targets.to(said.device)
        if teacher is not None:
            taught = teacher.says(drawn.x[:n], drawn.timesteps[:n], drawn.rows, drawn.texts[:n])
            targets = torch.cat([taught.to(said.device), targets[n:]])
        error = (said - targets).square().mean(dim=(1, 2, 3))
        parts = {"loss": (drawn.weights.to(said.device) * error[:n]).mean()}
        if len(error) > n:
            parts["prior"] = settings.prior * error[n:].mean()
        return parts

    def after(step: int, means: dict[str, float]) -> bool | None:
        nonlocal reached
        reached = step
        return None if callback is None else callback(step, means)

    loop = LoopSettings(
        steps=settings.steps, lr=settings.lr, weight_decay=settings.weight_decay, warmup=settings.warmup,
        constant=settings.constant, final=settings.final, grad_clip=settings.grad_clip, ema=settings.ema,
        precision=settings.precision, seed=settings.seed, checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        settings={**settings.model_dump(exclude={"checkpoint_every", "log_every"}), "examples": examples.digest(),
                  "start": start, **(told or {})},
    )  # fmt: skip
    device = str(model.device)
    try:
        if settings.checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        if adapter is None:
            means = train(name, {"unet": unet}, draw, losses, folder, loop, after, device, show_average=show_average)
        else:
            with attached(components, [adapter], trains=True) as attachment:
                attachment.set(1.0)
                means = train(
                    name, {"adapter": adapter}, draw, losses, folder, loop, after, device, show_average=show_average
                )
    finally:
        unet.requires_grad_(False)
        unet.eval()
        if settings.checkpointing:
            unet.disable_gradient_checkpointing()
    return FineTuned(adapter, means.get("loss", float("nan")), reached or settings.steps, predictor.forwards,
                     time.perf_counter() - began)  # fmt: skip


def digest_of(module: torch.nn.Module) -> list[float]:
    """What tells weights apart, for a run that resumes: two sums over all of them."""
    sums = torch.zeros(2, dtype=torch.float64)
    for p in module.parameters():
        sums += torch.stack([p.detach().double().sum().cpu(), p.detach().double().square().sum().cpu()])
    return [float(f"{value:.9g}") for value in sums.tolist()]


class _Texts:
    """Texts encoded in fp32, and always in the same company: how a text is batched decides its last bits, and a run
    that resumes must end with the weights of one that wasn't cut off. So all at once, or (too many) one by one."""

    def __init__(self, predictor: Predictor, examples: Examples, prior: Prior | None) -> None:
        self.predictor = predictor
        texts = [text for captions in examples.captions for text in captions] + ([] if prior is None else prior.texts)
        texts = list(dict.fromkeys(["", *texts]))
        embeds, _ = predictor.condition([""])
        if len(texts) * embeds.numel() * embeds.element_size() <= TEXT_BYTES:
            predictor.encode(texts)

    def __call__(self, texts: list[str]) -> None:
        _encode_alone(self.predictor, texts)


def _encode_alone(predictor: Predictor, texts: Sequence[str]) -> None:
    """Each text by itself (those that are known are not encoded again), in fp32."""
    with torch.autocast(predictor.model.device.type, enabled=False):
        predictor.encode(texts, alone=True)


@dataclass(frozen=True)
class _Rows:
    """A batch: the examples' rows first, those of the prior behind them."""

    x: Tensor
    timesteps: Tensor
    texts: list[str]
    targets: Tensor
    weights: Tensor  # of the examples' rows
    rows: list[int]  # numbers of these examples


class _Draw:
    """Batch number i, a function of the seed and i alone: examples in shuffled rounds, each once a round."""

    def __init__(
        self, model: Model, examples: Examples, settings: FineTuneSettings, prior: Prior | None,
        weights: Callable[[int], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.examples, self.settings = examples, settings
        self.prior = prior if settings.prior > 0 else None
        self.alpha_bar = alphas_cumprod(model)
        self.predicts = str(model.scheduler_config.get("prediction_type", "epsilon"))
        self.levels = loss_weights(self.alpha_bar, settings.gamma, settings.noise_power, self.predicts)
        self.weights = weights if weights is not None else lambda step: examples.weights
        self._round: tuple[int, Tensor] | None = None

    def __call__(self, step: int, generator: torch.Generator) -> _Rows:
        s, n = self.settings, len(self.examples)
        rows = torch.tensor([self._row(step * s.batch + i, n) for i in range(s.batch)])
        clean = self.examples.latents[rows].float()
        t = spread_timesteps(len(self.alpha_bar), s.batch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        level = self.alpha_bar[t]
        bare = torch.rand(s.batch, generator=generator) < s.empty
        texts = [_drawn(self.examples.captions[int(i)], generator) for i in rows]
        texts = ["" if leave else text for leave, text in zip(bare.tolist(), texts, strict=True)]
        x, target = add_noise(clean, noise, level), wanted(self.predicts, clean, noise, level)
        if self.prior is not None:
            drawn = torch.randint(len(self.prior.x), (s.prior_batch,), generator=generator)
            x, t = torch.cat([x, self.prior.x[drawn]]), torch.cat([t, self.prior.timesteps[drawn]])
            target = torch.cat([target, self.prior.targets[drawn]])
            texts += [self.prior.texts[int(i)] for i in drawn]
        weights = self.weights(step)
        weights = self.levels[t[: s.batch]] * (weights / weights.mean())[rows]
        return _Rows(x, t, texts, target, weights, rows.tolist())

    def _row(self, position: int, n: int) -> int:
        number, at = divmod(position, n)
        if self._round is None or self._round[0] != number:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + 7919 * number + 1)
            self._round = number, torch.randperm(n, generator=generator)
        return int(self._round[1][at])


def _drawn(captions: tuple[str, ...], generator: torch.Generator) -> str:
    return captions[int(torch.randint(len(captions), (), generator=generator))]


def _check(model: Model, examples: Examples, settings: FineTuneSettings, prior: Prior | None) -> None:
    if not len(examples):
        raise UserError("no pictures: there is nothing to train on")
    if not float(examples.weights.sum()) > 0 or bool((examples.weights < 0).any()):
        raise UserError("the examples' weights are negative or all 0: give weights above 0")
    if model.dtype != torch.float32:
        raise UserError(
            f"the model is loaded in {str(model.dtype)[6:]}: fine-tuning needs fp32, load it with dtype fp32"
        )
    if settings.prior > 0 and prior is None:
        raise UserError("prior preservation is asked for, but there are no pictures of other prompts for it")
    if settings.prior > 0 and prior is not None and prior.size != examples.size:
        raise UserError(f"prior preservation has pictures of {prior.size}, training those of {examples.size} (h, w)")
