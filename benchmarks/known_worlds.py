"""Two worlds in which the right answer of a sampler is known, so that what is wrong is the sampler's.

**Gaussian**: the data are N(mean, std^2). Then the exact denoiser is affine, and so is every solver's step: the result
is a constant plus a weight on the initial noise plus a weight on each bit of later noise. The solvers themselves are
run on these weights (one "channel" each), so mean and deviation come out exactly, without a single random number.

**Curve**: the denoiser's answer is a given function of the noise level, whatever x. The step's integral is then known,
and the error is that of the solver's own quadrature formula, with no noise to hide its order.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dodgeburn.sampling.solvers import SOLVERS, History, Solver

MEAN, STD = 0.7, 0.5
WARM_UP = 3  # steps of past that the longest memory needs


def levels(high: float, low: float, steps: int, earlier: int = 0) -> list[float]:
    """`steps + 1` noise levels from `high` to `low`, even in log sigma, after `earlier` ones above `high`."""
    step = math.log(low / high) / steps
    return [high * math.exp(i * step) for i in range(-earlier, steps + 1)]


class GaussianWorld:
    """Data N(MEAN, STD^2), seen by a sampler that visits `sigmas` (falling; the last may be 0)."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)
        above = [s for s in sigmas if s > 0]
        middles = [math.sqrt(a * b) for a, b in zip(above, above[1:], strict=False)]
        # Noise is drawn for whole steps or their halves (in log sigma): those halves are the independent bits.
        self.cuts = np.array(sorted([*above, *middles], reverse=True))
        self.times = np.diff(1 / self.cuts**2)

    def start(self, sigma: float) -> Tensor:
        """The exact distribution at a noise level: weights [1, 2 + bits, 1, 1] on 1, the first noise, later bits."""
        x = torch.zeros(1, 2 + len(self.times), 1, 1, dtype=torch.float64)
        x[0, 0], x[0, 1] = MEAN, math.hypot(STD, sigma)
        return x

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x], exactly."""
        share = STD**2 / (STD**2 + sigma**2)
        out = share * x
        out[0, 0] += (1 - share) * MEAN
        return out

    def noise(self, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise of a stretch as weights on its bits."""
        first, last = (int(np.abs(np.log(self.cuts / s)).argmin()) for s in (sigma, sigma_next))
        out = torch.zeros(1, 2 + len(self.times), 1, 1, dtype=torch.float64)
        part = self.times[first:last]
        out[0, 2 + first : 2 + last, 0, 0] = torch.from_numpy(np.sqrt(part / part.sum()))
        return out

    def run(self, solver: Solver, earlier: int = 0) -> tuple[float, float]:
        """(mean, deviation) of what a sampler makes. The first `earlier` levels only fill its memory, along the exact
        path of the ordinary equation: that is for solvers without noise.
        """
        history = History(self.noise, self.denoise)
        x = self.start(self.sigmas[0])
        for i, (sigma, sigma_next) in enumerate(zip(self.sigmas, self.sigmas[1:], strict=False)):
            if i <= earlier:
                x = self.start(sigma)
            x = solver(x, self.denoise(x, sigma), sigma, sigma_next, history)
        weights = x.flatten()
        return float(weights[0]), float(weights[1:].square().sum().sqrt())


def gaussian_error(solver: Solver, high: float, low: float, steps: int, warm: bool = False) -> float:
    """|deviation - the exact one| at level `low`, after `steps` steps from the exact distribution at `high`."""
    earlier = WARM_UP if warm else 0
    mean, std = GaussianWorld(levels(high, low, steps, earlier)).run(solver, earlier)
    return math.hypot(std - math.hypot(STD, low), mean - MEAN)


def curve_error(solver: Solver, steps: int, stochastic: bool, high: float = 10.0, low: float = 0.1) -> float:
    """Error at `low` where the answer at level s is (cos ln s, sin ln s), the noise is left out, and the memory holds
    the exact past.

    In x / s^k, with k = 1 for the ordinary and 2 for the stochastic equation, a step is the integral of k D / s^(k+1).
    """
    k = 2 if stochastic else 1

    def answer(sigma: float) -> Tensor:
        turn = math.log(sigma)
        return torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64).reshape(1, 2, 1, 1)

    def exact(sigma: float) -> Tensor:
        """x at a level, of the path that is 0 at `high`: k s^k times the integral of r^(i - k - 1) from s to `high`."""
        there, here = (complex(r) ** complex(-k, 1) / complex(-k, 1) for r in (high, sigma))
        value = k * sigma**k * (there - here)
        return torch.tensor([value.real, value.imag], dtype=torch.float64).reshape(1, 2, 1, 1)

    history = History(lambda *_: torch.zeros(1, 2, 1, 1, dtype=torch.float64), lambda _, sigma: answer(sigma))
    sigmas = levels(high, low, steps, WARM_UP)
    x = exact(sigmas[0])
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if i <= WARM_UP:
            x = exact(sigma)
        x = solver(x, answer(sigma), sigma, sigma_next, history)
    return float((x - exact(sigmas[-1])).norm())


def slope(errors: Sequence[float], steps: Sequence[int]) -> float:
    """Order of convergence: minus the slope of log error against log steps (least squares)."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# The order that theory promises: of the distribution in the Gaussian world, and of the formula on a curve. Noise holds
# every SDE solver here at second order in the distribution, even the one whose formula is third; an ancestral step of
# two calls goes below its end and back up by noise, so its formula alone has no order to show.
NOMINAL: dict[str, int] = {
    "ddim": 1, "euler": 1, "euler_a": 1, "heun": 2, "dpm2": 2, "dpm2_a": 2, "lms": 4, "dpmpp_2s_a": 2, "dpmpp_sde": 2,
    "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_2m_sde_heun": 2, "dpmpp_3m_sde": 2,
    "dpmpp_3m_sde_o3": 2,
}  # fmt: skip
FORMULA_NOMINAL: dict[str, int] = {
    "ddim": 1, "euler": 1, "euler_a": 1, "heun": 2, "dpm2": 2, "lms": 4, "dpmpp_sde": 2, "dpmpp_2m": 2,
    "dpmpp_2m_sde": 2, "dpmpp_2m_sde_heun": 2, "dpmpp_3m_sde": 2, "dpmpp_3m_sde_o3": 3,
}  # fmt: skip
DETERMINISTIC = ("ddim", "euler", "heun", "dpm2", "lms", "dpmpp_2m")
ENDS = (14.6146, 0.0292)  # Stable Diffusion's largest and smallest training noise


def gaussian_orders(steps: Sequence[int], solvers: dict[str, Solver] | None = None) -> dict[str, float]:
    """Measured order of every sampler's distribution in the Gaussian world."""
    return {
        name: slope([gaussian_error(solver, *ENDS, n, warm=name in DETERMINISTIC) for n in steps], steps)
        for name, solver in (solvers or SOLVERS).items()
    }


def curve_orders(steps: Sequence[int]) -> dict[str, float]:
    """Measured order of every sampler's formula, where it has one."""
    return {
        name: slope([curve_error(SOLVERS[name], n, name not in DETERMINISTIC) for n in steps], steps)
        for name in FORMULA_NOMINAL
    }
