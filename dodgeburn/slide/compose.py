"""Several sliders (or LoRAs) as one file: the sum of their changes, each at its scale.

s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]: ranks are concatenated, which is exact. Summing the A's and the B's, as
is sometimes advised, would add cross terms s1 B1 A2 that nobody trained. Scale 1 of the new file does what the parents
do together at theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dodgeburn.checkpoint.lora_file import architecture_title
from dodgeburn.checkpoint.slider_card import SliderCard, SliderParent
from dodgeburn.checkpoint.tensorfile import check_weights_output
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.low_rank import low_rank
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, Factors


@dataclass(frozen=True)
class Composed:
    """A file made by `compose`."""

    path: Path
    adapter: Adapter
    card: SliderCard
    architecture: str
    kept: float | None  # share of the change's energy (squared norm) left by recompression; None without it


def concatenated(adapters: Sequence[Adapter], scales: Sequence[float], name: str = "composed") -> Adapter:
    """One adapter whose scale 1 is all of them at their scales: for every module the ranks side by side.

    Scales and alphas are folded into `up`, and all modules get one alpha (the largest rank), whatever their own ranks:
    diffusers mixes up alphas that differ between modules. Equal to the sum of the changes but for float32's rounding.
    Raises UserError for factors of one module that do not fit each other, and scales that are 0 or not finite.
    """
    for adapter, scale in zip(adapters, scales, strict=True):
        if not math.isfinite(scale) or scale == 0:
            raise UserError(f"{adapter.name} at scale {scale:g} has no part in a composition: give another scale")
    parts: dict[str, list[tuple[str, Factors, float]]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for module, factors in adapter.factors().items():
            parts.setdefault(module, []).append((adapter.name, factors, scale * factors.alpha / factors.rank))
    alpha = float(max(sum(f.rank for _, f, _ in found) for found in parts.values()))
    return Adapter({module: _side_by_side(module, found, alpha) for module, found in parts.items()}, name)


def _side_by_side(module: str, found: Sequence[tuple[str, Factors, float]], alpha: float) -> Factors:
    widest = max((factors.down for _, factors, _ in found), key=lambda down: down.ndim)
    rank = sum(factors.rank for _, factors, _ in found)
    downs, ups = [], []
    for name, factors, weight in found:
        if factors.down.shape[1:].numel() != widest.shape[1:].numel() or len(factors.up) != len(found[0][1].up):
            raise UserError(
                f"{name} changes {module} from {factors.down.shape[1:].numel()} to {len(factors.up)} values, "
                f"{found[0][0]} from {found[0][1].down.shape[1:].numel()} to {len(found[0][1].up)}: they are for "
                "different models"
            )
        downs.append(factors.down.reshape(factors.rank, *widest.shape[1:]))
        ups.append(factors.up.flatten(1) * (weight * rank / alpha))
    up = torch.cat(ups, 1)
    return Factors(torch.cat(downs), up.reshape(*up.shape, *[1] * (widest.ndim - 2)), alpha)


def recompressed(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best approximation of every module's change with `rank` components at most (Eckart-Young), and the share of
    all the changes' squared norm that is kept, before rounding.

    Q R of both thin factors leaves a matrix of rank x rank to take apart: no full weight is ever formed. Raises
    UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: expected at least 1")
    kept = total = 0.0
    alpha = float(min(rank, max(f.rank for f in adapter.factors().values())))
    made = {}
    for module, factors in adapter.factors().items():
        down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double() * (factors.alpha / factors.rank)
        out_basis, out_core = torch.linalg.qr(up)
        in_basis, in_core = torch.linalg.qr(down.T)
        core = out_core @ in_core.T
        found = low_rank(core, rank)
        r = len(found.down)
        new_up = out_basis @ found.up.double() * (r / alpha)
        new_down = found.down.double() @ in_basis.T
        energy = float(core.square().sum())
        total, kept = total + energy, kept + energy * found.kept
        made[module] = Factors(_shaped(new_down, factors.down, r, None), _shaped(new_up, factors.up, None, r), alpha)
    return Adapter(made, adapter.name), (kept / total if total else 1.0)


def _shaped(values: Tensor, like: Tensor, first: int | None, second: int | None) -> Tensor:
    shape = list(like.shape)
    shape[0], shape[1] = first or shape[0], second or shape[1]
    return values.float().reshape(shape)


def compose(
    parents: Sequence[tuple[str | Path, float]], out: str | Path, rank: int | None = None, dtype: str = "fp32",
    spelling: str = "kohya",
) -> Composed:  # fmt: skip
    """Write the sum of adapter files, each at its scale, as one adapter; with `rank`, recompressed to that.

    The card names the parents by sha256 with their scales. A late start is kept if all parents have the same one; where
    they differ, none is written and a DodgeburnWarning says so. Raises UserError for no parents, parents of two
    architectures or sizes, and as `load_adapter` and `save_adapter`.
    """
    if not parents:
        raise UserError("nothing to compose: name slider or LoRA files, each with a scale, as in A.safetensors:1.5")
    check_weights_output(out, [path for path, _ in parents])
    adapters = [load_adapter(path) for path, _ in parents]
    scales = [float(scale) for _, scale in parents]
    architecture = _one_architecture(adapters)
    name = Path(out).stem
    made = concatenated(adapters, scales, name)
    kept = None
    if rank is not None:
        made, kept = recompressed(made, rank)
    card = _card(name, adapters, scales)
    inputs = tuple(Path(path).expanduser() for path, _ in parents if Path(path).expanduser().is_file())
    save_adapter(made, out, architecture, spelling, dtype, card, inputs=inputs)
    return Composed(Path(out), made, card, architecture, kept)


def _one_architecture(adapters: Sequence[Adapter]) -> str:
    found = {a.origin.architecture: a.name for a in adapters if a.origin is not None and a.origin.architecture}
    if len(found) > 1:
        what = " and ".join(f"{name} is for {architecture_title(kind)}" for kind, name in found.items())
        raise UserError(f"{what}: sliders of one architecture only can be composed")
    return next((kind for kind in found if kind), "sd15")


def _card(name: str, adapters: Sequence[Adapter], scales: Sequence[float]) -> SliderCard:
    cards = [a.origin.card if a.origin is not None else None for a in adapters]
    starts = {None if card is None else card.start for card in cards}
    if len(starts) > 1:
        each = ", ".join(
            f"{a.name} {'from the beginning' if card is None or card.start is None else f'{card.start:g}'}"
            for a, card in zip(adapters, cards, strict=True)
        )
        warnings.warn(
            f"the parents start at different time steps ({each}): the composed file says none, give one with its use",
            DodgeburnWarning,
            stacklevel=3,
        )
    known = [card for card in cards if card is not None]
    bases = {(card.base, card.base_sha256) for card in known}
    base, base_sha256 = bases.pop() if len(bases) == 1 else ("", "")
    parents = [
        SliderParent(file=a.origin.file, sha256=a.origin.sha256, scale=scale, name=a.name)
        for a, scale in zip(adapters, scales, strict=True)
        if a.origin is not None
    ]
    unit = "its parents at the scales they were composed with"
    start = starts.pop() if len(starts) == 1 else None
    return SliderCard(
        name=name, method="composed", unit=unit, start=start, base=base, base_sha256=base_sha256, parents=parents
    )
