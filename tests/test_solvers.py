"""Solvers against known answers, k-diffusion's and diffusers' own steps; noise that fits any number of steps."""

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, LMSDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.known_worlds import (
    ENDS,
    FORMULA_NOMINAL,
    NOMINAL,
    GaussianWorld,
    curve_orders,
    gaussian_error,
    gaussian_orders,
    levels,
    slope,
)
from dodgeburn.models.model import Model
from dodgeburn.sampling.brownian import BrownianPath
from dodgeburn.sampling.loop import GenerateSettings, Step, generate
from dodgeburn.sampling.schedules import Schedule, schedule
from dodgeburn.sampling.settings import ALIASES, SAMPLERS, STOCHASTIC
from dodgeburn.sampling.solvers import SOLVERS, History, dpmpp_3m_sde
from tests.tiny import tiny_configs, tiny_model

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return tiny_model("sdxl")


# ------------------------------------------------------------------------------------------ orders of accuracy


def test_distributions_converge_at_their_order() -> None:
    orders = gaussian_orders((80, 160, 320))
    assert set(orders) == set(SAMPLERS) == set(SOLVERS) == set(NOMINAL)
    for name, order in orders.items():
        assert 0.9 * NOMINAL[name] <= order <= NOMINAL[name] + 0.5, (name, order)


def test_formulas_have_their_order() -> None:
    for name, order in curve_orders((40, 80, 160)).items():
        assert 0.9 * FORMULA_NOMINAL[name] <= order <= FORMULA_NOMINAL[name] + 0.5, (name, order)


def test_a_wrong_sign_in_the_third_order_would_be_seen() -> None:
    # diffusers 0.42.1 has -1/2 where phi3 needs +1/2: its step is k-diffusion's minus d2.
    def slipped(x: Any, denoised: Any, sigma: float, sigma_next: float, history: History) -> Any:
        past = history.past
        right = dpmpp_3m_sde(x, denoised, sigma, sigma_next, history)
        if len(past) < 2 or sigma_next == 0:
            return right
        h = math.log(sigma / sigma_next)
        r0, r1 = math.log(past[0][0] / sigma) / h, math.log(past[1][0] / past[0][0]) / h
        return right - ((denoised - past[0][1]) / r0 - (past[0][1] - past[1][1]) / r1) / (r0 + r1)

    steps = (80, 160, 320)
    assert slope([gaussian_error(slipped, *ENDS, n) for n in steps], steps) < 1.2


@pytest.mark.parametrize("sampler", ["dpmpp_3m_sde", "dpmpp_3m_sde_o3"])
def test_3m_sde_makes_the_right_spread_at_45_steps(sampler: str) -> None:
    plan = schedule(sampler, "exponential", 45, tiny_configs()["scheduler"])
    mean, std = GaussianWorld(plan.sigmas).run(SOLVERS[sampler])
    assert std == pytest.approx(0.5, abs=0.003) and mean == pytest.approx(0.7, abs=1e-9)


def test_the_gaussian_world_is_what_random_numbers_show() -> None:
    sigmas = levels(14.6, 0.03, 9)
    exact = GaussianWorld(sigmas).run(SOLVERS["dpmpp_sde"])[1]
    generator = torch.Generator().manual_seed(0)
    x = 0.7 + torch.randn(100_000, 1, 1, 1, generator=generator) * math.hypot(0.5, sigmas[0])

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return 0.7 + (x - 0.7) * 0.25 / (0.25 + sigma**2)

    history = History(lambda *_: torch.randn(x.shape, generator=generator), denoise)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        x = SOLVERS["dpmpp_sde"](x, denoise(x, sigma), sigma, sigma_next, history)
    assert float(x.std()) == pytest.approx(exact, rel=0.01)


# ------------------------------------------------------------------------------------------------- oracles


