"""Preference alignment on the pocket: what it reaches, what it costs, whether it moves to another model.

    python benchmarks/dpo.py --json             # 5 training seeds, 7 losses, 128 held-out pictures a model
    python benchmarks/dpo.py --quick --json     # a few minutes: small, for seeing that it runs

Pairs are chosen by the reader (looks: by pixels) on prompts of their own; the judge reads what is reported, on held-out
prompts and seeds (gate list), some of them with ", waving" added, so that there are hands to count. Base and tuned
models draw the same prompts and seeds in bf16. Finished parts stay in --folder, and the same command goes on there.
Intervals are 95 %, over prompts and training seeds (bootstrap).

win_*: share of pictures that the same program rates above the base's (ties half); 0.5 is no effect. fidelity_gain:
mean prompt fidelity, tuned less base. five_fingers_*: share of the pictures of prompts with a waving hand in which the
judge counts five. drift: Frechet distance in the judge's features to the base's pictures (`floor`: of the base's
pictures with other seeds), and diversity (mean pixel deviation over the pictures) as a ratio to the base's. losses: one
training seed, at equal steps (fewer than what ships has), and with the LoRA scaled so that drift is sigmoid's.
transfer_kept: (win - 1/2) on pocket-style with the delta extracted from the tuned checkpoint, over (win - 1/2) on
pocket. pareto: merges of pocket-style and the tuned checkpoint, (fidelity, resemblance to pocket-style) against both
parents' mean; the reader chooses on development prompts, the judge grades on held-out ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import run_sized

from dodgeburn.jobs import PartStore
from dodgeburn.measure.fidelity import fidelity
from dodgeburn.measure.frechet import frechet_distance
from dodgeburn.measure.intervals import bootstrap_mean
from dodgeburn.measure.machine import machine
from dodgeburn.merge.bake import bake
from dodgeburn.merge.compare import CompareSettings, Comparison, compare
from dodgeburn.merge.delta import extract
from dodgeburn.merge.ranking import Row
from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.model import weights_path
from dodgeburn.pocket.reader import Reader
from dodgeburn.rework.dpo.file import save_aligned
from dodgeburn.rework.dpo.losses import LOSSES
from dodgeburn.rework.dpo.make_pairs import draw_all
from dodgeburn.rework.dpo.pocket_dpo import PROMPTS, SETTINGS, STEPS, aligned, draw_settings, pairs_by
from dodgeburn.rework.dpo.ratings import faithfulness, looks, wins
from dodgeburn.sampling.adapted import Applied
from dodgeburn.sampling.loop import GenerateSettings, Tuned, generate
from dodgeburn.training.pocket import development_prompts, gate_prompts

SETTINGS_OF_PICTURES = GenerateSettings(steps=STEPS)
TIE = 0.01  # faithfulness that differs by less is a tie: confidences differ in their last digits
OTHER_SEEDS = 4_000_000  # of the base's second set of pictures, which gives drift its floor
MEMORY = Path(__file__).with_name("dpo_memory.py")


@dataclass(frozen=True)
class Size:
    """How much is made."""

    prompts: int = PROMPTS  # for pairs
    training_seeds: int = 5
    pictures: int = 80  # held-out prompts a model
    hands: int = 48  # further ones that name a waving hand
    loss_pictures: int = 64  # of them, for every loss
    losses: int = 7
    loss_steps: int = 200  # of training, each loss
    steps: int = 0  # of training; 0: as pocket-dpo's
    strengths: int = 4  # output-space strengths tried
    pareto_prompts: int = 12  # development prompts that a merge is chosen on
    pareto_graded: int = 64  # held-out prompts that it is graded on
    pareto_seeds: int = 2
    memory: int = 1  # 0: leave the memory of one step at SD1.5's size out


COUNTS = ("training_seeds", "losses", "strengths", "memory")  # how many parts are made, not what is in them
QUICK = Size(12, 1, 6, 2, 6, 2, 3, 3, 1, 2, 4, 1, 0)


@dataclass(frozen=True)
class Made:
    """A model's pictures as they are judged: figures by picture."""

    looks: np.ndarray
    faithful: np.ndarray
    fidelity: np.ndarray
    five: np.ndarray  # 1 or 0; NaN where the prompt names no hand
    features: np.ndarray
    diversity: float
    unreadable: float


