"""Trajectories as they happen, from a zoo of generators, shard by shard into a folder.

Every shard is one batch: some prompts with several seeds each, from one member of the zoo with one set of settings, so
that pictures of a prompt differ by their seed alone. What shard number i holds depends on the settings and on i: a run
that was interrupted goes on with the shards that are missing, and several processes can share the work (`part`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.foresee.ahead import END, SHARES, Critic, calls_for, due, finish, hazy
from dodgeburn.foresee.labels import Label
from dodgeburn.foresee.observe import Observer, Seen, space_of
from dodgeburn.foresee.shards import MAP_TENSORS, Shard, Trajectory, prompt_id, shard_name, write_shard
from dodgeburn.foresee.zoo import Drawn, Zoo, draw
from dodgeburn.jobs import PartStore
from dodgeburn.models.latents import decode_pictures
from dodgeburn.sampling.loop import Step, generate
from dodgeburn.sampling.settings import STOCHASTIC

FIRST_SEED = 20_000_000
"""Seeds count from here; those of tests and gates lie below."""


@dataclass(frozen=True)
class Found:
    """What a labeller says of one finished picture: its label, where the defects are (uint8 [h, w], or None where
    nobody can say) and anything else for the record.
    """

    label: Label | None
    mask: np.ndarray | None = None
    extra: dict[str, Any] | None = None


Labeller = Callable[[np.ndarray, Sequence[str], Drawn], list[Found]]
"""Pictures uint8 [n, h, w, 3], their prompts, and what made them -> one Found each."""


@dataclass(frozen=True)
class CollectSettings:
    """What decides the content of the shards.

    prompts: the texts. shards: how many. prompts_per_shard x seeds_per_prompt trajectories each. moments: samples of a
    trajectory, spread evenly over its steps (fewer where it has fewer steps). members: names of the zoo's members to
    draw from. split: what the records are marked as. fresh_noise: stochastic samplers draw new noise at each step
    instead of following one path a seed. ahead: model calls of a look ahead, at most (`ahead.py`); 0: none.
    """

    prompts: tuple[str, ...]
    members: tuple[str, ...]
    shards: int
    prompts_per_shard: int = 4
    seeds_per_prompt: int = 8
    moments: int = 8
    steps: tuple[int, int] | None = None
    split: str = "train"
    fresh_noise: bool = False
    pictures: bool = True
    seed: int = 0
    ahead: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("no prompts to collect trajectories of: give at least one")
        for name in ("shards", "prompts_per_shard", "seeds_per_prompt", "moments"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}: expected at least 1")
        for name in ("seed", "ahead"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: expected a number from 0 up")
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1] <= 1000:
            raise UserError(f"steps are {self.steps[0]} to {self.steps[1]}: expected a rising range within 1 to 1000")

    @property
    def trajectories(self) -> int:
        return self.shards * self.prompts_per_shard * self.seeds_per_prompt


@dataclass(frozen=True)
class ShardPlan:
    """What one shard will hold."""

    number: int
    drawn: Drawn
    prompts: tuple[str, ...]  # one a trajectory
    seeds: tuple[int, ...]


def plan(settings: CollectSettings, zoo: Zoo, number: int) -> ShardPlan:
    """The content of shard `number`: a member drawn by its share, the next prompts in turn, seeds of its own."""
    by_name = {m.name: m for m in zoo.members}
    unknown = [name for name in settings.members if name not in by_name]
    if unknown:
        raise UserError(f"no generator {unknown[0]!r} in the zoo: there are {', '.join(by_name)}")
    rng = np.random.default_rng([settings.seed, number])
    members = [by_name[name] for name in settings.members]
    # Low-discrepancy instead of independent draws: few shards have the shares, too.
    shares = np.cumsum([m.share for m in members]) / sum(m.share for m in members)
    at = (0.5 + 0.6180339887498949 * (number + settings.seed)) % 1.0
    member = members[int(np.searchsorted(shares, at, side="right").clip(max=len(members) - 1))]
    drawn = draw(member, rng, settings.steps)
    if settings.fresh_noise and drawn.settings.sampler in STOCHASTIC:
        drawn.settings = drawn.settings.model_copy(update={"noise": "fresh"})
    first = number * settings.prompts_per_shard
    chosen = [settings.prompts[(first + i) % len(settings.prompts)] for i in range(settings.prompts_per_shard)]
    each = settings.seeds_per_prompt
    seed = FIRST_SEED + settings.seed * 10_000_000 + number * each * settings.prompts_per_shard
    prompts = [p for p in chosen for _ in range(each)]
    return ShardPlan(number, drawn, tuple(prompts), tuple(range(seed, seed + len(prompts))))


def moments(steps: int, wanted: int) -> list[int]:
    """0-based steps to keep, evenly spread, the last one included; a quarter and a half of the way fall on one each
    where `wanted` is a multiple of 4.
    """
    return sorted({max(0, round(steps * k / wanted) - 1) for k in range(1, wanted + 1)})


def collect(
    zoo: Zoo, settings: CollectSettings, folder: str | Path, label: Labeller, labels: str,
    part: tuple[int, int] = (0, 1), progress: Callable[[int, int], None] | None = None, critic: Critic | None = None,
) -> dict[str, int]:  # fmt: skip
    """Make the shards that are missing; returns how many were made and how many were there already.

    labels: what the labeller is, for the job's record. part: (i, n) makes only shards i, i + n, ...; progress: called
    with (trajectories done, in all). critic: who reads looks ahead and finished pictures. Raises UserError for a folder
    that holds other settings, and for looks ahead without a critic.
    """
    if settings.ahead and critic is None:
        raise UserError("looking ahead needs somebody who reads the pictures: give a critic")
    store = PartStore(folder, job_settings(zoo, settings, labels))
    made = there = 0
    for number in range(part[0], settings.shards, part[1]):
        if store.has(shard_name(number)):
            there += 1
        else:
            one = plan(settings, zoo, number)
            shard = trajectories(zoo, one, settings, label, critic)
            with store.writing(shard_name(number)) as path:
                write_shard(path, shard)
            made += 1
        if progress is not None:
            each = settings.prompts_per_shard * settings.seeds_per_prompt
            progress((made + there) * each, len(range(part[0], settings.shards, part[1])) * each)
    return {"made": made, "there": there}


def job_settings(zoo: Zoo, settings: CollectSettings, labels: str) -> dict[str, Any]:
    """What names the job: all that decides the shards' content. How many there are does not: a collection can grow."""
    members = [asdict(m) for m in zoo.members if m.name in settings.members]
    model = {"name": zoo.model.name, "sha256": zoo.model.sha256}
    return {"kind": "trajectories", "model": model, "members": members, "labels": labels,
            **{name: value for name, value in asdict(settings).items() if name != "shards"}}  # fmt: skip


