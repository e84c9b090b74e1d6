"""Take one tie away with one method, or with the cheapest that reaches the target; before and after, as file and page.

Everything here is read by the reader, which chose; a claim needs other prompts, other seeds and the judge
(benchmarks/deconstruct.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.measure.report import Column, Report, Theme
from dodgeburn.models.model import Model
from dodgeburn.models.saving import save_single_file
from dodgeburn.rework.bias.before_after import Change, Measured, change
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.fix_parts import BEFORE, FixParts
from dodgeburn.rework.bias.remedies import METHODS, Done, Job, apply_remedy, drawing_of
from dodgeburn.rework.bias.undo import set_state, state_of

RECORD = "dodgeburn.bias_fix"


@dataclass
class Tried:
    """One method's outcome."""

    done: Done
    after: Measured
    change: Change
    misses: tuple[str, ...]  # what is too large for the target, in words

    @property
    def meets(self) -> bool:
        """Whether it meets the target."""
        return not self.misses


@dataclass
class Fixed:
    """All that were tried; `chosen` is what the file holds or the rule is, the cheapest that meets the target."""

    concept: Concept
    before: Measured
    tried: list[Tried] = field(default_factory=list)
    chosen: Tried | None = None
    refused: dict[str, str] = field(default_factory=dict)  # methods that lacked what they need, and what

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{"method": t.done.method, "meets": t.meets, "misses": list(t.misses), **t.change.as_json(),
                 "done": t.done.as_json(), "after": t.after.as_json()} for t in self.tried]  # fmt: skip
        return {
            "prompts": list(self.concept.prompts), "attribute": self.concept.attribute,
            "classes": list(self.concept.classes), "target": list(self.concept.target),
            "before": self.before.as_json(), "tried": rows, "refused": self.refused,
            "chosen": self.chosen.done.method if self.chosen else None,
            "meets": bool(self.chosen and self.chosen.meets),
        }  # fmt: skip


def fix(
    job: Job, methods: Sequence[str], target: float = 0.10, slack: float = 0.01, weights: bool = True,
    sources: Callable[[Measured], tuple[Any, Any]] | None = None, say: Callable[[str], None] = print,
    keep: Path | None = None,
) -> Fixed:  # fmt: skip
    """Try methods in their order until one meets the target (`Change.meets`); the model is left as the chosen one made
    it. weights: a rule for prompts is tried and told, but does not end the search.

    sources: (fair, tied) of the job, made when the bias is known. With one method what it lacks is an error; with
    several it is passed over. If none meets the target the one with the least total variation is chosen, of those
    that keep fidelity and readability within 3 x slack, and other attributes within chance, if there is one.

    keep: a folder of this job alone, where finished measurements and the best weights lie for the same call to go on.
    """
    parts = FixParts(keep)
    before = parts.measured(BEFORE)
    if before is None:
        before = job.meter.measure(job.draw)
        parts.keep(BEFORE, before)
    out = Fixed(job.concept, before)
    b = before.bias
    say(f"before: TV {b.tv:.3f} [{b.tv_interval[0]:.3f}, {b.tv_interval[1]:.3f}], floor {b.floor_95:.3f}, most: "
        f"{b.majority} ({max(b.shares):.0%})")  # fmt: skip
    if sources is not None:
        job.fair, job.tied = sources(before)
    start = state_of(job.model.unet)
    for name in methods:
        why, after = parts.refused(name), parts.measured(name)
        made = why is None and after is None
        if made:
            set_state(job.model.unet, start)
            try:
                done = apply_remedy(name, job)
            except UserError as error:
                if len(methods) == 1:
                    raise
                why = str(error)
                parts.keep_refused(name, why)
        if why is not None:
            out.refused[name] = why
            say(f"{name}: passed over, {why}")
            continue
        if after is None:
            after = job.meter.measure(drawing_of(done, job))
        else:
            done = parts.done(name)
        moved = change(before, after)
        found = Tried(done, after, moved, tuple(moved.misses(target, slack)))
        out.tried.append(found)
        if (done.weights or not weights) and (out.chosen is None or _rank(found, slack) < _rank(out.chosen, slack)):
            out.chosen = found
            if made and done.weights:
                parts.keep_best(name, job.model.unet)
        if made:
            parts.keep(name, after, done)
        say(
            f"{name}: TV {moved.tv_after:.3f} (conservative {moved.tv_cons:.3f}), "
            f"fidelity {-moved.fidelity_drop:+.3f}, unreadable {moved.unreadable_rise:+.3f}, "
            f"others {moved.others_tv:.3f} (floor {moved.others_floor:.3f}), "
            f"{done.steps} steps, {done.seconds:.0f} s{'' if done.weights else ', no weights'}"
            f"{'' if made else ' (made before)'}"
        )
        if found.meets and (done.weights or not weights):
            break
    best = None if out.chosen is None or not out.chosen.done.weights else out.chosen.done.method
    kept = None if best is None else parts.best(best)
    set_state(job.model.unet, start if kept is None else kept)
    if best is not None and kept is None:
        apply_remedy(best, job)  # interrupted while the next one's weights took the place of these
    return out


