"""dodgeburn verify: whether a file is what its recipe makes of its parents."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.merge.verify import Verification

HELP = "derive a merged file's tensors again from its parents, and say whether they are equal"
EXAMPLE = "dodgeburn verify merged.safetensors --models ~/models --all"
_SHOWN = 20  # tensors that differ


@dataclass
class Verify:
    """Derive tensors of a merged or baked file again, by the recipe in its metadata, and compare them bit for bit.

    Parents are found by name among the packaged models, beside FILE, and in --models, and identified by their sha256.
    Exits with 0 if everything is equal, 1 if something differs, 2 if a parent is missing or another file.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .safetensors file that dodgeburn made."""
    models: Annotated[list[str], tyro.conf.arg(metavar="DIR_OR_FILE")] = field(default_factory=list)
    """Folders to look for parents in (and below them), and parents that have other names now."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many tensors to check, drawn over all blocks (50 if not given)."""
    all: bool = False
    """Check every tensor."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of the draw; random, and printed, if not given."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn verify`; raises UserError for bad input."""
    options = parse(Verify, args, "verify", EXAMPLE)
    if options.all and (options.samples is not None or options.seed is not None):
        raise UserError("--samples and --seed have no effect beside --all: leave out one or the other")
    from dodgeburn.merge.verify import SAMPLES, verify

    samples = None if options.all else SAMPLES if options.samples is None else options.samples
    result = verify(options.file, options.models, samples, options.seed)
    print(report(result))
    if options.json:
        print(json.dumps(result.as_dict()))
    return 0 if result.equal else 1


def report(result: Verification) -> str:
    """What was found, in words: by block, every tensor that differs, and the sum."""
    lines = [f"{result.file.name}: {result.kind} of {', '.join(path.name for path in result.parents.values())}"]
    lines.append(f"{'block':<7}{'checked':>8}{'equal':>7}")
    lines += [f"{block:<7}{row['checked']:>8}{row['equal']:>7}" for block, row in result.blocks().items()]
    for check in result.different[:_SHOWN]:
        what = check.note or f"{check.different} values differ, by at most {check.largest:g}"
        lines.append(f"different: {check.name} ({check.block}): {what}")
    if len(result.different) > _SHOWN:
        lines.append(f"and {len(result.different) - _SHOWN} more")
    drawn = "" if result.seed is None else f" (drawn by seed {result.seed})"
    equal = f"{len(result.different)} differ" if result.different else "all equal"
    lines.append(f"{len(result.checks)} of {result.tensors} tensors derived again{drawn}: {equal}")
    if result.hash_equal is not None:
        hint = "" if result.seed is None else "; --all names the tensors"
        same = "as the file says" if result.hash_equal else f"not what the file says: bytes were changed{hint}"
        lines.append(f"hash of all tensors: {same}")
    return "\n".join(lines)
