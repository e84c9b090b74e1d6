"""dodgeburn diff: how two models differ, by block, component and tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.cli.options import parse

if TYPE_CHECKING:
    from dodgeburn.merge.diff import Change, Diff

HELP = "how two models differ, by block, component and tensor"
EXAMPLE = "dodgeburn diff pocket pocket-bold"
_NAMED = 3  # names shown of each kind; --json has all
_HEAD = f"{'':<12}{'tensors':>8}{'changed':>9}{'change':>12}{'largest':>12}{'cosine':>11}"


@dataclass
class DiffCommand:
    """Compare model B with model A, tensor by tensor, in bounded memory.

    change: |B - A| / |A| (L2 norms); largest: the largest change of a single value; cosine: of the angle between both,
    as vectors; changed: share of the tensors in which any value differs. What cannot be compared is named and counted.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """The reference: a packaged model, a file (.safetensors, shards, .ckpt) or a diffusers folder."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The model to compare with it, of the same architecture; any form."""
    top: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """How many of the most changed tensors to list."""
    json: bool = False
    """Print one JSON object as the last line, with every tensor's numbers and every name."""


def main(args: list[str]) -> int:
    """Run `dodgeburn diff`; raises UserError for bad input."""
    settings = parse(DiffCommand, args, "diff", EXAMPLE)
    from dodgeburn.merge.diff import diff

    found = diff(settings.a, settings.b)
    print(text(found, settings.top))
    if settings.json:
        print(json.dumps(found.as_dict()))
    return 0


def text(found: Diff, top: int = 5) -> str:
    """The comparison as a table and counted lines."""
    from dodgeburn.merge.diff import in_order

    title = found.layout.title if found.layout else "no SD1.5 or SDXL checkpoints"
    lines = [f"A = {found.a}, B = {found.b} ({title})"]
    if found.equal:
        types = " of values; types differ" if found.types else ""
        lines.append(f"equal: all {found.total.tensors + len(found.unread)} tensors hold the same values{types}")
    else:
        lines += _table(found, in_order(found.blocks, found.layout), top)
    lines += _notes(found)
    lines.append(f"{found.total.tensors} tensors compared in {found.seconds:.1f} s")
    return "\n".join(lines)


def _table(found: Diff, blocks: list[str], top: int) -> list[str]:
    lines = [_HEAD.replace(" " * 12, f"{'block':<12}", 1)] if blocks else []
    lines += [_row(name, found.blocks[name]) for name in blocks]
    lines.append(_HEAD.replace(" " * 12, f"{'component':<12}", 1))
    lines += [_row(name, change) for name, change in found.components.items()]
    lines.append(_row("all", found.total))
    most = found.most_changed(top)
    if most:
        lines.append(f"most changed of {found.total.changed} changed tensors:")
        lines += [f"  {_percent(change):>9}  {name}" for name, change in most]
    return lines


def _row(name: str, change: Change) -> str:
    cosine = "-" if change.cosine is None else f"{change.cosine:.6f}"
    return (
        f"{name:<12}{change.tensors:>8}{change.share_changed:>9.1%}{_percent(change):>12}{change.largest:>12.3g}"
        f"{cosine:>11}"
    )


def _percent(change: Change) -> str:
    relative = change.relative
    if relative == float("inf"):
        return "from zero"
    return f"{relative:.3%}" if relative >= 1e-4 or not relative else f"{100 * relative:.1e}%"


def _notes(found: Diff) -> list[str]:
    shapes = [f"{n} {list(one)} -> {list(two)}" for n, (one, two) in found.shapes.items()]
    broken = [f"{name} of {whose}" for name, whose in found.not_finite.items()]
    unread = [f"{name} ({'equal' if same else 'different'} bytes)" for name, same in found.unread.items()]
    lines = [
        _named(found.only_a, f"only in A ({found.a})"),
        _named(found.only_b, f"only in B ({found.b})"),
        _named(shapes, "of another shape in B, not compared"),
        _named(broken, "with NaN or infinite values, not compared"),
        _named(unread, "of types that cannot be computed with"),
    ]
    lines += [_count(count, f"of type {one} in A and {two} in B") for (one, two), count in sorted(found.types.items())]
    return [line for line in lines if line]


def _named(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _NAMED} more (--json names all)" if len(names) > _NAMED else ""
    return f"{_count(len(names), what)}: {', '.join(names[:_NAMED])}{more}"


def _count(count: int, what: str) -> str:
    return f"{count} tensor{'' if count == 1 else 's'} {what}"
