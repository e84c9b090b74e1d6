"""dodgeburn artifacts label: pictures of collected trajectories out to be rated, and the ratings back in."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import UserError

HELP = "let people rate the pictures of collected trajectories"
EXAMPLE = "dodgeburn artifacts label trajectories --pictures to_rate"
EXAMPLE_BACK = "dodgeburn artifacts label trajectories --ratings to_rate/ratings.jsonl -o labelled"


@dataclass
class LabelOptions:
    """Write the finished pictures of a collection as files with a list to fill in, or take the filled list as labels.

    The list, ratings.jsonl, has a line for each picture: put a severity from 0 (flawless) to 5 (ruined) in the place of
    null, or a histogram of raters. Lines left at null stay without a label.
    """

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """A folder of `artifacts collect`."""
    pictures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the pictures and ratings.jsonl there."""
    ratings: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of ratings, in any form that `artifacts collect --ratings` reads, by the trajectories' ids."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """With --ratings: the folder for the labelled trajectories; new or empty."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts label`; raises UserError for bad input."""
    options = parse(LabelOptions, args, "artifacts label", EXAMPLE, EXAMPLE_BACK)
    if options.folder is None:
        raise UserError(f"which folder? For example: {EXAMPLE}")
    if (options.pictures is None) == (not options.ratings):
        raise UserError(f"give --pictures DIR or --ratings FILE, one of the two: {EXAMPLE}; {EXAMPLE_BACK}")
    if bool(options.ratings) != (options.out is not None):
        raise UserError("--ratings and -o FOLDER belong together: labelled trajectories are a folder of their own")
    with said_at_once():
        found = _run(options, options.folder)
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: LabelOptions, folder: Path) -> dict[str, Any]:
    from dodgeburn.foresee.rating import LIST, relabelled, write_pictures
    from dodgeburn.foresee.ratings import read_ratings
    from dodgeburn.foresee.shards import Store

    store = Store(folder)
    if options.pictures is not None:
        count = write_pictures(store, options.pictures)
        print(f"wrote {count} pictures; fill in the severities in {options.pictures / LIST}")
        return {"pictures": count, "list": str(options.pictures / LIST)}
    assert options.out is not None
    read = read_ratings(options.ratings, options.ratings[0].parent)
    for line in read.said:
        print(line, file=sys.stderr)
    labelled, unknown = relabelled(store, {row.id: row.label for row in read.rows}, options.out)
    if unknown:
        print(f"{len(unknown)} ratings are of no trajectory there (first {unknown[0]})", file=sys.stderr)
    print(f"{options.out}: {len(store)} trajectories, {labelled} labelled by these ratings")
    return {"trajectories": len(store), "labelled": labelled, "unknown": unknown, "out": str(options.out)}
