"""A report as one HTML file that needs nothing else: no network, no folder beside it. Reads well light and dark, on a
wide screen and on a telephone.

    report = Report("Title", "What was done and what came of it.")
    report.heading("Results")
    report.table([Column("name", "variant", "text"), Column("fidelity", "fidelity", "interval")], rows)
    report.save("report.html")

All text is escaped; only what `html_block` takes is not.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from dodgeburn.checkpoint.tensorfile import write_atomic
from dodgeburn.measure.page import SORTING, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE_PIXELS = 256  # longest side of a picture in a sheet; larger ones are reduced
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Column:
    """A table's column: the key in the rows, its title, what it holds, and an explanation shown on hover.

    kind "number" shows `digits` decimals ("signed": with its sign); "interval" takes a number under `key` and its
    [low, high] under `key` + "_ci", drawn on a scale from `scale[0]` to `scale[1]`; "curve" takes numbers in 0..1 and
    draws them as bars.
    """

    key: str
    title: str
    kind: Literal["text", "number", "signed", "interval", "curve"] = "text"
    digits: int = 3
    hint: str = ""
    scale: tuple[float, float] = (0.0, 1.0)
    brief: bool = False  # an interval's ends are drawn, and written out only on hover
    under: str = ""  # of a text column: the key of what stands below it, small, where a row has any


@dataclass(frozen=True)
class Theme:
    """Colours of a plot, to match the page; `narrow` plots are laid out for a telephone."""

    background: str
    ink: str
    muted: str
    grid: str
    accents: tuple[str, ...]  # told apart by people who see few colours, too (after Okabe and Ito)
    narrow: bool = False


LIGHT = Theme("#ffffff", "#1d2126", "#5d6672", "#e4e7ea", ("#0072b2", "#d55e00", "#009e73", "#8f4f87", "#7a6a00"))
DARK = Theme("#1b1f25", "#e6e8eb", "#9aa4b1", "#333a44", ("#5ab4e6", "#f0913c", "#35c79b", "#d79bc6", "#e5d75a"))


class Report:
    """An HTML page that grows section by section; see the module's text."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._lead = lead
        self._parts: list[str] = []
        self._headings: list[str] = []

    # ------------------------------------------------------------------------------------------------ text

    def heading(self, text: str, level: Literal[2, 3] = 2) -> None:
        """A section's heading; those of level 2 are listed at the top."""
        if level == 2:
            self._headings.append(text)
            self._parts.append(f'<h2 id="s{len(self._headings)}">{escape(text)}</h2>')
        else:
            self._parts.append(f"<h3>{escape(text)}</h3>")

    def text(self, text: str, note: bool = False) -> None:
        """A paragraph; `note` sets it small and grey."""
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        """A list."""
        if items:
            self._parts.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")

    def facts(self, facts: Mapping[str, str]) -> None:
        """A row of cards, each a short value with its name below."""
        cards = "".join(f"<div><b>{escape(str(v))}</b><span>{escape(k)}</span></div>" for k, v in facts.items())
        self._parts.append(f'<div class="facts">{cards}</div>')

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Names and values, one line each."""
        lines = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in settings.items())
        self._parts.append(f"<dl>{lines}</dl>")

    def code(self, text: str, summary: str | None = None) -> None:
        """Text as it is, in a typewriter face; folded away under `summary` where one is given."""
        block = f"<pre><code>{escape(text)}</code></pre>"
        self._parts.append(_folded(summary, block))

    def html_block(self, markup: str) -> None:
        """Markup of the caller's own, as it is: whatever is in it must be escaped already."""
        self._parts.append(markup)

    # ---------------------------------------------------------------------------------------------- tables

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Mapping[str, Any]],
        caption: str = "",
        marked: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        """A table whose columns sort at a click. None and NaN show as a dash.

        `marked` gives a row's class: "marked" (tinted), "parent" (bold) or "".
        """
        heads = "".join(
            f'<th scope="col"{_class(c)}{f" title={chr(34)}{escape(c.hint)}{chr(34)}" if c.hint else ""}>'
            f"<button>{escape(c.title)}</button></th>"
            for c in columns
        )
        name = next((c for c in columns if c.kind == "text"), None)  # stays in view when the table is scrolled sideways
        body = ""
        for row in rows:
            kind = marked(row) if marked else ""
            cells = "".join(_cell(c, row, c is name) for c in columns)
            body += f"<tr{f' class={chr(34)}{escape(kind)}{chr(34)}' if kind else ''}>{cells}</tr>"
        tall = " tall" if len(rows) > 25 else ""
        self._parts.append(
            f'<figure><div class="frame"><div class="scroll{tall}"><table class="data"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></div>{_caption(caption)}</figure>"
        )

    # -------------------------------------------------------------------------------------------- pictures

    def figure(self, draw: Callable[[Theme], Figure], alt: str, caption: str = "") -> None:
        """A matplotlib figure, drawn four times (light and dark, wide and narrow); the browser shows one."""
        uris = {}
        for name, theme in (("light", LIGHT), ("dark", DARK)):
            for narrow in (False, True):
                picked = Theme(theme.background, theme.ink, theme.muted, theme.grid, theme.accents, narrow)
                uris[name, narrow] = _figure_uri(draw(picked), theme)
        sources = "".join(
            f'<source media="{query}" srcset="{uri}">'
            for query, uri in (
                ("(prefers-color-scheme: dark) and (max-width: 600px)", uris["dark", True]),
                ("(prefers-color-scheme: dark)", uris["dark", False]),
                ("(max-width: 600px)", uris["light", True]),
            )
        )
        image = f'<img class="plot" alt="{escape(alt)}" src="{uris["light", False]}">'
        self._parts.append(f"<figure><picture>{sources}{image}</picture>{_caption(caption)}</figure>")

    def sheet(
        self,
        pictures: Sequence[Sequence[np.ndarray | None]],
        rows: Sequence[str],
        columns: Sequence[str],
        caption: str = "",
        parents: Sequence[str] = (),
        summary: str | None = None,
    ) -> None:
        """A contact sheet: `pictures[r][c]` uint8 [h, w, 3] (or None for a gap), with labels.

        Columns named in `parents` have bold labels. On a narrow screen it scrolls sideways, its row labels staying.
        With a `summary` it is folded away under that line.
        """
        heads = "".join(
            f'<th scope="col"{" class=parent" if c in parents else ""}>{_breakable(c)}</th>' for c in columns
        )
        body = ""
        for label, line in zip(rows, pictures, strict=True):
            cells = "".join(
                "<td></td>" if p is None else f'<td><img alt="{escape(f"{c}: {label}")}" src="{picture_uri(p)}"></td>'
                for c, p in zip(columns, line, strict=True)
            )
            body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
        least, most = 100 + 76 * len(columns), 190 + (TILE_PIXELS + 4) * len(columns)
        block = (
            f'<figure class="sheet"><div class="frame"><div class="scroll">'
            f'<table style="min-width:{least}px;max-width:{most}px">'
            f"<thead><tr><th></th>{heads}</tr></thead>"
            f"<tbody>{body}</tbody></table></div></div>{_caption(caption)}</figure>"
        )
        self._parts.append(_folded(summary, block))

    # ---------------------------------------------------------------------------------------------- output

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#s{i}">{escape(h)}</a>' for i, h in enumerate(self._headings, 1))
        nav = f"<nav>{links}</nav>" if len(self._headings) > 1 else ""
        lead = f'<p class="lead">{escape(self._lead)}</p>' if self._lead else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main><h1>{escape(self.title)}</h1>{lead}{nav}\n" + "\n".join(self._parts) +
            "\n<footer>Made by dodgeburn. This page is one file and asks nothing of the network.</footer>"
            f"</main><script>{SORTING}</script></body></html>\n"
        )  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all. Raises UserError if it cannot be written."""
        write_atomic(path, self.html().encode())
        return Path(path)


def picture_uri(picture: np.ndarray | Image.Image, longest: int = TILE_PIXELS) -> str:
    """A picture (uint8 [h, w, 3]) as a data URI, reduced to at most `longest` pixels a side; nearly lossless WebP."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    if max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=92, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure_uri(figure: Figure, theme: Theme) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=theme.background, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, (float, np.floating)) and math.isnan(value))


