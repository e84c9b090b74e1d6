"""Trajectories on disk: shards of safetensors that are read one at a time.

A folder holds `job.json` (what was asked for) and `shard-000000.safetensors`, ...: each some dozens of trajectories,
whole or not there at all. A shard's tensors are flat over samples (one sample: one moment of one trajectory), its
header has the records of its trajectories as JSON, and a digest over the tensors. A shard that is broken is left out,
counted and named. A million samples of the pocket are about 50 GB; never more than a few shards are in memory.

Tensors of a shard with t trajectories and s samples (those of a trajectory stand together, in the order of denoising):

| name | dtype, shape | what |
|---|---|---|
| `trajectory` | int32 [s] | which of the shard's records |
| `step` | int32 [s] | 0-based step of the sampler; -1 for forward-noised samples |
| `progress` | fp32 [s] | U-Net calls done, this one included, as a share of all, 0..1 |
| `log_snr` | fp32 [s] | ln(alpha_bar / (1 - alpha_bar)), natural |
| `x_t` | fp16 [s, c, h, w] | what the model saw, about unit variance |
| `x0` | fp16 [s, c, h, w] | its guess of the clean latents, guidance applied |
| `cond` | fp16 [s, f] | pooled U-Net features with the prompt (`Space.stages` says which) |
| `delta` | fp16 [s, f] | the same minus those without the prompt; zeros where there was no guidance |
| `scalars` | fp32 [s, m] | `Space.scalars` |
| `near`, `far` | fp16 [s, c, h, w] | maps of the last up block and of the one before, with the prompt (`Space.maps`) |
| `mask` | uint8 [t, H, W] | where the defects are, 0 or 255; left out where nobody knows |
| `picture` | uint8 [t, H, W, 3] | the finished picture; may be left out |
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.checkpoint.tensorfile import TensorFile, byte_view, save_tensors
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee.labels import TYPES, Label

SAMPLE_TENSORS = ("trajectory", "step", "progress", "log_snr", "x_t", "x0", "cond", "delta", "scalars")
MAP_TENSORS = ("near", "far")
TRAJECTORY_TENSORS = ("mask", "picture")
RECORDS, SPACE, DIGEST = "dodgeburn.trajectories", "dodgeburn.space", "dodgeburn.digest"
TRUE, NOISED = "trajectory", "forward-noised"
"""Provenance: states that a sampler passed through, or a finished picture with noise added."""


@dataclass(frozen=True)
class Space:
    """What the numbers of a sample are, the same throughout a store: an estimator fits the space it was trained on.

    stages: (name, channels) of each pooled U-Net block; `cond` and `delta` have, block after block, its channels' means
    and then their deviations. latent: channels of the latents. model: name of the architecture the features are of.
    maps: (name, channels) of the blocks whose maps `near` and `far` are; none in files of before there were maps.
    """

    stages: tuple[tuple[str, int], ...]
    scalars: tuple[str, ...]
    latent: int = 4
    model: str = ""
    maps: tuple[tuple[str, int], ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of the tensors that every sample has."""
        return (*SAMPLE_TENSORS, *MAP_TENSORS[: len(self.maps)])

    @property
    def features(self) -> int:
        """Width of `cond` and `delta`."""
        return 2 * sum(width for _, width in self.stages)

    @staticmethod
    def of(value: Mapping[str, Any]) -> Space:
        """From what `asdict` gave."""
        stages = tuple((str(name), int(width)) for name, width in value["stages"])
        maps = tuple((str(name), int(width)) for name, width in value.get("maps", ()))
        return Space(stages, tuple(value["scalars"]), int(value["latent"]), str(value.get("model", "")), maps)


@dataclass(frozen=True)
class Trajectory:
    """One picture's way: how it was made, and what is said of it in the end (`label`, None where nobody has said).

    prompt_id: groups pictures of one prompt (for splits and for ranking within a prompt). generator: which member of
    the zoo, or the model's name. provenance: TRUE or NOISED. split: "train" or "test".
    """

    id: str
    prompt: str
    prompt_id: str
    seed: int
    generator: str
    sampler: str
    steps: int
    guidance: float
    label: Label | None
    spacing: str = "trailing"
    provenance: str = TRUE
    split: str = "train"
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else is known: the oracle's findings, a file's name

    @staticmethod
    def of(value: Mapping[str, Any]) -> Trajectory:
        """From what `asdict` gave."""
        found = dict(value)
        label = found.pop("label")
        if label is not None:
            types = label.get("types")
            label = Label(**{**label, "histogram": tuple(label["histogram"]), "types": types and tuple(types)})
        return Trajectory(**found, label=label)


