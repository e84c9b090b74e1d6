"""dodgeburn artifacts evaluate: how good an estimator is on trajectories that it has not seen."""

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

HELP = "grade an estimator on held-out trajectories: ranks within prompts, AUROC, calibration, what it saves"
EXAMPLE = "dodgeburn artifacts evaluate held-out --estimator foresee.safetensors --against trajectories"


@dataclass
class Evaluate:
    """Grade an estimator on labelled trajectories of other prompts than it was trained on, with intervals over prompts.

    Generators it was not trained on get a line of their own.
    """

    stores: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = field(default_factory=list)
    """Folders of `artifacts collect`, labelled."""
    estimator: Annotated[Path | None, tyro.conf.arg(aliases=["-e"], metavar="FILE")] = None
    """File of `artifacts train`; none: the pocket's."""
    against: Annotated[list[Path], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FOLDER")] = field(
        default_factory=list
    )
    """Trajectories that it was trained on: baselines from prompt, settings and simple statistics are fitted there."""
    split: str = "test"
    """Which split of the folders to use: test, train or all."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts evaluate`; raises UserError for bad input."""
    options = parse(Evaluate, args, "artifacts evaluate", EXAMPLE)
    if not options.stores:
        raise UserError(f"no trajectories: name folders of `artifacts collect`, as in {EXAMPLE}")
    if options.split not in ("test", "train", "all"):
        raise UserError(f"--split is {options.split!r}: expected test, train or all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        found = _run(options)
    print_warnings(caught)
    _print(found)
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Evaluate) -> dict[str, Any]:
    from dodgeburn.foresee import scores
    from dodgeburn.foresee.estimator import PACKAGED, Estimator
    from dodgeburn.foresee.evaluate import (
        against_baselines,
        column,
        curves,
        figures,
        judge,
        new_generators,
        prices,
        rounded,
    )
    from dodgeburn.foresee.rules import saved
    from dodgeburn.foresee.shards import Store
    from dodgeburn.foresee.train import FitSettings

    estimator, store = Estimator.load(options.estimator or PACKAGED), Store(*options.stores)
    every = judge(estimator, store, lambda r: options.split in ("all", r.split), ())
    new = new_generators(every, estimator.record.get("generators", []))
    known = every.rows(~new) if not new.all() else every
    ahead = estimator.ahead
    out: dict[str, Any] = {
        "pictures": len(known.records), "prompts": len(set(known.prompt)), "bad_share": float(known.is_bad.mean()),
        "figures": figures(known), "curves": curves(known), "saved": saved(estimator, known), "broken": store.broken,
    }  # fmt: skip
    if ahead is not None:
        looking = known.reading(ahead, ahead.plans[-1])
        out["ahead"] = {"figures": figures(looking), "price": prices(looking)}
    if new.any():
        other, g = every.rows(new), column(0.5)
        out["new_generators"] = {
            "names": sorted({r.generator for r in other.records}), "pictures": len(other.records),
            "auroc_50": scores.over_prompts(lambda r: scores.auroc(other.bad[r, g], other.is_bad[r]), other.prompt),
        }  # fmt: skip
    if options.against:
        training = estimator.record.get("training", {})
        shares = {k: training[k] for k in ("calibration_share", "choice_share") if k in training}
        settings = FitSettings(without=tuple(training.get("without", ())), **shares)
        out |= against_baselines(Store(*options.against), store, known, settings)
    return dict(rounded(out))


def _print(found: dict[str, Any]) -> None:
    print(f"{found['pictures']} pictures of {found['prompts']} prompts, {found['bad_share']:.0%} bad")
    names = {
        "srcc": "rank correlation within a prompt", "auroc": "AUROC of bad", "auroc_within": "AUROC within a prompt",
        "ece": "calibration error", "sd_ratio": "spread of estimates / labels",
    }  # fmt: skip
    _figures(found["figures"], names)
    if "ahead" in found:
        price = found["ahead"]["price"]
        print(f"and with looks ahead, which by then cost {price['25']:.0%} and {price['50']:.0%} of a picture's calls:")
        _figures(found["ahead"]["figures"], names)
    saved = found["saved"]
    rule = saved["rule"]
    print(f"rule {rule['kind']}: gives up {rule['bad_rejected']} of the bad, {rule['good_rejected']} of the good ones")
    for key, value in saved.items():
        if key.startswith("saved_best_of") and isinstance(value, dict) and "value" in value:
            print(f"{key.replace('_', ' '):<34} {_span(value)}")
    if "new_generators" in found:
        new = found["new_generators"]
        print(f"AUROC at 50 % on {', '.join(new['names'])} (not trained on): {_span(new['auroc_50'])}")
    for name, row in found.get("baselines", {}).items():
        print(f"baseline {name:<27} AUROC 25 % {row['auroc_25']:.3f}   50 % {row['auroc_50']:.3f}")


def _figures(figures: dict[str, Any], names: dict[str, str]) -> None:
    for key, name in names.items():
        cells = [f"{percent} % {_span(figures[f'{key}_{percent}'])}" for percent in (25, 50)]
        print(f"{name:<34} {'   '.join(cells)}")


def _span(value: dict[str, float | None]) -> str:
    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    ends = "" if value["low"] is None else f" [{number(value['low'])}, {number(value['high'])}]"
    return f"{number(value['value'])}{ends}"
