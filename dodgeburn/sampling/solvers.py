"""One denoising step, solver by solver, all with one signature.

Everything is in the variance-exploding form of Karras et al. (arXiv 2206.00364): x = x0 + sigma * noise,
and the model enters only through `denoised`, its guess of x0. In this form DDIM (eta 0) *is* Euler's
method; the two differ in their schedules (where the last step ends).

To add a solver: write a function of this signature, put it in `SOLVERS`, name it in `settings.SAMPLERS`,
and give its diffusers scheduler in `schedules.SCHEDULERS`. A solver that wants the model's answer at a further
point asks `history.denoise`; one that adds noise asks `history.noise`; one with a memory uses `history.past`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dodgeburn.sampling.brownian import Noise


@dataclass
class History:
    """What a solver may ask for, and what it remembers between steps; rows follow the batch, so pictures can leave."""

    noise: Noise  # (sigma, sigma_next) -> unit normal noise of that stretch, [n, c, h, w]
    denoise: Callable[[Tensor, float], Tensor]  # (x, sigma) -> denoised: one more model call
    past: list[tuple[float, Tensor]] = field(default_factory=list)  # (sigma, what was kept), latest first

    def remember(self, sigma: float, value: Tensor, steps: int) -> None:
        """Keep `value` [n, c, h, w] of this step, and no more than `steps` of them."""
        self.past = [(sigma, value), *self.past[: steps - 1]]

    def keep(self, rows: Tensor) -> None:
        """Keep only the pictures in `rows` (int64 [m])."""
        self.past = [(sigma, value[rows]) for sigma, value in self.past]


Solver = Callable[[Tensor, Tensor, float, float, History], Tensor]
"""(x [n, c, h, w], denoised alike, sigma, sigma_next, history) -> x at sigma_next; sigma > sigma_next >= 0."""


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact flow if `denoised` did not change on the way: the straight line to it, to level `sigma_next`."""
    return torch.lerp(denoised, x, sigma_next / sigma)


