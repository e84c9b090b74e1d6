"""How the U-Net is asked for a denoised picture: input scaling, guidance, prediction types."""

import math

import torch
from torch import Tensor

from dodgeburn.models.model import Model
from dodgeburn.sampling.text_cache import TextCache


def classifier_free(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, negative + scale * (positive - negative) (arXiv 2207.12598, eq. 6); same
    shapes.
    """
    return negative + scale * (positive - negative)


class Denoiser:
    """`denoiser(x, sigma, timestep) -> denoised` for one batch of prompts, the same for SDXL and SD1.5
    shapes.

    Positive and negative prompts go through the U-Net as one batch; without guidance (scale 1) only the
    positive do.
    """

    def __init__(
        self,
        model: Model,
        positive: tuple[Tensor, Tensor | None],
        negative: tuple[Tensor, Tensor | None],
        scale: float,
        size: tuple[int, int],
        prediction_type: str,
        cache: TextCache | None = None,
    ) -> None:
        """`positive`, `negative`: (token embeddings [n, tokens, width], pooled [n, width] or None); `size`:
        pixels (height, width).
        """
        self.unet = model.unet
        self.dtype = model.dtype
        self.device = model.device
        self.scale = scale
        self.prediction_type = prediction_type
        self.cache = cache
        self.passes = 1 if scale == 1.0 else 2
        parts = [positive] if self.passes == 1 else [negative, positive]
        self.text = torch.cat([embeds for embeds, _ in parts]).to(model.device, model.dtype)
        self.added: dict[str, Tensor] | None = None
        if model.has_added_conditions:
            pooled = torch.cat([p for _, p in parts if p is not None])
            # original size, top left corner of the crop, target size: (h, w, 0, 0, h, w), as SDXL was trained
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=model.dtype).repeat(len(self.text), 1)
            self.added = {
                "text_embeds": pooled.to(model.device, model.dtype),
                "time_ids": ids.to(model.device),
            }

    def keep(self, rows: Tensor) -> None:
        """Go on with these pictures of the batch only (int64 [m])."""
        if self.passes == 2:
            rows = torch.cat([rows, rows + len(self.text) // 2])
        self.text = self.text[rows]
        if self.added is not None:
            self.added = {name: value[rows] for name, value in self.added.items()}
        if self.cache is not None:
            self.cache.keep(rows)

    def __call__(self, x: Tensor, sigma: float, timestep: float) -> Tensor:
        """Guess of the clean latents from `x` [n, c, h, w] (fp32, variance exploding) at noise level
        `sigma`.
        """
        scaled = (x * (1 / math.sqrt(sigma * sigma + 1))).to(self.dtype)
        if self.passes == 2:
            scaled = torch.cat([scaled, scaled])
        # An integral time stays an integer: that is how the model was trained and how diffusers calls it.
        time = int(timestep) if float(timestep).is_integer() else timestep
        output = self.unet(
            scaled,
            torch.tensor(time, device=self.device, dtype=torch.float32 if isinstance(time, float) else torch.int64),
            encoder_hidden_states=self.text,
            added_cond_kwargs=self.added,
            return_dict=False,
        )[0].to(torch.float32)
        if self.passes == 2:
            negative, positive = output.chunk(2)
            output = classifier_free(negative, positive, self.scale)
        return denoised_from(output, x, sigma, self.prediction_type)


def denoised_from(output: Tensor, x: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """Clean latents from the model's `output` at `x` = x0 + sigma * noise; all [n, c, h, w].

    epsilon: x - sigma * eps. v (arXiv 2202.00512, appendix D):
    x / (sigma^2 + 1) - v * sigma / sqrt(sigma^2 + 1).
    """
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":
        return x / (sigma * sigma + 1) - output * (sigma / math.sqrt(sigma * sigma + 1))
    return output