def toy(x: torch.Tensor, sigma: Any) -> torch.Tensor:
    """A smooth denoiser that is no straight line in x or in sigma."""
    return 0.8 * torch.tanh(x / (1 + sigma * sigma) ** 0.5 + 0.3 * torch.cos(torch.as_tensor(sigma).log()))


def ours(sampler: str, x: torch.Tensor, sigmas: list[float], noise: Callable[[float, float], torch.Tensor]) -> Any:
    history = History(noise, toy)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        x = SOLVERS[sampler](x, toy(x, sigma), sigma, sigma_next, history)
    return x


@pytest.fixture
def k_sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """k-diffusion's module of samplers alone: the rest of it wants packages that play no part here."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no k-diffusion: pip install --no-deps --target DIR k-diffusion==0.1.1, then PYTHONPATH=DIR")
    for name in ("torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    sys.modules["k_diffusion.utils"].append_dims = lambda x, n: x[(..., *[None] * (n - x.ndim))]  # type: ignore[attr-defined]
    sys.modules["k_diffusion"].utils = sys.modules["k_diffusion.utils"]  # type: ignore[attr-defined]
    path = f"{found.submodule_search_locations[0]}/sampling.py"
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


K_NAMES = {
    "euler": "euler", "euler_a": "euler_ancestral", "heun": "heun", "dpm2": "dpm_2", "dpm2_a": "dpm_2_ancestral",
    "lms": "lms", "dpmpp_2s_a": "dpmpp_2s_ancestral", "dpmpp_sde": "dpmpp_sde", "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde", "dpmpp_2m_sde_heun": "dpmpp_2m_sde", "dpmpp_3m_sde": "dpmpp_3m_sde",
}  # fmt: skip


@pytest.mark.parametrize("sampler", sorted(K_NAMES))
@pytest.mark.parametrize("spacing", ["karras", "exponential", "trailing"])
def test_same_steps_as_k_diffusion(k_sampling: Any, sampler: str, spacing: str) -> None:
    plan = schedule(sampler, spacing, 12, tiny_configs()["scheduler"])
    world = GaussianWorld(plan.sigmas)  # noise of steps and half steps that adds up exactly
    bits = torch.randn(len(world.times), 2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def noise(sigma: Any, sigma_next: Any) -> torch.Tensor:
        weights = world.noise(float(sigma), float(sigma_next)).flatten()[2:]
        return torch.einsum("k,knchw->nchw", weights, bits)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * plan.sigmas[0]
    extra: dict[str, Any] = {"noise_sampler": noise} if sampler in STOCHASTIC else {}
    if sampler.startswith("dpmpp_2m_sde"):
        extra["solver_type"] = "heun" if sampler.endswith("heun") else "midpoint"
    theirs = getattr(k_sampling, f"sample_{K_NAMES[sampler]}")(
        lambda x, sigma: toy(x, sigma.reshape(-1, 1, 1, 1)),
        x, torch.tensor(plan.sigmas, dtype=torch.float64), disable=True, **extra,
    )  # fmt: skip
    assert float(theirs.std()) > 0.02
    assert torch.allclose(ours(sampler, x, list(plan.sigmas), noise), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("sampler", "kind"), [("heun", HeunDiscreteScheduler), ("lms", LMSDiscreteScheduler)])
def test_same_steps_as_diffusers(sampler: str, kind: Any) -> None:
    config = {k: v for k, v in tiny_configs()["scheduler"].items() if k in ("beta_schedule", "beta_start", "beta_end")}
    scheduler = kind(**config, timestep_spacing="trailing")
    scheduler.set_timesteps(9)
    plan: Schedule = schedule(sampler, "trailing", 9, config)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * plan.sigmas[0]
    theirs = x
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(theirs, t)  # lets it find its place
        sigma = float(scheduler.sigmas[i])
        eps = (theirs - toy(theirs, sigma)) / sigma
        theirs = scheduler.step(eps, t, theirs, return_dict=False)[0]

    def no_noise(*_: float) -> torch.Tensor:
        raise AssertionError("a sampler without noise asked for some")

    assert torch.allclose(ours(sampler, x, list(plan.sigmas), no_noise), theirs.double(), atol=2e-4)


def test_model_calls_a_step() -> None:
    sigmas = [*levels(10, 0.1, 6), 0.0]
    for sampler in SOLVERS:
        asked: list[float] = []

        def denoise(x: torch.Tensor, sigma: float, asked: list[float] = asked) -> torch.Tensor:
            asked.append(sigma)
            return torch.zeros_like(x)

        history = History(lambda *_: torch.zeros(1, 1, 1, 1), denoise)
        x = torch.ones(1, 1, 1, 1)
        for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
            x = SOLVERS[sampler](x, torch.zeros_like(x), sigma, sigma_next, history)
        two = sampler in ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
        assert len(asked) == (6 if two else 0), sampler  # never in the step to 0
        assert all(0.0999 < sigma < 10 for sigma in asked), sampler


# ---------------------------------------------------------------------------------------------------- noise

SIGMA = st.floats(0.02, 5000, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(SIGMA, min_size=3, max_size=3, unique=True), st.integers(0, 2**64 - 1))
def test_a_stretch_of_noise_is_the_sum_of_its_parts(sigmas: list[float], seed: int) -> None:
    a, b, c = sorted(sigmas, reverse=True)
    if min(a / b, b / c) < 1.01:
        return  # closer than any schedule; there the path's cells are told apart no more
    path, other = BrownianPath(seed, (3, 5)), BrownianPath(seed, (3, 5))
    whole = path(a, c).double()
    times = [1 / (s * s) for s in (a, b, c)]
    second, first = other(b, c).double(), other(a, b).double()  # asked for in another order
    parts = math.sqrt(times[1] - times[0]) * first + math.sqrt(times[2] - times[1]) * second
    scale = max(1.0, float(whole.abs().max()))
    assert torch.allclose(parts / math.sqrt(times[2] - times[0]), whole, atol=2e-2 * scale)
    assert torch.equal(path(a, b), BrownianPath(seed, (3, 5))(a, b))


def test_noise_is_normal_and_stretches_are_independent() -> None:
    path = BrownianPath(3, (100, 1000))
    cuts = [80.0, 14.6, 5.0, 4.9, 1.0, 0.5, 0.03]
    drawn = [path(a, b).double().flatten() for a, b in zip(cuts, cuts[1:], strict=False)]
    together = np.corrcoef(torch.stack(drawn).numpy())
    assert np.abs(together - np.eye(len(drawn))).max() < 0.015  # 5 deviations of 1e5 draws
    for noise in drawn:
        assert abs(float(noise.mean())) < 0.015 and abs(float(noise.std()) - 1) < 0.015
        assert abs(float((noise**4).mean()) - 3) < 0.12
    others = [BrownianPath(seed, (100, 1000))(5.0, 1.0).flatten() for seed in (3, 4, 3 + 2**32)]
    assert np.abs(np.corrcoef(torch.stack(others).numpy()) - np.eye(3)).max() < 0.015


def test_noise_path_refuses_what_it_has_not() -> None:
    path = BrownianPath(0, (2,))
    for bad in ((1.0, 1.0), (1.0, 2.0), (1.0, 0.0), (1e6, 1.0)):
        with pytest.raises(ValueError):
            path(*bad)
    assert torch.isfinite(path(1.0, 1.0 - 1e-9)).all()  # closer than a cell: still noise


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_more_steps_follow_the_same_path(sampler: str) -> None:
    """With an answer that never changes the noise is all there is: then any number of steps ends in the same place."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 14
    ends = []
    for steps in (4, 9, 40):
        path = BrownianPath(1, (1, 64))
        history = History(lambda a, b, path=path: path(a, b).double(), lambda x, _: torch.ones_like(x))
        y, sigmas = x, levels(14.0, 0.5, steps)
        for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
            y = SOLVERS[sampler](y, torch.ones_like(y), sigma, sigma_next, history)
        ends.append(y)
    assert float((ends[0] - 1).std()) > 0.3
    assert torch.allclose(ends[0], ends[2], atol=2e-3) and torch.allclose(ends[1], ends[2], atol=2e-3)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_seed_keeps_its_result_when_the_steps_change(sampler: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 500, generator=generator, dtype=torch.float64) * 14

    def fresh(*_: float) -> torch.Tensor:
        return torch.randn(1, 500, generator=generator, dtype=torch.float64)

    def likeness(noises: list[Callable[[float, float], torch.Tensor]]) -> float:
        ends = [ours(sampler, x, levels(14.0, 0.05, n), noise) for n, noise in zip((20, 45), noises, strict=True)]
        return float(np.corrcoef(torch.cat(ends).numpy())[0, 1])

    paths = [BrownianPath(1, (1, 500)) for _ in range(2)]
    assert likeness([lambda a, b, path=path: path(a, b).double() for path in paths]) > 0.9
    assert likeness([fresh, fresh]) < 0.7


