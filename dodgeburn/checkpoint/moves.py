"""What becomes of every tensor when a checkpoint changes between single file and diffusers folder, as data.

A `Move` says from which tensors one tensor is made and how; the moves of a whole checkpoint are worked out from names,
shapes and component configs alone. So the same moves convert a model in memory (convert.py), a file of any size tensor
by tensor (rewrite.py), and say which bytes of a single file belong to a module of diffusers (modules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dodgeburn.checkpoint.text_keys import (
    CLIP_SD15,
    CLIP_SDXL,
    OPEN_CLIP,
    POSITION_IDS,
    classic_text_name,
    clip_key_map,
    in_proj_keys,
    open_clip_key_map,
)
from dodgeburn.checkpoint.unet_keys import Config, unet_key_map
from dodgeburn.checkpoint.vae_keys import is_vae_attention_weight, modern_vae_name, vae_key_map
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Op = Literal["same", "flatten", "unflatten", "transpose", "third", "join"]
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")

# Tensors of single files that no diffusers component has; dropping them loses nothing.
HARMLESS = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "denoiser.", OPEN_CLIP + "logit_scale", OPEN_CLIP + "attn_mask", "scale_factor",
    "conditioner.embedders.0.transformer.text_projection", "conditioner.embedders.0.logit_scale",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "first_stage_model.model_ema.", "first_stage_model.loss.",
)  # fmt: skip


@dataclass(frozen=True)
class Move:
    """How one tensor is made: "same"; a 1x1 convolution [C, C, 1, 1] flattened to [C, C], or the reverse; transposed;
    one third (`part` 0, 1, 2) of the rows; or three tensors joined along the rows.
    """

    sources: tuple[str, ...]
    op: Op = "same"
    part: int = 0

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> Shape:
        """The result's shape from the sources'."""
        first = tuple(shapes[self.sources[0]])
        if self.op == "flatten":
            return first[:2]
        if self.op == "unflatten":
            return (*first, 1, 1)
        if self.op == "transpose":
            return first[::-1]
        if self.op == "third":
            return (first[0] // 3, *first[1:])
        if self.op == "join":
            return (sum(shapes[name][0] for name in self.sources), *first[1:])
        return first

    def apply(self, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The result; a view where possible."""
        import torch

        first = get(self.sources[0])
        if self.op == "flatten":
            return first.reshape(first.shape[:2])
        if self.op == "unflatten":
            return first[:, :, None, None]
        if self.op == "transpose":
            return first.T.contiguous()
        if self.op == "third":
            return first.chunk(3, dim=0)[self.part]
        if self.op == "join":
            return torch.cat([first, *(get(name) for name in self.sources[1:])], dim=0)
        return first


def clip_prefix(configs: Iterable[str]) -> str:
    """Prefix of the first text encoder in a single file: SDXL's if there is a second one."""
    return CLIP_SDXL if "text_encoder_2" in configs else CLIP_SD15


# -------------------- single file -> components


def moves_to_diffusers(
    shapes: Mapping[str, Sequence[int]], configs: Mapping[str, Config]
) -> tuple[dict[str, dict[str, Move]], list[str]]:
    """Component -> its tensors (diffusers' names, text encoders with `text_model.`) -> how each is made from a single
    file's; and the file's tensors that no component has, those known to be harmless left out.

    Raises UserError if a component lacks tensors.
    """
    used: set[str] = set()
    out: dict[str, dict[str, Move]] = {}
    for component, config in configs.items():
        if component == "unet":
            moves = _plain(component, unet_key_map(config), shapes)
        elif component == "vae":
            moves = _plain(component, vae_key_map(config), shapes)
            for name, move in moves.items():
                if is_vae_attention_weight(move.sources[0]) and len(shapes[move.sources[0]]) > 2:
                    moves[name] = Move(move.sources, "flatten")
        elif component == "text_encoder":
            prefix = clip_prefix(configs)
            moves = _plain(component, clip_key_map(config, prefix), shapes)
            if prefix + POSITION_IDS in shapes:
                moves[POSITION_IDS] = Move((prefix + POSITION_IDS,))
        elif component == "text_encoder_2":
            moves = _from_open_clip(shapes, config)
        else:
            continue
        out[component] = moves
        used.update(source for move in moves.values() for source in move.sources)
    return out, [key for key in shapes if key not in used and not key.startswith(HARMLESS)]


