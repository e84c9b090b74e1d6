"""Concept Sliders on the pocket: what they reach, what they cost, and what else reaches it.

    python benchmarks/sliders.py --json                # 12 concepts, 3 training seeds, 8 held-out prompts x 64 seeds
    python benchmarks/sliders.py --quick --json        # 3 concepts, 1 training seed, 4 prompts x 4 seeds

Sliders are trained and calibrated with the reader; the judge reads what is reported, on held-out prompts that leave the
attribute open (gate list), seeds that nothing else uses. Finished parts stay in --folder, and the same command goes on
there. Every mean has a 95 % interval over concepts (bootstrap), each taken as the mean of its trainings.

monotone, spearman, selectivity, range_sigma, symmetry, calibration_error: slide/measures.py, over scales from -3 to 3
whatever a file's safe range is; within_safe_range: of the same pictures those at scales that the file calls safe.
*_kept: of all pairs and triples of the first concepts. official: the published loop as is, with its defaults (1 000
steps; 10 in --quick). baselines: mean leakage onto the other attributes where the target has moved by one deviation;
null where it never does. Pictures are drawn with bf16 products where the processor is quick at them
(models/quick.py); fp32 has the first judged slider again without.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import run_sized
from slider_table import less, mean_leak, over, summary

from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore
from dodgeburn.measure.intervals import bootstrap_mean
from dodgeburn.measure.machine import machine
from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.models.quick import quick_products
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.predict import Predictor
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.attention_reuse import PromptToPrompt
from dodgeburn.slide.baselines import EmbeddingInterpolation, PromptWeight, random_like, words_of
from dodgeburn.slide.cache import make_points
from dodgeburn.slide.calibrate import CalibrationSettings, calibrate, reader_scorer
from dodgeburn.slide.closed_form import closed_form
from dodgeburn.slide.composition import Member, kept, read_alone
from dodgeburn.slide.edits import AdapterEdit, Edit, Unedited
from dodgeburn.slide.evaluate import Evaluation, as_json, evaluate, judge_sweep
from dodgeburn.slide.natural import known_sigma
from dodgeburn.slide.official import OfficialSettings, train_official
from dodgeburn.slide.pairs import PairSpec, train_pairs
from dodgeburn.slide.repair import draw_hand_pairs, five_fingers
from dodgeburn.slide.score_edits import Composition, GuidanceDirection
from dodgeburn.slide.slider_file import open_slider
from dodgeburn.slide.spec import SliderSpec, load_specs
from dodgeburn.slide.splits import calibration_rows, calibration_split, evaluation_split
from dodgeburn.slide.text import train_text
from dodgeburn.slide.train import SliderMaker
from dodgeburn.slide.unmix import measure_mixing, unmixed, unmixing

SPECS = Path(__file__).parents[1] / "examples" / "sliders" / "30-concepts.yaml"
SCALES = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
MEANS = ("monotone", "spearman", "selectivity", "range_sigma", "symmetry", "parse_loss", "calibration_error")


@dataclass(frozen=True)
class Size:
    """How much is made."""

    concepts: int = 12
    training_seeds: int = 3
    prompts: int = 8
    seeds: int = 64  # split among the training seeds
    composed: int = 6  # concepts whose pairs and triples are drawn
    composed_prompts: int = 4
    composed_seeds: int = 4
    unmixed_seeds: int = 8
    baselines: int = 12  # concepts
    baseline_seeds: int = 2
    shuffled: int = 3  # concepts on which the shuffled control is trained
    official_steps: int = 1000
    official_seeds: int = 8
    hand_pairs: int = 8
    hand_seeds: int = 64


QUICK = Size(3, 1, 4, 4, 3, 2, 4, 2, 1, 4, 1, 10, 4, 8, 8)


class Bench:
    """One run in one folder."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size = size
        self.model: Model = load_model("pocket", device="cpu", dtype="fp32")
        self.store = PartStore(folder, {"size": asdict(size), "model": self.model.sha256, "scales": list(SCALES)})
        self.unedited = Unedited(self.model)
        self.draft = Unedited(self.model, GenerateSettings(steps=8))  # on which other edits find their unit
        self.judge, self.reader = Reader.load("judge"), Reader.load("reader")
        self.specs = load_specs(SPECS)[: size.concepts]

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON part, made if it is not there."""
        path = f"{name}.json"
        if not self.store.has(path):
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            made = make()
            with self.store.writing(path) as temporary:
                temporary.write_text(json.dumps(made))
        return json.loads(self.store.path(path).read_text())

    # -------------------- training

    def file(self, spec: SliderSpec, seed: int) -> Path:
        """Where a trained slider lies."""
        return self.store.path(f"{spec.name}-{seed}.safetensors")

    def train(self, seed: int) -> list[dict[str, Any]]:
        """All concepts with one training seed; the first pays for the class's cache."""
        rows = []
        maker = SliderMaker(
            self.model, lambda target: reader_scorer(target, self.reader), lambda name: known_sigma(self.model, name),
            rows=calibration_rows,
        )  # fmt: skip
        specs = [spec.model_copy(update={"seed": seed}) for spec in self.specs]
        for one in maker.text(specs, lambda spec: self.file(spec, seed)):
            rows.append({
                "name": one.spec.name, "seconds": one.seconds, "shared": one.shared, "training": one.training,
                "calibration": one.calibration, "sigma": one.card.sigma, "safe": one.card.safe_range,
            })  # fmt: skip
        return rows

    def slider(self, spec: SliderSpec, seed: int) -> AdapterEdit:
        """A trained slider from its file."""
        adapter = load_adapter(self.file(spec, seed), self.model)
        return AdapterEdit(self.model, adapter, spec.used_from, unedited=self.unedited)

    # -------------------- judging

    def judged(self, edit: Edit, spec: SliderSpec, seeds: slice, scales: Sequence[float] = SCALES) -> Evaluation:
        """An edit on the held-out prompts."""
        target = str(spec.attribute)
        split = evaluation_split([target], self.size.prompts, self.size.seeds)
        split = type(split)(split.prompts, split.seeds[seeds])
        unit = known_sigma(self.model, target)  # of the packaged model: what its sliders' files declare
        return evaluate(edit, target, split, scales, self.judge, name=spec.name, resamples=50, unit=unit)

    def share(self, seed: int) -> slice:
        """The evaluation's seeds that a training seed is judged on."""
        n = self.size.seeds // self.size.training_seeds
        return slice(seed * n, (seed + 1) * n)

    def row(self, spec: SliderSpec, seed: int) -> dict[str, Any]:
        """Everything of one slider."""
        path = self.file(spec, seed)
        found = self.judged(self.slider(spec, seed), spec, self.share(seed))
        card = open_slider(str(path), self.model).card
        low, high = card.safe_range or (-1.0, 1.0)
        safe = judge_sweep(
            found.sweep.within(low, high), found.target, found.split, found.reader, found.name, resamples=50,
            unit=known_sigma(self.model, found.target),
        )  # fmt: skip
        within = {key: safe.mean(key) for key in MEANS}
        return as_json(found) | {"leak": mean_leak(found), "safe_range": [low, high], "within": within}

    def exact(self, spec: SliderSpec, seed: int) -> dict[str, Any]:
        """A slider judged on pictures drawn in fp32 throughout."""
        with torch.autocast("cpu", enabled=False):
            edit = self.slider(spec, seed)
            edit.unedited = Unedited(self.model)
            return as_json(self.judged(edit, spec, self.share(seed)))

    def unmix(self) -> dict[str, Any]:
        """Selectivity among the concepts, before and after unmixing (first training seed)."""
        edits = [self.slider(spec, 0) for spec in self.specs]
        targets = [str(spec.attribute) for spec in self.specs]
        mixing = measure_mixing(edits, targets, calibration_split(targets, 4, 4), self.reader)
        made = unmixed([edit.adapters[0] for edit in edits], unmixing(mixing))
        out: dict[str, Any] = {"before": {}, "after": {}}
        share = slice(0, self.size.unmixed_seeds)
        for spec, edit, adapter in zip(self.specs, edits, made, strict=True):
            new = AdapterEdit(self.model, adapter, spec.used_from, unedited=self.unedited)
            for key, one in (("before", edit), ("after", new)):
                found = self.judged(one, spec, share, (-2.0, -1.0, 0.0, 1.0, 2.0))
                out[key][spec.name] = {"selectivity": found.mean("selectivity"), "leak": mean_leak(found)}
        return out

    def composed(self) -> dict[str, Any]:
        """Pairs and triples of the first concepts."""
        specs = self.specs[: self.size.composed]
        members = [Member(load_adapter(self.file(s, 0), self.model), str(s.attribute), s.used_from) for s in specs]
        targets = [member.target for member in members]
        split = evaluation_split(targets, self.size.composed_prompts, self.size.composed_seeds)
        alone = read_alone(self.model, members, split, self.judge, self.unedited)
        out = {}
        for name, size in (("pairs", 2), ("triples", 3)):
            found = kept(self.model, members, size, split, self.judge, self.unedited, alone)
            out[name] = {"kept": found.prompts.mean, "interval": found.prompts.ends, "pictures": found.pictures.mean}
        return out

    def hands(self) -> dict[str, Any]:
        """ "Fix hands" from pairs: drawings with wrong finger counts, and the same with five.

        The scale is chosen by the reader on prompts and seeds of its own; the judge counts on others. A picture without
        a readable waving hand is no five-fingered one.
        """
        pictures = self.store.path("hands")
        draw_hand_pairs(pictures, self.size.hand_pairs)
        with tempfile.TemporaryDirectory() as folder:
            made = train_pairs(self.model, PairSpec(name="hands", prompt="a person, waving"), pictures, Path(folder))
        edit = AdapterEdit(self.model, made.adapter, 850, unedited=self.unedited)

        n = self.size.hand_seeds
        chosen = range(8000, 8000 + n // 2)
        tried = {
            scale: float(five_fingers(edit, self.reader, CHOOSING, chosen, scale).mean())
            for scale in (1.0, 2.0, 3.0, 4.0)
        }
        best = max(tried, key=lambda scale: (tried[scale], -scale))
        seeds = range(3_000_000, 3_000_000 + n)
        before, after = (
            bootstrap_mean(five_fingers(edit, self.judge, JUDGED, seeds, scale), shares=True) for scale in (0.0, best)
        )
        return {
            "before": before.mean, "after": after.mean, "intervals": {"before": before.ends, "after": after.ends},
            "scale": best, "chosen_among": tried, "pairs": made.pairs, "forwards": made.forwards,
            "train_s": made.seconds, "pictures": len(JUDGED) * n,
        }  # fmt: skip

    # -------------------- what else there is

    def closed(self, spec: SliderSpec) -> dict[str, Any]:
        """The closed form: how long, and what it does."""
        began = time.perf_counter()
        adapter = closed_form(self.model, spec)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, **self.other(lambda base: AdapterEdit(self.model, adapter, unedited=base), spec)}

    def official(self, spec: SliderSpec, repaired: bool) -> dict[str, Any]:
        """The published loop."""
        settings = OfficialSettings(repaired=repaired, steps=self.size.official_steps)
        run = train_official(self.model, spec, settings)
        made = partial(AdapterEdit, self.model, run.adapter, 800)
        full = self.judged(Scaled(made(unedited=self.unedited), 1.0), spec, slice(0, self.size.official_seeds))
        return {
            "forwards": run.forwards, "train_s": run.seconds, "as_made": {k: full.mean(k) for k in MEANS},
            **self.other(lambda base: made(unedited=base), spec, self.size.official_seeds, SCALES),
        }  # fmt: skip

    def other(
        self, make: Callable[[Unedited], Edit], spec: SliderSpec, seeds: int | None = None,
        scales: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0), unit: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """An edit with a strength of its own meaning: its unit is found with the reader, then it is judged."""
        target = str(spec.attribute)
        if unit is None:
            try:
                unit = calibrate(
                    make(self.draft), reader_scorer(target, self.reader), calibration_split([target], 3, 1).prompts,
                    [7000, 7001], settings=CalibrationSettings(step=1.0, furthest=1.0, rounds=5),
                    sigma=known_sigma(self.model, target),
                ).factor  # fmt: skip
            except UserError as error:  # an edit that moves nothing has no unit: said, and judged as it is
                print(f"  {spec.name}: {error}", flush=True)
                unit = 1.0
        judged = self.judged(
            Scaled(make(self.unedited), unit), spec, slice(0, seeds or self.size.baseline_seeds), scales
        )
        said = as_json(judged)
        return {"unit": unit, "leak": mean_leak(judged), **{key: said[key] for key in MEANS if key in said}}

    def baselines(self, spec: SliderSpec) -> dict[str, Any]:
        """Every baseline on one concept."""
        words = words_of(spec)
        ours = self.slider(spec, 0)
        adapter, control = ours.adapters[0], random_like(ours.adapters[0])
        edits: dict[str, Callable[[Unedited], Edit]] = {
            "slider": lambda base: AdapterEdit(self.model, adapter, spec.used_from, unedited=base),
            "prompt weight": lambda base: PromptWeight(base, words),
            "composition": lambda base: Composition(base, words),
            "prompt-to-prompt": lambda base: PromptToPrompt(base, words),
            "embedding interpolation": lambda base: EmbeddingInterpolation(base, words),
            "guidance direction": lambda base: GuidanceDirection(base, words, spec.used_from),
            "random LoRA": lambda base: AdapterEdit(self.model, control, spec.used_from, unedited=base),
        }
        units = {"slider": 1.0}
        out = {
            name: self.part(f"baseline-{spec.name}-{name.replace(' ', '_')}",
                            partial(self.other, make, spec, unit=units.get(name)))
            for name, make in edits.items()
        }  # fmt: skip
        if spec in self.specs[: self.size.shuffled]:
            out["shuffled labels"] = self.part(f"baseline-{spec.name}-shuffled_labels", partial(self.control, spec))
        return out

    def control(self, spec: SliderSpec) -> dict[str, Any]:
        """A slider trained on shuffled labels."""
        adapter = self.shuffled(spec)
        return self.other(lambda base: AdapterEdit(self.model, adapter, spec.used_from, unedited=base), spec)

    def shuffled(self, spec: SliderSpec) -> Adapter:
        """A control: the same training with positive and negative changed about at half of the points."""
        predictor = Predictor(self.model, self.model.native_size, self.model.native_size)
        points = make_points(self.model, predictor, spec)
        with tempfile.TemporaryDirectory() as folder:
            return train_text(self.model, predictor, points, spec, Path(folder), shuffled=True).adapter


