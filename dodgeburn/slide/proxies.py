"""Sliders of models whose world nobody knows: proxies, named as such wherever their figures stand.

CLIP score change: how much closer a picture's CLIP embedding comes to the slider's positive prompt than the unedited
one's was (100 x the difference of cosines; Hessel et al. 2021, arXiv 2104.08718, without factor 2.5 and clipping at 0).
LPIPS (Zhang et al. 2018, arXiv 1801.03924): how different two pictures look, at their full size.

Nothing here says that an attribute moved: CLIP knows words, not measures, and a slider may please it in other ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dodgeburn.errors import UserError
from dodgeburn.measure.clip import ClipScore
from dodgeburn.measure.intervals import bootstrap_mean
from dodgeburn.measure.own_scorer import own_scorer
from dodgeburn.slide.calibrate import Scorer
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.readings import sweep_rows

LPIPS_NETWORK = "alex"
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, which the package lpips builds upon


class ScoresPictures(Protocol):
    """What gives every picture a number for a text."""

    def scores(self, pictures: np.ndarray, text: str) -> np.ndarray:
        """uint8 [n, h, w, 3] -> float64 [n]"""
        ...


def clip_scorer(clip: ClipScore, positive: str, negative: str) -> Scorer:
    """For `calibrate`: how much nearer to the positive prompt than to the negative one, as a proxy."""
    return Scorer(
        f"{positive!r} against {negative!r}", f"proxy: {clip.name}",
        lambda pictures: clip.scores(pictures, positive) - clip.scores(pictures, negative),
    )  # fmt: skip


def own_proxy(said: str) -> Scorer:
    """For `calibrate`: a user's FILE.py:FUNCTION, whose prompts are all "". Raises UserError as `own_scorer`."""
    scores, function, file = own_scorer(said)
    return Scorer(function, f"proxy: {file}:{function}", lambda pictures: scores(pictures, [""] * len(pictures)))


class Lpips:
    """Perceptual distance by the package lpips (an extra) on AlexNet's weights in torch's local cache."""

    def __init__(self, device: str = "cpu") -> None:
        """Raises UserError where the package or the weights are missing; nothing is downloaded."""
        try:
            import lpips
        except ImportError:
            raise UserError("LPIPS needs the package lpips: pip install 'dodgeburn[proxies]'") from None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
        if not weights.is_file():
            raise UserError(f"LPIPS needs torchvision's AlexNet weights: put {LPIPS_WEIGHTS} into {weights.parent}")
        self.network: Any = lpips.LPIPS(net=LPIPS_NETWORK, verbose=False).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def distances(self, pictures: np.ndarray, reference: np.ndarray, batch: int = 16) -> np.ndarray:
        """uint8 [n, h, w, 3] twice -> float64 [n]"""
        if pictures.shape != reference.shape:
            raise ValueError(f"pictures {pictures.shape} against {reference.shape}")

        def tensor(part: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(part.copy()).permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1

        out = [
            self.network(tensor(pictures[i : i + batch]), tensor(reference[i : i + batch])).flatten().double().cpu()
            for i in range(0, len(pictures), batch)
        ]
        return torch.cat(out).numpy() if out else np.zeros(0)


def proxy_figures(
    edit: Edit, positive: str, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float],
    clip: ScoresPictures, lpips: Lpips | None = None,
) -> dict[str, Any]:  # fmt: skip
    """CLIP score change (and LPIPS) at every scale, means with 95 % intervals over prompts and seeds.

    positive: the text whose score is followed. `clip_spearman`: mean rank correlation of scale and CLIP score over the
    sweeps. All JSON values.
    """
    from scipy.stats import spearmanr

    rising = sorted({*map(float, scales), 0.0})
    shape = (len(prompts), len(seeds), len(rising))
    pictures = edit.pictures(*sweep_rows(prompts, seeds, rising))
    score = clip.scores(pictures, positive).reshape(shape)
    zero = rising.index(0.0)
    change = score - score[:, :, zero, None]
    plain = pictures.reshape(*shape, *pictures.shape[1:])[:, :, [zero] * len(rising)].reshape(pictures.shape)
    distance = lpips.distances(pictures, plain).reshape(shape) if lpips is not None else None
    rho = [0.0 if np.ptp(row) == 0 else float(spearmanr(rising, row).statistic) for row in score.reshape(-1, shape[2])]
    spearman = bootstrap_mean(np.reshape(rho, shape[:2]))
    rows = []
    for k, scale in enumerate(rising):
        found = bootstrap_mean(change[:, :, k])
        row: dict[str, Any] = {"scale": scale, "clip_change": found.mean, "clip_change_interval": found.ends}
        if distance is not None:
            apart = bootstrap_mean(distance[:, :, k])
            row |= {"lpips": apart.mean, "lpips_interval": apart.ends}
        rows.append(row)
    return {
        "proxy": True, "positive": positive, "prompts": len(prompts), "seeds": len(seeds),
        "clip_spearman": spearman.mean, "clip_spearman_interval": spearman.ends, "scales": rows,
    }  # fmt: skip
