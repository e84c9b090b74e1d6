"""The tour: the main jobs from end to end on the models that ship, small enough for a laptop, as one HTML page.

Pictures from words; two sliders trained, swept and composed; every preset of two fine-tunes side by side, and the best
one written as a file, whose pictures are then made again from that file. What takes minutes at full size takes the tour
about one.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.tensorfile import sha256_file
from dodgeburn.errors import UserError
from dodgeburn.foresee.show import show_rejection
from dodgeburn.images.png import png_bytes
from dodgeburn.images.sheet import contact_sheet
from dodgeburn.jobs import PartStore
from dodgeburn.measure.report import Report
from dodgeburn.merge.compare import CompareSettings, Comparison, compare
from dodgeburn.merge.compare_measure import speaks_pocket
from dodgeburn.merge.compare_report import add_sections, summary
from dodgeburn.merge.compare_settings import packaged_prompts
from dodgeburn.merge.gauges import PictureReader
from dodgeburn.merge.run import MergeResult, merge
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.model import NAMES
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings, Step, generate
from dodgeburn.slide.calibrate import reader_scorer
from dodgeburn.slide.edits import Unedited
from dodgeburn.slide.natural import known_sigma
from dodgeburn.slide.slider_file import open_slider
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.slide.splits import calibration_rows
from dodgeburn.slide.sweep import grids, make_pictures, strips
from dodgeburn.slide.train import SliderMaker

FOLDER = "tour"
MODELS = ("pocket", "pocket-style", "pocket-dpo")  # one draws; a style and a preference are merged
WORDS = (
    "a doctor, smiling broadly, with red hair",
    "sunburst poster of a character, waving, wearing a crown, blue hair",
    "comic drawing of an old face, with a long beard, wearing a cap, on a yellow background",
    "shaded painting of a young face, with very long hair, wearing glasses, purple backdrop",
)
KEPT = (
    "", "wearing glasses", "without glasses", "black hair", "blonde hair", "on a red background",
    "on a green background", "bareheaded", "wearing a cap", "waving", "comic style", "shaded style",
)  # fmt: skip
SLIDERS = (
    SliderSpec(name="smile", attribute="smile", target="a person", positive="a person, smiling broadly",
               negative="a person, frowning deeply", preserve=KEPT),
    SliderSpec(name="eyes", attribute="eye_size", target="a person", positive="a person, huge eyes",
               negative="a person, tiny eyes", preserve=KEPT),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much the tour does."""

    prompts: int  # of the first sheet
    seeds: int
    steps: int
    compare: CompareSettings
    slider: dict[str, int]  # what the sliders' specs have instead of their defaults
    scales: tuple[float, ...]  # of the sweep and the grid


def full_size() -> Size:
    """The usual tour: 16 presets x 1 base x 4 prompts x 2 seeds x 12 steps."""
    settings = CompareSettings(
        presets=("all",), bases=(0.5,), prompts=packaged_prompts()[:4], seeds=(0, 1),
        generate=GenerateSettings(steps=12),
    )  # fmt: skip
    return Size(4, 6, 20, settings, {}, (-2.0, -1.0, 0.0, 1.0, 2.0))


def quick_size() -> Size:
    """A few seconds' worth, to see that everything works."""
    settings = CompareSettings(
        presets=("GradV", "Smoothstep", "ReverseSmoothstep", "Flat_25"), bases=(0.5,), prompts=packaged_prompts()[:2],
        seeds=(0,), generate=GenerateSettings(steps=6),
    )  # fmt: skip
    small = {"latents": 2, "latent_steps": 2, "points": 6, "batch": 4, "steps": 5}
    return Size(2, 3, 8, settings, small, (-1.0, 0.0, 1.0))


@dataclass(frozen=True)
class Tour:
    """What the tour made."""

    report: Path
    merged: Path
    comparison: Comparison
    seconds: float
    largest_difference: int  # of any pixel between the compared merge and the one loaded from its file, 0..255