def trajectories(
    zoo: Zoo, one: ShardPlan, settings: CollectSettings, label: Labeller, critic: Critic | None = None
) -> Shard:  # fmt: skip
    """Draw one shard's pictures, and keep what was to be seen on the way and what the critic reads."""
    drawn = one.drawn
    kept: list[Seen] = []
    guesses: dict[float, list[tuple[tuple[int, ...], Tensor]]] = {}

    def callback(step: Step) -> None:
        seen = observer(step)  # at every step: running figures need all of them
        if wanted(step.i, step.total):
            before = kept[-1].progress if step.i and kept else 0.0
            kept.append(seen)
            calls, share = calls_for(settings.ahead, step.total), due(seen.progress, before, SHARES)
            if calls and share is not None:
                guesses.setdefault(share, []).append((step.indices, finish(step, calls)))

    def wanted(i: int, total: int) -> bool:
        return i in moments(total, settings.moments)

    with zoo.changed(drawn) as adapters, Observer(zoo.model, drawn.settings.guidance, wanted) as observer:
        found = generate(zoo.model, one.prompts, one.seeds, drawn.settings, callback, adapters=adapters)
    pictures = np.stack([np.asarray(g.image) for g in found])
    said = label(pictures, one.prompts, drawn)
    # A critic who reads a finished picture just as its labeller did would be right about every one of them.
    last = hazy(pictures, one.number) if any(s.label and s.label.source == "reader" for s in said) else pictures
    readings = _readings(zoo.model, last, guesses, one.prompts, settings.ahead, critic)
    records = [
        Trajectory(
            f"{drawn.member.name}-{one.number}-{i}", prompt, prompt_id(prompt), seed, drawn.member.name,
            drawn.settings.sampler, drawn.settings.steps, drawn.settings.guidance, say.label, drawn.settings.spacing,
            split=settings.split, extra={"model": zoo.model.name, **drawn.described, **(say.extra or {}), **read},
        )
        for i, (prompt, seed, say, read) in enumerate(zip(one.prompts, one.seeds, said, readings, strict=True))
    ]  # fmt: skip
    tensors = samples(kept, len(records))
    if settings.pictures:
        tensors["picture"] = torch.from_numpy(pictures.copy())
    masks = [say.mask for say in said]
    if masks and all(mask is not None for mask in masks):
        tensors["mask"] = torch.from_numpy(np.stack([m for m in masks if m is not None]))
    return Shard(records, tensors, space_of(zoo.model))


