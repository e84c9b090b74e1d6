"""When to give a picture up: rules over the estimates of its denoising steps, with a bound on good pictures lost.

A way is what the estimator said of one picture: `bad` (P(severity >= 3)), `severity`, `exit` (lambda), `hazard`,
`progress`, and `spent` (progress with looks ahead, if there are any), each [k], one entry a step. A rule looks at a way
up to some step and says where, if anywhere, it is given up. Four kinds are chosen among (the fifth, `Looks`, is a
search's: `search.py`):

- **fixed**: at one share of the steps, where P(bad) > theta.
- **exit** (PALBERT, arXiv 2204.03276): CDF_k = 1 - prod_{j<=k} (1 - lambda_j). At the first k with CDF_k >= q the
  answer counts as ready: P(bad) > theta gives the picture up, else it is kept for good.
- **hazard**: h_k is the chance of giving up at k if not before; given up at the first k with 1 - prod (1 - h_j) >
  theta. (Adding up the P(bad) of all steps would count one piece of evidence again and again, and pass 1.)
- **induction**: a threshold for each share of the steps, by backward induction: given up where going on is expected to
  cost more evaluations until an acceptable picture than a fresh seed, plus a price for losing a good one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from dodgeburn.errors import UserError

Way = Mapping[str, np.ndarray]
GRID = 20  # shares of the steps at which backward induction has thresholds
BINS = 12  # of P(bad), in backward induction
NEAR = 0.04  # looks fall on whole steps, so up to this much before a share
EARLIEST = 0.1  # share of the steps before which no rule gives up


# ------------------------------------------------------------------------------------------- exit distributions


def exit_distribution(leave: Tensor, there: Tensor) -> Tensor:
    """p_k = lambda_k prod_{j<k} (1 - lambda_j) of lambda [b, k] (PonderNet, eq. 2); the last moment takes the rest,
    those that are not `there` nothing. Rows sum to 1."""
    last = there & ~torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1)
    leave = torch.where(last, torch.ones_like(leave), leave) * there
    stayed = torch.cumprod(1 - leave, 1)
    before = torch.cat([torch.ones_like(stayed[:, :1]), stayed[:, :-1]], 1)
    return leave * before


def geometric_prior(there: Tensor, share: float) -> Tensor:
    """Geometric distribution of parameter `share` over the moments that are `there`; the last takes the rest."""
    return exit_distribution(torch.full(there.shape, share), there)


# ------------------------------------------------------------------------------------------------------- rules


class Policy(Protocol):
    """A rule. `first(way)`: index at which the way is given up, or None; looking at its beginning only says what is
    decided by then, so a way can be handed in step by step."""

    def first(self, way: Way) -> int | None: ...


@dataclass(frozen=True)
class Never:
    """Gives nothing up."""

    kind: str = "never"

    def first(self, way: Way) -> int | None:
        return None


@dataclass(frozen=True)
class Fixed:
    """At the first step from share `at` of the way on: P(bad) > theta."""

    at: float
    theta: float
    kind: str = "fixed"

    def first(self, way: Way) -> int | None:
        ready = np.flatnonzero(way["progress"] >= self.at - 1e-6)
        return int(ready[0]) if len(ready) and way["bad"][ready[0]] > self.theta else None


@dataclass(frozen=True)
class Exit:
    """PALBERT's cumulative exit with threshold q, then P(bad) > theta."""

    q: float
    theta: float
    kind: str = "exit"

    def first(self, way: Way) -> int | None:
        cumulative = 1 - np.cumprod(1 - way["exit"])
        ready = np.flatnonzero((cumulative >= self.q) & (way["progress"] >= EARLIEST))
        return int(ready[0]) if len(ready) and way["bad"][ready[0]] > self.theta else None


@dataclass(frozen=True)
class Hazard:
    """1 - prod (1 - h_j) > theta."""

    theta: float
    kind: str = "hazard"

    def first(self, way: Way) -> int | None:
        cumulative = 1 - np.cumprod(1 - way["hazard"])
        out = np.flatnonzero((cumulative > self.theta) & (way["progress"] >= EARLIEST))
        return int(out[0]) if len(out) else None


@dataclass(frozen=True)
class Induction:
    """P(bad) above the threshold of its share of the way: `thetas[g]` counts from (g + 1) / len(thetas) on."""

    thetas: tuple[float, ...]
    price: float = 0.0  # of a good picture lost, in whole pictures' evaluations
    kind: str = "induction"

    def first(self, way: Way) -> int | None:
        n = len(self.thetas)
        place = np.clip(np.ceil(way["progress"] * n - 1e-6).astype(int) - 1, 0, n - 1)
        out = np.flatnonzero((way["bad"] > np.asarray(self.thetas)[place]) & (way["progress"] >= EARLIEST))
        return int(out[0]) if len(out) else None


