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
    values.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None  # [batch, heads, tokens, head_dim]
        self.value: Tensor | None = None

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
        if self.key is None or self.value is None:
            self.key = self._heads(attn, attn.to_k(encoder_hidden_states))
            self.value = self._heads(attn, attn.to_v(encoder_hidden_states))
        query = self._heads(attn, attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, self.key, self.value)
        out = attn.to_out[0](out.transpose(1, 2).reshape(batch, pixels, -1))
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    @staticmethod
    def _heads(attn: Attention, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, attn.heads, width // attn.heads).transpose(1, 2)


class TextCache:
    """The caches of one U-Net while one batch is denoised."""

    def __init__(self) -> None:
        self.layers: list[CachedTextAttention] = []
        self.added: Tensor | None = None  # SDXL's added embedding, [batch, time embedding width]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (int64 [m]): pictures that were stopped early leave it."""
        for layer in self.layers:
            if layer.key is not None and layer.value is not None:
                layer.key, layer.value = layer.key[rows], layer.value[rows]
        if self.added is not None:
            self.added = self.added[rows]


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

    Text, guidance and weights must not change meanwhile, and one model serves one thread at a time.
    """
    cache = TextCache()
    replaced: list[tuple[Attention, Any]] = []
    added_embedding = getattr(unet, "get_aug_embed", None)

    def get_aug_embed(**arguments: Any) -> Tensor | None:
        if cache.added is None and added_embedding is not None:
            cache.added = added_embedding(**arguments)
        return cache.added

    try:
        for module in unet.modules():
            if isinstance(module, Attention) and _plain(module):
                layer = CachedTextAttention()
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
