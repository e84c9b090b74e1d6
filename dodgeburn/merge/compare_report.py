"""What a comparison leaves behind: results.json, table.csv, contact sheets, and report.html with everything
in it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dodgeburn.checkpoint.tensorfile import write_atomic
from dodgeburn.measure.fidelity import TOLERANCE
from dodgeburn.measure.intervals import RESAMPLES
from dodgeburn.measure.machine import machine
from dodgeburn.measure.report import Column, Report
from dodgeburn.merge.command import merge_command
from dodgeburn.merge.compare import PARENTS, Comparison
from dodgeburn.merge.compare_pictures import about_merge
from dodgeburn.merge.compare_plot import add_plot
from dodgeburn.merge.compare_sheets import add_sheets, shown_settings, write_sheets
from dodgeburn.merge.ranking import FIGURES
from dodgeburn.merge.search_report import add_search, search_json, shown_score, verdict


def write_outputs(result: Comparison) -> None:
    """Write all of a comparison's files into its folder; fills in `result.files`."""
    variants = [row.as_dict() for row in result.rows]
    parents = [row.as_dict() for row in result.parents]
    folder = result.folder
    result.files["table"] = str(folder / "table.csv")
    write_atomic(folder / "table.csv", _csv(parents + variants).encode())
    sheets = write_sheets(result)
    result.files["sheets"] = str(folder / "sheets")
    report = Report(_title(result), summary(result, variants, parents))
    add_sections(report, result, variants, parents)
    result.files["report"] = str(report.save(folder / "report.html"))
    result.files["results"] = str(folder / "results.json")
    found = {**as_json(result, variants, parents), "sheets": sheets, **_details(result)}
    write_atomic(folder / "results.json", (json.dumps(found, indent=1) + "\n").encode())


