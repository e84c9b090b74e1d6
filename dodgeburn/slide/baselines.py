"""What a slider is compared with: edits by prompt alone, without training, and a random control.

All follow `Edit`: strength 0 is the model's own picture, positive strengths go towards `positive`, negative ones
towards `negative` (words put behind a prompt, as "smiling broadly"). What strength 1 does is each one's own affair.
More that need the U-Net's insides: `score_edits.py` and `attention_reuse.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.sampling.prompts import EncodedPrompt, encode
from dodgeburn.slide.edits import Unedited, draw, with_unedited
from dodgeburn.slide.spec import SliderSpec

_BRACKETS = re.compile(r"([()\[\]\\])")


@dataclass(frozen=True)
class Words:
    """What is put behind a prompt to go up and down."""

    positive: str
    negative: str

    def __post_init__(self) -> None:
        if not self.positive.strip() or not self.negative.strip():
            raise UserError("an edit by prompt needs words for both directions")

    def of(self, strength: float) -> str:
        """The words of a strength's direction."""
        return self.positive if strength > 0 else self.negative


def words_of(spec: SliderSpec) -> Words:
    """What a spec's positive and negative prompt say beyond its target; all of it where they don't begin with it."""
    return Words(*(prompt.removeprefix(spec.target).strip(" ,") or prompt for prompt in (spec.positive, spec.negative)))


class PromptWeight:
    """`prompt, (words:1.3)`: the words of the direction behind the prompt, weighing the strength.

    Weights act as in the settings' prompt syntax (`sampling/emphasis.py`): 1 is the plain words, and near 0 the words'
    own token states vanish (a1111) or become those of nothing (comfy), while the end token and the padding after them
    have still read them. So the way from strength 0 to the smallest one is a leap.
    """

    def __init__(self, unedited: Unedited, words: Words) -> None:
        self.unedited, self.words = unedited, words
        if unedited.settings.prompt_syntax == "plain":
            raise UserError("prompt weights need prompt syntax a1111 or comfy, not plain")

    def prompt(self, prompt: str, strength: float) -> str:
        """The prompt that is drawn at a strength other than 0."""
        words = self.words.of(strength)
        if self.unedited.settings.prompt_syntax == "a1111":
            words = _BRACKETS.sub(r"\\\1", words)
        return f"{prompt}, ({words}:{abs(strength):.4f})"

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """As `Edit.pictures`."""
        base = self.unedited

        def edited(rows: list[int]) -> np.ndarray:
            texts = [self.prompt(prompts[i], strengths[i]) for i in rows]
            return draw(base.model, texts, [seeds[i] for i in rows], base.settings, (), base.batch_size, base.progress)

        return with_unedited(base, prompts, seeds, strengths, edited)


class EmbeddingInterpolation:
    """Prompt embeddings on the broken line from the negative prompt's through the prompt's own to the positive one's.

    Token states (and SDXL's pooled text) at strength s are e + |s| (e± - e), place by place: -1 and 1 are the prompts
    with the words behind them, 0 the prompt as it is; beyond 1 the line goes on. Prompts of different length meet words
    with padding on the way, as in every plain interpolation.
    """

    def __init__(self, unedited: Unedited, words: Words) -> None:
        self.unedited, self.words = unedited, words

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """As `Edit.pictures`."""
        base = self.unedited

        def edited(rows: list[int]) -> np.ndarray:
            ends = {i: f"{prompts[i]}, {self.words.of(strengths[i])}" for i in rows}
            texts = [*(prompts[i] for i in rows), *ends.values(), base.settings.negative, ""]
            encoded = encode(base.model, texts, base.settings.clip_skip, base.settings.prompt_syntax)
            made = {}
            for i in rows:
                start, end = encoded[prompts[i]], encoded[ends[i]]
                made[f"picture {i}"] = interpolated(start, end, abs(strengths[i]), encoded[""])
            return draw(base.model, list(made), [seeds[i] for i in rows], base.settings, (), base.batch_size,
                        base.progress, {**encoded, **made})  # fmt: skip

        return with_unedited(base, prompts, seeds, strengths, edited)


def interpolated(start: EncodedPrompt, end: EncodedPrompt, share: float, empty: EncodedPrompt) -> EncodedPrompt:
    """start + share * (end - start), token by token, the shorter filled up with the empty prompt's chunks."""
    chunks = max(start.chunks, end.chunks)
    embeds = torch.lerp(start.padded(chunks, empty).float(), end.padded(chunks, empty).float(), share)
    pooled: Tensor | None = None
    if start.pooled is not None and end.pooled is not None:
        pooled = torch.lerp(start.pooled.float(), end.pooled.float(), share).to(start.pooled.dtype)
    text = f"{share:g} of the way from {start.text!r} to {end.text!r}"
    return EncodedPrompt(text, embeds.to(start.embeds.dtype), pooled, chunks, start.clip_skip, start.syntax)


def random_like(adapter: Adapter, seed: int = 0, name: str | None = None) -> Adapter:
    """A control for any slider: random factors on the same layers, of the same rank, each change of the same norm.

    The norm is Frobenius', of alpha / rank * up @ down. Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, factors in adapter.factors().items():
        down = torch.randn(factors.down.shape, generator=generator)
        up = torch.randn(factors.up.shape, generator=generator)
        wanted, found = product_norm(factors), product_norm(Factors(down, up, factors.alpha))
        made[module] = Factors(down, up * (wanted / found), factors.alpha)
    return Adapter(made, name or f"random like {adapter.name}")


def product_norm(factors: Factors) -> float:
    """Frobenius norm of alpha / rank * up @ down, without making the product: |U D|^2 = tr(U^T U D D^T)."""
    down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double()
    squared = float(((up.T @ up) * (down @ down.T).T).sum())
    return max(squared, 0.0) ** 0.5 * abs(factors.alpha) / factors.rank
