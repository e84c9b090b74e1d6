"""Rules for giving up, funnels and searches: chosen on prompts that were kept aside, graded on others.

Everything here is about one estimator's file: what it records of looking ahead (`ahead.py`), the rule (`policy.py`),
and for the best of several seeds the cheaper one of a funnel (`savings.py`) and a search (`search.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.foresee import savings, scores, search
from dodgeburn.foresee.ahead import END, Ahead, Opinion
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.evaluate import Judgements, judge, readings_of, rounded
from dodgeburn.foresee.feed import Where, check_labels
from dodgeburn.foresee.policy import NEAR, Outcome, choose, described, outcome, policy_of
from dodgeburn.foresee.shards import Store
from dodgeburn.foresee.train import FitSettings, parts_of, usable
from dodgeburn.measure.intervals import Interval

RULES_ONLY = FitSettings(calibration_share=0.4, choice_share=0.6)
"""How prompts are divided where no network is trained on any of them."""
TARGETS = (2, 4, 8)  # best of so many complete pictures, for which funnels are chosen


def choose_rules(estimator: Estimator, store: Store, settings: FitSettings, limit: float = 0.05) -> dict[str, Any]:
    """Fit the opinions on looks ahead (if there are any) on the prompts of the calibration, choose the rule, the
    funnels and the searches on those that were kept aside for it, and put all into the estimator's record. Returns what
    each kind of rule did there, under the plan that was chosen. Raises UserError where labels teach nothing.
    """
    place = parts_of(store, settings)

    def of(part: str) -> Judgements:
        where: Where = lambda r: usable(r, settings) and place.get(r.prompt_id) == part  # noqa: E731
        return judge(estimator, store, where, ())

    for key in ("ahead", "ahead_policy"):
        estimator.record.pop(key, None)
    opinion, found = of("calibration"), of("choice")
    where = ", ".join(map(str, store.folders))
    check_labels(found.records, f"{where} ({len(found.records)} trajectories to choose rules on)", 8)
    if any("ahead" in r.extra for r in opinion.records):
        check_labels(opinion.records, f"{where} ({len(opinion.records)} trajectories to learn from looks ahead)", 8)
    ahead = fit_opinions(opinion)
    if ahead is not None:
        estimator.record["ahead"] = ahead.as_dict()
    under = {plan: found.reading(ahead, plan) for plan in ahead.plans} if ahead else {(): found}
    chosen = {plan: choose(f.ways, f.is_bad, limit, groups=f.prompt) for plan, f in under.items()}
    plan = min(chosen, key=lambda p: chosen[p][2][chosen[p][0]][1].per_good)
    name, policy, every = chosen[plan]
    estimator.record |= {"policy": described(policy), "policy_plan": list(plan), "policy_limit": limit}
    if ahead is not None:
        # What finds most of the bad ones, whatever its looks cost: for those to whom a bad picture costs more.
        every_rule = [(o.bad_rejected, p, rule) for p, (_, _, all_) in chosen.items() if p for rule, o in all_.values()]
        _, looking, keen = max(every_rule, key=lambda item: item[0])
        estimator.record["ahead_policy"] = {"policy": described(keen), "policy_plan": list(looking)}
    _choose_numbers(estimator, found)
    rules = {kind: {"rule": described(p), **_outcome(o)} for kind, (p, o) in every.items()}
    return {"chosen": name, "plan": list(plan), "pictures": len(found.ways), "rules": rules}


def _choose_numbers(estimator: Estimator, found: Judgements) -> None:
    """Funnels and searches for the quality of the best of 2, 4 and 8, and for 90 % of what the best of 8 gains."""
    estimator.record |= {"funnels": {}, "searches": {}}
    slots = found.slots()
    if slots is None:
        return
    n = slots.severity.shape[1]
    curve = savings.best_of(slots)
    wanted = {str(target): curve[:, target - 1] for target in TARGETS if target <= n}
    if n >= 8:
        wanted["90_of_8"] = curve[:, 0] - 0.9 * (curve[:, 0] - curve[:, 7])
    seeds = seeds_under(estimator, found)
    for key, quality in wanted.items():
        funnel = savings.cheapest(slots, quality, n)
        one_by_one = search.cheapest(seeds, quality, slots.prompt, n)
        if one_by_one is not None and one_by_one[1] < funnel.price:
            plain = search.cheapest(seeds, quality, slots.prompt, n, with_looks=False)
            prices = {"price": one_by_one[1], "price_without_looks": plain[1] if plain else None}
            estimator.record["searches"][key] = {**one_by_one[0].as_dict(), **rounded(prices)}
        estimator.record["funnels"][key] = _plain(funnel)


def seeds_under(estimator: Estimator, found: Judgements) -> list[search.Seeds]:
    """Pictures in slots, as each plan of looking sees them, which all read the finished ones. `found` without
    readings."""
    ahead = estimator.ahead
    out = []
    for plan in ahead.plans if ahead else [()]:
        seen = found.reading(ahead, (*plan, END)) if ahead else found
        ways = [{**way, "spent": way.get("spent", way["progress"])} for way in seen.ways]
        members = savings.members_of(found.slot.tolist())
        out.append(search.seeds_of(ways, found.true, members, (*plan, END) if ahead else ()))
    return out


def fit_opinions(found: Judgements) -> Ahead | None:
    """Opinions for each share that was read, from judgements without readings; None if nothing was."""
    calls = {r.extra["ahead"]["calls"] for r in found.records if "ahead" in r.extra}
    if not calls:
        return None
    if len(calls) > 1:
        raise UserError(f"looks ahead of {min(calls)} and of {max(calls)} calls in one store: collect them alike")
    number = int(calls.pop())
    rows: dict[float, list[tuple[float, ...]]] = {}
    for way, record in zip(found.ways, found.records, strict=True):
        assert record.label is not None
        for share, severity in readings_of(record, number).items():
            from_there = np.flatnonzero(way["progress"] >= share - (NEAR if share < END else 1e-6))
            rows.setdefault(share, []).extend(
                (severity, way["bad"][i], way["severity"][i], record.label.severity, record.label.bad)
                for i in from_there
            )
    return Ahead(number, "pocket", {share: Opinion.fit(*np.array(rows[share], float).T) for share in sorted(rows)})


def _plain(funnel: savings.Funnel) -> dict[str, Any]:
    """As JSON has it."""
    return {"begin": funnel.begin, "stages": [list(stage) for stage in funnel.stages]}


def _outcome(o: Outcome) -> dict[str, float]:
    return {k: round(v, 4) for k, v in vars(o).items()}


def saved(estimator: Estimator, found: Judgements, resamples: int = 300) -> dict[str, Any]:
    """Savings of the estimator's rule, funnels and searches, as they were chosen on other prompts. `found` without
    readings (`judge(..., plan=())`).

    saved_best_of_N: against as many complete pictures as reach the same quality here. saved_best_of_8_at_90: against
    running all 8, with the share of the gain that was reached.
    """
    out: dict[str, Any] = {}
    out["rule"], out["good_rejected"] = _rule(estimator, found, estimator.record, resamples)
    if "ahead_policy" in estimator.record:
        out["rule_ahead"], out["good_rejected_ahead"] = _rule(
            estimator, found, estimator.record["ahead_policy"], resamples
        )
    slots = found.slots()
    if slots is None:
        return out
    whole_ones = savings.best_of(slots)
    out["best_of"] = [round(float(v), 4) for v in whole_ones.mean(0)]
    for key, value in estimator.record.get("funnels", {}).items():
        name, reached, price = _reached(estimator, found, slots, key, value)
        if reached is None:
            continue

        def share(rows: np.ndarray, reached: np.ndarray = reached, price: np.ndarray = price) -> float:
            equal = savings.equal_price(float(reached[rows].mean()), whole_ones[rows].mean(0))
            return 1 - float(price[rows].mean()) / equal

        cost, quality = float(price.mean()), float(reached.mean())
        if key == "90_of_8":
            out["saved_best_of_8_at_90"] = 1 - cost / 8

            def kept(rows: np.ndarray, reached: np.ndarray = reached) -> float:
                return savings.gain(float(reached[rows].mean()), whole_ones[rows].mean(0), 8)

            out["gain_of_8"] = scores.over_prompts(kept, slots.prompt, resamples)
            continue
        out[f"saved_best_of_{key}"] = scores.over_prompts(share, slots.prompt, resamples)
        out[f"saved_best_of_{key}_detail"] = {
            **name, "price": round(cost, 3), "severity": round(quality, 4),
            "equals_best_of": round(savings.equal_price(quality, whole_ones.mean(0)), 3),
        }  # fmt: skip
    return out


def _rule(
    estimator: Estimator, found: Judgements, record: dict[str, Any], resamples: int
) -> tuple[dict[str, Any], Interval]:  # fmt: skip
    """What a rule of a record does, and the share of good pictures that it gives up with its interval over prompts."""
    policy, plan = policy_of(record.get("policy", {"kind": "never"})), tuple(record.get("policy_plan", ()))
    seen = found.reading(estimator.ahead, plan) if estimator.ahead else found
    good = scores.over_prompts(
        lambda rows: outcome(policy, [seen.ways[i] for i in rows], seen.is_bad[rows]).good_rejected, seen.prompt,
        min(resamples, 100),
    )  # fmt: skip
    said = {"kind": policy.kind, "plan": list(plan)}  # type: ignore[attr-defined]
    return {**said, **_outcome(outcome(policy, seen.ways, seen.is_bad))}, good


def _reached(
    estimator: Estimator, found: Judgements, slots: savings.Slots, key: str, funnel_value: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray]:
    """What is done for a number of pictures, the true severity it reaches in each slot, and its price there."""
    value = estimator.record.get("searches", {}).get(key)
    if value is not None:
        wanted = search.Search.of(value)
        seeds = next(s for s in seeds_under(estimator, found) if s.plan == wanted.plan)
        result = search.run(wanted, seeds)
        said = {"search": value, "severity_handed_out": round(float(result.chosen.mean()), 4)}
        return said, result.severity, result.price
    funnel = savings.Funnel(funnel_value["begin"], tuple((s, k) for s, k in funnel_value["stages"]))
    n = slots.severity.shape
    reached = savings.run(funnel, slots) if funnel.begin <= n[1] else None
    return {"funnel": funnel_value}, reached, np.full(n[0], funnel.price)
