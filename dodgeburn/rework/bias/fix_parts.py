"""What `fix` has finished, in files: the same command goes on behind it after an interruption."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from torch import nn

from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, save_tensors, write_atomic
from dodgeburn.errors import UserError
from dodgeburn.jobs import KeptRows
from dodgeburn.rework.bias.before_after import Measured
from dodgeburn.rework.bias.remedies import Done
from dodgeburn.rework.bias.undo import State, state_of

BEFORE = "before"
BEST = "best.safetensors"


class FixParts:
    """Measurements and outcomes by method, and the weights of the best so far: one copy, for models are large.

    Without a folder nothing is kept but in memory. The folder belongs to one job (jobs.PartStore).
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.log = None if folder is None else KeptRows(folder / "tried.jsonl")
        self._best: State = {}
        self._best_of = ""

    def measured(self, name: str) -> Measured | None:
        """What was measured after a method (or `BEFORE`), if that was finished before."""
        if self.folder is None or self.log is None or "measured" not in self.log.rows.get(name, {}):
            return None
        try:
            pictures = np.load(self.folder / f"{name}.npy")
        except (OSError, ValueError, EOFError):
            return None  # gone or damaged: measured again
        return Measured.from_row(self.log.rows[name]["measured"], pictures)

    def done(self, name: str) -> Done:
        """What the method did."""
        assert self.log is not None
        return Done(**self.log.rows[name]["done"])

    def refused(self, name: str) -> str | None:
        """Why the method was passed over, if it was."""
        return None if self.log is None else self.log.rows.get(name, {}).get("refused")

    def keep(self, name: str, measured: Measured, done: Done | None = None) -> None:
        """Keep a measurement, and what was done before it."""
        if self.folder is None or self.log is None:
            return
        buffer = io.BytesIO()
        np.save(buffer, measured.pictures)
        write_atomic(self.folder / f"{name}.npy", buffer.getvalue())
        said = {} if done is None else {"done": done.as_json()}
        self.log.add(name, measured=measured.as_row(), **said)

    def keep_refused(self, name: str, why: str) -> None:
        """Keep that a method lacked what it needs."""
        if self.log is not None:
            self.log.add(name, refused=why)

    # -------------------- the best so far

    def keep_best(self, name: str, module: nn.Module) -> None:
        """The module's weights, by the method `name`, are the best so far. To be called before `keep`: an interruption
        between them has the method tried again."""
        if self.folder is None:
            self._best, self._best_of = state_of(module), name
        else:
            tensors = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
            save_tensors(self.folder / BEST, tensors, {"method": name})

    def best(self, name: str) -> State | None:
        """The weights that a method made, if they are those that were kept last."""
        if self.folder is None:
            return self._best if self._best_of == name else None
        path = self.folder / BEST
        try:
            return load_tensors(path) if read_header(path).metadata.get("method") == name else None
        except UserError:
            return None  # gone or damaged: made again
