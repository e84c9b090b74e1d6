"""What the calibration error of sliders is made of: pictures that differ, prompts that differ, curves, and the unit.

    python benchmarks/slider_calibration.py --concepts age smile eye_size hair_length --folder calibration

Development prompts and the reader; with --judge, at last, held-out ones and the judge. Each slider is trained and
calibrated as `slider train` does it, swept over development prompts x seeds, and then calibrated again `--again` times
on as many pictures as they come: what moves between these is their uncertainty, not that of the chosen pictures
(calibration_rows.py). Finished parts stay in --folder.

Printed for every slider: half the distance between the mean moves at +1 and -1 (1 is exact), on captions and on the
slider's own prompts; the largest step's share of the way from -2 to 2 (median; a straight response has 0.25), the
shares of sweeps that fall somewhere by more than twice the reader's error, or stay flat; how much single pictures
differ at 1, by prompt, by seed and beyond; the standard errors that follow for six pictures of one seed and for as many
as `slider train` takes; the calibration error (slide/measures.py) that 4 and 64 seeds a prompt would measure, and 64 if
the mean curve were exact; and after each new calibration the response at 1.0, and that error.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide import measures
from dodgeburn.slide.calibrate import calibrate, reader_scorer
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.measures import REQUESTED
from dodgeburn.slide.natural import known_sigma
from dodgeburn.slide.readings import RMSE, read_sweep
from dodgeburn.slide.spec import SliderSpec, load_specs
from dodgeburn.slide.splits import calibration_prompts, calibration_rows, evaluation_split
from dodgeburn.slide.train import QuickCalibration, SliderMaker

SPECS = Path(__file__).parents[1] / "examples" / "sliders" / "30-concepts.yaml"
SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
FIRST_SEED = 990_000
QUICK = QuickCalibration()


class Bench:
    """One model, its reader, and the folder of what is made."""

    def __init__(self, folder: Path, prompts: int, seeds: int) -> None:
        self.folder, self.prompts, self.seeds = folder, prompts, list(range(FIRST_SEED, FIRST_SEED + seeds))
        folder.mkdir(parents=True, exist_ok=True)
        self.model: Model = load_model("pocket", device="cpu", dtype="fp32")
        self.reader = Reader.load("reader")
        self.unedited = Unedited(self.model, GenerateSettings(steps=8, guidance=4.0), quick=True)
        self.final: Unedited | None = None

    def trained(self, spec: SliderSpec) -> Path:
        """The slider's file."""
        path = self.folder / f"{spec.name}.safetensors"
        if not path.exists():
            maker = SliderMaker(
                self.model, lambda target: reader_scorer(target, self.reader),
                lambda name: known_sigma(self.model, name), rows=calibration_rows,
            )  # fmt: skip
            list(maker.text([spec], lambda _: path))
        return path

    def swept(self, spec: SliderSpec) -> np.ndarray:
        """Moves in the declared deviation [prompts, seeds, scales]; NaN where a picture cannot be read."""
        target, path = str(spec.attribute), self.folder / f"{spec.name}.npz"
        if not path.exists():
            edit = self.edit(spec, self.unedited)
            sweep = read_sweep(edit, self.reader, calibration_prompts(target, self.prompts), self.seeds, SCALES)
            np.savez(path, dev8=sweep.of(target))
        values = np.load(path)["dev8"]
        return (values - values[:, :, [SCALES.index(0.0)]]) / known_sigma(self.model, target)

    def own(self, spec: SliderSpec) -> float:
        """Half the distance between the mean moves at +1 and -1 on the slider's own prompts, two seeds each."""
        target, path = str(spec.attribute), self.folder / f"{spec.name}-own.npz"
        if not path.exists():
            prompts = [spec.prompts(context)[0] for context in dict.fromkeys(spec.preserve)]
            sweep = read_sweep(self.edit(spec, self.unedited), self.reader, prompts, self.seeds[:2], [-1.0, 0.0, 1.0])
            np.savez(path, values=sweep.of(target))
        values = np.load(path)["values"]
        return float(np.nanmean(values[:, :, 2] - values[:, :, 0]) / 2 / (known_sigma(self.model, target) or np.nan))

    def edit(self, spec: SliderSpec, unedited: Unedited) -> AdapterEdit:
        """The trained slider."""
        return AdapterEdit(self.model, load_adapter(self.trained(spec), self.model), spec.used_from, unedited=unedited)

    def again(self, spec: SliderSpec, draw: int) -> dict[str, Any]:
        """The file's 1.0 found anew, with other seeds: what is the unit in its present units?"""
        target, path = str(spec.attribute), self.folder / f"{spec.name}-again-{draw}.json"
        if not path.exists():
            settings = GenerateSettings(steps=QUICK.steps, guidance=QUICK.guidance)
            seeds = [10_000 * (draw + 1) + 5_000 + i for i in range(QUICK.pictures)]
            found = calibrate(
                self.edit(spec, Unedited(self.model, settings, quick=True)), reader_scorer(target, self.reader),
                calibration_prompts(target, QUICK.pictures), seeds, settings=QUICK.search,
                sigma=known_sigma(self.model, target), paired=True,
            )  # fmt: skip
            path.write_text(json.dumps({"factor": found.factor, "safe_range": found.safe_range}))
        said: dict[str, Any] = json.loads(path.read_text())
        return said

    def judged(self, spec: SliderSpec, factor: float) -> dict[str, float]:
        """On held-out prompts, by the judge, 20 steps: the calibration error if 1.0 were `factor` of the file's."""
        target, path = str(spec.attribute), self.folder / f"{spec.name}-judged-{factor:.4f}.json"
        if not path.exists():
            if self.final is None:
                self.final = Unedited(self.model, quick=True)
                self.judge = Reader.load("judge")
            split = evaluation_split([target], 8, 4)
            asked = sorted([*REQUESTED, 0.0])
            scales = [s * factor for s in asked]
            sweep = read_sweep(self.edit(spec, self.final), self.judge, split.prompts, split.seeds, scales)
            sweep = replace(sweep, scales=np.array(asked))
            unit = known_sigma(self.model, target)
            error = measures.calibration_error(sweep, measures.natural_spread(sweep), target, sigma=unit)
            moves = np.nanmean(sweep.moves(target), (0, 1)) / (unit or np.nan)
            at_1 = float(moves[asked.index(1.0)] - moves[asked.index(-1.0)]) / 2
            path.write_text(json.dumps({"calibration_error": error, "at_1": at_1}))
        said: dict[str, float] = json.loads(path.read_text())
        return said


