"""dodgeburn delta: what a fine-tune changed, taken out of one model and added to another."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.verbs import Part, run_verb
from dodgeburn.errors import DodgeburnWarning, UserError

HELP = "extract what a fine-tune changed (full, or as a LoRA), and apply it to another model"
EXAMPLE = "dodgeburn delta extract tuned.safetensors base.safetensors -o change.safetensors --as lora --energy 0.9"
EXAMPLE_APPLY = "dodgeburn delta apply model.safetensors change.safetensors -o out.safetensors --strength 0.7"


@dataclass
class Extract:
    """Write TUNED - BASE: every changed tensor whole, or a LoRA by singular values, with a report by block.

    The report says how large the change is, how much of its energy (squared norm) the file keeps, and how much of it
    rounding to the stored type may explain alone.
    """

    tuned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
    """The fine-tuned checkpoint: a single file, an index of shards, or a packaged model."""
    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """The checkpoint it was tuned from."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; never one of the inputs."""
    kind: Annotated[Literal["full", "lora"], tyro.conf.arg(name="as")] = "full"
    """full: all changed tensors, in a file only `delta apply` and `bake` read; lora: a LoRA with kohya's keys."""
    rank: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rank of the LoRA (32 if neither rank nor energy is given); smaller where a module has no more."""
    energy: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Instead of a rank: for every module as many components as keep this share of its energy, such as 0.9."""
    dtype: Literal["stored", "fp32", "fp16", "bf16"] = "stored"
    """Type of the numbers written; stored: TUNED's own for a full delta, fp16 for a LoRA."""
    json: bool = False
    """Print one JSON object as the last line."""


@dataclass
class Apply:
    """Add a delta (or a LoRA) to a model: weight + strength x block weight x change, in float32, rounded once."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A single-file checkpoint of the delta's architecture and size, or a packaged model."""
    delta: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DELTA")]
    """What `delta extract` wrote, or any adapter that `bake` reads; DELTA:0.5 is --strength 0.5."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; never one of the inputs."""
    strength: float = 1.0
    """How much of the change: 1 = all, -1 = take it away."""
    block_weights: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=NUMBER")] = field(
        default_factory=list
    )
    """Weights by block that multiply the strength, such as IN04=0.5 or "*=0,OUT*=1", or a preset; 1 where nothing is
    said. Repeatable.
    """
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn delta extract` or `dodgeburn delta apply`; raises UserError for bad input."""
    verbs = {
        "extract": Part("write what TUNED changed of BASE, whole or as a LoRA", EXAMPLE, _extract),
        "apply": Part("add a delta (or a LoRA) to a model", EXAMPLE_APPLY, _apply),
    }
    return run_verb("delta", verbs, args)


def _extract(args: list[str]) -> int:
    settings = parse(Extract, args, "delta extract", EXAMPLE)
    if settings.out is None:
        raise UserError("no output file: say where to write with -o OUT.safetensors")
    from dodgeburn.cli.warned import print_warnings
    from dodgeburn.merge.delta import extract, table

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        report = extract(
            settings.tuned, settings.base, settings.out, settings.kind, settings.rank, settings.energy, settings.dtype
        )
    print_warnings(caught)
    print(table(report))
    size = settings.out.stat().st_size
    ranks = sorted(report.ranks.values())
    rank = f"{ranks[0]} to {ranks[-1]}" if ranks and ranks[0] != ranks[-1] else f"{ranks[0]}" if ranks else ""
    what = f"LoRA of {len(ranks)} modules, rank {rank}" if ranks else "full delta"
    print(f"wrote {settings.out}: {what}, {size / 1e6:,.1f} MB, in {report.seconds:.1f} s")
    if settings.json:
        found = {
            "out": str(settings.out),
            "as": report.kind,
            "bytes": size,
            "seconds": round(report.seconds, 3),
            "tensors_compared": report.tensors,
            "blocks": {name: block.row() for name, block in report.blocks.items() if block.tensors},
            "total": report.total.row(),
            "modules": len(ranks),
            "ranks": report.ranks,
            "left_out": len(report.left),
        }
        print(json.dumps(found))
    return 0


def _apply(args: list[str]) -> int:
    settings = parse(Apply, args, "delta apply", EXAMPLE_APPLY)
    if settings.out is None:
        raise UserError("no output file: say where to write with -o OUT.safetensors")
    from dodgeburn.cli.bake import parse_strength, report
    from dodgeburn.cli.warned import print_warnings
    from dodgeburn.merge.bake import bake

    delta, inline = parse_strength(settings.delta)
    if inline != 1 and settings.strength != 1:
        raise UserError(f"{settings.delta} has a strength, and so has --strength {settings.strength:g}: give one")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        result = bake(
            settings.model, [(delta, inline * settings.strength)], settings.out, settings.block_weights, "delta_apply"
        )
    print_warnings(caught)
    report(result, settings.json)
    return 0
