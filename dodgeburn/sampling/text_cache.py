"""Work on the text done once a generation instead of once a step.

The text does not change while a picture is denoised, so neither do the keys and values that cross-attention
makes of it, nor SDXL's added embedding (pooled text and sizes). Both are computed at the first step and
kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn


class CachedTextAttention:
    """Attention processor for one cross-attention layer: scaled dot product attention with kept keys and
    values, one pair a group of texts (`TextCache.group`).
    """

    def __init__(self, cache: "TextCache") -> None:
        self.cache = cache
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # key and value, [batch, heads, tokens, head_dim]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """`hidden_states` [batch, pixels, width] -> the same shape; `encoder_hidden_states` is read only
        once.
        """
        batch, pixels, _ = hidden_states.shape
        group = self.cache.group
        if group not in self.kept:
            key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            self.kept[group] = self._heads(attn, key), self._heads(attn, value)
        query = self._heads(attn, attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, *self.kept[group])
        out = attn.to_out[0](out.transpose(1, 2).reshape(batch, pixels, -1))
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    @staticmethod
    def _heads(attn: Attention, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, attn.heads, width // attn.heads).transpose(1, 2)


class TextCache:
    """The caches of one U-Net while one batch is denoised.

    `group` numbers the batch of texts that the U-Net is called with; whoever calls it with another one (positive
    prompts alone, where guidance pauses) sets another number first.
    """

    def __init__(self) -> None:
        self.group = 0
        self.layers: list[CachedTextAttention] = []
        self.added: dict[int, Tensor] = {}  # SDXL's added embedding, [batch, time embedding width], a group

    def clear(self) -> None:
        """Forget everything: the weights changed (an adapter that starts late)."""
        for layer in self.layers:
            layer.kept.clear()
        self.added.clear()

    def keep(self, rows: Tensor, group: int = 0) -> None:
        """Keep only these rows of a group (int64 [m]): pictures that were stopped early leave it."""
        for layer in self.layers:
            if group in layer.kept:
                key, value = layer.kept[group]
                layer.kept[group] = key[rows], value[rows]
        if group in self.added:
            self.added[group] = self.added[group][rows]


def _plain(attn: Attention) -> bool:
    """Whether the layer is what `CachedTextAttention` computes; others (a user's own processor) keep their
    own.
    """
    return (
        attn.is_cross_attention
        and type(attn.processor) in (AttnProcessor, AttnProcessor2_0)
        and not (attn.norm_cross or attn.residual_connection)
        and attn.spatial_norm is None
        and attn.group_norm is None
        and attn.norm_q is None
        and attn.norm_k is None
        and attn.scale_qk
    )


@contextmanager
def text_cache(unet: nn.Module) -> Iterator[TextCache]:
    """Within the context `unet` computes what depends on the text alone only at its first call; then all is
    as before.

    Text, guidance and weights must not change meanwhile (or `TextCache.clear` follows), and one model serves one
    thread at a time.
    """
    cache = TextCache()
    replaced: list[tuple[Attention, Any]] = []
    added_embedding = getattr(unet, "get_aug_embed", None)

    def get_aug_embed(**arguments: Any) -> Tensor | None:
        if added_embedding is None:
            return None
        if cache.group not in cache.added:
            found = added_embedding(**arguments)
            if found is None:
                return None
            cache.added[cache.group] = found
        return cache.added[cache.group]

    try:
        for module in unet.modules():
            if isinstance(module, Attention) and _plain(module):
                layer = CachedTextAttention(cache)
                replaced.append((module, module.processor))
                cache.layers.append(layer)
                setattr(module, "processor", layer)  # noqa: B010 (diffusers declares the type of its default)
        if added_embedding is not None:
            unet.__dict__["get_aug_embed"] = get_aug_embed
        yield cache
    finally:
        for module, processor in replaced:
            module.processor = processor
        unet.__dict__.pop("get_aug_embed", None)