@dataclass(frozen=True)
class Looks:
    """At the first moments from some shares of the way on: expected severity > theta, ((share, theta), ...)."""

    looks: tuple[tuple[float, float], ...]
    kind: str = "looks"

    def first(self, way: Way) -> int | None:
        for share, theta in sorted(self.looks):
            ready = np.flatnonzero(way["progress"] >= share - NEAR)
            if len(ready) and way["severity"][ready[0]] > theta:
                return int(ready[0])
        return None


KINDS: dict[str, Callable[..., Policy]] = {
    "never": Never, "fixed": Fixed, "exit": Exit, "hazard": Hazard, "induction": Induction,
}  # fmt: skip


def policy_of(value: Mapping[str, Any]) -> Policy:
    """From what `asdict` gave. UserError for a kind that is not known."""
    found = dict(value)
    kind = found.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"rule {kind!r} is not known: expected {', '.join(KINDS)}")
    return KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


# --------------------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Outcome:
    """What a rule does to labelled pictures.

    saved: share of all U-Net evaluations not made. good_rejected, bad_rejected: shares of the good and bad pictures
    given up. bound: upper confidence bound of good_rejected (Clopper and Pearson 1934, one-sided). per_good:
    evaluations spent for each good picture that comes out, in whole pictures (1 / share of good ones without a rule).
    """

    saved: float
    good_rejected: float
    bad_rejected: float
    bound: float
    per_good: float
    bad_delivered: float  # share of bad ones among the pictures that come out


def upper_bound(successes: float, n: float, level: float = 0.95) -> float:
    """One-sided upper bound of a share (Clopper and Pearson); 1 for no trials."""
    return 1.0 if n == 0 or successes >= n else float(beta.ppf(level, successes + 1, n - successes))


def clustered_bound(hit: np.ndarray, groups: np.ndarray, level: float = 0.95) -> float:
    """`upper_bound` of the share of `hit` (bool [n]) where members of a group are alike: with as many trials as they
    are worth (Korn and Graubard 1998: n over the design effect, which is estimated from the groups' totals)."""
    n, k = len(hit), int(hit.sum())
    if k in (0, n):
        return upper_bound(k, n, level)
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    share = k / n
    off = np.bincount(member, hit, count) - share * np.bincount(member, minlength=count)
    variance = count / max(1, count - 1) * float(off @ off) / n**2
    effect = max(1.0, variance / (share * (1 - share) / n))
    return upper_bound(k / effect, n / effect, level)


def outcome(
    policy: Policy, ways: Sequence[Way], bad: np.ndarray, level: float = 0.95, groups: np.ndarray | None = None
) -> Outcome:
    """Run a rule over whole ways with known ends. groups [n]: whose pictures are alike (a prompt's); none: nobody's."""
    bad = np.asarray(bad, bool)
    stops = [policy.first(way) for way in ways]
    spent = np.array([_spent(way, s) for s, way in zip(stops, ways, strict=True)])
    out = np.array([s is not None for s in stops])
    lost, good = int((out & ~bad).sum()), int((~bad).sum())
    delivered = int((~out & ~bad).sum())
    return Outcome(
        saved=float(1 - spent.mean()),
        good_rejected=lost / good if good else float("nan"),
        bad_rejected=float(out[bad].mean()) if bad.any() else float("nan"),
        bound=upper_bound(lost, good, level) if groups is None else clustered_bound(out[~bad], groups[~bad], level),
        per_good=float(spent.sum() / delivered) if delivered else float("inf"),
        bad_delivered=float(bad[~out].mean()) if (~out).any() else float("nan"),
    )


def _spent(way: Way, stop: int | None) -> float:
    """Evaluations until there, in whole pictures; `spent` has those of looks ahead in it."""
    made = way.get("spent", way["progress"])
    return float(made[stop]) if stop is not None else float(made[-1]) if "spent" in way else 1.0


# --------------------------------------------------------------------------------------------------- choosing


def strictest_last(
    family: Sequence[Policy], ways: Sequence[Way], bad: np.ndarray, limit: float, level: float,
    groups: np.ndarray | None = None,
) -> Policy:  # fmt: skip
    """The last rule of a family, ordered from cautious to bold, before the bound on good pictures lost passes `limit`.

    Going from cautious to bold and ending at the first failure keeps the level for all of them together (fixed-sequence
    testing), which picking the best of all that pass would not.
    """
    chosen: Policy = Never()
    for policy in family:
        if outcome(policy, ways, bad, level, groups).bound > limit:
            break
        chosen = policy
    return chosen


