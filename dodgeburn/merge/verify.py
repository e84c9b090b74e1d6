"""Whether a file is what its recipe makes of its parents: tensors derived again and compared byte by byte."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.header import FLOAT_DTYPES, Header, TensorInfo, torch_dtype
from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.metadata import NO_HASH, SPEC_HASH, recipe_of
from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.packaged import packaged_checkpoint
from dodgeburn.checkpoint.sources import Tensors, open_tensors, sha256_source
from dodgeburn.checkpoint.tensorfile import byte_view, sha256_tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.graph import Graph, ModelEntry
from dodgeburn.merge.open_graph import open_graph
from dodgeburn.merge.recipe import graph_of
from dodgeburn.merge.tiles import one_thread
from dodgeburn.models.as_single_file import open_as_single_file
from dodgeburn.pocket.model import NAMES

SAMPLES = 50
OUTSIDE = "none"  # tensors of no block, such as EMA copies
PIECE = 1 << 20  # values compared at once


@dataclass(frozen=True)
class TensorCheck:
    """One tensor: equal or not, how many of its values differ and by how much at most; `note` where its type, shape or
    presence differs.
    """

    name: str
    block: str
    equal: bool
    different: int = 0
    largest: float = 0.0
    note: str = ""


@dataclass
class Verification:
    """What was derived again and compared. `hash_equal`: whether the tensors' sha256 is the one that the file states
    (None if it states none).
    """

    file: Path
    kind: str
    parents: dict[str, Path]
    tensors: int
    seed: int | None  # of the sample; None: all tensors
    hash_equal: bool | None = None
    checks: list[TensorCheck] = field(default_factory=list)

    @property
    def different(self) -> list[TensorCheck]:
        return [check for check in self.checks if not check.equal]

    @property
    def equal(self) -> bool:
        """Whether nothing at all was found to differ."""
        return not self.different and self.hash_equal is not False

    def blocks(self) -> dict[str, dict[str, int]]:
        """Tensors checked and equal by block, in the model's order."""
        out: dict[str, dict[str, int]] = {}
        for check in self.checks:
            row = out.setdefault(check.block, {"checked": 0, "equal": 0})
            row["checked"] += 1
            row["equal"] += check.equal
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "file": self.file.name,
            "kind": self.kind,
            "parents": {name: path.name for name, path in self.parents.items()},
            "tensors": self.tensors,
            "checked": len(self.checks),
            "seed": self.seed,
            "equal": self.equal,
            "hash_equal": self.hash_equal,
            "blocks": self.blocks(),
            "different": [asdict(check) for check in self.different],
        }


def verify(
    file: str | Path,
    models: Iterable[str | Path] = (),
    samples: int | None = SAMPLES,
    seed: int | None = None,
) -> Verification:
    """Derive tensors of `file` again from its parents by the recipe in its metadata, and compare them bit for bit.

    Parents are looked for by name among the packaged models, beside the file and in `models` (folders, also below them,
    and files of any name), and known by their sha256. `samples` tensors are drawn over all blocks (None: all of them),
    by `seed` or at random. Raises UserError for a file without a recipe that can be run, and for parents that are
    missing or have another hash.
    """
    path = find_checkpoint(file)
    if samples is not None and samples < 1:
        raise UserError(f"{samples} samples: expected at least 1, or all")
    with ExitStack() as stack:
        source = stack.enter_context(open_tensors(path))
        recipe = recipe_of(source.header.metadata)
        if recipe is None:
            raise UserError(f"{path.name} has no dodgeburn.recipe in its metadata: only files made by one are verified")
        graph = _graph(recipe, path)
        places = find_parents(graph, path, models)
        opened = open_graph(stack, graph, lambda name, _: places[name])
        assert opened.layout is not None
        derived, written = opened.output, opened.output.as_written
        chosen, seed = _chosen(source, written, opened.layout, samples, seed)
        result = Verification(path, str(recipe.get("kind")), places, len(source.keys()), seed)
        with one_thread():
            checks = _checks(source, derived, written, opened.layout, chosen)
            order = {block: i for i, block in enumerate(opened.layout.all_blocks)}
            result.checks = sorted(checks, key=lambda check: order.get(check.block, len(order)))
        said = source.header.metadata.get(SPEC_HASH, "").removeprefix("0x")
        if said and path.is_file() and said != NO_HASH:
            result.hash_equal = said == sha256_tensors(path)
    return result


def _graph(recipe: Mapping[str, Any], path: Path) -> Graph:
    try:
        return graph_of(recipe)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


# ------------------------------------------------------------------------------------------------------ parents


def find_parents(graph: Graph, file: Path, models: Iterable[str | Path]) -> dict[str, Path]:
    """Where each model of the recipe is, by name and sha256; UserError that names all that are missing or others."""
    given = [Path(place).expanduser() for place in models]
    for place in given:
        if not place.exists():
            raise UserError(f"{place} does not exist: expected a folder with models, or a model")
    folders = [file.parent, *(place for place in given if place.is_dir())]
    hashes: dict[Path, str] = {}
    found: dict[str, Path] = {}
    wrong: list[str] = []
    for name, entry in graph.models.items():
        others = []
        for place in _candidates(entry, folders, given):
            if place not in hashes:
                hashes[place] = _sha256(place)
            if entry.sha256 in (None, hashes[place]):
                found[name] = place
                break
            if place.name == _file_name(entry):
                others.append(f"{place} has sha256 {hashes[place][:16]}…")
        if name not in found:
            wanted = f"{_file_name(entry)} ({str(entry.sha256)[:16]}…)"
            wrong.append(f"{wanted} {'is another file: ' + ', '.join(others) if others else 'is missing'}")
    if wrong:
        many = f"{len(wrong)} of {len(graph.models)} parents not found"
        raise UserError(f"{many}: {'; '.join(wrong)}; name their folder with --models")
    return found


