"""Which few pictures calibrate a slider at the end of its training: chosen once, shipped with the weights.

    python benchmarks/calibration_rows.py --folder WORK --json    # measures, chooses and prints
    python benchmarks/calibration_rows.py --folder WORK --write   # and writes dodgeburn/pocket/weights/calibration.json

Pictures respond differently to a slider, some to every slider of an attribute alike; 17 taken as they come say a tenth
or two too much or too little. For each graded attribute of examples/sliders/30-concepts.yaml sliders are trained with
seeds that nothing else uses; 192 pictures (96 development prompts, two seeds each) are read by the reader, in 5 steps
as calibration draws them, and every fourth of them in 20 steps as users do. Chosen are 17, of 17 prompts, whose mean
moves in 5 steps are nearest to those of all in 20; of these the six that come first are nearest to all 17.

left_out: how far (root mean square, of the unit) the rows chosen by the other trainings are off for a training that
they were not chosen by, against all 192 pictures; other_pictures: the same for rows chosen among one half of the
prompts, against what the other half shows (both in 5 steps); as_they_come, as_they_come_other: the same two of 17
pictures taken at random. --quick: one attribute, 48 pictures, no writing.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CONTINUOUS
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.calibrate import reader_scorer
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.natural import known_sigma
from dodgeburn.slide.readings import values_of
from dodgeburn.slide.spec import SliderSpec, load_specs
from dodgeburn.slide.splits import CALIBRATION_ROWS, calibration_prompts, rows_as_they_come
from dodgeburn.slide.train import LOOKED_AT, QuickCalibration, SliderMaker

SPECS = Path(__file__).parents[1] / "examples" / "sliders" / "30-concepts.yaml"
SCALES = (-1.2, -0.6, 0.6, 1.2)
TRAININGS = (101, 102, 103)
FIRST_SEED = 60_000
CALIBRATION = QuickCalibration()
FINAL_STEPS, EVERY = 20, 4  # every fourth picture is drawn in as many steps as users draw
RESTARTS = 20


class Measured:
    """Moves of one attribute's pictures, in its natural deviation."""

    def __init__(self, files: list[Path]) -> None:
        parts = [np.load(path) for path in files]
        self.rows = [(str(p), int(s)) for p, s in zip(parts[0]["prompts"], parts[0]["seeds"], strict=True)]
        sigma = float(parts[0]["sigma"])
        self.quick = np.stack([(part["v5"][:, 1:] - part["v5"][:, :1]) / sigma for part in parts])  # [k, rows, scales]
        final = np.stack([(part["v20"][:, 1:] - part["v20"][:, :1]) / sigma for part in parts])
        half, further = (np.nansum(half_of(one)) for one in (self.quick[:, ::EVERY], final))
        self.steps = float(further / half)  # how much further pictures move in as many steps as users draw

    @property
    def readable(self) -> np.ndarray:
        """Rows that can be read everywhere: bool [rows]."""
        found: np.ndarray = ~np.isnan(self.quick).any((0, 2))
        return found

    def wanted(self) -> np.ndarray:
        """What the few are to show: [k, scales]."""
        found: np.ndarray = np.nanmean(self.quick, 1) * self.steps
        return found


def half_of(moves: np.ndarray) -> np.ndarray:
    """Half the distances between the moves at +s and -s: [..., 2]."""
    return np.asarray((moves[..., 2:] - moves[..., 1::-1]) / 2)


def measure(model: Model, reader: Reader, spec: SliderSpec, seed: int, folder: Path, prompts: int) -> Path:
    """Train a slider and read its pictures; a file that is there is taken as it is."""
    path, target = folder / f"{spec.name}-{seed}.npz", str(spec.attribute)
    if path.exists():
        return path
    file = path.with_suffix(".safetensors")
    if not file.exists():
        maker = SliderMaker(
            model, lambda name: reader_scorer(name, reader), lambda name: known_sigma(model, name),
            rows=rows_as_they_come,
        )  # fmt: skip
        list(maker.text([spec.model_copy(update={"seed": seed})], lambda _: file))
    asked = calibration_prompts(target, prompts)
    rows = [(prompt, FIRST_SEED + prompts * k + i) for k in range(2) for i, prompt in enumerate(asked)]
    adapter, found = load_adapter(file, model), {}
    for key, steps, some in (("v5", CALIBRATION.steps, rows), ("v20", FINAL_STEPS, rows[::EVERY])):
        unedited = Unedited(model, GenerateSettings(steps=steps, guidance=CALIBRATION.guidance), quick=True)
        edit = AdapterEdit(model, adapter, spec.used_from, unedited=unedited)
        every = [(prompt, seed, scale) for prompt, seed in some for scale in (0.0, *SCALES)]
        pictures = edit.pictures([r[0] for r in every], [r[1] for r in every], [r[2] for r in every])
        found[key] = values_of(reader.read(pictures), target).reshape(len(some), -1)
    np.savez(
        path, prompts=np.array([p for p, _ in rows]), seeds=np.array([s for _, s in rows]),
        sigma=np.array(known_sigma(model, target)), v5=found["v5"], v20=found["v20"],
    )  # fmt: skip
    return path


