"""dodgeburn convert: single file to diffusers folder and back, LoRAs between spellings."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.errors import DodgeburnWarning, UserError

HELP = "convert between a single .safetensors file and a diffusers folder, and LoRAs between spellings"
EXAMPLE = "dodgeburn convert pocket -o pocket-folder"


@dataclass
class Convert:
    """Convert a model: to a single file if OUT ends in .safetensors, else to a diffusers folder; or a LoRA's spelling.

    Single files have the key names of SD1.5 or SDXL; folders load in diffusers' pipelines as they are. Tensors stay bit
    for bit unless --dtype says otherwise. Pickles (.ckpt, .pt, .bin) are read safely, and refused if they hold code.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A packaged model (pocket), a .safetensors file, an index of shards, a .ckpt, .pt or .bin, a diffusers folder, a
    hub id, or a LoRA (file or PEFT folder).
    """
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file or the new folder to write."""
    dtype: Literal["stored", "fp32", "fp16", "bf16", "fp8_e4m3fn"] = "stored"
    """Type of the weights; stored: each tensor's own. fp8: matrices of U-Net and text encoders, the rest fp16."""
    prune_ema: bool = False
    """Leave out EMA copies (model_ema.…), as half of a training checkpoint is."""
    vae: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file (VAE alone or checkpoint, in ldm or diffusers names) or vae folder whose VAE replaces the model's."""
    repair_position_ids: bool = False
    """Put a text encoder's position ids right where a merge averaged them."""
    lora: Literal["kohya", "sgm", "peft"] | None = None
    """For a LoRA: how its keys are spelled in OUT (kohya if not given)."""
    tokenizer: Path | None = None
    """Folder with a CLIP tokenizer, for a single file of real Stable Diffusion that becomes a folder."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn convert`; raises UserError for bad input."""
    options = parse(Convert, args, "convert", EXAMPLE)
    if options.out is None:
        raise UserError("no output: say where to write with -o OUT.safetensors or -o FOLDER")
    from dodgeburn.checkpoint.lora_file import names_adapter
    from dodgeburn.cli.warned import print_warnings

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        found = _adapter(options) if names_adapter(options.src) else _model(options)
    print_warnings(caught)
    seconds = round(time.perf_counter() - began, 3)
    what = ", ".join(f"{count} {_COUNTS[name]}" for name, count in found["counts"].items())
    print(f"wrote {options.out} ({found['title']}, {found['kind']}: {what}) in {seconds} s")
    if options.json:
        print(json.dumps({"out": str(options.out), **found, "seconds": seconds}))
    return 0


_COUNTS = {
    "tensors": "tensors",
    "pruned": "EMA copies left out",
    "vae": "of the VAE replaced",
    "position_ids": "position ids repaired",
    "modules": "modules",
}


def _model(options: Convert) -> dict[str, Any]:
    from dodgeburn.models.convert import ConvertSettings, convert

    if options.lora is not None:
        raise UserError(f"--lora {options.lora} has no effect: {options.src} is no LoRA")
    settings = ConvertSettings(
        options.dtype, options.prune_ema, options.vae, options.repair_position_ids, options.tokenizer
    )
    assert options.out is not None
    done = convert(options.src, options.out, settings)
    title = done.layout.title if done.layout else "unknown layout"
    return {
        "kind": done.kind,
        "layout": done.layout.name if done.layout else None,
        "title": title,
        "counts": done.counts,
    }


def _adapter(options: Convert) -> dict[str, Any]:
    from dodgeburn.checkpoint.lora_file import architecture_title, open_adapter
    from dodgeburn.checkpoint.lora_write import rewrite_adapter

    ignored = [name for name in ("prune_ema", "vae", "repair_position_ids", "tokenizer") if getattr(options, name)]
    if options.dtype != "stored" or ignored:
        name = ignored[0].replace("_", "-") if ignored else "dtype"
        raise UserError(f"--{name} has no effect on a LoRA: {options.src} only changes its spelling")
    if options.out is None or options.out.suffix != ".safetensors":
        raise UserError(f"{options.out}: a LoRA is written to a .safetensors file")
    with open_adapter(options.src) as adapter:
        rewrite_adapter(adapter, options.out, options.lora or "kohya")
        return {
            "kind": f"{adapter.title}, {options.lora or 'kohya'} keys",
            "layout": adapter.architecture,
            "title": architecture_title(adapter.architecture),
            "counts": {"modules": len(adapter.modules)},
        }
