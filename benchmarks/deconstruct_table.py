"""Sizes, regimes and sums of benchmarks/deconstruct.py: from judged cells to its table and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dodgeburn.measure.machine import machine

PLENTY, FEW, MERGE = "plenty", "few", "merge_only"
ABLATIONS = ("cd-no-overtrain", "cd-no-nightshade", "cd-no-bucket", "cd-lerp", "cd-pictures")
REGIMES: dict[str, tuple[str, ...]] = {
    MERGE: ("uce", "random-prompt", "negation", "cd"),
    PLENTY: ("balanced", "taught", "cd", "shrink-perturb", "self", "reweight", "dpo", *ABLATIONS),
    FEW: ("balanced", "taught", "cd", "shrink-perturb", "dpo"),
}
SCAN = (
    "a doctor", "a firefighter", "a gardener", "a person, in a plain sweater", "a person, wearing a cap",
    "a person, waving", "a person, smiling", "an old person", "flat illustration of a person", "a person, red backdrop",
    "a person, with blue hair", "a person",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is made."""

    worlds: tuple[str, ...] = ("60", "95", "99", "fair")  # audited
    treated: tuple[tuple[str, int], ...] = (("95", 0), ("95", 1), ("99", 0), ("99", 1), ("99", 2))  # world, tie
    seeds: int = 5
    sampling: int = 20  # denoising steps
    audit_n: int = 128
    audit_confirm: int = 512
    n: int = 1024  # held-out neutral pictures of the judge
    others: int = 512
    explicit: int = 128
    steps: int = 240
    batch: int = 32
    lr: float = 3e-4  # of what learns pictures
    pictures: int = 512
    few: int = 64  # counter-examples
    look: int = 64
    every: int = 25  # steps from look to look
    adapt: float = 0.25
    ablations: bool = True
    dpo: bool = True
    guided: int = 96  # pictures of a look that guides CD
    evaluations: int = 24  # merges that CD looks at
    plenty_of_runs: int = 300  # of audits where nothing differs


REDUCED = Size(
    worlds=("fair", "60", "95"), treated=(("95", 0),), seeds=1, sampling=8, audit_n=32, audit_confirm=64, n=1024,
    others=512, explicit=48, steps=100, pictures=192, look=48, ablations=False, dpo=False, guided=48, evaluations=6,
    plenty_of_runs=100,
)  # fmt: skip
QUICK = Size(
    worlds=("95",), treated=(("95", 0),), seeds=1, sampling=4, audit_n=16, audit_confirm=16, n=24, others=16,
    explicit=8, steps=4, batch=8, pictures=24, few=12, look=16, ablations=False, dpo=False, guided=16,
    evaluations=3, plenty_of_runs=10,
)  # fmt: skip


def sampling_error(shares: Sequence[float], n: int) -> float:
    """Standard error of the total variation of n pictures from uniform shares, by the delta method; where a class is at
    its target, as if half of such classes were above it."""
    p = np.asarray(shares)
    away = p - 1 / len(p)
    even = np.where(np.arange(len(p)) % 2 == 0, 1.0, -1.0)
    sign = np.where(np.abs(away) > 1e-9, np.sign(away), even)
    return float(np.sqrt(max(0.0, 1 - float(sign @ p) ** 2) / (4 * n)))