class Bench:
    """One run in one folder."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size = size
        self.model = load_model("pocket", device="cpu", dtype="fp32")
        self.draws = load_model("pocket", device="cpu", dtype="bf16")
        settings = {name: one.model_dump() for name, one in SETTINGS.items()}
        parts = {key: value for key, value in asdict(size).items() if key not in COUNTS}
        told = {"size": parts, "model": self.model.sha256, "settings": settings}
        self.store = PartStore(folder, {**told, "pictures": SETTINGS_OF_PICTURES.model_dump(mode="json")})
        self.judge = Reader.load("judge")
        rows = gate_prompts()
        plain = [row for row in rows[: size.pictures]]
        open_hands = [row for row in rows[size.pictures :] if "hand" not in parse(row["prompt"])][: size.hands]
        waving = [{"prompt": row["prompt"] + ", waving", "seed": row["seed"]} for row in open_hands]
        # Hands spread among the rest, so that the first rows hold their share of them.
        order = np.argsort([*np.linspace(0, 1, len(plain)), *np.linspace(0, 1, len(waving))], kind="stable")
        self.rows = [[*plain, *waving][int(i)] for i in order]

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON part, made if it is not there."""
        path = f"{name}.json"
        if not self.store.has(path):
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            made = make()
            with self.store.writing(path) as temporary:
                temporary.write_text(json.dumps(made))
        return json.loads(self.store.path(path).read_text())

    # -------------------- training

    def pairs(self, preference: str) -> Any:
        drawn = draw_all(self.model, draw_settings(self.size.prompts), self.store.path("drawn"))
        return pairs_by(drawn, preference, self.store.path(f"pairs-{preference}"))

    def file(self, name: str) -> Path:
        """A trained LoRA."""
        return self.store.path(f"{name}.safetensors")

    def train(self, preference: str, name: str, **changes: Any) -> dict[str, Any]:
        """Train a LoRA; what its log says at the end."""
        pairs = self.pairs(preference)
        found = aligned(self.model, pairs, self.store.path(f"training-{name}"), preference, **changes)
        save_aligned(self.model, pairs, found, self.file(name))
        return {"pairs": len(pairs), "seconds": found.seconds, "alarms": found.alarms, "last": found.last}

    def train_seed(self, preference: str, seed: int) -> dict[str, Any]:
        """As it ships, but for the seed."""
        steps = {"steps": self.size.steps} if self.size.steps else {}
        return self.train(preference, f"{preference}-{seed}", seed=seed, **steps)

    def train_loss(self, loss: str) -> dict[str, Any]:
        """Faithfulness by another loss, for fewer steps."""
        changes: dict[str, Any] = {"loss": loss, "steps": self.size.loss_steps}
        if loss in ("mapo", "sft"):
            changes |= {"beta": None}
        if not LOSSES[loss].loser:
            changes |= {"safeguard": False, "slack": 0.0}
        return self.train("faithful", f"loss-{loss}", **changes)

    # -------------------- judging

    def made(
        self, model: Model, n: int | None = None, lora: Path | None = None, scale: float = 1.0,
        blocks: dict[str, float] | None = None, tuned: Tuned | None = None, seeds: int | None = None,
    ) -> Made:  # fmt: skip
        """Draw the first n rows and judge them."""
        rows = self.rows[:n]
        prompts = [row["prompt"] for row in rows]
        chosen = [row["seed"] if seeds is None else seeds + i for i, row in enumerate(rows)]
        applied = [] if lora is None else [Applied(load_adapter(lora, model), scale, blocks=blocks or {})]
        found = generate(model, prompts, chosen, SETTINGS_OF_PICTURES, adapters=applied, tuned=tuned)
        pixels = np.stack([np.asarray(one.image) for one in found])
        seen, asked = self.judge.read(pixels), [parse(prompt) for prompt in prompts]
        waves = np.array([wish.get("hand") == "waving" for wish in asked])
        five = (np.asarray(seen.values["fingers"]) == 5) & ~seen.unreadable
        return Made(
            looks(pixels), faithfulness(asked, seen), fidelity(asked, seen), np.where(waves, five, np.nan),
            self.judge.features(pixels), float(pixels.astype(np.float64).std(axis=0).mean()),
            float(seen.unreadable.mean()),
        )  # fmt: skip

    def base(self, name: str = "pocket", model: Model | None = None, seeds: int | None = None) -> Made:
        """A base's pictures, judged once and kept."""

        def make() -> dict[str, Any]:
            found = vars(self.made(model or self.draws, seeds=seeds))
            return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}

        kept: dict[str, Any] = self.part(f"base-{name}", make)
        arrays = {key: np.array(value, np.float64) for key, value in kept.items() if isinstance(value, list)}
        return Made(**{**kept, **arrays})

    def against(self, found: Made, base: Made) -> dict[str, Any]:
        """Picture by picture, and drift."""
        n = len(found.looks)
        first: dict[str, Any] = {k: v[:n] if isinstance(v, np.ndarray) else v for k, v in vars(base).items()}
        base = Made(**first)
        return {
            "win_looks": wins(found.looks, base.looks).tolist(),
            "win_faithful": wins(found.faithful, base.faithful, TIE).tolist(),
            "gain": (found.fidelity - base.fidelity).tolist(), "five": found.five.tolist(),
            "drift": frechet_distance(found.features, base.features), "diversity": found.diversity,
            "unreadable": found.unreadable,
        }  # fmt: skip

    def judged(self, preference: str, seed: int) -> dict[str, Any]:
        """One trained LoRA on all held-out rows."""
        return self.against(self.made(self.draws, lora=self.file(f"{preference}-{seed}")), self.base())

    def loss(self, loss: str, scale: float) -> dict[str, Any]:
        """One loss, scaled, on some of the rows."""
        found = self.made(self.draws, self.size.loss_pictures, self.file(f"loss-{loss}"), scale)
        return self.against(found, self.base())

    # -------------------- elsewhere

    def whole(self) -> Path:
        """The first faithful LoRA as a checkpoint."""
        out = self.store.path("tuned.safetensors")
        if not out.exists():
            bake(weights_path("pocket"), [(self.file("faithful-0"), 1.0)], out)
        return out

    def transfer(self, blocks: dict[str, float]) -> dict[str, Any]:
        """The delta of the checkpoint, as a LoRA, on pocket-style."""
        delta = self.store.path("delta.safetensors")
        if not delta.exists():
            extract(self.whole(), weights_path("pocket"), delta, kind="lora", rank=SETTINGS["faithful"].rank)
        style = load_model("pocket-style", device="cpu", dtype="bf16")
        return self.against(self.made(style, lora=delta, blocks=blocks), self.base("style", style))

    def strength(self, strength: float) -> dict[str, Any]:
        """Output-space strength of the checkpoint."""
        tuned = Tuned(load_model(self.whole(), device="cpu", dtype="bf16"), strength)
        return self.against(self.made(self.draws, self.size.loss_pictures, tuned=tuned), self.base())

    def pareto(self) -> dict[str, Any]:
        """16 presets x 3 bases of pocket-style (A) and the checkpoint (B): chosen, then graded on other prompts."""
        found = self.compared("choosing", development_prompts(self.size.pareto_prompts))
        best, count = chosen(found.rows, found.parents)
        again = self.compared("grading", gate_prompts()[-self.size.pareto_graded :], best)
        return {"merges": len(found.rows), "exceed_in_both": count, **graded(again.rows[0], again.parents)}

    def compared(self, folder: str, rows: Sequence[dict[str, Any]], only: Row | None = None) -> Comparison:
        """Merges on these prompts: the card's grid, or one of it."""
        grid: dict[str, Any] = {} if only is None else {"presets": (str(only.preset),), "bases": (only.base,)}
        settings = CompareSettings(
            prompts=tuple(dict.fromkeys(row["prompt"] for row in rows)), seeds=tuple(range(self.size.pareto_seeds)),
            generate=SETTINGS_OF_PICTURES, **grid,
        )  # fmt: skip
        return compare("pocket-style", self.whole(), settings, self.store.path(f"compare-{folder}"), "cpu", "bf16")


