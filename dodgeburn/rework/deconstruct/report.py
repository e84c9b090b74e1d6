"""A deconstruction as a page: its curves, a sheet of pictures for every stage, the merges that were looked at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dodgeburn.measure.report import Column, Report, Theme
from dodgeburn.rework.deconstruct.merge_map import merge_map, spoken
from dodgeburn.rework.deconstruct.spec import DeconstructSpec
from dodgeburn.rework.deconstruct.stage_log import StageLog, strip_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dodgeburn.rework.deconstruct.run import Deconstructed

ROWS = 9  # of a stage's sheet; more checks are thinned out, the first and last stay
_STAGES = ("audit", "overtrain", "nightshade", "bucket", "retrain", "after")
_TITLES = {"audit": "untouched", "overtrain": "1 overtrained", "nightshade": "2 nightshaded", "bucket": "3 merged back",
           "retrain": "4 retrained", "after": "outcome"}  # fmt: skip
_ASKED = {
    "overtrain": "Trained on the majority alone, until it comes apart in a measured way.",
    "nightshade": "Pictures of what is under-represented stand under the concept's name.",
    "bucket": "What the noise states changed is merged into the untouched model; a row is a merge that was looked at.",
    "retrain": "Balanced pictures, with the untouched model's answers to other prompts held in place.",
}
_COLUMNS = (
    Column("name", "check", "text"),
    Column("loss", "L", "number", 2, "held-out loss over the untouched model's"),
    Column("tv", "B", "number", 3, "total variation from the target"),
    Column("tv_cons", "B, conservative", "number", 3, "unreadable pictures counted as the majority"),
    Column("unread", "unreadable", "number", 3),
    Column("fidelity", "explicit prompts", "number", 3, "share that show what they say"),
    Column("others", "other prompts", "number", 3, "the same for other things: its fall is bleed-through"),
    Column("frechet", "Fréchet", "number", 2, "from held-out real pictures, in the reader's features"),
    Column("variety", "variety", "number", 2, "over the untouched model's; low: all pictures look alike"),
    Column("grain", "grain", "number", 2, "over real pictures'"), Column("colour", "colour", "number", 2,
                                                                         "colour spread over real pictures'"),
)  # fmt: skip


def deconstruct_report(found: Deconstructed, model: str) -> Report:
    """The page of a finished run."""
    spec, b, a = found.spec, found.before, found.after
    prompts = ", ".join(repr(p) for p in spec.concept.prompts)
    target = ", ".join(f"{v} {s:.0%}" for v, s in zip(spec.concept.values, spec.concept.shares, strict=True))
    report = Report(
        f"Constructive deconstruction: {spec.name}",
        f"{model}: {spec.concept.attribute} with {prompts}, towards {target}.",
    )
    if not found.biased:
        report.text(
            f"Nothing to do: the total variation of the untouched model, {b.tv:.3f}, is no more than chance shows in "
            f"{found.panel.neutral} pictures of an unbiased one."
        )
        return report
    report.facts({
        "total variation": f"{b.tv:.3f} → {a.tv:.3f}",
        "explicit prompts followed": f"{b.fidelity:.1%} → {a.fidelity:.1%}",
        "other prompts followed": f"{_share(b.others)} → {_share(a.others)}", "held-out loss": f"{a.loss:.3f} x",
        "gradient steps": str(found.steps), "minutes": f"{sum(s.seconds for s in found.stages) / 60:.1f}",
    })  # fmt: skip
    report.text(
        "Read by the classifier that also guided the run: what it promises is for an evaluation with other prompts, "
        "seeds and another reader to confirm. The definition of the stages is dodgeburn's own.", note=True,
    )  # fmt: skip
    report.heading("Stages")
    report.table(
        [Column("stage", "stage", "text"), Column("decision", "how it ended", "text"),
         Column("reached", "reached", "text"), Column("steps", "gradient steps", "number", 0),
         Column("samples", "pictures trained on", "number", 0), Column("drawn", "pictures drawn", "number", 0),
         Column("seconds", "seconds", "number", 0), Column("sha256", "U-Net", "text")],
        [{**s.as_json(), "reached": "yes" if s.reached else "no", "sha256": s.sha256[:12]} for s in found.stages],
    )  # fmt: skip
    predicted = next((s.detail for s in found.stages if "predictable" in s.detail), None)
    if predicted is not None:
        stops = ", ".join("never" if x is None else str(x) for x in predicted["stops"])
        cv = "none that can be told" if predicted["cv"] is None else f"{predicted['cv']:.2f}"
        report.text(
            f"Is the noisy state predictable? With {len(predicted['stops'])} seeds overtraining stopped at steps "
            f"{stops}; coefficient of variation: {cv}: {'yes' if predicted['predictable'] else 'no'} (limit "
            f"{spec.overtrain.predict_cv:g})."
        )
    rows = {stage: _rows(found.folder, stage) for stage in _STAGES}
    report.heading("Curves")
    report.figure(lambda theme: _curves(theme, rows, spec), "Meters at every check of every stage",
                  "Every check in order. Stage 3 looks at merges, no training: its points are not joined and have "
                  "the numbers of the merges below.")  # fmt: skip
    report.heading("Pictures")
    report.text("The same prompts and seeds throughout, never chosen.")
    _sheets(report, found.folder, rows)
    _bucket(report, found, rows["bucket"])
    report.heading("All checks")
    cells = [{**row, "name": f"{_TITLES[stage]}: {_label(row)}"} for stage in _STAGES for row in rows[stage]]
    report.table(_COLUMNS, cells)
    report.heading("Settings")
    report.code(spec.model_dump_json(indent=1), "The whole spec")
    if found.left_out:
        report.heading("Left out of the folder", 3)
        report.bullets(list(found.left_out[:50]))
    return report


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Checks of a stage, in order; the other seeds of the test of predictability are left out."""
    if not (folder / f"{stage}.jsonl").exists():
        return []
    rows = StageLog(folder, stage).rows.values()
    return [row for row in rows if "tv" in row and not str(row["key"]).startswith("seed")]


