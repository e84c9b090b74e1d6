"""WiSE-FT (arXiv 2109.01903) for the estimator: between an encoder that has learned without labels and one fine-tuned
on them, at the share alpha that does best on a generator that neither has seen.

The encoder of what is seen at places first learns without labels (SimCLR's loss, arXiv 2002.05709: two moments of one
trajectory are to be alike, and unlike those of others; the larger the batch, the more it learns, as all of them are
compared). On top of it, frozen, the rest of the network learns from labels: the sound starting point. From there
everything is fine-tuned. All weights are then interpolated, alpha 0 being the first and 1 the second.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.errors import UserError
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.evaluate import column, judge
from dodgeburn.foresee.feed import Feed, Targets
from dodgeburn.foresee.network import Network, noise_embedding
from dodgeburn.foresee.scores import auroc
from dodgeburn.foresee.shards import Store
from dodgeburn.foresee.train import FitSettings, fit, parts_of, plain, recalibrate, set_scales, train_network, usable
from dodgeburn.training.loop import LoopSettings, train

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def interpolate(first: Network, second: Network, alpha: float) -> Network:
    """(1 - alpha) first + alpha second, weight by weight."""
    out, other = copy.deepcopy(first), second.state_dict()
    mixed = {name: torch.lerp(w.float(), other[name].float(), alpha) for name, w in first.state_dict().items()}
    out.load_state_dict(mixed)
    return out.eval()


def self_supervised(network: Network, feed: Feed, folder: Path, steps: int, seed: int, key: dict[str, Any]) -> None:
    """Train the encoder of what is seen at places without labels, in place. key: what else decides the outcome."""
    encoder = network.picture
    assert encoder is not None

    def losses(batch: tuple[dict[str, Tensor], Targets], generator: torch.Generator) -> dict[str, Tensor]:
        tensors = batch[0]
        log_snr = tensors["log_snr"].float()
        vectors = network.look(tensors, noise_embedding(log_snr).flatten(0, 1))[0].unflatten(0, log_snr.shape)
        views = [F.normalize(vectors[:, k], dim=1) for k in (0, 1)]
        similar = views[0] @ views[1].T / 0.1
        target = torch.arange(len(similar))
        return {"contrast": (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2}

    loop = LoopSettings(steps=steps, lr=2e-3, warmup=50, precision="no", ema=0.99, seed=seed, checkpoint_every=steps,
                        settings=key)  # fmt: skip
    train("self-supervised", {"encoder": encoder}, feed, losses, folder, loop)


@dataclass
class Wise:
    """alpha: the share chosen. auroc: on the held-out generator at half the way, for each of ALPHAS."""

    estimator: Estimator
    alpha: float
    auroc: dict[float, float]


def wise(
    store: Store, folder: Path, settings: FitSettings, held_out: str, pretrain_steps: int = 600,
    alphas: Sequence[float] = ALPHAS,
) -> Wise:  # fmt: skip
    """Train both ends without `held_out` (a generator of the training split) and choose alpha on its trajectories.

    Raises UserError when it is not there, or the network does not see x0.
    """
    if "x0" not in settings.network.inputs:
        raise UserError("WiSE-FT is about the encoder of x0: add x0 to the inputs")
    if held_out not in {r.generator for r in store.records if usable(r, settings)}:
        names = ", ".join(sorted({r.generator for r in store.records if usable(r, settings)}))
        raise UserError(f"no generator {held_out!r} to hold out: there are {names}")
    settings = replace(settings, without=(*settings.without, held_out))
    place = parts_of(store, settings)
    torch.manual_seed(settings.seed)
    network = Network(store.space, settings.network)
    tensors = Estimator(network).fed
    words = settings.network.words if "text" in settings.network.inputs else 0
    feed = Feed(store, lambda r: usable(r, settings) and place.get(r.prompt_id) == "fit", tensors, settings.prompts,
                settings.per_prompt, 2, words, settings.seed)  # fmt: skip
    set_scales(network, feed)
    key: dict[str, Any] = {"fit": plain(asdict(settings)), "data": store.digest, "pretrain": pretrain_steps}
    self_supervised(network, feed, folder / "pretrain", pretrain_steps, settings.seed, key)
    frozen = network.picture
    assert frozen is not None
    frozen.requires_grad_(False)
    feed.moments = settings.moments
    train_network(network, feed, settings, folder / "frozen", key)
    sound = copy.deepcopy(network)
    frozen.requires_grad_(True)
    tuned = fit(store, folder / "tuned", replace(settings, lr=settings.lr / 4), begin=network)
    seen = replace(settings, without=tuple(w for w in settings.without if w != held_out))
    found = {}
    for alpha in alphas:
        between = Estimator(interpolate(sound, tuned.network, alpha))
        there = judge(between, store, lambda r: usable(r, seen) and r.generator == held_out)
        found[float(alpha)] = auroc(there.bad[:, column(0.5)], there.is_bad)
    alpha = max(found, key=lambda a: found[a])
    best = Estimator(interpolate(sound, tuned.network, alpha), tuned.exits, tuned.calibration, dict(tuned.record))
    recalibrate(best, store, folder / "between", settings)
    best.record["wise"] = {"alpha": alpha, "held_out": held_out}
    return Wise(best, alpha, found)
