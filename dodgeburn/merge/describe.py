"""A merge's plan in words, and what it will take."""

from __future__ import annotations

from dodgeburn.checkpoint.layout import VAE
from dodgeburn.merge.plan import Models, Plan, issue_line


def peak_memory(plan: Plan, models: int, threads: int, tile: int) -> int:
    """Expected anonymous bytes of the merge's buffers: about five float32 copies of a tile for each thread, or
    of the largest tensor for methods that take whole ones (one at a time).
    """
    merged = [w.info.numel for w in plan.work if w.action == "merge"]
    largest = max(merged, default=0)
    copies = models + 3
    if plan.method.elementwise:
        return 4 * copies * min(tile, max(largest, 1)) * threads
    return 4 * (copies + models) * largest


def describe(plan: Plan, models: Models, memory: int = 0) -> str:
    """The plan in words: the share of B by block, what is kept, what is odd, how much is read and written."""
    (name_a, _), (name_b, _), *more = models
    settings = plan.settings
    lines = [
        f"{plan.method.name} of {plan.layout.title} checkpoints: A = {name_a}, B = {name_b}",
        "shares are B's: 0 = all A, 1 = all B (ComfyUI's ratio is model1's share, the other way round)",
        f"formula: {plan.method.summary}"
        + "".join(f", {name} = {value:g}" for name, value in plan.params.items())
        + (f", seed {settings.seed}" if plan.method.random else "")
        + (", clipped between A and B" if settings.clip else ""),
        *(f"with {name}" for name, _ in more),
        "",
        f"{'block':<7}{'share of B':>10}{'tensors':>9}{'MB':>10}",
    ]
    for block, share in plan.blocks.items():
        of_block = [w for w in plan.work if w.block == block]
        size = sum(w.info.nbytes for w in of_block) / 1e6
        note = _note(block, plan)
        taken = sorted({w.alpha for w in of_block if w.action in ("merge", "copy_b")})
        if taken and taken != [share]:
            note += (
                (", " if note else "")
                + "in fact "
                + (f"{taken[0]:g}" if len(taken) == 1 else f"{taken[0]:g} to {taken[-1]:g}")
            )
        elif plan.method.name == "weighted_sum" and not note:
            note = f"A {100 * (1 - share):.4g} % + B {100 * share:.4g} %"
        lines.append(f"{block:<7}{share:>10.4f}{len(of_block):>9}{size:>10.2f}{'  ' + note if note else ''}")
    actions = {action: sum(w.action == action for w in plan.work) for action in ("merge", "copy_a", "copy_b", "cast_a")}
    lines += [
        "",
        f"{actions['merge']} tensors merged, {actions['copy_a']} copied from A, {actions['copy_b']} from B"
        + (f", {actions['cast_a']} of A's changed to {settings.dtype}" if actions["cast_a"] else ""),
        f"{plan.bytes_read(models) / 1e6:,.2f} MB to read, "
        f"{plan.bytes_written / 1e6:,.2f} MB to write",
    ]
    if memory:
        lines.append(f"about {memory / 1e6:,.0f} MB of memory for buffers")
    lines += [issue_line(kind, names) for kind, names in plan.issues.items() if names]
    return "\n".join(lines)


def _note(block: str, plan: Plan) -> str:
    if block == VAE:
        if "vae" in plan.components:
            return f"component vae: {plan.components['vae']:g}"
        return "kept from A" if "vae" in plan.settings.keep else "follows base"
    if block == "BASE":
        rest = "time embedding" + (", label embedding" if plan.layout.name == "sdxl" else "")
        return f"{rest} (text encoders kept from A)" if "text" in plan.settings.keep else f"text encoders, {rest}"
    return ""