def _label(row: dict[str, Any]) -> str:
    if "name" in row and "v" in row:
        return str(row["name"])
    step = f"step {row['step']}" if "step" in row else "all meters"
    attempt = f", attempt {int(row['attempt']) + 1}" if str(row.get("attempt", "0")) != "0" else ""
    return step + attempt + (", fine-tune" if row.get("part") == "b" else "")


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _curves(theme: Theme, rows: dict[str, list[dict[str, Any]]], spec: DeconstructSpec) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(4.3, 7.5) if theme.narrow else (10, 6.4), layout="constrained")
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(3, 1, sharex=True)))
    panels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
        ("L", (("loss", "held-out loss"),)),
        ("share", (("tv", "B: total variation"), ("fidelity", "explicit prompts"), ("others", "other prompts"))),
        ("over untouched, real", (("variety", "variety"), ("grain", "grain"), ("colour", "colour"))),
    )
    at, spans = 0, []
    where: dict[str, range] = {}
    for stage in _STAGES:
        if rows[stage]:
            where[stage] = range(at, at + len(rows[stage]))
            spans.append((at, at + len(rows[stage]), stage))
            at += len(rows[stage])
    for ax, (title, series) in zip(axes, panels, strict=True):
        ax.set_facecolor(theme.background)
        for colour, (key, label) in zip(theme.accents, series, strict=False):
            first = True
            for stage, places in where.items():
                values = [_number(row.get(key)) for row in rows[stage]]
                values = [v if math.isfinite(v) else math.nan for v in values]
                known = [i for i, v in enumerate(values) if not math.isnan(v)]
                line = "None" if stage == "bucket" else "-"
                ax.plot([places[i] for i in known], [values[i] for i in known], ls=line, color=colour, lw=1.6,
                        marker="o", ms=3, label=label if first and known else None)  # fmt: skip
                if stage == "bucket" and key in ("loss", "tv"):
                    for i in known:
                        ax.annotate(str(i), (places[i], values[i]), (0, 4), textcoords="offset points", ha="center",
                                    fontsize=6, color=theme.ink, clip_on=True)  # fmt: skip
                first = first and not known
        for k, (low, _, stage) in enumerate(spans):
            if k:
                ax.axvline(low - 0.5, color=theme.muted, lw=0.8, ls=":")
            if ax is axes[0] and not theme.narrow:
                # In two lines by turns: a stage may have a single check, and its name is wider than that.
                ax.text(low - 0.4, 1.12 if k % 2 == 0 else 1.02, _TITLES[stage], transform=ax.get_xaxis_transform(),
                        fontsize=8, color=theme.muted)  # fmt: skip
        ax.set_ylabel(title, color=theme.ink)
        ax.tick_params(colors=theme.ink, labelsize=8)
        ax.grid(axis="y", color=theme.grid)
        for side in ("top", "right", "left", "bottom"):
            ax.spines[side].set_color(theme.grid)
        if len(series) > 1:
            ax.legend(fontsize=7, labelcolor=theme.ink, facecolor=theme.background, edgecolor=theme.grid, loc="best")
    if any(_number(row.get("loss")) > 6 for part in rows.values() for row in part):
        axes[0].set_yscale("log")
    highest = 1.5 * axes[0].get_ylim()[1]
    band = [spec.overtrain.loss_low, spec.overtrain.loss_high] if "overtrain" in where else []
    for level in (level for level in band if level < highest):
        axes[0].axhline(level, color=theme.accents[1], lw=0.8, ls="--")
    axes[1].axhline(spec.retrain.tv, color=theme.accents[0], lw=0.8, ls="--")
    axes[-1].set_xlabel("check", color=theme.ink)
    return figure