def direction(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """dx / dsigma of the probability-flow ODE (arXiv 2206.00364, eq. 1 with sigma as the time)."""
    return (x - denoised) * (1 / sigma)


def ancestral_levels(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): where a deterministic step ends, and the noise that then brings it to `sigma_next`.

    DDPM's posterior variance, arXiv 2006.11239 eq. 7, in sigma form (eta 1).
    """
    sigma_up = sigma_next * math.sqrt(max(0.0, 1 - (sigma_next / sigma) ** 2))
    return math.sqrt(max(0.0, sigma_next**2 - sigma_up**2)), sigma_up


# ------------------------------------------------------------------------------------------- ordinary equation


def euler(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Euler's method on the probability-flow ODE (arXiv 2206.00364, algorithm 2 without churn); DDIM with
    eta 0 (arXiv 2010.02502, eq. 12) is the same map.
    """
    return toward(x, denoised, sigma, sigma_next)


def heun(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 2 without churn): second order, two model calls.

    The direction is the mean of both ends' directions; the step to 0 is Euler's, there is no direction at 0.
    """
    ahead = toward(x, denoised, sigma, sigma_next)
    if sigma_next == 0:
        return ahead
    there = direction(ahead, history.denoise(ahead, sigma_next), sigma_next)
    return x + (direction(x, denoised, sigma) + there) * ((sigma_next - sigma) / 2)


def dpm2(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """DPM-Solver-2 as k-diffusion has it (after arXiv 2206.00927, algorithm 1): second order, two model calls.

    The direction is that of the geometric middle of both levels; the step to 0 is Euler's.
    """
    if sigma_next == 0:
        return denoised
    middle = math.sqrt(sigma * sigma_next)
    halfway = toward(x, denoised, sigma, middle)
    return x + direction(halfway, history.denoise(halfway, middle), middle) * (sigma_next - sigma)


def lms(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Linear multistep (Adams-Bashforth for uneven steps, along sigma), fourth order from the fourth step on.

    The direction is the polynomial through the last four, integrated exactly (Katherine Crowson's k-diffusion).
    """
    history.remember(sigma, direction(x, denoised, sigma), 4)
    levels = [level for level, _ in history.past]
    for j, (_, slope) in enumerate(history.past):
        x = x + slope * _lagrange_integral(levels, j, sigma, sigma_next)
    return x


def _lagrange_integral(nodes: list[float], j: int, start: float, end: float) -> float:
    """Integral of the j-th Lagrange polynomial of up to four nodes; two Gauss points are exact up to degree 3."""
    middle, half = (start + end) / 2, (end - start) / 2
    total = 0.0
    for at in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):
        total += math.prod((at - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)
    return total * half


def dpmpp_2m(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2: second order from the previous step's `denoised`.

    First and last step are first order (there is no past, or the step to 0 is infinite in log sigma)."""
    past = history.past
    history.remember(sigma, denoised, 1)
    if sigma_next == 0:
        return denoised
    if past:
        denoised = _extrapolated(denoised, past[0], sigma, sigma_next)
    return toward(x, denoised, sigma, sigma_next)


def _extrapolated(denoised: Tensor, previous: tuple[float, Tensor], sigma: float, sigma_next: float) -> Tensor:
    """`denoised` in the middle of the step ahead, on the line through the step before (in log sigma)."""
    h = math.log(sigma / sigma_next)
    r = math.log(previous[0] / sigma) / h
    return torch.lerp(denoised, previous[1], -1 / (2 * r))


# --------------------------------------------------------------------------------------------------- ancestral


def euler_ancestral(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Euler to a lower level `sigma_down`, then fresh noise back up to `sigma_next`."""
    if sigma_next == 0:
        return denoised
    sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
    return toward(x, denoised, sigma, sigma_down) + sigma_up * history.noise(sigma, sigma_next)


def dpm2_ancestral(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """`dpm2` to the level `sigma_down`, then fresh noise back up to `sigma_next`: two model calls."""
    if sigma_next == 0:
        return denoised
    sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
    return dpm2(x, denoised, sigma, sigma_down, history) + sigma_up * history.noise(sigma, sigma_next)


def dpmpp_2s_ancestral(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """DPM-Solver++(2S), arXiv 2211.01095 algorithm 1 (middle in log sigma), to `sigma_down`, then fresh noise back up
    to `sigma_next`: two model calls.
    """
    if sigma_next == 0:
        return denoised
    sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
    middle = math.sqrt(sigma * sigma_down)
    halfway = toward(x, denoised, sigma, middle)
    ahead = toward(x, history.denoise(halfway, middle), sigma, sigma_down)
    return ahead + sigma_up * history.noise(sigma, sigma_next)


# ----------------------------------------------------------------------------------------- stochastic equation


def _noise_scale(sigma: float, sigma_next: float) -> float:
    """Standard deviation of the noise that the reverse SDE (eta 1) adds from `sigma` to `sigma_next`."""
    return sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


def dpmpp_sde(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """SDE-DPM-Solver++ of second order in one step (k-diffusion's DPM++ SDE with r = 1/2, after arXiv 2211.01095,
    section 5): the answer at the middle level, itself reached with noise, for the whole step; two model calls.

    The noise of the whole step is made of its two halves', so that any source of independent noise will do.
    """
    if sigma_next == 0:
        return denoised
    middle = math.sqrt(sigma * sigma_next)
    first = _noise_scale(sigma, middle) * history.noise(sigma, middle)
    halfway = torch.lerp(denoised, x, (middle / sigma) ** 2) + first
    ahead = torch.lerp(history.denoise(halfway, middle), x, (sigma_next / sigma) ** 2)
    second = _noise_scale(middle, sigma_next) * history.noise(middle, sigma_next)
    return ahead + (sigma_next / middle) ** 2 * first + second


def dpmpp_2m_sde(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095 section 5 (midpoint): as `dpmpp_2m` with eta 1, fresh noise
    each step.
    """
    past = history.past
    history.remember(sigma, denoised, 1)
    if sigma_next == 0:
        return denoised
    if past:
        denoised = _extrapolated(denoised, past[0], sigma, sigma_next)
    drift = torch.lerp(denoised, x, (sigma_next / sigma) ** 2)
    return drift + _noise_scale(sigma, sigma_next) * history.noise(sigma, sigma_next)


def dpmpp_2m_sde_heun(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """`dpmpp_2m_sde` with the exact integral of the line through both answers (k-diffusion's "heun" type)."""
    past = history.past
    history.remember(sigma, denoised, 1)
    return _exponential_sde(x, denoised, past, sigma, sigma_next, history.noise)


def dpmpp_3m_sde(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """SDE-DPM-Solver++(3M) as k-diffusion, A1111 and ComfyUI have it: eta 1, from the last three answers.

    Its third-order term is half of what the integral of the parabola through them gives (as in DPM-Solver++'s own
    multistep code), so it is second order with a small constant; `dpmpp_3m_sde_o3` has the whole term. (diffusers
    0.42.1 has that term with a wrong sign in it, which makes it first order.)
    """
    past = history.past
    history.remember(sigma, denoised, 2)
    return _exponential_sde(x, denoised, past, sigma, sigma_next, history.noise, bend_share=0.5)


def dpmpp_3m_sde_o3(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """`dpmpp_3m_sde` with its third-order term in full: the exact integral of the parabola through the last three
    answers. Third order where the noise is not what limits it; the first step is first order, the second second.
    """
    past = history.past
    history.remember(sigma, denoised, 2)
    return _exponential_sde(x, denoised, past, sigma, sigma_next, history.noise)


def _exponential_sde(
    x: Tensor,
    denoised: Tensor,
    past: list[tuple[float, Tensor]],
    sigma: float,
    sigma_next: float,
    noise: Noise,
    bend_share: float = 1.0,
) -> Tensor:
    """A step of the reverse SDE (eta 1) that integrates the polynomial through `denoised` and up to two past answers.

    With h = ln(sigma / sigma_next) and H = 2h: e^-H x + (1 - e^-H) D + phi2 D' - phi3 D'' + noise, where D' and D'' are
    the derivatives of that polynomial in -ln sigma, in units of h, phi2 = (e^-H - 1) / H + 1 (the integral of
    H e^(-H (1 - u)) u over 0..1) and phi3 = phi2 / H - 1/2 (minus that of half u^2). `bend_share` of D'' is taken.
    """
    if sigma_next == 0:
        return denoised
    h = math.log(sigma / sigma_next)
    fall = 2 * h
    phi2 = math.expm1(-fall) / fall + 1
    out = torch.lerp(denoised, x, math.exp(-fall))
    if past:
        r0 = math.log(past[0][0] / sigma) / h
        d1 = (denoised - past[0][1]) * (1 / r0)
        if len(past) > 1:
            r1 = math.log(past[1][0] / past[0][0]) / h
            earlier = (past[0][1] - past[1][1]) * (1 / r1)
            bend = (d1 - earlier) * (1 / (r0 + r1))  # the divided difference: half of D''
            out = out + phi2 * (d1 + r0 * bend) - (phi2 / fall - 0.5) * (2 * bend_share) * bend
        else:
            out = out + phi2 * d1
    return out + _noise_scale(sigma, sigma_next) * noise(sigma, sigma_next)


SOLVERS: dict[str, Solver] = {
    "ddim": euler,
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_a": dpm2_ancestral,
    "lms": lms,
    "dpmpp_2s_a": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_3m_sde_o3": dpmpp_3m_sde_o3,
}
