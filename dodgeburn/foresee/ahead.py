"""Looking ahead: a few large steps from a picture's state to its end, and somebody who reads what comes out.

At a quarter of the steps the guess of the clean picture is a blur, and nobody can tell from it what will be wrong. A
handful of model calls carries the state to the end well enough to be read: not the picture that will come, but with
most of its faults. Who reads is a *critic*, a function of pictures and prompts; the pocket's is the reader with the
pixel oracles behind it (`truth.py`). What it says is put together with what the estimator expects by two small
regressions for each share of the steps, fitted on prompts that the estimator's weights were not.

The calls are paid for like the sampler's own: whatever is said of savings counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.foresee.nearest import likeliest_look, named
from dodgeburn.foresee.policy import NEAR
from dodgeburn.foresee.truth import find_artifacts, reduced
from dodgeburn.pocket.reader import SIZE, Reader
from dodgeburn.pocket.world import LOOKS, Look
from dodgeburn.sampling.loop import Step
from dodgeburn.sampling.solvers import SOLVERS, History

SHARES = (0.25, 0.5)
"""Shares of the steps at which pictures can be looked ahead."""
END = 1.0
"""Stands for the finished picture, which is read without further calls."""
CALLS = 3
DOWN = 10.0  # by how much the noise level falls in those calls
HAZE = 2.0  # grey levels
MOST = 0.25  # of a picture's steps that one look may cost: of short ways the end is near anyway

Critic = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Pictures uint8 [n, h, w, 3] and their prompts -> severities [n], 0..5."""
Plan = tuple[float, ...]
"""Shares at which pictures are read, END included if finished ones are."""


def calls_for(calls: int, steps: int) -> int:
    """Calls of a look in a picture of so many steps: `calls` at most, fewer in a short one, none below four steps."""
    return min(calls, int(MOST * steps))


def due(progress: float, before: float, plan: Sequence[float]) -> float | None:
    """The share of `plan` that is reached at a moment, `before` being the progress of the moment before; else None."""
    found = [share for share in plan if before < share - NEAR <= progress]
    return max(found, default=None)


def finish(step: Step, calls: int = CALLS) -> Tensor:
    """The clean latents [n, c, h, w] that `calls` large steps (DPM++ 2M, evenly spaced in ln sigma, to a tenth of the
    step's noise level) and the last guess lead to. The sampler's own state stays as it is."""
    sigmas = np.geomspace(step.sigma, step.sigma / DOWN, calls + 1).tolist()
    x, denoised = step.latents * math.sqrt(step.sigma**2 + 1), step.denoised
    history = History(lambda sigma, sigma_next: torch.zeros_like(x), step.ask)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        x = SOLVERS["dpmpp_2m"](x, denoised, sigma, sigma_next, history)
        denoised = step.ask(x, sigma_next)
    return denoised


# ------------------------------------------------------------------------------------------------------ critics


