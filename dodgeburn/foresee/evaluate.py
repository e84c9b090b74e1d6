"""How good an estimator is, on trajectories it has not seen: figures by share of the steps, baselines.

"Within a prompt" means: of one prompt, one generator and the same settings, so that only the seed differs. Intervals
are over prompts (all pictures of a drawn prompt go together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.foresee import savings, scores
from dodgeburn.foresee.ahead import Ahead, Plan, with_readings
from dodgeburn.foresee.baselines import TRAINED, baseline_scores
from dodgeburn.foresee.estimator import Estimator, judge_all
from dodgeburn.foresee.feed import Where, whole
from dodgeburn.foresee.policy import GRID, NEAR, Way, on_grid
from dodgeburn.foresee.shards import Store, Trajectory, slot_of
from dodgeburn.foresee.train import FitSettings, parts_of, usable
from dodgeburn.measure.intervals import Interval
from dodgeburn.sampling.settings import TWO_CALLS


@dataclass
class Judgements:
    """n pictures with what was estimated at shares 1/GRID .. 1 of their steps."""

    records: list[Trajectory]
    ways: Sequence[Way]
    bad: np.ndarray  # [n, GRID] P(bad)
    rank: np.ndarray  # [n, GRID]
    severity: np.ndarray  # [n, GRID] expected
    true: np.ndarray  # [n] severity
    is_bad: np.ndarray  # bool [n]
    prompt: np.ndarray  # str [n]
    slot: np.ndarray  # str [n]: prompt, generator and settings

    def rows(self, keep: np.ndarray) -> Judgements:
        """Some of them (bool or indices)."""
        index = np.arange(len(self.records))[keep]
        return Judgements(
            [self.records[i] for i in index], [self.ways[i] for i in index], self.bad[index], self.rank[index],
            self.severity[index], self.true[index], self.is_bad[index], self.prompt[index], self.slot[index],
        )  # fmt: skip

    def reading(self, ahead: Ahead, plan: Plan) -> Judgements:
        """The same where pictures are read at the shares of `plan`. Of judgements without readings only."""
        ways = [with_readings(way, readings_of(r, ahead.calls), ahead, plan, r.steps, calls_of(r))
                for way, r in zip(self.ways, self.records, strict=True)]  # fmt: skip
        return _gathered(ways, self.records)

    def slots(self, least: int = 4) -> savings.Slots | None:
        """As slots of equal size."""
        return savings.slots_of(self.rank, self.true, self.slot.tolist(), self.prompt.tolist(), least)


def judge(estimator: Estimator, store: Store, where: Where, plan: Plan | None = None) -> Judgements:
    """Run an estimator over the labelled trajectories that `where` lets through, reading pictures ahead at the shares
    of `plan` (none: wherever it can), as far as that was collected. UserError if there are no trajectories."""
    check_space(estimator, store)
    names = tuple(dict.fromkeys((*estimator.tensors, "progress")))
    rows, records = judge_all(estimator, whole(store, where, names))
    if not rows:
        labelled = sorted({r.split for r in store.records if r.label is not None})
        there = f"those that are labelled are marked {' and '.join(labelled)}" if labelled else "none is labelled"
        raise UserError(f"{', '.join(map(str, store.folders))}: no trajectories to evaluate on, {there} (`artifacts "
                        "evaluate --split` takes others, `artifacts collect --split test` marks them)")  # fmt: skip
    found = _gathered(rows, records)
    if estimator.ahead is None:
        return found
    return found.reading(estimator.ahead, estimator.ahead.plans[-1] if plan is None else plan)


def _gathered(ways: Sequence[Way], records: Sequence[Trajectory]) -> Judgements:
    grid = {n: np.stack([on_grid(w[n], w["progress"], near=NEAR) for w in ways]) for n in ("bad", "rank", "severity")}
    return Judgements(
        list(records), ways, grid["bad"], grid["rank"], grid["severity"],
        np.array([r.label.severity for r in records if r.label]), np.array([r.label.bad for r in records if r.label]),
        np.array([r.prompt_id for r in records]), np.array([slot_of(r) for r in records]),
    )  # fmt: skip


def readings_of(record: Trajectory, calls: int) -> dict[float, float]:
    """The severities read of a picture, by share; none if looks took another number of calls."""
    found = {k: v for k, v in record.extra.get("ahead", {}).items()}
    return {float(k): float(v) for k, v in found.items() if k != "calls"} if found.get("calls") == calls else {}


def calls_of(record: Trajectory) -> int:
    """Model calls of a picture made to its end (guided ones count once)."""
    return 2 * record.steps - 1 if record.sampler in TWO_CALLS else record.steps


def check_space(estimator: Estimator, store: Store) -> None:
    """UserError for trajectories of another kind of model than the estimator's."""
    if store.space != estimator.space:
        raise UserError(
            f"{', '.join(map(str, store.folders))}: trajectories of {store.space.model or 'another model'} with "
            f"{store.space.features} features, the estimator was trained on {estimator.space.model or 'another one'} "
            f"with {estimator.space.features}"
        )


def column(share: float) -> int:
    """Index in the grid of a share of the steps."""
    return max(0, round(share * GRID) - 1)


