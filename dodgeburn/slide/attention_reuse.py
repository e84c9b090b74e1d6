"""Prompt-to-Prompt as a slider: the edited picture keeps the unedited one's attention maps.

Hertz et al. 2022 (arXiv 2208.01626). Both pictures are made side by side. In the first `cross` of the steps, the edited
one's cross-attention takes the unedited one's map wherever both prompts have the same token (and padding), its own map
for new words (prompt refinement); in the first `own` of the steps self-attention takes the unedited map whole. The
values are always those of the edited prompt, and guidance's other half is left alone. The maps of the new words are
multiplied by the strength (attention re-weighting, the paper's fader).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from dodgeburn.sampling.prompts import EncodedPrompt, encode
from dodgeburn.slide.baselines import Words
from dodgeburn.slide.closed_form import token_places
from dodgeburn.slide.edits import Unedited, draw, with_unedited
from dodgeburn.slide.score_edits import same_length


class PromptToPrompt:
    """`prompt, words` with the attention maps of `prompt`; strength multiplies the attention to the words.

    cross, own: shares of the steps, 0..1, in which maps of cross- and self-attention are taken over. The end token and
    the padding have read the words whatever their weight: near strength 0 the edit is small, but not nothing.
    """

    def __init__(self, unedited: Unedited, words: Words, cross: float = 0.8, own: float = 0.4) -> None:
        self.unedited, self.words, self.cross, self.own = unedited, words, cross, own

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """As `Edit.pictures`."""
        base = self.unedited

        def edited(rows: list[int]) -> np.ndarray:
            texts = {i: f"{prompts[i]}, {self.words.of(strengths[i])}" for i in rows}
            parts, order = [], []
            for some in same_length(base, texts_by_row(texts, len(prompts)), rows):
                before, after = [prompts[i] for i in some], [texts[i] for i in some]
                weights = [abs(strengths[i]) for i in some]
                parts.append(self._batch(before, after, [seeds[i] for i in some], weights))
                order += some
            return np.concatenate(parts)[[order.index(i) for i in rows]]

        return with_unedited(base, prompts, seeds, strengths, edited)

    def _batch(self, before: list[str], after: list[str], seeds: list[int], weights: list[float]) -> np.ndarray:
        base = self.unedited
        model, settings = base.model, base.settings
        encoded = encode(model, [*before, *after, settings.negative, ""], settings.clip_skip, settings.prompt_syntax)
        chunks = max(e.chunks for e in encoded.values())
        long = {text: _filled(e, chunks, encoded[""]) for text, e in encoded.items()}
        rows = zip(before, after, weights, strict=True)
        tables = [Table.of(model.tokenizers[0], b, a, w, chunks) for b, a, w in rows]
        reuse = Reuse(Table.stacked(tables, model.device), self.cross, self.own, settings.steps)
        with reused(model.unet, reuse):
            made = draw(model, before + after, seeds * 2, settings, (), 2 * len(before), base.progress, long)
        return made[len(before) :]


def texts_by_row(texts: dict[int, str], n: int) -> list[str]:
    """The texts as a list of n, empty where there is none."""
    return [texts.get(i, "") for i in range(n)]


def _filled(prompt: EncodedPrompt, chunks: int, empty: EncodedPrompt) -> EncodedPrompt:
    if prompt.chunks == chunks:
        return prompt
    embeds = prompt.padded(chunks, empty)
    return EncodedPrompt(prompt.text, embeds, prompt.pooled, chunks, prompt.clip_skip, prompt.syntax)


class Table:
    """For each picture and each token of its edited prompt: the place of that token in the unedited one, whether it has
    one, and the weight of the edited picture's own map; all [n, tokens]."""

    def __init__(self, places: Tensor, shared: Tensor, weights: Tensor) -> None:
        self.places, self.shared, self.weights = places, shared, weights

    @staticmethod
    def of(tokenizer: Any, before: str, after: str, weight: float, chunks: int) -> Table:
        """One picture's, [1, chunks * 77]. New words weigh `weight`, all else 1."""
        found = token_places(tokenizer, after, before)
        found += range(len(found), chunks * int(tokenizer.model_max_length))
        shared = torch.tensor([[place is not None for place in found]])
        return Table(torch.tensor([[place or 0 for place in found]]), shared, torch.where(shared, 1.0, weight))

    @staticmethod
    def stacked(tables: Sequence[Table], device: torch.device) -> Table:
        """Several pictures' as one."""
        return Table(*(torch.cat(parts).to(device) for parts in
                       zip(*((t.places, t.shared, t.weights) for t in tables), strict=True)))  # fmt: skip


class Reuse:
    """What the attention layers share during one batch: the tables, and how far it has come."""

    def __init__(self, table: Table, cross: float, own: float, steps: int) -> None:
        self.table, self.cross, self.own, self.steps = table, cross, own, steps
        self.times: list[float] = []  # the distinct time steps seen, in order

    def saw(self, time: float) -> None:
        """Told before every call of the U-Net."""
        if time not in self.times:
            self.times.append(time)

    @property
    def progress(self) -> float:
        """Share of the steps that are done, 0..1 (a solver's further calls between two steps count as steps)."""
        return (len(self.times) - 1) / self.steps


class ReusedAttention:
    """Attention processor: batches are [unedited n, edited n], once or (with guidance) twice."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`hidden_states` [batch, pixels, width] -> the same shape."""
        batch, pixels, _ = hidden_states.shape
        text = encoder_hidden_states is not None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (_heads(attn, x) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
        maps = torch.softmax(query.float() @ key.float().transpose(-1, -2) * attn.scale, -1)
        maps = self._edited(maps, text).to(value.dtype)  # [batch, heads, pixels, tokens]
        out = attn.to_out[0]((maps @ value).transpose(1, 2).reshape(batch, pixels, -1))
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    def _edited(self, maps: Tensor, text: bool) -> Tensor:
        reuse, table = self.reuse, self.reuse.table
        n = len(table.places)
        groups = list(maps.split(n))
        before, after = groups[-2], groups[-1]
        if not text:
            if reuse.progress < reuse.own:
                groups[-1] = before
            return torch.cat(groups)
        if reuse.progress < reuse.cross:
            taken = before.gather(-1, table.places[:, None, None].expand_as(after))
            after = torch.where(table.shared[:, None, None], taken, after)
        groups[-1] = after * table.weights[:, None, None]
        return torch.cat(groups)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    return x.view(batch, tokens, attn.heads, width // attn.heads).transpose(1, 2)


@contextmanager
def reused(unet: Any, reuse: Reuse) -> Iterator[None]:
    """Within the context all attention of `unet` goes through `ReusedAttention`."""
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    kept = [module.processor for module in layers]

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        reuse.saw(float(arguments[1] if len(arguments) > 1 else named["timestep"]))

    handle = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        for module in layers:
            setattr(module, "processor", ReusedAttention(reuse))  # noqa: B010 (diffusers declares its default's type)
        yield
    finally:
        handle.remove()
        for module, processor in zip(layers, kept, strict=True):
            module.processor = processor
