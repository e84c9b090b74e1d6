"""dodgeburn pocket: train the pocket model, measure it against its gate, draw its world."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.picture_files import writable_folder
from dodgeburn.cli.verbs import Part, run_verb
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model

HELP = "train the pocket model, evaluate it and its readers, draw its world"
EXAMPLES = {
    "train": "dodgeburn pocket train -o runs/pocket",
    "evaluate": "dodgeburn pocket evaluate --json",
    "draw": "dodgeburn pocket draw -o world.png --seed 3",
}


@dataclass
class Train:
    """Train the pocket model: tokenizer, VAE, text encoders, U-Net, two fine-tunes, two readers.

    Repeat the command to go on after Ctrl-C or a kill: a folder is a run with one --config. On two CPU cores the whole
    takes under three hours.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for checkpoints, logs and the finished files."""
    only: Literal["all", "base", "pocket-style", "pocket-bold", "pocket-dpo", "readers", "tokenizer"] = "all"
    """Train only this part. Fine-tunes start from this folder's pocket, or else from the shipped one; pocket-dpo always
    from the shipped one, and is no part of all."""
    config: Path | None = None
    """JSON file with settings that differ from the defaults, such as {"size": 128, "unet": {"steps": 9000}}."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    print_config: bool = False
    """Print the settings as JSON and stop."""


@dataclass
class Evaluate:
    """Measure a model on 1 024 held-out prompts and seeds, or (--reader) both readers on fresh drawings."""

    model: str = "pocket"
    """A packaged model, a .safetensors file or a diffusers folder of the pocket world."""
    reader: bool = False
    """Grade the reader and the judge instead of the model."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Only the first N prompts (or drawings, and as many generated pictures): quicker, less certain."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for a sheet of 64 pictures and the result as JSON."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: bool = False
    """Print one JSON object as the last line."""


@dataclass
class Draw:
    """Draw random pictures of the pocket world with their captions."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("world.png")
    """PNG file to write."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 32
    """Pictures."""
    seed: int = 0
    """Number of the picture list."""
    size: Literal[64, 128] = 128
    """Side of a picture in pixels."""
    look: Literal["plain", "ink", "bold"] = "plain"
    """The world's own look, or a fine-tune's."""
    unplanted: bool = False
    """Switch the planted correlations off."""


def main(args: list[str]) -> int:
    """Run `dodgeburn pocket train|evaluate|draw`; raises UserError for bad input."""
    kinds: dict[str, tuple[Any, Callable[[Any], int]]]
    kinds = {"train": (Train, _train), "evaluate": (Evaluate, _evaluate), "draw": (Draw, _draw)}

    def part(verb: str) -> Part:
        kind, run = kinds[verb]
        example = EXAMPLES[verb]
        first = kind.__doc__.splitlines()[0]
        return Part(first, example, lambda rest: run(parse(kind, rest, f"pocket {verb}", example)))

    return run_verb("pocket", {verb: part(verb) for verb in kinds}, args)


def _train(settings: Train) -> int:
    from dodgeburn.jobs import PartStore
    from dodgeburn.models.model import choose_device
    from dodgeburn.training.pocket import FINETUNES, NOTES, PocketRun

    config = _config(settings.config)
    if settings.print_config:
        print(json.dumps(asdict(config), indent=1))
        return 0
    if settings.only == "pocket-dpo":
        return _align(settings, config.seed)
    if not (settings.out / NOTES).exists():  # a run steered by hand says there what was changed, and files tell it
        PartStore(settings.out, {"pocket train": asdict(config)})
    if settings.only == "tokenizer":
        from dodgeburn.training.pocket_tokenizer import grow_tokenizer

        grow_tokenizer(settings.out, config.seed + 1)
        print(f"tokenizer: {settings.out}")
        return 0
    run = PocketRun(settings.out, config, str(choose_device(settings.device)))
    paths = []
    if settings.only in ("all", "base"):
        paths.append(run.base())
    for name in FINETUNES:
        if settings.only in ("all", name):
            paths.append(run.finetune(name))
    if settings.only in ("all", "readers"):
        paths += run.readers()
    for path in paths:
        print(path)
    return 0


def _align(settings: Train, seed: int) -> int:
    """pocket-dpo: pairs, alignment, and the LoRA as it ships."""
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model
    from dodgeburn.rework.dpo.pocket_dpo import BEST_OF, PROMPTS, make_pocket_dpo

    if settings.config is not None:
        raise UserError("--config has no effect on pocket-dpo: its settings stand in rework/dpo/pocket_dpo.py")
    model = load_model("pocket", settings.device, "fp32")
    settings.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=PROMPTS * BEST_OF, unit="picture", desc="pictures", disable=None, leave=False) as bar:
        print(make_pocket_dpo(model, settings.out, lambda n: None if bar.update(n) else None, seed))
    return 0


def _config(path: Path | None) -> Any:
    """The training's settings: the defaults, and what a JSON file says instead. UserError for what it may not say."""
    from pydantic import TypeAdapter, ValidationError

    from dodgeburn.given_settings import first_problem
    from dodgeburn.training.pocket import PocketTraining

    config = PocketTraining()
    if path is None:
        return config
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f'{path}: expected a JSON object such as {{"size": 128, "unet": {{"steps": 9000}}}}')
    known = asdict(config)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{path}: unknown setting '{key}'; see `dodgeburn pocket train -o X --print-config`")
        if isinstance(known[key], dict) and not isinstance(value, dict):
            raise UserError(f"{path}: '{key}' is {json.dumps(value)[:80]}: expected an object with its settings")
        if not isinstance(known[key], dict):
            known[key] = value
            continue
        for inner in value:
            if inner not in known[key]:
                raise UserError(f"{path}: '{key}' has no setting '{inner}'")
        known[key] |= value
    _in_range(path, known)
    try:
        config = TypeAdapter(PocketTraining).validate_python(known)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if config.size not in (64, 128):
        raise UserError(f"{path}: size is {config.size}: expected 64 or 128")
    return config


