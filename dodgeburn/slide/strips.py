"""What a slider does so far: strips of pictures saved while it is trained, so that nobody waits in the dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dodgeburn.checkpoint.tensorfile import atomic_path
from dodgeburn.images.sheet import contact_sheet
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.readings import sweep_rows
from dodgeburn.slide.spec import SliderSpec

SCALES = (-1.5, -0.75, 0.0, 0.75, 1.5)
SEEDS = (1, 2)
STEPS = 10


class StripSaver:
    """Called as training's progress: every `every` steps saves `<out>.strips/step-0020.png`, two seeds at five scales.

    The scales are raw ones: what training works with before calibration.
    """

    def __init__(self, model: Model, paths: Mapping[str, Path], every: int) -> None:
        self.model, self.paths, self.every = model, paths, every
        self.saved: list[Path] = []
        self._unedited: dict[float, Unedited] = {}

    def __call__(self, spec: SliderSpec, step: int, adapter: Adapter) -> None:
        if step % self.every and step != spec.steps:
            return
        if spec.guidance not in self._unedited:
            settings = GenerateSettings(steps=STEPS, guidance=spec.guidance)
            self._unedited[spec.guidance] = Unedited(self.model, settings)
        edit = AdapterEdit(self.model, adapter, spec.used_from, unedited=self._unedited[spec.guidance])
        prompt = spec.neutral or spec.target
        pictures = [Image.fromarray(picture) for picture in edit.pictures(*sweep_rows([prompt], SEEDS, SCALES))]
        rows = [pictures[i : i + len(SCALES)] for i in range(0, len(pictures), len(SCALES))]
        labels = [f"{scale:+g}" if scale else "0" for scale in SCALES]
        sheet = contact_sheet(rows, [f"seed {seed}" for seed in SEEDS], labels, f"{spec.name}, step {step}")
        folder = self.paths[spec.name].with_name(self.paths[spec.name].name + ".strips")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:04d}.png"
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="png")
        self.saved.append(path)
