"""What a fine-tune changed, taken out of it: TUNED - BASE as a full delta, or as a LoRA by singular values.

`bake` adds either to another model again ("unfusing" a fine-tune, as was done with the DPO-tuned SDXL). The report says
for every block how large the change is, how much of its energy (squared norm) a LoRA keeps, and how much of it may be
nothing but rounding: a value x stored with p mantissa bits is off by up to half of ulp(x) = 2^(floor(log2 |x|) - p), on
average by ulp(x)² / 12 squared.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dodgeburn.checkpoint.header import FLOAT_DTYPES, dtype_name
from dodgeburn.checkpoint.layout import BASE, Layout, detect_layout
from dodgeburn.checkpoint.lora_keys import write_key
from dodgeburn.checkpoint.lora_write import ADAPTER_SPEC
from dodgeburn.checkpoint.metadata import NO_HASH, RECIPE, SPEC_HASH, recipe_of, to_json
from dodgeburn.checkpoint.modules import modules, tensor_moves
from dodgeburn.checkpoint.rewrite import STORED, cast_to, is_finite
from dodgeburn.checkpoint.sources import Tensors, files_of, hashing
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view, check_weights_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.addends import DELTA, DELTA_INFO
from dodgeburn.merge.low_rank import low_rank
from dodgeburn.merge.recipe import Parent, tool_version
from dodgeburn.models.as_single_file import open_as_single_file

if TYPE_CHECKING:
    import torch

RANK = 32  # of a LoRA, unless a rank or an energy is asked for
_MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
_SMALLEST = {"F16": 2.0**-24, "F8_E4M3": 2.0**-9, "F8_E5M2": 2.0**-16}  # spacing of the subnormal values


@dataclass
class BlockChange:
    """One block's change; energies are sums of squares."""

    tensors: int = 0  # that changed
    weights: float = 0.0  # energy of BASE's changed tensors
    change: float = 0.0  # of TUNED - BASE
    floor: float = 0.0  # expected of rounding TUNED to its stored type
    kept: float = 0.0  # of the change, by what was written

    def row(self) -> dict[str, float | int]:
        """Shares, for people: relative change (norms), kept energy, and rounding's energy over the change's."""
        return {
            "tensors": self.tensors,
            "relative_change": math.sqrt(self.change / self.weights) if self.weights else math.inf,
            "kept_energy": self.kept / self.change if self.change else 1.0,
            "rounding_share": self.floor / self.change if self.change else 0.0,
        }


@dataclass
class DeltaReport:
    """What was extracted: by block, ranks by module (LoRA), and changed tensors that are not in the file."""

    path: Path
    kind: Literal["full", "lora"]
    layout: Layout
    blocks: dict[str, BlockChange]
    ranks: dict[str, int] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)  # changed tensors that a LoRA has no place for -> energy
    tensors: int = 0  # compared
    seconds: float = 0.0

    @property
    def total(self) -> BlockChange:
        """All blocks together."""
        out = BlockChange()
        for block in self.blocks.values():
            for name in ("tensors", "weights", "change", "floor", "kept"):
                setattr(out, name, getattr(out, name) + getattr(block, name))
        return out


