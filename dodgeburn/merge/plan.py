"""What a merge will do, decided from the two headers alone: one line of work per tensor, and everything
odd, counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dodgeburn.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES, Header, TensorInfo
from dodgeburn.checkpoint.layout import VAE, Layout, detect_layout
from dodgeburn.errors import UserError
from dodgeburn.merge.methods import Method
from dodgeburn.merge.rules import Rule, component_share

Action = Literal["copy_a", "copy_b", "cast_a", "merge"]
KEEPABLE = ("text", "vae")

# Why a tensor is not merged as asked, and what was done instead. Those in WARNED deserve a warning.
ISSUES = {
    "missing_in_b": "not in B: A's are kept",
    "missing_elsewhere": "not in every other model: A's are kept",
    "extra_in_b": "only in B: left out",
    "outside": "outside the model (EMA copies, schedule buffers): A's are kept",
    "dtype_differs": "of another type in B: computed in float32, rounded once to A's type",
    "integers": "of integers: A's are kept, never averaged",
    "shape_differs": "of another shape in B, but A's are kept anyway",
}
WARNED = ("missing_in_b", "missing_elsewhere", "extra_in_b", "outside")
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8_e4m3fn": "F8_E4M3"}


@dataclass(frozen=True)
class Work:
    """One output tensor: where its bytes come from, and with which share of B."""

    name: str
    info: TensorInfo
    action: Action
    alpha: float
    block: str | None
    dtype: str = ""  # of the output, where it is not A's

    @property
    def out_dtype(self) -> str:
        return self.dtype or self.info.dtype

    @property
    def out_nbytes(self) -> int:
        return self.info.numel * DTYPE_BITS[self.dtype] // 8 if self.dtype else self.info.nbytes


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
    params: dict[str, float] = field(default_factory=dict)
    components: dict[str, float] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    seed: int = 0
    clip: bool = False
    dtype: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by kind of issue, kinds without any left out."""
        return {kind: len(names) for kind, names in self.issues.items() if names}

    @property
    def bytes_written(self) -> int:
        return sum(w.out_nbytes for w in self.work)

    def bytes_read(self, b: Header, more: Sequence[Header] = ()) -> int:
        """Bytes of tensors to be read from all files."""
        total = 0
        for w in self.work:
            total += w.info.nbytes if w.action != "copy_b" else 0
            total += b.tensors[w.name].nbytes if w.action in ("copy_b", "merge") else 0
            if w.action == "merge":
                total += sum(header.tensors[w.name].nbytes for header in more)
        return total

    def warnings(self) -> list[str]:
        """The issues a user should hear of, one counted line each."""
        lines = [_line(kind, self.issues[kind]) for kind in WARNED if self.issues.get(kind)]
        if all(w.action in ("copy_a", "cast_a") for w in self.work):
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
    *,
    more: Sequence[tuple[str, Header]] = (),
    params: Mapping[str, float] | None = None,
    components: Mapping[str, float] | None = None,
    rules: Sequence[Rule] = (),
    seed: int = 0,
    clip: bool = False,
    dtype: str | None = None,
) -> Plan:
    """Decide every tensor of the output from the headers of A and B.

    The output has A's names and shapes, and A's types or, for floats, `dtype` (fp32, fp16, bf16, fp8_e4m3fn).
    `more` are names and headers of further models and the base. A tensor's share is that of the last rule that
    matches it, or else its component's, or else its block's; what is kept is always A's.

    Raises UserError if tensors to be merged differ in shape,
    are of a type that cannot be computed with, if the two files have no tensor in common, or for a rule that
    matches no tensor.
    """
    kept = check_keep(keep)
    shares = dict(blocks)
    if "vae" in kept:
        shares[VAE] = 0.0
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no output type is named {dtype!r}: expected one of {', '.join(DTYPES)}")
    plan = Plan(
        layout, method, shares, kept, [], {kind: [] for kind in ISSUES}, method.check_params(params or {}),
        dict(components or {}), tuple(rules), seed, clip, dtype,
    )  # fmt: skip
    mismatched: list[str] = []
    unused = dict.fromkeys(plan.rules)
    for name, info in a.tensors.items():
        block = layout.block(name)
        of_a_only = _is_kept(name, layout, kept)
        alpha = 0.0
        if block is not None and not of_a_only:
            alpha = shares[block]
            if (share := component_share(name, layout, plan.components)) is not None:
                alpha = share
            for rule in plan.rules:
                if rule.matches(name, block):
                    alpha = rule.share
                    unused.pop(rule, None)
        other = b.tensors.get(name)
        action: Action = "copy_a"
        wanted = DTYPES[dtype] if dtype is not None and info.dtype in FLOAT_DTYPES else ""
        if block is None:
            plan.issues["outside"].append(name)
        elif of_a_only or (alpha == 0.0 and method.zero_is_a):
            if other is not None and other.shape != info.shape:
                plan.issues["shape_differs"].append(name)
        elif other is None:
            plan.issues["missing_in_b"].append(name)
        elif any(name not in header.tensors for _, header in more):
            plan.issues["missing_elsewhere"].append(name)
        elif info.dtype not in FLOAT_DTYPES or other.dtype not in FLOAT_DTYPES:
            if info.dtype in FLOAT_DTYPES or _is_packed_float(info.dtype):
                raise UserError(f"{name} is {info.dtype} in A and {other.dtype} in {name_b}: these cannot be mixed")
            plan.issues["integers"].append(name)
        elif other.shape != info.shape:
            mismatched.append(name)
        elif alpha == 1.0 and other.dtype == (wanted or info.dtype) and method.one_is_b and not clip:
            action = "copy_b"
        else:
            action = "merge"
            _check_more(name, info, more)
            if other.dtype != info.dtype:
                plan.issues["dtype_differs"].append(name)
        if action == "copy_a" and wanted and wanted != info.dtype:
            action = "cast_a"
        used = alpha if action in ("copy_b", "merge") else 0.0
        plan.work.append(Work(name, info, action, used, block, wanted if wanted != info.dtype else ""))
    for rule in unused:
        raise UserError(f"rule {rule.text!r} matches no tensor that could be merged: check its blocks and words")
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