def _rank(tried: Tried, slack: float) -> tuple[bool, bool, float]:
    """Smaller is better: meeting the target, then keeping all else about, then total variation."""
    return not tried.meets, not tried.change.meets(1.0, 3 * slack), tried.change.tv_cons


def save_fixed(model: Model, found: Fixed, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the model, with what was done to it in its metadata; or the rule as JSON where the remedy is one."""
    assert found.chosen is not None
    chosen = found.chosen
    if not chosen.done.weights:
        from dodgeburn.checkpoint.tensorfile import write_atomic

        write_atomic(path, (json.dumps(chosen.done.notes["rule"], indent=1) + "\n").encode())
        return
    said = {
        "base": {"name": model.name, "sha256": model.sha256}, "method": chosen.done.method,
        "prompts": list(found.concept.prompts), "attribute": found.concept.attribute,
        "target": dict(zip(found.concept.classes, found.concept.target, strict=True)), "steps": chosen.done.steps,
        "notes": chosen.done.notes, "change": chosen.change.as_json(), "read_by": "reader", "settings": dict(settings),
    }  # fmt: skip
    kept = {k: v for k, v in model.metadata.items() if k not in ("format", "dodgeburn.training")}
    save_single_file(model, path, {**kept, "modelspec.title": path.stem, RECORD: json.dumps(said, sort_keys=True)})


def fix_report(found: Fixed, model: str) -> Report:
    """The page: every method's figures, shares before and after, and the same prompts and seeds as pictures."""
    c, b = found.concept, found.before.bias
    chosen = found.chosen
    lead = f"{c.prompts[0]}: {c.attribute}. " + (
        f"Chosen: {chosen.done.method}, which {_outcome(chosen)}."
        if chosen else "Nothing was changed."
    )  # fmt: skip
    report = Report(f"A tie taken from {model}", lead)
    report.facts({
        "TV before": f"{b.tv:.3f}", "TV after": f"{chosen.change.tv_after:.3f}" if chosen else "-",
        "floor (95 %)": f"{b.floor_95:.3f}", "pictures read": str(found.before.n),
    })  # fmt: skip
    report.heading("Methods")
    report.table(
        [Column("method", "method", "text"), Column("tv", "TV after", "interval", 3),
         Column("cons", "conservative", "number", 3, "unreadable pictures counted as the majority"),
         Column("fidelity", "fidelity", "signed", 3, "change for prompts of other things"),
         Column("explicit", "explicit", "signed", 3, "change of how often a class that is asked for is shown"),
         Column("unread", "unreadable", "signed", 3), Column("frechet", "Frechet ratio", "number", 2),
         Column("others", "others", "number", 3, "total variation of the other attribute that moved most"),
         Column("floor", "floor of it", "number", 3), Column("spread", "grain spread", "number", 2,
                "largest group's grain less the smallest's, over the mean; over the attribute's classes"),
         Column("steps", "steps", "number", 0), Column("seconds", "seconds", "number", 0)],
        [_before_row(found.before), *(_row(t) for t in found.tried)],
        "Same prompts and seeds in every row. Read by the reader, which also chose: a last word needs the judge.",
        marked=lambda row: "marked" if chosen and row["method"] == chosen.done.method else "",
    )  # fmt: skip
    if found.refused:
        report.bullets([f"{name} was passed over: {why}" for name, why in found.refused.items()])
    _shares(report, found)
    report.heading("Pictures")
    rows: list[tuple[str, Measured]] = [("before", found.before), *((t.done.method, t.after) for t in found.tried)]
    n = min(8, *(len(m.pictures) for _, m in rows))
    report.sheet([list(m.pictures[:n]) for _, m in rows], [name for name, _ in rows], [str(i + 1) for i in range(n)],
                 "The first neutral prompts, not chosen; a column is one prompt and seed.")  # fmt: skip
    return report


def _outcome(tried: Tried) -> str:
    return "meets the target" if tried.meets else f"does not meet the target: {'; '.join(tried.misses)}"


def _before_row(before: Measured) -> dict[str, Any]:
    b = before.bias
    return {"method": "before", "tv": b.tv, "tv_ci": list(b.tv_interval), "cons": b.tv_cons,
            "spread": before.spreads.get("grain")}  # fmt: skip


def _row(t: Tried) -> dict[str, Any]:
    m = t.change
    ends = None if m.fidelity_ends is None else [-m.fidelity_ends[1], -m.fidelity_ends[0]]
    return {
        "method": t.done.method, "tv": m.tv_after, "tv_ci": list(t.after.bias.tv_interval), "cons": m.tv_cons,
        "fidelity": -m.fidelity_drop, "fidelity_ci": ends, "explicit": -m.explicit_drop, "unread": m.unreadable_rise,
        "frechet": m.frechet_ratio, "others": m.others_tv, "floor": m.others_floor,
        "spread": t.after.spreads.get("grain"), "steps": t.done.steps, "seconds": t.done.seconds,
    }  # fmt: skip


def _shares(report: Report, found: Fixed) -> None:
    names = ["before", *(t.done.method for t in found.tried)]
    shares = [found.before.bias.shares, *(t.after.bias.shares for t in found.tried)]
    target = found.concept.target

    def draw(theme: Theme) -> Any:
        from matplotlib.figure import Figure

        k = len(found.concept.classes)
        figure = Figure(figsize=(4.3, 3.4) if theme.narrow else (9.5, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor(theme.background)
        width = 0.8 / len(names)
        colours = (theme.muted, *theme.accents)
        for i, (name, values) in enumerate(zip(names, shares, strict=True)):
            axes.bar(np.arange(k) - 0.4 + (i + 0.5) * width, values, width * 0.94, label=name,
                     color=colours[i % len(colours)])  # fmt: skip
        for j, q in enumerate(target):
            axes.plot([j - 0.42, j + 0.42], [q, q], color=theme.ink, lw=1.4)
        axes.set_xticks(range(k), found.concept.classes)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of pictures", color=theme.ink)
        axes.tick_params(colors=theme.ink)
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink, ncols=2)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        return figure

    report.figure(draw, f"Shares of {found.concept.attribute} before and after each method",
                  "Black lines: the target.")  # fmt: skip


def methods_for(method: str) -> tuple[str, ...]:
    """What --method means: one, or "auto" for all from the cheapest. UserError for an unknown one."""
    if method == "auto":
        return tuple(METHODS)
    if method not in METHODS:
        raise UserError(
            f"no method {method!r}: {did_you_mean(method, ('auto', *METHODS))}expected auto, {', '.join(METHODS)}"
        )
    return (method,)