def _in_range(path: Path, settings: dict[str, Any], above: str = "") -> None:
    """UserError for a number below 0, or below 1 where nothing could be trained, or that is none."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _in_range(path, value, f"{above}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            ones = isinstance(value, int) and name.endswith(("steps", "batch", "pictures", "accumulate", "every"))
            if not math.isfinite(value) or value < ones:
                raise UserError(f"{path}: {above}{name} is {value}: expected a finite number from {int(ones)} up")


def _evaluate(settings: Evaluate) -> int:
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model
    from dodgeburn.training.pocket_gate import (
        GATE_SETTINGS,
        MODEL_GATE,
        READER_GATE,
        evaluate_model,
        evaluate_readers,
        sheet_of,
    )

    if settings.n is not None and settings.n < 1:
        raise UserError(f"-n {settings.n}: give a number of prompts (or drawings) from 1 up")
    if settings.out is not None:
        writable_folder(settings.out)
    model: Model = load_model(settings.model, device=settings.device)
    started = time.perf_counter()
    with tqdm(desc="denoising", unit="step", disable=None) as bar:

        def progress(step: Any) -> None:
            bar.total = step.total * step.batches
            bar.update()

        if settings.reader:
            few = {"n": settings.n, "generated": min(256, settings.n)} if settings.n else {}
            result = evaluate_readers(model, **few, callback=progress)
            pictures, gate = None, READER_GATE
        else:
            result, pictures = evaluate_model(model, settings.n, callback=progress)
            gate = MODEL_GATE
    result |= {"model": settings.model, "sha256": model.sha256, "seconds": round(time.perf_counter() - started, 1)}
    _print_table(result, gate, settings.reader)
    if settings.out:
        from dodgeburn.checkpoint.tensorfile import write_atomic
        from dodgeburn.images.png import png_bytes

        name = "readers" if settings.reader else Path(settings.model).stem
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {settings.out}: {error.strerror}") from error
        write_atomic(settings.out / f"{name}.json", json.dumps(_numbers(result), indent=1).encode())
        if pictures is not None:
            about = {"sheet": "gate prompts and seeds", "model": settings.model, "model_sha256": model.sha256,
                     "settings": GATE_SETTINGS.model_dump()}  # fmt: skip
            write_atomic(settings.out / f"{name}-sheet.png", png_bytes(sheet_of(pictures), own=about))
    if settings.json:
        print(json.dumps(_numbers(result)))
    return 0


def _numbers(value: Any) -> Any:
    """Plain values for JSON, which knows no NaN: null, as of what too few pictures show."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(result: dict[str, Any], gate: Any, readers: bool) -> None:
    print(f"{'':24}{'measured':>10}{'gate':>10}")
    for name, bound, larger in gate:
        if name in result and name not in result["held"]:
            print(f"{name:24}{'not measured':>10}")
        elif name in result:
            verdict = "held" if result["held"][name] else "NOT HELD"
            print(f"{name:24}{result[name]:>10.4f}  {'>=' if larger else '<='} {bound:<6}{verdict}")
    if readers:
        for name in ("reader", "judge"):
            row = result[name]
            print(f"\n{name}: accuracy " + ", ".join(f"{k} {v:.4f}" for k, v in row["categorical"].items()))
            print("  fingers " + f"{row['finger_accuracy']:.4f}; RMSE "
                  + ", ".join(f"{k} {v:.3f}" for k, v in row["rmse"].items()))  # fmt: skip
            print("  junk called unreadable: " + ", ".join(f"{k} {v:.4f}" for k, v in row["junk"].items())
                  + f"; drawings called unreadable {row['unreadable']:.4f}")  # fmt: skip
        return
    print("\naccuracy of what was named: " + ", ".join(f"{k} {v:.3f}" for k, v in result["categorical"].items()))
    print("Spearman asked/read: " + ", ".join(f"{k} {v:.3f}" for k, v in result["spearman"].items()))
    print("total variation, unnamed: " + ", ".join(f"{k} {v:.3f}" for k, v in result["marginal_tv"].items()))
    print("planted: " + ", ".join(f"{k} {v:.3f}" for k, v in result["planted_shares"].items()))
    if result["wrong_hands"] is not None:
        print(f"hands without five fingers: {result['wrong_hands']:.3f} (30 % in the training pictures)")
    print(f"VAE round trip, mean squared error in [-1, 1]: {result['vae_mse']:.5f}")


