"""What a merge will do, decided from the two headers alone: one line of work per tensor, and everything
odd, counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dodgeburn.checkpoint.header import FLOAT_DTYPES, Header, TensorInfo
from dodgeburn.checkpoint.layout import VAE, Layout, detect_layout
from dodgeburn.errors import UserError
from dodgeburn.merge.methods import Method

Action = Literal["copy_a", "copy_b", "merge"]
KEEPABLE = ("text", "vae")

# Why a tensor is not merged as asked, and what was done instead. The first three deserve a warning.
ISSUES = {
    "missing_in_b": "not in B: A's are kept",
    "extra_in_b": "only in B: left out",
    "outside": "outside the model (EMA copies, schedule buffers): A's are kept",
    "dtype_differs": "of another type in B: computed in float32, rounded once to A's type",
    "integers": "of integers: A's are kept, never averaged",
    "shape_differs": "of another shape in B, but A's are kept anyway",
}
WARNED = ("missing_in_b", "extra_in_b", "outside")


@dataclass(frozen=True)
class Work:
    """One output tensor: where its bytes come from, and with which share of B."""

    name: str
    info: TensorInfo
    action: Action
    alpha: float
    block: str | None


@dataclass
class Plan:
    """A merge ready to run: the output's tensors in A's order, block shares, and issues (kind -> tensor
    names).
    """

    layout: Layout
    method: Method
    blocks: dict[str, float]
    keep: tuple[str, ...]
    work: list[Work]
    issues: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by kind of issue, kinds without any left out."""
        return {kind: len(names) for kind, names in self.issues.items() if names}

    @property
    def bytes_written(self) -> int:
        return sum(w.info.nbytes for w in self.work)

    def bytes_read(self, b: Header) -> int:
        """Bytes of tensors to be read from both files."""
        total = 0
        for w in self.work:
            total += w.info.nbytes if w.action != "copy_b" else 0
            total += b.tensors[w.name].nbytes if w.action != "copy_a" else 0
        return total

    def warnings(self) -> list[str]:
        """The issues a user should hear of, one counted line each."""
        lines = [_line(kind, self.issues[kind]) for kind in WARNED if self.issues.get(kind)]
        if all(w.action == "copy_a" for w in self.work):
            lines.append("no tensor takes anything from B: the output will hold A's tensors")
        return lines


def _line(kind: str, names: list[str]) -> str:
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {ISSUES[kind]} (first {names[0]})"


def check_keep(keep: Iterable[str]) -> tuple[str, ...]:
    """The parts to keep of A, checked and in fixed order: any of "text" and "vae"."""
    wanted = [keep] if isinstance(keep, str) else list(keep)
    parts = {part.strip().lower() for text in wanted for part in text.split(",") if part.strip()}
    unknown = parts - set(KEEPABLE)
    if unknown:
        raise UserError(f"cannot keep {min(unknown)!r}: expected {' or '.join(KEEPABLE)}")
    return tuple(part for part in KEEPABLE if part in parts)


def check_layouts(a: Header, b: Header, name_a: str, name_b: str) -> Layout:
    """The one layout of both files; UserError that names both if they are not of one architecture."""
    found = []
    for header, name in ((a, name_a), (b, name_b)):
        try:
            found.append(detect_layout(header.tensors, {k: i.shape for k, i in header.tensors.items()}))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    one, two = found
    if one.name != two.name:
        raise UserError(
            f"{name_a} is {one.title}, {name_b} is {two.title}: only models of one architecture can be merged"
        )
    if (one.n_in, one.n_out) != (two.n_in, two.n_out):
        raise UserError(
            f"{name_a} has {one.n_in} + 1 + {one.n_out} blocks, {name_b} has {two.n_in} + 1 + {two.n_out}: "
            "only models of one size can be merged"
        )
    return one


