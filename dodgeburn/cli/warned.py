"""Warnings on the command line: a line each on stderr, at once, and beside a progress bar without tearing it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dodgeburn.errors import DodgeburnWarning


@contextmanager
def said_at_once() -> Iterator[None]:
    """Within the context every warning of ours is said when it first comes: what has no effect is worth knowing before
    an hour's work. How often one came again is said at the end. Those of libraries are left out.
    """
    from tqdm import tqdm

    counted: Counter[str] = Counter()

    def say(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, DodgeburnWarning):
            counted[str(message)] += 1
            if counted[str(message)] == 1:
                tqdm.write(f"warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DodgeburnWarning)
            warnings.showwarning = say
            yield
    finally:
        for line, times in counted.items():
            if times > 1:
                print(f"warning: {line} ({times} times in all)", file=sys.stderr)


def print_warnings(caught: list[warnings.WarningMessage]) -> None:
    """Our own warnings, a line each, on stderr."""
    lines = [str(warning.message) for warning in caught if issubclass(warning.category, DodgeburnWarning)]
    for line in dict.fromkeys(lines):
        print(f"warning: {line}", file=sys.stderr)
