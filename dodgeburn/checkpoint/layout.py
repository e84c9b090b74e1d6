"""Which architecture a single-file checkpoint has, and which of its keys belong to which component and block.

The layouts are those of Stable Diffusion 1.x ("sd15") and SDXL base ("sdxl"), in the ldm/sgm key names that
A1111, ComfyUI and diffusers' `from_single_file` read. Only the topology is fixed: widths and the number of
blocks are read from the keys, so a narrow model with SDXL's key names *is* the sdxl layout.

Tools differ on keys outside the U-Net's blocks (outside.py has their rules). By ours, "dodgeburn": `time_embed` and
`label_emb` are BASE, `diffusion_model.out.` belongs to the last OUT block, text encoders are BASE, and the VAE is a
block of its own, VAE, in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dodgeburn.checkpoint.outside import FIRST, LAST, NOT_MERGED, RULES, Outside
from dodgeburn.errors import UserError

BASE = "BASE"
VAE = "VAE"
_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_BLOCK = re.compile(r"model\.diffusion_model\.(input_blocks|output_blocks)\.(\d+)\.")
_TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Layout:
    """One checkpoint's architecture: `name` "sdxl" or "sd15", numbers of input and output blocks, key
    prefixes.

    `text_prefixes` are in the order text_encoder, text_encoder_2. `outside` names the rule for keys outside the blocks.
    """

    name: str
    n_in: int
    n_out: int
    text_prefixes: tuple[str, ...]
    unet_prefix: str = _UNET
    vae_prefix: str = _VAE
    outside: Outside = "dodgeburn"

    @property
    def title(self) -> str:
        """The name people use."""
        return _TITLES[self.name]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The U-Net's blocks in order: IN00.., M00, OUT00.. (19 for SDXL, 25 for SD1.5)."""
        ins = [f"IN{i:02d}" for i in range(self.n_in)]
        outs = [f"OUT{i:02d}" for i in range(self.n_out)]
        return (*ins, "M00", *outs)

    @property
    def all_blocks(self) -> tuple[str, ...]:
        """BASE, the U-Net's blocks, and what the rule has besides: VAE, or TIME_EMBED …, NOT_MERGED."""
        return (BASE, *self.blocks, *(block for block in self.held if block not in (BASE, *self.blocks)))

    @property
    def held(self) -> dict[str, list[str]]:
        """Block -> the kinds of keys outside the blocks that it holds: time_embed, label_emb, out, text, vae."""
        out: dict[str, list[str]] = {}
        for kind in RULES[self.outside].of(self.name):
            if kind != "label_emb" or self.name == "sdxl":
                out.setdefault(self._home(kind), []).append(kind)
        return out

    def _home(self, kind: str) -> str:
        block = RULES[self.outside].of(self.name)[kind]
        return self.blocks[0] if block == FIRST else self.blocks[-1] if block == LAST else block

    def is_unet(self, key: str) -> bool:
        return key.startswith(self.unet_prefix)

    def is_vae(self, key: str) -> bool:
        return key.startswith(self.vae_prefix)

    def is_text(self, key: str) -> bool:
        return key.startswith(self.text_prefixes)

    def component(self, key: str) -> str:
        """ "unet", "vae", "text_encoder", "text_encoder_2", or "other" (schedule buffers, EMA copies)."""
        if self.is_unet(key):
            return "unet"
        if self.is_vae(key):
            return "vae"
        for i, prefix in enumerate(self.text_prefixes):
            if key.startswith(prefix):
                return "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
        return "other"

    def block(self, key: str) -> str | None:
        """The block a key belongs to, by the rule of `outside`; None for keys outside all components."""
        vae, text = self.is_vae(key), self.is_text(key)
        if not (vae or text or self.is_unet(key)):
            return None
        if RULES[self.outside].weights_only and self.name == "sdxl" and not ("weight" in key or "bias" in key):
            return NOT_MERGED
        if vae or text:
            return self._home("vae" if vae else "text")
        rest = key[len(self.unet_prefix) :]
        kind, _, tail = rest.partition(".")
        if kind in ("input_blocks", "output_blocks"):
            number = tail.partition(".")[0]
            if not number.isdigit():
                return None
            return f"{'IN' if kind == 'input_blocks' else 'OUT'}{int(number):02d}"
        if kind == "middle_block":
            return "M00"
        return self._home(kind if kind in ("out", "label_emb") else "time_embed")


_TRANSFORMER = tuple(f"{_UNET}{part}" for part in ("joint_blocks.", "double_blocks.", "layers."))


def detect_layout(keys: Iterable[str], shapes: Mapping[str, Sequence[int]] | None = None) -> Layout:
    """The layout of a checkpoint with these tensor names (and shapes, where known).

    Raises UserError that says what the file seems to be if it is none of the layouts.
    """
    names = set(keys)
    unet = [k for k in names if k.startswith(_UNET)]
    if not unet:
        raise UserError(f"not a Stable Diffusion single-file checkpoint: {_what_else(names)}")
    if any(k.startswith(_TRANSFORMER) for k in unet):
        raise UserError("the checkpoint is a transformer model (SD3, Flux or later): only SD1.5 and SDXL are known")
    n_in, n_out = _count(unet, "input_blocks"), _count(unet, "output_blocks")
    if not n_in or not n_out:
        raise UserError("the checkpoint's U-Net has no input_blocks and output_blocks: only SD1.5 and SDXL are known")
    if any(k.startswith(("cond_stage_model.model.", "conditioner.embedders.0.model.")) for k in names):
        what = "SD2" if any(k.startswith("cond_stage_model.model.") for k in names) else "the SDXL refiner"
        raise UserError(f"the checkpoint is {what}: only SD1.5 and SDXL base are known")
    has_labels = any(k.startswith(f"{_UNET}label_emb.") for k in unet)
    sdxl = has_labels or any(k.startswith("conditioner.embedders.") for k in names)
    if not sdxl and _context_width(shapes) == 1024:
        raise UserError("the checkpoint is SD2 (text width 1024): only SD1.5 and SDXL base are known")
    name = "sdxl" if sdxl else "sd15"
    return Layout(name=name, n_in=n_in, n_out=n_out, text_prefixes=_TEXT[name])


def _count(keys: Iterable[str], kind: str) -> int:
    numbers = {int(m.group(2)) for m in map(_BLOCK.match, keys) if m and m.group(1) == kind}
    if numbers and numbers != set(range(max(numbers) + 1)):
        missing = min(set(range(max(numbers) + 1)) - numbers)
        raise UserError(f"the checkpoint's U-Net is incomplete: {kind}.{missing} is missing")
    return len(numbers)


def _context_width(shapes: Mapping[str, Sequence[int]] | None) -> int | None:
    for key, shape in (shapes or {}).items():
        if key.startswith(_UNET) and key.endswith(".transformer_blocks.0.attn2.to_k.weight"):
            return shape[-1]
    return None


def _what_else(names: set[str]) -> str:
    def any_has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if any(name.startswith("delta.") for name in names):
        return "it is a delta, which `dodgeburn delta apply` adds to a model"
    if any_has("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up", "hada_w1", "lokr_w1"):
        return "it is a LoRA, which `dodgeburn bake` works into a model"
    if any_has("down_blocks.", "mid_block."):
        return "its keys are diffusers' (one component of a folder); a single file is expected"
    if any_has("joint_blocks.", "double_blocks."):
        return "it is a transformer model (SD3, Flux or later)"
    if any(name.startswith(("first_stage_model.", "encoder.", "decoder.")) for name in names):
        return "it is a VAE alone"
    return "no key begins with model.diffusion_model."