def make_plan(
    a: Header,
    b: Header,
    layout: Layout,
    blocks: Mapping[str, float],
    method: Method,
    keep: Iterable[str] = (),
    name_b: str = "B",
) -> Plan:
    """Decide every tensor of the output from the headers of A and B.

    The output has A's names, shapes and types. Raises UserError if tensors to be merged differ in shape,
    are of a type that cannot be computed with, or if the two files have no tensor in common.
    """
    kept = check_keep(keep)
    shares = dict(blocks)
    if "vae" in kept:
        shares[VAE] = 0.0
    plan = Plan(layout, method, shares, kept, [], {kind: [] for kind in ISSUES})
    mismatched: list[str] = []
    for name, info in a.tensors.items():
        block = layout.block(name)
        of_a_only = _is_kept(name, layout, kept)
        alpha = 0.0 if block is None or of_a_only else shares[block]
        other = b.tensors.get(name)
        action: Action = "copy_a"
        if block is None:
            plan.issues["outside"].append(name)
        elif alpha == 0.0 and method.copies_at_ends:
            if other is not None and other.shape != info.shape:
                plan.issues["shape_differs"].append(name)
        elif other is None:
            plan.issues["missing_in_b"].append(name)
        elif info.dtype not in FLOAT_DTYPES or other.dtype not in FLOAT_DTYPES:
            if info.dtype in FLOAT_DTYPES or _is_packed_float(info.dtype):
                raise UserError(
                    f"{name} is {info.dtype} in A and {other.dtype} in {name_b}: these cannot be mixed"
                )
            plan.issues["integers"].append(name)
        elif other.shape != info.shape:
            mismatched.append(name)
        elif alpha == 1.0 and other.dtype == info.dtype and method.copies_at_ends:
            action = "copy_b"
        else:
            action = "merge"
            if other.dtype != info.dtype:
                plan.issues["dtype_differs"].append(name)
        plan.work.append(Work(name, info, action, alpha if action != "copy_a" else 0.0, block))
    if mismatched:
        first = mismatched[0]
        raise UserError(
            f"{len(mismatched)} tensors of {name_b} have other shapes than A's, first {first}: "
            f"{list(b.tensors[first].shape)} instead of {list(a.tensors[first].shape)}; "
            "only models of one size can be merged"
        )
    plan.issues["extra_in_b"] = [
        name for name in b.tensors
        if name not in a.tensors and layout.block(name) is not None and not _is_kept(name, layout, kept)
    ]  # fmt: skip
    if not any(name in b.tensors for name in a.tensors):
        raise UserError(f"{name_b} has none of A's {len(a.tensors)} tensors: nothing to merge")
    return plan


def _is_kept(name: str, layout: Layout, keep: tuple[str, ...]) -> bool:
    return ("text" in keep and layout.is_text(name)) or ("vae" in keep and layout.is_vae(name))


def _is_packed_float(dtype: str) -> bool:
    return dtype.startswith("F") or dtype == "C64"


def describe(plan: Plan, b: Header, name_a: str, name_b: str) -> str:
    """The plan in words: the share of B by block, what is kept, what is odd, how much is read and written."""
    lines = [
        f"{plan.method.name} of {plan.layout.title} checkpoints: A = {name_a}, B = {name_b}",
        "shares are B's: 0 = all A, 1 = all B (ComfyUI's ratio is model1's share, the other way round)",
        "",
        f"{'block':<7}{'share of B':>10}{'tensors':>9}{'MB':>10}",
    ]
    for block, share in plan.blocks.items():
        of_block = [w for w in plan.work if w.block == block]
        size = sum(w.info.nbytes for w in of_block) / 1e6
        note = _note(block, plan)
        lines.append(f"{block:<7}{share:>10.4f}{len(of_block):>9}{size:>10.2f}{'  ' + note if note else ''}")
    actions = {action: sum(w.action == action for w in plan.work) for action in ("merge", "copy_a", "copy_b")}
    lines += [
        "",
        f"{actions['merge']} tensors merged, {actions['copy_a']} copied from A, {actions['copy_b']} from B",
        f"{plan.bytes_read(b) / 1e6:,.2f} MB to read, {plan.bytes_written / 1e6:,.2f} MB to write",
    ]
    lines += [_line(kind, names) for kind, names in plan.issues.items() if names]
    return "\n".join(lines)


def _note(block: str, plan: Plan) -> str:
    if block == VAE:
        return "kept from A" if "vae" in plan.keep else "follows base"
    if block == "BASE":
        rest = "time embedding" + (", label embedding" if plan.layout.name == "sdxl" else "")
        return f"{rest} (text encoders kept from A)" if "text" in plan.keep else f"text encoders, {rest}"
    return ""
