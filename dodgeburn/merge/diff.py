"""How two models differ: by block, by component and by tensor, read side by side in bounded memory.

Everything is counted with A as the reference: change = B - A. Sums are kept in float64, so what is printed does not
depend on the size of the tensors. Keys that cannot be compared are named, never skipped in silence.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodgeburn.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES
from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.checkpoint.lora_file import is_adapter
from dodgeburn.checkpoint.side_by_side import SideBySide
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.rules import COMPONENTS
from dodgeburn.models.as_single_file import open_as_single_file

if TYPE_CHECKING:
    import torch

OTHER = "other"
_TITLES = {theirs: ours for ours, theirs in COMPONENTS.items()}


@dataclass
class Change:
    """The change from A to B of some tensors: counts, and sums of squares in float64.

    `tensors` were compared as numbers, `changed` of them differ in at least one value; `values` and `values_changed`
    count single numbers. `change` is the sum of (B - A)², `a` and `b` those of A² and B², `product` that of A B; sums
    over several tensors hold those of weights only, not those of integers.
    """

    tensors: int = 0
    changed: int = 0
    values: int = 0
    values_changed: int = 0
    change: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, other: Change, weights: bool = True) -> None:
        """Take another's tensors in. Only `weights` go into norms and cosine: 77 position ids alone have a norm of 386,
        in which a text encoder's change would drown.
        """
        counts, sums = ("tensors", "changed", "values", "values_changed"), ("change", "a", "b", "product")
        for name in (*counts, *sums) if weights else counts:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)

    def add_tile(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take the values of one tile in, float64 [n] each; `b` is overwritten."""
        self.values += a.numel()
        self.a += float(a @ a)
        self.b += float(b @ b)
        self.product += float(a @ b)
        change = b.sub_(a)
        self.values_changed += int(change.count_nonzero())
        self.change += float(change @ change)
        self.largest = max(self.largest, float(change.abs_().max()))

    @property
    def relative(self) -> float:
        """|B - A| / |A|, L2 norms; infinite where A is all zeros and B is not, 0 where both are."""
        if not self.change:
            return 0.0
        return math.sqrt(self.change / self.a) if self.a else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between A and B as vectors; None where one of them is all zeros."""
        if not self.a or not self.b:
            return None
        return 1.0 if not self.change else max(-1.0, min(1.0, self.product / math.sqrt(self.a * self.b)))

    @property
    def share_changed(self) -> float:
        """Share of the tensors that changed, 0..1."""
        return self.changed / self.tensors if self.tensors else 0.0

    def row(self) -> dict[str, Any]:
        """Plain numbers; `relative_change` is None where it would be infinite."""
        return {
            "tensors": self.tensors,
            "changed": self.changed,
            "share_changed": self.share_changed,
            "values": self.values,
            "values_changed": self.values_changed,
            "relative_change": self.relative if math.isfinite(self.relative) else None,
            "change_norm": math.sqrt(self.change),
            "largest_change": self.largest,
            "cosine": self.cosine,
        }


@dataclass
class Diff:
    """Two models compared. Blocks and components that hold no compared tensor are left out.

    `only_a`, `only_b`: tensors that the other lacks; `shapes`: of another shape, with both; `types`: how many tensors
    are of which two types; `not_finite`: tensors with NaN or infinity, and whose they are; `unread`: of types that
    cannot be computed with, and whether their bytes are equal. None of these are in the numbers, except `types`.
    """

    a: str
    b: str
    layout: Layout | None
    blocks: dict[str, Change] = field(default_factory=dict)
    components: dict[str, Change] = field(default_factory=dict)
    tensors: dict[str, Change] = field(default_factory=dict)
    total: Change = field(default_factory=Change)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    types: Counter[tuple[str, str]] = field(default_factory=Counter)
    not_finite: dict[str, str] = field(default_factory=dict)
    unread: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same values; types may differ."""
        odd = self.only_a or self.only_b or self.shapes or self.not_finite
        return not (odd or self.total.changed or not all(self.unread.values()))

    def most_changed(self, count: int) -> list[tuple[str, Change]]:
        """The tensors of the largest relative change, largest first."""
        changed = [(name, change) for name, change in self.tensors.items() if change.changed]
        return sorted(changed, key=lambda item: (-item[1].relative, item[0]))[:count]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "layout": self.layout.name if self.layout else None,
            "equal": self.equal,
            "total": self.total.row(),
            "blocks": {name: change.row() for name, change in self.blocks.items()},
            "components": {name: change.row() for name, change in self.components.items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "shapes": {name: [list(one), list(two)] for name, (one, two) in self.shapes.items()},
            "types": {f"{one} -> {two}": count for (one, two), count in sorted(self.types.items())},
            "not_finite": self.not_finite,
            "unread": self.unread,
            "tensors": {name: change.row() for name, change in self.tensors.items()},
            "seconds": round(self.seconds, 3),
        }


