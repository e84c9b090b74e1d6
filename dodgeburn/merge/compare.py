"""Many merges of two models, seen and measured side by side, without writing one of them.

The brute-force search of the Proteus x DPO model card: every preset with every base, the same prompts and
seeds for all, each variant merged into the live model. The pictures of a variant are one file, so an
interrupted run goes on where it was. `ranking` turns pictures into rows; `compare_report` writes the
tables, sheets and the page.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator
from tqdm import tqdm

from dodgeburn.checkpoint.metadata import configs_of
from dodgeburn.checkpoint.tensorfile import TensorFile, sha256_file
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.jobs import PartStore
from dodgeburn.merge.blocks import alphas, check_share
from dodgeburn.merge.compare_pictures import Variant, load_pictures, make_pictures, part_name, twin_notes, twins_of
from dodgeburn.merge.live import HeldTensors, LiveMerge, Tensors, stored_tensors
from dodgeburn.merge.plan import check_layouts
from dodgeburn.merge.presets import Convention, find_preset, preset_names
from dodgeburn.merge.ranking import Measured, PictureReader, Row, measure, rank
from dodgeburn.merge.settings import check_keep
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.pocket.model import NAMES, weights_path
from dodgeburn.sampling.loop import GenerateSettings

PARENTS = ("A", "B")


class CompareSettings(BaseModel):
    """What is compared. `presets` as names ("all": the card's 16, "published": all 38), `bases` B's shares outside the
    U-Net's blocks.

    Raises UserError for an unknown preset, a base outside 0..1, no prompts, and bad or repeated seeds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    presets: tuple[str, ...] = ("all",)
    bases: tuple[float, ...] = (0.4, 0.5, 0.6)
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    keep: tuple[str, ...] = ("text", "vae")  # A's text encoders and VAE, as the card did
    xl_presets: Convention = "curve"
    generate: GenerateSettings = GenerateSettings()

    @field_validator("presets", mode="before")
    @classmethod
    def _presets(cls, value: Iterable[str]) -> tuple[str, ...]:
        names: list[str] = []
        for name in [value] if isinstance(value, str) else value:
            word = name.strip().lower()
            if word in ("all", "published"):
                names += preset_names("card" if word == "all" else "published")
            else:
                names.append(find_preset(name).name)
        if not names:
            raise UserError("no presets to compare: name some, or all, or published")
        return tuple(dict.fromkeys(names))

    @field_validator("bases", mode="before")
    @classmethod
    def _bases(cls, value: Iterable[float]) -> tuple[float, ...]:
        bases = tuple(dict.fromkeys(check_share(base, "base") for base in value))
        if not bases:
            raise UserError("no bases to compare: give at least one number from 0 to 1")
        return bases

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Iterable[str]) -> tuple[str, ...]:
        prompts = tuple(dict.fromkeys(" ".join(prompt.split()) for prompt in value if prompt.strip()))
        if not prompts:
            raise UserError("no prompts to compare with: give at least one")
        return prompts

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Iterable[int]) -> tuple[int, ...]:
        seeds = tuple(int(seed) for seed in value)
        if not seeds:
            raise UserError("no seeds to compare with: give at least one")
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise UserError(f"seed is {seed}: give a whole number from 0 to 2^64 - 1")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seed {max(seeds, key=seeds.count)} is given twice: each seed counts once")
        return seeds

    @field_validator("keep", mode="before")
    @classmethod
    def _keep(cls, value: str | Iterable[str]) -> tuple[str, ...]:
        return check_keep(value)


@dataclass
class Comparison:
    """A finished comparison: the ranked rows of the variants, those of the parents A and B, and what made
    them.
    """

    folder: Path
    settings: CompareSettings
    a: dict[str, str]  # name and sha256
    b: dict[str, str]
    layout: str
    rows: list[Row]
    parents: list[Row]
    asked: list[Asked]  # by prompt
    notes: list[str]
    seconds: float  # of this run
    resumed: int  # picture files that an earlier run had made
    device: str
    read_by: str | None  # "reader", or None where nothing could be read
    held_out: dict[str, Any] | None
    files: dict[str, str] = field(default_factory=dict)

    def pictures(self, name: str) -> np.ndarray:
        """Pictures of "A", "B" or a variant: uint8 [prompts, seeds, h, w, 3]."""
        found = load_pictures(self.folder / part_name(name))
        if found is None:
            raise UserError(f"{self.folder / part_name(name)} is missing or damaged: run the comparison again")
        return found