def extract(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    kind: Literal["full", "lora"] = "full",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "stored",
) -> DeltaReport:
    """Write TUNED - BASE to `out`: every changed tensor whole ("full"), or its modules as a LoRA with kohya's keys.

    `rank` (default 32) or `energy` (0..1, by module) size the LoRA. `dtype` is the type of the numbers written: stored
    (TUNED's own for a full delta, fp16 for a LoRA), fp32, fp16 or bf16. Norms, biases, embeddings and the VAE have no
    place in a LoRA: where they changed, a DodgeburnWarning counts them and says how much of the change they are.
    Raises UserError for models of two architectures or sizes, if nothing changed, and as TensorWriter.
    """
    started = time.perf_counter()
    _check_options(kind, rank, energy, dtype)
    with open_as_single_file(tuned) as one, open_as_single_file(base) as two:
        layout = _one_layout(one, two)
        inputs = [*files_of(one), *files_of(two)]
        check_weights_output(out, inputs)
        pairs = _Pairs(one, two, layout)
        report = DeltaReport(Path(out), kind, layout, {block: BlockChange() for block in layout.all_blocks})
        report.tensors = len(pairs.names)
        recipe: dict[str, Any] = {"kind": "delta_extract", "version": 1, "tool": tool_version(), "as": kind}
        recipe |= {"layout": layout.name, "rank": rank, "energy": energy, "dtype": dtype}
        with hashing([one, two]) as futures:
            if kind == "full":
                infos, fill = _full(pairs, report, dtype)
            else:
                rank = RANK if rank is None and energy is None else rank
                recipe["rank"] = rank
                infos, fill = _lora(pairs, report, rank, energy, "F16" if dtype == "stored" else STORED[dtype])
            for name, source, future in zip(("tuned", "base"), (one, two), futures, strict=True):
                parent = Parent(file=source.path.name, sha256=future.result(), recipe=recipe_of(source.header.metadata))
                recipe[name] = parent.model_dump(mode="json")
        with TensorWriter(out, infos, _metadata(report, recipe), inputs) as writer:
            fill(writer)
            writer.replace_metadata(_metadata(report, recipe, writer.sha256_tensors()))
            one.check_unchanged()
            two.check_unchanged()
    _warn(pairs, report)
    report.seconds = time.perf_counter() - started
    return report


def _check_options(kind: str, rank: int | None, energy: float | None, dtype: str) -> None:
    if kind == "full" and (rank is not None or energy is not None):
        raise UserError("--rank and --energy have no effect on a full delta: add --as lora, or leave them out")
    if rank is not None and energy is not None:
        raise UserError("--rank and --energy both size the LoRA: give one of them")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}: expected at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise UserError(f"energy {energy}: expected a share above 0 and up to 1, such as 0.9")
    if dtype not in ("stored", "fp32", "fp16", "bf16"):
        raise UserError(f"unknown dtype {dtype!r}: expected stored, fp32, fp16 or bf16")


def _one_layout(one: Tensors, two: Tensors) -> Layout:
    found = []
    for source in (one, two):
        try:
            shapes = {key: info.shape for key, info in source.header.tensors.items()}
            found.append(detect_layout(shapes, shapes))
        except UserError as error:
            raise UserError(f"{source.path.name}: {error}") from None
    if found[0].all_blocks != found[1].all_blocks or found[0].name != found[1].name:
        raise UserError(
            f"{one.path.name} is {found[0].title} and {two.path.name} {found[1].title} of "
            f"{len(found[0].blocks)} and {len(found[1].blocks)} blocks: a delta needs two models of one architecture"
        )
    return found[0]


