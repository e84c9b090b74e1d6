"""dodgeburn artifacts score: what an estimator says of collected trajectories."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError

HELP = "say of each collected trajectory how likely its picture is bad, moment by moment"
EXAMPLE = "dodgeburn artifacts score trajectories --estimator foresee.safetensors -o scores.jsonl"


@dataclass
class Score:
    """Estimate the artifacts of collected trajectories at every moment, and where the rule would give them up."""

    stores: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = field(default_factory=list)
    """Folders of `artifacts collect`; labels are not needed."""
    estimator: Annotated[Path | None, tyro.conf.arg(aliases=["-e"], metavar="FILE")] = None
    """File of `artifacts train`; none: the pocket's."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Write a line of JSON for each trajectory."""
    worst: int = 5
    """How many of the worst to print."""
    maps: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """A sheet of the worst: the finished picture, and where defects are expected after a quarter, half and all of the
    way. For estimators that learned from masks, and trajectories that kept their pictures."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts score`; raises UserError for bad input."""
    from dodgeburn.checkpoint.atomic import check_output, write_atomic

    options = parse(Score, args, "artifacts score", EXAMPLE)
    if not options.stores:
        raise UserError(f"no trajectories: name folders of `artifacts collect`, as in {EXAMPLE}")
    for path in (options.out, options.maps):
        if path is not None:
            check_output(path)
    if options.maps is not None and (options.maps.suffix.lower() != ".png" or options.worst < 1):
        raise UserError(f"--maps {options.maps}: expected a name that ends in .png, and --worst from 1 up")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        rows, broken = _score(options)
    print_warnings(caught)
    if options.out is not None:
        write_atomic(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{len(rows)} trajectories" + (f", broken shards left out: {len(broken)}" if broken else ""))
    for row in sorted(rows, key=lambda r: -r["bad"][-1])[: max(0, options.worst)]:
        curve = " ".join(f"{p:.2f}" for p in row["bad"])
        types = ", ".join(row["types"]) or "no type"
        print(f"{row['id']}: P(bad) {curve}; severity {row['severity'][-1]:.1f}, {types}")
    if options.out is not None:
        print(f"wrote {options.out}")
    if options.maps is not None:
        _draw(options, options.maps, [row["id"] for row in sorted(rows, key=lambda r: -r["bad"][-1])[: options.worst]])
    if options.json:
        given_up = sum(row["given_up_at"] is not None for row in rows)
        mean = sum(row["bad"][-1] for row in rows) / len(rows)
        found = {
            "trajectories": len(rows), "mean_bad": round(mean, 4), "given_up": given_up, "broken": broken,
            "out": None if options.out is None else str(options.out),
            "maps": None if options.maps is None else str(options.maps),
        }  # fmt: skip
        print(json.dumps(found))
    return 0


def _draw(options: Score, out: Path, worst: list[str]) -> None:
    """The sheet of where their defects are expected."""
    from dodgeburn.checkpoint.atomic import write_atomic
    from dodgeburn.foresee.estimator import PACKAGED, Estimator
    from dodgeburn.foresee.maps import Place, sheet
    from dodgeburn.foresee.shards import Store
    from dodgeburn.images.png import png_bytes

    estimator, store = Estimator.load(options.estimator or PACKAGED), Store(*options.stores)
    found: dict[str, Place] = {}
    for batch in store.batches(64, (*estimator.tensors, "progress", "picture"), where=lambda r: r.id in worst):
        judged = estimator.judge_batch(batch)
        assert judged.heatmap is not None
        for i, r in enumerate(batch.records):
            k = int(batch.there[i].sum())
            found[r.id] = Place(
                f"{r.generator}, seed {r.seed}", batch.tensors["picture"][i].numpy(), judged.heatmap[i, :k].numpy(),
                batch.tensors["progress"][i, :k].float().numpy(), judged.bad[i, :k].numpy(),
            )  # fmt: skip
    about = {"sheet": "where defects are expected", "estimator": str(options.estimator or "pocket"), "worst": worst}
    write_atomic(out, png_bytes(sheet([found[name] for name in worst]), own=about))
    print(f"wrote {out}")


def _score(options: Score) -> tuple[list[dict[str, Any]], dict[str, str]]:
    import numpy as np

    from dodgeburn.foresee.ahead import with_readings
    from dodgeburn.foresee.estimator import PACKAGED, Estimator
    from dodgeburn.foresee.evaluate import calls_of, check_space, readings_of
    from dodgeburn.foresee.labels import TYPES
    from dodgeburn.foresee.policy import policy_of
    from dodgeburn.foresee.shards import Store
    from dodgeburn.foresee.train import draws

    estimator = Estimator.load(options.estimator or PACKAGED)
    store = Store(*options.stores)
    check_space(estimator, store)
    if options.maps is not None and not draws(estimator.network.settings):
        raise UserError("--maps: this estimator sees nothing that has places, x0 or maps say: it draws no maps")
    if options.maps is not None and not store.has("picture"):
        raise UserError("--maps: these trajectories were collected without their pictures")
    policy = policy_of(estimator.record.get("policy", {"kind": "never"}))
    ahead, plan = estimator.ahead, tuple(estimator.record.get("policy_plan", ()))
    rows: list[dict[str, Any]] = []
    for batch in store.batches(64, tuple(dict.fromkeys((*estimator.tensors, "progress")))):
        judged = estimator.judge_batch(batch)
        for i, r in enumerate(batch.records):
            k = int(batch.there[i].sum())
            progress = batch.tensors["progress"][i, :k].numpy()
            way = {n: getattr(judged, n)[i, :k].numpy() for n in ("bad", "severity", "rank", "exit", "hazard")}
            way["progress"] = progress
            if not np.isfinite(way["bad"]).all():
                raise UserError(f"trajectory {r.id!r} of {r.generator} has NaN or infinite features: collect it again")
            if ahead is not None:
                way = with_readings(way, readings_of(r, ahead.calls), ahead, plan, r.steps, calls_of(r))
            stop = policy.first(way)
            rows.append({
                "id": r.id, "prompt": r.prompt, "seed": r.seed, "generator": r.generator, "provenance": r.provenance,
                "progress": progress.round(4).tolist(), "bad": way["bad"].round(4).tolist(),
                "severity": way["severity"].round(3).tolist(),
                "types": [t for t, p in zip(TYPES, judged.types[i, k - 1].tolist(), strict=True) if p > 0.5],
                "given_up_at": None if stop is None else round(float(progress[stop]), 4),
                "label": None if r.label is None else round(r.label.severity, 3),
            })  # fmt: skip
    if not rows:
        raise UserError(f"{', '.join(map(str, options.stores))}: no trajectories there")
    return rows, store.broken
