"""Acting on what is foreseen: pictures are taken out of the batch while they are denoised, and begun anew.

Each picture asked for is a slot with some candidates (seeds). Now and then the estimator looks at all of them; its
rule (`policy.py`) gives up those that are likely to be bad, its funnel those that fall behind the others of their slot.
What is given up leaves the batch with its solver's history, both halves of its guidance and its size conditioning, so
the steps that follow are really cheaper. The best finished candidate of a slot is its picture. Where that is cheaper, a
slot's seeds are tried one after another (`search.py`) until a picture is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from dodgeburn.errors import UserError
from dodgeburn.foresee.ahead import END, Plan, calls_for, critic_of, due, finish
from dodgeburn.foresee.collect import moments
from dodgeburn.foresee.estimator import Estimator, State
from dodgeburn.foresee.observe import Observer
from dodgeburn.foresee.policy import Never, Policy, policy_of
from dodgeburn.foresee.savings import Funnel
from dodgeburn.foresee.search import Search
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import Applied, Generated, GenerateSettings, Step, Tuned, default_batch_size, generate
from dodgeburn.sampling.prompts import EncodedPrompt
from dodgeburn.sampling.settings import TWO_CALLS

KEPT, FINISHED, REJECTED, BEHIND = "kept", "finished", "rejected", "fell behind"


@dataclass
class Fate:
    """What became of one seed."""

    seed: int
    slot: int  # which of the pictures asked for it was a candidate of
    round: int  # 0, or the number of the restart that it came with
    fate: str = FINISHED  # kept, finished (not chosen), rejected, fell behind
    step: int | None = None  # 1-based step after which it was taken out; None if it was finished
    looks: list[int] = field(default_factory=list)  # 1-based steps after which it was looked at
    risk: list[float] = field(default_factory=list)  # estimated P(bad) there
    rank: float = 0.0  # last; larger is worse, comparable within a slot
    severity: float = 0.0  # last estimate, 0..5
    read: dict[float, float] = field(default_factory=dict)  # severity that the critic read, by share of the steps

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded."""
        return {
            "seed": self.seed, "slot": self.slot, "round": self.round, "fate": self.fate, "step": self.step,
            "looks": self.looks, "risk": [round(r, 3) for r in self.risk], "severity": round(self.severity, 2),
            "read": {f"{share:g}": round(severity, 2) for share, severity in self.read.items()},
        }  # fmt: skip


@dataclass
class Foreseen:
    """Pictures and what they cost. Looks ahead are among the evaluations; what reading pictures costs is not."""

    pictures: list[Generated]  # one a slot, in order; a slot whose candidates were all given up has none
    slots: list[int]  # of `pictures`
    fates: list[Fate]
    evaluations: int  # samples that went through the U-Net
    full: int  # the same for `best_of` complete pictures a slot
    others: list[Generated]  # finished and not chosen
    search: Search | None = None  # by which seeds were tried one after another; None: all of a slot at once

    @property
    def good(self) -> int:
        """Slots whose picture is good by its last estimate."""
        kept = {fate.slot: fate for fate in self.fates if fate.fate == KEPT}
        return sum(fate.risk[-1] <= 0.5 for fate in kept.values())


@dataclass(frozen=True)
class Rules:
    """What decides over candidates. plan: shares of the steps at which pictures are read; spare: the last candidate of
    a slot is never taken out."""

    policy: Policy
    funnel: Funnel
    plan: Plan = ()
    spare: bool = True


