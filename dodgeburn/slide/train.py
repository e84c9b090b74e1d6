"""Sliders from specs to files: classes share their cache; each slider is made, calibrated and written.

The unit (1.0 = one natural standard deviation) is by the reader on the pocket, by a scorer that is given otherwise;
without either a slider stays as it was made, and its card says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.checkpoint.lora_file import open_adapter
from dodgeburn.checkpoint.slider_card import SliderCard, Training, slider_of
from dodgeburn.errors import UserError
from dodgeburn.models.adapter_file import STORED, save_adapter
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.adapted import ALWAYS
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.sampling.predict import Predictor
from dodgeburn.slide.begin import begin
from dodgeburn.slide.cache import Points, make_points
from dodgeburn.slide.calibrate import Calibration, CalibrationSettings, Scorer, calibrate
from dodgeburn.slide.closed_form import closed_form
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.pairs import PairSpec, train_pairs
from dodgeburn.slide.readings import FINGERS
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.slide.splits import seeds_beside
from dodgeburn.slide.text import train_text

Spec = SliderSpec | PairSpec
LOOKED_AT = 6  # pictures at each end that early stopping by the reader looks at


@dataclass(frozen=True)
class QuickCalibration:
    """The calibration that ends a training: small, so that it costs less than the training does.

    `dodgeburn slider calibrate` measures again with as many pictures as wanted.
    """

    pictures: int = 17  # at one pair of scales; each of a prompt and a seed of its own
    steps: int = 5  # denoising steps
    guidance: float = 4.0
    search: CalibrationSettings = field(
        default_factory=lambda: CalibrationSettings(step=1.5, furthest=3.0, rounds=4, first=0.7, few=6)
    )


@dataclass(frozen=True)
class Made:
    """A finished slider. Forwards are samples through the U-Net; `shared` of them served every slider of its class."""

    spec: Spec
    adapter: Adapter  # calibrated where it could be
    card: SliderCard
    path: Path
    shared: int
    training: int
    calibration: int
    seconds: float
    raw: float | None = None  # scale, as trained, of what is now 1.0; None where not calibrated

    @property
    def better_eta(self) -> float | None:
        """An eta with which 1.0 would lie half-way to the reach; None where it lies within the reach as it is.

        Beyond the reach a slider is used further than it was ever trained to be, and bends or falls back.
        """
        if self.raw is None or not isinstance(self.spec, SliderSpec) or self.card.method != "text":
            return None
        if self.raw <= self.spec.reach:
            return None
        return float(f"{self.spec.eta * self.raw / (self.spec.reach / 2):.1g}")


@dataclass(frozen=True)
class _Look:
    """How a slider is looked at while it is made: pictures, each of a prompt and a seed, that no training uses."""

    prompts: list[str]
    seeds: list[int]
    start: float

    def rows(self, scales: Sequence[float]) -> tuple[list[str], list[int], list[float]]:
        """Every picture at every scale, scales innermost."""
        every = [(p, s, scale) for p, s in zip(self.prompts, self.seeds, strict=True) for scale in scales]
        return [r[0] for r in every], [r[1] for r in every], [r[2] for r in every]


@dataclass
class SliderMaker:
    """Makes sliders on one model.

    scorer: from an attribute to what measures it; sigma: from an attribute to its natural standard deviation where that
    is known beforehand (None: measured on unedited pictures). rows: from an attribute, a number and the training's seed
    to so many prompts, each with a seed, to calibrate on, such as users will give (None: the slider's own subject with
    its preserved attributes in turn). spelling, dtype, inputs: as `save_adapter`.
    """

    model: Model
    scorer: Callable[[str], Scorer] | None = None
    sigma: Callable[[str], float | None] | None = None
    quick: QuickCalibration = field(default_factory=QuickCalibration)
    spelling: str = "kohya"
    dtype: str = "fp16"
    inputs: Sequence[Path] = ()
    rows: Callable[[str, int, int], list[tuple[str, int]]] | None = None
    _drawn: list[int] = field(default_factory=list)  # samples through the U-Net of every picture looked at
    _unedited: Unedited | None = None  # shared: sliders of a class are looked at on the same prompts and seeds

    def text(
        self, specs: Sequence[SliderSpec], out: Callable[[SliderSpec], Path],
        progress: Callable[[SliderSpec, int, Adapter], None] | None = None,
    ) -> Iterator[Made]:  # fmt: skip
        """Train sliders from prompts one after another, each written to `out(spec)` as soon as it is done.

        progress(spec, step, adapter) is told every 5 steps. A run that was cut off goes on where it was: checkpoints
        lie in `<out>.training` until the slider is written.
        """
        cached: dict[tuple[object, ...], tuple[Points, int]] = {}
        for spec in specs:
            began, path = time.perf_counter(), _checked(out(spec))
            side = self.model.native_size
            predictor = Predictor(self.model, side, side)
            if spec.cache_key() not in cached:
                cached[spec.cache_key()] = make_points(self.model, predictor, spec), predictor.forwards
            points, shared = cached[spec.cache_key()]
            look = self._look_text(spec, spec.used_from)
            with _left_clean(_folder(path)) as folder:
                trained = train_text(
                    self.model, predictor, points, spec, folder, None if progress is None else partial(progress, spec),
                    begin(self.model, predictor, points, spec), self._displacement(spec, look),
                    spent=lambda: sum(self._drawn),
                )  # fmt: skip
            yield self._finish("text", spec, trained.adapter, path, look, (shared, trained.forwards), began)

    def is_there(self, spec: SliderSpec, path: Path) -> bool:
        """Whether the file is what `text` would write: trained so, on this model, and spelled, rounded and calibrated
        as asked for. UserError for a file that is no adapter."""
        if not path.is_file():
            return False
        with open_adapter(path) as found:
            card = slider_of(found.metadata)
            if (
                card is None
                or card.training is None
                or card.method != "text"
                or set(found.spellings) != {self.spelling}
            ):
                return False
            key = next(module.keys["up"] for module in found.modules.values())
            stored = found.source.info(key).dtype == STORED[self.dtype]
        calibrated = bool(card.unit) == (self._scores(spec) is not None)
        said = card.training.settings == spec.model_dump(mode="json") and card.base_sha256 == self.model.sha256
        return said and stored and calibrated

    def closed_form(self, spec: SliderSpec, out: Path) -> Made:
        """A slider from prompts by least squares, without training."""
        began, path = time.perf_counter(), _checked(out)
        adapter = closed_form(self.model, spec)
        return self._finish("closed form", spec, adapter, path, self._look_text(spec, ALWAYS), (0, 0), began)

    def pairs(self, spec: PairSpec, pictures: Path, out: Path) -> Made:
        """A slider from pictures before and after."""
        began, path = time.perf_counter(), _checked(out)
        look = self._look(spec, [spec.prompt], spec.start)
        self._scores(spec)  # an attribute that is none is refused before the work
        with _left_clean(_folder(path)) as folder:
            trained = train_pairs(self.model, spec, pictures, folder)
        return self._finish("pairs", spec, trained.adapter, path, look, (0, trained.forwards), began)

    # -------------------- what all have in common

    def _look_text(self, spec: SliderSpec, start: float) -> _Look:
        contexts = list(dict.fromkeys(spec.preserve)) or [""]
        return self._look(spec, [spec.prompts(context)[0] for context in contexts], start)

    def _look(self, spec: Spec, own: list[str], start: float) -> _Look:
        """Prompts such as users will give, where they are known, or else the slider's own; a seed for each."""
        n = self.quick.pictures
        if self.rows is not None and spec.attribute is not None and spec.attribute != FINGERS:
            rows = self.rows(spec.attribute, n, spec.seed)
        else:
            rows = [(own[i % len(own)], seed) for i, seed in enumerate(seeds_beside(spec.seed, n))]
        return _Look([prompt for prompt, _ in rows], [seed for _, seed in rows], start)

    def _edit(self, adapter: Adapter, look: _Look) -> AdapterEdit:
        """The slider as an edit; what it draws is counted in `_drawn`."""
        if self._unedited is None:
            calls = self.quick.steps * (1 if self.quick.guidance == 1 else 2)
            settings = GenerateSettings(steps=self.quick.steps, guidance=self.quick.guidance)
            self._unedited = Unedited(
                self.model, settings, progress=lambda made: self._drawn.append(made * calls), quick=True
            )
        return AdapterEdit(self.model, adapter, look.start, unedited=self._unedited)

    def _scores(self, spec: Spec) -> Scorer | None:
        """What calibrates it; None without an attribute, and for fingers, which have no natural deviation."""
        if spec.attribute is None or spec.attribute == FINGERS or self.scorer is None:
            return None
        return self.scorer(spec.attribute)

    def _displacement(self, spec: SliderSpec, look: _Look) -> Callable[[Adapter], float] | None:
        """What early stopping looks at: how far apart the attribute is at +1 and -1, in the scorer's units."""
        scorer = self._scores(spec)
        if scorer is None:
            return None

        def measure(adapter: Adapter) -> float:
            edit = self._edit(adapter, look)
            few = _Look(look.prompts[:LOOKED_AT], look.seeds[:LOOKED_AT], look.start)
            found = scorer.scores(edit.pictures(*few.rows([-1.0, 1.0]))).reshape(-1, 2)
            return float(np.nanmean(found[:, 1] - found[:, 0]))

        return measure

    def _finish(
        self, method: str, spec: Spec, adapter: Adapter, path: Path, look: _Look, forwards: tuple[int, int],
        began: float,
    ) -> Made:  # fmt: skip
        """Calibrate, write, and clear what the training left."""
        found, cost, scorer = None, 0, self._scores(spec)
        if scorer is not None:
            edit, before = self._edit(adapter, look), sum(self._drawn)
            known = self.sigma(scorer.attribute) if self.sigma is not None else None
            quick = self.quick.search
            found = calibrate(edit, scorer, look.prompts, look.seeds, settings=quick, sigma=known, paired=True)
            adapter, cost = found.applied(adapter), sum(self._drawn) - before
        seconds = time.perf_counter() - began
        start = None if look.start >= ALWAYS else look.start
        card = _card(self.model, method, spec, found, start, sum(forwards) + cost)
        save_adapter(adapter, path, self.model.layout.name, self.spelling, self.dtype, card, inputs=tuple(self.inputs))
        shutil.rmtree(_folder(path), ignore_errors=True)
        raw = None if found is None else abs(found.factor)
        return Made(spec, adapter, card, path, forwards[0], forwards[1], cost, seconds, raw)


def _checked(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise UserError(f"output {path}: sliders are written as .safetensors, name it so")
    return path


def _folder(path: Path) -> Path:
    return path.with_name(path.name + ".training")


@contextmanager
def _left_clean(folder: Path) -> Iterator[Path]:
    """The folder, taken away after an error that left nothing in it."""
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _card(
    model: Model, method: str, spec: Spec, found: Calibration | None, start: float | None, forwards: int
) -> SliderCard:  # fmt: skip
    # No seconds: a file's bytes, and so its hash, are not to depend on the machine's mood.
    training = Training(settings=spec.model_dump(mode="json"), forwards=forwards, seed=spec.seed)
    said: dict[str, Any] = {"target": spec.prompt} if isinstance(spec, PairSpec) else {
        "target": spec.target, "positive": spec.positive, "negative": spec.negative,
    }  # fmt: skip
    if found is not None:
        said |= {"unit": found.unit, "sigma": found.sigma, "safe_range": found.safe_range, "curve": found.curve}
    return SliderCard(
        name=spec.name, method=method, attribute=spec.attribute or "", start=start, training=training, base=model.name,
        base_sha256=model.sha256, **said,
    )  # fmt: skip