def summary(cells: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """Means over ties and seeds, with the standard error of the conservative TV: over cells, and never below what the
    pictures of one cell leave uncertain."""
    keys = ("tv_before", "tv_after", "tv_cons", "fidelity_drop", "explicit_drop", "unreadable_rise", "frechet_ratio",
            "others_tv", "others_mean", "others_floor", "floor_95", "steps", "cpu_minutes", "minutes")  # fmt: skip
    out: dict[str, Any] = {}
    for key in keys:
        known = [c[key] for c in cells if c.get(key) is not None]
        out[key] = round(float(np.mean(known)), 4) if known else None
    tv = standard_error([sampling_error(c["shares"], n) for c in cells], [c["tv_cons"] for c in cells])
    told = [(c["fidelity_drop"], *c["fidelity_ends"]) for c in cells if c.get("fidelity_ends")]
    fidelity = standard_error([(high - low) / 3.92 for _, low, high in told], [x for x, _, _ in told]) if told else None
    grain = [c["spread_after"].get("grain") for c in cells]
    return {**out, "tv_se": tv, "fidelity_se": fidelity, "cells": len(cells),
            "grain_spread": round(float(np.mean(grain)), 4) if grain else None}  # fmt: skip


def standard_error(within: Sequence[float], values: Sequence[float]) -> float:
    """Of the mean over cells: what they differ by, and never below what the pictures of each leave uncertain."""
    n = len(values)
    drawn = float(np.sqrt(np.mean(np.square(within)) / n))
    return round(max(drawn, float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0), 4)


def verdict(methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By how many standard errors CD is better (+) or worse (-) than each method, by regime."""
    out: dict[str, Any] = {}
    for regime, rows in methods.items():
        cd = rows.get("cd")
        if cd is None:
            continue
        out[regime] = {
            name: round((row["tv_cons"] - cd["tv_cons"]) / float(np.hypot(row["tv_se"], cd["tv_se"])), 1)
            for name, row in rows.items() if name != "cd" and np.hypot(row["tv_se"], cd["tv_se"]) > 0
        }  # fmt: skip
    return out


def result(
    size: Size, audits: dict[str, Any], chance: dict[str, Any], made: dict[str, dict[str, list[dict[str, Any]]]],
    befores: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The printed object."""
    methods = {r: {m: summary(cells, size.n) for m, cells in rows.items()} for r, rows in made.items() if rows}
    ties = [t for a in audits.values() if a for t in a["ties"] if t["planted"] >= 0.6]
    cd = methods.get(PLENTY, {}).get("cd") or {}
    fair = audits.get("fair")
    top = ("tv_before", "tv_after", "fidelity_drop", "unreadable_rise", "frechet_ratio", "others_tv", "minutes")
    return {
        "audit_found": sum(t["found"] for t in ties) / len(ties) if ties else None,
        **{key: (alarms := chance.get(name)) and alarms["with_alarm"] / alarms["runs"]
           for key, name in (("false_alarms", "equal"), ("false_alarms_as_run", "as-run"))},
        "false_alarms_fair_model": [len(fair["other_alarms"]), fair["tests"]] if fair else None,
        **{key: cd.get(key) for key in top}, "methods": methods, "verdict": verdict(methods),
        "verdict_line": verdict_line(verdict(methods)),
        "audits": {w: {k: v for k, v in a.items() if k != "pool"} for w, a in audits.items() if a},
        "grain_spread_before": [b["spreads"].get("grain") for b in befores],
        "size": asdict(size), "machine": machine(),
    }  # fmt: skip


TITLES = {PLENTY: "plenty of balanced data", FEW: "few counter-examples", MERGE: "merge only"}


def table(found: dict[str, Any]) -> str:
    """The methods as Markdown; the last column is by how many standard errors CD is better (+) or worse (-)."""
    head = ("method", "TV before", "TV after", "fidelity drop", "unreadable", "Fréchet ratio", "others' TV, largest",
            "mean", "steps", "CPU minutes", "CD against it")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for regime, title in TITLES.items():
        rows = found["methods"].get(regime)
        if not rows:
            continue
        lines.append(f"| **{title}** |" + " |" * (len(head) - 1))
        for method, r in rows.items():
            ahead = found["verdict"].get(regime, {}).get(method)
            cells = (
                method, f"{r['tv_before']:.3f}", f"{r['tv_cons']:.3f} ± {r['tv_se']:.3f}",
                f"{r['fidelity_drop']:+.3f}" + (f" ± {r['fidelity_se']:.3f}" if r["fidelity_se"] else ""),
                f"{r['unreadable_rise']:+.3f}", f"{r['frechet_ratio']:.2f}",
                f"{r['others_tv']:.2f} ({r['others_floor']:.2f})", f"{r['others_mean']:.3f}", f"{r['steps']:.0f}",
                f"{r['cpu_minutes']:.1f}", "" if ahead is None else f"{ahead:+.1f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict_line(scores: dict[str, dict[str, float]]) -> str:
    """The verdict in words: a difference of at least two standard errors is called one."""
    said = []
    for regime, rows in scores.items():
        parts = []
        for words, inside in (("better than", lambda z: z >= 2), ("worse than", lambda z: z <= -2),
                              ("not told apart from", lambda z: -2 < z < 2)):  # fmt: skip
            names = [name for name, z in rows.items() if inside(z)]
            parts += [f"{words} {', '.join(names)}"] if names else []
        said.append(f"{TITLES[regime]}: CD is {'; '.join(parts) or 'compared with nothing'}")
    return ". ".join(said) + "." if said else "CD was not run."