def figures(found: Judgements, resamples: int = 300) -> dict[str, Interval]:
    """Rank correlation, AUROC, calibration and spread at 25 and 50 % of the steps, with intervals over prompts."""
    out: dict[str, Interval] = {}
    for percent in (25, 50):
        g = column(percent / 100)
        by_slot = scores.spearman_by_prompt(found.rank[:, g], found.true, found.slot)
        out[f"srcc_{percent}"] = _over_slots(by_slot, found, resamples)
        for key, statistic in (
            ("auroc", lambda rows, g=g: scores.auroc(found.bad[rows, g], found.is_bad[rows])),
            ("auroc_within", lambda rows, g=g: scores.within_prompt_auroc(
                found.rank[rows, g], found.is_bad[rows], found.slot[rows])),
            ("ece", lambda rows, g=g: scores.calibration_error(found.bad[rows, g], found.is_bad[rows])),
            ("sd_ratio", lambda rows, g=g: scores.spread_ratio(found.severity[rows, g], found.true[rows])),
        ):  # fmt: skip
            out[f"{key}_{percent}"] = scores.over_prompts(statistic, found.prompt, resamples)
    return out


def _over_slots(values: np.ndarray, found: Judgements, resamples: int) -> Interval:
    """Mean over slots with its interval over prompts."""
    names = np.unique(found.slot)
    owner = {slot: prompt for slot, prompt in zip(found.slot, found.prompt, strict=True)}
    groups = np.array([owner[name] for name in names])
    return scores.over_prompts(lambda rows: _mean(values[rows]), groups, resamples)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def prices(found: Judgements) -> dict[str, float]:
    """Model calls made until 25 and 50 % of the steps, looks ahead among them, as a share of a picture's own."""
    spent = [on_grid(way.get("spent", way["progress"]), way["progress"], near=NEAR) for way in found.ways]
    return {str(p): float(np.mean([row[column(p / 100)] for row in spent])) for p in (25, 50)}


def curves(found: Judgements) -> dict[str, list[float]]:
    """The same by share of the steps, 5 % apart, without intervals."""
    g = range(GRID)
    return {
        "share": [(i + 1) / GRID for i in g],
        "srcc": [scores.within_prompt_spearman(found.rank[:, i], found.true, found.slot) for i in g],
        "auroc": [scores.auroc(found.bad[:, i], found.is_bad) for i in g],
        "auroc_within": [scores.within_prompt_auroc(found.rank[:, i], found.is_bad, found.slot) for i in g],
        "ece": [scores.calibration_error(found.bad[:, i], found.is_bad) for i in g],
        "sd_ratio": [scores.spread_ratio(found.severity[:, i], found.true) for i in g],
    }  # fmt: skip


def against_baselines(
    training: Store, store: Store, found: Judgements, settings: FitSettings, resamples: int = 200
) -> dict[str, Any]:
    """AUROC and rank correlation of each baseline at 25 and 50 % of the steps, and the least margin over the trained
    ones at 25 %. `training` is what they are fitted on (its "fit" part), `store` where `found` comes from."""
    place = parts_of(training, settings)
    fit, fit_scalars = moments(training, lambda r: usable(r, settings) and place.get(r.prompt_id) == "fit")
    ids = {(r.id, r.seed): i for i, r in enumerate(found.records)}
    new, new_scalars = moments(store, lambda r: (r.id, r.seed) in ids)
    order = np.array([ids[r.id, r.seed] for r in new])
    out: dict[str, Any] = {}
    margins: dict[str, Interval] = {}
    for percent in (25, 50):
        g = column(percent / 100)
        rivals = baseline_scores(fit, fit_scalars[:, g], new, new_scalars[:, g])
        for name, score in rivals.items():
            aligned = np.empty(len(order))
            aligned[order] = score
            row = out.setdefault(name, {})
            row[f"auroc_{percent}"] = round(scores.auroc(aligned, found.is_bad), 4)
            row[f"srcc_{percent}"] = round(scores.within_prompt_spearman(aligned, found.true, found.slot), 4)
            if percent == 25 and name in TRAINED:
                margins[name] = scores.over_prompts(_margin(found, g, aligned), found.prompt, resamples)
    least = min(margins.values(), key=lambda m: m.mean)
    return {"baselines": out, "margins": margins, "margin_25": least}


def _margin(found: Judgements, g: int, rival: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: (
        scores.auroc(found.bad[rows, g], found.is_bad[rows]) - scores.auroc(rival[rows], found.is_bad[rows])
    )


def moments(store: Store, where: Where) -> tuple[list[Trajectory], np.ndarray]:
    """Records and their scalars on the grid [n, GRID, m]."""
    records: list[Trajectory] = []
    rows: list[np.ndarray] = []
    for batch in whole(store, where, ("progress", "scalars")):
        for i, record in enumerate(batch.records):
            k = int(batch.there[i].sum())
            progress, scalars = batch.tensors["progress"][i, :k].numpy(), batch.tensors["scalars"][i, :k].numpy()
            rows.append(on_grid(scalars, progress, near=NEAR))
            records.append(record)
    return records, np.stack(rows) if rows else np.zeros((0, GRID, 0))


def rounded(value: Any) -> Any:
    """Intervals as {mean, low, high} and floats with 4 digits, for JSON; NaN becomes None."""
    if isinstance(value, Interval):
        return {"value": rounded(value.mean), "low": rounded(value.low), "high": rounded(value.high)}
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else round(float(value), 4)
    return value


def new_generators(found: Judgements, known: Sequence[str]) -> np.ndarray:
    """bool [n]: pictures of generators that the estimator was not trained on."""
    return np.array([r.generator not in known for r in found.records])
