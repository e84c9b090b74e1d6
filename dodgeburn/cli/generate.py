"""dodgeburn generate: pictures from a prompt."""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.loop import Generated, GenerateSettings, Step

HELP = "make pictures from a prompt, with their settings inside the PNGs"
EXAMPLE = 'dodgeburn generate "a doctor, smiling broadly, with red hair" --model pocket --seed 0 -n 8'


@dataclass
class Generate:
    """Make pictures from a prompt: one PNG a seed, with all settings in its metadata, and a contact sheet.

    The same prompt, seed and settings give the same picture, whatever the batch size.
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What to draw. Over 75 tokens it is encoded in chunks of 75, as A1111 does."""
    model: str = "pocket"
    """A packaged model (pocket, pocket-style, pocket-bold), a .safetensors file, a folder or a hub id."""
    seed: int = 0
    """Seed of the first picture; the next ones count up from it."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"], metavar="COUNT")] = 1
    """How many pictures."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("pictures")
    """Folder for the pictures; made if it is not there."""
    negative: str = ""
    """What to keep away from."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Guidance scale (CFG); 1 is none, and twice as fast."""
    sampler: str = "dpmpp_2m"
    """ddim, euler, euler_a, dpmpp_2m or dpmpp_2m_sde."""
    spacing: str = "trailing"
    """Spacing of the noise levels: karras, exponential, or uniform: trailing, leading, linspace."""
    width: int | None = None
    """Pixels; none: what the model was trained at."""
    height: int | None = None
    """Pixels; none: what the model was trained at."""
    batch_size: int | None = None
    """Pictures at a time; none: chosen by their size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str | None = None
    """fp32, fp16 or bf16; none: fp16 on cuda, else fp32."""
    tokenizer: Path | None = None
    """Folder with a CLIP tokenizer, for a single file of real Stable Diffusion."""
    sheet: bool = True
    """Write a contact sheet too, if there are two pictures or more."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn generate`; raises UserError for bad input."""
    options = tyro.cli(
        Generate,
        args=args,
        prog="dodgeburn generate",
        description=f"{inspect.cleandoc(Generate.__doc__ or '')}\n\nexample: {EXAMPLE}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if not 1 <= options.n <= 100_000:
        raise UserError(f"-n is {options.n}: give a number of pictures from 1 to 100000")
    from dodgeburn.sampling.settings import GenerateSettings

    settings = GenerateSettings(
        steps=options.steps, guidance=options.guidance, sampler=options.sampler, spacing=options.spacing,
        width=options.width, height=options.height, negative=options.negative,
    )  # fmt: skip
    writable_folder(options.out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        found = _run(options, settings)
    for warning in caught:
        if issubclass(warning.category, DodgeburnWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    print(f"wrote {len(found['pictures'])} pictures to {options.out} in {found['seconds']} s")
    if found["sheet"]:
        print(f"sheet: {found['sheet']}")
    if options.json:
        print(json.dumps(found))
    return 0


def writable_folder(folder: Path) -> None:
    """Make the folder if it is not there and try writing in it; UserError now rather than after the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder {folder}: {error.strerror or error}") from error


def _run(options: Generate, settings: GenerateSettings) -> dict[str, Any]:
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model
    from dodgeburn.sampling.loop import stream
    from dodgeburn.sampling.saving import record_of, save_picture

    model = load_model(options.model, options.device, options.dtype, options.tokenizer)
    prompts, seeds = [options.prompt] * options.n, [options.seed + i for i in range(options.n)]
    began = time.perf_counter()
    made: list[Generated] = []
    pictures = []
    # disable=None: a bar on a terminal only
    with tqdm(total=options.n * settings.steps, unit="step", disable=None, file=sys.stderr, leave=False) as bar:

        def progress(step: Step) -> None:
            bar.update(len(step.indices))

        for picture in stream(model, prompts, seeds, settings, progress, options.batch_size):
            path = _free_name(options.out, f"{slug(options.prompt)}-{picture.seed}", record_of(picture, model))
            save_picture(path, picture, model)
            pictures.append({"path": str(path), "seed": picture.seed, "settings": picture.settings.model_dump()})
            made.append(picture)
    sheet = _write_sheet(options, made, model) if options.sheet and len(made) > 1 else None
    return {
        "pictures": pictures,
        "sheet": None if sheet is None else str(sheet),
        "model": model.name,
        "model_sha256": model.sha256,
        "seconds": round(time.perf_counter() - began, 3),
    }


def slug(prompt: str) -> str:
    """A prompt as a file name: lower case words with hyphens, 60 characters at most."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:60].rstrip("-") or "picture"


def _free_name(folder: Path, stem: str, record: dict[str, object]) -> Path:
    """A file name that is free, or holds the same picture already: nothing else is overwritten."""
    from dodgeburn.images.png import read_png

    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if not path.exists():
            return path
        try:
            if read_png(path).own == json.loads(json.dumps(record)):
                return path
        except UserError:
            pass  # something else under this name: leave it alone
        number += 1


def _write_sheet(options: Generate, made: list[Generated], model: Model) -> Path:
    from dodgeburn.images.png import write_png
    from dodgeburn.images.sheet import contact_sheet
    from dodgeburn.sampling.saving import infotext_of, record_of

    columns = min(len(made), 8)
    shown = made[:64]  # a sheet is for looking at
    rows = [[m.image for m in shown[i : i + columns]] for i in range(0, len(shown), columns)]
    labels = [f"from seed {shown[i].seed}" for i in range(0, len(shown), columns)]
    sheet = contact_sheet(rows, row_labels=labels if len(labels) > 1 else None, title=options.prompt)
    record = {**record_of(made[0], model), "seeds": [m.seed for m in shown]}
    path = _free_name(options.out, f"{slug(options.prompt)}-sheet", record)
    write_png(path, sheet, infotext_of(made[0], model), record)
    return path
