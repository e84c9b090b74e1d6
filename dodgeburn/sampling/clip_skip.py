"""CLIP skip: which hidden state of the text encoders the U-Net gets. One convention, A1111's: 1 is the last layer.

| here, A1111 | ComfyUI `stop_at_clip_layer` | diffusers `clip_skip` SD1.5 | diffusers `clip_skip` SDXL | state |
|---|---|---|---|---|
| 1 | -1 | None (0 is the same) | none gives it | the last layer's: SD1.5's default |
| 2 | -2 | 1 | None (0 is the same) | the last but one: SDXL's default |
| n | -n | n - 1 | n - 2 | the n-th from the end |

SD1.5 passes the state through the encoder's final norm, whichever it is; SDXL takes it from both encoders as it is. The
pooled embedding is always the last layer's. (A1111 ignores the setting for SDXL unless told otherwise, and takes 2.)
"""

from typing import Any

from torch import Tensor, nn

from dodgeburn.errors import UserError
from dodgeburn.models.model import Model


def resolve_clip_skip(model: Model, clip_skip: int | None) -> int:
    """The count for this model, None being what it was trained with: 2 for SDXL, 1 for SD1.5.

    -N is N. Raises UserError for 0 and for more than the shallowest encoder has layers.
    """
    chosen = abs(clip_skip) if clip_skip is not None else 2 if model.has_added_conditions else 1
    layers = min(int(encoder.config.num_hidden_layers) for encoder in model.text_encoders)
    if not 1 <= chosen <= layers:
        raise UserError(
            f"CLIP skip is {clip_skip}: this model's text encoder has {layers} layers, give 1 (the last) to {layers}"
        )
    return chosen


def clip_state(encoder: nn.Module, out: Any, clip_skip: int, final_norm: bool) -> Tensor:
    """The state [batch, tokens, width] that `clip_skip` (1 = last layer) names in an encoder's output, which must hold
    its hidden states. `final_norm`: pass it through the encoder's final norm (SD1.5).
    """
    if clip_skip == 1 and final_norm:
        state: Tensor = out.last_hidden_state  # the model's own, already normed
        return state
    state = out.hidden_states[-clip_skip]
    return _final_norm(encoder)(state) if final_norm else state


def _final_norm(encoder: nn.Module) -> nn.Module:
    # transformers keeps it in `encoder` or in `encoder.text_model`, by version and class.
    for name, module in encoder.named_modules():
        if name.rsplit(".", 1)[-1] == "final_layer_norm":
            return module
    raise UserError(f"{type(encoder).__name__} has no final norm: CLIP skip works with CLIP text encoders only")