def _file_name(entry: ModelEntry) -> str:
    return f"{entry.path}.safetensors" if entry.path in NAMES else entry.path


def _candidates(entry: ModelEntry, folders: Sequence[Path], given: Sequence[Path]) -> Iterator[Path]:
    name = _file_name(entry)
    if entry.path in NAMES:
        yield packaged_checkpoint(entry.path)
    files = [place for place in given if not place.is_dir() or (place / "model_index.json").is_file()]
    yield from (place for place in files if place.name == name)
    yield from (folder / name for folder in folders if (folder / name).exists())
    for folder in folders[1:]:
        yield from sorted(path for path in folder.rglob("*") if path.name == name and path.parent != folder)
    yield from (place for place in files if place.name != name)


def _sha256(path: Path) -> str:
    with open_as_single_file(path) as source:
        return sha256_source(source)


# ------------------------------------------------------------------------------------------------------ tensors


def _block(layout: Layout, name: str) -> str:
    return layout.block(name) or OUTSIDE


def _chosen(
    source: Tensors, written: Header, layout: Layout, samples: int | None, seed: int | None
) -> tuple[list[str], int | None]:
    """Names of tensors to be checked, in the file's order, and the seed of the draw: blocks take turns, so that each is
    looked into. What only one side has is always checked.
    """
    names = [*source.keys(), *(name for name in written.tensors if name not in source.header.tensors)]
    if samples is None or samples >= len(names):
        return names, None
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    draw = random.Random(seed)
    by_block: dict[str, list[str]] = {}
    for name in names:
        by_block.setdefault(_block(layout, name), []).append(name)
    for of_block in by_block.values():
        draw.shuffle(of_block)
    blocks = list(by_block)
    draw.shuffle(blocks)
    turns = Counter({block: 0 for block in blocks})
    chosen = {name for name in names if (name in written.tensors) != (name in source.header.tensors)}
    while len(chosen) < samples:
        block = min((b for b in blocks if turns[b] < len(by_block[b])), key=lambda b: turns[b])
        chosen.add(by_block[block][turns[block]])
        turns[block] += 1
    return [name for name in names if name in chosen], seed


def _checks(
    source: Tensors, derived: Tensors, written: Header, layout: Layout, names: Sequence[str]
) -> Iterator[TensorCheck]:
    from tqdm import tqdm

    total = sum(written.tensors[name].nbytes for name in names if name in written.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for name in names:
            block = _block(layout, name)
            here, wanted = source.header.tensors.get(name), written.tensors.get(name)
            if here is None or wanted is None:
                note = "not in the file" if here is None else "not of the recipe"
                yield TensorCheck(name, block, False, note=note)
                continue
            if (here.dtype, here.shape) != (wanted.dtype, wanted.shape):
                note = f"{here.dtype} {list(here.shape)}, the recipe gives {wanted.dtype} {list(wanted.shape)}"
                yield TensorCheck(name, block, False, note=note)
            else:
                different, largest = _compared(source, derived, name, here)
                yield TensorCheck(name, block, different == 0, different, largest)
            bar.update(wanted.nbytes)


def _compared(source: Tensors, derived: Tensors, name: str, info: TensorInfo) -> tuple[int, float]:
    """How many values differ in any bit, and by how much at most."""
    import torch

    read = derived.info(name).dtype
    if read == info.dtype and info.dtype not in FLOAT_DTYPES:
        return _compared_bytes(source, derived, name, info.nbytes)
    kind, wide = torch_dtype(info.dtype), torch_dtype(read)
    different, largest = 0, 0.0
    for start in range(0, info.numel, PIECE):
        count = min(PIECE, info.numel - start)
        stored, made = torch.empty(count, dtype=kind), torch.empty(count, dtype=wide)
        source.read_into(name, start * kind.itemsize, byte_view(stored))
        derived.read_into(name, start * wide.itemsize, byte_view(made))
        again = made.to(kind)
        unlike = (again.view(torch.uint8) != stored.view(torch.uint8)).reshape(count, -1).any(1)
        if bool(unlike.any()):
            different += int(unlike.sum())
            apart = (again[unlike].double() - stored[unlike].double()).abs()
            largest = max(largest, float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max()))
    return different, largest


def _compared_bytes(source: Tensors, derived: Tensors, name: str, size: int) -> tuple[int, float]:
    different = 0
    for start in range(0, size, PIECE):
        one, two = (memoryview(bytearray(min(PIECE, size - start))) for _ in range(2))
        source.read_into(name, start, one)
        derived.read_into(name, start, two)
        different += 0 if one == two else sum(a != b for a, b in zip(one, two, strict=True))
    return different, 0.0