def components(half: np.ndarray) -> tuple[float, float, float]:
    """Standard deviations of [prompts, seeds] by prompt, by seed and of the rest (two ways, random effects)."""
    p, s = half.shape
    by_prompt, by_seed = half.mean(1) - half.mean(), half.mean(0) - half.mean()
    rest = ((half - half.mean() - by_prompt[:, None] - by_seed) ** 2).sum() / ((p - 1) * (s - 1))
    prompts = ((by_prompt**2).sum() * s / (p - 1) - rest) / s
    seeds = ((by_seed**2).sum() * p / (s - 1) - rest) / p
    return float(np.sqrt(max(prompts, 0))), float(np.sqrt(max(seeds, 0))), float(np.sqrt(rest))


def expected(moves: np.ndarray, seeds: float, curve: np.ndarray | None = None) -> float:
    """The calibration error that so many seeds a prompt would measure: the median over normal prompts and the scales.

    At each scale a prompt's mean differs from the mean curve by what prompts differ (their means' variance, less what
    the few seeds there are explain) and by what its seeds leave. curve: the mean moves are taken to be these instead.
    """
    k = [SCALES.index(s) for s in REQUESTED]
    mean = np.nanmean(moves, (0, 1)) if curve is None else curve
    within = np.nanmean(np.nanvar(moves, 1, ddof=1), 0)
    between = np.maximum(0, np.nanvar(np.nanmean(moves, 1), 0, ddof=1) - within / moves.shape[1])
    drawn = np.random.default_rng(0).standard_normal((20_000, len(k)))
    return float(np.median(np.abs((mean - SCALES)[k] + drawn * np.sqrt(between + within / seeds)[k])))