def _plain(component: str, keys: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Move]:
    missing = [key for key in keys if key not in shapes]
    if component == "vae" and len(missing) == len(keys):
        raise UserError("the checkpoint has no VAE: `dodgeburn convert FILE --vae VAE -o OUT` puts one in")
    if missing:
        raise UserError(f"the checkpoint's {component} lacks {len(missing)} of {len(keys)} tensors: {missing[0]}, …")
    return {name: Move((key,)) for key, name in keys.items()}


def _from_open_clip(shapes: Mapping[str, Sequence[int]], config: Config) -> dict[str, Move]:
    moves = _plain("text_encoder_2", open_clip_key_map(config), shapes)
    moves["text_projection.weight"] = Move(moves["text_projection.weight"].sources, "transpose")
    fused = in_proj_keys(config)
    _plain("text_encoder_2", {key: key for key in fused}, shapes)
    for key, names in fused.items():
        if shapes[key][0] % 3:
            raise UserError(f"{key} has {shapes[key][0]} rows, which is not three equal parts")
        moves |= {name: Move((key,), "third", part) for part, name in enumerate(names)}
    return moves


# -------------------- components -> single file


def moves_to_single(
    shapes: Mapping[str, Mapping[str, Sequence[int]]], configs: Mapping[str, Config]
) -> dict[str, tuple[str, Move]]:
    """Single-file key -> (component, how it is made from that component's tensors), for all of `shapes`.

    Text encoders may come with or without `text_model.`, and VAE attention in old diffusers names. Raises UserError if
    a component lacks tensors or has ones that its config does not explain.
    """
    out: dict[str, tuple[str, Move]] = {}
    for component, of_component in shapes.items():
        if component not in COMPONENTS:
            raise UserError(f"{component} is no component: expected {', '.join(COMPONENTS)}")
        if component not in configs:
            raise UserError(f"no config for component {component}")
        moves = _component_to_single(component, of_component, configs[component], clip_prefix(shapes))
        out |= {key: (component, move) for key, move in moves.items()}
    return out


def _component_to_single(
    component: str, shapes: Mapping[str, Sequence[int]], config: Config, prefix: str
) -> dict[str, Move]:
    if component == "unet":
        return _given(component, unet_key_map(config), {name: name for name in shapes})
    if component == "vae":
        moves = _given(component, vae_key_map(config), {modern_vae_name(name): name for name in shapes})
        for key, move in moves.items():
            if is_vae_attention_weight(key) and len(shapes[move.sources[0]]) == 2:
                moves[key] = Move(move.sources, "unflatten")
        return moves
    actual = {classic_text_name(name): name for name in shapes}
    if component == "text_encoder":
        keys = clip_key_map(config, prefix)
        if POSITION_IDS in actual:
            keys[prefix + POSITION_IDS] = POSITION_IDS
        return _given(component, keys, actual)
    actual.pop(POSITION_IDS, None)  # constant, and OpenCLIP has none
    moves = {}
    for key, names in in_proj_keys(config).items():
        missing = [name for name in names if name not in actual]
        if missing:
            raise UserError(f"the text_encoder_2 lacks {missing[0]}")
        moves[key] = Move(tuple(actual.pop(name) for name in names), "join")
    moves |= _given(component, open_clip_key_map(config), actual)
    key = OPEN_CLIP + "text_projection"
    moves[key] = Move(moves[key].sources, "transpose")
    return moves


def _given(component: str, keys: Mapping[str, str], actual: Mapping[str, str]) -> dict[str, Move]:
    """Moves for single-file key -> wanted name, where `actual` maps wanted names to those that are there."""
    missing = [name for name in keys.values() if name not in actual]
    if missing:
        raise UserError(f"the {component} lacks {len(missing)} of {len(keys)} tensors, first {missing[0]}")
    extra = set(actual) - set(keys.values())
    if extra:
        raise UserError(f"the {component} has {len(extra)} tensors unknown to its config, first {min(extra)}")
    return {key: Move((actual[name],)) for key, name in keys.items()}
