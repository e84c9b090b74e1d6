"""An audit as a page: what stands out and by how much more than chance, with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dodgeburn.measure.report import Column, Report, Theme
from dodgeburn.rework.bias.audit import SHOWN, Audit, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 14  # rows of the plot
PROMPTS = 16  # of the sheet


def audit_report(found: Audit, model: str, classes: Mapping[str, Sequence[str]]) -> Report:
    """The page; `classes` are the classifier's."""
    settings, alarms = found.settings, found.alarms
    proxy = found.by.startswith("proxy")
    what = f"{len(found.rows)} tests on {found.pictures} pictures, read by {found.by}."
    if proxy:
        what += " A proxy: its own biases are in every figure."
    report = Report(f"Bias audit of {model}", what)
    report.facts({
        "prompts that stand out": f"{len({(r.guidance, r.prompt) for r in alarms})} of "
                                  f"{len(settings.prompts) * len(settings.guidance)}",
        "alarms": str(len(alarms)), "tolerated total variation": f"{settings.tolerance:g}",
        "chance of a false alarm" if settings.control == "holm" else "false ones among alarms": f"{settings.level:.0%}",
    })  # fmt: skip
    report.heading("What stands out")
    if not alarms:
        report.text("Nothing: no prompt's shares are further from those of the other prompts than is tolerated.")
    else:
        report.table(_COLUMNS, [_cells(row) for row in alarms],
                     "Shares of pictures drawn for this test alone; the class named is the one most over its share "
                     "with the other prompts.")  # fmt: skip
    _bars(report, found)
    report.heading("Pictures")
    _sheet(report, found)
    report.heading("What goes together without being named")
    pairs = found.information(settings.guidance[0], classes)[:10]
    report.table(
        [Column("pair", "attributes", "text"),
         Column("nats", "mutual information (nats)", "number", 3, "less what independent attributes show by chance")],
        [{"pair": f"{a} and {b}", "nats": nats} for a, b, nats in pairs],
        "Over the pictures of all prompts that leave both open.",
    )  # fmt: skip
    report.heading("Quality by group")
    report.text(
        "Spread: the largest group's mean less the smallest's, as a share of the mean of all. The floor is "
        "what 95 % of random groupings stay under. A group drawn finer or flatter by design spreads too."
    )
    report.table(
        [Column("attribute", "attribute", "text"), Column("measure", "measure", "text"),
         Column("value", "spread", "number"), Column("floor", "floor", "number"), Column("means", "by group", "text")],
        [{"attribute": a, "measure": s.measure, "value": s.value, "floor": s.floor,
          "means": ", ".join(f"{k} {v:.3g}" for k, v in s.means.items())}
         for a, s in found.spreads(settings.guidance[0])[:12]],
    )  # fmt: skip
    report.heading("All tests")
    report.table(_COLUMNS, [_cells(row) for row in sorted(found.rows, key=lambda r: -r.tv)],
                 marked=lambda row: "marked" if row["alarm"] else "")  # fmt: skip
    report.heading("Settings")
    report.settings({
        "prompts": "; ".join(settings.prompts), "guidance": list(settings.guidance), "pictures a prompt": settings.n,
        "fresh pictures for candidates": settings.confirm, "candidates below p": settings.candidates,
        "tolerance": settings.tolerance, "control": settings.control, "level": settings.level, "seed": settings.seed,
    })  # fmt: skip
    return report


_COLUMNS = (
    Column("prompt", "prompt", "text"), Column("guidance", "guidance", "number", 1),
    Column("attribute", "attribute", "text"), Column("value", "class", "text"),
    Column("share", "share", "number", 2), Column("reference_share", "with others", "number", 2),
    Column("tv", "TV from others", "interval", 3, "total variation, with its 95 % interval"),
    Column("floor", "floor", "number", 3, "95 % of samples of this size are below it where there is no difference"),
    Column("p", "p", "number", 4, "of the test that decides; a dash: no candidate"),
    Column("uniform", "TV from uniform", "number", 3),
    Column("cons", "conservative", "number", 3, "from uniform, unreadable pictures counted as the majority"),
    Column("entropy", "entropy", "number", 2, "1 = uniform"), Column("gap", "pairwise gap", "number", 2),
    Column("unread", "unreadable", "number", 3),
)  # fmt: skip


def _cells(row: Row) -> dict[str, Any]:
    u = row.uniform
    return {
        "prompt": row.prompt, "guidance": row.guidance, "attribute": row.attribute, "value": row.value,
        "share": row.share, "reference_share": row.reference_share, "tv": row.tv, "tv_ci": list(row.tv_interval),
        "floor": row.floor_95, "p": row.p, "uniform": u.tv, "cons": u.tv_cons, "entropy": u.entropy,
        "gap": u.pairwise_gap, "unread": u.unread / max(1, u.n), "alarm": row.alarm,
    }  # fmt: skip


def _bars(report: Report, found: Audit) -> None:
    rows = sorted((r for r in found.rows if np.isfinite(r.tv)), key=lambda r: -r.tv)[:BARS]

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure as NewFigure

        figure = NewFigure(figsize=(4.3, 0.42 * len(rows) + 1) if theme.narrow else (9.5, 0.34 * len(rows) + 1),
                           layout="constrained")  # fmt: skip
        axes = figure.add_subplot()
        axes.set_facecolor(theme.background)
        for i, row in enumerate(rows):
            colour = theme.accents[1] if row.alarm else theme.muted
            axes.barh(i, row.tv, height=0.62, color=colour, alpha=0.9 if row.alarm else 0.5)
            axes.plot(row.tv_interval, [i, i], color=theme.ink, lw=1.4)
            axes.plot([row.floor_95] * 2, [i - 0.31, i + 0.31], color=theme.accents[0], lw=2)
        axes.axvline(found.settings.tolerance, color=theme.ink, lw=1, ls=":")
        several = len(found.settings.guidance) > 1
        scale = [f" (guidance {r.guidance:g})" if several else "" for r in rows]
        axes.set_yticks(range(len(rows)), [f"{r.prompt}: {r.attribute} = {r.value}{s}"
                                           for r, s in zip(rows, scale, strict=True)])  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("total variation from the other prompts", color=theme.ink)
        axes.tick_params(colors=theme.ink, labelsize=7 if theme.narrow else 9)
        axes.grid(axis="x", color=theme.grid)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        return figure

    report.figure(draw, "Bars of total variation for the prompts and attributes that differ most",
                  "Filled: alarms. Black line: 95 % interval. Blue mark: the floor, which 95 % of samples of this size "
                  "stay under where there is no difference. Dotted: what is tolerated.")  # fmt: skip


def _sheet(report: Report, found: Audit) -> None:
    guidance = found.settings.guidance[0]
    first = list(dict.fromkeys(r.prompt for r in found.alarms))
    prompts = [*first, *(p for p in found.settings.prompts if p not in first)][:PROMPTS]
    rows = [list(found.samples[guidance, p][0].pictures) for p in prompts]
    padded: list[list[np.ndarray | None]] = [[*row, *[None] * (SHOWN - len(row))] for row in rows]
    report.sheet(padded, prompts, [str(i + 1) for i in range(SHOWN)],
                 f"The first pictures of {len(prompts)} prompts at guidance {guidance:g}; not chosen. "
                 "Prompts that stand out come first.")  # fmt: skip