def diff(a: str | Path, b: str | Path) -> Diff:
    """Compare two models of one architecture: packaged names, files, shards, pickles, diffusers folders.

    Files of another kind (a VAE alone, one component of a folder, a ControlNet) are compared by component only. Raises
    UserError for adapters, for models of two architectures, and for files without a tensor in common.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    with open_as_single_file(a) as one, open_as_single_file(b) as two:
        names = shown_name(a, one), shown_name(b, two)
        layout = common_layout((one, two), names)
        found = Diff(*names, layout)
        both = _pair_up(one, two, found)
        pair = SideBySide((one, two))
        total = sum(one.info(name).nbytes + two.info(name).nbytes for name in both)
        with tqdm(total=total, unit="B", unit_scale=True, desc="diff", disable=None) as bar:
            for name in both:
                _compare(name, pair, found)
                bar.update(one.info(name).nbytes + two.info(name).nbytes)
        one.check_unchanged()
        two.check_unchanged()
    found.seconds = time.perf_counter() - started
    return found


def shown_name(given: str | Path, source: Tensors) -> str:
    """A name without folders; the one that was given where that is no path."""
    return source.path.name if Path(given).exists() else str(given)


def common_layout(sources: Sequence[Tensors], names: Sequence[str]) -> Layout | None:
    """The one layout of all, or None if none is an SD1.5 or SDXL checkpoint.

    Raises UserError for adapters, and for models of several architectures or numbers of blocks; it names two of them.
    """
    found: list[Layout | None] = []
    whys: list[str] = []
    for source, name in zip(sources, names, strict=True):
        shapes = {key: info.shape for key, info in source.header.tensors.items()}
        if is_adapter(shapes):
            raise UserError(
                f"{name} is an adapter (LoRA): its factors say nothing one by one; bake it into its model "
                "(dodgeburn bake) and compare that with the model"
            )
        try:
            found.append(detect_layout(shapes, shapes))
            whys.append("")
        except UserError as error:
            found.append(None)
            whys.append(str(error))
    first = found[0]
    for other, name, why in zip(found[1:], names[1:], whys[1:], strict=True):
        if first is None and other is None:
            continue
        if first is None or other is None:
            lone, reason = (names[0], whys[0]) if first is None else (name, why)
            raise UserError(f"{lone} cannot be compared with a whole checkpoint: {reason}")
        if first.all_blocks != other.all_blocks or first.name != other.name:
            raise UserError(
                f"{names[0]} is {first.title} of {len(first.blocks)} blocks, {name} is {other.title} of "
                f"{len(other.blocks)}: only models of one architecture can be compared"
            )
    return first


def _pair_up(one: Tensors, two: Tensors, found: Diff) -> list[str]:
    """The tensors that can be compared as numbers; everything else goes into `found`."""
    theirs = two.header.tensors
    both = []
    for name, info in one.header.tensors.items():
        if name not in theirs:
            found.only_a.append(name)
            continue
        other = theirs[name]
        if info.dtype != other.dtype:
            found.types[info.dtype, other.dtype] += 1
        if info.shape != other.shape:
            found.shapes[name] = info.shape, other.shape
        elif _computable(info.dtype) and _computable(other.dtype):
            both.append(name)
        else:
            found.unread[name] = info.dtype == other.dtype and _same_bytes(name, one, two)
    found.only_b = [name for name in theirs if name not in one.header.tensors]
    if not both:
        raise UserError(
            f"{found.a} and {found.b} have no tensor in common that could be compared: {len(found.only_a)} only in the "
            f"first, {len(found.only_b)} only in the second, {len(found.shapes)} of other shapes"
        )
    return both


def _computable(dtype: str) -> bool:
    return dtype in FLOAT_DTYPES or (dtype[0] in "IUB" and DTYPE_BITS[dtype] >= 8)


def _same_bytes(name: str, one: Tensors, two: Tensors) -> bool:
    size, step = one.info(name).nbytes, 1 << 20
    buffers = [memoryview(bytearray(min(step, size))) for _ in range(2)]
    for start in range(0, size, step):
        parts = [buffer[: min(step, size - start)] for buffer in buffers]
        for source, part in zip((one, two), parts, strict=True):
            source.read_into(name, start, part)
        if parts[0] != parts[1]:
            return False
    return True


def _compare(name: str, pair: SideBySide, found: Diff) -> None:
    change = Change(tensors=1)
    for a, b in pair.tiles(name):
        for values, label in ((a, found.a), (b, found.b)):
            if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
                found.not_finite[name] = label
                return
        change.add_tile(a, b)
    change.changed = int(change.values_changed > 0)
    found.tensors[name] = change
    weights = all(source.info(name).dtype in FLOAT_DTYPES for source in pair.sources)
    found.total.add(change, weights)
    layout = found.layout
    if layout is not None:
        component = layout.component(name)
        block = layout.block(name) or OTHER
        found.blocks.setdefault(block, Change()).add(change, weights)
    else:
        component = name.partition(".")[0]
    found.components.setdefault(_TITLES.get(component, component), Change()).add(change, weights)


def in_order(names: Iterable[str], layout: Layout | None) -> list[str]:
    """Block names in the model's order, those outside last."""
    order = list(layout.all_blocks) if layout else []
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))