def at_factor(moves: np.ndarray, factor: float) -> np.ndarray:
    """Moves as they would be if 1.0 were `factor` of now: linear between scales, and on as between the last two."""
    scales = np.array(SCALES)
    wanted = scales * factor
    right = np.clip(np.searchsorted(scales, wanted), 1, len(scales) - 1)
    part = (wanted - scales[right - 1]) / (scales[right] - scales[right - 1])
    return moves[:, :, right - 1] * (1 - part) + moves[:, :, right] * part


def row(bench: Bench, spec: SliderSpec, again: int, judge: bool) -> dict[str, Any]:
    """All figures of one slider."""
    moves = bench.swept(spec)
    half = (moves[:, :, SCALES.index(1.0)] - moves[:, :, SCALES.index(-1.0)]) / 2
    prompts, seeds, rest = components(half)
    each, n = prompts**2 + rest**2, QUICK.pictures
    curve = np.nanmean(moves, (0, 1))
    steps, fall = np.abs(np.diff(moves, axis=2)), -np.diff(moves, axis=2).min(2)
    slack = 2 * RMSE["reader"].get(str(spec.attribute), 0.0) / (known_sigma(bench.model, str(spec.attribute)) or np.nan)
    sizes = [0.0, *(float((curve[SCALES.index(s)] - curve[SCALES.index(-s)]) / 2) for s in (0.5, 1.0, 2.0))]
    factors = [bench.again(spec, draw)["factor"] for draw in range(again)]
    after = [expected(at_factor(moves, factor), 64) for factor in factors]
    return {
        "name": spec.name, "at_1": float(half.mean()), "at_1_own_prompts": bench.own(spec),
        "curve": dict(zip(map(str, SCALES), curve.tolist(), strict=True)),
        "largest_step": float(np.nanmedian(steps.max(2) / steps.sum(2))), "falls": float((fall > slack).mean()),
        "flat": float((moves[:, :, -1] - moves[:, :, 0] < 1).mean()),
        "sd_prompts": prompts, "sd_seeds": seeds, "sd_rest": rest,
        "se_6_of_one_seed": float(np.sqrt(seeds**2 + each / 6)), f"se_{n}": float(np.sqrt((seeds**2 + each) / n)),
        "error_4_seeds": expected(moves, 4), "error_64_seeds": expected(moves, 64),
        "error_64_seeds_exact_curve": expected(moves, 64, np.array(SCALES)),
        "at_1_recalibrated": [float(np.interp(factor, [0.0, 0.5, 1.0, 2.0], sizes)) for factor in factors],
        "error_64_seeds_recalibrated": after,
        "judged": [bench.judged(spec, factor) for factor in (1.0, *factors[:1])] if judge else [],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["age", "smile", "eye_size", "hair_length"])
    parser.add_argument("--folder", type=Path, default=Path("slider-calibration"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--again", type=int, default=2, help="how often each slider is calibrated anew")
    parser.add_argument("--quick", action="store_true", help="one concept, 4 prompts, 1 seed, calibrated anew once")
    parser.add_argument("--judge", action="store_true", help="at last: held-out prompts, old and new unit")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.concepts, args.prompts, args.seeds, args.again = args.concepts[:1], 4, 1, 1
    bench = Bench(args.folder, args.prompts, args.seeds)
    specs = {spec.name: spec for spec in load_specs(SPECS)}
    rows = []
    for name in args.concepts:
        rows.append(row(bench, specs[name], args.again, args.judge))
        print("  ".join(f"{k} {_short(v)}" for k, v in rows[-1].items() if k != "curve"), flush=True)
        print(f"  curve {', '.join(f'{s}: {m:+.2f}' for s, m in rows[-1]['curve'].items())}", flush=True)
    if args.json:
        print(json.dumps({"sliders": rows, "prompts": args.prompts, "seeds": args.seeds}))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{one:.2f}" if isinstance(one, float) else str(one) for one in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
