"""dodgeburn slider evaluate: what a slider does to prompts and seeds that it has never seen, read by the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.lists import numbers
from dodgeburn.cli.options import parse
from dodgeburn.cli.slider_model import OnModel, drawing, need_files, of_pocket
from dodgeburn.errors import UserError
from dodgeburn.prompt_file import read_prompts

if TYPE_CHECKING:
    from dodgeburn.measure.intervals import Interval
    from dodgeburn.models.model import Model
    from dodgeburn.slide.edits import AdapterEdit, Unedited
    from dodgeburn.slide.evaluate import Evaluation
    from dodgeburn.slide.slider_file import Slider
    from dodgeburn.slide.splits import Split

HELP = "measure sliders on held-out prompts and seeds: monotone, selective, calibrated, composable"
EXAMPLE = "dodgeburn slider evaluate smile.safetensors age.safetensors --prompts 16 --seeds 4 --json"


@dataclass
class Evaluate(OnModel):
    """Sweep every slider over its safe range on held-out prompts and seeds, and let the judge read the pictures.

    Several files: also how many pairs and triples keep all their directions, the leakage matrix, and what unmixing
    would make of their selectivity. A repair of hands (attribute fingers): the share of waving hands with five fingers
    at 0 and at 1. Sliders of the pocket world only. Definitions: docs/sliders.md.
    """

    files: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default_factory=list)
    """Slider files."""
    attribute: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What a file moves that doesn't say so itself: smile, hat=crown, or fingers for a repair of hands."""
    prompts: int = 16
    """Held-out prompts, of those that leave the sliders' attributes open."""
    seeds: int = 4
    """Held-out seeds; every prompt is drawn with each."""
    scales: str = "9"
    """How many scales across the safe range (odd), or the scales themselves (say --scales=-2,-1,0,1,2); of fingers
    only further scales besides 0 and 1."""
    compose_prompts: int = 8
    """Of these prompts, how many for pairs and triples; as many calibration prompts for unmixing."""
    unmix: bool = True
    """Measure the selectivity of several files after unmixing too (as many pictures again)."""
    certify: bool = False
    """Write the figures into the files."""
    off_class: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompts without the slider's subject, one a line, for the off-class effect; none: held-out ones, where the card's
    target names a subject that not every picture shows."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Any model: measure the CLIP score's change instead (a proxy), with the CLIP model of this local folder."""
    lpips: bool = False
    """With --clip: LPIPS to the unedited pictures too (pip install 'dodgeburn[proxies]', weights in torch's cache)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """With --clip: the prompts; none: the slider's own subject."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider evaluate`; raises UserError for bad input."""
    options = parse(Evaluate, args, "slider evaluate", EXAMPLE)
    need_files(options.files, EXAMPLE)
    if options.attribute is not None and len(options.files) > 1:
        raise UserError("--attribute names one slider's attribute: evaluate one file with it")
    if options.compose_prompts < 1:
        raise UserError(f"--compose-prompts {options.compose_prompts}: expected at least 1")
    if options.clip is None and (options.lpips or options.prompt):
        raise UserError("--lpips and --prompt have no effect without --clip FOLDER")
    if options.clip is not None and (options.certify or options.attribute is not None):
        raise UserError("--certify and --attribute have no effect with --clip: proxies are no certificate")
    found = _run(options) if options.clip is None else _proxies(options, options.clip)
    if options.json:
        print(json.dumps(found))
    return 0


def _scales(options: Evaluate, slider: Slider) -> list[float]:
    from dodgeburn.slide.evaluate import even_scales

    if options.scales.strip().isdigit():
        return even_scales(slider.card.safe_range, int(options.scales))
    found = numbers(options.scales, "scales")
    if len(found) < 2:
        raise UserError(f"--scales {options.scales}: expected a number of scales, or at least two scales")
    return found


