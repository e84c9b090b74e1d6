"""Adapters written in the spellings that other programs read, tensors bit for bit, alphas always explicit.

- "kohya" (default): kohya's keys with diffusers' block names and a float32 `.alpha` for every module. A1111, ComfyUI,
  Forge, SD.Next, InvokeAI and diffusers read it.
- "sgm": the same with the block names of single files (`input_blocks_1_1_…`), as sd-scripts trains SDXL.
- "peft": PEFT's `lora_A`, `lora_B` under `unet.`, `text_encoder.`, `text_encoder_2.`, alphas and ranks in the metadata
  key `lora_adapter_metadata`, from which diffusers makes its LoraConfig.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.lora_file import DIFFUSERS_ALPHAS, Adapter, AdapterModule
from dodgeburn.checkpoint.lora_keys import SPELLINGS, write_key
from dodgeburn.checkpoint.metadata import SPEC_HASH, to_json
from dodgeburn.checkpoint.moves import Move
from dodgeburn.checkpoint.rewrite import Piece, piece_of, write_pieces
from dodgeburn.checkpoint.slider_card import SliderCard
from dodgeburn.checkpoint.sources import files_of
from dodgeburn.errors import UserError

# True of the old file's bytes or keys only.
_STALE = ("format", "sshs_model_hash", "sshs_legacy_hash", SPEC_HASH, DIFFUSERS_ALPHAS)
# ModelSpec's architecture of an adapter.
ADAPTER_SPEC = {"sdxl": "stable-diffusion-xl-v1-base/lora", "sd15": "stable-diffusion-v1/lora"}


def rewrite_adapter(adapter: Adapter, out: str | Path, spelling: str = "kohya") -> None:
    """Write an open adapter under the keys of a spelling; metadata are kept but for hashes of the old
    keys, which are worked out anew.

    Raises UserError if keys could not be understood (they would be lost), for a spelling that has no names for the
    adapter's algorithm (PEFT: LoRA only), and as `write_pieces`.
    """
    if adapter.unmatched:
        raise UserError(
            f"{adapter.name} has {len(adapter.unmatched)} keys that are no module's of SD1.5 or SDXL and would "
            f"be lost, first {adapter.unmatched[0]}"
        )
    layout = layout_of(adapter)
    pieces: dict[str, Piece] = {}
    for module in adapter.modules.values():
        for role, key in module.keys.items():
            pieces[_key(adapter.name, module, role, spelling, layout)] = piece_of(adapter.source, Move((key,)))
        alpha = module.rank if module.alpha is None else module.alpha
        if alpha is not None and spelling != "peft":
            pieces[write_key(module.name, "alpha", spelling, layout)] = alpha_piece(alpha)
    kept = {key: value for key, value in adapter.metadata.items() if key not in _STALE}
    if spelling == "peft":
        kept[DIFFUSERS_ALPHAS] = to_json(peft_config(adapter.modules.values()))
    if adapter.architecture in ADAPTER_SPEC:
        kept.setdefault("modelspec.architecture", ADAPTER_SPEC[adapter.architecture])
    write_pieces(out, pieces, kept, files_of(adapter.source), lora_hashes)


def check_spelling(spelling: str) -> str:
    """The spelling; UserError for one that is not known."""
    if spelling not in SPELLINGS:
        raise UserError(f"unknown LoRA spelling {spelling!r}: expected {', '.join(SPELLINGS)}")
    return spelling


def layout_of(adapter: Adapter) -> str:
    """The layout whose names to write: the adapter's architecture, or SD1.5 where its modules fit both."""
    return "sdxl" if adapter.architecture == "sdxl" else "sd15"


def alpha_piece(alpha: float) -> Piece:
    """An alpha as a float32 scalar, to be written."""
    return Piece(None, Move(("alpha",)), "F32", (), struct.pack("<f", alpha))


def _key(file: str, module: AdapterModule, role: str, spelling: str, layout: str) -> str:
    check_spelling(spelling)
    try:
        return write_key(module.name, role, spelling, layout)
    except KeyError:
        if spelling == "sgm":
            raise UserError(f"{file}: {module.name} has no sgm name in {layout}") from None
        raise UserError(
            f"{file}: {module.name} has {role} ({module.kind}), for which {spelling} has no key: "
            "write kohya or sgm keys"
        ) from None


def peft_config(modules: Iterable[AdapterModule]) -> dict[str, Any]:
    """diffusers' `lora_adapter_metadata`: r, lora_alpha and their exceptions, by component.

    Patterns leave out `text_model.`, which transformers dropped in 5.6 and PEFT matches without.
    """
    by_component: dict[str, dict[str, AdapterModule]] = {}
    for module in modules:
        component, _, name = module.name.partition(".")
        by_component.setdefault(component, {})[name.removeprefix("text_model.")] = module
    out: dict[str, Any] = {}
    for component, found in by_component.items():
        ranks = {name: int(module.rank or 0) for name, module in found.items()}
        alphas = {name: _number(_alpha_of(module)) for name, module in found.items()}
        rank, alpha = _most(ranks), _most(alphas)
        out |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": alpha,
            f"{component}.rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            f"{component}.alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
            f"{component}.target_modules": sorted(found),
        }
    return out


def adapter_metadata(
    modules: Sequence[AdapterModule],
    layout: str,
    spelling: str,
    title: str,
    digest: str,
    card: SliderCard | None = None,
) -> dict[str, str]:
    """What a new LoRA file says about itself: ModelSpec, the keys of kohya that programs show and choose by, PEFT's
    config where the spelling needs it, and a slider's card. `digest`: sha256 of all bytes after the header.
    """
    ranks = {int(module.rank or 0) for module in modules}
    alphas = {_alpha_of(module) for module in modules}
    out = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ADAPTER_SPEC[layout],
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "ss_base_model_version": "sdxl_base_v1-0" if layout == "sdxl" else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(alphas.pop())) if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
    }
    if card is not None:
        out |= {"modelspec.usage_hint": card.usage_hint()} | card.as_metadata()
    if spelling == "peft":
        out[DIFFUSERS_ALPHAS] = to_json(peft_config(modules))
    return out | lora_hashes(digest)


def lora_hashes(digest: str) -> dict[str, str]:
    """Metadata that hold the sha256 of all bytes after the header, as A1111 and ModelSpec name it."""
    return {"sshs_model_hash": digest, SPEC_HASH: "0x" + digest}


def _alpha_of(module: AdapterModule) -> float:
    return float(module.rank or 0) if module.alpha is None else module.alpha


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
