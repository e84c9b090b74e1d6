"""Sliders from specs to files: classes share their cache, each slider is trained, calibrated and written.

The measured unit (1.0 = one natural standard deviation) is by the reader on the pocket, by a scorer given otherwise;
without either a slider stays as trained, and its card says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dodgeburn.checkpoint.slider_card import SliderCard, Training
from dodgeburn.errors import UserError
from dodgeburn.models.adapter_file import save_adapter
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.cache import Points, make_points
from dodgeburn.slide.calibrate import Calibration, CalibrationSettings, Scorer, calibrate
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.predict import Predictor
from dodgeburn.slide.readings import sweep_rows
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.slide.text import Trained, train_text


@dataclass(frozen=True)
class QuickCalibration:
    """The calibration that ends a training: small, so that it costs less than the training does.

    `dodgeburn slider calibrate` measures again with as many pictures as wanted.
    """

    pictures: int = 4  # at each scale, of the class's own contexts
    steps: int = 8  # denoising steps
    search: CalibrationSettings = field(default_factory=lambda: CalibrationSettings(step=1.0, furthest=3.0, rounds=2))


@dataclass(frozen=True)
class Made:
    """A finished slider. Forwards are samples through the U-Net; `shared` of them served every slider of its class."""

    spec: SliderSpec
    adapter: Adapter  # calibrated where it could be
    card: SliderCard
    path: Path
    shared: int
    training: int
    calibration: int
    seconds: float


def train_sliders(
    model: Model,
    specs: Sequence[SliderSpec],
    out: Callable[[SliderSpec], Path],
    scorer: Callable[[str], Scorer] | None = None,
    sigma: Callable[[str], float | None] | None = None,
    quick: QuickCalibration | None = None,
    spelling: str = "kohya",
    dtype: str = "fp16",
    inputs: Sequence[Path] = (),
    progress: Callable[[SliderSpec, int, Adapter], None] | None = None,
) -> Iterator[Made]:
    """Train the sliders one after another and write each to `out(spec)` as soon as it is done.

    scorer: from an attribute to what measures it; sigma: from an attribute to its natural standard deviation where that
    is known beforehand (None: measured on unedited pictures). progress(spec, step, adapter) is told every 5 steps.
    A run that was cut off goes on where it was: checkpoints lie in `<out>.training` until the slider is written.
    """
    quick = quick or QuickCalibration()
    cached: dict[tuple[object, ...], tuple[Points, int]] = {}
    for spec in specs:
        began = time.perf_counter()
        path = out(spec)
        if path.suffix != ".safetensors":
            raise UserError(f"output {path}: sliders are written as .safetensors, name it so")
        predictor = Predictor(model, model.native_size, model.native_size)
        if spec.cache_key() not in cached:
            points = make_points(model, predictor, spec)
            cached[spec.cache_key()] = points, predictor.forwards
        points, shared = cached[spec.cache_key()]
        folder = path.with_name(path.name + ".training")
        scores = scorer(spec.attribute) if spec.attribute is not None and scorer is not None else None
        measure = None if scores is None else _displacement(model, spec, scores, quick)
        trained = train_text(
            model, predictor, points, spec, folder, None if progress is None else partial(progress, spec), None, measure
        )
        found, adapter, cost = None, trained.adapter, 0
        if scores is not None:
            edit, prompts, seeds, counted = _edit(model, trained.adapter, spec, quick)
            known = sigma(scores.attribute) if sigma is not None else None
            found = calibrate(edit, scores, prompts, seeds, settings=quick.search, sigma=known)
            adapter, cost = found.applied(trained.adapter), sum(counted)
        seconds = time.perf_counter() - began
        card = _card(model, spec, trained, found, shared + trained.forwards + cost, seconds)
        save_adapter(adapter, path, model.layout.name, spelling, dtype, card, inputs=tuple(inputs))
        shutil.rmtree(folder, ignore_errors=True)
        yield Made(spec, adapter, card, path, shared, trained.forwards, cost, seconds)


def _edit(
    model: Model, adapter: Adapter, spec: SliderSpec, quick: QuickCalibration
) -> tuple[AdapterEdit, list[str], list[int], list[int]]:  # fmt: skip
    """The slider as an edit, prompts and seeds to look at (none of the cache's), and a list that counts forwards."""
    contexts = list(dict.fromkeys(spec.preserve)) or [""]
    spread = contexts[:: max(1, len(contexts) // quick.pictures)][: quick.pictures]
    prompts = [spec.prompts(context)[0] for context in spread]
    seeds = [spec.seed * 10_000 + 5_000 + i for i in range(-(-quick.pictures // len(prompts)))]
    counted: list[int] = []
    calls = quick.steps * (1 if spec.guidance == 1 else 2)
    settings = GenerateSettings(steps=quick.steps, guidance=spec.guidance)
    unedited = Unedited(model, settings, progress=lambda made: counted.append(made * calls))
    return AdapterEdit(model, adapter, spec.start, unedited=unedited), prompts, seeds, counted


def _displacement(
    model: Model, spec: SliderSpec, scorer: Scorer, quick: QuickCalibration
) -> Callable[[Adapter], float]:  # fmt: skip
    """What early stopping looks at: how far apart the attribute is at +1 and -1, in the scorer's units."""

    def measure(adapter: Adapter) -> float:
        edit, prompts, seeds, _ = _edit(model, adapter, spec, quick)
        found = scorer.scores(edit.pictures(*sweep_rows(prompts, seeds, [-1.0, 1.0]))).reshape(-1, 2)
        return float(np.nanmean(found[:, 1] - found[:, 0]))

    return measure


def _card(
    model: Model, spec: SliderSpec, trained: Trained, found: Calibration | None, forwards: int, seconds: float
) -> SliderCard:  # fmt: skip
    training = Training(
        settings=spec.model_dump(mode="json"), forwards=forwards, seconds=round(seconds, 2), seed=spec.seed
    )
    card = SliderCard(
        name=spec.name, method="text", target=spec.target, positive=spec.positive, negative=spec.negative,
        attribute=spec.attribute or "", start=spec.start, training=training, base=model.name, base_sha256=model.sha256,
    )  # fmt: skip
    if found is None:
        return card
    return card.model_copy(
        update={"unit": found.unit, "sigma": found.sigma, "safe_range": found.safe_range, "curve": found.curve}
    )
