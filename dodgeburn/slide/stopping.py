"""Early stopping: a slider's training ends when what it is trained for no longer gets better on held-out ground."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dodgeburn.checkpoint.tensorfile import atomic_path


class Watch:
    """A held-out figure, the higher the better, looked at every `every` steps.

    `done` once `patience` looks in a row have each bettered the best before them by less than `least` of its size. What
    was seen is kept in a file, so that a resumed training stops where an uninterrupted one does. spent: a running count
    of samples through the U-Net; `samples` are those that the looks took, before an interruption too.
    """

    def __init__(
        self, measure: Callable[[], float], path: Path, spent: Callable[[], int] = int, every: int = 10,
        least: float = 0.02, patience: int = 2,
    ) -> None:  # fmt: skip
        self.measure, self.path, self.spent = measure, path, spent
        self.every, self.least, self.patience = every, least, patience
        self.seen: dict[int, float] = {}
        self.samples = 0
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.seen, self.samples = {int(step): value for step, value in kept["seen"].items()}, kept["samples"]

    def look(self, step: int) -> bool:
        """Measure after this step if it is one to look at; whether training is to end."""
        if step % self.every:
            return False
        if step not in self.seen:
            before = self.spent()
            self.seen[step] = float(self.measure())
            self.samples += self.spent() - before
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"seen": self.seen, "samples": self.samples}), encoding="utf-8")
        return self.done(step)

    def done(self, step: int) -> bool:
        """Whether the looks up to this step say that it is enough."""
        values = [value for at, value in sorted(self.seen.items()) if at <= step]
        idle = 0
        for i in range(1, len(values)):
            best = max(values[:i])
            idle = 0 if values[i] - best > self.least * abs(best) else idle + 1
        return idle >= self.patience
