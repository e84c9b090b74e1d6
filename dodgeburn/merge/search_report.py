"""What a search found, beside what became of it on held-out prompts: as plain values, as text, and in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dodgeburn.measure.intervals import Interval
from dodgeburn.measure.report import Column, Report
from dodgeburn.merge.command import merge_command
from dodgeburn.merge.compare_pictures import about_merge
from dodgeburn.merge.search import Graded, Search


def search_json(search: Search) -> dict[str, Any]:
    """All of a search as plain values."""
    return {
        **search.settings.model_dump(mode="json"),
        "found": search.found.name,
        "graded": [_line(line) for line in search.graded],
        "trials_made": [
            {"name": t.variant.name, "params": t.params, "values": [round(v, 5) for v in t.values]}
            for t in search.trials
        ],
    }


def _line(line: Graded) -> dict[str, Any]:
    seen, held = line.search.as_dict(), line.held_out.as_dict()
    keys = [key for key in seen if key.startswith(("fidelity", "resemblance"))] + ["unreadable"]
    return {
        "name": line.name, "role": line.role, "method": seen["method"], "preset": seen["preset"], "base": seen["base"],
        "params": dict(line.params), "merge": None if line.variant is None else about_merge(line.variant),
        "search": {key: seen[key] for key in keys}, "held_out": {key: held[key] for key in keys},
        **_interval("grade", line.grade), **_interval("minus_best", line.minus_best),
        "excluded": line.excluded,
    }  # fmt: skip


def _interval(key: str, found: Interval | None) -> dict[str, Any]:
    if found is None:
        return {key: None, f"{key}_ci": None}
    return {key: round(found.mean, 5), f"{key}_ci": found.ends and [round(end, 5) for end in found.ends]}


def verdict(search: Search) -> str:
    """What came of the search, in three sentences."""
    found = search.found
    seen, grade, minus = found.search.interval("fidelity"), found.grade, found.minus_best
    if seen is None or grade is None:
        return "Nothing could be graded: the held-out prompts name nothing that the reader knows."
    said = shown_score(search.proxy)
    text = (
        f"The best of {len(search.trials)} proposals, {found.name}, "
        + (f"had the {search.score} {said(seen.mean)} on the search's prompts" if search.proxy else
           f"showed {said(seen.mean)} of what the search's prompts ask for")
        + f"; on held-out prompts and seeds it {'has' if search.proxy else 'shows'} {_said(grade, search.proxy)}"
    )  # fmt: skip
    others = " and ".join(line.name for line in search.graded if line.role in ("A", "B") and line.excluded)
    if found.excluded:
        text += ", which excludes what the search saw"
        text += f"; so it is with {others}, which no search chose: the held-out prompts differ" if others else ": luck"
    text += ". "
    best = next((line for line in search.graded if line.role == "best without search"), None)
    if best is not None and minus is not None and best.grade is not None:
        how = "better than" if minus.low > 0 else "worse than" if minus.high < 0 else "not told apart from"
        text += (
            f"There it is {how} {best.name}, the best without search ({_said(best.grade, search.proxy)}; difference "
            f"{minus.mean:+.3f}, 95 % interval {minus.low:+.3f} to {minus.high:+.3f})."
        )
    return text


def shown_score(proxy: bool) -> Callable[[float], str]:
    """How fidelity is written: a share as per cent, a proxy's score as a number."""
    return "{:.3f}".format if proxy else "{:.1%}".format


def _said(found: Interval, proxy: bool) -> str:
    said = shown_score(proxy)
    return f"{said(found.mean)} (95 % interval {said(found.low)} to {said(found.high)})"


def search_text(search: Search, models: Mapping[str, str]) -> str:
    """The search for a terminal."""
    wide = max(len(line.name) for line in search.graded) + 2
    lines = [f"{'':<{wide}}{'search':<24}{'held out':<24}"]
    for line in search.graded:
        pair = [_short(line.search.interval("fidelity")), _short(line.grade)]
        mark = "excludes the search's value" if line.excluded else ""
        lines.append(f"{line.name:<{wide}}{pair[0]:<24}{pair[1]:<24}{mark}".rstrip())
    lines.append(verdict(search))
    found = search.found.variant
    assert found is not None
    lines.append(f"found: {merge_command(found, models)}")
    return "\n".join(lines)


def _short(found: Interval | None) -> str:
    return "-" if found is None else f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def add_search(report: Report, search: Search, models: Mapping[str, str], names: Mapping[str, str]) -> None:
    """The search as a section of the report; `names` are what A and B are called there."""
    settings = search.settings
    report.heading("What the search found, and held-out prompts")
    rows = []
    for line in search.graded:
        plain = _line(line)
        shares = [line.search.shares[b] for b in line.search.shares if b not in ("BASE", "VAE")]
        rows.append(
            {
                "name": f"{line.name}: {names[line.name]}" if line.name in names else line.name,
                "role": line.role if line.name not in names else "parent", "method": plain["method"],
                "base": plain["base"], "shares": shares, "seen": plain["search"]["fidelity"],
                "seen_ci": plain["search"]["fidelity_ci"], "judge": plain["search"]["fidelity_judge"],
                "grade": plain["grade"], "grade_ci": plain["grade_ci"],
                "minus": plain["minus_best"], "minus_ci": plain["minus_best_ci"],
                "a": plain["held_out"]["resemblance_a"], "b": plain["held_out"]["resemblance_b"],
                "luck": "excluded" if line.excluded else "",
            }
        )  # fmt: skip
    ends = [end for row in rows for key in ("seen", "grade") if row[f"{key}_ci"] for end in row[f"{key}_ci"]]
    span = min(ends, default=0.0), max(ends, default=1.0) if search.proxy else 1.0
    who = f"the {search.score}" if search.proxy else "the reader"
    judged = any(row["judge"] is not None for row in rows)
    columns = [
        Column("name", "merge"), Column("role", "role"), Column("method", "method"),
        Column("base", "base", "number", 2),
        Column("shares", "B by block", "curve"),
        Column("seen", "search", "interval", 3, f"fidelity on the search's prompts, by {who}", span),
        Column("judge", "search, by the judge", "number", 3, "the same pictures, read by the judge"),
        Column("grade", "held out", "interval", 3, "fidelity on held-out prompts and seeds, "
               + ("by the judge" if judged else f"by {who}"), span),
        Column("minus", "minus best", "signed", 3, "held-out fidelity less that of the best without search"),
        Column("a", "like A", "number", 3, "on held-out prompts"),
        Column("b", "like B", "number", 3, "on held-out prompts"),
        Column("luck", "search's value", hint="whether the held-out interval excludes the search's value"),
    ]  # fmt: skip
    columns = [c for c in columns if (judged or c.key != "judge") and not (search.proxy and c.key == "luck")]
    luck = "" if search.proxy else (
        " Where the search's value is excluded, the held-out interval does not hold it; where that is so for A and B "
        "too, the prompts differ rather than the merges."
    )  # fmt: skip
    report.table(
        columns, rows,
        f"The best proposals by what the search saw, from the Pareto front of its goals.{luck}",
        lambda row: "parent" if row["role"] == "parent" else "marked" if row["luck"] else "",
    )  # fmt: skip
    found = search.found.variant
    assert found is not None
    report.text(f"The command that writes {found.name}:")
    report.code(merge_command(found, models))
    report.settings(
        {
            "proposed by": f"Optuna, {settings.by}, seed {settings.seed}, {len(search.trials)} trials",
            "goals": settings.goals,
            "held-out seeds": settings.seeds,
            "held-out prompts": " | ".join(settings.prompts),
        }
    )