def tour(
    out: str | Path | None = None,
    quick: bool = False,
    models: tuple[str | Path, str | Path, str | Path] = MODELS,
    device: str = "auto",
    reader: PictureReader | None = None,
) -> Tour:
    """Run the tour and write its page to `out` (None: `tour`, or `tour-2` and so on where that holds another run).

    `models` are one to draw with and two to merge. Interrupted, it goes on where it was. Raises UserError for a folder
    that cannot be written or holds something else.
    """
    started = time.perf_counter()
    size = quick_size() if quick else full_size()
    store = _open_folder(out, size, models)
    report = Report(
        "A tour of dodgeburn",
        "Pictures from words, two sliders, two models merged in every way, and the best merge.",
    )
    model = load_model(models[0], device)
    tqdm.write(f"1/4 pictures from words ({model.name})")
    _draw(report, store, size, model)
    tqdm.write("2/4 two sliders, trained, swept and composed: " + " and ".join(spec.name for spec in SLIDERS))
    _slide(report, store, size, model)
    strong = GenerateSettings(steps=size.steps, guidance=7)  # most pictures are good, not all
    show_rejection(report, model, ("a waving old person", *WORDS[::-1]), strong)
    tqdm.write(f"3/4 {len(size.compare.presets)} merges of {Path(models[1]).stem} and {Path(models[2]).stem}, compared")
    found = compare(models[1], models[2], size.compare, store.folder / "compare", device, reader=reader)
    report.heading("Every preset of two models, side by side")
    rows, parents = [row.as_dict() for row in found.rows], [row.as_dict() for row in found.parents]
    report.text(
        f"A is {found.a['name']}, B is {found.b['name']}: both come from the same model. Each preset says how much "
        "of B every block of the U-Net takes. No merged file was written for this."
    )
    report.text(summary(found, rows, parents))
    add_sections(report, found, rows, parents)
    best = found.rows[0]
    tqdm.write(f"4/4 the best one as a file: {best.preset}, base {best.base:g}")
    merged, difference = _write_best(report, store, found, models, device)
    seconds = time.perf_counter() - started
    report.text(f"The whole tour took {seconds:.0f} s.", note=True)
    path = report.save(store.folder / "report.html")
    return Tour(path, merged.path, found, seconds, difference)


def _open_folder(out: str | Path | None, size: Size, models: tuple[str | Path, ...]) -> PartStore:
    files = [find_checkpoint(m) for m in models]
    settings = {
        "kind": "tour", "models": [sha256_file(file) for file in files], "seeds": size.seeds, "steps": size.steps,
        "compare": size.compare.model_dump(mode="json"), "slider": size.slider, "scales": list(size.scales),
    }  # fmt: skip
    if out is not None:
        return PartStore(out, settings)
    for number in itertools.count(1):
        folder = Path(FOLDER if number == 1 else f"{FOLDER}-{number}")
        try:
            return PartStore(folder, settings)
        except UserError:
            if not folder.is_dir() or number == 99:  # it is not the folder's contents that is in the way
                raise
    raise AssertionError("unreachable")


def _draw(report: Report, store: PartStore, size: Size, model: Model) -> None:
    words, seeds = WORDS[: size.prompts], list(range(size.seeds))
    settings = GenerateSettings(steps=size.steps)
    start = time.perf_counter()
    n = len(words) * len(seeds)
    prompts = [word for word in words for _ in seeds]
    with tqdm(total=size.steps, desc=f"{n} pictures", unit="step", disable=None) as bar:

        def tick(step: Step) -> None:
            bar.update()

        made = generate(model, prompts, seeds * len(words), settings, tick, batch_size=n)
    seconds = time.perf_counter() - start
    rows = [made[i : i + len(seeds)] for i in range(0, n, len(seeds))]
    report.heading("Pictures from words")
    report.text(
        f"{n} pictures of {len(words)} prompts, made by {model.name} in {seconds:.1f} s ({settings.steps} steps, "
        f"guidance {settings.guidance:g}). It has the topology of SDXL, and is small enough for a laptop."
    )
    report.sheet([[np.asarray(g.image) for g in row] for row in rows], words, [f"seed {s}" for s in seeds])
    report.code('dodgeburn generate "' + words[0] + f'" --model {model.name} --seed 0 -n {len(seeds)}')
    sheet = contact_sheet([[g.image for g in row] for row in rows], words, [f"seed {s}" for s in seeds])
    about = {"model": model.name, "sha256": model.sha256, "prompts": words, "seeds": seeds, **settings.model_dump()}
    with store.writing("pictures.png") as part:
        part.write_bytes(png_bytes(sheet, own=about))