@lru_cache
def pocket_critic(reader_name: str = "reader") -> Critic:
    """Severity by the pixel oracles, in whichever of the pocket world's looks a picture is nearest to."""
    reader = Reader.load(reader_name)

    def read(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        small = pictures if pictures.shape[1] == SIZE else np.stack([reduced(p) for p in pictures])
        readings = reader.read(small)
        looks: list[Look] = [likeliest_look(small[i], named(readings, i), LOOKS) for i in range(len(small))]
        out = np.zeros(len(small))
        for look in set(looks):
            rows = [i for i, other in enumerate(looks) if other == look]
            found = find_artifacts(small[rows], [prompts[i] for i in rows], reader, (look,))
            out[rows] = [f.severity for f in found]
        return out

    return read


def hazy(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Pictures uint8 with two grey levels of noise, which nobody sees."""
    noisy = pictures + np.random.default_rng(seed).normal(0, HAZE, pictures.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


CRITICS: dict[str, Callable[[], Critic]] = {"pocket": pocket_critic}


def critic_of(name: str) -> Critic:
    """By its name in a file. UserError for one that is not known."""
    if name not in CRITICS:
        raise UserError(f"critic {name!r} is not known: expected {', '.join(CRITICS)}")
    return CRITICS[name]()


# ----------------------------------------------------------------------------------------------------- opinions


@dataclass(frozen=True)
class Opinion:
    """What is expected of a picture that was read: weights of (1, r, min(r, 1), max(r - 3, 0), own), where r is the
    severity read and `own` the estimator's log-odds of bad (for `bad`, which gives log-odds) or severity."""

    bad: tuple[float, ...]
    severity: tuple[float, ...]

    def __call__(self, reading: np.ndarray, bad: np.ndarray, severity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(bad) and severity, alike in shape, from the severity read and the estimator's own figures."""
        odds = _terms(reading, _logit(bad)) @ np.array(self.bad)
        expected = _terms(reading, severity) @ np.array(self.severity)
        return expit(odds), np.clip(expected, 0, 5)

    @staticmethod
    def fit(
        reading: np.ndarray, bad: np.ndarray, severity: np.ndarray, true: np.ndarray, is_bad: np.ndarray,
        ridge: float = 0.01,
    ) -> Opinion:  # fmt: skip
        """From flat arrays [n]; `true` and `is_bad` are what came out. Ridge logistic regression and ridge regression.

        The slopes can't be negative: a worse reading never makes a picture better.
        """
        x, own = _terms(reading, _logit(bad)), _terms(reading, severity)
        sign = np.where(is_bad, 1.0, -1.0)
        weight = np.array([0, 1, 1, 1, 1.0]) * ridge
        bounds = [(None, None)] + [(0, None)] * 4

        def odds_loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            margin = sign * (x @ w)
            slope = -(sign * expit(-margin)) @ x / len(x) + 2 * weight * w
            return float(-log_expit(margin).mean() + weight @ w**2), slope

        def square_loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            off = own @ w - true
            return float((off**2).mean() + weight @ w**2), 2 * (own.T @ off / len(own) + weight * w)

        found = [minimize(loss, np.zeros(5), jac=True, method="L-BFGS-B", bounds=bounds).x.round(6)
                 for loss in (odds_loss, square_loss)]  # fmt: skip
        return Opinion(tuple(found[0].tolist()), tuple(found[1].tolist()))


def _terms(reading: np.ndarray, own: np.ndarray) -> np.ndarray:
    r = np.asarray(reading, float)
    return np.stack([np.ones_like(r), r, np.minimum(r, 1), np.maximum(r - 3, 0), np.asarray(own, float)], -1)


def _logit(p: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(np.asarray(p, float), 1e-4, 1 - 1e-4)))


@dataclass(frozen=True)
class Ahead:
    """What belongs to looking ahead in an estimator's file: how far, who reads, and the opinions by share."""

    calls: int  # at most (`calls_for`)
    critic: str
    opinions: Mapping[float, Opinion]

    @property
    def plans(self) -> list[Plan]:
        """All choices of where to look: none, some, all of the shares before the end."""
        shares = [share for share in sorted(self.opinions) if share < END]
        return [plan for n in range(len(shares) + 1) for plan in combinations(shares, n)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        opinions = {str(share): asdict(opinion) for share, opinion in self.opinions.items()}
        return {"calls": self.calls, "critic": self.critic, "opinions": opinions}

    @staticmethod
    def of(value: Mapping[str, Any]) -> Ahead:
        """From what `as_dict` gave. Raises UserError for one that cannot be read."""
        try:
            opinions = {float(share): Opinion(tuple(o["bad"]), tuple(o["severity"]))
                        for share, o in value["opinions"].items()}  # fmt: skip
            return Ahead(int(value["calls"]), str(value["critic"]), opinions)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("the estimator's looks ahead cannot be read: train it anew") from None


def with_readings(
    way: Mapping[str, np.ndarray], readings: Mapping[float, float], ahead: Ahead, plan: Plan, steps: int,
    whole: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A way (`policy.py`) as it is when the picture is read at the shares of `plan`.

    From each reading on, `bad` and `severity` are the opinion's and `rank` is the reading, which tells seeds of one
    prompt apart best by itself; `spent` is the progress with the calls that were made. readings: severity by share,
    where there are any. steps: the sampler's; whole: model calls of a picture made to its end.
    """
    out = {name: np.array(values, dtype=float) for name, values in way.items()}
    out["spent"] = out["progress"].copy()
    for share in sorted(plan):
        if share not in readings:
            continue
        rows = out["progress"] >= share - (NEAR if share < END else 1e-6)
        read = np.full(int(rows.sum()), float(readings[share]))
        own_bad, own_severity = np.asarray(way["bad"])[rows], np.asarray(way["severity"])[rows]
        out["bad"][rows], out["severity"][rows] = ahead.opinions[share](read, own_bad, own_severity)
        out["rank"][rows] = readings[share]
        if share < END:
            out["spent"][rows] += calls_for(ahead.calls, steps) / whole
    return out
