"""Benchmarks that have a size, a dataclass of whole numbers: whole or --quick, and each number an option of its own."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

Size = TypeVar("Size")


def run_sized(doc: str | None, run: Callable[[Size, Path], dict[str, Any]], whole: Size, quick: Size) -> None:
    """Read the command line, run at the size that it asks for, in a folder that keeps finished parts, print JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="finished parts are kept here; a temporary one by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    names = list(type(whole).__annotations__)
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the size's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    size = replace(quick if args.quick else whole, **said)  # type: ignore[type-var]
    with tempfile.TemporaryDirectory() as temporary:
        found = run(size, args.folder or Path(temporary) / "run")
    print(json.dumps(found, indent=None if args.json else 1))
