"""Many merges of two models, seen and measured side by side, without writing one of them.

The brute-force search of the Proteus x DPO model card and more: every method with every preset and base, the same
prompts and seeds for all, each variant merged into the live model. The pictures of a variant are one file, so an
interrupted run goes on where it was. `ranking` turns pictures into rows; `compare_report` writes the tables, sheets and
the page; `search` proposes further merges.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dodgeburn.checkpoint.embedding_file import read_embedding
from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore, check_job_folder
from dodgeburn.merge.compare_measure import Measurer, choose_gauges
from dodgeburn.merge.compare_models import PARENTS, OpenModels, open_models, typed
from dodgeburn.merge.compare_pictures import PictureMaker, Twins, about_merge, load_pictures, part_name, twin_notes
from dodgeburn.merge.compare_settings import CompareSettings
from dodgeburn.merge.gauges import Gauge, PictureReader, gauge_of
from dodgeburn.merge.ranking import Row, rank
from dodgeburn.merge.search import Search, SearchSettings, Trial, grade, run_search
from dodgeburn.merge.variants import Variant
from dodgeburn.pocket.captions import Asked, parse

__all__ = ["PARENTS", "CompareSettings", "Comparison", "compare"]


@dataclass
class Comparison:
    """A finished comparison: the ranked rows of the variants, those of the parents A and B, and what made them."""

    folder: Path
    settings: CompareSettings
    models: dict[str, dict[str, str]]  # A, B and others: name without folders, sha256
    typed: dict[str, str]  # the same models, as a command needs them
    layout: str
    rows: list[Row]
    parents: list[Row]
    variants: dict[str, Variant]
    asked: list[Asked]  # by prompt
    notes: list[str]
    seconds: float  # of this run
    resumed: int  # picture files that an earlier run had made
    full_reads: float  # bytes read to merge, in units of all models' tensors once
    device: str
    read_by: str | None  # "reader", or None where nothing could be read
    gauge: Gauge | None  # who that is
    held_out: dict[str, Any] | None
    search: Search | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def proxy(self) -> bool:
        """Whether figures are a proxy's scores, and no shares."""
        return self.gauge is not None and self.gauge.proxy

    @property
    def score(self) -> str:
        """What fidelity is called."""
        return "prompt fidelity" if self.gauge is None else self.gauge.score

    @property
    def a(self) -> dict[str, str]:
        return self.models["A"]

    @property
    def b(self) -> dict[str, str]:
        return self.models["B"]

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
    reader: PictureReader | Gauge | None = None,
    tokenizer: str | Path | None = None,
    *,
    judge: PictureReader | Gauge | None = None,
    more: Sequence[str | Path] = (),
    base_model: str | Path | None = None,
    search: SearchSettings | None = None,
    embeddings: Sequence[str | Path] = (),
) -> Comparison:
    """Compare merges of A and B, the settings' grid and variants; all shares are B's. Writes pictures, tables and
    report.html to `out`.

    Models are packaged names, files, diffusers folders or hub ids, of one architecture and size; `more` and
    `base_model` go to the methods that take them. `reader` reads the pictures and decides the ranks (gauges.py), and
    `judge` reads them too; by default the package's own, for models of the pocket world only. `search`: propose further
    merges and grade what was found (search.py). `embeddings`: files that prompts can name. Run again with the same
    settings on the same folder, it makes only what is missing. Raises UserError for bad input, for a folder that holds
    something else, and for a search among pictures that nobody can read.
    """
    from dodgeburn.merge.compare_report import write_outputs  # it needs Comparison from here

    started = time.perf_counter()
    others, original = [str(name) for name in more], None if base_model is None else str(base_model)
    variants = settings.all_variants(others, original)
    if search is not None:
        search.check_disjoint(settings)
    check_job_folder(Path(out))
    with open_models(a, b, variants, device, dtype, tokenizer) as models:
        live, model = models.live, models.model
        model.embeddings = [read_embedding(path, model.text_widths) for path in embeddings]
        gauge, second, reading_notes = choose_gauges(gauge_of(reader), gauge_of(judge), model, settings.prompts)
        if search is not None and (gauge is None or not any(gauge.knows(settings.prompts))):
            raise UserError(f"nothing to search by: {reading_notes[-1]}")
        store = PartStore(
            out, {**_job(settings, search, models), **({} if search is None or gauge is None else gauge.job)}
        )
        maker = PictureMaker(live, settings.prompts, settings.seeds, settings.generate, store)
        twins = Twins(live)
        same = {variant.name: first for variant in variants if (first := twins.first(variant)) is not None}
        with store.begun():
            maker.make([variant for variant in variants if variant.name not in same], parents=True)
        measurer = Measurer(maker, gauge, second)
        rows = [
            measurer.row(v, same.get(v.name), live.plan(v.merge, v.more, v.base_model).plan.blocks)
            for v in tqdm(variants, desc="measure", disable=None, leave=False)
        ]
        trials: list[Trial] = []
        if search is not None:
            trials, found = run_search(search, settings, measurer, twins, others, original)
            rows += found
            variants += [trial.variant for trial in trials]
            same |= {row.name: row.same_as for row in found if row.same_as is not None}
        parents = measurer.parents()
        ranked, held_out = rank(rows, parents)
        result = Comparison(
            folder=store.folder, settings=settings, models=models.facts,
            typed={**{name: typed(name) for name in models.facts}, "A": typed(a), "B": typed(b)},
            layout=model.layout.title, rows=ranked, parents=parents, variants={v.name: v for v in variants},
            asked=[parse(prompt) for prompt in settings.prompts],
            notes=models.notes + reading_notes + twin_notes(same), seconds=0.0, resumed=maker.resumed,
            full_reads=0.0, device=str(model.device),
            read_by=None if gauge is None else gauge.name, gauge=gauge, held_out=held_out,
        )  # fmt: skip
        if search is not None:
            result.search, resumed = grade(search, settings, measurer, trials, ranked, result.variants)
            result.resumed += resumed
        live.restore()
        result.full_reads = live.shelf.full_reads
    result.seconds = time.perf_counter() - started
    write_outputs(result)
    result.seconds = time.perf_counter() - started
    return result


def _job(settings: CompareSettings, search: SearchSettings | None, models: OpenModels) -> dict[str, Any]:
    found = settings.model_dump(mode="json")
    found["variants"] = [{"name": v.name, **about_merge(v)} for v in settings.variants]
    others: Mapping[str, str] = {
        facts["name"]: facts["sha256"] for key, facts in models.facts.items() if key not in PARENTS
    }
    return {
        "kind": "compare", "format": 2, "a": models.facts["A"]["sha256"], "b": models.facts["B"]["sha256"],
        "others": dict(others), "device": models.model.device.type,
        "dtype": str(models.model.dtype).removeprefix("torch."), **found,
        "search": None if search is None else search.job(),
        **({"embeddings": {e.name: e.sha256 for e in models.model.embeddings}} if models.model.embeddings else {}),
    }  # fmt: skip
