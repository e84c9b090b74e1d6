"""What `dodgeburn merge --estimate C A B` prints."""

from __future__ import annotations

from dodgeburn.merge.estimate import Estimate, Part
from dodgeburn.merge.nearest import CLOSE, ERRORS, NOTHING, Nearest, nearest_preset, rest_of

MUCH = 0.05  # residuals above it are worth a line
_LETTERS = "BDEFGHI"  # parents after A; C is the merged model


def text(found: Estimate) -> str:
    """The estimate as a table, with the nearest preset and the command that would make such a merge."""
    merged, a, *parents = found.names
    letters = _LETTERS[: len(parents)]
    named = ", ".join(f"{letter} = {name}" for letter, name in zip(letters, parents, strict=True))
    how = "least squares, shares at least 0 and of sum 1" if found.simplex else "least squares, unconstrained"
    lines = [
        f"C = {merged}, A = {a}, {named} ({found.layout.title})",
        f"C - A = sum of shares x (parent - A); A's share is the rest to 1; {how}",
        f"{'part':<12}{'tensors':>8}{''.join(f'  share of {letter} +/- error' for letter in letters)}{'residual':>11}",
    ]
    lines += [_row(part) for part in found.parts.values()]
    lines.append(f"{'component':<12}(one share for all of it: the residual says whether there is one)")
    lines += [_row(part) for part in found.components.values()]
    lines.append("residual: |C - fit| / |parent - A| of the largest; error: one standard error, rounding included")
    worst = max(found.parts.values(), key=lambda part: part.residual or 0.0)
    if (worst.residual or 0.0) > MUCH:
        left = f"in {worst.name} {worst.residual:.0%} of the difference is left over"
        lines.append(f"C is no weighted sum of these: {left}")
    for reason, names in found.left.items():
        lines.append(f"{len(names)} tensors {reason}, left out (first {names[0]})")
    if len(parents) == 1:
        lines += summary(found)
    lines.append(f"estimated in {found.seconds:.1f} s")
    return "\n".join(lines)


def _row(part: Part) -> str:
    start = f"{part.name:<12}{part.tensors:>8}"
    if all(share is None for share in part.shares):
        return f"{start}  {part.why}"
    pairs = zip(part.shares, part.errors, strict=True)
    shares = "".join(f"{'-':>23}" if s is None or e is None else f"{_share(s):>12} +/- {e:>6.1g}" for s, e in pairs)
    return f"{start}{shares}{part.residual or 0.0:>11.2%}{'  ' + part.why if part.why else ''}"


def _share(share: float) -> str:
    return f"{round(share, 4) + 0.0:.4f}"  # no -0.0000


def summary(found: Estimate) -> list[str]:
    """The nearest preset and base in words."""
    near = nearest_preset(found)
    if near is None:
        return ["no block of the U-Net is determined: no preset can be named"]
    title = _title(near)
    if not near.fits:
        return [
            f"no published preset fits: the nearest is {title}, {near.worst:.3f} off in {near.block} and "
            f"{near.apart:.3f} on the whole"
        ]
    lines = [
        f"fits {title}: no block further than {max(CLOSE, near.worst):.2g} or {ERRORS:g} errors "
        f"(worst {near.block}, {near.worst:.2g})"
    ]
    made = command(found, near)
    if made:
        lines.append(f"such a merge: {made}")
    else:
        lines.append("BASE, text encoders and VAE have shares that no one --base and --outside give: see the table")
    return lines


def _title(near: Nearest) -> str:
    rules: dict[str, list[str]] = {}
    for name, rule in near.names:
        rules.setdefault(name, []).extend([rule] if rule else [])
    words = []
    for name, which in rules.items():
        if name == NOTHING:
            words.append("one share for every block (no preset)")
        else:
            words.append(name if len(which) != 1 else f"{name} ({which[0]})")
    return " and ".join(words)


def command(found: Estimate, near: Nearest) -> str | None:
    """The command that makes a merge of these shares; None if no base, rule and parts to keep give them."""
    rest = rest_of(found, near)
    if rest is None:
        return None
    words = ["dodgeburn merge", found.names[1], found.names[2], "-o OUT.safetensors"]
    name, rule = near.names[0]
    if name != NOTHING:
        words.append(f"--preset {name}")
        if rule == "cut" and (name, "curve") not in near.names:
            words.append("--xl-presets cut")
    if rest.base is not None:
        words.append(f"--base {round(rest.base, 3):g}")
    if rest.outside != "dodgeburn":
        words.append(f"--outside {rest.outside}")
    if rest.keep:
        words.append(f"--keep {','.join(rest.keep)}")
    return " ".join(words)
