"""A search for a good merge: Optuna proposes curves of shares, bases and methods; what it finds is graded on prompts
and seeds that had no say.

A curve has three numbers instead of one for every block. Each trial is merged into the live model and measured as a
comparison's variants are, on the comparison's prompts, by the reader. Then the best trials, the best variant that no
search made, A and B are drawn on held-out prompts and seeds, and there the judge decides. A trial's pictures are one
file. Run again, Optuna is told the same values in the same order and proposes the same, so nothing else is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dodgeburn.errors import UserError
from dodgeburn.measure.intervals import Interval, bootstrap_mean
from dodgeburn.measure.pareto import pareto_front
from dodgeburn.merge.compare_measure import Measurer
from dodgeburn.merge.compare_models import PARENTS
from dodgeburn.merge.compare_pictures import PictureMaker, Twins, about_merge
from dodgeburn.merge.compare_settings import CompareSettings, check_prompts, check_seeds
from dodgeburn.merge.ranking import Row
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.merge.variants import FOUND, MethodChoice, Variant, models_for

GOALS = ("fidelity", "resemblance_a", "resemblance_b")
HELD_OUT = "held-out"  # folder of the held-out pictures
TRIALS = "trials.jsonl"
STARTS = 10  # trials drawn at random before TPE models anything
POPULATION = 8  # of NSGA-II; fixed, so that more trials go on from fewer

# Range of each number, in steps of 0.01: level + tilt t + bump (1 - 2|t|), t from -1 at IN00 to 1 at the last OUT.
CURVE = {"level": (0.0, 1.0), "tilt": (-0.5, 0.5), "bump": (-0.5, 0.5)}
STEP = 0.01


class SearchSettings(BaseModel):
    """How to search. `prompts` and `seeds` are the held-out ones; `goals` are all made as large as possible; `picks` is
    how many trials, at most, are looked at on the held-out prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    trials: int = Field(ge=1)
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seed: int = 0
    by: Literal["tpe", "nsga2", "random"] = "tpe"
    goals: tuple[str, ...] = GOALS
    picks: int = Field(5, ge=1)

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> tuple[str, ...]:
        return check_prompts(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> tuple[int, ...]:
        return check_seeds(value)

    @field_validator("goals")
    @classmethod
    def _goals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for goal in value:
            if goal not in GOALS:
                raise UserError(f"no goal of a search is named {goal!r}: expected some of {', '.join(GOALS)}")
        if not value:
            raise UserError(f"a search without a goal: expected some of {', '.join(GOALS)}")
        return tuple(dict.fromkeys(value))

    def check_disjoint(self, settings: CompareSettings) -> None:
        """UserError if a held-out prompt or seed is one that the search sees."""
        both = [prompt for prompt in self.prompts if prompt in settings.prompts]
        if both:
            raise UserError(f"prompt {both[0]!r} is searched with and held out: held-out prompts must be others")
        shared = [seed for seed in self.seeds if seed in settings.seeds]
        if shared:
            raise UserError(f"seed {shared[0]} is searched with and held out: held-out seeds must be others")

    def job(self) -> dict[str, Any]:
        """What a folder must have been made with; more trials go on in the same one."""
        return self.model_dump(mode="json", exclude={"trials", "picks"})


@dataclass(frozen=True)
class Trial:
    """One proposal: its variant, the numbers that made it, and the goals it reached on the search's prompts."""

    variant: Variant
    params: dict[str, float | str]
    values: list[float]


@dataclass
class Graded:
    """One line of the final table: what a merge or parent showed in the search, and on the held-out prompts."""

    name: str
    role: Literal["A", "B", "best without search", "found"]
    variant: Variant | None
    search: Row
    held_out: Row
    params: Mapping[str, float | str]
    minus_best: Interval | None = None  # held-out fidelity less the best without search's, picture by picture
    proxy: bool = False  # whether fidelity is a score that says nothing across prompts

    @property
    def grade(self) -> Interval | None:
        """Held-out fidelity, the judge's where there is one."""
        return self.held_out.interval("fidelity_judge") or self.held_out.interval("fidelity")

    @property
    def excluded(self) -> bool:
        """Whether the held-out interval does not hold the value that the search saw; never said of a proxy's scores,
        which differ from prompt to prompt."""
        if self.proxy:
            return False
        seen, grade = self.search.mean("fidelity"), self.grade
        return seen is not None and grade is not None and not grade.low <= seen <= grade.high


@dataclass
class Search:
    """A finished search: its settings, all trials, and the lines A, B, best without search, and what was found, the
    best first by what the search saw.
    """

    settings: SearchSettings
    trials: list[Trial]
    graded: list[Graded]
    score: str | None = None  # what fidelity is called where it is a proxy's score and no share

    @property
    def proxy(self) -> bool:
        """Whether fidelity is a proxy's score."""
        return self.score is not None

    @property
    def found(self) -> Graded:
        """The merge that the search would have chosen, whatever became of it on held-out prompts."""
        return next(line for line in self.graded if line.role == "found")


# ---------------------------------------------------------------------------------------------------- proposing


def curve(level: float, tilt: float, bump: float, blocks: Sequence[str]) -> dict[str, float]:
    """B's share of each U-Net block, in 0..1 and rounded to 4 digits, so that a command can say it."""
    out = {}
    for i, block in enumerate(blocks):
        t = 2 * i / (len(blocks) - 1) - 1
        out[block] = round(min(1.0, max(0.0, level + tilt * t + bump * (1 - 2 * abs(t)))), 4)
    return out


class Proposer:
    """Optuna's study: asked for numbers, told what they reached. The same seed and values give the same numbers."""

    def __init__(self, settings: SearchSettings, methods: Sequence[MethodChoice]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = optuna.samplers
        sampler: optuna.samplers.BaseSampler
        if settings.by == "tpe":
            sampler = samplers.TPESampler(seed=settings.seed, n_startup_trials=STARTS)
        elif settings.by == "nsga2":
            sampler = samplers.NSGAIISampler(seed=settings.seed, population_size=POPULATION)
        else:
            sampler = samplers.RandomSampler(seed=settings.seed)
        self._methods = {str(method): method for method in methods}
        self._study = optuna.create_study(directions=["maximize"] * len(settings.goals), sampler=sampler)
        self._asked: Any = None

    def ask(self) -> dict[str, float | str]:
        """The next trial's numbers: the curve's, base, and the method if there are several."""
        self._asked = self._study.ask()
        ranges = {**CURVE, "base": (0.0, 1.0)}
        found: dict[str, float | str] = {
            name: round(self._asked.suggest_float(name, low, high, step=STEP), 2)
            for name, (low, high) in ranges.items()
        }
        if len(self._methods) > 1:
            found["method"] = self._asked.suggest_categorical("method", list(self._methods))
        return found

    def tell(self, values: Sequence[float]) -> None:
        """What the numbers asked for last reached, goal by goal."""
        self._study.tell(self._asked, list(values))

    def merge(self, params: Mapping[str, float | str], blocks: Sequence[str], keep: tuple[str, ...]) -> MergeSettings:
        """The merge that these numbers mean."""
        name = str(params.get("method", next(iter(self._methods))))
        shape = {key: float(params[key]) for key in CURVE}
        return MergeSettings.of(
            **self._methods[name].model_dump(), base=params["base"], blocks=curve(**shape, blocks=blocks), keep=keep
        )


# ---------------------------------------------------------------------------------------------------- searching


def run_search(
    settings: SearchSettings,
    compared: CompareSettings,
    measurer: Measurer,
    twins: Twins,
    more: Sequence[str] = (),
    base_model: str | None = None,
) -> tuple[list[Trial], list[Row]]:
    """Propose, draw and measure all trials, on the comparison's prompts; their rows."""
    proposer = Proposer(settings, compared.methods or (MethodChoice(),))
    maker = measurer.maker
    live, store = maker.live, maker.store
    trials: list[Trial] = []
    rows: list[Row] = []
    for number in range(settings.trials):
        params = proposer.ask()
        merge = proposer.merge(params, live.model.layout.blocks, compared.keep)
        extra, original = models_for(merge.method, more, base_model)
        variant = Variant(name=f"{FOUND}{number:03d}", merge=merge, more=extra, base_model=original)
        first = twins.first(variant)
        if first is None:
            maker.make([variant], of=(number, settings.trials))
        plan = live.plan(merge, extra, original).plan
        row = measurer.row(variant, first, plan.blocks)
        values = [row.mean(goal) for goal in settings.goals]
        known = [0.0 if value is None else value for value in values]
        proposer.tell(known)
        rows.append(row)
        trials.append(Trial(variant, params, known))
        lines = [
            json.dumps({"name": t.variant.name, "params": t.params, **dict(zip(settings.goals, t.values, strict=True)),
                        "merge": about_merge(t.variant)})
            for t in trials
        ]  # fmt: skip
        with store.writing(TRIALS) as part:
            part.write_text("\n".join(lines) + "\n")
    return trials, rows


def grade(
    settings: SearchSettings,
    compared: CompareSettings,
    measurer: Measurer,
    trials: Sequence[Trial],
    ranked: Sequence[Row],
    variants: Mapping[str, Variant],
) -> tuple[Search, int]:
    """Draw the picks and the baselines on the held-out prompts, and grade them; also how many picture files an earlier
    run had made. `ranked` are the rows of all variants on the search's prompts, best first.
    """
    names = {trial.variant.name: trial for trial in trials}
    mine = [row for row in ranked if row.name in names]
    front = pareto_front(np.array([names[row.name].values for row in mine]))
    picks = [row for row, good in zip(mine, front, strict=True) if good][: settings.picks]
    others = [row for row in ranked if row.name not in names][:1]
    searched = measurer.maker
    maker = PictureMaker(searched.live, settings.prompts, settings.seeds, compared.generate, searched.store, HELD_OUT)
    maker.make([variants[row.name] for row in [*others, *picks]], parents=True)
    proxy = measurer.gauge is not None and measurer.gauge.proxy
    final = Measurer(maker, measurer.gauge, measurer.judge)
    lines: list[Graded] = []
    for name, seen, held in zip(PARENTS, measurer.parents(), final.parents(), strict=True):
        lines.append(Graded(name, "A" if name == "A" else "B", None, seen, held, {}))
    for row in [*others, *picks]:
        found = row.name in names
        params = names[row.name].params if found else {}
        held = final.row(variants[row.name], shares=row.shares)
        role: Literal["best without search", "found"] = "found" if found else "best without search"
        lines.append(Graded(row.name, role, variants[row.name], row, held, params))
    best = next((line for line in lines if line.role == "best without search"), None)
    for line in lines:
        if best is not None and line is not best:
            line.minus_best = _difference(line.held_out, best.held_out)
    for line in lines:
        line.proxy = proxy
    score = measurer.gauge.score if proxy and measurer.gauge is not None else None
    return Search(settings, list(trials), lines, score), maker.resumed


def _difference(one: Row, two: Row) -> Interval | None:
    for key in ("fidelity_judge", "fidelity"):
        a, b = getattr(one.measured, key), getattr(two.measured, key)
        if a is not None and b is not None:
            return bootstrap_mean(a - b)
    return None