def compare(
    a: str | Path,
    b: str | Path,
    settings: CompareSettings,
    out: str | Path,
    device: str = "auto",
    dtype: str | None = None,
    reader: PictureReader | None = None,
    tokenizer: str | Path | None = None,
) -> Comparison:
    """Compare every preset x base of A and B; all shares are B's. Writes pictures, tables and report.html
    to `out`.

    `a` and `b`: packaged names, .safetensors files, diffusers folders or hub ids, of one architecture and
    size. `reader` reads the pictures and decides the ranks; by default the
    package's reader, for models of the pocket world only, and then the judge reads them too. Run again
    with the same settings on the same folder, it makes only what is missing. Raises UserError for bad
    input, and for a folder that holds something else.
    """
    from dodgeburn.merge.compare_report import write_outputs  # it needs Comparison from here

    started = time.perf_counter()
    check_pair(a, b)
    model = load_model(a, device, dtype, tokenizer)
    side_a = stored_tensors(model)
    side_b, b_facts, notes = _open_b(b, model)
    check_layouts(side_a.header, side_b.header, str(a), str(b))
    live = LiveMerge(model, side_a, side_b, _shown(b))
    variants = [
        Variant(preset, base, alphas(model.layout, preset, base, None, settings.xl_presets))
        for base in settings.bases
        for preset in settings.presets
    ]
    for line in live.plan(variants[0].shares, settings.keep).warnings():
        notes.append(line)
        warnings.warn(line, DodgeburnWarning, stacklevel=2)
    a_facts = {"name": _shown(a), "sha256": model.sha256}
    store = PartStore(out, _job(settings, a_facts, b_facts, model))
    twins = twins_of(live, variants, settings.keep)
    resumed = make_pictures(
        live, variants, twins, settings.prompts, settings.seeds, settings.generate, settings.keep, store
    )
    live.restore()
    for side in (side_a, side_b):
        if isinstance(side, TensorFile):
            side.close()

    asked = [parse(prompt) for prompt in settings.prompts]
    reader, judge, reading_notes = _choose_readers(reader, model, asked)
    rows, parents = _measure(store, variants, twins, settings, asked, reader, judge)
    ranked, held_out = rank(rows, parents)
    result = Comparison(
        folder=store.folder, settings=settings, a=a_facts, b=b_facts, layout=model.layout.title, rows=ranked,
        parents=parents, asked=asked, notes=notes + reading_notes + twin_notes(twins),
        seconds=time.perf_counter() - started, resumed=resumed, device=str(model.device),
        read_by=getattr(reader, "name", type(reader).__name__) if reader is not None else None, held_out=held_out,
    )  # fmt: skip
    write_outputs(result)
    result.seconds = time.perf_counter() - started
    return result


# ----------------------------------------------------------------------------------------------------- inputs


def read_prompts(path: str | Path | None) -> tuple[str, ...]:
    """One prompt a line; empty lines and those beginning with # are left out. None: the package's own eight.

    Raises UserError for a missing, empty or unreadable file.
    """
    if path is None:
        text = files("dodgeburn.pocket").joinpath("compare_prompts.txt").read_text(encoding="utf-8")
        where = "the packaged prompts"
    else:
        where = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file: expected one prompt a line, in UTF-8") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))
    if not prompts:
        raise UserError(f"{where} has no prompts: expected one a line (lines beginning with # are left out)")
    return prompts


def _single_file(name: str | Path) -> Path | None:
    """The file that the name means, as `load_model` understands it; None for folders and hub ids."""
    if str(name) in NAMES:
        return weights_path(str(name))
    return Path(name) if Path(name).is_file() else None


def check_pair(a: str | Path, b: str | Path) -> None:
    """Refuse two files that cannot be merged before anything is loaded, from their headers."""
    path_a, path_b = _single_file(a), _single_file(b)
    if path_a is not None and path_b is not None:
        with TensorFile(path_a) as one, TensorFile(path_b) as two:
            check_layouts(one.header, two.header, path_a.name, path_b.name)


