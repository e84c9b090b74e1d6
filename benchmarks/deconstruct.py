"""Bias of known size: found, and taken away by constructive deconstruction (CD) and by plainer methods.

    python benchmarks/deconstruct.py --json             # the full size: hours on two cores
    python benchmarks/deconstruct.py --reduced --json   # what docs/benchmarks/deconstruct.md shows
    python benchmarks/deconstruct.py --quick --json     # a few minutes: does it run

Finished parts stay in --folder, and the same command goes on there; `--minutes N` stops (between parts) after so long
and prints what is there.

Plants: pockets in which an outfit goes with a value of an attribute in 60, 95 or 99 % of pictures, over 2 to 6 classes
(benchmarks/deconstruct_plants.py); "fair" has none. Remedies are guided by the reader. The judge reads what is
reported, on held-out prompts (gate list) that name the outfit and leave the attribute open, and on others; what it
reads is drawn with bf16 products where those are quick.

audit_found: share of the planted ties of 60 % and more that an audit names by itself (prompt, attribute and value).
false_alarms: share of audits with any alarm where no prompt differs (labels drawn from one pool for all prompts), at
tolerance 0; false_alarms_as_run: at the tolerance that an audit has unless told otherwise;
false_alarms_fair_model: alarms among the tests on the pocket that was trained without ties.
methods: by regime and method the means over ties and seeds. All that train take the same number of gradient steps.
verdict: per regime and method by how many standard errors CD's total variation (unreadable pictures counted as the
majority) is below (+) or above (-) the method's. tv_before .. minutes at the top are CD's with plenty of data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from deconstruct_plants import WORLDS, planted_model
from deconstruct_table import (
    ABLATIONS,
    FEW,
    MERGE,
    QUICK,
    REDUCED,
    REGIMES,
    SCAN,
    Size,
    result,
    table,
)

from dodgeburn.jobs import PartStore
from dodgeburn.models.model import Model
from dodgeburn.models.quick import quick_products
from dodgeburn.pocket.attributes import Planted
from dodgeburn.pocket.captions import NAMED, parse
from dodgeburn.pocket.reader import Reader
from dodgeburn.rework.bias.audit import AuditSettings, as_json, audit
from dodgeburn.rework.bias.before_after import DrawPictures, Measured, Meter, Plan, change, make_plan, real_features
from dodgeburn.rework.bias.classify import PocketClassifier
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.pocket_concept import pocket_concept, world_pictures
from dodgeburn.rework.bias.remedies import Job, RemedySettings, apply_remedy, drawing_of, world_sources
from dodgeburn.rework.deconstruct.run import deconstruct
from dodgeburn.rework.deconstruct.spec import make_spec
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.training.examples import Pictures
from dodgeburn.training.pocket import gate_prompts

WHICH = ("seeds", "ablations", "dpo")  # which cells are made, not what is in them


class Bench:
    """One run in one folder."""

    def __init__(self, size: Size, folder: Path, minutes: float | None) -> None:
        self.size = size
        parts = {key: value for key, value in asdict(size).items() if key not in WHICH}
        self.store = PartStore(folder, {"size": parts})
        self.reader, self.judge = Reader.load("reader"), Reader.load("judge")
        self.sampling = GenerateSettings(steps=size.sampling)
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return self.end is not None and time.monotonic() > self.end

    def part(self, name: str, make: Callable[[], Any]) -> Any | None:
        """A JSON part; made if it is not there and there is time, else None."""
        path = f"{name}.json"
        if not self.store.has(path):
            if self.over:
                return None
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            made = make()
            with self.store.writing(path) as temporary:
                temporary.write_text(json.dumps(made))
        return json.loads(self.store.path(path).read_text())

    # -------------------- audit

    def audited(self, world: str) -> dict[str, Any]:
        """One world's audit by the judge, and which of its ties were named."""
        s, model = self.size, planted_model(world, self.store)

        def drawn(prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> np.ndarray:
            return draw(model, prompts, seeds, self.sampling.model_copy(update={"guidance": guidance}))

        settings = AuditSettings(SCAN, n=s.audit_n, confirm=s.audit_confirm)
        began = time.process_time()
        found = audit(drawn, PocketClassifier(self.judge, "judge"), settings)
        ties = [
            {"tie": f"{t.outfit}: {t.attribute} = {t.value}", "planted": t.share, "classes": len(t.classes),
             "shown": next((r.share for r in found.rows if r.prompt == f"a {t.outfit}" and r.attribute == t.attribute
                            and r.value == t.value), None),
             "found": any((r.prompt, r.attribute, r.value) == (f"a {t.outfit}", t.attribute, t.value)
                          for r in found.alarms)}
            for t in WORLDS[world]
        ]  # fmt: skip
        known = {(f"a {t.outfit}", t.attribute) for t in WORLDS[world]}
        more = [f"{r.prompt}: {r.attribute} = {r.value} ({r.share:.2f} against {r.reference_share:.2f}, TV {r.tv:.3f})"
                for r in found.alarms if (r.prompt, r.attribute) not in known]  # fmt: skip
        pool = found.labels(4.0)
        return {
            "ties": ties, "other_alarms": more, "tests": len(found.rows), "pictures": found.pictures,
            "cpu_seconds": time.process_time() - began, "spreads": as_json(found)["quality_spread"][:6],
            "pool": {k: [str(x) for x in v] for k, v in pool.items()},
        }  # fmt: skip

    def chance(self, pool: dict[str, list[str]], tolerance: float) -> dict[str, Any]:
        """Audits of a world where no prompt differs: every picture's labels are drawn from one pool."""
        labels = {name: np.asarray(values) for name, values in pool.items()}
        size = len(next(iter(labels.values())))
        shown = PocketClassifier(self.judge, "judge")

        class Pooled:
            name, classes, named = "pool", shown.classes, staticmethod(shown.named)
            job: Mapping[str, Any] = {}

            def labels(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
                rows = pictures[:, 0, 0, 0].astype(int) * 65536 + pictures[:, 0, 0, 1].astype(int) * 256
                rows = rows + pictures[:, 0, 0, 2]
                return {name: values[rows] for name, values in labels.items()}

        def drawn(prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> np.ndarray:
            rows = np.array([np.random.default_rng(seed).integers(size) for seed in seeds])
            out = np.zeros((len(rows), 8, 8, 3), np.uint8)
            out[:, 0, 0] = np.stack([rows // 65536, rows // 256 % 256, rows % 256], axis=1)
            return out

        runs, tests = [], 0
        for seed in range(self.size.plenty_of_runs):
            settings = AuditSettings(
                SCAN, n=self.size.audit_n, confirm=self.size.audit_confirm, tolerance=tolerance, seed=seed
            )
            found = audit(drawn, Pooled(), settings)
            runs.append(len(found.alarms))
            tests += len(found.rows)
        return {"runs": len(runs), "with_alarm": sum(n > 0 for n in runs), "alarms": sum(runs), "tests": tests}

    # -------------------- remedies

    @cached_property
    def real(self) -> np.ndarray:
        """The judge's features of real drawings."""
        return real_features(self.judge, 64, 4 * self.size.others)

    def judged(self, concept: Concept, tie: Planted) -> Meter:
        """The judge's meter, on held-out prompts."""
        s = self.size
        asked = [(str(r["prompt"]), parse(str(r["prompt"]))) for r in gate_prompts()]
        neutral = [p for p, a in asked if a.get("outfit") == tie.outfit and tie.attribute not in a]
        others = [p for p, a in asked if a.get("outfit") != tie.outfit]
        classes = [concept.classes[i % len(concept.classes)] for i in range(s.explicit)]
        explicit = tuple((concept.explicit(neutral[i % len(neutral)], c, i), c) for i, c in enumerate(classes))
        plan = Plan(
            tuple(neutral[i % len(neutral)] for i in range(s.n)), tuple(51_000_000 + i for i in range(s.n)),
            tuple(others[i % len(others)] for i in range(s.others)), tuple(52_000_000 + i for i in range(s.others)),
            explicit, tuple(53_000_000 + i for i in range(len(explicit))),
        )  # fmt: skip
        return Meter(concept, plan, PocketClassifier(self.judge, "judge"), self.judge, self.real)

    def concept(self, tie: Planted) -> Concept:
        """What a tie asks to be fixed."""
        noun, worn = NAMED["outfit"][tie.outfit]
        return pocket_concept([f"a {noun}", f"a person, {worn}"], tie.attribute, tie.classes)

    def before(self, world: str, at: int) -> dict[str, Any]:
        """The judge's figures of the untouched model."""
        tie = WORLDS[world][at]
        model = planted_model(world, self.store)
        found = self.judged(self.concept(tie), tie).measure(lambda p, s: draw(model, p, s, self.sampling, quick=True))
        return found.as_row()

    def cell(self, world: str, at: int, regime: str, method: str, seed: int, before: dict[str, Any]) -> dict[str, Any]:
        """One method on one tie in one regime, judged."""
        tie, s = WORLDS[world][at], self.size
        model = planted_model(world, self.store)
        concept = self.concept(tie)
        reading = PocketClassifier(self.reader)
        guide = Meter(concept, make_plan(concept, s.look, 0, 0), reading, self.reader)
        rate = None if method in ("taught", "self") else s.lr  # theirs is their own, as CD's is
        settings = RemedySettings(steps=s.steps, batch=s.batch, lr=rate, pictures=s.pictures, kept=s.pictures // 2,
                                  look=s.look, every=s.every, adapt=s.adapt, seed=seed)  # fmt: skip
        folder = Path(self.store.folder) / "working" / f"{world}-{at}-{regime}-{method}-{seed}"
        job = Job(model, concept, reading, guide, self.sampling, folder, settings)
        job.fair, job.tied = world_sources(concept, model.native_size, before["bias"]["shares"])
        if regime == FEW:
            job.fair = self.few(concept, tie, model.native_size, seed)
        began, wall = time.process_time(), time.perf_counter()
        drawing: DrawPictures = job.draw
        if method.startswith("cd"):
            notes = self.deconstructed(model, concept, tie, regime, method, seed, folder)
        else:
            done = apply_remedy(method, job)
            notes, drawing = {"steps": done.steps, "notes": done.notes}, drawing_of(done, job)
        cost, waited = time.process_time() - began, time.perf_counter() - wall
        after = self.judged(concept, tie).measure(quickly(model, drawing))
        moved = change(Measured.from_row(before), after)
        return {
            **moved.as_json(), "cpu_minutes": cost / 60, "minutes": waited / 60,
            **notes, "shares": list(after.bias.shares), "spread_before": before["spreads"],
            "spread_after": after.spreads,
        }  # fmt: skip

    def few(self, concept: Concept, tie: Planted, size: int, seed: int) -> Callable[[int, int], Pictures]:
        """`few` counter-examples, spread over the minority classes, and as many majority ones as of one of these."""
        rest = [c for c in concept.classes if c != tie.value]
        listed = [rest[i % len(rest)] for i in range(self.size.few)]
        listed += [tie.value] * max(1, self.size.few // len(rest))
        made = world_pictures(concept, listed, size, 900 + seed)
        return lambda _n, _seed: made

    def deconstructed(
        self, model: Model, concept: Concept, tie: Planted, regime: str, method: str, seed: int, folder: Path
    ) -> dict[str, Any]:
        """CD within the same number of gradient steps; merge only: without retraining."""
        s = self.size
        rest = len(concept.classes) - 1
        each = max(4, s.pictures // len(concept.classes))
        data: dict[str, Any] = {"each": each, "others": s.pictures, "held_out": max(16, s.pictures // 3), "seed": seed}
        if regime == FEW:
            data["minority"] = max(1, s.few // rest)
        total = s.steps
        early, late = max(1, total // 12), max(1, total // 20)  # overtrain, nightshade twice; polish
        stages = ["overtrain", "nightshade", "bucket", "retrain"]
        if regime == MERGE:
            stages, early = stages[:3], max(1, total // 3)
        if method.startswith("cd-no-"):
            stages.remove(method.removeprefix("cd-no-"))
        values = [tie.value, *(c for c in concept.classes if c != tie.value)]
        bucket: dict[str, Any] = {"neutral": s.look, "each": max(4, s.look // 4), "evaluations": s.evaluations}
        if method == "cd-lerp":
            bucket["method"] = "lerp"
            bucket["scales"] = (0.1, 0.25, 0.5, 0.75)
        taught = {"taught": 0.0, "lr": s.lr} if method == "cd-pictures" else {}
        used = early * (3 if {"overtrain", "nightshade"} <= set(stages) else 1)
        again = max(1, total - used - late)
        spec = make_spec({
            "name": method, "model": model.name, "stages": stages,
            "concept": {"prompts": concept.prompts, "attribute": concept.attribute,
                     "values": {v: concept.phrases[v][0] for v in values}},
            "data": data,
            "watching": {"pairs": 64, "neutral": s.guided, "quick": 16, "each": 16, "steps": s.sampling, "seed": seed},
            "overtrain": {"steps": early, "batch": s.batch, "pictures": each, "every": max(1, early // 3),
                          "seed": seed},
            "nightshade": {"steps": early, "batch": s.batch, "pictures": each, "every": max(1, early // 2),
                           "success": None, "seed": seed},
            "bucket": bucket,
            "retrain": {"steps": again, "batch": s.batch, "every": s.every, "plateau": 99,
                        **taught, "adapt": s.adapt, "polish_steps": late, "polish_every": late, "seed": seed},
        })  # fmt: skip
        found = deconstruct(model, spec, folder, bias_needed=False)
        return {"steps": found.steps, "samples": found.samples,
                "notes": {st.stage: st.as_json().get("decision") for st in found.stages}}  # fmt: skip


def quickly(model: Model, drawing: DrawPictures) -> DrawPictures:
    """As `draw(..., quick=True)`."""

    def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        with quick_products(model):
            return drawing(prompts, seeds)

    return drawn


def run(bench: Bench, cells: Sequence[str] | None) -> dict[str, Any]:
    """Everything that there is time for, the most wanted first; with `cells`, besides these only what is there."""
    s = bench.size

    def part(wanted: str, name: str, make: Callable[[], Any]) -> Any | None:
        there = bench.store.has(f"{name}.json")
        return bench.part(name, make) if there or cells is None or wanted in cells else None

    audits = {w: part("audit", f"audit-{w}", partial(bench.audited, w)) for w in s.worlds}
    pool = next((a["pool"] for a in audits.values() if a), None)
    chance = {
        name: part("audit", f"chance-{name}", partial(bench.chance, pool, tolerance))
        for name, tolerance in (("equal", 0.0), ("as-run", AuditSettings.tolerance)) if pool is not None
    }  # fmt: skip
    first = "audit" if cells is None else next((name for name in cells if "/" in name), "")
    befores = {(w, at): part(first, f"before-{w}-{at}", partial(bench.before, w, at)) for w, at in s.treated}
    made: dict[str, dict[str, list[dict[str, Any]]]] = {regime: {} for regime in REGIMES}
    jobs = [
        (seed, regime, method)
        for seed in range(s.seeds)
        for regime, names in REGIMES.items()
        for method in names
        if f"{regime}/{method}" in (cells or ())
        or not (method in ABLATIONS and not s.ablations or method == "dpo" and not s.dpo)
    ]
    for seed, regime, method in jobs:
        for (w, at), before in befores.items():
            if before is None:
                continue
            found = part(f"{regime}/{method}", f"cell-{w}-{at}-{regime}-{method}-{seed}",
                         partial(bench.cell, w, at, regime, method, seed, before))  # fmt: skip
            if found is not None:
                made[regime].setdefault(method, []).append(found)
    return result(s, audits, chance, made, [b for b in befores.values() if b])


def ties(said: Sequence[str] | None, parser: argparse.ArgumentParser) -> tuple[tuple[str, int], ...]:
    """Ties by world and number."""
    found = []
    for one in said or ():
        world, _, number = one.partition(":")
        if not number.isdigit() or int(number) >= len(WORLDS.get(world, ())):
            parser.error(f"no tie {one!r}: expected WORLD:NUMBER, worlds are {', '.join(WORLDS)} with three ties each")
        found.append((world, int(number)))
    return tuple(found)


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: does it run")
    parser.add_argument("--reduced", action="store_true", help="one tie, one seed, few pictures: what the docs show")
    parser.add_argument("--folder", type=Path, help="where parts lie (the same command goes on there)")
    parser.add_argument("--seeds", type=int, help="training seeds of every method")
    parser.add_argument("--ties", nargs="*", metavar="WORLD:NUMBER", help="only these, as in 95:1 99:2 (worlds above)")
    parser.add_argument("--sampling", type=int, help="denoising steps of every picture")
    parser.add_argument("--judged", type=int, help="held-out pictures of a tie that the judge reads")
    parser.add_argument("--minutes", type=float, help="stop between parts after so long")
    parser.add_argument("--cells", nargs="*", help="only these, as in audit plenty/cd merge_only/uce")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    name, size = ("quick", QUICK) if options.quick else ("reduced", REDUCED) if options.reduced else ("full", Size())
    size = replace(size, seeds=options.seeds or size.seeds, treated=ties(options.ties, parser) or size.treated,
                   sampling=options.sampling or size.sampling, n=options.judged or size.n)  # fmt: skip
    folder = options.folder or Path(f"deconstruct-{name}")
    found = run(Bench(size, folder, options.minutes), options.cells)
    print(table(found))
    print(f"audit found {found['audit_found']}, false alarms {found['false_alarms']}. {found['verdict_line']}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
