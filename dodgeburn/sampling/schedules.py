"""Noise levels and time steps: which sigmas a sampler visits.

The uniform spacings (trailing, leading, linspace) are taken from diffusers' own scheduler of each sampler,
whose details differ between them, so that pictures agree with diffusers. Karras and exponential are
computed here, because diffusers rounds their time steps to whole numbers (by up to a third in ln sigma on
the last steps); here they stay fractional.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from dodgeburn.errors import UserError
from dodgeburn.sampling.settings import check_seed

# Whose noise levels a sampler takes. diffusers' schedulers of Heun, DPM2 and LMS have the same ones as Euler's, but
# list them twice for their two model calls.
SCHEDULERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": EulerDiscreteScheduler,
    "dpm2": EulerDiscreteScheduler,
    "dpm2_a": EulerAncestralDiscreteScheduler,
    "lms": EulerDiscreteScheduler,
    "dpmpp_2s_a": EulerAncestralDiscreteScheduler,
    "dpmpp_sde": DPMSolverMultistepScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde_heun": DPMSolverMultistepScheduler,
    "dpmpp_3m_sde": DPMSolverMultistepScheduler,
    "dpmpp_3m_sde_o3": DPMSolverMultistepScheduler,
}

# Keys of a saved scheduler config that choose the schedule itself; ours come from the settings instead.
_CHOICES = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "final_sigmas_type",
    "sigma_min", "sigma_max", "algorithm_type", "solver_order", "solver_type", "euler_at_final",
    "lower_order_final",
)  # fmt: skip

KARRAS_RHO = 7.0  # arXiv 2206.00364, eq. 5
LEAST_ALPHA = 2.0**-24  # stands for a terminal SNR of 0, whose sigma would be infinite: sigma 4096 (as in diffusers)


@dataclass(frozen=True)
class Schedule:
    """`steps` time steps and `steps + 1` noise levels, falling.

    `sigmas` are in variance-exploding form (0.03 to 15 for Stable Diffusion), the last usually 0.
    `timesteps` are what the U-Net is told, in 0..999, fractional for Karras and exponential. Initial
    latents are `initial_scale` times unit noise.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    initial_scale: float
    prediction_type: str  # "epsilon", "v_prediction" or "sample"
    table: np.ndarray = field(repr=False, compare=False)  # sigma of every training time step, rising; float64

    def timestep_at(self, sigma: float) -> float:
        """The (fractional) training time step of a noise level between those of the plan."""
        return float(sigma_to_timestep(np.array([sigma]), self.table)[0])


def scheduler_for(sampler: str, config: dict[str, Any], spacing: str = "trailing", zero_snr: bool = False) -> Any:
    """diffusers' scheduler whose levels a sampler takes, with the model's betas from `config` (a scheduler config).

    `zero_snr` rescales the betas so that the last time step is pure noise (arXiv 2305.08891, algorithm 1).
    """
    known = inspect.signature(SCHEDULERS[sampler]).parameters
    options: dict[str, Any] = {k: v for k, v in config.items() if k in known and k not in _CHOICES}
    if spacing in ("trailing", "leading", "linspace"):
        options["timestep_spacing"] = spacing
    elif spacing in ("karras", "exponential"):
        options[f"use_{spacing}_sigmas"] = True
        options["timestep_spacing"] = "linspace"  # diffusers takes the ends of this; linspace has the training ends
    if sampler == "dpmpp_2m_sde":
        options["algorithm_type"] = "sde-dpmsolver++"
    if zero_snr:
        options["rescale_betas_zero_snr"] = True
    return SCHEDULERS[sampler](**options)


def schedule(sampler: str, spacing: str, steps: int, config: dict[str, Any], zero_snr: bool = False) -> Schedule:
    """Noise levels of `steps` steps; `zero_snr`: from a terminal signal-to-noise ratio of 0, see `scheduler_for`.

    Raises UserError when the model's schedule cannot give that many steps.
    """
    uniform = spacing if spacing in ("trailing", "leading", "linspace") else "trailing"
    scheduler = scheduler_for(sampler, config, uniform, zero_snr)
    n_train = int(scheduler.config.num_train_timesteps)
    if steps > n_train:
        raise UserError(f"steps is {steps}: this model's noise schedule has {n_train} time steps, ask for at most that")
    prediction = str(scheduler.config.prediction_type)
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"the model predicts {prediction!r}: only epsilon, v_prediction and sample can be sampled so far"
        )
    alphas = np.maximum(scheduler.alphas_cumprod.double().numpy(), LEAST_ALPHA)
    table = np.sqrt((1 - alphas) / alphas)  # sigma of every training time step, rising
    if spacing == "karras":
        sigmas = karras(table[0], table[-1], steps)
        times = sigma_to_timestep(sigmas, table)
    elif spacing == "exponential":
        sigmas = exponential(table[0], table[-1], steps)
        times = sigma_to_timestep(sigmas, table)
    else:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.double().numpy()
        if len(times) != steps:  # trailing with rounding trouble, or more steps than distinct times
            raise UserError(f"{sampler} with {spacing} spacing cannot make {steps} steps of {n_train}: ask for fewer")
        sigmas = np.interp(times, np.arange(n_train), table)
    last = 0.0
    if sampler == "ddim" and not scheduler.config.set_alpha_to_one:
        last = float(table[0])  # DDIM of Stable Diffusion ends at the first training level, not at 0
        if spacing in ("karras", "exponential") or sigmas[-1] <= last:
            last = 0.0  # already there: the last step must still do something
    # diffusers starts Euler at sigma_max, and the variance-preserving samplers at unit variance; so do we.
    of_euler = SCHEDULERS[sampler] in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
    starts_at_sigma = of_euler and spacing != "leading"
    start = float(sigmas[0]) if starts_at_sigma else math.sqrt(float(sigmas[0]) ** 2 + 1)
    return Schedule(
        timesteps=tuple(float(t) for t in times),
        sigmas=(*(float(s) for s in sigmas), last),
        initial_scale=start,
        prediction_type=prediction,
        table=table,
    )


def karras(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """Falling sigmas, even in sigma^(1/7) (arXiv 2206.00364, eq. 5); float64 [steps]."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / KARRAS_RHO), sigma_max ** (1 / KARRAS_RHO)
    return (high + ramp * (low - high)) ** KARRAS_RHO


def exponential(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """Falling sigmas, even in log sigma; float64 [steps]."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def sigma_to_timestep(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The (fractional) training time step of each sigma, interpolated in log sigma; `table` rises with the
    step.
    """
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def initial_noise(seed: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Generator]:
    """Unit noise [c, h, w] of a seed, drawn on the CPU whatever the device, and the generator to go on with.

    One generator a picture: what a seed gives does not depend on its batch mates, nor on the device.
    Raises UserError for a seed outside 0 .. 2^64 - 1.
    """
    check_seed(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32), generator