class Watch:
    """The step callback: looks at every picture at the moments that the estimator was trained on, and says which go
    on."""

    def __init__(
        self, model: Model, estimator: Estimator, observer: Observer, prompts: Sequence[str], fates: Sequence[Fate],
        rules: Rules, served: Collection[int] = (),
    ) -> None:  # fmt: skip
        """served: slots that have a picture already, so that none of their candidates is spared."""
        self.model, self.estimator, self.observer = model, estimator, observer
        self.prompts, self.fates, self.rules, self.served = prompts, fates, rules, served
        self.ahead = estimator.ahead
        self.state: State | None = None
        self.seen_until = 0.0  # share of the steps at the last look
        self.ways: dict[int, dict[str, list[float]]] = {}
        self.own: dict[int, dict[str, float]] = {}  # the estimator's last figures, without readings

    def __call__(self, step: Step) -> list[bool]:
        if step.i == 0:
            self.state = None
        seen = self.observer(step)  # at every step: running figures need all of them
        if step.i not in moments(step.total, self.estimator.looks):
            return [True] * len(seen.indices)
        before = self.seen_until if step.i else 0.0
        self.seen_until = seen.progress
        judged, self.state = self.estimator.judge(seen, [self.prompts[i] for i in seen.indices], self.state)
        self._read(step, seen.progress, before)
        figures = {name: getattr(judged, name).tolist() for name in ("bad", "severity", "rank", "exit", "hazard")}
        for row, index in enumerate(seen.indices):
            fate = self.fates[index]
            self.own[index] = {name: values[row] for name, values in figures.items()}
            now = {**self._with_reading(index), "progress": seen.progress}
            way = self.ways.setdefault(index, {name: [] for name in now})
            for name, value in now.items():
                way[name].append(value)
            fate.looks.append(step.i + 1)
            fate.risk.append(now["bad"])
            fate.rank, fate.severity = now["rank"], now["severity"]
        if step.i + 1 == step.total:
            return [True] * len(seen.indices)  # all is paid for
        self._reject(seen.indices, step)
        self._fall_behind(seen.indices, step, seen.progress, before)
        return [self.fates[index].fate == FINISHED for index in seen.indices]

    def _read(self, step: Step, progress: float, before: float) -> None:
        """Look ahead, if it is time: the critic reads what a few large steps lead to."""
        share = due(progress, before, [s for s in self.rules.plan if s < END])
        calls = calls_for(self.ahead.calls, step.total) if self.ahead is not None else 0
        if self.ahead is None or share is None or not calls:
            return
        pictures = decode_pictures(self.model.vae, finish(step, calls)).numpy()
        read = critic_of(self.ahead.critic)(pictures, [self.prompts[i] for i in step.indices])
        for index, severity in zip(step.indices, read.tolist(), strict=True):
            self.fates[index].read[share] = severity

    def read_finished(self, made: Sequence[Generated]) -> None:
        """The critic reads finished pictures; their last estimates follow."""
        assert self.ahead is not None
        read = critic_of(self.ahead.critic)(np.stack([np.asarray(g.image) for g in made]), [g.prompt for g in made])
        for picture, severity in zip(made, read.tolist(), strict=True):
            fate = self.fates[picture.index]
            fate.read[END] = severity
            now = self._with_reading(picture.index)
            fate.risk[-1], fate.rank, fate.severity = now["bad"], now["rank"], now["severity"]

    def _with_reading(self, index: int) -> dict[str, float]:
        """The estimator's last figures of a picture, and what becomes of them by the last reading."""
        own, read = self.own[index], self.fates[index].read
        if self.ahead is None or not read:
            return own
        last = max(read)
        bad, severity = self.ahead.opinions[last](*(np.array(v) for v in (read[last], own["bad"], own["severity"])))
        return {**own, "bad": float(bad), "severity": float(severity), "rank": read[last]}

    def _reject(self, indices: Sequence[int], step: Step) -> None:
        for index in sorted(indices, key=lambda i: -self.fates[i].rank):
            way = {name: np.asarray(values) for name, values in self.ways[index].items()}
            if self.rules.policy.first(way) != len(way["bad"]) - 1:
                continue
            if not (self.rules.spare and self._last(index, indices)):
                self._out(index, REJECTED, step)

    def _fall_behind(self, indices: Sequence[int], step: Step, progress: float, before: float) -> None:
        keep = self.rules.funnel.keep(progress, before)
        if keep is None:
            return
        for slot in {self.fates[i].slot for i in indices}:
            there = [i for i in indices if self.fates[i].slot == slot and self.fates[i].fate == FINISHED]
            for index in sorted(there, key=lambda i: self.fates[i].rank)[max(keep, 1) :]:
                self._out(index, BEHIND, step)

    def _last(self, index: int, indices: Sequence[int]) -> bool:
        slot = self.fates[index].slot
        left = sum(self.fates[i].slot == slot and self.fates[i].fate == FINISHED for i in indices)
        return left == 1 and slot not in self.served

    def _out(self, index: int, fate: str, step: Step) -> None:
        self.fates[index].fate, self.fates[index].step = fate, step.i + 1


