"""dodgeburn slider compose: several sliders as one file."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dodgeburn.cli.bake import parse_strength
from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError

HELP = "put sliders or LoRAs together as one file, each at its scale"
EXAMPLE = "dodgeburn slider compose smile.safetensors:1.5 age.safetensors:-1 -o both.safetensors"


@dataclass
class Compose:
    """Write the sum of sliders or LoRAs, each at its scale, as one LoRA: scale 1 of it is all of them at theirs.

    Ranks are concatenated, which is exact. With --rank the result is compressed to that rank, and the share of the
    change that is kept is printed.
    """

    sliders: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="FILE[:SCALE]")] = field(
        default_factory=list
    )
    """Adapter files or PEFT folders, each with its scale after a colon (1 if there is none)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; never one of the inputs."""
    rank: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Compress every layer to this rank at most; none: all ranks side by side."""
    lora: Literal["kohya", "sgm", "peft"] = "kohya"
    """Spelling of the keys."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the numbers written; fp16 is half the size and rounds the factors once."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider compose`; raises UserError for bad input."""
    settings = parse(Compose, args, "slider compose", EXAMPLE)
    if not settings.sliders:
        raise UserError(f"nothing to compose: name slider or LoRA files, as in {EXAMPLE}")
    if settings.out is None:
        raise UserError("no output file: say where to write with -o OUT.safetensors")
    from dodgeburn.slide.compose import compose

    parents = [parse_strength(text) for text in settings.sliders]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        made = compose(parents, settings.out, settings.rank, settings.dtype, settings.lora)
    print_warnings(caught)
    for parent in made.card.parents:
        print(f"{parent.scale:g} x {parent.file} (sha256 {parent.sha256[:10]})")
    ranks = sorted({factors.rank for factors in made.adapter.factors().values()})
    modules = len(made.adapter.modules_changed)
    if made.kept is not None:
        print(f"compressed to rank {ranks[-1]}: {made.kept:.4%} of the change's energy kept")
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    size = made.path.stat().st_size
    print(f"wrote {made.path}: LoRA of {modules} modules, {rank}, {size / 1e6:,.2f} MB")
    if settings.json:
        found = {
            "out": str(made.path),
            "bytes": size,
            "modules": modules,
            "ranks": ranks,
            "kept_energy": made.kept,
            "parents": [parent.model_dump() for parent in made.card.parents],
        }
        print(json.dumps(found))
    return 0
