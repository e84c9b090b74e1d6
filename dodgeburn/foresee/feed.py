"""Batches of moments from shards: whole prompts at a time, so that pictures of one prompt can be ranked.

Batch number i depends on the seed and on i alone. What fits the memory limit is read once; a larger store is gone
through in groups of shards, each of which serves some batches before the next is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.errors import UserError
from dodgeburn.foresee.labels import BAD_FROM, LEVELS
from dodgeburn.foresee.network import BEFORE
from dodgeburn.foresee.shards import TRAJECTORY_TENSORS, Batch, Shard, Store, Trajectory, slot_of, type_targets

Where = Callable[[Trajectory], bool]
MEMORY = 3_000_000_000  # bytes of shards held at a time


def words_of(prompt: str, buckets: int) -> Tensor:
    """A prompt's words and pairs of neighbouring words, hashed to 0 or 1 in `buckets` places, at unit length."""
    found = re.findall(r"[\w'-]+", prompt.lower())
    tokens = [*found, *(f"{a} {b}" for a, b in zip(found, found[1:], strict=False))]
    out = torch.zeros(buckets)
    for token in tokens:
        out[int.from_bytes(hashlib.blake2b(token.encode(), digest_size=4).digest(), "big") % buckets] = 1
    return F.normalize(out, dim=0)


@dataclass
class Targets:
    """What is said of n finished pictures."""

    severity: Tensor  # fp32 [n], 0..5
    at_least: Tensor  # fp32 [n, 5]: share of the raters who say severity >= 1 .. 5
    histogram: Tensor  # fp32 [n, 6], sums to 1
    types: Tensor  # fp32 [n, types], 0 or 1
    typed: Tensor  # bool [n]: whether anybody said something of types
    weight: Tensor  # fp32 [n]
    group: Tensor  # int64 [n]: pictures of one prompt have the same number

    @property
    def bad(self) -> Tensor:
        """fp32 [n]: severity is 3 or more."""
        return (self.severity >= BAD_FROM - 1e-6).float()


def targets_of(records: Sequence[Trajectory]) -> Targets:
    """Targets of labelled trajectories. A single opinion counts as what it says; several as the share of raters."""
    labels = [r.label for r in records]
    assert all(label is not None for label in labels)
    severity = torch.tensor([label.severity for label in labels if label])
    counts = torch.tensor([label.histogram for label in labels if label]).view(-1, LEVELS)
    histogram = counts / counts.sum(1, keepdim=True)
    shares = histogram.flip(1).cumsum(1).flip(1)[:, 1:]
    single = counts.sum(1, keepdim=True) <= 1 + 1e-6
    hard = (severity[:, None] >= torch.arange(1, LEVELS) - 1e-6).float()
    types, typed = type_targets(records)
    names = {name: i for i, name in enumerate(dict.fromkeys(r.prompt_id for r in records))}
    return Targets(
        severity, torch.where(single, hard, shares), histogram, types, typed,
        torch.tensor([label.weight for label in labels if label]),
        torch.tensor([names[r.prompt_id] for r in records]),
    )  # fmt: skip


def check_labels(records: Sequence[Trajectory], where: str, least: int = 20) -> None:
    """UserError for labels from which nothing can be learned."""
    if len(records) < least:
        raise UserError(
            f"{where}: {len(records)} labelled trajectories: at least {least} are needed, hundreds are better"
        )
    severities = {r.label.severity for r in records if r.label}
    if len(severities) == 1:
        raise UserError(
            f"{where}: all {len(records)} labels are {severities.pop():g}: nothing can be learned from constant labels"
        )
    bad = sum(bool(r.label and r.label.bad) for r in records)
    if bad in (0, len(records)):
        only = "bad (severity 3 or more)" if bad else "good (severity under 3)"
        raise UserError(f"{where}: all {len(records)} pictures are {only}: both kinds are needed")


@dataclass
class _Loaded:
    """Trajectories in memory, their moments one after another."""

    records: list[Trajectory]
    first: Tensor  # int64 [n]
    length: Tensor  # int64 [n]
    tensors: dict[str, Tensor]
    prompts: list[list[int]]  # trajectories of each prompt (and its settings, where there are enough)
    targets: Targets
    words: Tensor | None


