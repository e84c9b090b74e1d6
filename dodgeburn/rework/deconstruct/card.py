"""The card of a deconstructed model: what was done, what it measured, and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dodgeburn.rework.deconstruct.run import Deconstructed

ADVICE = """## Usage advice
From the model card that the stages' names come from, about its SDXL model; we haven't measured it on this one:

- CLIP skip 3 (`--clip-skip 3`; the card writes -3).
- Keep negative prompts short: "watermark" or "worst, watermark" is enough.
- Guidance 3.5 for realistic pictures to 7 for art; DPM++ 3M SDE with the Karras schedule, 50 steps.
"""
_ROWS = (
    ("loss", "held-out loss, over the untouched model's"), ("tv", "total variation from the target"),
    ("tv_cons", "the same, unreadable pictures as majority"), ("unread", "unreadable pictures"),
    ("fidelity", "explicit prompts followed"), ("others", "prompts of other things followed"),
    ("frechet", "Frechet distance from real pictures"), ("variety", "variety, over the untouched model's"),
    ("grain", "grain, over real pictures'"), ("colour", "colour spread, over real pictures'"),
)  # fmt: skip


def card_of(found: Deconstructed, parent: str, file: str, sha256: str) -> str:
    """Markdown."""
    spec, concept = found.spec, found.spec.concept
    before, after = found.before.as_json(), found.after.as_json()
    lines = [
        f"# {spec.name}", "",
        f"`{file}` (sha256 `{sha256}`), made from `{parent}` by constructive deconstruction: "
        f"{', '.join(s.stage for s in found.stages) or 'no stage'}. The definition of the stages is dodgeburn's own "
        "(docs/deconstruct.md); the name is from the Mobius model card, which gives no algorithm.", "",
        f"About: {concept.attribute} with the prompts {', '.join(repr(p) for p in concept.prompts)}, towards "
        + ", ".join(f"{value} {share:.0%}" for value, share in zip(concept.values, concept.shares, strict=True)) + ".",
        "", "## Measured",
        f"By the classifier that also guided the run, on {found.panel.neutral} pictures of these prompts at guidance "
        f"{found.panel.guidance:g}: a guide, not an evaluation.", "", "| | before | after |", "|---|---|---|",
        *(f"| {name} | {_shown(before[key])} | {_shown(after[key])} |" for key, name in _ROWS), "",
        "## Stages", "",
        *(f"- {s.stage}: {s.decision} ({s.steps} gradient steps; U-Net `{s.sha256[:16]}`)" for s in found.stages), "",
        ADVICE,
    ]  # fmt: skip
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "not measured" if value is None else str(value)
