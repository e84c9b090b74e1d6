"""The spellings of LoRA keys: kohya, kohya with sgm block names, PEFT, and diffusers' older ones, read in any mixture.

| spelling | a key |
|---|---|
| kohya | `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight` |
| sgm | `lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight` |
| peft | `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight` |
| diffusers | `unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight`, `….lora.down.weight`, `….lora_linear_layer.down.weight` |

Sources: kohya-ss/sd-scripts networks/lora.py, KohakuBlueleaf/LyCORIS (LoHa, LoKr, full), huggingface/peft save_and_load.py,
huggingface/diffusers state_dict_utils.py.
"""  # noqa: E501

from __future__ import annotations

import re
from typing import NamedTuple

from dodgeburn.checkpoint.modules import flat_names, flat_text_names, is_module, sgm_modules, sgm_name

SPELLINGS = ("kohya", "sgm", "peft")

# What a key's end says of the tensor, by the algorithm's role names below.
_ENDINGS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".alpha": "alpha", ".network_alpha": "alpha",
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b",
    ".dora_scale": "dora", ".lora_magnitude_vector": "dora",
}  # fmt: skip
_LYCORIS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_PEFT = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.(weight|bias)$")
_PEFT_LYCORIS = re.compile(rf"\.({'|'.join(sorted(_LYCORIS, key=len, reverse=True))})(?:\.[^.]+)?$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
# Algorithms whose effect is not a sum on the weights, or that no file of SD uses often enough to test against.
_UNKNOWN_ALGORITHMS = {
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".oft_R": "OFT", ".boft_R": "BOFT", ".on_input": "IA3",
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA",
    ".vera_lambda_b": "VeRA",
}  # fmt: skip

_FLAT = {"lora_unet_": "unet", "lycoris_": "unet", "lora_te_": "te", "lora_te1_": "te", "lora_te2_": "te2"}
_DOTTED = {
    "unet.": "unet", "text_encoder.": "te", "text_encoder_2.": "te2", "te1.": "te", "te2.": "te2", "te.": "te",
    "model.diffusion_model.": "sgm", "diffusion_model.": "sgm",
}  # fmt: skip
_UNET_TOPS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_COMPONENTS = {"te": "text_encoder", "te2": "text_encoder_2"}


class Key(NamedTuple):
    """What a key of an adapter file means: its module (None if no model of ours has it), its role, its spelling.

    Roles: down, up, mid, alpha (LoRA, LoCon); hada_… (LoHa); lokr_… (LoKr); diff, diff_b (full); dora; and
    "unknown:NAME" for algorithms that cannot be read. `prefix` is the text encoder's, where it tells models apart.
    """

    module: str | None
    role: str
    spelling: str
    prefix: str = ""


def parse_key(key: str) -> Key | None:
    """What the key means; None if it does not look like an adapter's at all."""
    split = _split_role(key)
    if split is None:
        return None
    stem, role, peft = split
    for prefix, kind in _FLAT.items():
        if stem.startswith(prefix):
            module, spelling = _flat_module(stem.removeprefix(prefix), kind)
            return Key(module, role, spelling, prefix if kind != "unet" else "")
    stem = stem.removeprefix("base_model.model.")
    kind = ""
    for prefix, found in _DOTTED.items():
        if stem.startswith(prefix):
            stem, kind = stem.removeprefix(prefix), found
            break
    if not kind:
        kind = "unet" if stem.startswith(_UNET_TOPS) else "te"
    if kind == "sgm":
        return Key(sgm_modules().get(stem), role, "sgm")
    return Key(_dotted_module(stem, kind), role, "peft" if peft else "diffusers")


def _split_role(key: str) -> tuple[str, str, bool] | None:
    """Stem, role and whether the role is spelled as PEFT does."""
    if match := _PEFT.search(key):
        role = {"A": "down", "B": "up"}[match.group(1)]
        return key[: match.start()], role if match.group(2) == "weight" else "unknown:LoRA bias", True
    if match := _MAGNITUDE.search(key):
        return key[: match.start()], "dora", True
    if match := _PEFT_LYCORIS.search(key):
        return key[: match.start()], match.group(1), False
    for ending, role in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role, False
    for ending, algorithm in _UNKNOWN_ALGORITHMS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), f"unknown:{algorithm}", False
    return None


def _flat_module(name: str, kind: str) -> tuple[str | None, str]:
    if kind == "unet":
        module, spelling = flat_names().get(name, (None, "kohya"))
        return module, spelling
    tail = flat_text_names().get(name) or flat_text_names().get(f"text_model_{name}")
    return (f"{_COMPONENTS[kind]}.{tail}" if tail else None), "kohya"


def _dotted_module(name: str, kind: str) -> str | None:
    name = name.replace(".processor.", ".")
    head, _, last = name.rpartition(".")
    if kind == "unet":
        module = f"unet.{head}.to_out.0" if last == "to_out" else f"unet.{name}"
        return module if is_module(module) else None
    if last in _TEXT_ATTENTION:
        name = f"{head}.{_TEXT_ATTENTION[last]}"
    for tail in (name, f"text_model.{name}"):
        if is_module(f"{_COMPONENTS[kind]}.{tail}"):
            return f"{_COMPONENTS[kind]}.{tail}"
    return None


# -------------------- writing

_KOHYA_ROLES = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
_PEFT_ROLES = {"down": "lora_A.weight", "up": "lora_B.weight"}


def write_key(module: str, role: str, spelling: str, layout: str) -> str:
    """The key of a module's tensor in a spelling ("kohya", "sgm", "peft") for a layout ("sd15", "sdxl").

    Raises KeyError for a role that the spelling has no name for (PEFT: everything but down and up).
    """
    component, _, name = module.partition(".")
    if spelling == "peft":
        return f"{module}.{_PEFT_ROLES[role]}"
    end = _KOHYA_ROLES.get(role, role)
    if component == "unet":
        flat = (sgm_name(module, layout) if spelling == "sgm" else name).replace(".", "_")
        return f"lora_unet_{flat}.{end}"
    number = "" if layout == "sd15" else "2" if component == "text_encoder_2" else "1"
    return f"lora_te{number}_{name.replace('.', '_')}.{end}"
