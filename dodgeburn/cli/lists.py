"""Lists as options write them, the same for every verb: 0.4,0.5 or -2..2/9, and seeds 0,1,2 or 0-7."""

from __future__ import annotations

from collections.abc import Sequence

from dodgeburn.errors import UserError

_MOST_SEEDS = 10_000


def numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas, or "LOW..HIGH/COUNT" as in -2..2/9. UserError that names the option."""
    low, dots, rest = text.partition("..")
    if dots:
        high, _, count = rest.partition("/")
        first, last = _number(low, text, option), _number(high, text, option)
        n = int(count or 9) if (count or "9").isdecimal() and len(count) <= 4 else 0
        if not 2 <= n <= 1000:
            raise UserError(f"--{option} {text}: {count} numbers, expected 2 to 1000 of them")
        found = [round(first + (last - first) * i / (n - 1), 6) for i in range(n)]
    else:
        found = [_number(part, text, option) for part in text.split(",") if part.strip()]
    if not found or not all(abs(x) <= 1e4 for x in found):
        raise UserError(f"--{option} {text}: expected at least one number, none beyond 10000")
    return found


def seeds_of(text: str, option: str = "seeds") -> list[int]:
    """Seeds separated by commas, or FIRST-LAST. UserError that names the option, for anything else."""
    first, dash, last = text.partition("-")
    try:
        found: Sequence[int]
        if dash and first:
            found = range(int(first), int(last) + 1)
        else:
            found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{option} {text}: expected whole numbers such as 0,1,2 or 0-7") from None
    if not 0 < len(found[: _MOST_SEEDS + 1]) <= _MOST_SEEDS:  # a range may be longer than memory, or than len can say
        raise UserError(f"--{option} {text}: expected 1 to {_MOST_SEEDS} seeds")
    return list(found)


def _number(part: str, text: str, option: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise UserError(
            f"--{option} {text}: {part.strip()!r} is no number, expected numbers such as 0.4,0.5,0.6 or -2..2/9"
        ) from None