def _draw(settings: Draw) -> int:
    import numpy as np
    from PIL import Image

    from dodgeburn.checkpoint.tensorfile import atomic_path
    from dodgeburn.images.sheet import contact_sheet
    from dodgeburn.pocket.attributes import PLANTED
    from dodgeburn.pocket.captions import caption
    from dodgeburn.pocket.pictures import attributes_of
    from dodgeburn.pocket.world import render

    if settings.out.suffix.lower() != ".png":
        raise UserError(f"{settings.out}: expected a name that ends in .png")
    if not 1 <= settings.n <= 1000:
        raise UserError(f"-n {settings.n}: give a number of pictures from 1 to 1000")
    if settings.seed < 0:
        raise UserError(f"--seed {settings.seed}: give a number from 0 up")
    planted = () if settings.unplanted else PLANTED
    attributes = [attributes_of(i, settings.seed, planted) for i in range(settings.n)]
    captions = [caption(a, np.random.default_rng([settings.seed, i]))[0] for i, a in enumerate(attributes)]
    pictures = [Image.fromarray(render(a, settings.size, settings.look)) for a in attributes]
    rows = [pictures[i : i + 8] for i in range(0, len(pictures), 8)]
    with atomic_path(settings.out) as temporary:
        contact_sheet(rows, cell=settings.size, gap=2).save(temporary, format="PNG")
    for i, text in enumerate(captions):
        print(f"{i:3}  {text}")
    print(settings.out)
    return 0