def _run(options: Evaluate) -> dict[str, Any]:
    from dataclasses import replace

    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.evaluate import as_json, evaluate, leakage_matrix, summary
    from dodgeburn.slide.readings import FINGERS
    from dodgeburn.slide.slider_file import certificate_of, check_card_file, open_sliders, write_card
    from dodgeburn.slide.splits import evaluation_split

    if options.certify:
        for file in options.files:
            check_card_file(file)  # before minutes of work
    elsewhere = read_prompts(options.off_class) if options.off_class is not None else ()
    model = options.load()
    of_pocket(model, "slider evaluate")
    judge = Reader.load("judge")
    with drawing(model, options, "evaluate") as unedited:
        sliders = open_sliders(options.files, model)
        targets = [slider.target(options.attribute) for slider in sliders]
        if FINGERS in targets:
            return _repaired(options, model, sliders, unedited, elsewhere)
        scales = [_scales(options, slider) for slider in sliders]
        split = evaluation_split(targets, options.prompts, options.seeds)
        several = targets if len(set(targets)) > 1 else None
        evaluations = []
        for slider, target, swept in zip(sliders, targets, scales, strict=True):
            if not slider.calibrated:
                print(f"note: {slider.path.name} is not calibrated, swept over {swept[0]:g} to {swept[-1]:g}: what 1.0 "
                      "means is anyone's guess (dodgeburn slider calibrate)")  # fmt: skip
            edit = AdapterEdit(model, slider.adapter, slider.start, unedited=unedited)
            unit = slider.card.sigma if slider.calibrated and target == slider.card.attribute else None
            one = evaluate(edit, target, split, swept, judge, "judge", slider.name, several, unit=unit)
            off = _off_class(edit, slider, target, split, elsewhere)
            if off is not None:
                one = replace(one, figures=one.figures | {"off_class_effect": off})
            evaluations.append(one)
            print(summary(as_json(evaluations[-1])))
        rows = [as_json(one) for one in evaluations]
        together = _together(options, model, sliders, targets, evaluations, split, unedited) if several else {}
    for row, unmixed in zip(rows, together.pop("unmixed_rows", [None] * len(rows)), strict=True):
        row["selectivity_unmixed"] = None if unmixed is None else unmixed["selectivity"]
        row["selectivity_among_unmixed"] = None if unmixed is None else unmixed["selectivity_among"]
        row["unmixed"] = unmixed
    if options.certify:
        for slider, one in zip(sliders, evaluations, strict=True):
            write_card(slider.path, slider.card.model_copy(update={"certificate": certificate_of(one)}))
            print(f"certified: {slider.path}")
    found = dict(rows[0]) if len(rows) == 1 else _means(rows)
    found |= {"pairs_kept": None, "triples_kept": None, **together, "files": [str(s.path) for s in sliders]}
    found["leakage_matrix"] = leakage_matrix(evaluations)
    if len(rows) > 1:
        found["sliders"] = rows
    return found


def _off_class(
    edit: AdapterEdit, slider: Slider, target: str, split: Split, elsewhere: Sequence[str],
    scales: Sequence[float] = (-1.0, 1.0),
) -> Interval | None:  # fmt: skip
    """The off-class effect; None where every picture shows the slider's subject, or no prompt names it."""
    from dodgeburn.slide.off_class import measure_off_class, sides_of, subject_of

    sides = sides_of(slider.card.target, target, split, elsewhere)
    if sides is not None:
        return measure_off_class(edit, sides, scales)
    if subject_of(slider.card.target, target):
        print(f"note: {slider.path.name} has no off-class effect: too few held-out prompts are with and without "
              f"{slider.card.target!r}")  # fmt: skip
    return None


def _repaired(
    options: Evaluate, model: Model, sliders: list[Slider], unedited: Unedited, elsewhere: Sequence[str]
) -> dict[str, Any]:
    """A slider that repairs hands: fingers are counted, there is nothing to sweep or to compose."""
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide import repair
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.readings import FINGERS
    from dodgeburn.slide.slider_file import write_card
    from dodgeburn.slide.splits import hands_split

    if len(sliders) > 1:
        names = ", ".join(slider.path.name for slider in sliders if slider.card.attribute == FINGERS)
        raise UserError(f"{names} repairs fingers, which is no direction to compose with others: evaluate it alone")
    [slider] = sliders
    as_it_comes = options.scales == Evaluate.scales
    if not as_it_comes and options.scales.strip().isdigit():
        raise UserError(f"--scales {options.scales}: a repair has no range, name the scales, say --scales=0,1,2")
    scales = [] if as_it_comes else _scales(options, slider)
    split = hands_split(options.prompts, options.seeds)
    edit = AdapterEdit(model, slider.adapter, slider.start, unedited=unedited)
    off = _off_class(edit, slider, FINGERS, split, elsewhere, [1.0])
    judge = Reader.load("judge")
    found = repair.evaluate_repair(edit, split, judge, "judge", slider.name, scales, off)
    print(repair.summary(found))
    if options.certify:
        write_card(slider.path, slider.card.model_copy(update={"certificate": repair.certificate_of(found)}))
        print(f"certified: {slider.path}")
    return repair.as_json(found) | {"files": [str(slider.path)]}


