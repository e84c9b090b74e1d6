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
    from dodgeburn.sampling.settings import Thresholding

HELP = "make pictures from a prompt, with their settings inside the PNGs"
EXAMPLE = 'dodgeburn generate "a doctor, smiling broadly, with red hair" --model pocket --seed 0 -n 8'
# Settings whose option has another name.
OPTIONS = {"fraction": "threshold_fraction"}


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
    """ddim, euler, heun, dpm2, lms, dpmpp_2m; with noise on the way: euler_a, dpm2_a, dpmpp_2s_a, dpmpp_sde,
    dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, dpmpp_3m_sde_o3."""
    spacing: str = "trailing"
    """Spacing of the noise levels: karras, exponential, or uniform: trailing, leading, linspace."""
    width: int | None = None
    """Pixels; none: what the model was trained at."""
    height: int | None = None
    """Pixels; none: what the model was trained at."""
    noise: str = "brownian"
    """Of samplers with noise: brownian keeps a seed's picture when the steps change, fresh draws anew each step."""
    zero_snr: bool = False
    """Start from pure noise (zero terminal SNR); for v-prediction models trained so."""
    clip_skip: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Text encoder layer, from the end: 1 (or -1) is the last; none: 2 for SDXL, 1 for SD1.5."""
    cfg_rescale: float = 0.0
    """0 to 1: take the contrast that guidance adds back, 0.7 is usual."""
    cfg_start: float = 0.0
    """Share of the steps after which guidance begins."""
    cfg_end: float = 1.0
    """Share of the steps after which guidance ends; steps without it are twice as fast."""
    size_scale: float | None = None
    """SDXL: tell the model this many times the picture's size ("CLIP scaling" 4)."""
    original_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """SDXL: the original size to tell the model."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """SDXL: the target size to tell the model."""
    crop: Annotated[str | None, tyro.conf.arg(metavar="LEFT,TOP")] = None
    """SDXL: the crop's corner to tell the model."""
    negative_original_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """SDXL: the same for the negative prompt; none: as for the prompt."""
    negative_target_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """SDXL: the same for the negative prompt; none: as for the prompt."""
    negative_crop: Annotated[str | None, tyro.conf.arg(metavar="LEFT,TOP")] = None
    """SDXL: the same for the negative prompt; none: as for the prompt."""
    mimic_scale: float | None = None
    """Switches dynamic thresholding on: the guidance scale whose contrast is imitated."""
    threshold_percentile: float | None = None
    """Dynamic thresholding: 0 to 1, with AD; none: 1."""
    mimic_mode: str | None = None
    """Dynamic thresholding: Constant; Linear, Cosine, Half Cosine or Power with Up or Down; Linear or Cosine
    Repeating; Sawtooth."""
    mimic_scale_min: float | None = None
    """Dynamic thresholding: the mimic scale where its mode's curve is 0."""
    cfg_mode: str | None = None
    """Dynamic thresholding: the same modes, for the guidance scale."""
    cfg_scale_min: float | None = None
    """Dynamic thresholding: the guidance scale where its mode's curve is 0."""
    scheduler_value: float | None = None
    """Dynamic thresholding: exponent of Power, repetitions of Repeating and Sawtooth; none: 4."""
    separate_feature_channels: bool = True
    """Dynamic thresholding: measure every latent channel apart, or all together."""
    scaling_startpoint: str | None = None
    """Dynamic thresholding: MEAN (none) or ZERO."""
    variability_measure: str | None = None
    """Dynamic thresholding: AD (none) or STD."""
    interpolate_phi: float | None = None
    """Dynamic thresholding: 0 to 1, share of the thresholded result; none: 1."""
    threshold_fraction: str | None = None
    """Dynamic thresholding: modes run along the step (none; as A1111) or the time (as ComfyUI)."""
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
    from dodgeburn.sampling.sizes import SIZE_FIELDS

    sizes: dict[str, Any] = {name: _pair(name, getattr(options, name)) for name in SIZE_FIELDS[1:]}
    settings = GenerateSettings(
        steps=options.steps, guidance=options.guidance, sampler=options.sampler, spacing=options.spacing,
        width=options.width, height=options.height, negative=options.negative, noise=options.noise,
        zero_snr=options.zero_snr, clip_skip=options.clip_skip, cfg_rescale=options.cfg_rescale,
        cfg_start=options.cfg_start, cfg_end=options.cfg_end, thresholding=_thresholding(options),
        size_scale=options.size_scale, **sizes,
    )  # fmt: skip
    writable_folder(options.out)
    with warnings.catch_warnings():
        warnings.simplefilter("always", DodgeburnWarning)
        warnings.showwarning = _say  # at once: a setting without effect is worth knowing before an hour's work
        found = _run(options, settings)
    print(f"wrote {len(found['pictures'])} pictures to {options.out} in {found['seconds']} s")
    if found["sheet"]:
        print(f"sheet: {found['sheet']}")
    if options.json:
        print(json.dumps(found))
    return 0


def _say(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from tqdm import tqdm

    if issubclass(category, DodgeburnWarning):
        tqdm.write(f"warning: {message}", file=sys.stderr)  # does not tear the progress bar


def _thresholding(options: Generate) -> Thresholding | None:
    """Dynamic thresholding as asked for; UserError for settings of it without the one that switches it on."""
    from dodgeburn.sampling.settings import Thresholding

    asked = {name: getattr(options, OPTIONS.get(name, name)) for name in Thresholding.model_fields}
    if asked["separate_feature_channels"]:
        del asked["separate_feature_channels"]  # the default; without it nothing may be asked for at all
    given = {name: value for name, value in asked.items() if value is not None}
    if given and options.mimic_scale is None:
        names = ", ".join(OPTIONS.get(name, name).replace("_", "-") for name in given)
        raise UserError(f"{names}: no effect without dynamic thresholding, switch it on with --mimic-scale 7")
    return Thresholding(**given) if given else None


def _pair(name: str, text: str | None) -> tuple[int, int] | None:
    """Two whole numbers from "5376x3072" or "0,0"; UserError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*[x,]\s*(\d{1,9})\s*", text.lower())
    if match is None:
        wanted = "LEFT,TOP such as 0,0" if name.endswith("crop") else "WIDTHxHEIGHT such as 1344x768"
        raise UserError(f"--{name.replace('_', '-')} is {text!r}: expected {wanted}")
    return int(match[1]), int(match[2])


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