def _sheets(report: Report, folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    ends = [(stage, rows[stage][-1]) for stage in ("audit", "after") if rows[stage]]
    for stage in ("overtrain", "nightshade", "bucket", "retrain"):
        if not rows[stage]:
            continue
        report.heading(_TITLES[stage].capitalize(), 3)
        report.text(_ASKED[stage])
        shown = [(stage, row) for row in _thinned(rows[stage])]
        shown = ends[:1] + shown + (ends[1:] if stage == "retrain" else [])
        pictures, labels = [], []
        for name, row in shown:
            path = StageLog(folder, name).strip(str(row["key"]))
            if path.exists():
                pictures.append(_strip(path))
                labels.append(f"{_TITLES[name] if name != stage else _label(row)}: L {_number(row['loss']):.2f}, "
                              f"B {_number(row['tv']):.2f}")  # fmt: skip
        if pictures:
            wide = max(map(len, pictures))
            padded: list[list[np.ndarray | None]] = [[*line, *[None] * (wide - len(line))] for line in pictures]
            report.sheet(padded, labels, [str(i + 1) for i in range(wide)])


def _strip(path: Path) -> list[np.ndarray]:
    from PIL import Image

    with Image.open(path) as image:
        side = image.height - 2
    return strip_pictures(path, side)


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    drawn = [row for row in rows if row.get("tv") is not None]
    if len(drawn) <= ROWS:
        return drawn
    return [drawn[round(i * (len(drawn) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _bucket(report: Report, found: Deconstructed, rows: list[dict[str, Any]]) -> None:
    stage = next((s for s in found.stages if s.stage == "bucket"), None)
    if stage is None:
        return
    detail = stage.detail
    report.heading("Merges")
    best = detail["best"]["name"]
    report.html_block(merge_map(rows, best))
    unbeaten = {row["name"] for row in detail["pareto"]}
    columns = [
        Column("number", "number", "number", 0),
        Column("merge", "merge", "text"),
        *_COLUMNS[1:6],
        Column("unbeaten", "unbeaten", "text", hint="no other is better in B, L and explicit prompts together"),
    ]
    cells = [{**row, "number": i, "merge": spoken(row), "unbeaten": "yes" if row["name"] in unbeaten else ""}
             for i, row in enumerate(rows)]  # fmt: skip
    report.table(columns, cells, f"All {detail['trials']} that were looked at; few pictures each. Tinted: taken "
                 f"({detail['method']}).", marked=lambda row: "marked" if row["name"] == best else "")  # fmt: skip
    if "order_difference" in detail:
        report.text(f"The other order of the two axes gives a merge {detail['order_difference']:.2%} of its way away.")
    if detail["opposite"]:
        report.text(f"{detail['opposite']} tensors were changed in opposite directions by the two noise states: no arc "
                    "between them, merged along the straight line.")  # fmt: skip
    changes = [{"bucket": name, **row} for name, row in detail["buckets"].items()]
    changes.sort(key=lambda row: -row["size"])
    report.table(
        [Column("bucket", "bucket", "text"),
         Column("first", "first noise state", "number", 4, "change over weights"),
         Column("second", "second", "number", 4, "change over weights"),
         Column("degrees", "angle between", "number", 1)],
        changes[:24], "The buckets that changed most.",
    )  # fmt: skip
