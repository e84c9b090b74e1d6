"""Early stopping: a slider's training ends when what it is trained for no longer gets better on held-out ground."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dodgeburn.checkpoint.tensorfile import atomic_path


class Watch:
    """A held-out figure, the higher the better, looked at every `every` steps.

    `done` once `patience` looks in a row have each bettered the best before them by less than `least` of its size. What
    was seen is kept in a file, so that a resumed training stops where an uninterrupted one does.
    """

    def __init__(
        self, measure: Callable[[], float], path: Path, every: int = 10, least: float = 0.02, patience: int = 2
    ) -> None:
        self.measure, self.path, self.every, self.least, self.patience = measure, path, every, least, patience
        self.seen: dict[int, float] = {}
        if path.exists():
            self.seen = {int(step): value for step, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def look(self, step: int) -> bool:
        """Measure after this step if it is one to look at; whether training is to end."""
        if step % self.every:
            return False
        if step not in self.seen:
            self.seen[step] = float(self.measure())
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.seen), encoding="utf-8")
        return self.done(step)

    def done(self, step: int) -> bool:
        """Whether the looks up to this step say that it is enough."""
        values = [value for at, value in sorted(self.seen.items()) if at <= step]
        idle = 0
        for i in range(1, len(values)):
            best = max(values[:i])
            idle = 0 if values[i] - best > self.least * abs(best) else idle + 1
        return idle >= self.patience
