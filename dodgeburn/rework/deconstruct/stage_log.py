"""What a stage saw, step by step: JSON lines that survive being killed, a strip of pictures for each, and its weights.

A row has a key (such as "1:20", second attempt, step 20). A row that is there is not measured again: a stage that
resumes decides by what it decided before, and ends with the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dodgeburn.checkpoint.tensorfile import atomic_path, load_tensors, save_tensors, sha256_tensors, write_atomic
from dodgeburn.images.sheet import grid
from dodgeburn.jobs import KeptRows
from dodgeburn.models.model import Model
from dodgeburn.rework.deconstruct.meters import Reading

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. Its weights are `<stage>.safetensors`, the U-Net's, fp32."""

    stage: str
    decision: str  # why it ended, in words
    reached: bool  # whether that is what it was for
    steps: int  # gradient steps, those of given-up attempts too
    samples: int  # pictures that these steps saw
    drawn: int  # pictures drawn for the meters
    seconds: float
    sha256: str  # of the weights' bytes
    detail: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"stage": self.stage, "decision": self.decision, "reached": self.reached, "steps": self.steps,
                "samples": self.samples, "drawn": self.drawn, "seconds": round(self.seconds, 1),
                "sha256": self.sha256, "detail": self.detail}  # fmt: skip


class StageLog(KeptRows):
    """One stage's files in the run's folder: `<stage>.jsonl`, `strips/`, `<stage>.safetensors`, `<stage>.json`."""

    def __init__(self, folder: Path, stage: str) -> None:
        super().__init__(folder / f"{stage}.jsonl")
        self.folder, self.stage = folder, stage
        self.result_file, self.weights = folder / f"{stage}.json", folder / f"{stage}.safetensors"
        self.began = time.perf_counter()

    @property
    def work(self) -> Path:
        """Where the stage's trainings keep their checkpoints until it is done."""
        return self.folder / "working" / self.stage

    def reading(self, key: str, measure: Callable[[], Reading], **more: Any) -> Reading:
        """What was measured under this key, now or before; `more` is written beside it."""
        if key in self.rows:
            return Reading.from_json(self.rows[key])
        began = time.perf_counter()
        found = measure()
        if found.pictures is not None:
            path = self.strip(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                grid([Image.fromarray(p) for p in found.pictures], len(found.pictures), gap=1).save(temporary, "png")
        self.add(key, **more, **found.as_json(), seconds=round(time.perf_counter() - began, 2))
        # As it would be read again: decisions are by rounded numbers, before and after an interruption.
        return replace(Reading.from_json(self.rows[key]), pictures=found.pictures)

    def add(self, key: str, **said: Any) -> None:
        """Append a row of this stage, on the disk when this returns."""
        super().add(key, stage=self.stage, **said)

    def decide(self, key: str, decision: str, **more: Any) -> None:
        """A row that says what was decided, once."""
        if f"{key}:decision" not in self.rows:
            self.add(f"{key}:decision", decision=decision, **more)

    def strip(self, key: str) -> Path:
        """The strip of pictures of a row."""
        return self.folder / "strips" / f"{self.stage}-{key.replace(':', '-').replace('/', '-')}.png"

    def done(self) -> StageResult | None:
        """The result, if the stage is finished."""
        if not (self.result_file.exists() and self.weights.exists()):
            return None
        return StageResult(**json.loads(self.result_file.read_text(encoding="utf-8")))

    def restored(self, model: Model) -> StageResult | None:
        """The result, if the stage is finished; then the model holds its weights."""
        done = self.done()
        if done is not None:
            load_unet(model, self.weights)
        return done

    def finish(self, model: Model, decision: str, reached: bool, steps: int, samples: int, drawn: int,
               **detail: Any) -> StageResult:  # fmt: skip
        """Write the model's U-Net as this stage's outcome, then say how it ended: in this order, so that a result has
        its weights."""
        save_unet(model, self.weights)
        before = sum(row.get("seconds", 0.0) for row in self.rows.values())
        seconds = max(before, time.perf_counter() - self.began)
        sha256 = sha256_tensors(self.weights)
        result = StageResult(self.stage, decision, reached, steps, samples, drawn, seconds, sha256, detail)
        write_atomic(self.result_file, (json.dumps(result.as_json(), indent=1) + "\n").encode())
        return result


def unet_state(model: Model) -> State:
    """A copy of the U-Net's weights, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.unet.state_dict().items()}


def load_unet(model: Model, state: Mapping[str, torch.Tensor] | Path) -> None:
    """Put weights into the U-Net."""
    found = load_tensors(state) if isinstance(state, Path) else state
    model.unet.load_state_dict(dict(found))


def save_unet(model: Model, path: Path) -> None:
    """Write the U-Net's weights, atomically."""
    save_tensors(path, unet_state(model), {"format": "pt"})


def strip_pictures(path: Path, side: int, gap: int = 1) -> list[np.ndarray]:
    """The pictures of a strip again."""
    whole = np.asarray(Image.open(path).convert("RGB"))
    return [whole[gap : gap + side, x : x + side] for x in range(gap, whole.shape[1] - side + 1, side + gap)]
