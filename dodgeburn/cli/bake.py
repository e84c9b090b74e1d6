"""dodgeburn bake: LoRAs into a checkpoint, for good."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.cli.written import said_of
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.merge.bake import BakeResult

HELP = "bake LoRAs into a checkpoint, streamed, with a strength for each and weights by block"
EXAMPLE = "dodgeburn bake model.safetensors style.safetensors:0.8 smile.safetensors:-0.5 -o out.safetensors"


@dataclass
class Bake:
    """Bake LoRA, LoCon, LoHa and LoKr files into a checkpoint: weight + strength x block weight x change.

    Adapters are read in kohya's, sgm's, PEFT's and diffusers' spelling. A strength may be negative. Computed in float32
    and rounded once to the checkpoint's own types; what nothing changes is copied as it is.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A single-file checkpoint (SD1.5 or SDXL), an index of shards, a diffusers folder, or a packaged model such as
    pocket."""
    loras: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="LORA[:STRENGTH]")] = field(
        default_factory=list
    )
    """Adapter files or PEFT folders, each with its strength after a colon (1 if there is none)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; never one of the inputs."""
    block_weights: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=NUMBER")] = field(
        default_factory=list
    )
    """Weights by block that multiply the strengths, such as IN04=0.5 or "*=0,OUT*=1", or a preset; 1 where nothing is
    said. BASE is time embedding and text encoders. Repeatable.
    """
    json: bool = False
    """Print one JSON object as the last line."""


def parse_strength(text: str) -> tuple[str, float]:
    """`FILE:0.8` as ("FILE", 0.8); without a number at its end the text is the file, at strength 1."""
    path, colon, tail = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            return path, float(tail)
        except ValueError:
            pass
    return text, 1.0


def _adapter(text: str) -> tuple[str, float]:
    """A LoRA's file and strength; UserError for a strength that stands by itself, which no file is named like."""
    path, strength = parse_strength(text)
    if not Path(text).exists():
        with contextlib.suppress(ValueError):
            raise UserError(f"{text} is a strength without a file: write it behind its LoRA, FILE:{float(text):g}")
    return path, strength


def main(args: list[str]) -> int:
    """Run `dodgeburn bake`; raises UserError for bad input."""
    settings = parse(Bake, args, "bake", EXAMPLE)
    if not settings.loras:
        raise UserError(f"nothing to bake: name LoRA files after the checkpoint, as in {EXAMPLE}")
    if settings.out is None:
        raise UserError("no output file: say where to write with -o OUT.safetensors")
    from dodgeburn.merge.bake import bake

    adapters = [_adapter(text) for text in settings.loras]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        result = bake(settings.checkpoint, adapters, settings.out, settings.block_weights)
    print_warnings(caught)
    report(result, settings.json)
    return 0


def report(result: BakeResult, as_json: bool) -> None:
    """What was added and written, in words, and as a JSON line if asked for."""
    for one in result.recipe.added:
        print(f"{one.file}: {one.title}, strength {one.strength:g}: {one.matched} matched, {one.unmatched} unmatched")
    parts = [f"{block} x {weight:g}" for block, weight in result.recipe.blocks.items() if weight != 1.0]
    if parts:
        print(f"block weights: {', '.join(parts)}")
    size = result.path.stat().st_size
    print(
        f"wrote {result.path}: {size / 1e6:,.1f} MB, {result.changed} of {result.tensors} tensors changed, "
        f"in {result.seconds:.1f} s"
    )
    if as_json:
        print(json.dumps(said_of(result, result.tensors, changed=result.changed, recipe=result.recipe.as_dict())))