@dataclass
class Shard:
    """Some trajectories with all their samples."""

    records: list[Trajectory]
    tensors: dict[str, Tensor]
    space: Space

    @property
    def samples(self) -> int:
        return len(self.tensors["trajectory"])

    def rows(self, i: int) -> slice:
        """Where the samples of record i stand."""
        owner = self.tensors["trajectory"]
        first = int(torch.searchsorted(owner, torch.tensor(i, dtype=owner.dtype)))
        return slice(first, int(torch.searchsorted(owner, torch.tensor(i, dtype=owner.dtype), right=True)))


def prompt_id(prompt: str) -> str:
    """8 hex digits that name a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def slot_of(r: Trajectory) -> str:
    """Names prompt, generator and settings: trajectories of one slot differ by their seed alone."""
    changed = {k: r.extra[k] for k in ("change", "strength", "change_seed") if k in r.extra}
    return f"{r.prompt_id} {r.generator} {r.sampler} {r.spacing} {r.steps} {r.guidance} {changed}"


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.safetensors"


def write_shard(path: str | Path, shard: Shard) -> None:
    """Write a shard, atomically. Raises ValueError for tensors that do not belong together."""
    tensors = shard.tensors
    _check(shard)
    metadata = {
        RECORDS: json.dumps([asdict(r) for r in shard.records], ensure_ascii=False),
        SPACE: json.dumps(asdict(shard.space)),
        DIGEST: _digest(tensors),
    }
    save_tensors(path, tensors, metadata)


def read_shard(path: str | Path, names: Sequence[str] | None = None, check: bool = True) -> Shard:
    """Read a shard: all tensors, or `names` (`trajectory` comes always). Raises UserError for one that is broken.

    check: compare the digest, which reads the whole file; without it only the header and the file's length are checked.
    """
    with TensorFile(path) as file:
        records, space, digest = _header(file)
        missing = [n for n in (*space.samples, *(names or ())) if n not in file.keys()]
        if missing:
            raise UserError(f"{path}: not a whole shard of trajectories, it has no {missing[0]}")
        every = {name: file.tensor(name) for name in file.keys()} if check or names is None else {}
        if check and _digest(every) != digest:
            raise UserError(f"{path}: the bytes are not those that were written (digest differs)")
        wanted = file.keys() if names is None else list(dict.fromkeys(["trajectory", *names]))
        return Shard(records, {n: every[n] if n in every else file.tensor(n) for n in wanted}, space)


def _header(file: TensorFile) -> tuple[list[Trajectory], Space, str]:
    metadata = file.header.metadata
    if RECORDS not in metadata or SPACE not in metadata:
        raise UserError(f"{file.path}: no shard of trajectories (its header has no {RECORDS})")
    try:
        records = [Trajectory.of(row) for row in json.loads(metadata[RECORDS])]
        return records, Space.of(json.loads(metadata[SPACE])), metadata.get(DIGEST, "")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file.path}: the records in its header cannot be read") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(byte_view(tensors[name].contiguous().reshape(-1)))
    return digest.hexdigest()


def _check(shard: Shard) -> None:
    tensors, space = shard.tensors, shard.space
    missing = [name for name in space.samples if name not in tensors]
    if missing:
        raise ValueError(f"a shard needs {', '.join(missing)}")
    owner, n = tensors["trajectory"], shard.samples
    if n and ((owner.diff() < 0).any() or int(owner.max()) >= len(shard.records) or int(owner.min()) < 0):
        raise ValueError("samples must stand trajectory by trajectory, in the order of the records")
    for name in space.samples:
        if len(tensors[name]) != n:
            raise ValueError(f"{name} has {len(tensors[name])} rows, trajectory {n}")
    for name in TRAJECTORY_TENSORS:
        if name in tensors and len(tensors[name]) != len(shard.records):
            raise ValueError(f"{name} has {len(tensors[name])} rows for {len(shard.records)} trajectories")
    for name, width in (("cond", space.features), ("delta", space.features), ("scalars", len(space.scalars))):
        if tensors[name].shape[1:] != (width,):
            raise ValueError(f"{name} is {list(tensors[name].shape)}, the space says {width} wide")


@dataclass
class Batch:
    """b trajectories as padded tensors [b, k, ...]; `there` bool [b, k] is false where a shorter one has ended."""

    records: list[Trajectory]
    tensors: dict[str, Tensor]
    there: Tensor


class Store:
    """A folder of shards. Opening reads headers only; what cannot be read stands in `broken` with its reason.

    Several folders can be read as one. Raises UserError when there is no usable shard, or when shards are of different
    spaces (another model's features).
    """

    def __init__(self, *folders: str | Path) -> None:
        self.folders = [Path(f) for f in folders]
        self.broken: dict[str, str] = {}
        self.records: list[Trajectory] = []
        self.paths: list[Path] = []  # of the readable shards
        self._sound: set[int] = set()  # shards whose digest was compared; once is enough
        content = hashlib.blake2b(digest_size=16)
        spaces: dict[Space, Path] = {}
        for path in self._files():
            try:
                with TensorFile(path) as file:
                    records, space, digest = _header(file)
                    content.update(f"{digest} {file.header.metadata[RECORDS]}".encode())
            except UserError as error:
                self._skip(path, str(error))
                continue
            spaces.setdefault(space, path)
            self.paths.append(path)
            self.records.extend(records)
        where = ", ".join(str(f) for f in self.folders)
        if not self.paths:
            broken = f"; {len(self.broken)} broken ones, first {next(iter(self.broken))}" if self.broken else ""
            raise UserError(f"{where}: no shards of trajectories{broken}; `dodgeburn artifacts collect` makes them")
        if len(spaces) > 1:
            first, second = list(spaces.values())[:2]
            raise UserError(f"{first} and {second} are trajectories of different models: their features do not compare")
        self.space = next(iter(spaces))
        self.digest = content.hexdigest()  # of samples, records and labels: what a training learns from

    def _files(self) -> list[Path]:
        found = []
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; `dodgeburn artifacts collect` makes one")
            found += sorted(folder.glob("shard-*.safetensors"))
        return found

    def _skip(self, path: Path, reason: str) -> None:
        if str(path) not in self.broken:
            self.broken[str(path)] = reason
            warnings.warn(f"shard left out: {reason}", DodgeburnWarning, stacklevel=3)

    def has(self, name: str) -> bool:
        """Whether all shards have this tensor."""
        for path in self.paths:
            with TensorFile(path) as file:
                if name not in file.keys():
                    return False
        return True

    def __len__(self) -> int:
        """Trajectories."""
        return len(self.records)

    def shards(self, names: Sequence[str] | None = None, order: Sequence[int] | None = None) -> Iterator[Shard]:
        """The shards one after another, as files are sorted or in `order`; broken ones are skipped and named.

        names: which tensors (None: all).
        """
        for i in range(len(self.paths)) if order is None else order:
            try:
                shard = read_shard(self.paths[i], names, check=i not in self._sound)
            except UserError as error:
                self._skip(self.paths[i], str(error))
                continue
            self._sound.add(i)
            yield shard

    def batches(
        self, size: int, names: Sequence[str] = SAMPLE_TENSORS, seed: int | None = None,
        where: Callable[[Trajectory], bool] = lambda record: True, shards_at_once: int = 8,
    ) -> Iterator[Batch]:  # fmt: skip
        """All trajectories that `where` lets through, `size` at a time, each once.

        seed: shuffle the order of the shards, and trajectories among `shards_at_once` of them, which is what is held in
        memory; None: as stored.
        """
        rng = None if seed is None else np.random.default_rng(seed)
        order = np.arange(len(self.paths)) if rng is None else rng.permutation(len(self.paths))
        waiting: list[tuple[Trajectory, dict[str, Tensor]]] = []
        for start in range(0, len(order), shards_at_once):
            fresh = []
            for shard in self.shards(names, order[start : start + shards_at_once].tolist()):
                fresh += [(r, _cut(shard, i, names)) for i, r in enumerate(shard.records) if where(r)]
            waiting += [fresh[i] for i in rng.permutation(len(fresh))] if rng is not None else fresh
            while len(waiting) >= size:
                yield padded(waiting[:size])
                del waiting[:size]
        if waiting:
            yield padded(waiting)


def _cut(shard: Shard, i: int, names: Sequence[str]) -> dict[str, Tensor]:
    rows = shard.rows(i)
    found = {}
    for name in names:
        tensor = shard.tensors[name]
        found[name] = tensor[i : i + 1] if name in TRAJECTORY_TENSORS else tensor[rows]
    return found


def padded(items: Sequence[tuple[Trajectory, dict[str, Tensor]]]) -> Batch:
    """Trajectories of different lengths as one batch, filled up with zeros; `mask` and `picture` become [b, ...]."""
    lengths = [max((len(t) for n, t in tensors.items() if n not in TRAJECTORY_TENSORS), default=0)
               for _, tensors in items]  # fmt: skip
    there = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    out: dict[str, Tensor] = {}
    for name in items[0][1]:
        rows = [tensors[name] for _, tensors in items]
        if name in TRAJECTORY_TENSORS:
            out[name] = torch.cat(rows)
        else:
            out[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Batch([record for record, _ in items], out, there)


def type_targets(records: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """Which types each trajectory shows, fp32 [n, types] of 0 and 1, and bool [n]: whether anybody has said."""
    rows = [[float(s >= 1) for s in (r.label.types if r.label and r.label.types else (0,) * len(TYPES))]
            for r in records]  # fmt: skip
    return torch.tensor(rows), torch.tensor([bool(r.label and r.label.types) for r in records])
