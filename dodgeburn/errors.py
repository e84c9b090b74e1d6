"""The two ways the package speaks of trouble: an error that stops the job, a warning that is counted."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input, said in one line: what is wrong, what was expected, what to do. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DodgeburnWarning(UserWarning):
    """Something the user should know although the job goes on (a cut prompt, a tensor copied from A)."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with control characters written out: names from files may hold line ends and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near_names(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> list[str]:
    """Up to n of the known names that `name` may be a misspelling of, the nearest first; whatever their case.

    cutoff: from 0 (anything is near) to 1 (equal), as difflib's.
    """
    from difflib import get_close_matches  # only where something is wrong: help has to come fast

    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(one.lower(), one)
    return [folded[one] for one in get_close_matches(name.lower(), list(folded), n=n, cutoff=cutoff)]


def did_you_mean(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> str:
    """ "did you mean a or b? ", to stand before what is known; empty where no known name is near."""
    near = near_names(name, known, n, cutoff)
    return f"did you mean {' or '.join(near)}? " if near else ""