class _Pairs:
    """The tensors that both models have, read side by side."""

    def __init__(self, tuned: Tensors, base: Tensors, layout: Layout) -> None:
        self.tuned, self.base, self.layout = tuned, base, layout
        theirs = base.header.tensors
        self.names: list[str] = []
        self.only_tuned: list[str] = []
        for name, info in tuned.header.tensors.items():
            if layout.block(name) is None:
                continue  # EMA copies, schedule buffers
            if name not in theirs:
                self.only_tuned.append(name)
            elif info.dtype in FLOAT_DTYPES and theirs[name].dtype in FLOAT_DTYPES:
                if info.shape != theirs[name].shape:
                    raise UserError(
                        f"{name} is {list(info.shape)} in {tuned.path.name} but {list(theirs[name].shape)} in "
                        f"{base.path.name}: a delta needs two models of one size"
                    )
                self.names.append(name)
        self.only_base = [name for name in theirs if layout.block(name) and name not in tuned.header.tensors]

    def block(self, name: str) -> str:
        return self.layout.block(name) or BASE

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """TUNED's and BASE's tensor as float32."""
        out = []
        for source in (self.tuned, self.base):
            wide = source.tensor(name).float()
            if not is_finite(wide):
                raise UserError(f"tensor {name} of {source.path.name} has NaN or infinite values: repair the file")
            out.append(wide)
        return out[0], out[1]

    def changed(self, report: DeltaReport) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and difference of every tensor that changed; the report learns of each."""
        import torch

        with _progress(sum(self.tuned.info(name).nbytes for name in self.names)) as update:
            for name in self.names:
                tuned, base = self.read(name)
                update(self.tuned.info(name).nbytes)
                if torch.equal(tuned, base):
                    continue
                delta = tuned - base
                block = report.blocks[self.block(name)]
                block.tensors += 1
                block.weights += _energy(base)
                block.change += _energy(delta)
                block.floor += rounding_energy(tuned, self.tuned.info(name).dtype)
                yield name, delta


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="delta", disable=None) as bar:
        yield bar.update


def _energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def rounding_energy(values: torch.Tensor, dtype: str) -> float:
    """Expected squared error of having rounded these values to a safetensors float type: sum of ulp² / 12."""
    import torch

    _, exponent = torch.frexp(values)  # |x| = m 2^e with m in [0.5, 1)
    spacing = torch.exp2((exponent - 1 - _MANTISSA[dtype]).double()).clamp_(min=_SMALLEST.get(dtype, 0.0))
    spacing = torch.where(values == 0, 0.0, spacing)  # zero is exact
    return float(spacing.square().sum()) / 12


_Fill = Any  # Callable[[TensorWriter], None]; a closure that writes every tensor


def _full(pairs: _Pairs, report: DeltaReport, dtype: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], _Fill]:
    """Once through both models to see what changed, then (by the returned function) again to write it."""
    infos: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, delta in pairs.changed(report):
        own = pairs.tuned.info(name).dtype
        kind = STORED.get(dtype, "F16" if own.startswith("F8") else own)
        infos[DELTA + name] = (kind, tuple(delta.shape))
        block = report.blocks[pairs.block(name)]
        block.kept += _energy(delta) - _energy(delta - cast_to(delta, kind, name, "the delta").float())
    if not infos:
        raise UserError(f"{pairs.tuned.path.name} and {pairs.base.path.name} hold equal tensors: there is no delta")

    def fill(writer: TensorWriter) -> None:
        for key, (kind, _) in infos.items():
            tuned, base = pairs.read(key.removeprefix(DELTA))
            delta = cast_to(tuned - base, kind, key, "the delta").contiguous().reshape(-1)
            writer.write(key, 0, byte_view(delta))

    return infos, fill


def _lora(
    pairs: _Pairs, report: DeltaReport, rank: int | None, energy: float | None, dtype: str
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], _Fill]:
    """Factors of every changed module, held in memory in the type they are written in."""
    import torch

    places = _places(pairs.layout.name)
    alpha = float(RANK if rank is None else rank)
    tensors: dict[str, torch.Tensor] = {}
    for name, delta in pairs.changed(report):
        found = places.get(name)
        if not found:
            report.left[name] = _energy(delta)
            continue
        for module, move in found:
            part = delta.chunk(3, dim=0)[move.part] if move.op == "third" else delta
            part = (part.T if move.op == "transpose" else part).contiguous()
            if not bool(part.any()):
                continue
            factors = low_rank(part.flatten(1), rank, energy)
            r = factors.down.shape[0]
            # One alpha for all modules, whatever their ranks: diffusers 0.42 mixes up alphas that differ.
            even = math.sqrt(r / alpha)
            down = factors.down.reshape(r, *part.shape[1:]) * even
            up = factors.up.reshape(part.shape[0], r, *[1] * (part.ndim - 2)) * even
            stored = {"down": down, "up": up, "alpha": torch.tensor(alpha)}
            kept = {
                role: tensor if role == "alpha" else cast_to(tensor, dtype, f"{module} {role}", "the LoRA")
                for role, tensor in stored.items()
            }
            again = (kept["up"].float().flatten(1) @ kept["down"].float().flatten(1)).reshape(part.shape) * (alpha / r)
            report.blocks[pairs.block(name)].kept += _energy(part) - _energy(part - again)
            report.ranks[module] = r
            for role, tensor in kept.items():
                tensors[write_key(module, role, "kohya", pairs.layout.name)] = tensor
    if not tensors:
        raise UserError(
            f"{pairs.tuned.path.name} and {pairs.base.path.name} differ in no weight that a LoRA can hold"
            + (f" ({len(report.left)} other tensors differ: take --as full)" if report.left else "")
        )

    def fill(writer: TensorWriter) -> None:
        for key, tensor in tensors.items():
            writer.write(key, 0, byte_view(tensor.contiguous().reshape(-1)))

    return {key: (dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()}, fill


def _places(layout: str) -> dict[str, list[tuple[str, Any]]]:
    """Single-file tensor -> the modules of a LoRA that it holds: matrices and convolutions, embeddings left out."""
    out: dict[str, list[tuple[str, Any]]] = {}
    for module in sorted(modules(layout)):
        last = module.rpartition(".")[2]
        if ".embeddings." not in module and "norm" not in last:
            move = tensor_moves(layout)[f"{module}.weight"]
            out.setdefault(move.sources[0], []).append((module, move))
    return out


def _metadata(report: DeltaReport, recipe: Mapping[str, Any], digest: str = NO_HASH) -> dict[str, str]:
    out = {"format": "pt", RECIPE: to_json(recipe), "modelspec.sai_model_spec": "1.0.1"}
    out |= {"modelspec.title": report.path.stem, "modelspec.implementation": "diffusers"}
    if report.kind == "full":
        out[DELTA_INFO] = to_json({"layout": report.layout.name, "of": recipe["tuned"]["file"]})
    else:
        ranks = set(report.ranks.values())
        out["modelspec.architecture"] = ADAPTER_SPEC[report.layout.name]
        out["ss_network_module"] = "networks.lora"
        out["ss_network_alpha"] = str(float(recipe["rank"] or RANK))
        out["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return out | {SPEC_HASH: "0x" + digest}


def _warn(pairs: _Pairs, report: DeltaReport) -> None:
    lines = []
    for source, only in ((pairs.tuned, pairs.only_tuned), (pairs.base, pairs.only_base)):
        if only:
            lines.append(f"{len(only)} tensors only in {source.path.name} are left out, first {only[0]}")
    if report.left:
        share = sum(report.left.values()) / report.total.change
        lines.append(
            f"{len(report.left)} changed tensors (norms, biases, embeddings, VAE) have no place in a LoRA and are left "
            f"out: {share:.1%} of the change's energy; --as full keeps them"
        )
    total = report.total
    if total.floor >= total.change:
        lines.append("the change is no larger than rounding to the stored type: the delta may be noise")
    for line in lines:
        warnings.warn(line, DodgeburnWarning, stacklevel=3)


def table(report: DeltaReport) -> str:
    """The report in words: by block, change relative to the weights, kept energy, and the part rounding may explain."""
    lines = [f"{'block':<7}{'changed':>8}{'change':>10}{'kept':>9}{'rounding':>10}"]
    for block, change in [*report.blocks.items(), ("all", report.total)]:
        if not change.tensors:
            continue
        row = change.row()
        lines.append(
            f"{block:<7}{change.tensors:>8}{row['relative_change']:>10.3%}{row['kept_energy']:>9.2%}"
            f"{row['rounding_share']:>10.2%}"
        )
    lines.append("change: its norm over the weights'; kept: energy in the file; rounding: energy that storing")
    lines.append("the tuned model in its type explains by itself (its floor)")
    return "\n".join(lines)
