"""Training of the estimator, from collected trajectories, on the one training loop.

Three stages: the network (ordinal severity, types, rank within the prompt); the calibration and the exit heads on the
frozen network, on prompts kept aside; the rules for stopping on prompts that nothing was fitted to. A network with few
steps, or whose predictions hardly spread while the labels do, is refused or told of: that is how the first attempt at
this task failed (docs/foresee.md).
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee.drawn import Drawings, batches
from dodgeburn.foresee.estimator import Calibration, Estimator, raw_bad
from dodgeburn.foresee.feed import Feed, Targets, Where, check_labels, targets_of, whole
from dodgeburn.foresee.network import SPATIAL, ExitHeads, Network, NetworkSettings, Outputs, at_least
from dodgeburn.foresee.policy import exit_distribution, geometric_prior
from dodgeburn.foresee.scores import within_prompt_spearman
from dodgeburn.foresee.shards import Store, Trajectory
from dodgeburn.training.loop import LoopSettings, train

LEAST_STEPS = 1500
PARTS = ("fit", "calibration", "choice")
WARMUP = 100
COLLAPSE = 0.2  # SD of predictions over SD of labels


@dataclass(frozen=True)
class FitSettings:
    """How to train. `network` says what is seen."""

    network: NetworkSettings = NetworkSettings()
    steps: int = 1500
    prompts: int = 8  # of a batch
    per_prompt: int = 8
    moments: int = 1  # of each trajectory
    lr: float = 2e-3
    weight_decay: float = 0.1
    rank: float = 0.5  # weights of the losses beside severity's
    types: float = 0.3
    heat: float = 2.0
    drawn: int = 64  # drawings of a batch, if there are any
    precision: str = "bf16"  # or "no"
    exit_steps: int = 300
    exit_prior: float = 0.15  # of the geometric distribution that exits are held to
    exit_beta: float = 0.05
    seed: int = 0
    calibration_share: float = 0.15  # of the prompts: for calibration and exit heads
    choice_share: float = 0.2  # of the prompts: for choosing rules
    without: tuple[str, ...] = ()  # generators that are left out of everything

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: expected a number from 0 up")
        if self.steps < LEAST_STEPS:
            raise UserError(
                f"{self.steps} optimiser steps: give at least {LEAST_STEPS}; with few of them predictions stay at the "
                "labels' mean whatever the data"
            )


def parts_of(store: Store, settings: FitSettings, where: Where = lambda record: True) -> dict[str, str]:
    """ "fit", "calibration" or "choice" for each prompt (by its id) of the training split with labels; which is which
    depends on the prompts alone, in the order of their hashes."""
    prompts = {r.prompt_id for r in store.records if r.label is not None and usable(r, settings) and where(r)}
    order = sorted(prompts, key=lambda p: hashlib.blake2b(p.encode(), digest_size=8).digest())
    first = round(settings.calibration_share * len(order))
    second = first + round(settings.choice_share * len(order))
    return {p: "calibration" if i < first else "choice" if i < second else "fit" for i, p in enumerate(order)}


def usable(record: Trajectory, settings: FitSettings) -> bool:
    """Whether a trajectory may be used in training at all."""
    return record.split == "train" and record.generator not in settings.without


def fit(
    store: Store, folder: Path, settings: FitSettings | None = None, where: Where = lambda record: True,
    callback: Callable[[int, dict[str, float]], object] | None = None, begin: Network | None = None,
    drawings: Drawings | None = None,
) -> Estimator:  # fmt: skip
    """Train an estimator on the labelled trajectories of split "train" that `where` lets through.

    `folder` holds checkpoints and logs; an interrupted run goes on there. `begin`: weights to start from. drawings:
    learn from these besides (`drawn.py`). Raises UserError for labels that teach nothing and for NaN features; a
    DodgeburnWarning tells of a collapse.
    """
    settings = settings or FitSettings()
    began = time.perf_counter()

    names = ", ".join(map(str, store.folders))
    check_labels([r for r in store.records if r.label is not None and usable(r, settings) and where(r)], names)
    place = parts_of(store, settings, where)

    def of(part: str) -> Where:
        return lambda r: usable(r, settings) and where(r) and place.get(r.prompt_id) == part

    parts = {p: [r for r in store.records if r.label is not None and of(p)(r)] for p in PARTS}
    for part in ("fit", "calibration"):
        check_labels(parts[part], f"{names} ({len(parts[part])} trajectories to {part})", 20 if part == "fit" else 10)
    torch.manual_seed(settings.seed)
    network = begin or Network(store.space, settings.network)
    tensors = Estimator(network).fed
    words = settings.network.words if "text" in settings.network.inputs else 0
    seen = (*tensors, "mask") if draws(settings.network) and store.has("mask") else tensors
    feed = Feed(store, of("fit"), seen, settings.prompts, settings.per_prompt, settings.moments, words, settings.seed)
    if begin is None:
        set_scales(network, feed)
    key = {"fit": plain(asdict(settings)), "data": store.digest, "rows": [r.id for r in parts["fit"]]}
    if settings.network.memory:  # what is remembered only means something along whole ways
        feed.moments, feed.prompts = None, max(2, settings.prompts // 4)
    train_network(network, feed, settings, folder, key, callback, drawings)
    estimator = Estimator(network)
    spread = recalibrate(estimator, store, folder, settings, where)
    estimator.record = {
        "looks": int(feed.loaded(0).length.max()), "training": plain(asdict(settings)),
        "seed": settings.seed, "weights": network.weights,
        "trajectories": {part: len(records) for part, records in parts.items()},
        "prompts": {part: len({r.prompt_id for r in records}) for part, records in parts.items()},
        "bad_share": float(np.mean([bool(r.label and r.label.bad) for r in parts["fit"]])),
        "generators": sorted({r.generator for r in parts["fit"]}),
        "provenance": sorted({r.provenance for r in parts["fit"]}),
        "samplers": sorted({r.sampler for r in parts["fit"]}),
        "drawings": 0 if drawings is None else len(drawings.labels), "sd_ratio": round(spread, 4),
        "train_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return estimator


def plain(value: Any) -> Any:
    """JSON's view of nested tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def recalibrate(
    estimator: Estimator, store: Store, folder: Path, settings: FitSettings, where: Where = lambda record: True
) -> float:
    """The later stages, on the calibration part: calibration and exit heads of the network as it is. Returns
    SD(predictions) / SD(labels) at half the way."""
    place = parts_of(store, settings, where)

    def calibrates(record: Trajectory) -> bool:
        return usable(record, settings) and where(record) and place.get(record.prompt_id) == "calibration"

    spread = calibrate(estimator, store, calibrates)
    words = settings.network.words if "text" in settings.network.inputs else 0
    ways = Feed(store, calibrates, estimator.fed, max(2, settings.prompts // 4), settings.per_prompt, None, words,
                settings.seed)  # fmt: skip
    key = {"fit": plain(asdict(settings)), "data": store.digest, "network": _digest(estimator.network)}
    train_exits(estimator, ways, settings, folder, key)
    return spread


def _digest(network: Network) -> str:
    """Names the weights."""
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(network.state_dict().items()):
        found.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def set_scales(network: Network, feed: Feed) -> None:
    """Mean and deviation of features and scalars over the first group of shards."""
    now = feed.loaded(0)
    for name, parts in (("features", ("cond", "delta")), ("scalars", ("scalars",))):
        if name in network.settings.inputs:
            rows = torch.randperm(len(now.tensors[parts[0]]), generator=torch.Generator().manual_seed(0))[:20_000]
            x = torch.cat([now.tensors[p][rows].float() for p in parts], -1)
            getattr(network, f"{name}_mean").copy_(x.mean(0))
            getattr(network, f"{name}_scale").copy_(x.std(0).clamp_min(1e-4))
            if name == "features":
                components: Tensor = getattr(network, "components")  # noqa: B009 (mypy takes it for a module)
                standard = ((x - x.mean(0)) / x.std(0).clamp_min(1e-4)).clamp(-8, 8)
                components.copy_(principal(standard, components.shape[1]))


def principal(x: Tensor, count: int) -> Tensor:
    """The `count` directions of most variance of standardised features [n, d], scaled to unit variance: [d, count].

    A few thousand features of a few thousand pictures are learned by heart otherwise.
    """
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    top, size = vectors[:, -count:].flip(1), values[-count:].flip(0)
    # Directions in which nothing varies hold rounding errors only: they are left out.
    return torch.where(size > 1e-4 * size[0], top / size.clamp_min(1e-12).sqrt(), torch.zeros_like(top))


def draws(settings: NetworkSettings) -> bool:
    """Whether the network can say where."""
    return settings.heatmap and bool(set(SPATIAL) & set(settings.inputs))


def losses_of(out: Outputs, tensors: dict[str, Tensor], targets: Targets, settings: FitSettings) -> dict[str, Tensor]:
    """Severity (ordinal or histogram), types, order within a prompt at the same share of the way, heatmap."""
    there = tensors["there"].float()
    each = there * targets.weight[:, None]
    total = each.sum().clamp_min(1e-6)
    k = there.shape[1]
    if settings.network.head == "coral":
        wanted = targets.at_least[:, None].expand(-1, k, -1)
        severity = F.binary_cross_entropy_with_logits(out.severity, wanted, reduction="none").mean(-1)
    else:
        severity = -(targets.histogram[:, None] * out.severity.log_softmax(-1)).sum(-1)
    found = {"severity": (severity * each).sum() / total}
    if settings.types and bool(targets.typed.any()):
        wanted = targets.types[:, None].expand(-1, k, -1)
        types = F.binary_cross_entropy_with_logits(out.types, wanted, reduction="none").mean(-1)
        typed = each * targets.typed[:, None]
        found["types"] = settings.types * (types * typed).sum() / typed.sum().clamp_min(1e-6)
    if settings.rank:
        found["rank"] = settings.rank * pairwise(out.rank, targets, there)
    if out.heatmap is not None and "mask" in tensors:
        mask = F.adaptive_avg_pool2d(
            tensors["mask"].float()[:, None] / 255, (out.heatmap.shape[-2], out.heatmap.shape[-1])
        )[:, 0]
        heat = F.binary_cross_entropy_with_logits(
            out.heatmap, mask[:, None].expand_as(out.heatmap), reduction="none"
        ).mean((-2, -1))  # fmt: skip
        found["heat"] = settings.heat * (heat * each).sum() / total
    return found


def pairwise(rank: Tensor, targets: Targets, there: Tensor) -> Tensor:
    """Logistic loss of pairs of one prompt [b, k]: the worse picture is to have the larger rank (RankNet, weighed by
    how far apart the severities are)."""
    apart = targets.severity[:, None] - targets.severity[None]
    pair = (targets.group[:, None] == targets.group[None]) & (apart > 0.05)
    first, second = pair.nonzero(as_tuple=True)
    if not len(first):
        return rank.sum() * 0
    weight = apart[first, second].clamp(max=2)[:, None] * there[first] * there[second]
    loss = F.softplus(-(rank[first] - rank[second]))
    return (loss * weight).sum() / weight.sum().clamp_min(1e-6)


def train_network(
    network: Network, feed: Feed, settings: FitSettings, folder: Path, key: dict[str, Any],
    callback: Callable[[int, dict[str, float]], object] | None = None, drawings: Drawings | None = None,
) -> None:  # fmt: skip
    """The first stage; drawings have the same losses, each batch of trajectories is followed by one of them."""
    drawn = None if drawings is None else batches(drawings, network, settings.drawn)
    if drawings is not None:
        key = {**key, "drawings": len(drawings.labels)}
    loop = LoopSettings(
        steps=settings.steps, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, warmup=WARMUP,
        constant=0.4, final=0.02, ema=0.995, precision=settings.precision, seed=settings.seed, checkpoint_every=500,
        log_every=50,
        settings=key,
    )  # fmt: skip
    assert loop.steps >= LEAST_STEPS and loop.warmup < loop.steps / 4

    def losses(batch: tuple[dict[str, Tensor], Targets], generator: torch.Generator) -> dict[str, Tensor]:
        found = losses_of(network(batch[0]), *batch, settings)
        if drawn is not None:
            besides = drawn(0, generator)
            said = losses_of(network(besides[0]), *besides, settings)
            found |= {f"drawn {name}": value for name, value in said.items()}
        return found

    train("estimator", {"network": network}, feed, losses, folder, loop, callback)


def calibrate(estimator: Estimator, store: Store, where: Where) -> float:
    """Fit the calibration on trajectories that `where` lets through; returns SD(predictions) / SD(labels) at half the
    way. Warns of a collapse, and says whether more steps or other inputs would help."""
    raws, levels, bads, weights, halves, severities, groups = [], [], [], [], [], [], []
    with torch.no_grad():
        for batch in whole(store, where, (*estimator.tensors, "progress")):
            tensors = estimator.inputs_of(batch)
            out = estimator.network(tensors)
            targets = targets_of(batch.records)
            there = batch.there
            raws.append(raw_bad(out.severity)[there])
            levels.append(tensors["log_snr"].float()[there])
            bads.append(targets.bad[:, None].expand_as(there)[there])
            weights.append(targets.weight[:, None].expand_as(there)[there])
            half = (batch.tensors["progress"].float() - 0.5).abs().masked_fill(~there, 9).argmin(1)
            expected = at_least(out.severity).sum(-1)
            halves.append(expected[torch.arange(len(half)), half])
            severities.append(targets.severity)
            groups += [r.prompt_id for r in batch.records]
    estimator.calibration = Calibration.fit(torch.cat(raws), torch.cat(levels), torch.cat(bads), torch.cat(weights))
    predicted, severity = torch.cat(halves).numpy(), torch.cat(severities).numpy()
    return collapse_alarm(predicted, severity, np.asarray(groups))


def collapse_alarm(predicted: np.ndarray, severity: np.ndarray, groups: np.ndarray) -> float:
    """SD(predictions) / SD(labels) [n each], with a DodgeburnWarning where it is under COLLAPSE."""
    ratio = float(predicted.std() / max(severity.std(), 1e-9))
    if ratio < COLLAPSE:
        found = within_prompt_spearman(predicted, severity, groups)
        why = (
            "but they are ordered rightly: it was trained too briefly"
            if found > 0.15
            else "and their order says nothing: these inputs hold no signal"
        )
        warnings.warn(
            f"the estimator collapsed to the mean: its predictions spread {ratio:.2f} times as much as the labels, "
            f"{why} (rank correlation within prompts {found:.2f})", DodgeburnWarning, stacklevel=2,
        )  # fmt: skip
    return ratio


def train_exits(estimator: Estimator, feed: Feed, settings: FitSettings, folder: Path, key: dict[str, Any]) -> None:
    """Exit and hazard heads on whole ways, the network frozen.

    Exit (PonderNet, arXiv 2107.05407; PALBERT, 2204.03276): sum_k p_k loss_k + beta KL(prior || p), p from lambda.
    Hazard: F_k = 1 - prod(1 - h_j) is to be the probability of "bad" at every k, and can only grow.
    """
    exits: ExitHeads = estimator.exits
    loop = LoopSettings(
        steps=settings.exit_steps, lr=3e-3, warmup=20, precision="no", ema=0.98, seed=settings.seed + 1,
        checkpoint_every=settings.exit_steps, settings=key,
    )  # fmt: skip

    def losses(batch: tuple[dict[str, Tensor], Targets], generator: torch.Generator) -> dict[str, Tensor]:
        tensors, targets = batch
        with torch.no_grad():
            out = estimator.network(tensors)
            log_snr = tensors["log_snr"].float()
            raw = estimator.calibration(raw_bad(out.severity), log_snr)
            wanted = targets.bad[:, None].expand_as(raw)
            answer = F.binary_cross_entropy_with_logits(raw, wanted, reduction="none")
        leave, hazard = exits(out.z, log_snr)
        there = tensors["there"]
        p = exit_distribution(leave.sigmoid(), there)
        prior = geometric_prior(there, settings.exit_prior)
        divergence = (prior * (prior.clamp_min(1e-8).log() - p.clamp_min(1e-8).log())).sum(1).mean()
        survived = F.logsigmoid(-hazard).masked_fill(~there, 0).cumsum(1)  # log prod (1 - h)
        given_up = (-torch.expm1(survived)).clamp(1e-6, 1 - 1e-6)
        event = F.binary_cross_entropy(given_up, wanted, reduction="none")
        return {
            "exit": (p * answer).sum(1).mean(), "prior": settings.exit_beta * divergence,
            "hazard": (event * there).sum() / there.sum(),
        }  # fmt: skip

    train("exits", {"exits": exits}, feed, losses, folder, loop)