def test_noise_of_each_picture_is_its_seeds(sdxl: Model) -> None:
    for noise in ("brownian", "fresh"):
        asked = GenerateSettings(steps=3, sampler="dpmpp_sde", noise=noise)
        a, b, again = generate(sdxl, ["a hat"] * 3, [3, 4, 3], asked)
        first, second, third = (np.asarray(p.image).astype(int) for p in (a, b, again))
        assert np.abs(first - third).max() <= 1 and np.abs(first - second).max() > 20


# ------------------------------------------------------------------------------------------------- in the loop


@pytest.mark.parametrize("sampler", ["heun", "lms", "dpmpp_sde", "dpmpp_3m_sde"])
def test_dropping_a_picture_leaves_the_others_alone(sdxl: Model, sampler: str) -> None:
    model, prompts, seeds = sdxl, ["a red hat", "b", "c"], [3, 4, 5]
    asked = GenerateSettings(steps=6, sampler=sampler)

    def drop_second(step: Step) -> list[bool] | None:
        return [index != 1 for index in step.indices] if step.i == 2 else None

    full = generate(model, prompts, seeds, asked)
    kept = generate(model, prompts, seeds, asked, callback=drop_second)
    assert [k.index for k in kept] == [0, 2]
    for k in kept:
        whole = np.asarray(full[k.index].image).astype(int)
        assert np.abs(np.asarray(k.image).astype(int) - whole).max() <= 1