class Feed:
    """`feed(i, generator)`: batch number i as (tensors [b, moments, ...], Targets).

    Each prompt of a batch gives up to `per_prompt` of its trajectories, all seen at the same shares of their way, so
    that they can be compared. moments: how many are drawn of each trajectory; None takes whole ways, padded
    (`tensors["there"]`). names: of the shards' tensors, and BEFORE for x0 of the moment before. Raises UserError for
    features that are no numbers.
    """

    def __init__(
        self, store: Store, where: Where, names: Sequence[str], prompts: int = 16, per_prompt: int = 8,
        moments: int | None = 3, words: int = 0, seed: int = 0, memory: int = MEMORY, visits: int = 200,
    ) -> None:  # fmt: skip
        self.store, self.where, self.names = store, where, tuple(n for n in names if n != BEFORE)
        self.before = BEFORE in names
        self.prompts, self.per_prompt, self.moments = prompts, per_prompt, moments
        self.words, self.seed, self.visits = words, seed, visits
        sizes = [path.stat().st_size for path in store.paths]
        self.groups: list[list[int]] = [[]]
        held = 0
        for i in np.random.default_rng(seed).permutation(len(sizes)).tolist():
            if self.groups[-1] and held + sizes[i] > memory:
                self.groups.append([])
                held = 0
            self.groups[-1].append(i)
            held += sizes[i]
        self._number = -1
        self._now: _Loaded | None = None

    def loaded(self, group: int) -> _Loaded:
        """A group's trajectories; read when they are not those in memory already."""
        if self._number != group or self._now is None:
            self._now = None  # let the old ones go first
            self._now, self._number = load(self.store, self.groups[group], self.where, self.names, self.words), group
        return self._now

    def __call__(self, i: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Targets]:
        now = self.loaded((i // self.visits) % len(self.groups))
        rows: list[int] = []
        places: list[Tensor] = []
        for p in torch.randint(len(now.prompts), (self.prompts,), generator=generator).tolist():
            members = now.prompts[p]
            order = torch.randperm(len(members), generator=generator)[: self.per_prompt].tolist()
            chosen = [members[o] for o in order]
            rows += chosen
            if self.moments is not None:
                at = torch.rand(self.moments, generator=generator)
                places += [(at * now.length[r]).long() for r in chosen]
        index = torch.tensor(rows)
        if self.moments is None:
            longest = int(now.length[index].max())
            steps = torch.arange(longest).expand(len(rows), -1)
            there = steps < now.length[index][:, None]
            place = torch.minimum(steps, now.length[index][:, None] - 1)
        else:
            place = torch.stack(places)
            there = torch.ones_like(place, dtype=torch.bool)
        flat = now.first[index][:, None] + place
        tensors = {name: t[index if name in TRAJECTORY_TENSORS else flat] for name, t in now.tensors.items()}
        if self.before:
            tensors[BEFORE] = now.tensors["x0"][now.first[index][:, None] + (place - 1).clamp(min=0)]
        tensors["there"] = there
        if now.words is not None:
            tensors["words"] = now.words[index]
        return tensors, rows_of(now.targets, index)


def rows_of(targets: Targets, index: Tensor) -> Targets:
    """Some rows of targets."""
    return Targets(*(getattr(targets, name)[index] for name in Targets.__dataclass_fields__))


def load(store: Store, shards: Sequence[int], where: Where, names: Sequence[str], words: int = 0) -> _Loaded:
    """The labelled trajectories of some shards that `where` lets through. Raises UserError for NaN and for none."""
    records: list[Trajectory] = []
    lengths: list[int] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for shard in store.shards(names, list(shards)):
        keep = [i for i, r in enumerate(shard.records) if r.label is not None and where(r)]
        rows = [shard.rows(i) for i in keep]
        used = [(i, r) for i, r in zip(keep, rows, strict=True) if r.stop > r.start]
        if not used:
            continue
        _check_finite(shard, [(shard.records[i], r) for i, r in used], names)
        records += [shard.records[i] for i, _ in used]
        lengths += [r.stop - r.start for _, r in used]
        for name in names:
            tensor = shard.tensors[name]
            parts[name] += [tensor[i : i + 1] if name in TRAJECTORY_TENSORS else tensor[r] for i, r in used]
    if not records:
        raise UserError(f"{', '.join(map(str, store.folders))}: no labelled trajectories to learn from there")
    length = torch.tensor(lengths)
    first = length.cumsum(0) - length
    by_prompt: dict[str, list[int]] = {}
    # Pictures that differ by their seed alone are what is to be told apart; of rated pictures there are few of a kind.
    slots = [slot_of(r) for r in records]
    alike = len(records) >= 4 * len(set(slots))
    for i, record in enumerate(records):
        by_prompt.setdefault(slots[i] if alike else record.prompt_id, []).append(i)
    vectors = None
    if words:
        kept = {r.prompt: words_of(r.prompt, words) for r in records}
        vectors = torch.stack([kept[r.prompt] for r in records])
    with torch.autocast("cpu", enabled=False):  # which knows no fp16 on the CPU; the training loop may have begun it
        tensors = {name: torch.cat(p) for name, p in parts.items()}
    return _Loaded(records, first, length, tensors, list(by_prompt.values()), targets_of(records), vectors)


def _check_finite(shard: Shard, used: Sequence[tuple[Trajectory, slice]], names: Sequence[str]) -> None:
    for name in names:
        tensor = shard.tensors[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            for record, rows in used:
                if not bool(torch.isfinite(tensor[rows]).all()):
                    raise UserError(
                        f"trajectory {record.id!r} of {record.generator} has NaN or infinite {name}: collect it again "
                        "(with dtype fp32, if it was fp16), or leave it out"
                    )


def whole(store: Store, where: Where, names: Sequence[str], size: int = 64) -> list[Batch]:
    """All labelled trajectories that `where` lets through as padded batches, for evaluation; in the store's order."""
    return list(store.batches(size, names, None, lambda r: r.label is not None and where(r)))