def chosen(rows: Sequence[Row], parents: Sequence[Row]) -> tuple[Row, int]:
    """The merge that exceeds both parents' mean most, in fidelity and in resemblance to A at once, by the reader; and
    how many exceed it in both.
    """
    figures = ("fidelity", "resemblance_a")
    means = {key: float(np.mean([parent.mean(key) or 0.0 for parent in parents])) for key in figures}
    least = [min((row.mean(key) or 0.0) - mean for key, mean in means.items()) for row in rows]
    return rows[int(np.argmax(least))], sum(one > 0 for one in least)


def graded(row: Row, parents: Sequence[Row]) -> dict[str, Any]:
    """A merge against both parents' mean: fidelity by the judge, and resemblance to A."""
    figures = {}
    for name, key in (("fidelity", "fidelity_judge"), ("resemblance", "resemblance_a")):
        of = [np.asarray(getattr(one.measured, key), np.float64) for one in (row, *parents)]
        figures[name] = bootstrap_mean(of[0] - np.mean(of[1:], axis=0))
    a, b = figures["fidelity"], figures["resemblance"]
    return {
        "chosen": row.name, "fidelity_minus_mean": a.mean, "fidelity_ci": a.ends,
        "resemblance_minus_mean": b.mean, "resemblance_ci": b.ends,
        "beats_parents_mean": bool(a.mean > 0 and b.mean > 0),
        "surely": bool(a.ends and b.ends and a.ends[0] > 0 and b.ends[0] > 0),
        "parents": [
            {key: float(np.mean(np.asarray(getattr(p.measured, key)))) for key in ("fidelity_judge", "resemblance_a")}
            for p in parents
        ],
    }  # fmt: skip


def over(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, list[float] | None]:
    """Mean over pictures and training seeds, with its interval."""
    found = bootstrap_mean(np.array([row[key] for row in rows], dtype=np.float64).T)
    return found.mean, found.ends