def test_the_unet_is_told_fractional_times() -> None:
    model = tiny_model("sdxl")
    told: list[float] = []
    forward = model.unet.forward

    def noting(sample: torch.Tensor, time: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        told.append(float(time))
        return forward(sample, time, *args, **kwargs)

    model.unet.forward = noting
    generate(model, ["a"], [0], GenerateSettings(steps=3, sampler="dpmpp_sde", guidance=1.0))
    plan = schedule("dpmpp_sde", "trailing", 3, model.scheduler_config)
    middles = [math.sqrt(a * b) for a, b in zip(plan.sigmas, plan.sigmas[1:-1], strict=False)]
    a, b, c = plan.timesteps
    wanted = [a, plan.timestep_at(middles[0]), b, plan.timestep_at(middles[1]), c]
    assert told == pytest.approx(wanted, abs=1e-3)
    assert a > told[1] > b > told[3] > c and not told[1].is_integer()
    assert plan.timestep_at(plan.sigmas[1]) == pytest.approx(b)


def test_names_of_other_programs_are_understood() -> None:
    for ours_, (a1111, comfy) in SAMPLERS.items():
        meant = ours_.removesuffix("_o3")
        for name in (a1111, comfy, ours_.upper()):
            assert GenerateSettings(sampler=name).sampler == (ours_ if name == ours_.upper() else meant)
    assert GenerateSettings(sampler="dpmpp_3m_sde_gpu").sampler == "dpmpp_3m_sde"
    assert not set(ALIASES) & set(SAMPLERS)
