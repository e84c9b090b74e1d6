"""Artifacts foreseen at early denoising steps: how well, against what, and what stopping early saves.

    python benchmarks/foresee.py --json                # collects its own trajectories first (hours on two cores)
    python benchmarks/foresee.py --train DIR --test DIR --new DIR --json      # of folders of `artifacts collect`
    python benchmarks/foresee.py --estimator FILE --rules DIR --test DIR --new DIR --only trained graded --json
    python benchmarks/foresee.py --quick --json        # small: everything runs, the figures mean little

Training trajectories have development prompts and labels by the reader; test trajectories held-out prompts, other seeds
and labels by the judge; --new holds a generator that training never saw. Rules and funnels are chosen on prompts of the
training list that nothing was fitted to; so is what the network sees (`ablation`). Intervals are over prompts. Finished
parts stay in --folder. --estimator takes a trained network; --rules: trajectories of further development prompts, on
which alone rules and opinions are chosen then.

srcc_*: rank correlation within a prompt and its settings at 25 and 50 % of the steps. ceiling_*: what carrying one
state on several times with fresh noise (euler_a) leaves for anybody to foresee. margin_25: AUROC above the best of
three trained baselines. saved_best_of_4: evaluations saved against as many complete pictures as are equally good.
ahead: the same figures with looks ahead (foresee/ahead.py), and what they cost by then.
original: the first attempt's recipe, with its 50 optimiser steps and with 1 500.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foresee_overhead import overhead

from dodgeburn.foresee import original, scores
from dodgeburn.foresee.ahead import CALLS, pocket_critic
from dodgeburn.foresee.branching import branches, ceiling
from dodgeburn.foresee.collect import CollectSettings, collect, oracle
from dodgeburn.foresee.drawn import draw
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.evaluate import (
    Judgements,
    against_baselines,
    column,
    curves,
    figures,
    judge,
    prices,
    rounded,
)
from dodgeburn.foresee.limits import limits
from dodgeburn.foresee.network import NetworkSettings
from dodgeburn.foresee.rules import RULES_ONLY, choose_rules, saved
from dodgeburn.foresee.shards import Store, Trajectory
from dodgeburn.foresee.train import FitSettings, fit, parts_of, usable
from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.foresee.wise import wise
from dodgeburn.foresee.zoo import pocket_zoo
from dodgeburn.jobs import PartStore
from dodgeburn.measure.machine import machine
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.training.pocket import development_prompts, gate_prompts

FIRST_BRANCHING_SEED = 3_000_000
ALL = ("x0", "change", "maps", "scalars")
ABLATION: dict[str, NetworkSettings] = {
    "x_t": NetworkSettings(("x_t",)),
    "x0": NetworkSettings(("x0",)),
    "maps": NetworkSettings(("maps",)),
    "features": NetworkSettings(("features",), 16, dropout=0.5),
    "scalars": NetworkSettings(("scalars",)),
    "text": NetworkSettings(("text",)),
    "x0 + change + scalars": NetworkSettings(("x0", "change", "scalars")),
    "features + scalars": NetworkSettings(("features", "scalars"), 16, dropout=0.5),
    "x0 + change + maps + scalars": NetworkSettings(ALL),
    "the same + features + text": NetworkSettings((*ALL, "features", "text")),
    "the same, 3 experts": NetworkSettings(ALL, experts=3),
    "the same, memory": NetworkSettings(ALL, memory=True),
    "the same, histogram": NetworkSettings(ALL, head="histogram"),
    "features + scalars, 3 experts": NetworkSettings(("features", "scalars"), 16, experts=3, dropout=0.5),
    "features + scalars, memory": NetworkSettings(("features", "scalars"), 16, memory=True, dropout=0.5),
    "features + scalars, histogram": NetworkSettings(("features", "scalars"), 16, head="histogram", dropout=0.5),
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    train: int = 64  # shards of 32 trajectories
    test: int = 14
    new: int = 6
    drawings: int = 6000
    steps: int = 1500  # optimiser steps
    ablation_steps: int = 1500
    ablation: tuple[str, ...] = tuple(ABLATION)
    states: tuple[int, int] = (8, 6)  # branching: prompts x seeds
    copies: int = 3
    limits: int = 256  # pictures that the oracles read on their way
    resamples: int = 300
    prompts: int = 8  # of a training batch, eight pictures each
    drawn: int = 64  # drawings of a batch
    pretrain: int = 400  # steps of WiSE-FT's encoder without labels


QUICK = Size(6, 2, 1, 256, 1500, 1500, ("scalars", "maps"), (3, 4), 2, 32, 50, 2, 16, 100)


class Bench:
    """One run in one folder."""

    def __init__(self, size: Size, folder: Path, train: list[Path], test: list[Path], new: list[Path],
                 only: Sequence[str] = (), rules: Sequence[Path] = (),
                 estimator: Path | None = None) -> None:  # fmt: skip
        self.size, self.only = size, only
        self.model: Model = load_model("pocket", device="cpu", dtype="fp32")
        given = [[str(p) for p in paths] for paths in (train, test, new, rules)]
        self.estimator = estimator
        named = {"estimator": None if estimator is None else sha256(estimator.read_bytes()).hexdigest()}
        self.parts = PartStore(folder, {"size": asdict(size), "model": self.model.sha256, "stores": given, **named})
        self.train = Store(*(train or rules or [self._collect("train", size.train, "reader", 0)]))
        self.rules = Store(*rules) if rules else self.train
        self.test = Store(*(test or [self._collect("test", size.test, "judge", 1)]))
        self.new = Store(*(new or [self._collect("new", size.new, "judge", 2)]))
        self.settings = FitSettings(steps=size.steps, prompts=size.prompts, drawn=size.drawn)
        self.place = parts_of(self.train, self.settings)

    def _collect(self, name: str, shards: int, reader: str, seed: int) -> Path:
        zoo = pocket_zoo(self.model)
        rows = development_prompts(128) if name == "train" else gate_prompts()
        sound = tuple(m.name for m in zoo.members if m.name != zoo.held_out)
        prompts = tuple(dict.fromkeys(row["prompt"] for row in rows))
        settings = CollectSettings(
            prompts, (str(zoo.held_out),) if name == "new" else sound, shards,
            split="train" if name == "train" else "test", seed=seed, ahead=CALLS,
        )  # fmt: skip
        collect(zoo, settings, self.parts.folder / name, oracle(reader), reader, critic=pocket_critic())
        return self.parts.folder / name

    def choice(self, record: Trajectory) -> bool:
        """Whether a trajectory is of a training list's prompt that nothing was fitted to."""
        return usable(record, self.settings) and self.place.get(record.prompt_id) == "choice"

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON part, made if it is not there."""
        path = f"{name}.json"
        if not self.parts.has(path) and self.only and not {name, name.split("-")[0]} & set(self.only):
            return None
        if not self.parts.has(path):
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            made = rounded(make())
            with self.parts.writing(path) as temporary:
                temporary.write_text(json.dumps(made))
        return json.loads(self.parts.path(path).read_text())

    # -------------------- the estimator

    def trained(self) -> dict[str, Any]:
        """Train the estimator (or take the one given), choose its rules, write it."""
        rules_settings = self.settings if self.rules is self.train else RULES_ONLY
        if self.estimator is not None:
            estimator = Estimator.load(self.estimator)
            rules = choose_rules(estimator, self.rules, RULES_ONLY)
            estimator.save(self.parts.path("foresee.safetensors"))
            return {"train_s": estimator.record.get("train_s"), "drawing_s": None, "record": estimator.record,
                    "rules": rules}  # fmt: skip
        began = time.process_time()
        drawings = draw(self.model, self.size.drawings)
        drawing = time.process_time() - began
        estimator = fit(self.train, self.parts.folder / "fit", self.settings, drawings=drawings)
        seconds = time.process_time() - began - drawing
        estimator.record |= {"model": self.model.name, "model_sha256": self.model.sha256}
        rules = choose_rules(estimator, self.rules, rules_settings)
        estimator.save(self.parts.path("foresee.safetensors"))
        return {"train_s": seconds, "drawing_s": drawing, "record": estimator.record, "rules": rules}

    def graded(self) -> dict[str, Any]:
        """All figures on held-out prompts."""
        estimator = Estimator.load(self.parts.path("foresee.safetensors"))
        found = judge(estimator, self.test, lambda r: True, ())
        fresh = judge(estimator, self.new, lambda r: True, ())
        g = column(0.5)

        def auroc_new(of: Judgements) -> Any:
            return scores.over_prompts(
                lambda rows: scores.auroc(of.bad[rows, g], of.is_bad[rows]), of.prompt, self.size.resamples
            )

        ahead: dict[str, Any] | None = None
        if estimator.ahead is not None:
            looking, new_looking = (f.reading(estimator.ahead, estimator.ahead.plans[-1]) for f in (found, fresh))
            ahead = {**figures(looking, self.size.resamples), "price": prices(looking), "curves": curves(looking),
                     "auroc_new_generator_50": auroc_new(new_looking), "price_new": prices(new_looking)}  # fmt: skip
        return {
            "ahead": ahead,
            "pictures": len(found.records), "prompts": len(set(found.prompt.tolist())),
            "bad_share": float(found.is_bad.mean()), "new_bad_share": float(fresh.is_bad.mean()),
            "figures": figures(found, self.size.resamples), "curves": curves(found),
            "ece_floor": {
                str(percent): scores.calibration_floor(found.bad[:, column(percent / 100)]) for percent in (25, 50)
            },
            "saved": saved(estimator, found, self.size.resamples),
            "auroc_new_generator_50": auroc_new(fresh),
            "by_generator": {
                name: {"pictures": int((names == name).sum()), "bad": float(found.is_bad[names == name].mean()),
                       "auroc_50": scores.auroc(found.bad[names == name, g], found.is_bad[names == name])}
                for names in [np.array([r.generator for r in found.records])] for name in sorted(set(names.tolist()))
            },
            **against_baselines(self.train, self.test, found, self.settings, self.size.resamples),
        }  # fmt: skip

    def ablated(self, name: str) -> dict[str, Any]:
        """One choice of inputs or architecture, on the prompts of the training list that nothing was fitted to: what is
        built is chosen there, so the test prompts stay unseen."""
        settings = replace(self.settings, network=ABLATION[name], steps=self.size.ablation_steps)
        slug = "".join(c if c.isalnum() else "-" for c in name)
        began = time.process_time()
        estimator = fit(self.train, self.parts.folder / f"fit-{slug}", settings)
        seconds = time.process_time() - began
        found = judge(estimator, self.train, self.choice)
        said = figures(found, self.size.resamples)
        return {"weights": estimator.network.weights, "train_s": seconds, "pictures": len(found.records),
                "prompts": len(set(found.prompt.tolist())),
                **{name: said[name] for name in ("srcc_25", "srcc_50", "auroc_25", "auroc_50")}}  # fmt: skip

    def wise(self) -> dict[str, Any]:
        """WiSE-FT, alpha chosen on one of the training generators, checked on the one that is new to all."""
        settings = replace(self.settings, steps=self.size.ablation_steps)
        there = Counter(r.generator for r in self.train.records if usable(r, settings))
        held_out = "strong-guidance" if "strong-guidance" in there else there.most_common(1)[0][0]
        made = wise(self.train, self.parts.folder / "wise", settings, held_out, self.size.pretrain)
        fresh = judge(made.estimator, self.new, lambda r: True)
        g = column(0.5)
        return {"alpha": made.alpha, "held_out": held_out, "auroc_held_out": made.auroc,
                "auroc_new_generator_50": scores.auroc(fresh.bad[:, g], fresh.is_bad)}  # fmt: skip

    # -------------------- the first attempt

    def original(self) -> dict[str, Any]:
        """Its recipe on the same pictures: 50 optimiser steps, 1 500 of the whole set, 1 500 in batches of 256."""
        data = original.finished(self.train, lambda r: True)
        test = original.finished(self.test, lambda r: True)
        groups = np.array([f"{p}" for p in test.prompts])
        half = half_way(self.test)
        out: dict[str, Any] = {}
        for name, chosen in (
            ("50 steps", original.OriginalSettings(50, width=256)),
            ("1500 steps", original.OriginalSettings(1500, 256, balanced=False, width=256)),
            ("1500 steps, tiny VAE", original.OriginalSettings(1500, 256, balanced=False, width=256, tiny=True)),
        ):
            folder = self.parts.folder / ("original-tiny" if chosen.tiny else "original")
            made = original.train_original(data, folder, chosen)
            noisy = original.noised(test.latents, original.LOG_SNR, torch.Generator().manual_seed(1))
            for where, x_t in (("forward_noised", noisy), ("trajectory", half)):
                score, true = made.score(x_t), test.severity.numpy()
                out.setdefault(name, {})[where] = {
                    "mean": float(score.mean()), "sd": float(score.std()), "sd_labels": float(true.std()),
                    "sd_ratio": scores.spread_ratio(score, true), "srcc": scores.spearman(score, true),
                    "srcc_within": scores.within_prompt_spearman(score, true, groups),
                    "mse": float(np.mean((score - true) ** 2)), "mse_constant": float(true.var()),
                }  # fmt: skip
        return out

    # -------------------- ceilings and cost

    def limits(self) -> dict[str, Any]:
        """What exact reading would reach, on some of the prompts that nothing was fitted to."""
        return limits(self.model, self.train, self.choice, self.size.limits)

    def ceiling(self, share: float) -> dict[str, Any]:
        """Branches of the same states."""
        prompts, seeds = self.size.states
        words = list(dict.fromkeys(row["prompt"] for row in gate_prompts()))[:prompts]
        settings = GenerateSettings(steps=12, sampler="euler_a")
        every = [word for word in words for _ in range(seeds)]
        numbers = [FIRST_BRANCHING_SEED + i for i in range(len(every))]
        pictures = branches(self.model, every, numbers, settings, share, self.size.copies)
        flat = pictures.reshape(-1, *pictures.shape[2:])
        reader = Reader.load("judge")
        found = find_artifacts(flat, [word for word in every for _ in range(self.size.copies)], reader)
        severity = np.array([f.severity for f in found]).reshape(len(every), -1)
        return asdict(ceiling(severity, every, share))

    def overhead(self) -> dict[str, float]:
        """What looking costs."""
        return overhead(self.model, Estimator.load(self.parts.path("foresee.safetensors")))


def half_way(store: Store) -> torch.Tensor:
    """x_t of each labelled trajectory at half its way, [n, c, h, w], in the order of `original.finished`."""
    rows = []
    for shard in store.shards(("x_t", "progress")):
        for i, record in enumerate(shard.records):
            where = shard.rows(i)
            if record.label is not None and where.stop > where.start:
                at = int((shard.tensors["progress"][where] - 0.5).abs().argmin())
                rows.append(shard.tensors["x_t"][where.start + at].float())
    return torch.stack(rows)


def run(bench: Bench) -> dict[str, Any]:
    """Everything, with the names of the JSON."""
    trained = bench.part("trained", bench.trained)
    graded = bench.part("graded", bench.graded)
    cost = bench.part("overhead", bench.overhead)
    ceilings = {p: bench.part(f"ceiling-{p}", partial(bench.ceiling, p / 100)) for p in (25, 50)}
    exact = bench.part("limits", bench.limits)
    first = bench.part("original", bench.original)
    ablation = {name: bench.part(f"ablation-{i}", partial(bench.ablated, name))
                for i, name in enumerate(bench.size.ablation)}  # fmt: skip
    between = bench.part("wise", bench.wise)
    if trained is None or graded is None:
        return {"ceiling_25": ceilings[25], "ceiling_50": ceilings[50], "limits": exact, "original": first,
                "ablation": ablation, "wise": between}  # fmt: skip
    f, s = graded["figures"], graded["saved"]
    return {
        "machine": machine(), "pictures": graded["pictures"], "prompts": graded["prompts"],
        "bad_share": graded["bad_share"],
        "srcc_25": f["srcc_25"], "srcc_50": f["srcc_50"],
        "ceiling_25": ceilings[25], "ceiling_50": ceilings[50],
        "auroc_25": f["auroc_25"], "auroc_50": f["auroc_50"], "margin_25": graded["margin_25"],
        "ece": {"25": f["ece_25"], "50": f["ece_50"]}, "ece_floor": graded["ece_floor"],
        "sd_ratio_50": f["sd_ratio_50"],
        "saved_best_of_4": s.get("saved_best_of_4"), "saved_best_of_8_at_90": s.get("saved_best_of_8_at_90"),
        "gain_of_8": s.get("gain_of_8"), "good_rejected": s["good_rejected"],
        "auroc_new_generator_50": graded["auroc_new_generator_50"], "ahead": graded["ahead"],
        "train_s": trained["train_s"], "drawing_s": trained["drawing_s"],
        "overhead": cost and cost["overhead"], "overhead_per_look": cost and cost["per_look"],
        "overhead_per_look_half": cost and cost["per_look_half"],
        "baselines": graded["baselines"], "margins": graded["margins"],
        "limits": exact, "original": first, "rule": s["rule"], "rules": trained["rules"], "savings": s,
        "ablation": ablation, "wise": between, "by_generator": graded["by_generator"], "curves": graded["curves"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "new"):
        parser.add_argument(f"--{name}", type=Path, action="append", default=[], help=f"{name} folder(s)")
    parser.add_argument("--rules", type=Path, action="append", default=[], help="folder(s) to choose rules on")
    parser.add_argument("--estimator", type=Path, help="a trained estimator, whose rules are chosen anew")
    parser.add_argument("--only", nargs="*", default=[], help="parts to make now: trained graded overhead ceiling "
                        "limits original ablation (or ablation-10 ...) wise; the others are taken from --folder, or "
                        "left out")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("foresee-benchmark"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    bench = Bench(size, options.folder, options.train, options.test, options.new, options.only, options.rules,
                  options.estimator)  # fmt: skip
    found = run(bench)
    for key in ("srcc_25", "srcc_50", "auroc_25", "auroc_50", "margin_25", "sd_ratio_50", "good_rejected",
                "saved_best_of_4", "auroc_new_generator_50"):  # fmt: skip
        print(f"{key:<24} {found.get(key)}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