def _class(column: Column) -> str:
    return ' class="text"' if column.kind in ("text", "curve") else ""


def _cell(column: Column, row: Mapping[str, Any], is_name: bool) -> str:
    value = row.get(column.key)
    if column.kind == "curve":
        numbers = [float(v) for v in value or ()]
        return f'<td class="text" data-v="{sum(numbers):.6g}">{_curve(numbers)}</td>'
    if not _known(value):
        return f'<td{_class(column)} data-v="">–</td>'
    if column.kind == "text":
        kind = "text name" if is_name else "text words"
        below = row.get(column.under) if column.under else None
        small = f' <span class="ends">{_breakable(str(below))}</span>' if below else ""
        return f'<td class="{kind}" data-v="{escape(str(value))}">{_breakable(str(value))}{small}</td>'
    assert value is not None
    number = float(value)
    sign = "+z" if column.kind == "signed" else "z"  # z: a zero has no minus
    shown = f"{number:{sign}.{column.digits}f}"
    extra = written = ""
    ends = row.get(column.key + "_ci") if column.kind in ("interval", "signed") else None
    if ends is not None:
        low, high = (float(end) for end in ends)
        written = f"[{low:{sign}.{column.digits}f}, {high:{sign}.{column.digits}f}]"
        extra = "" if column.brief else f' <span class="ends">{written}</span>'
        if column.kind == "interval":
            extra += _span(number, low, high, column.scale)
    title = f' title="{written}"' if column.brief and written else ""
    return f'<td data-v="{number:.9g}"{title}>{shown}{extra}</td>'


def _span(mean: float, low: float, high: float, scale: tuple[float, float]) -> str:
    def at(x: float) -> float:
        return 100 * min(1.0, max(0.0, (x - scale[0]) / ((scale[1] - scale[0]) or 1.0)))

    return (
        f'<span class="span"><i style="left:{at(low):.1f}%;width:{at(high) - at(low):.1f}%"></i>'
        f'<u style="left:{at(mean):.1f}%"></u></span>'
    )


def _curve(numbers: Sequence[float]) -> str:
    bars = "".join(
        f'<rect x="{4 * i}" y="{20 - max(0.6, 20 * v):.2f}" width="3" height="{max(0.6, 20 * v):.2f}"/>'
        for i, v in enumerate(numbers)
    )
    width = 4 * len(numbers)
    return (
        f'<svg class="curve" width="{width}" height="20" viewBox="0 0 {width} 20" fill="currentColor" '
        f'aria-hidden="true">{bars}</svg>'
    )


def _breakable(label: str) -> str:
    """The label, escaped, with places to break a CamelCaseName before its words (not before the V of GradV)."""
    out = ""
    for i, letter in enumerate(label):
        if i and letter.isupper() and label[i - 1].islower() and label[i + 1 : i + 2].islower():
            out += "<wbr>"
        out += escape(letter)
    return out


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _folded(summary: str | None, block: str) -> str:
    return block if summary is None else f"<details><summary>{escape(summary)}</summary>{block}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return "none" if value is None or value == "" else str(value)