def choose(moves: np.ndarray, wanted: np.ndarray, names: list[str], n: int, usable: np.ndarray) -> list[int]:
    """n rows of different prompts whose mean moves are nearest to `wanted`: swaps until none helps, some restarts.

    moves [rows, features], wanted [features].
    """
    generator, best = np.random.default_rng(0), (np.inf, [0])
    every = np.flatnonzero(usable)
    for _ in range(RESTARTS):
        chosen: list[int] = []
        for row in generator.permutation(every):
            if len(chosen) < n and names[row] not in {names[c] for c in chosen}:
                chosen.append(int(row))
        error = np.inf
        while True:
            total, taken = moves[chosen].sum(0), {names[c] for c in chosen}
            swaps = [
                (float((((total - moves[out] + moves[row]) / n - wanted) ** 2).sum()), i, int(row))
                for i, out in enumerate(chosen)
                for row in every
                if row not in chosen and (names[row] not in taken or names[row] == names[out])
            ]
            least = min(swaps)
            if least[0] >= error - 1e-12:
                break
            error, chosen[least[1]] = least[0], least[2]
        if error < best[0]:
            best = (error, list(chosen))
    return best[1]


def in_order(moves: np.ndarray, chosen: list[int], few: int) -> list[int]:
    """The same with those first whose mean is nearest to that of all."""
    mean = moves[chosen].mean(0)
    first = min(combinations(chosen, few), key=lambda some: float(((moves[list(some)].mean(0) - mean) ** 2).sum()))
    return [*first, *(row for row in chosen if row not in first)]


def flat(moves: np.ndarray) -> np.ndarray:
    """[k, rows, scales] -> [rows, k x scales]"""
    return np.asarray(moves.transpose(1, 0, 2).reshape(moves.shape[1], -1))


def off(measured: Measured, k: int, rows: list[int]) -> float:
    """By how much of itself a unit found on these rows is off for training k: the mean of both distances."""
    said = half_of(measured.quick[k][rows].mean(0)) / half_of(measured.wanted()[k])
    return float(said.mean() - 1)


def elsewhere(measured: Measured, n: int, generator: np.random.Generator) -> dict[str, float]:
    """How far rows are off on pictures of prompts that they were not chosen among, for a training left out as well."""
    names = [prompt for prompt, _ in measured.rows]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(names))}
    chosen, drawn = [], []
    for side in (0, 1):
        here = np.array([number[prompt] % 2 == side for prompt in names])
        usable = measured.readable & here
        for k in range(len(measured.quick)):
            some = np.delete(measured.quick, k, 0)
            rows = choose(flat(some), np.nanmean(some[:, here], 1).ravel(), names, n, usable)
            shown = half_of(np.nanmean(measured.quick[k][~here], 0))
            tries = [rows, *(generator.choice(np.flatnonzero(usable), n, replace=False) for _ in range(40))]
            first, *others = [float((half_of(measured.quick[k][one].mean(0)) / shown).mean() - 1) for one in tries]
            chosen.append(first)
            drawn += others
    return {"other_pictures": _rms(chosen), "as_they_come_other": _rms(drawn)}


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def chosen_rows(measured: Measured, n: int) -> tuple[list[tuple[str, int]], dict[str, float]]:
    """The rows of one attribute, and how good they are."""
    names, usable = [prompt for prompt, _ in measured.rows], measured.readable
    moves = flat(measured.quick)
    rows = in_order(moves, choose(moves, measured.wanted().ravel(), names, n, usable), LOOKED_AT)
    left, count = [], len(measured.quick)
    for k in range(count):
        others = [i for i in range(count) if i != k]
        if others:
            some = flat(measured.quick[others])
            left.append(off(measured, k, choose(some, measured.wanted()[others].ravel(), names, n, usable)))
    generator = np.random.default_rng(1)
    drawn = [
        off(measured, k, list(generator.choice(np.flatnonzero(usable), n, replace=False)))
        for k in range(count)
        for _ in range(200)
    ]
    said = {"steps": measured.steps, "as_they_come": _rms(drawn)}
    if left:
        said |= {"left_out": _rms(left), **elsewhere(measured, n, generator)}
    return [measured.rows[row] for row in rows], {key: round(value, 4) for key, value in said.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("calibration-rows"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, reader = load_model("pocket", device="cpu", dtype="fp32"), Reader.load("reader")
    specs = [spec for spec in load_specs(SPECS) if spec.attribute in CONTINUOUS][: 1 if args.quick else None]
    trainings, prompts = (TRAININGS[:1], 24) if args.quick else (TRAININGS, 96)
    found: dict[str, Any] = {"model_sha256": model.sha256, "reader": "reader", "trainings": list(trainings)}
    found["measured"], found["rows"] = {}, {}
    for spec in specs:
        files = [measure(model, reader, spec, seed, args.folder, prompts) for seed in trainings]
        target = str(spec.attribute)
        found["rows"][target], found["measured"][target] = chosen_rows(Measured(files), CALIBRATION.pictures)
        print(target, found["measured"][target], flush=True)
    if args.write and not args.quick:
        CALIBRATION_ROWS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