def at_drift(rows: Sequence[dict[str, Any]], scales: Sequence[float], drift: float) -> dict[str, float] | None:
    """The win rate where drift, straight between the scales from 0 on, is `drift`; None beyond the largest scale."""
    points = [(0.0, 0.0, 0.5)]
    points += [(s, row["drift"], float(np.mean(row["win_faithful"]))) for s, row in zip(scales, rows, strict=True)]
    for (s0, d0, w0), (s1, d1, w1) in zip(points, points[1:], strict=False):
        if d0 <= drift <= d1:
            share = (drift - d0) / (d1 - d0) if d1 > d0 else 0.0
            return {"scale": s0 + share * (s1 - s0), "win": w0 + share * (w1 - w0)}
    return None


SCALES = (0.5, 1.0, 1.5)


def run(size: Size, folder: Path) -> dict[str, Any]:
    """All parts, and the table."""
    bench = Bench(size, folder)
    found: dict[str, Any] = {"machine": machine(), "size": asdict(size), "threads": torch.get_num_threads()}
    found["intervals"] = {}
    judged: dict[str, list[dict[str, Any]]] = {}
    base = bench.base()
    for seed in range(size.training_seeds):
        for preference in ("faithful", "looks"):
            bench.part(f"train-{preference}-{seed}", partial(bench.train_seed, preference, seed))
            made = bench.part(f"judged-{preference}-{seed}", partial(bench.judged, preference, seed))
            judged.setdefault(preference, []).append(made)
    for name, preference, key in (
        ("win_looks", "looks", "win_looks"), ("win_faithful", "faithful", "win_faithful"),
        ("fidelity_gain", "faithful", "gain"), ("five_fingers_after", "faithful", "five"),
    ):  # fmt: skip
        found[name], found["intervals"][name] = over(judged[preference], key)
    found["five_fingers_before"] = float(np.nanmean(base.five))
    found["fidelity_before"] = float(np.nanmean(base.fidelity))
    found["intervals"]["five_fingers_before"] = bootstrap_mean(base.five[~np.isnan(base.five)][:, None]).ends
    found["drift"] = {}
    for preference, rows in judged.items():
        found["drift"][preference] = float(np.mean([row["drift"] for row in rows]))
        found["drift"][f"{preference}_diversity"] = float(np.mean([row["diversity"] for row in rows]) / base.diversity)
        found["drift"][f"{preference}_unreadable"] = float(np.mean([row["unreadable"] for row in rows]))
    whole = bench.part("transfer", partial(bench.transfer, {}))
    found["transfer_win"], found["intervals"]["transfer_win"] = over([whole], "win_faithful")
    own = float(np.mean(judged["faithful"][0]["win_faithful"]))
    found["transfer_kept"] = (found["transfer_win"] - 0.5) / (own - 0.5) if own > 0.5 else None
    found["transfer_blocks"] = {
        name: float(np.mean(bench.part(f"transfer-{name}", partial(bench.transfer, blocks))["win_faithful"]))
        for name, blocks in (("OUT", _only(bench, "OUT")), ("IN", _only(bench, "IN")))
    }  # fmt: skip
    names = list(LOSSES)[: size.losses]
    for name in names:
        bench.part(f"train-{name}", partial(bench.train_loss, name))
    losses = {n: [bench.part(f"loss-{n}-{s:g}", partial(bench.loss, n, s)) for s in SCALES] for n in names}
    drift = losses["sigmoid"][SCALES.index(1.0)]["drift"]
    found["losses"] = {}
    for name, rows in losses.items():
        win, ends = over([rows[1]], "win_faithful")
        found["losses"][name] = {
            "win": win, "win_ci": ends, "drift": rows[1]["drift"], "gain": float(np.mean(rows[1]["gain"])),
            "equal_drift": at_drift(rows, SCALES, drift),
        }  # fmt: skip
    found["strength"] = {
        f"{s:g}": {"win": float(np.mean(row["win_faithful"])), "drift": row["drift"]}
        for s in (0.5, 1.0, 1.5, 2.0)[: size.strengths]
        for row in [bench.part(f"strength-{s:g}", partial(bench.strength, s))]
    }  # fmt: skip
    floor = bench.base("floor", seeds=OTHER_SEEDS)
    found["drift"]["floor"] = frechet_distance(floor.features, base.features)
    found["pareto"] = bench.part("pareto", bench.pareto)
    found["memory"] = bench.part("memory", _memory) if size.memory else None
    found["memory_ratio"] = found["memory"]["memory_ratio"] if found["memory"] else None
    return found


def _only(bench: Bench, prefix: str) -> dict[str, float]:
    return {block: float(block.startswith(prefix)) for block in bench.model.layout.all_blocks if block != "VAE"}


def _memory() -> Any:
    done = subprocess.run([sys.executable, str(MEMORY), "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_sized(__doc__, run, Size(), QUICK)
