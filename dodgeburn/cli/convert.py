"""dodgeburn convert: single file to diffusers folder and back."""

from __future__ import annotations

import inspect
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dodgeburn.errors import DodgeburnWarning, UserError

HELP = "convert between a single .safetensors file and a diffusers folder"
EXAMPLE = "dodgeburn convert pocket -o pocket-folder"


@dataclass
class Convert:
    """Convert a model: to a single file if OUT ends in .safetensors, else to a diffusers folder.

    Single files have the key names of SD1.5 or SDXL; folders load in diffusers' pipelines as they are.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A packaged model (pocket), a .safetensors file, a diffusers folder, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file or the new folder to write."""
    dtype: Literal["stored", "fp32", "fp16", "bf16"] = "stored"
    """Type of the weights; stored: each component as it is in SRC."""
    tokenizer: Path | None = None
    """Folder with a CLIP tokenizer, for a single file of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn convert`; raises UserError for bad input."""
    options = tyro.cli(
        Convert,
        args=args,
        prog="dodgeburn convert",
        description=f"{inspect.cleandoc(Convert.__doc__ or '')}\n\nexample: {EXAMPLE}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if options.out is None:
        raise UserError("no output: say where to write with -o OUT.safetensors or -o FOLDER")
    from dodgeburn.models.loading import load_model
    from dodgeburn.models.saving import save_diffusers_folder, save_single_file

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        model = load_model(options.src, "cpu", options.dtype, options.tokenizer)
        single = options.out.suffix == ".safetensors"
        if single:
            save_single_file(model, options.out)
        else:
            save_diffusers_folder(model, options.out)
    for warning in caught:
        if issubclass(warning.category, DodgeburnWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    seconds = round(time.perf_counter() - began, 3)
    kind = "single file" if single else "diffusers folder"
    print(f"wrote {options.out} ({model.layout.title}, {kind}) in {seconds} s")
    if options.json:
        print(json.dumps({"out": str(options.out), "kind": kind, "layout": model.layout.name, "seconds": seconds}))
    return 0
