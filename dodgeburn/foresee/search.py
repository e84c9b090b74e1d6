"""Seeds one after another until a picture is good: what it costs, and how good the picture is.

A funnel (`savings.py`) begins all its seeds at once and compares them; a search begins one, gives it up on the way if
it looks bad, and ends with the first finished picture that is good enough. Half of a sound model's pictures have no
flaw, so most searches are short. Prices are in whole pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from dodgeburn.foresee.ahead import SHARES, Plan
from dodgeburn.foresee.confirm import surely_cheapest
from dodgeburn.foresee.policy import NEAR, Looks, Way

STRICT = (0.5, 0.65, 0.8, 0.9)  # shares of the pictures that a look lets through, in what is tried
STOPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the finished pictures that end a search


@dataclass(frozen=True)
class Search:
    """Up to `rounds` seeds. looks: (share, severity): at that share a seed of which more is expected is given up. stop:
    a finished picture of which at most this severity is expected ends the search. plan: shares at which pictures are
    read (`ahead.py`)."""

    rounds: int
    looks: tuple[tuple[float, float], ...] = ()
    stop: float = 0.0
    plan: Plan = ()

    @property
    def policy(self) -> Looks:
        """Its looks as a rule."""
        return Looks(self.looks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "looks": [list(look) for look in self.looks], "plan": list(self.plan)}

    @staticmethod
    def of(value: Mapping[str, Any]) -> Search:
        """From what `as_dict` gave."""
        looks = tuple((float(share), float(theta)) for share, theta in value["looks"])
        return Search(int(value["rounds"]), looks, float(value["stop"]), tuple(map(float, value["plan"])))


@dataclass
class Seeds:
    """Pictures of one prompt and settings, n a slot, as some plan sees them; arrays [slots, n]."""

    expected: Mapping[float, np.ndarray]  # severity expected at each of SHARES
    spent: Mapping[float, np.ndarray]  # price until there
    end: np.ndarray  # severity expected of the finished picture
    whole: np.ndarray  # price of a picture made to its end
    severity: np.ndarray  # true
    plan: Plan = ()


class Result(NamedTuple):
    """By slot [slots], means over the orders in which its seeds come."""

    severity: np.ndarray  # true one of the best finished picture: the user's eye chooses, as in `savings.py`
    price: np.ndarray
    chosen: np.ndarray  # true severity of the one that is handed out: the least severe by its estimate


def seeds_of(ways: Sequence[Way], severity: np.ndarray, members: np.ndarray, plan: Plan) -> Seeds:
    """From ways with `severity` and `spent`; members: their indices [slots, n]."""

    def at(share: float) -> tuple[np.ndarray, np.ndarray]:
        rows = [int(np.flatnonzero(way["progress"] >= share - NEAR)[0]) for way in ways]
        return (np.array([w["severity"][i] for w, i in zip(ways, rows, strict=True)])[members],
                np.array([w["spent"][i] for w, i in zip(ways, rows, strict=True)])[members])  # fmt: skip

    seen = {share: at(share) for share in SHARES}
    end = np.array([way["severity"][-1] for way in ways])[members]
    whole = np.array([way["spent"][-1] for way in ways])[members]
    return Seeds({s: v[0] for s, v in seen.items()}, {s: v[1] for s, v in seen.items()}, end, whole,
                 severity[members], plan)  # fmt: skip


def run(search: Search, seeds: Seeds, draws: int = 12, seed: int = 0) -> Result:
    """A search on each slot, over random orders of its seeds. Where all were given up, the last one is finished."""
    rng = np.random.default_rng(seed)
    slots, n = seeds.severity.shape
    rounds = min(search.rounds, n)
    severity, price, chosen = np.zeros(slots), np.zeros(slots), np.zeros(slots)
    for _ in range(draws):
        order = rng.permuted(np.tile(np.arange(n), (slots, 1)), axis=1)[:, :rounds]
        best, finished, handed = np.full(slots, math.inf), np.full(slots, math.inf), np.zeros(slots)
        for k in range(rounds):
            rows = np.flatnonzero(best > search.stop)
            at = (rows, order[rows, k])
            out, cost = np.zeros(len(rows), bool), seeds.whole[at].copy()
            spare = (k == rounds - 1) & np.isinf(best[rows])
            for share, theta in search.looks:
                now = ~out & ~spare & (seeds.expected[share][at] > theta)
                cost[now] = seeds.spent[share][at][now]
                out |= now
            price[rows] += cost
            made, end, true = rows[~out], seeds.end[at][~out], seeds.severity[at][~out]
            handed[made] = np.where(end < best[made], true, handed[made])
            best[made], finished[made] = np.minimum(best[made], end), np.minimum(finished[made], true)
        severity, chosen = severity + finished, chosen + handed
    return Result(severity / draws, price / draws, chosen / draws)


def searches(seeds: Seeds, most: int) -> list[Search]:
    """Searches of up to `most` seeds under the seeds' plan: looks at none, one or both of SHARES."""
    stops = [float(np.quantile(seeds.end, q)) for q in STOPS]
    cuts = {share: [float(np.quantile(seeds.expected[share], q)) for q in STRICT] for share in SHARES}
    looks: list[tuple[tuple[float, float], ...]] = [()]
    looks += [((share, cut),) for share in SHARES for cut in cuts[share]]
    looks += [tuple(zip(SHARES, both, strict=True)) for both in product(*(cuts[share] for share in SHARES))]
    # What is read must serve a decision.
    wanted = [chosen for chosen in looks if set(seeds.plan) & set(SHARES) <= {share for share, _ in chosen}]
    return [Search(rounds, chosen, stop, seeds.plan)
            for rounds in range(2, most + 1) for chosen in wanted for stop in sorted(set(stops))]  # fmt: skip


def cheapest(
    choices: Sequence[Seeds], wanted: np.ndarray, prompt: np.ndarray, most: int, with_looks: bool = True
) -> tuple[Search, float] | None:  # fmt: skip
    """The cheapest search, under any of the plans, whose pictures are with 95 % confidence at least as good as `wanted`
    (true severity [slots]) in the mean, however many were tried (`confirm.py`), and its price; None if there is none.
    On prompts that nothing else learned from: `prompt` of each slot [slots]. with_looks: False: all seeds are finished,
    so that the difference is what foreseeing is worth."""
    ways = [
        (search, run(search, seeds))
        for seeds in choices for search in searches(seeds, most) if with_looks or not search.looks
    ]  # fmt: skip
    if not ways:
        return None
    price = np.array([found.price.mean() for _, found in ways])
    taken = surely_cheapest(price, np.array([found.severity for _, found in ways]) - wanted, prompt)
    return None if taken is None else (ways[taken][0], float(price[taken]))