def _open_b(b: str | Path, model: Model) -> tuple[Tensors, dict[str, str], list[str]]:
    """B's stored tensors, its name and hash, and notes on configs that differ from A's. B is never loaded
    as a model if it is a file: its pictures, too, are made in A's modules.
    """
    path = _single_file(b)
    notes: list[str] = []
    if path is None:
        other = load_model(b, "cpu", "stored")
        configs: Mapping[str, Any] = other.configs
        side: Tensors = HeldTensors(other)
        sha256 = other.sha256
    else:
        file = TensorFile(path)
        configs = configs_of(file.header.metadata) or {}
        side = file
        sha256 = sha256_file(path)
    for part, key in (("scheduler", "prediction_type"), ("vae", "scaling_factor")):
        ours, theirs = model.configs[part].get(key), configs.get(part, {}).get(key)
        if theirs is not None and ours != theirs:
            line = f"A's {key} is {ours}, B's is {theirs}: everything is sampled A's way, so B will look wrong"
            notes.append(line)
            warnings.warn(line, DodgeburnWarning, stacklevel=3)
    return side, {"name": _shown(b), "sha256": sha256}, notes


def _shown(name: str | Path) -> str:
    """A model's name without local folders (hub ids keep their owner)."""
    path = Path(str(name))
    return path.name if path.exists() or path.suffix else str(name)


def _job(settings: CompareSettings, a: Mapping[str, str], b: Mapping[str, str], model: Model) -> dict[str, Any]:
    return {
        "kind": "compare", "format": 1, "a": a["sha256"], "b": b["sha256"], "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."), **settings.model_dump(mode="json"),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- measuring


def speaks_pocket(model: Model) -> bool:
    """Whether the model's words are those of the pocket world, so that its pictures may be read."""
    from dodgeburn.pocket.model import tokenizer

    return bool(model.tokenizers[0].get_vocab() == tokenizer().get_vocab())


def _choose_readers(
    reader: PictureReader | None, model: Model, asked: Sequence[Asked]
) -> tuple[PictureReader | None, PictureReader | None, list[str]]:
    """Who decides the ranks, and who reads the same pictures without a say: a search must not grade itself."""
    notes = []
    judge: PictureReader | None = None
    if reader is None and speaks_pocket(model):
        from dodgeburn.pocket.reader import Reader

        reader, judge = Reader.load("reader"), Reader.load("judge")
    if reader is None:
        notes.append(
            "The models are not of the pocket world, so there is no reader for their pictures: no prompt fidelity and "
            "no reader distance. Variants are ranked by pixel resemblance to the parent they resemble less."
        )
    empty = sum(not wishes for wishes in asked)
    if reader is not None and empty == len(asked):
        notes.append("No prompt names anything the reader knows, so there is no prompt fidelity to rank by.")
    elif reader is not None and empty:
        notes.append(f"{empty} of {len(asked)} prompts name nothing the reader knows; fidelity is over the others.")
    return reader, judge, notes


def _measure(
    store: PartStore,
    variants: Sequence[Variant],
    twins: Mapping[str, str],
    settings: CompareSettings,
    asked: Sequence[Asked],
    reader: PictureReader | None,
    judge: PictureReader | None,
) -> tuple[list[Row], list[Row]]:
    def pictures(name: str) -> np.ndarray:
        found = load_pictures(store.path(part_name(name)))
        if found is None:
            raise UserError(f"{store.path(part_name(name))} is damaged: run the same command again")
        return found

    parent_pictures = {name: pictures(name) for name in PARENTS}
    measured: dict[str, Measured] = {}
    read = {name: reader.read(_flat(p)) if reader else None for name, p in parent_pictures.items()}

    def measured_of(name: str) -> Measured:
        if name not in measured:
            shown = parent_pictures[name] if name in PARENTS else pictures(name)
            seen = read[name] if name in PARENTS else reader.read(_flat(shown)) if reader else None
            measured[name] = measure(
                shown, seen, asked, (parent_pictures["A"], read["A"]), (parent_pictures["B"], read["B"]),
                judge.read(_flat(shown)) if judge else None,
            )  # fmt: skip
        return measured[name]

    parents = [Row(name, None, None, measured_of(name)) for name in PARENTS]
    rows = []
    for variant in tqdm(variants, desc="measure", disable=None, leave=False):
        source = twins.get(variant.name, variant.name)
        row = Row(variant.name, variant.preset, variant.base, measured_of(source), shares=variant.shares)
        row.same_as = twins.get(variant.name)
        rows.append(row)
    return rows, parents


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[2:])
