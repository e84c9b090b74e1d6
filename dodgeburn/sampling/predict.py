"""The U-Net asked for noise predictions outside of sampling: for training and for frozen targets, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dodgeburn.models.adapters import Attachment
from dodgeburn.models.model import Model
from dodgeburn.models.quick import quick_products
from dodgeburn.sampling.prompts import EncodedPrompt, encode, encode_each
from dodgeburn.sampling.schedules import scheduler_for
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.sampling.sizes import time_ids


def alphas_cumprod(model: Model) -> Tensor:
    """alpha_bar of every training time step, float32 [1000]: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    return scheduler_for("ddim", model.scheduler_config).alphas_cumprod.float()


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t of clean latents [n, c, h, w] at alpha_bar [n]."""
    a = alpha_bar.view(-1, 1, 1, 1).to(clean.device)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


@dataclass
class Predictor:
    """`predict(x_t, timesteps, texts)`: the U-Net's raw output (eps or v) [n, c, h, w] in fp32.

    Texts are encoded once and kept. `forwards` counts samples that went through the U-Net. With `guidance` other than 1
    it is asked without text too, and the output is that of classifier-free guidance: bare + guidance (output - bare).
    """

    model: Model
    height: int  # pixels, told to SDXL's size conditioning
    width: int
    forwards: int = 0
    guidance: float = 1.0
    text_bytes: int | None = None  # encoded texts are forgotten when they take more than this; None: never
    _texts: dict[str, EncodedPrompt] = field(default_factory=dict)

    def encode(self, texts: Iterable[str], alone: bool = False) -> None:
        """Encode what is not known yet. alone: each by itself, so that its numbers don't depend, in the last bits, on
        which texts came together: a run that is resumed meets them in other company.
        """
        wanted = list(dict.fromkeys([*texts, ""]))
        missing = [text for text in wanted if text not in self._texts]
        held = sum(e.embeds.numel() * e.embeds.element_size() for e in self._texts.values())
        if missing and self.text_bytes is not None and held > self.text_bytes:
            self._texts = {text: self._texts[text] for text in wanted if text in self._texts}
        for group in [[text] for text in missing] if alone else [missing]:
            self._texts.update(encode(self.model, group))

    def condition(
        self, texts: Sequence[str], encoded: Sequence[EncodedPrompt] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Cross-attention input [n, tokens, width] and added conditions of the texts; long ones make all as long.
        encoded: the texts as other than the frozen encoders have them, all as long."""
        model = self.model
        if encoded is None:
            self.encode(texts)
            found = [self._texts[text] for text in texts]
            chunks = max(e.chunks for e in found)
            rows = [e.padded(chunks, self._texts[""]) for e in found]
        else:
            found, rows = list(encoded), [e.embeds for e in encoded]
        embeds = torch.stack(rows).to(model.device, model.dtype)
        if not model.has_added_conditions:
            return embeds, None
        row = time_ids(GenerateSettings(height=self.height, width=self.width))[1]
        pooled = torch.stack([e.pooled for e in found if e.pooled is not None]).to(model.device, model.dtype)
        ids = torch.tensor([row] * len(texts), dtype=torch.float32, device=model.device)
        return embeds, {"text_embeds": pooled, "time_ids": ids}

    def __call__(
        self, x: Tensor, timesteps: Tensor, texts: Sequence[str], encoded: Sequence[EncodedPrompt] | None = None
    ) -> Tensor:
        """x [n, c, h, w], timesteps int64 [n], n texts; encoded: as `condition`, without guidance."""
        if self.guidance != 1:
            twice, bare = (torch.cat([x, x]), torch.cat([timesteps, timesteps])), [""] * len(texts)
            told, untold = self._ask(*twice, [*texts, *bare]).chunk(2)
            return untold + self.guidance * (told - untold)
        return self._ask(x, timesteps, texts, encoded)

    def _ask(
        self, x: Tensor, timesteps: Tensor, texts: Sequence[str], encoded: Sequence[EncodedPrompt] | None = None
    ) -> Tensor:
        embeds, added = self.condition(texts, encoded)
        self.forwards += len(x)
        device = self.model.device
        output: Tensor = self.model.unet(
            x.to(device, self.model.dtype), timesteps.to(device), encoder_hidden_states=embeds,
            added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip
        return output.float()

    @torch.no_grad()
    def frozen(
        self, x: Tensor, timesteps: Tensor, texts: Sequence[str], batch: int = 32, quick: bool = False
    ) -> Tensor:
        """The same in batches, without gradients, on the CPU. quick: in bf16 where that is quicker."""
        slices = [slice(i, i + batch) for i in range(0, len(x), batch)]
        with quick_products(self.model, quick):
            return torch.cat([self(x[s], timesteps[s], texts[s]).cpu() for s in slices])


def set_rows(attachment: Attachment, scales: Tensor) -> None:
    """One adapter's scale for each row of the next call [n]."""
    attachment.set(scales[None])


def predict_scaled(
    predictor: Predictor, attachment: Attachment, scales: Tensor, x: Tensor, timesteps: Tensor, texts: Sequence[str]
) -> Tensor:
    """`predictor(x, timesteps, texts)` with the one adapter attached at a scale for each row [n], gradients included:
    where it changes text encoders, each row's text is encoded at its scale.
    """
    encoded = None
    if attachment.adapters[0].changes_text:
        encoded = encode_each(predictor.model, texts, before=lambda rows: set_rows(attachment, scales[rows]))
    set_rows(attachment, scales)
    return predictor(x, timesteps, texts, encoded)
