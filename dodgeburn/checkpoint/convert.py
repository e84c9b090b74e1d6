"""Key names of SD1.5 and SDXL checkpoints: single file (ldm/sgm names) <-> diffusers and transformers.

Every map is computed from the component's config, so real models, and narrow ones of the same topology,
share one code path. Names follow Stability-AI/generative-models on one side and diffusers'
UNet2DConditionModel and AutoencoderKL, transformers' CLIPTextModel and CLIPTextModelWithProjection on the
other.

Tensors keep their dtype (integers stay integers). Only two things change besides names: the VAE's attention
weights are 1x1 convolutions [C, C, 1, 1] in a single file and linear [C, C] in diffusers, and OpenCLIP's
second text encoder fuses q, k and v into `in_proj` and stores `text_projection` transposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP_SD15 = "cond_stage_model.transformer."
_CLIP_SDXL = "conditioner.embedders.0.transformer."
_OPEN_CLIP = "conditioner.embedders.1.model."

_RESNET = {  # U-Net: ldm name -> diffusers name
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_OLD = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # diffusers < 0.18
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}

# Tensors of single files that no diffusers component has; dropping them loses nothing.
_HARMLESS = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "denoiser.", _OPEN_CLIP + "logit_scale", _OPEN_CLIP + "attn_mask", "scale_factor",
    "conditioner.embedders.0.transformer.text_projection", "conditioner.embedders.0.logit_scale",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "first_stage_model.model_ema.", "first_stage_model.loss.",
)  # fmt: skip


def _both(single: str, diffusers: str) -> dict[str, str]:
    return {f"{single}.weight": f"{diffusers}.weight", f"{single}.bias": f"{diffusers}.bias"}


def _per_block(value: Any, n: int, what: str) -> list[Any]:
    if isinstance(value, int):
        return [value] * n
    if isinstance(value, Sequence) and len(value) == n:
        return list(value)
    raise UserError(f"config: {what} is {value!r}, expected a number or a list of {n}")


# -------------------- U-Net


def _resnet(single: str, diffusers: str, shortcut: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for a, b in _RESNET.items():
        out |= _both(f"{single}.{a}", f"{diffusers}.{b}")
    if shortcut:
        out |= _both(f"{single}.skip_connection", f"{diffusers}.conv_shortcut")
    return out


def _transformer(single: str, diffusers: str, depth: int) -> dict[str, str]:
    """Spatial transformer: names below the block are the same on both sides."""
    tails = [f"{layer}.{kind}" for layer in ("norm", "proj_in", "proj_out") for kind in ("weight", "bias")]
    for d in range(depth):
        block = f"transformer_blocks.{d}"
        for attention in ("attn1", "attn2"):
            tails += [f"{block}.{attention}.{name}.weight" for name in ("to_q", "to_k", "to_v")]
            tails += [f"{block}.{attention}.to_out.0.weight", f"{block}.{attention}.to_out.0.bias"]
        for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"):
            tails += [f"{block}.{layer}.weight", f"{block}.{layer}.bias"]
    return {f"{single}.{tail}": f"{diffusers}.{tail}" for tail in tails}


def unet_key_map(config: Config) -> dict[str, str]:
    """Single-file key (`model.diffusion_model.…`) -> key of UNet2DConditionModel, from the U-Net's config.

    Raises UserError for block types that SD1.5 and SDXL do not have.
    """
    channels = list(config["block_out_channels"])
    down_types, up_types = list(config["down_block_types"]), list(config["up_block_types"])
    n = len(channels)
    layers = _per_block(config.get("layers_per_block", 2), n, "layers_per_block")
    depths = _per_block(config.get("transformer_layers_per_block", 1), n, "transformer_layers_per_block")
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    _known(down_types, ("DownBlock2D", "CrossAttnDownBlock2D"), n, "down_block_types")
    _known(up_types, ("UpBlock2D", "CrossAttnUpBlock2D"), n, "up_block_types")
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    _known([middle], ("UNetMidBlock2DCrossAttn",), 1, "mid_block_type")

    out = _both("time_embed.0", "time_embedding.linear_1") | _both("time_embed.2", "time_embedding.linear_2")
    if config.get("addition_embed_type") == "text_time":
        out |= _both("label_emb.0.0", "add_embedding.linear_1") | _both(
            "label_emb.0.2", "add_embedding.linear_2"
        )
    out |= _both("input_blocks.0.0", "conv_in")

    i = 1  # running number of the input block
    previous = channels[0]
    for b in range(n):
        for j in range(layers[b]):
            here = f"down_blocks.{b}"
            out |= _resnet(f"input_blocks.{i}.0", f"{here}.resnets.{j}", previous != channels[b])
            if down_types[b].startswith("CrossAttn"):
                out |= _transformer(f"input_blocks.{i}.1", f"{here}.attentions.{j}", _depth(depths[b], j))
            previous = channels[b]
            i += 1
        if b < n - 1:
            out |= _both(f"input_blocks.{i}.0.op", f"down_blocks.{b}.downsamplers.0.conv")
            i += 1

    out |= _resnet("middle_block.0", "mid_block.resnets.0", False)
    out |= _transformer("middle_block.1", "mid_block.attentions.0", _depth(depths[-1], 0))
    out |= _resnet("middle_block.2", "mid_block.resnets.1", False)

    i = 0
    reverse = channels[::-1]
    previous = reverse[0]
    for b in range(n):
        skip_last = reverse[min(b + 1, n - 1)]  # the last layer takes the skip from one level up
        count = layers[::-1][b] + 1
        for j in range(count):
            here, block = f"up_blocks.{b}", f"output_blocks.{i}"
            incoming = previous + (skip_last if j == count - 1 else reverse[b])
            out |= _resnet(f"{block}.0", f"{here}.resnets.{j}", incoming != reverse[b])
            next_slot = 1
            if up_types[b].startswith("CrossAttn"):
                out |= _transformer(f"{block}.1", f"{here}.attentions.{j}", _depth(up_depths[b], j))
                next_slot = 2
            if j == count - 1 and b < n - 1:
                out |= _both(f"{block}.{next_slot}.conv", f"{here}.upsamplers.0.conv")
            previous = reverse[b]
            i += 1
    out |= _both("out.0", "conv_norm_out") | _both("out.2", "conv_out")
    return {_UNET + single: diffusers for single, diffusers in out.items()}


def _known(types: list[str], known: tuple[str, ...], n: int, what: str) -> None:
    if len(types) != n:
        raise UserError(f"config: {what} lists {len(types)} blocks, expected {n}")
    for kind in types:
        if kind not in known:
            raise UserError(f"config: {what} has {kind!r}; SD1.5 and SDXL have only {', '.join(known)}")


def _depth(depth: int | Sequence[int], layer: int) -> int:
    return depth if isinstance(depth, int) else depth[layer]


# -------------------- VAE


def _vae_resnet(single: str, diffusers: str, shortcut: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        out |= _both(f"{single}.{layer}", f"{diffusers}.{layer}")
    if shortcut:
        out |= _both(f"{single}.nin_shortcut", f"{diffusers}.conv_shortcut")
    return out


def _vae_middle(side: str, attention: bool) -> dict[str, str]:
    out: dict[str, str] = {}
    for j in range(2):
        out |= _vae_resnet(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}", False)
    if attention:
        for a, b in _VAE_ATTENTION.items():
            out |= _both(f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}")
    return out


def vae_key_map(config: Config) -> dict[str, str]:
    """Single-file key (`first_stage_model.…`) -> key of AutoencoderKL, from the VAE's config."""
    channels = list(config["block_out_channels"])
    n = len(channels)
    _known(list(config["down_block_types"]), ("DownEncoderBlock2D",), n, "down_block_types")
    _known(list(config["up_block_types"]), ("UpDecoderBlock2D",), n, "up_block_types")
    layers = int(config.get("layers_per_block", 1))
    attention = bool(config.get("mid_block_add_attention", True))
    out: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        out |= _both(f"{side}.conv_in", f"{side}.conv_in") | _vae_middle(side, attention)
        out |= _both(f"{side}.norm_out", f"{side}.conv_norm_out") | _both(
            f"{side}.conv_out", f"{side}.conv_out"
        )
    previous = channels[0]
    for b in range(n):
        single, diffusers = f"encoder.down.{b}", f"encoder.down_blocks.{b}"
        for j in range(layers):
            out |= _vae_resnet(f"{single}.block.{j}", f"{diffusers}.resnets.{j}", previous != channels[b])
            previous = channels[b]
        if b < n - 1:
            out |= _both(f"{single}.downsample.conv", f"{diffusers}.downsamplers.0.conv")
    previous = channels[-1]
    for b in range(n):
        level = n - 1 - b  # ldm numbers the decoder's levels from fine to coarse
        single, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{b}"
        for j in range(layers + 1):
            out |= _vae_resnet(f"{single}.block.{j}", f"{diffusers}.resnets.{j}", previous != channels[level])
            previous = channels[level]
        if b < n - 1:
            out |= _both(f"{single}.upsample.conv", f"{diffusers}.upsamplers.0.conv")
    if config.get("use_quant_conv", True):
        out |= _both("quant_conv", "quant_conv")
    if config.get("use_post_quant_conv", True):
        out |= _both("post_quant_conv", "post_quant_conv")
    return {_VAE + single: diffusers for single, diffusers in out.items()}