@dataclass(frozen=True)
class Candidates:
    """What each picture is to be as good as, and what happens when no seed is left.

    best_of: as good as the best of so many complete pictures. How many seeds are begun for that, and how many go on
    when, is the estimator's search, or its funnel. restarts: how often a slot that has no good picture is begun anew,
    with seeds not used so far; in the last round the last candidate of a slot is never taken out. rules: False begins
    just best_of seeds, runs all to their end and only chooses. look_ahead: seeds are also looked ahead, which costs
    calls and finds more of the bad ones early.
    """

    best_of: int = 4
    restarts: int = 0
    rules: bool = True
    look_ahead: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.best_of <= 1000 or not 0 <= self.restarts <= 1000:
            raise UserError(f"best of {self.best_of} with {self.restarts} restarts: give 1 to 1000 and 0 to 1000")


def foresee(
    model: Model, prompt: str, count: int, first_seed: int, settings: GenerateSettings, estimator: Estimator,
    candidates: Candidates | None = None, batch_size: int | None = None, adapters: Sequence[Applied] = (),
    encoded: Mapping[str, EncodedPrompt] | None = None, tuned: Tuned | None = None,
    progress: Callable[[Step], object] | None = None,
) -> Foreseen:  # fmt: skip
    """`count` pictures of a prompt, each the best of some seeds, the hopeless ones stopped on the way.

    Picture j has as many seeds as the funnel begins with, counting up from first_seed; restarts and the further rounds
    of a search, which begins one seed a picture, take the next ones that are free. `progress` is told of every step.
    Raises UserError for an estimator of another kind of model, and for one that can't look ahead if that is wanted.
    """
    candidates = candidates or Candidates()
    estimator.check(model)
    search = search_of(estimator, candidates.best_of) if candidates.rules else None
    rules = _rules(estimator, candidates, search)
    each, rounds = rules.funnel.begin, 1 if search is None else search.rounds
    full_size = (settings.height or model.native_size, settings.width or model.native_size)
    size = batch_size or default_batch_size(*(side // model.vae_factor for side in full_size))
    size = max(each, size // each * each)  # candidates of a slot are compared, so they go together
    fates: list[Fate] = []
    chosen: dict[int, tuple[Fate, Generated]] = {}
    others: list[Generated] = []
    open_slots, seed = list(range(count)), first_seed
    with Counter(model.unet) as counter:
        last = rounds * (candidates.restarts + 1) - 1
        for number in range(last + 1):
            batch = [Fate(seed + i, slot, number) for i, slot in enumerate(s for s in open_slots for _ in range(each))]
            seed += len(batch)
            fates += batch
            # Where a search has a picture already, its last seed need not be finished.
            spare = number == last
            made = _round(model, prompt, batch, settings, estimator, replace(rules, spare=spare), size, adapters,
                          encoded, tuned, progress, set(chosen))  # fmt: skip
            for picture in made:
                fate = batch[picture.index]
                best = chosen.get(fate.slot)
                # Between rounds only what is calibrated compares; within one, rank.
                if best is None or _better(fate, best[0], search is not None):
                    if best is not None:
                        others.append(best[1])
                    chosen[fate.slot] = (fate, picture)
                else:
                    others.append(picture)
            open_slots = [s for s in range(count) if s not in chosen or not _good(chosen[s][0], search)]
            if not open_slots:
                break
    for fate, _ in chosen.values():
        fate.fate = KEPT
    full = count * candidates.best_of * evaluations_of(settings)
    slots = sorted(chosen)
    return Foreseen([chosen[s][1] for s in slots], slots, fates, counter.samples, full, others, search)


def _rules(estimator: Estimator, candidates: Candidates, search: Search | None) -> Rules:
    if not candidates.rules:
        return Rules(Never(), Funnel(candidates.best_of))
    record = estimator.record
    if candidates.look_ahead:
        if "ahead_policy" not in record:
            raise UserError("this estimator does not look ahead: it was trained on trajectories without looks; collect "
                            "with --look-ahead")  # fmt: skip
        record = {**record, **record["ahead_policy"]}
    elif search is not None:
        return Rules(search.policy, Funnel(1), search.plan)
    policy = policy_of(record["policy"]) if "policy" in record else Never()
    plan = tuple(record.get("policy_plan", ()))
    if search is not None:
        return Rules(policy, Funnel(1), tuple(sorted({*plan, *search.plan})))
    return Rules(policy, funnel_of(estimator, candidates.best_of), plan)


def _good(fate: Fate, search: Search | None) -> bool:
    """Whether a finished picture ends the trying of further seeds."""
    return fate.risk[-1] <= 0.5 if search is None else fate.severity <= search.stop


def _better(fate: Fate, than: Fate, one_by_one: bool) -> bool:
    if one_by_one:
        return fate.severity < than.severity
    if fate.round == than.round:
        return fate.rank < than.rank
    return fate.risk[-1] < than.risk[-1]


def _round(
    model: Model, prompt: str, batch: list[Fate], settings: GenerateSettings, estimator: Estimator, rules: Rules,
    size: int, adapters: Sequence[Applied], encoded: Mapping[str, EncodedPrompt] | None, tuned: Tuned | None,
    progress: Callable[[Step], object] | None, served: set[int],
) -> list[Generated]:  # fmt: skip
    """Begin a batch's seeds and finish those that may go on. served: slots that have a picture already."""
    prompts = [prompt] * len(batch)

    def wanted(i: int, total: int) -> bool:
        return i in moments(total, estimator.looks)

    inputs = estimator.inputs
    with Observer(model, settings.guidance, wanted, "features" in inputs, "maps" in inputs) as observer:
        watch = Watch(model, estimator, observer, prompts, batch, rules, served)

        def after(step: Step) -> list[bool]:
            if progress is not None:
                progress(step)
            return watch(step)

        seeds = [fate.seed for fate in batch]
        made = generate(model, prompts, seeds, settings, after, size, encoded, adapters, tuned)
    if END in rules.plan and made:
        watch.read_finished(made)
    return made


def search_of(estimator: Estimator, best_of: int) -> Search | None:
    """The estimator's search that is as good as the best of so many complete pictures; between the numbers it was
    chosen for, the nearest one in proportion, with so many seeds more or fewer. None if there is none."""
    found = {int(n): value for n, value in estimator.record.get("searches", {}).items() if n.isdigit()}
    if best_of == 1 or not found:
        return None
    near = min(found, key=lambda n: abs(math.log(n / best_of)))
    search = Search.of(found[near])
    return replace(search, rounds=max(2, math.ceil(search.rounds * best_of / near)))


def funnel_of(estimator: Estimator, best_of: int) -> Funnel:
    """The estimator's funnel that is as good as the best of so many complete pictures. Between the numbers it was
    chosen for, the nearest one in proportion."""
    funnels = {n: funnel for n, funnel in estimator.record.get("funnels", {}).items() if n.isdigit()}
    if best_of == 1 or not funnels:
        return Funnel(best_of)
    near = min(funnels, key=lambda n: abs(math.log(int(n) / best_of)))
    scale, begin, stages = best_of / int(near), funnels[near]["begin"], funnels[near]["stages"]
    return Funnel(
        max(1, math.ceil(begin * scale)), tuple((float(share), max(1, math.ceil(n * scale))) for share, n in stages)
    )


def evaluations_of(settings: GenerateSettings) -> int:
    """Samples that go through the U-Net for one picture made to its end."""
    total = 0
    for i in range(settings.steps):
        guided = settings.guidance != 1.0 or settings.thresholding is not None
        guided = guided and settings.cfg_start <= i / settings.steps < settings.cfg_end
        calls = 2 if settings.sampler in TWO_CALLS and i + 1 < settings.steps else 1
        total += calls * (2 if guided else 1)
    return total


class Counter:
    """Counts the samples that go through a U-Net, in a `with` block."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.samples = unet, 0
        self._handle: Any = None

    def __enter__(self) -> Counter:
        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.samples += len(inputs[0])

        self._handle = self.unet.register_forward_hook(count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