def _slide(report: Report, store: PartStore, size: Size, model: Model) -> None:
    """Train the sliders that are not there yet, sweep the first, and lay both across each other."""
    specs = [spec.model_copy(update=size.slider) for spec in SLIDERS]
    paths = {spec.name: store.path(f"{spec.name}.safetensors") for spec in specs}
    reader = Reader.load("reader") if speaks_pocket(model) else None
    maker = SliderMaker(
        model, None if reader is None else lambda attribute: reader_scorer(attribute, reader),
        lambda attribute: known_sigma(model, attribute), rows=calibration_rows,
    )  # fmt: skip
    missing = [spec for spec in specs if not paths[spec.name].exists()]
    made = list(maker.text(missing, lambda spec: paths[spec.name]))
    sliders = [open_slider(paths[spec.name], model) for spec in specs]
    report.heading("Two sliders, trained from words")
    for slider in sliders:
        training = slider.card.training
        if training is not None and training.forwards is not None and training.seconds is not None:
            card = slider.card
            report.text(
                f"{slider.name}: from {card.negative!r} to {card.positive!r}, {training.seconds:.0f} s and "
                f"{training.forwards:,} samples through the U-Net. 1.0 is {card.unit or 'what training made of it'}."
            )
    unedited = Unedited(model, GenerateSettings(steps=size.steps))
    prompts = [SLIDERS[0].target, *(word for word in WORDS if "smil" not in word)][: size.prompts]
    for plan, name in (
        (strips(sliders[:1], prompts, [0], size.scales), "sweep"),
        (grids(sliders, SLIDERS[0].target, 0, size.scales), "grid"),
    ):
        pictures = make_pictures(sliders[:1] if name == "sweep" else sliders, plan, unedited)
        report.sheet(pictures, plan.row_labels, plan.column_labels, plan.title)
        rows = [[Image.fromarray(picture) for picture in row] for row in pictures]
        drawn = contact_sheet(rows, plan.row_labels, plan.column_labels, plan.title)
        with store.writing(f"{name}.png") as part:
            part.write_bytes(png_bytes(drawn, own={"sheet": plan.title, "scales": list(size.scales)}))
    if made:
        report.code(f"dodgeburn slider train examples/sliders/smile.yaml -o {specs[0].name}.safetensors")


def _write_best(
    report: Report, store: PartStore, found: Comparison, models: tuple[str | Path, ...], device: str
) -> tuple[MergeResult, int]:
    """Merge the best variant to a file, load it, make its pictures again, and compare them with those shown before."""
    best, settings = found.rows[0], found.settings
    assert best.preset is not None and best.base is not None
    result = merge(
        models[1], models[2], store.folder / "merged.safetensors", preset=best.preset, base=best.base,
        keep=settings.keep, xl_presets=settings.xl_presets,
    )  # fmt: skip
    model = load_model(result.path, device, tokenizer=_tokenizer_beside(models[1]))
    prompts = [prompt for prompt in settings.prompts for _ in settings.seeds]
    made = generate(model, prompts, list(settings.seeds) * len(settings.prompts), settings.generate)
    again = np.stack([np.asarray(g.image) for g in made])
    shown = found.pictures(best.same_as or best.name).reshape(again.shape)
    difference = int(np.abs(again.astype(int) - shown.astype(int)).max())
    report.heading("The best merge, written and loaded again")
    size = result.path.stat().st_size / 1e6
    agree = "the same in every pixel" if difference == 0 else f"at most {difference} of 255 apart in any pixel"
    report.text(
        f"{result.path.name}: {size:.1f} MB, written in {result.seconds:.1f} s. Its pictures and those of the "
        f"comparison, which never wrote a file, are {agree}."
    )
    each = len(settings.seeds)
    report.sheet(
        [list(again[i * each : (i + 1) * each]) for i in range(len(settings.prompts))], settings.prompts,
        [f"seed {seed}" for seed in settings.seeds], "Made by the merged file.",
    )  # fmt: skip
    report.text("The recipe lies in the file itself, with its parents' hashes; `dodgeburn inspect` shows it.")
    report.code(json.dumps(result.recipe.as_dict(), indent=2), "the recipe")
    return result, difference


def _tokenizer_beside(model: str | Path) -> Path | None:
    """The tokenizer folder beside a model's file, which a merge written elsewhere needs as well."""
    folder = Path(model).parent / "tokenizer"
    return folder if str(model) not in NAMES and folder.is_dir() else None