def _is_vae_attention_weight(key: str) -> bool:
    """True for the single-file keys whose tensors are 1x1 convolutions there and linear in diffusers."""
    parts = key.split(".")
    return (
        len(parts) >= 3
        and parts[-3] == "attn_1"
        and parts[-2] in ("q", "k", "v", "proj_out")
        and parts[-1] == "weight"
    )


# -------------------- text encoders


def clip_key_map(config: Config, prefix: str = _CLIP_SDXL) -> dict[str, str]:
    """Single-file key -> key of CLIPTextModel (`text_model.…`) for a text encoder kept in HF names."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for i in range(int(config["num_hidden_layers"])):
        for layer in (
            "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
            "layer_norm2", "mlp.fc1", "mlp.fc2",
        ):  # fmt: skip
            names += [f"encoder.layers.{i}.{layer}.weight", f"encoder.layers.{i}.{layer}.bias"]
    names += ["final_layer_norm.weight", "final_layer_norm.bias"]
    return {f"{prefix}text_model.{name}": f"text_model.{name}" for name in names}


def open_clip_key_map(config: Config, prefix: str = _OPEN_CLIP) -> dict[str, str]:
    """Single-file (OpenCLIP) key -> key of CLIPTextModelWithProjection, where one tensor is one tensor.

    `in_proj_weight` and `in_proj_bias` are not in it: they are three tensors on the other side.
    """
    out = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_projection": "text_projection.weight",
    } | _both("ln_final", "text_model.final_layer_norm")
    for i in range(int(config["num_hidden_layers"])):
        for a, b in _OPEN_CLIP_LAYER.items():
            out |= _both(f"transformer.resblocks.{i}.{a}", f"text_model.encoder.layers.{i}.{b}")
    return {prefix + single: hf for single, hf in out.items()}


def _in_proj(config: Config, prefix: str = _OPEN_CLIP) -> dict[str, tuple[str, str, str]]:
    """Fused single-file key -> the keys of q, k and v on the other side."""
    out: dict[str, tuple[str, str, str]] = {}
    for i in range(int(config["num_hidden_layers"])):
        for kind in ("weight", "bias"):
            q, k, v = (f"text_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}" for x in "qkv")
            out[f"{prefix}transformer.resblocks.{i}.attn.in_proj_{kind}"] = (q, k, v)
    return out


def fit_names(state_dict: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """The state dict under the names a module wants: CLIPTextModel lost its `text_model.` in transformers
    5.6.

    `position_ids` is left out where the module has it as a constant. All other names pass unchanged.
    """
    names = set(wanted)
    has_prefix = any(name.startswith("text_model.") for name in names)
    out: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if key not in names:
            other = f"text_model.{key}" if has_prefix else key.removeprefix("text_model.")
            if other in names:
                key = other
            elif key.endswith("embeddings.position_ids"):
                continue
        out[key] = tensor
    return out


# -------------------- whole checkpoints


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
    used: set[str] = set()
    out: dict[str, dict[str, torch.Tensor]] = {}

    def take(component: str, keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise UserError(
                f"the checkpoint's {component} lacks {len(missing)} of {len(keys)} tensors: {missing[0]}, …"
            )
        used.update(keys)
        return {name: tensors[key] for key, name in keys.items()}

    for component, config in configs.items():
        if component == "unet":
            out[component] = take(component, unet_key_map(config))
        elif component == "vae":
            out[component] = _vae_to_diffusers(tensors, config, take)
        elif component == "text_encoder":
            prefix = _CLIP_SDXL if "text_encoder_2" in configs else _CLIP_SD15
            out[component] = take(component, clip_key_map(config, prefix))
            ids = prefix + "text_model.embeddings.position_ids"
            if ids in tensors:
                used.add(ids)
                out[component]["text_model.embeddings.position_ids"] = tensors[ids]
        elif component == "text_encoder_2":
            out[component] = _open_clip_to_diffusers(tensors, config, take)
    left = [key for key in tensors if key not in used and not key.startswith(_HARMLESS)]
    if left and {"unet", "vae", "text_encoder"} <= set(configs):
        warnings.warn(
            f"{len(left)} tensors of the checkpoint belong to no component and are left out, first {left[0]}",
            DodgeburnWarning,
            stacklevel=2,
        )
    return out


def _vae_to_diffusers(
    tensors: Mapping[str, torch.Tensor], config: Config, take: Any
) -> dict[str, torch.Tensor]:
    keys = vae_key_map(config)
    out: dict[str, torch.Tensor] = take("vae", keys)
    for single, name in keys.items():
        if _is_vae_attention_weight(single) and out[name].ndim > 2:
            out[name] = out[name].reshape(out[name].shape[:2])
    return out


def _open_clip_to_diffusers(
    tensors: Mapping[str, torch.Tensor], config: Config, take: Any
) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = take("text_encoder_2", open_clip_key_map(config))
    out["text_projection.weight"] = out["text_projection.weight"].T.contiguous()
    fused = _in_proj(config)
    take("text_encoder_2", {key: key for key in fused})
    for key, names in fused.items():
        if tensors[key].shape[0] % 3:
            raise UserError(f"{key} has {tensors[key].shape[0]} rows, which is not three equal parts")
        out.update(zip(names, tensors[key].chunk(3, dim=0), strict=True))
    return out


def diffusers_to_single_file(
    components: Mapping[str, Mapping[str, torch.Tensor]], configs: Mapping[str, Config]
) -> dict[str, torch.Tensor]:
    """State dicts by component (unet, vae, text_encoder, text_encoder_2) as one single-file dict.

    The inverse of `single_file_to_diffusers`. With a text_encoder_2 the first text encoder gets SDXL's
    prefix, without one SD1.5's. Text encoders may come with or without `text_model.`; VAE attention in old
    diffusers names is read too. Raises UserError if a component lacks tensors or has ones that the config
    does not explain.
    """
    out: dict[str, torch.Tensor] = {}
    for component, state_dict in components.items():
        if component not in configs:
            raise UserError(f"no config for component {component}")
        config = configs[component]
        if component == "unet":
            out |= _give(component, unet_key_map(config), state_dict)
        elif component == "vae":
            out |= _vae_to_single(state_dict, config)
        elif component == "text_encoder":
            prefix = _CLIP_SDXL if "text_encoder_2" in components else _CLIP_SD15
            keys = clip_key_map(config, prefix)
            fitted = _with_text_model(state_dict)
            ids = "text_model.embeddings.position_ids"
            if ids in fitted:
                keys[prefix + ids] = ids
            out |= _give(component, keys, fitted)
        elif component == "text_encoder_2":
            out |= _open_clip_to_single(_with_text_model(state_dict), config)
        else:
            raise UserError(f"{component} is no component: expected unet, vae, text_encoder, text_encoder_2")
    return out


def _with_text_model(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in state_dict.items()
    }


def _give(
    component: str, keys: Mapping[str, str], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    missing = [name for name in keys.values() if name not in state_dict]
    if missing:
        raise UserError(f"the {component} lacks {len(missing)} of {len(keys)} tensors, first {missing[0]}")
    extra = set(state_dict) - set(keys.values())
    if extra:
        raise UserError(f"the {component} has {len(extra)} tensors unknown to its config, first {min(extra)}")
    return {key: state_dict[name] for key, name in keys.items()}


def _vae_to_single(state_dict: Mapping[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in _VAE_ATTENTION_OLD:
            name = ".".join([*parts[:-2], _VAE_ATTENTION_OLD[parts[-2]], parts[-1]])
        renamed[name] = tensor
    out = _give("vae", vae_key_map(config), renamed)
    for key in out:
        if _is_vae_attention_weight(key) and out[key].ndim == 2:
            out[key] = out[key][:, :, None, None]
    return out


def _open_clip_to_single(state_dict: Mapping[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    import torch

    rest = {k: v for k, v in state_dict.items() if not k.endswith("embeddings.position_ids")}
    out: dict[str, torch.Tensor] = {}
    for key, names in _in_proj(config).items():
        missing = [name for name in names if name not in rest]
        if missing:
            raise UserError(f"the text_encoder_2 lacks {missing[0]}")
        out[key] = torch.cat([rest.pop(name) for name in names], dim=0)
    out |= _give("text_encoder_2", open_clip_key_map(config), rest)
    key = _OPEN_CLIP + "text_projection"
    out[key] = out[key].T.contiguous()
    return out