CHOOSING = ("a person, waving", "a portrait, with a raised hand")
JUDGED = (
    "a character, waving a hand", "a doctor, waving", "someone, with a raised hand, blue backdrop", "a face, waving",
)  # fmt: skip


class Scaled:
    """An edit whose strength 1 is another's `unit`."""

    def __init__(self, edit: Edit, unit: float) -> None:
        self.edit, self.unit = edit, unit

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float]) -> np.ndarray:
        """As `Edit.pictures`."""
        return self.edit.pictures(prompts, seeds, [strength * self.unit for strength in strengths])


def run(size: Size, folder: Path) -> dict[str, Any]:
    """All parts, and the table."""
    bench = Bench(size, folder)
    with quick_products(bench.model):
        return table(bench, size)


def table(bench: Bench, size: Size) -> dict[str, Any]:
    """What is printed."""
    trained = [bench.part(f"train-{seed}", partial(bench.train, seed)) for seed in range(size.training_seeds)]
    rows = [
        bench.part(f"judged-{spec.name}-{seed}", partial(bench.row, spec, seed))
        for seed in range(size.training_seeds)
        for spec in bench.specs
    ]
    found: dict[str, Any] = {"machine": machine(), "size": asdict(size), "threads": torch.get_num_threads()}
    found |= summary(rows, MEANS)
    found["fp32"] = {key: bench.part("fp32", lambda: bench.exact(bench.specs[0], 0))[key] for key in MEANS}
    found["train_s"] = float(np.median([row["seconds"] for seed in trained for row in seed]))
    first, nexts = [seed[0] for seed in trained], [row for seed in trained for row in seed[1:]]
    found["forwards_first"] = max(r["shared"] + r["training"] + r["calibration"] for r in first)
    found["forwards_next"] = max(r["training"] + r["calibration"] for r in nexts)
    mixed = bench.part("unmix", bench.unmix)
    for key, name in (("before", "selectivity_same_run"), ("after", "selectivity_unmixed")):
        found[name], found["intervals"][name] = over(list(mixed[key].values()), "selectivity")
    both = bench.part("composed", bench.composed)
    found["pairs_kept"], found["triples_kept"] = both["pairs"]["kept"], both["triples"]["kept"]
    hands = bench.part("hands", bench.hands)
    found["five_fingers_before"], found["five_fingers_after"] = hands["before"], hands["after"]
    found["hands"] = hands
    compared = bench.specs[: size.baselines]
    closed = [bench.part(f"closed-{spec.name}", partial(bench.closed, spec)) for spec in compared]
    found["closed_form_s"] = float(np.max([row["seconds"] for row in closed]))
    parts = [bench.baselines(spec) for spec in compared]
    leaks = {name: [part[name] for part in parts if name in part] for name in parts[0]} | {"closed form": closed}
    found["baselines"] = {name: over(rows, "leak")[0] for name, rows in leaks.items()}
    found["baselines_intervals"] = {name: over(rows, "leak")[1] for name, rows in leaks.items()}
    found["baselines_reached"] = {name: sum(row["leak"] is not None for row in rows) for name, rows in leaks.items()}
    found["slider_less_than"] = {name: less(leaks["slider"], rows) for name, rows in leaks.items() if name != "slider"}
    spec = next(spec for spec in bench.specs if spec.name == "smile")
    found["official"] = bench.part("official", lambda: bench.official(spec, False))
    found["official_repaired"] = bench.part("official-repaired", lambda: bench.official(spec, True))
    found["baselines"]["official loop"] = found["official"]["leak"]
    found["baselines"]["official loop, repaired"] = found["official_repaired"]["leak"]
    return found


if __name__ == "__main__":
    run_sized(__doc__, run, Size(), QUICK)
