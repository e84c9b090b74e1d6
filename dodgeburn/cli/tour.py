"""dodgeburn tour: a short run through the main jobs, as one HTML page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dodgeburn.cli.options import parse

HELP = "see it all: pictures, sliders, every merge of two models, one HTML page (1 to 2 minutes on two cores)"
EXAMPLE = "dodgeburn tour -o tour"


@dataclass
class Tour:
    """Draw with the shipped model, train two sliders on it, compare all merges of its two fine-tunes, write the best
    one, and show it all in one HTML page. Needs no network; takes one to two minutes on two cores.
    """

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """The folder to write to; none: tour, or tour-2 and so on where that holds another run."""
    quick: bool = False
    """A few seconds' worth: fewer presets, prompts and steps."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn tour`; raises UserError for bad input."""
    chosen = parse(Tour, args, "tour", EXAMPLE)
    from dodgeburn.cli.compare import table
    from dodgeburn.tour import tour

    found = tour(chosen.out, chosen.quick, device=chosen.device)
    print(table(found.comparison, 5))
    print(f"merged: {found.merged}")
    print(f"the tour took {found.seconds:.0f} s; its page: {found.report.resolve()}")
    if chosen.json:
        best = found.comparison.rows[0].as_dict()
        print(
            json.dumps(
                {
                    "seconds": round(found.seconds, 2), "report": str(found.report), "merged": str(found.merged),
                    "best": best, "largest_difference": found.largest_difference,
                }
            )
        )  # fmt: skip
    return 0
