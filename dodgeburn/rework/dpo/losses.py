"""Preference losses for diffusion models, as plain functions of four numbers a pair.

For winner and loser of a pair, noised alike (same time step, same noise), the model and a frozen reference each predict
the noise. What remains are four errors, each the MEAN over the latents of (predicted - true noise)^2:

    m = (l_w - l_l) - (r_w - r_l)        l: the model's errors, r: the reference's; w: winner, l: loser

m < 0 says that the model explains the winner better, against the loser, than the reference does. Everything is a
function of the margin z = -(beta / 2) m (Diffusion-DPO, arXiv 2311.12908, eq. 14 with T omega(lambda_t) folded into
beta, as in its code); diffusers' example writes the same without the half, so its beta is half of ours. Because errors
are means and a likelihood is a sum, beta belongs to a size of latents: 5000 at SD1.5's 4 x 64 x 64 (`scaled_beta`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ELEMENTS_SD15 = 4 * 64 * 64
PAPER_BETA = 5000.0  # Diffusion-DPO's, for latents of that size


@dataclass(frozen=True)
class PairErrors:
    """Mean squared errors of the noise predictions [pairs]; the reference's carry no gradient."""

    winner: Tensor
    loser: Tensor
    winner_reference: Tensor
    loser_reference: Tensor

    def difference(self) -> Tensor:
        """m [pairs], as above."""
        return (self.winner - self.loser) - (self.winner_reference - self.loser_reference)

    def margin(self, beta: float) -> Tensor:
        """z = -(beta / 2) m [pairs]"""
        return -(beta / 2) * self.difference()


def scaled_beta(beta: float, elements: int, at: int = ELEMENTS_SD15) -> float:
    """A beta chosen at `at` elements of a latent, for latents of `elements`: the same weight of each element."""
    return beta * elements / at


# -------------------- losses with a reference: [pairs] each


def sigmoid(e: PairErrors, beta: float) -> Tensor:
    """-log sigmoid(z): Diffusion-DPO (arXiv 2311.12908, eq. 14). log 2 at z = 0."""
    return -F.logsigmoid(e.margin(beta))


def ipo(e: PairErrors, beta: float) -> Tensor:
    """(z - 1/2)^2: IPO (arXiv 2310.12036, eq. 17), its (h - 1 / (2 tau))^2 with tau = beta, times beta^2.

    The factor moves no minimum and keeps the loss's size when beta is changed. 1/4 at z = 0; pulls z to 1/2, not to
    infinity, so that certain pairs are not fitted without end.
    """
    return (e.margin(beta) - 0.5).square()


def hinge(e: PairErrors, beta: float) -> Tensor:
    """max(0, 1 - z): SLiC's hinge (arXiv 2305.10425) on DPO's margin. 1 at z = 0; silent from z = 1 on."""
    return F.relu(1 - e.margin(beta))


def linear(e: PairErrors, beta: float) -> Tensor:
    """-z: Linear-DPO (arXiv 2605.21123): the utility is linear, so a pair's pull never fades; 0 at z = 0.

    It has no end of its own: the paper's second half is a reference that follows as a moving average
    (`DpoSettings.reference_decay`). Written from the paper's abstract, not checked against its code.
    """
    return -e.margin(beta)


def kto(e: PairErrors, beta: float) -> Tensor:
    """Diffusion-KTO (arXiv 2404.04465, eq. 8): likes and dislikes, one by one; 1/2 at zero difference.

    A picture's reward is h = -(beta / 2) (l - r); its utility sigmoid(h - q) if liked, sigmoid(q - h) if disliked,
    where q = max(0, mean of h over the batch) stands for the divergence and carries no gradient. A pair's loss is the
    mean of 1 - utility of its winner, liked, and its loser, disliked.
    """
    liked, disliked = (
        -(beta / 2) * (of - reference)
        for of, reference in ((e.winner, e.winner_reference), (e.loser, e.loser_reference))
    )
    q = torch.cat([liked, disliked]).detach().mean().clamp(min=0)
    return 1 - (torch.sigmoid(liked - q) + torch.sigmoid(q - disliked)) / 2


# -------------------- losses without


def mapo(e: PairErrors, beta: float, sharpness: float = 0.5, scale: float = 1000.0) -> Tensor:
    """MaPO (arXiv 2406.06424, eq. 10): l_w - beta log sigmoid(T [phi(l_w) - phi(l_l)]), phi(l) = s l / (e^(s l) - 1).

    No reference; l_w + beta log 2 where winner and loser are explained alike. beta here weighs the second term (the
    paper: 0.1), s = `sharpness`, T = `scale`.
    """
    return e.winner - beta * F.logsigmoid(scale * (_phi(sharpness * e.winner) - _phi(sharpness * e.loser)))


def _phi(x: Tensor) -> Tensor:
    """x / (e^x - 1), which is 1 - x / 2 at 0 where the quotient is 0 / 0."""
    small = x.abs() < 1e-6
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2, safe / torch.expm1(safe))


def sft(e: PairErrors, beta: float) -> Tensor:
    """l_w: plain fine-tuning on the winners, the control. beta is not used."""
    return e.winner


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs."""

    function: Callable[[PairErrors, float], Tensor]
    source: str
    reference: bool = True  # a frozen reference's errors
    loser: bool = True
    beta: float | None = None  # its own default, where it isn't scaled with the latents


LOSSES: Mapping[str, Loss] = {
    "sigmoid": Loss(sigmoid, "Diffusion-DPO, arXiv 2311.12908"),
    "ipo": Loss(ipo, "IPO, arXiv 2310.12036"),
    "hinge": Loss(hinge, "SLiC, arXiv 2305.10425"),
    "linear": Loss(linear, "Linear-DPO, arXiv 2605.21123"),
    "kto": Loss(kto, "Diffusion-KTO, arXiv 2404.04465"),
    "mapo": Loss(mapo, "MaPO, arXiv 2406.06424", reference=False, beta=0.1),
    "sft": Loss(sft, "fine-tuning on the winners", reference=False, loser=False, beta=0.0),
}
LOG2 = math.log(2)


# -------------------- the safeguard


def safe_share(winner: Tensor, loser: Tensor, slack: float = 0.0) -> Tensor:
    """How much of the loser's gradient may pass so that the winner's error does not rise, to first order [pairs].

    Diffusion-SDPO (arXiv 2511.03317): a step goes along -(g_w - share g_l), which changes the winner's error by
    -g_w . (g_w - share g_l); that is at most -slack |g_w|^2 where share <= (1 - slack) |g_w|^2 / (g_w . g_l). As there,
    g are the gradients in the space of predictions, 2 (predicted - true) / elements; the U-Net's own Jacobians are left
    out. Where the two point apart nothing is held back.

    winner, loser: residuals predicted - true [pairs, c, h, w]; slack 0..1.
    """
    w, x = winner.detach().flatten(1).double(), loser.detach().flatten(1).double()
    along, length = (w * x).sum(1), w.square().sum(1)
    share = torch.where(along > 0, (1 - slack) * length / along.clamp(min=1e-30), torch.ones_like(along))
    return share.clamp(max=1.0).to(winner.dtype)


def scaled_gradient(value: Tensor, share: Tensor) -> Tensor:
    """`value` as it is, with `share` of its gradient."""
    return share * value + ((1 - share) * value).detach()