def families(ways: Sequence[Way], bad: np.ndarray) -> dict[str, list[Policy]]:
    """Rules of each kind from cautious to bold."""
    thetas = (1 - np.geomspace(0.01, 0.7, 48)).tolist()
    found: dict[str, list[Policy]] = {
        f"fixed {at:.0%}": [Fixed(at, t) for t in thetas] for at in (0.25, 0.35, 0.5, 0.65)
    }
    found |= {f"exit q={q:g}": [Exit(q, t) for t in thetas] for q in (0.5, 0.8)}
    found["hazard"] = [Hazard(t) for t in thetas]
    found["induction"] = [backward_induction(ways, bad, price) for price in np.geomspace(300, 0.5, 40).tolist()]
    return found


def choose(
    ways: Sequence[Way], bad: np.ndarray, limit: float = 0.05, level: float = 0.95, groups: np.ndarray | None = None
) -> tuple[str, Policy, dict[str, tuple[Policy, Outcome]]]:
    """The rule that makes a good picture cheapest among the boldest permitted ones of each kind: (name, rule, all).

    limit: of the upper bound (at `level`) on the share of good pictures given up. groups: see `outcome`. Choose on
    calibration data only.
    """
    found = {}
    for name, family in families(ways, bad).items():
        policy = strictest_last(family, ways, bad, limit, level, groups)
        found[name] = (policy, outcome(policy, ways, bad, level, groups))
    best = min(found, key=lambda name: found[name][1].per_good)
    return best, found[best][0], found


def backward_induction(ways: Sequence[Way], bad: np.ndarray, price: float) -> Induction:
    """Thresholds that minimise the evaluations spent until a good picture comes out, plus `price` for each good one
    lost.

    Ways are put on a grid of shares of the steps, P(bad) into bins of equal mass; transitions are counted. V at the end
    is P(bad) C: a bad picture means starting anew, at the cost C of a good picture from a fresh seed, which is itself
    the value at the beginning: found by iteration.
    """
    bad = np.asarray(bad, float)
    grid = np.stack([on_grid(way["bad"], way["progress"]) for way in ways])  # [n, GRID]
    edges = np.unique(np.quantile(grid, np.linspace(0, 1, BINS + 1)[1:-1]))
    place = np.searchsorted(edges, grid, side="right")  # [n, GRID] in 0..bins-1
    bins = len(edges) + 1
    # Bad rate by bin and moment, shrunk to P(bad) itself where a bin holds few pictures.
    rate = np.zeros((GRID, bins))
    moves = np.zeros((GRID - 1, bins, bins))
    for g in range(GRID):
        for b in range(bins):
            rows = place[:, g] == b
            own = grid[rows, g].mean() if rows.any() else (edges[min(b, len(edges) - 1)] if len(edges) else bad.mean())
            rate[g, b] = (bad[rows].sum() + 4 * own) / (rows.sum() + 4)
            if g < GRID - 1:
                counts = np.bincount(place[rows, g + 1], minlength=bins) + 1e-9
                moves[g, b] = counts / counts.sum() if rows.any() else np.eye(bins)[b]
    fresh = 1 / max(1 - bad.mean(), 1e-3)
    gives_up = np.zeros((GRID, bins), bool)
    for _ in range(200):
        value = rate[-1] * fresh
        for g in range(GRID - 2, -1, -1):
            on = 1 / GRID + moves[g] @ value
            out = fresh + price * (1 - rate[g])
            gives_up[g] = (out < on) & ((g + 1) / GRID >= EARLIEST)
            value = np.where(gives_up[g], out, on)
        shares = np.bincount(place[:, 0], minlength=bins) / len(place)
        again = float(1 / GRID + shares @ value)
        if abs(again - fresh) < 1e-6:
            break
        fresh = again
    thetas = []
    for g in range(GRID):
        kept = np.flatnonzero(~gives_up[g])
        top = int(kept[-1]) if len(kept) else -1  # all bins above the last one that goes on
        thetas.append(1.0 if top == bins - 1 else float(edges[top]) if top >= 0 else 0.0)
    return Induction(tuple(thetas), price)


def on_grid(values: np.ndarray, progress: np.ndarray, points: int = GRID, near: float = 1e-6) -> np.ndarray:
    """Values at shares 1/points, 2/points ... 1 of the way: the last known there, the first before that. near: by how
    much a moment may lie after a share and still count as there (a quarter of 15 steps is 4 of them)."""
    at = np.searchsorted(progress, (np.arange(points) + 1) / points + near, side="right") - 1
    return np.asarray(values)[np.maximum(at, 0)]


def described(policy: Policy) -> dict[str, Any]:
    """A rule as JSON has it."""
    return asdict(policy)  # type: ignore[call-overload]