def as_json(
    result: Comparison, variants: Sequence[Mapping[str, Any]] | None = None,
    parents: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `dodgeburn compare --json` prints."""
    return {
        "variants": len(result.rows),
        "seconds": round(result.seconds, 2),
        "rows": list(variants if variants is not None else [row.as_dict() for row in result.rows]),
        "parents": list(parents if parents is not None else [row.as_dict() for row in result.parents]),
        "held_out": result.held_out,
        **({} if result.search is None else {"search": search_json(result.search)}),
        "full_reads": round(result.full_reads, 3),
        "resumed": result.resumed,
        "read_by": result.read_by,
        "notes": result.notes,
        "files": result.files,
    }


def _details(result: Comparison) -> dict[str, Any]:
    def by_prompt(values: np.ndarray | None) -> list[float | None] | None:
        return (
            None if values is None else [None if np.isnan(v).all() else round(float(np.nanmean(v)), 5) for v in values]
        )

    return {
        "a": result.a,
        "b": result.b,
        "others": [facts for key, facts in result.models.items() if key not in PARENTS],
        "layout": result.layout,
        "settings": shown_settings(result),
        "asked": result.asked,
        "machine": machine(result.device),
        "fidelity_by_prompt": {row.name: by_prompt(row.measured.fidelity) for row in [*result.parents, *result.rows]},
        "shares": {row.name: row.shares for row in result.rows},
        "merges": {row.name: about_merge(result.variants[row.name]) for row in result.rows},
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [key for key in rows[0] if not key.endswith("_ci")]
    head = []
    for key in columns:
        head += [key, f"{key}_low", f"{key}_high"] if f"{key}_ci" in rows[0] else [key]
    writer.writerow(head)
    for row in rows:
        line: list[Any] = []
        for key in columns:
            line.append(row[key])
            if f"{key}_ci" in row:
                line += row[f"{key}_ci"] or ["", ""]
        writer.writerow(line)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------- page


def _title(result: Comparison) -> str:
    return f"{len(result.rows)} merges of {result.a['name']} and {result.b['name']}"


def summary(result: Comparison, variants: Sequence[Mapping[str, Any]], parents: Sequence[Mapping[str, Any]]) -> str:
    """What came of it, in two or three sentences."""
    if result.search is not None:
        return verdict(result.search)
    best = variants[0]
    if best["fidelity"] is None:
        kind = "resemblance" if best["resemblance_a"] is not None else "pixel_resemblance"
        return (
            f"{called(best)} is the merge that stays closest to both models "
            f"({best[kind + '_a']:.3f} to A, {best[kind + '_b']:.3f} to B, where 1 is the same picture)."
        )
    a, b = parents
    said = shown_score(result.proxy)
    alike = sum(abs(row["fidelity"] - best["fidelity"]) < 1e-9 for row in variants)
    most, much, has = ("shows most", "show equally much", "shows")
    what = "of what the prompts ask for"
    if result.proxy:
        most, much, has = "follows the prompts best", "follow the prompts equally well", "has"
        what = f"by {result.read_by}"
    first = f"{called(best)} {most} {what}"
    if alike > 1:
        first = f"{alike} {much} {what}, and of these {called(best)} stays closest to both models"
    share = f"{said(best['fidelity'])}{_ends(best['fidelity_ci'], result.proxy)}"
    text = f"Of the merges, {first}: {share}; A {has} {said(a['fidelity'])}, B {said(b['fidelity'])}. "
    if result.held_out:
        text += (
            "The best of many looks better on the pictures it was chosen by than it is. Chosen on all prompts but one, "
            "and looked at on the one left out, it has "
            f"{said(result.held_out['fidelity'])}{_ends(result.held_out['fidelity_ci'], result.proxy)}: "
            f"{_verdict(result.held_out)}."
        )
    return text


def called(row: Mapping[str, Any]) -> str:
    """A row's variant in words: GradV at base 0.4, with its method where that is no weighted sum."""
    if not row["preset"]:
        return str(row["name"])
    method = f" by {row['method']}" if row["method"] != "weighted_sum" else ""
    return f"{row['preset']} at base {row['base']:g}{method}"


def _ends(ends: Sequence[float] | None, proxy: bool) -> str:
    said = shown_score(proxy)
    return f" (95 % interval {said(ends[0])} to {said(ends[1])})" if ends else ""


def _verdict(held: Mapping[str, Any]) -> str:
    how = []
    for key in ("vs_a", "vs_b"):
        low, high = held[f"{key}_ci"] or (-1.0, 1.0)
        how.append("more than" if low > 0 else "less than" if high < 0 else "not told apart from")
    if how[0] == how[1]:
        return f"{how[0]} A {'or' if how[0].startswith('not') else 'and'} B"
    return f"{how[0]} A and {how[1]} B"


def add_sections(
    report: Report,
    result: Comparison,
    variants: Sequence[Mapping[str, Any]] | None = None,
    parents: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """The comparison's sections, for its own report or as part of another."""
    variants = variants if variants is not None else [row.as_dict() for row in result.rows]
    parents = parents if parents is not None else [row.as_dict() for row in result.parents]
    n = len(result.settings.prompts) * len(result.settings.seeds)
    report.facts(
        {
            "variants": str(len(variants)),
            "pictures of each": str(n),
            "denoising steps": str(result.settings.generate.steps),
            "this run": _duration(result.seconds) + (f" ({result.resumed} resumed)" if result.resumed else ""),
            "read by": result.read_by or "nobody",
            "architecture": result.layout,
        }
    )
    report.bullets(result.notes)
    if result.search is not None:
        add_search(report, result.search, result.typed, {"A": result.a["name"], "B": result.b["name"]})
    report.heading(f"{result.score[:1].upper()}{result.score[1:]} against resemblance")
    add_plot(report, variants, parents, result.score)
    report.heading("All variants, best first")
    _add_table(report, result, variants, parents)
    report.heading("Contact sheets")
    add_sheets(report, result)
    report.heading("The best one as a file")
    report.code(merge_command(result.variants[variants[0]["name"]], result.typed))
    report.text(
        "At the same settings and batch size the file gives the very pictures shown here, bit for bit.", note=True
    )
    report.heading("How this was made and measured")
    _add_method(report, result)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _add_table(
    report: Report, result: Comparison, variants: Sequence[Mapping[str, Any]], parents: Sequence[Mapping[str, Any]]
) -> None:
    shares = {row.name: [row.shares[b] for b in row.shares if b not in ("BASE", "VAE")] for row in result.rows}
    names = {"A": f"A: {result.a['name']}", "B": f"B: {result.b['name']}"}
    plain = all(row["method"] in (None, "weighted_sum") for row in (*parents, *variants))
    rows = [
        {**row, "preset": names.get(row["name"]) or row["preset"] or row["name"],
         "front": "yes" if row["pareto"] else "", "shares": shares.get(row["name"], ()),
         "below": ", ".join(filter(None, ("" if plain else row["method"],
                                          row["same_as"] and f"same as {row['same_as']}")))}
        for row in [*parents, *variants]
    ]  # fmt: skip
    ends = {key: [end for r in rows if r[key + "_ci"] for end in r[key + "_ci"]] for key in FIGURES}
    top = {"fidelity": max(ends["fidelity"], default=1.0)} if result.proxy else {}  # a score is no share
    how = ("", "") if result.gauge is None else result.gauge.means

    def column(key: str, title: str, hint: str, brief: bool = False) -> Column:
        return Column(key, title, "interval", 3, hint, (min(ends[key], default=0.0), top.get(key, 1.0)), brief)

    columns = [
        Column("rank", "rank", "number", 0),
        Column("preset", "preset", under="below", hint="and by which method, where there are several"),
        Column("base", "base", "number", 2, "B's share of everything outside the U-Net's blocks, unless kept"),
        column("fidelity", result.score if result.proxy else "fidelity", how[0]),
        Column("fidelity_judge", "by the judge", "number", 3, "the same, read by the judge, who decides no rank"),
        column("resemblance_a", "like A", f"{how[1]} A's picture"),
        column("resemblance_b", "like B", f"{how[1]} B's picture"),
        Column(
            "shares", "B by block", "curve", hint="B's share: IN00 at the left, M00 in the middle, OUT at the right"
        ),
        column("pixel_resemblance_a", "pixels A", "1 - RMS pixel difference to A's picture", True),
        column("pixel_resemblance_b", "pixels B", "1 - RMS pixel difference to B's picture", True),
        Column("front", "Pareto", hint="no other variant is better in fidelity and in both resemblances"),
        Column("unreadable", "unreadable", "number", 3, "share of pictures the reader could not read"),
        Column("fidelity_vs_a", "minus A", "signed", 3, "difference in fidelity, same prompts and seeds"),
        Column("fidelity_vs_b", "minus B", "signed", 3, "difference in fidelity, same prompts and seeds"),
    ]
    columns = [c for c in columns if c.kind == "text" or any(row.get(c.key) is not None for row in rows)]
    all_read = not result.proxy and not any(row["unreadable"] for row in rows)
    columns = [c for c in columns if not (c.key == "unreadable" and not any(row["unreadable"] for row in rows))]
    report.table(
        columns, rows,
        "Numbers in brackets are 95 % intervals over prompts and seeds. Tinted rows are on the Pareto front. "
        + ("Every picture could be read. " if all_read and result.read_by else "") + "A click on a title sorts.",
        lambda row: "parent" if row["name"] in PARENTS else "marked" if row["pareto"] else "",
    )  # fmt: skip


def _add_method(report: Report, result: Comparison) -> None:
    settings, generation = result.settings, result.settings.generate
    report.settings(
        {
            "A": f"{result.a['name']}, sha256 {result.a['sha256'] or 'unknown'}",
            "B": f"{result.b['name']}, sha256 {result.b['sha256'] or 'unknown'}",
            **{f"model {facts['name']}": f"sha256 {facts['sha256'] or 'unknown'}"
               for key, facts in result.models.items() if key not in PARENTS},
            "merge": "by block; preset = B's share of each U-Net block, base = B's share of the rest",
            "methods": sorted({str(v.choice) for v in result.variants.values()}),
            "kept of A": settings.keep,
            "presets on SDXL": settings.xl_presets,
            "bases": sorted({f"{v.base:g}" for v in result.variants.values()}),
            "read to merge": f"{result.full_reads:.2f} times all the models' tensors",
            "seeds": settings.seeds,
            "sampler": f"{generation.sampler}, {generation.spacing}, {generation.steps} steps",
            "guidance": f"{generation.guidance:g}",
            "negative prompt": generation.negative,
            **machine(result.device),
        }
    )  # fmt: skip
    report.heading("Prompts", 3)
    asks = [f"{p} (asks for {_wishes(w)})" for p, w in zip(settings.prompts, result.asked, strict=True)]
    report.bullets(list(settings.prompts) if result.proxy else asks)
    report.heading("Figures", 3)
    if result.proxy:
        report.bullets(_proxy_figures(result))
        return
    report.bullets(
        [
            "Fidelity: of the attributes that a prompt names, the share that the reader finds in the picture. A named "
            f"value must be read as that value; a graded word asks for an interval, which may be missed by "
            f"{TOLERANCE:g}. A picture that cannot be read has 0.",
            "Resemblance: 1 minus the mean difference of what is read in the picture and in the parent's picture of "
            "the same prompt and seed (continuous attributes by their difference, the others and the number of fingers "
            "right or wrong). Two unrelated pictures of the pocket world have 0.54.",
            "Pixel resemblance: 1 minus the root mean square difference of the pixels.",
            f"Intervals: {RESAMPLES} bootstrap draws of prompts, and of seeds within each prompt.",
            "The reader decides the ranks. The judge, built and trained differently, reads the same pictures and "
            "decides nothing. The first of many variants is chosen on the pictures it is read in, so its own figure "
            "flatters it. The figure with a prompt left out, read by the judge, does not.",
        ]
    )


def _proxy_figures(result: Comparison) -> list[str]:
    assert result.gauge is not None
    fidelity, resemblance = result.gauge.means
    return [
        f"{result.score[:1].upper()}{result.score[1:]}: {fidelity}. A proxy, which may like what nobody asked for. "
        "Scores of different prompts are no measure of one another; compare within a column.",
        f"Resemblance: {resemblance} the parent's picture of the same prompt and seed.",
        "Pixel resemblance: 1 minus the root mean square difference of the pixels.",
        f"Intervals: {RESAMPLES} bootstrap draws of prompts, and of seeds within each prompt.",
        "The first of many variants is chosen on the pictures it is read in, so its own figure flatters it. The figure "
        "with a prompt left out does not, except for what the proxy itself likes.",
    ]


def _wishes(wishes: Mapping[str, Any]) -> str:
    if not wishes:
        return "nothing the reader knows"
    return ", ".join(
        f"{name.replace('_', ' ')} {w}" if isinstance(w, str) else f"{name.replace('_', ' ')} {w[0]:g} to {w[1]:g}"
        for name, w in wishes.items()
    )
