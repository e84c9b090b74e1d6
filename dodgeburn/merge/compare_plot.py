"""The comparison's plot: prompt fidelity against resemblance to A and to B, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dodgeburn.measure.report import Report, Theme
from dodgeburn.merge.variants import FOUND

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # by group
GROUPS = len(MARKERS)
OFFSETS = ((0, 10), (10, 3), (-10, 3), (9, -8), (-9, -8))  # of the first ranks' numbers, so that they keep apart

NAME_HEIGHT = 0.045  # of a name, as a share of its panel


def add_plot(
    report: Report, variants: Sequence[Mapping[str, Any]], parents: Sequence[Mapping[str, Any]], score: str
) -> None:
    """Add the plot of these rows (as `Row.as_dict`) to the report: two panels, or one where nothing was read. score:
    what fidelity is called."""
    read = variants[0]["resemblance_a"] is not None
    prefix = "resemblance" if read else "pixel_resemblance"
    if variants[0]["fidelity"] is None:  # nothing to put on the second axis but the other parent
        panels = [(f"{prefix}_a", f"{prefix}_b", "resemblance to A", "resemblance to B")]
    else:
        panels = [
            (f"{prefix}_a", "fidelity", "resemblance to A", score),
            (f"{prefix}_b", "fidelity", "resemblance to B", score),
        ]
    groups = grouped(variants)
    titles = sorted(set(groups.values()))

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure as NewFigure

        across = 1 if theme.narrow else len(panels)
        down = len(panels) if theme.narrow else 1
        figure = NewFigure(figsize=(4.3, 3.6 * down) if theme.narrow else (5.6 * across, 4.6), layout="constrained")
        for i, (x, y, x_title, y_title) in enumerate(panels):
            axes = figure.add_subplot(down, across, i + 1)
            _style(axes, theme, x_title, y_title)
            for row in variants:
                at = titles.index(groups[row["name"]])
                colour = theme.accents[at % len(theme.accents)]
                axes.plot(
                    row[x], row[y], MARKERS[at % len(MARKERS)], ms=7 if row["pareto"] else 5, mec=colour, mew=1.2,
                    mfc=colour if row["pareto"] else "none", alpha=1 if row["pareto"] else 0.75, zorder=3,
                )  # fmt: skip
                if row["rank"] <= len(OFFSETS):
                    axes.annotate(
                        str(row["rank"]), (row[x], row[y]), OFFSETS[row["rank"] - 1], textcoords="offset points",
                        color=theme.ink, fontsize=9, fontweight="bold", ha="center", va="center", zorder=5,
                    )  # fmt: skip
            _mark_parents(axes, parents, x, y, theme)
            _front_line(axes, [(row[x], row[y]) for row in variants], theme)
            if i == 0:
                for at, title in enumerate(titles):
                    axes.plot([], [], MARKERS[at % len(MARKERS)], color=theme.accents[at % len(theme.accents)],
                              label=title)  # fmt: skip
                axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="best")
        return figure

    report.figure(
        draw, f"Scatter plot of the variants' {score} against their resemblance to A and to B",
        "Filled: on the Pareto front of fidelity and both resemblances. Numbers: the first five ranks. Lines A and B: "
        "the parents' fidelity, and their resemblance to one another. Dashed: the front of each panel alone.",
    )  # fmt: skip


def grouped(variants: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Variant's name -> what its marker stands for: its base, or its method where there are several, or one for all
    where those are too many to be told apart. What a search found stands apart.
    """
    found = {row["name"] for row in variants if row["name"].startswith(FOUND)}
    others = [row for row in variants if row["name"] not in found]
    several = len({row["method"] for row in others}) > 1
    names = {row["name"]: row["method"] if several else f"base {row['base']:g}" for row in others}
    if len(set(names.values())) > GROUPS - 1:
        names = {name: text.partition(":")[0] for name, text in names.items()}
    if len(set(names.values())) > GROUPS - 1:
        names = dict.fromkeys(names, "variants")
    return names | dict.fromkeys(found, "found by search")


def _style(axes: Any, theme: Theme, x_title: str, y_title: str) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=9)
    axes.set_xlabel(x_title, color=theme.ink)
    axes.set_ylabel(y_title, color=theme.ink)
    axes.margins(0.09)


def _front_line(axes: Any, points: Sequence[tuple[float, float]], theme: Theme) -> None:
    """The staircase of points that none beats to the right and above."""
    steps: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (-p[0], -p[1])):
        if not steps or y > steps[-1][1]:
            steps.append((x, y))
    axes.step([x for x, _ in steps], [y for _, y in steps], "--", where="pre", color=theme.muted, lw=1, zorder=1)


def _mark_parents(axes: Any, parents: Sequence[Mapping[str, Any]], x: str, y: str, theme: Theme) -> None:
    """Lines at the parents' values. A parent's resemblance to itself (1) is left out: it would squeeze the rest."""
    line: dict[str, Any] = {"color": theme.muted, "lw": 1, "zorder": 2}
    text: dict[str, Any] = {"color": theme.ink, "fontsize": 10, "fontweight": "bold", "annotation_clip": False}
    across = [row for row in parents if not y.endswith(f"_{row['name'].lower()}")]
    upright = [row for row in parents if not x.endswith(f"_{row['name'].lower()}")]
    for row in across:
        axes.axhline(row[y], **line)
    for row in upright:
        axes.axvline(row[x], **line)
    for name, at in _named(across, y, axes.get_ylim()):
        axes.annotate(name, (1, at), (4, 0), xycoords=("axes fraction", "data"), va="center",
                      textcoords="offset points", **text)  # fmt: skip
    for name, at in _named(upright, x, axes.get_xlim()):
        axes.annotate(name, (at, 1), (0, 4), xycoords=("data", "axes fraction"), ha="center",
                      textcoords="offset points", **text)  # fmt: skip


def _named(rows: Sequence[Mapping[str, Any]], key: str, ends: tuple[float, float]) -> list[tuple[str, float]]:
    """What stands beside the rows' lines, and where; lines too near for two names share one."""
    found: list[tuple[str, float]] = []
    for row in sorted(rows, key=lambda row: float(row[key])):
        if found and row[key] - found[-1][1] < NAME_HEIGHT * (ends[1] - ends[0]):
            found[-1] = f"{found[-1][0]}, {row['name']}", found[-1][1]
        else:
            found.append((str(row["name"]), float(row[key])))
    return found
