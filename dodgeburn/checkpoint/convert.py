"""SD1.5 and SDXL state dicts in memory: single file (ldm/sgm names) <-> diffusers and transformers.

Every map is computed from the component's config, so real models, and narrow ones of the same topology, share one code
path. Names follow Stability-AI/generative-models on one side and diffusers' UNet2DConditionModel and AutoencoderKL,
transformers' CLIPTextModel and CLIPTextModelWithProjection on the other.

Tensors keep their dtype (integers stay integers). Only two things change besides names: the VAE's attention weights are
1x1 convolutions [C, C, 1, 1] in a single file and linear [C, C] in diffusers, and OpenCLIP's second text encoder fuses
q, k and v into `in_proj` and stores `text_projection` transposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dodgeburn.checkpoint.moves import moves_to_diffusers, moves_to_single
from dodgeburn.checkpoint.text_keys import clip_key_map, fit_names, open_clip_key_map
from dodgeburn.checkpoint.unet_keys import Config, unet_key_map
from dodgeburn.checkpoint.vae_keys import vae_key_map
from dodgeburn.errors import DodgeburnWarning

if TYPE_CHECKING:
    import torch

__all__ = [
    "Config",
    "clip_key_map",
    "diffusers_to_single_file",
    "fit_names",
    "open_clip_key_map",
    "single_file_to_diffusers",
    "unet_key_map",
    "vae_key_map",
    "warn_of_left",
]


def single_file_to_diffusers(
    tensors: Mapping[str, torch.Tensor], configs: Mapping[str, Config]
) -> dict[str, dict[str, torch.Tensor]]:
    """A single file's tensors as state dicts by component: those of unet, vae, text_encoder, text_encoder_2
    in `configs`.

    Text encoders get the classic `text_model.…` names: `fit_names` turns them into what a module wants.
    Tensors are views where possible. Raises UserError if a component lacks tensors; a counted warning for
    tensors that no component has (EMA copies, schedule buffers and `logit_scale` are known and dropped
    without one).
    """
    moves, left = moves_to_diffusers({key: tuple(tensor.shape) for key, tensor in tensors.items()}, configs)
    if {"unet", "vae", "text_encoder"} <= set(configs):
        warn_of_left(left)
    return {
        component: {name: move.apply(tensors.__getitem__) for name, move in of_component.items()}
        for component, of_component in moves.items()
    }


def warn_of_left(left: list[str]) -> None:
    """A counted DodgeburnWarning for tensors of a single file that no component has."""
    if left:
        warnings.warn(
            f"{len(left)} tensors of the checkpoint belong to no component and are left out, first {left[0]}",
            DodgeburnWarning,
            stacklevel=3,
        )


def diffusers_to_single_file(
    components: Mapping[str, Mapping[str, torch.Tensor]], configs: Mapping[str, Config]
) -> dict[str, torch.Tensor]:
    """State dicts by component (unet, vae, text_encoder, text_encoder_2) as one single-file dict.

    The inverse of `single_file_to_diffusers`. With a text_encoder_2 the first text encoder gets SDXL's
    prefix, without one SD1.5's. Text encoders may come with or without `text_model.`; VAE attention in old
    diffusers names is read too. Raises UserError if a component lacks tensors or has ones that the config
    does not explain.
    """
    shapes = {
        component: {name: tuple(tensor.shape) for name, tensor in state.items()}
        for component, state in components.items()
    }
    moves = moves_to_single(shapes, configs)
    return {key: move.apply(components[component].__getitem__) for key, (component, move) in moves.items()}