def _readings(
    model: Any, pictures: np.ndarray, guesses: dict[float, list[tuple[tuple[int, ...], Tensor]]],
    prompts: Sequence[str], calls: int, critic: Critic | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What records say of looks ahead: `ahead` is the calls of a look and the severity read by share, END included."""
    if critic is None or not calls:
        return [{}] * len(prompts)
    found: list[dict[str, float]] = [{"calls": calls} for _ in prompts]
    for share, parts in guesses.items():
        for indices, guess in parts:
            read = critic(decode_pictures(model.vae, guess).numpy(), [prompts[i] for i in indices])
            for i, severity in zip(indices, read.tolist(), strict=True):
                found[i][str(share)] = round(severity, 4)
    for i, severity in enumerate(critic(pictures, prompts).tolist()):
        found[i][str(END)] = round(severity, 4)
    return [{"ahead": one} for one in found]


def samples(kept: Sequence[Seen], n: int) -> dict[str, Tensor]:
    """What was seen, step by step of whole batches, put in the order of a shard: trajectory by trajectory."""
    owner = torch.tensor([i for seen in kept for i in seen.indices], dtype=torch.int32)
    step = torch.tensor([seen.i for seen in kept for _ in seen.indices], dtype=torch.int32)
    order = torch.from_numpy(np.lexsort((step.numpy(), owner.numpy())))

    def each(values: Sequence[float]) -> Tensor:
        rows = [v for v, seen in zip(values, kept, strict=True) for _ in seen.indices]
        return torch.tensor(rows, dtype=torch.float32)[order]

    out = {"trajectory": owner[order], "step": step[order]}
    out["progress"], out["log_snr"] = each([s.progress for s in kept]), each([s.log_snr for s in kept])
    half = torch.float16
    for name, dtype in (("x_t", half), ("x0", half), ("cond", half), ("delta", half), ("scalars", torch.float32),
                        ("near", half), ("far", half)):  # fmt: skip
        rows = torch.cat([getattr(seen, name) for seen in kept])[order]
        if name in MAP_TENSORS and rows.dim() == 2:  # a U-Net of one up block has no such map
            continue
        if bool(rows.isnan().any()):
            raise UserError(f"what was to be seen on the way ({name}) is not a number: take --dtype fp32")
        # Half precision ends at 65 504: a broken generator may go beyond, and infinities are for nobody's good.
        out[name] = rows.clamp(-6e4, 6e4).to(dtype)
    return out


def oracle(reader_name: str) -> Labeller:
    """The pocket's pixel oracles with the reader of this name: for pictures of the pocket world only."""
    from dodgeburn.foresee.truth import find_artifacts
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.pocket.world import LOOKS, Look

    reader = Reader.load(reader_name)

    def label(pictures: np.ndarray, prompts: Sequence[str], drawn: Drawn) -> list[Found]:
        # A merge with a fine-tune takes on its look, which is no failure.
        looks: tuple[Look, ...] = LOOKS if drawn.member.change == "towards" else ("plain",)
        found = find_artifacts(pictures, prompts, reader, looks)
        return [
            Found(f.label(reader_name), f.mask.astype(np.uint8) * 255, {"notes": f.notes} if f.notes else None)
            for f in found
        ]

    return label


def unlabelled(pictures: np.ndarray, prompts: Sequence[str], drawn: Drawn) -> list[Found]:
    """Nobody has said anything yet."""
    return [Found(None)] * len(prompts)
