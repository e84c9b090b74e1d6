"""One denoising step, solver by solver, all with one signature.

Everything is in the variance-exploding form of Karras et al. (arXiv 2206.00364): x = x0 + sigma * noise,
and the model enters only through `denoised`, its guess of x0. In this form DDIM (eta 0) *is* Euler's
method; the two differ in their schedules (where the last step ends).

To add a solver: write a function of this signature, put it in `SOLVERS`, name it in `settings.SAMPLERS`,
and give its diffusers scheduler in `schedules.SCHEDULERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class History:
    """What a multistep solver remembers between steps; rows follow the batch, so pictures can leave it."""

    noise: Callable[[], Tensor]  # draws fresh standard normal noise, [n, c, h, w]
    denoised: Tensor | None = None  # [n, c, h, w], the previous step's
    sigma: float = 0.0  # noise level at which it was made

    def keep(self, rows: Tensor) -> None:
        """Keep only the pictures in `rows` (int64 [m])."""
        if self.denoised is not None:
            self.denoised = self.denoised[rows]


Solver = Callable[[Tensor, Tensor, float, float, History], Tensor]
"""(x [n, c, h, w], denoised alike, sigma, sigma_next, history) -> x at sigma_next; sigma > sigma_next >= 0."""


def euler(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Euler's method on the probability-flow ODE (arXiv 2206.00364, algorithm 2 without churn); DDIM with
    eta 0 (arXiv 2010.02502, eq. 12) is the same map.
    """
    return torch.lerp(denoised, x, sigma_next / sigma)


def euler_ancestral(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """Euler to a lower level `sigma_down`, then fresh noise back up to `sigma_next` (DDPM's posterior
    variance, arXiv 2006.11239 eq. 7, in sigma form).
    """
    if sigma_next == 0:
        return denoised
    sigma_up = sigma_next * math.sqrt(max(0.0, 1 - (sigma_next / sigma) ** 2))
    sigma_down = math.sqrt(max(0.0, sigma_next**2 - sigma_up**2))
    return torch.lerp(denoised, x, sigma_down / sigma) + sigma_up * history.noise()


def dpmpp_2m(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2: second order from the previous step's `denoised`.

    First and last step are first order (there is no past, or the step to 0 is infinite in log sigma)."""
    previous, sigma_previous = history.denoised, history.sigma
    history.denoised, history.sigma = denoised, sigma
    if sigma_next == 0:
        return denoised
    if previous is None:
        return torch.lerp(denoised, x, sigma_next / sigma)
    h = math.log(sigma / sigma_next)
    r = math.log(sigma_previous / sigma) / h
    extrapolated = torch.lerp(denoised, previous, -1 / (2 * r))
    return torch.lerp(extrapolated, x, sigma_next / sigma)


def dpmpp_2m_sde(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, history: History) -> Tensor:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095 appendix (midpoint): as `dpmpp_2m` with eta 1, fresh noise
    each step.
    """
    previous, sigma_previous = history.denoised, history.sigma
    history.denoised, history.sigma = denoised, sigma
    if sigma_next == 0:
        return denoised
    h = math.log(sigma / sigma_next)
    toward = denoised
    if previous is not None:
        r = math.log(sigma_previous / sigma) / h
        toward = torch.lerp(denoised, previous, -1 / (2 * r))
    decay = math.exp(-2 * h)  # (sigma_next / sigma)^2
    return torch.lerp(toward, x, decay) + sigma_next * math.sqrt(1 - decay) * history.noise()


SOLVERS: dict[str, Solver] = {
    "ddim": euler,
    "euler": euler,
    "euler_a": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
