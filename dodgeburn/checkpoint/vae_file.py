"""The VAE in a file of any kind, under the names that a single file or a diffusers folder wants."""

from __future__ import annotations

from typing import Literal

from dodgeburn.checkpoint.moves import Move
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.checkpoint.unet_keys import Config
from dodgeburn.checkpoint.vae_keys import VAE, is_vae_attention_weight, modern_vae_name, vae_key_map
from dodgeburn.errors import UserError


def vae_moves(source: Tensors, config: Config, form: Literal["single", "diffusers"]) -> dict[str, Move]:
    """How a VAE's tensors are made from a file: wanted name -> move of the file's tensors.

    The file is a whole checkpoint (`first_stage_model.…`), a VAE alone in ldm names (`encoder.down.0.block.0.…`), or
    one in diffusers' (`encoder.down_blocks.0.…`). `config` is the VAE config of the model that is to get it. Raises
    UserError if the file holds no VAE, or one of another build.
    """
    names = source.keys()
    diffusers = {modern_vae_name(name): name for name in names}
    if any(name.startswith(VAE + "encoder.") for name in names):
        actual = {key: key for key in names}
    elif any(name.startswith("encoder.down_blocks.") for name in names):
        actual = {key: diffusers[name] for key, name in vae_key_map(config).items() if name in diffusers}
    elif any(name.startswith("encoder.") for name in names):
        actual = {VAE + name: name for name in names}
    else:
        raise UserError(f"{source.path.name} holds no VAE: expected first_stage_model.…, or a VAE alone")
    out: dict[str, Move] = {}
    for key, name in vae_key_map(config).items():
        if key not in actual:
            raise UserError(f"{source.path.name} holds a VAE of another build: it lacks {key.removeprefix(VAE)}")
        dims = len(source.info(actual[key]).shape)
        op: Literal["same", "flatten", "unflatten"] = "same"
        if is_vae_attention_weight(key):
            if form == "single" and dims == 2:
                op = "unflatten"
            elif form == "diffusers" and dims == 4:
                op = "flatten"
        out[key if form == "single" else name] = Move((actual[key],), op)
    return out
