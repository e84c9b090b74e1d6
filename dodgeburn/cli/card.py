"""dodgeburn card: a model card with a gallery, from a checkpoint's metadata and pictures."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.checkpoint.card import Facts, Shown, card_text, facts_of
from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.cli.options import parse
from dodgeburn.cli.picture_files import slug, writable_folder
from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.images.png import KINDS, read_png

if TYPE_CHECKING:
    from dodgeburn.models.model import Model

HELP = "write a model card with a gallery for a checkpoint"
EXAMPLE = "dodgeburn card pocket-style -o card"
MOST_PICTURES = 64
POCKET_PROMPTS = (
    "a doctor, smiling broadly, with red hair",
    "sunburst poster of a character, waving, wearing a crown, blue hair",
    "comic drawing of an old face, with a long beard, wearing a cap, on a yellow background",
    "shaded painting of a young face, with very long hair, wearing glasses, purple backdrop",
)
PROMPTS = (
    "portrait of an old fisherman, natural light",
    "a tiny robot taking a break under a tree in the garden",
    "a lighthouse on a cliff in a storm, oil painting",
    "still life with lemons and a blue jug",
)


@dataclass
class Card:
    """Write README.md with YAML front matter, gallery, recipe, recommended settings and hashes, and its pictures.

    Pictures come from a folder (ours, A1111's or ComfyUI's: their settings are read), or are made with the model.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .safetensors file, or a packaged model such as pocket-style."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("card")
    """Folder for README.md and images/; made if it is not there."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with pictures for the gallery; none: some are made."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """Prompts of the pictures to make; none: four of ours."""
    negative: str = ""
    """Negative prompt of the pictures to make."""
    steps: int = 20
    """Steps of the pictures to make."""
    title: str | None = None
    """Name of the model; none: what the file says, or its name."""
    license: str | None = None
    """Licence id of the Hub, such as apache-2.0; none: what the file says."""
    base_model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID ...")] = ()
    """Hub ids (owner/name) of the models it comes from."""
    tokenizer: Path | None = None
    """Folder with a CLIP tokenizer, to make pictures with a single file of real Stable Diffusion."""
    device: str = "auto"
    """auto, cpu, cuda or mps, to make pictures."""
    force: bool = False
    """Replace a README.md that is there."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn card`; raises UserError for bad input."""
    options = parse(Card, args, "card", EXAMPLE)
    if options.images is not None and options.prompt:
        raise UserError("--prompt has no effect with --images: those pictures are made already")
    facts = facts_of(find_checkpoint(options.checkpoint), options.title)
    readme = options.out / "README.md"
    if readme.exists() and not options.force:
        raise UserError(f"{readme} is there already: choose another folder, or replace it with --force")
    card_text(facts, (), options.license, options.base_model)  # bad ids are refused before any work
    given = _given(options.images) if options.images is not None else []
    with said_at_once():
        _check_models(facts, given)
    writable_folder(options.out / "images")
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    shown = _copy(given, options.out) if options.images is not None else _make(options, facts.stock)
    from dodgeburn.checkpoint.tensorfile import write_atomic

    write_atomic(readme, card_text(facts, shown, options.license, options.base_model).encode("utf-8"))
    print(f"card: {readme}, {len(shown)} pictures")
    if options.json:
        print(json.dumps({"card": str(readme), "pictures": [vars(p) for p in shown], "sha256": facts.sha256}))
    return 0


_SHEET = re.compile(r"-sheet(-\d+)?$")


def _given(folder: Path) -> list[tuple[Path, Shown]]:
    """The folder's pictures with what they say; UserError when there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --images takes a folder with pictures")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in KINDS and not _SHEET.search(p.stem))
    if not paths:
        raise UserError(f"{folder} has no pictures: expected {', '.join(KINDS)}")
    if len(paths) > MOST_PICTURES:
        raise UserError(f"{folder} has {len(paths)} pictures: a gallery takes at most {MOST_PICTURES}, choose some")
    return [(path, _said(path)) for path in paths]


def _check_models(facts: Facts, given: list[tuple[Path, Shown]]) -> None:
    """A warning where pictures say that another model made them: a card shows what its own model does."""
    others = [
        (path.name, shown.settings["Model"])
        for path, shown in given
        if shown.settings.get("Model hash", facts.sha256[:10]) != facts.sha256[:10] and "Model" in shown.settings
    ]
    if others:
        warnings.warn(
            f"{len(others)} of {len(given)} pictures say that another model made them ({others[0][0]}: "
            f"{others[0][1]}): a card is to show what {facts.file} draws",
            DodgeburnWarning,
            stacklevel=3,
        )


def _said(path: Path) -> Shown:
    """A picture's prompt and settings: A1111's infotext, which our pictures carry too, or ComfyUI's graph."""
    text, url = read_png(path), f"images/{path.name}"
    if text.infotext is not None and text.infotext.settings:
        return Shown(url, text.infotext.prompt, text.infotext.negative, text.infotext.settings)
    if text.graph is not None:
        from dodgeburn.images.comfy import read_graph

        graph = read_graph(text.graph)
        if graph is not None:
            settings = {"Sampler": graph.sampler, "Schedule type": graph.scheduler, "Steps": str(graph.steps),
                        "CFG scale": f"{graph.guidance:g}", "Size": f"{graph.width}x{graph.height}"}  # fmt: skip
            return Shown(url, graph.prompt, graph.negative, settings)
    return Shown(url)


def _copy(given: list[tuple[Path, Shown]], out: Path) -> list[Shown]:
    for path, _ in given:
        target = out / "images" / path.name
        if target.resolve() != path.resolve():
            shutil.copyfile(path, target)
    return [shown for _, shown in given]


def _make(options: Card, stock: bool) -> list[Shown]:
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model
    from dodgeburn.sampling.loop import GenerateSettings, Step, generate
    from dodgeburn.sampling.saving import save_picture

    settings = GenerateSettings(steps=options.steps, negative=options.negative)
    model: Model = load_model(options.checkpoint, options.device, tokenizer=options.tokenizer)
    prompts = list(options.prompt or (PROMPTS if stock else POCKET_PROMPTS))
    shown = []
    with tqdm(total=len(prompts) * settings.steps, unit="step", desc="gallery", disable=None) as bar:

        def progress(step: Step) -> None:
            bar.update(len(step.indices))

        for made in generate(model, prompts, list(range(len(prompts))), settings, progress):
            name = f"{made.index + 1:02d}-{slug(made.prompt)}.png"
            save_picture(options.out / "images" / name, made, model)
            shown.append(_said(options.out / "images" / name))
    return shown