def _proxies(options: Evaluate, clip: Path) -> dict[str, Any]:
    """CLIP score change and LPIPS of each slider."""
    from dodgeburn.measure.clip import ClipScore
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.evaluate import number
    from dodgeburn.slide.off_class import Sides, measure_off_class
    from dodgeburn.slide.proxies import Lpips, proxy_figures
    from dodgeburn.slide.slider_file import open_sliders
    from dodgeburn.slide.splits import FIRST_EVALUATION_SEED

    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: expected at least 1")
    elsewhere = list(read_prompts(options.off_class)) if options.off_class is not None else []
    model = options.load()
    score = ClipScore(clip, str(model.device))
    apart = Lpips(str(model.device)) if options.lpips else None
    seeds = [FIRST_EVALUATION_SEED + i for i in range(options.seeds)]
    rows = []
    with drawing(model, options, "evaluate") as unedited:
        for slider in open_sliders(options.files, model):
            if not slider.card.positive:
                raise UserError(f"{slider.path.name} does not say its positive prompt, which CLIP compares with")
            prompts = list(options.prompt) or [slider.card.target or slider.card.positive]
            edit = AdapterEdit(model, slider.adapter, slider.start, unedited=unedited)
            scales = _scales(options, slider)
            row = proxy_figures(edit, slider.card.positive, prompts, seeds, scales, score, apart)
            off = measure_off_class(edit, Sides(prompts, elsewhere, seeds)) if elsewhere else None
            row["off_class_effect"] = number(off.mean) if off else None
            row["off_class_effect_interval"] = off.ends if off else None
            print(f"{slider.name}, proxy: {score.name}, {slider.card.positive!r}: rank correlation with the scale "
                  f"{row['clip_spearman']:.3f}")  # fmt: skip
            for at in row["scales"]:
                far = f", LPIPS {at['lpips']:.3f}" if "lpips" in at else ""
                print(f"  {at['scale']:+6.2f}: CLIP {at['clip_change']:+.2f}{far}")
            if off:
                print(f"  off-class effect {off.mean:.2f}")
            rows.append({"name": slider.name, "file": str(slider.path), "by": f"proxy: {score.name}", **row})
    return {"proxies": rows}


MEANS = (
    "monotone", "monotone_drawdown", "spearman", "selectivity", "selectivity_picture", "selectivity_among",
    "selectivity_unmixed", "selectivity_among_unmixed", "calibration_error", "calibration_error_unit", "range_sigma",
    "symmetry", "parse_loss", "identity", "linearity", "unreadable", "off_class_effect",
)  # fmt: skip


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several sliders: their means; null if one of them has none. `sliders` has them one by one."""
    out: dict[str, Any] = {}
    for name in MEANS:
        known = [row[name] for row in rows if row.get(name) is not None]
        out[name] = round(sum(known) / len(known), 4) if len(known) == len(rows) else None
    return out


def _together(
    options: Evaluate, model: Model, sliders: list[Slider], targets: list[str], evaluations: list[Evaluation],
    split: Split, unedited: Unedited,
) -> dict[str, Any]:  # fmt: skip
    """Pairs, triples, and the sliders unmixed."""
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.composition import Member, kept, read_alone
    from dodgeburn.slide.evaluate import number

    judge = Reader.load("judge")
    members = [Member(s.adapter, target, s.start) for s, target in zip(sliders, targets, strict=True)]
    small = split.first(options.compose_prompts, options.seeds)
    alone = read_alone(model, members, small, judge, unedited)
    out: dict[str, Any] = {}
    for size, name in ((2, "pairs_kept"), (3, "triples_kept")):
        if len(members) < size:
            continue
        found = kept(model, members, size, small, judge, unedited, alone)
        out[name] = number(found.prompts.mean)
        out[f"{name}_interval"] = found.prompts.ends
        out[f"{name}_picture"] = number(found.pictures.mean)
        out[f"{name}_by_combination"] = found.by_combination
        print(f"{name.replace('_', ' ')}: {found.prompts.mean:.1%} of prompts, {found.pictures.mean:.1%} of pictures")
    if options.unmix:
        out["unmixed_rows"] = _unmixed(options, model, sliders, targets, evaluations, split, unedited)
    return out


def _unmixed(
    options: Evaluate, model: Model, sliders: list[Slider], targets: list[str], evaluations: list[Evaluation],
    split: Split, unedited: Unedited,
) -> list[dict[str, Any] | None]:  # fmt: skip
    """Each slider unmixed (measured on calibration prompts by the reader), judged as the sliders themselves are."""
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.evaluate import as_json, evaluate
    from dodgeburn.slide.splits import calibration_split
    from dodgeburn.slide.unmix import measure_mixing, unmixed, unmixing

    nothing: list[dict[str, Any] | None] = [None] * len(sliders)
    if len({s.start for s in sliders}) > 1:
        print("not unmixed: the sliders start at different time steps, a combination has one")
        return nothing
    edits = [AdapterEdit(model, s.adapter, s.start, unedited=unedited) for s in sliders]
    try:
        calibration = calibration_split(targets, options.compose_prompts, options.seeds)
        mixing = measure_mixing(edits, targets, calibration, Reader.load("reader"))
        combined = unmixed([s.adapter for s in sliders], unmixing(mixing))
    except UserError as error:
        print(f"not unmixed: {error}")
        return nothing
    rows: list[dict[str, Any] | None] = []
    for made, slider, target, before in zip(combined, sliders, targets, evaluations, strict=True):
        edit = AdapterEdit(model, made, slider.start, unedited=unedited)
        swept = [float(s) for s in before.sweep.scales]
        judge = Reader.load("judge")
        found = as_json(evaluate(edit, target, split, swept, judge, "judge", f"{slider.name} unmixed", targets))
        print(f"{slider.name} unmixed: selectivity {_said(before.mean('selectivity'))} -> "
              f"{_said(found['selectivity'])}, among these sliders' attributes "
              f"{_said(before.mean('selectivity_among'))} -> {_said(found['selectivity_among'])}")  # fmt: skip
        rows.append(found)
    return rows


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