def _check_more(name: str, info: TensorInfo, more: Sequence[tuple[str, Header]]) -> None:
    for file, header in more:
        other = header.tensors[name]
        if other.dtype not in FLOAT_DTYPES:
            raise UserError(f"{name} is {info.dtype} in A and {other.dtype} in {file}: these cannot be mixed")
        if other.shape != info.shape:
            raise UserError(f"{name} of {file} is {list(other.shape)} instead of {list(info.shape)} as in A")


def _is_kept(name: str, layout: Layout, keep: tuple[str, ...]) -> bool:
    return ("text" in keep and layout.is_text(name)) or ("vae" in keep and layout.is_vae(name))


def _is_packed_float(dtype: str) -> bool:
    return dtype.startswith("F") or dtype == "C64"


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


def describe(
    plan: Plan, b: Header, name_a: str, name_b: str, more: Sequence[tuple[str, Header]] = (), memory: int = 0
) -> str:
    """The plan in words: the share of B by block, what is kept, what is odd, how much is read and written."""
    lines = [
        f"{plan.method.name} of {plan.layout.title} checkpoints: A = {name_a}, B = {name_b}",
        "shares are B's: 0 = all A, 1 = all B (ComfyUI's ratio is model1's share, the other way round)",
        f"formula: {plan.method.summary}"
        + "".join(f", {name} = {value:g}" for name, value in plan.params.items())
        + (f", seed {plan.seed}" if plan.method.random else "")
        + (", clipped between A and B" if plan.clip else ""),
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
        + (f", {actions['cast_a']} of A's changed to {plan.dtype}" if actions["cast_a"] else ""),
        f"{plan.bytes_read(b, [header for _, header in more]) / 1e6:,.2f} MB to read, "
        f"{plan.bytes_written / 1e6:,.2f} MB to write",
    ]
    if memory:
        lines.append(f"about {memory / 1e6:,.0f} MB of memory for buffers")
    lines += [_line(kind, names) for kind, names in plan.issues.items() if names]
    return "\n".join(lines)


def _note(block: str, plan: Plan) -> str:
    if block == VAE:
        if "vae" in plan.components:
            return f"component vae: {plan.components['vae']:g}"
        return "kept from A" if "vae" in plan.keep else "follows base"
    if block == "BASE":
        rest = "time embedding" + (", label embedding" if plan.layout.name == "sdxl" else "")
        return f"{rest} (text encoders kept from A)" if "text" in plan.keep else f"text encoders, {rest}"
    return ""
