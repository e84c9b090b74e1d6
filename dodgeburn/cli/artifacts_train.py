"""dodgeburn artifacts train: an estimator from collected trajectories."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError, did_you_mean

if TYPE_CHECKING:
    from dodgeburn.foresee.drawn import Drawings
    from dodgeburn.foresee.shards import Store

HELP = "train an estimator of artifacts from collected trajectories, and choose when it gives pictures up"
EXAMPLE = "dodgeburn artifacts train trajectories -o foresee.safetensors"


@dataclass
class Train:
    """Train an estimator on labelled trajectories, calibrate it, and choose its rules, each on prompts of their own.

    Rules are chosen so that at most --limit of the good pictures are given up (upper 95 % bound).
    """

    stores: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = field(default_factory=list)
    """Folders of `artifacts collect`."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("foresee.safetensors")
    """The .safetensors file to write."""
    network: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Take the network of this estimator, and only choose the rules anew: on prompts that it was not trained on."""
    inputs: str = "x0,change,maps,scalars"
    """What is looked at, of x_t, x0, change, maps, features, scalars, text."""
    steps: int = 1500
    """Optimiser steps, at least 1500."""
    width: int = 48
    """Width of the network."""
    experts: int = 1
    """Networks for stretches of the noise level, of as many weights together."""
    memory: bool = False
    """Remember earlier moments (a GRU)."""
    drawings: int = 0
    """Drawings of the pocket's world with defects put in to learn from besides (for the pocket's trajectories)."""
    head: Literal["coral", "histogram"] = "coral"
    """How severity is said: ordered thresholds, or a histogram of the raters' answers."""
    wise: Annotated[str | None, tyro.conf.arg(metavar="GENERATOR")] = None
    """WiSE-FT: interpolate between frozen and fine-tuned encoder, the share chosen on this generator, held out."""
    without: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Generators to leave out. Repeatable."""
    limit: float = 0.05
    """Share of good pictures that may be given up, at most."""
    seed: int = 0
    """Of weights and batches."""
    folder: Path | None = None
    """Where checkpoints and logs lie; none: OUT with .train at its end. The same command goes on there."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts train`; raises UserError for bad input."""
    options = parse(Train, args, "artifacts train", EXAMPLE)
    if not options.stores:
        raise UserError(f"no trajectories: name folders of `artifacts collect`, as in {EXAMPLE}")
    if options.out.suffix != ".safetensors":
        raise UserError(f"{options.out}: the estimator's file must end in .safetensors")
    if options.network is not None and (options.drawings or options.wise is not None):
        raise UserError("--network takes a trained network: --drawings and --wise have no effect with it")
    if options.drawings < 0 or (options.drawings and options.wise is not None):
        raise UserError(f"--drawings {options.drawings}: give a number from 0 on, and not together with --wise")
    if not 0 < options.limit < 1:
        raise UserError(f"--limit is {options.limit}: give a share between 0 and 1, such as 0.05")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        found = _run(options)
    print_warnings(caught)
    rule = found["rules"]["rules"][found["rules"]["chosen"]]
    if options.network is None:
        print(
            f"trained on {found['trajectories']['fit']} trajectories of {found['prompts']['fit']} prompts "
            f"({found['bad_share']:.0%} bad) in {found['train_s']:.0f} s"
        )
    else:
        print(f"the network is that of {options.network}; rules chosen on {found['rules']['pictures']} pictures")
    print(
        f"rule: {found['rules']['chosen']}, gives up {rule['bad_rejected']:.0%} of the bad and "
        f"{rule['good_rejected']:.1%} of the good (at most {rule['bound']:.1%}), saves {rule['saved']:.0%}"
    )
    for n, value in found["searches"].items():
        quality = "90 % of what the best of 8 gains" if n == "90_of_8" else f"the best of {n}"
        print(f"as good as {quality}: one seed after another, {value['rounds']} at most, until one is good: the price "
              f"of {value['price']:.1f} pictures")  # fmt: skip
    for n, funnel in found["funnels"].items():
        if n in found["searches"] or not n.isdigit():
            continue
        stages = ", ".join(f"{k} after {share:.0%}" for share, k in funnel["stages"]) or "all to their end"
        print(f"as good as the best of {n}: begin {funnel['begin']}, go on with {stages}")
    print(f"wrote {options.out}: {found['bytes'] / 1e3:,.0f} kB")
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Train) -> dict[str, Any]:
    from dodgeburn.foresee.estimator import Estimator
    from dodgeburn.foresee.evaluate import check_space, rounded
    from dodgeburn.foresee.feed import check_labels
    from dodgeburn.foresee.network import NetworkSettings
    from dodgeburn.foresee.rules import RULES_ONLY, choose_rules
    from dodgeburn.foresee.shards import Store
    from dodgeburn.foresee.train import FitSettings, fit, usable

    network = NetworkSettings(
        inputs=tuple(part.strip() for part in options.inputs.split(",") if part.strip()), width=options.width,
        experts=options.experts, memory=options.memory, head=options.head,
    )  # fmt: skip
    settings = FitSettings(network=network, steps=options.steps, seed=options.seed, without=tuple(options.without))
    store = Store(*options.stores)
    names = sorted({r.generator for r in store.records})
    if unknown := [name for name in options.without if name not in names]:
        raise UserError(f"--without {unknown[0]}: no such generator there, {did_you_mean(unknown[0], names)}"
                        f"expected one of {', '.join(names)}")  # fmt: skip
    folder = options.folder or options.out.with_suffix(".train")
    extra: dict[str, Any] = {}
    if options.network is not None:
        estimator, settings = Estimator.load(options.network), replace(RULES_ONLY, without=tuple(options.without))
        check_space(estimator, store)
        check_labels([r for r in store.records if r.label is not None and usable(r, settings)], str(options.stores[0]))
    elif options.wise is None:
        estimator = fit(store, folder, settings, drawings=_drawings(options.drawings, store))
    else:
        from dodgeburn.foresee.wise import wise

        made = wise(store, folder, settings, options.wise)
        estimator, extra = made.estimator, {"alpha": made.alpha, "alphas": made.auroc}
    if options.network is None:
        estimator.record |= model_of(options.stores)
    rules = choose_rules(estimator, store, settings, options.limit)
    estimator.save(options.out)
    return {
        **rounded(estimator.record), **rounded(extra), "rules": rounded(rules), "broken": store.broken,
        "out": str(options.out), "bytes": options.out.stat().st_size,
    }  # fmt: skip


def _drawings(count: int, store: Store) -> Drawings | None:
    if count == 0:
        return None
    from dodgeburn.foresee.drawn import draw
    from dodgeburn.foresee.observe import space_of
    from dodgeburn.models.loading import load_model

    model = load_model("pocket")
    if space_of(model) != store.space:
        raise UserError("--drawings are of the pocket's world: these trajectories are of another model")
    return draw(model, count)


def model_of(stores: list[Path]) -> dict[str, str]:
    """Name and hash of the model whose trajectories the folders hold, where all say the same."""
    found = set()
    for store in stores:
        try:
            model = json.loads((store / "job.json").read_text())["settings"]["model"]
            found.add((str(model["name"]), str(model["sha256"])))
        except (OSError, ValueError, KeyError, TypeError):
            return {}
    if len(found) != 1:
        return {}
    name, digest = found.pop()
    return {"model": name, "model_sha256": digest}
