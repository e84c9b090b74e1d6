"""dodgeburn dpo train: align a model with pairs of pictures, of which one was preferred."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dodgeburn.cli.options import Grouped, as_option, parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.given_settings import first_problem

if TYPE_CHECKING:
    from dodgeburn.rework.dpo.pairs import PreferencePairs
    from dodgeburn.rework.dpo.settings import DpoSettings
    from dodgeburn.rework.dpo.train import Aligned

HELP = "align a model with preference pairs (Diffusion-DPO and its successors)"
EXAMPLE = "dodgeburn dpo train --pairs my_pairs --model pocket --loss sigmoid --lora 8 -o pocket-dpo.safetensors"


@dataclass
class Objective:
    """What is optimised, and against which reference."""

    beta: float | None = None
    """How dear leaving the reference is, as the paper counts (diffusers' beta is half of it), for this model's latents.
    Left out: 5000 at SD1.5's latents, scaled with their number of elements."""
    safeguard: bool = False
    """Scale the loser's gradient so that the winner's error cannot rise, to first order (SDPO)."""
    slack: float = 0.0
    """Of --safeguard: above 0 (below 1), the winner's error has to fall."""
    reference: Literal["auto", "off", "bank", "copy"] = "auto"
    """off: the LoRA switched off; bank: errors worked out beforehand at --bank points; copy: a second U-Net (a
    LoRA needs none). auto: off for a LoRA, copy for full."""
    bank: int = 2048
    """Points of --reference bank."""
    reference_decay: float = 0.0
    """Above 0, the reference follows the model as a moving average with this decay (Linear-DPO: with --loss linear)."""
    guidance: float = 1.0
    """Other than 1: compare the predictions of classifier-free guidance at this scale, for pictures that are drawn (and
    preferred) with it: twice the work. An empty caption has nothing to guide: give --dropout 0 with it."""
    emphasis: float = 0.0
    """Above 0: errors count times sigma to this power (2: as errors of the clean picture), so that noisy time steps,
    where light, colour and layout are decided, count as much as late ones. On the pocket 1 helps, with --end 300
    and long training."""


@dataclass
class Training:
    """How it is trained."""

    layers: str = "full"
    """Layers that the LoRA changes: full, noxattn, xattn, selfattn or xattn-strict."""
    batch: int = 8
    """Pairs a batch; two pictures each."""
    accumulate: int = 1
    """Batches a step."""
    lr: float | None = None
    """Learning rate; left out: 1e-4 for a LoRA, 1e-5 for full."""
    constant: float = 1.0
    """Share of the steps after which the learning rate falls, to zero at the end."""
    dropout: float = 0.1
    """Share of pairs trained with an empty caption."""
    flips: bool = False
    """Mirror half of the pairs, both pictures alike."""
    start: int = 1000
    """Train at time steps below this one."""
    end: int = 0
    """Train at time steps from this one on."""
    ema: float = 0.0
    """Above 0, write the moving average of the weights with this decay."""
    seed: int = 0
    """Of batches, time steps and noise."""


@dataclass
class Memory:
    """Less memory for more time."""

    checkpointing: bool = False
    """Gradient checkpointing: less memory, a third more time."""
    one_by_one: bool = False
    """Winners and losers pass through the U-Net one after the other: about half of the memory for activations, one
    forward more."""


@dataclass
class Files:
    """Which pairs are read, and how the result is written."""

    crop: bool = False
    """Crop pictures of a pair that differ in size to the smaller; otherwise such pairs are dropped."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Read the first N good pairs only, of each path."""
    spelling: Literal["kohya", "sgm", "peft"] = "kohya"
    """Spelling of the LoRA's keys."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Type of the numbers written; left out: fp16 for a LoRA, fp32 for full."""


@dataclass
class Train(Grouped):
    """Align a model with preference pairs: Pick-a-Pic's parquet, or a folder with pairs.jsonl (caption, win, lose).

    Writes a LoRA that every program reads, or with --lora full a checkpoint. Watch `winner` in the log: the winners'
    error against the reference's. If it climbs, the model forgets; a warning says so. Interrupted, the same command
    goes on. Several GPUs: accelerate launch -m dodgeburn dpo train ...
    """

    pairs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]")] = ()
    """A folder with pairs.jsonl, a parquet file with Pick-a-Pic's columns, or a folder of such files. Several: all of
    their pairs."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write."""
    model: str = "pocket"
    """The model to align: a packaged name, a single file, a diffusers folder or a hub id."""
    loss: Literal["sigmoid", "ipo", "hinge", "linear", "kto", "mapo", "sft"] = "sigmoid"
    """sigmoid: Diffusion-DPO; ipo, hinge, linear: other functions of its margin; kto: likes and dislikes, one by one;
    mapo: no reference; sft: the winners alone, the control."""
    lora: Annotated[str, tyro.conf.arg(metavar="RANK|full")] = "8"
    """Rank of the LoRA, or full for the whole U-Net."""
    steps: int = 200
    """Optimizer steps."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""
    objective: Objective = field(default_factory=Objective)
    training: Training = field(default_factory=Training)
    memory: Memory = field(default_factory=Memory)
    files: Files = field(default_factory=Files)


def main(args: list[str]) -> int:
    """Run `dodgeburn dpo train`; raises UserError for bad input."""
    settings = parse(Train, args, "dpo train", EXAMPLE)
    if not settings.pairs:
        raise UserError(f"no pairs: say where they are with --pairs PATH: {EXAMPLE}")
    if settings.out is None:
        raise UserError("no output: say where to write with -o OUT.safetensors")
    if settings.out.suffix != ".safetensors":
        raise UserError(f"output {settings.out}: aligned models are written as .safetensors, name it so")
    if settings.lora != "full" and settings.dtype == "bf16":
        raise UserError("a LoRA is written as fp32 or fp16: leave out --dtype bf16")
    aligned, pairs = _run(settings, settings.pairs, settings.out)
    if settings.json and _first_process():
        print(json.dumps(_row(settings, aligned, pairs)))
    return 0


def _run(settings: Train, sources: tuple[Path, ...], out: Path) -> tuple[Aligned, PreferencePairs]:
    from dodgeburn.checkpoint.tensorfile import check_weights_output
    from dodgeburn.models.loading import load_model
    from dodgeburn.rework.dpo.file import save_aligned
    from dodgeburn.rework.dpo.pairs import read_sets
    from dodgeburn.rework.dpo.settings import betas
    from dodgeburn.rework.dpo.train import align

    chosen = _chosen(settings)
    check_weights_output(out, [source for source in sources if source.is_file()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        pairs = read_sets(sources, settings.crop, settings.limit)
        _say(pairs.report())
        device = _device(settings.device)
        model = load_model(settings.model, device=device, dtype=_dtype(device, chosen.rank is None),
                           tokenizer=settings.tokenizer)  # fmt: skip
        side = model.native_size // model.vae_factor
        elements = int(model.vae.config["latent_channels"]) * side * side
        said = betas(chosen.beta_for(elements), elements)
        if chosen.loss not in ("sft", "mapo"):
            _say(
                f"beta {said['paper']:g} as the paper counts ({said['diffusers']:g} in diffusers), for latents of "
                f"{elements} values: {said['per_element']:.3g} each, {said['at_sd15']:g} at SD1.5's size"
            )
        folder = out.with_name(out.name + ".training")
        aligned = align(model, pairs, chosen, folder, release=chosen.rank is not None)
        if _first_process():
            save_aligned(model, pairs, aligned, out, settings.spelling, settings.dtype)
            shutil.rmtree(folder, ignore_errors=True)
    last = aligned.last
    _say(
        f"wrote {out}: {chosen.loss}, {len(pairs)} pairs, {aligned.forwards:,} samples through the U-Net, "
        f"{aligned.seconds:.1f} s"
    )
    if last:
        against = "" if chosen.kind_of_reference == "none" else " against the reference"
        paired = "loser" in last  # sft sees winners alone
        before = f"accuracy {last['accuracy']:.2f}, " if paired else ""
        behind = f", loser's {last['loser']:+.3f}{against}, median margin {last['margin']:.2f}" if paired else ""
        _say(f"  at the end: {before}winner's error {last['winner']:+.3f}{behind}")
    print_warnings(caught)
    return aligned, pairs


def _chosen(settings: Train) -> DpoSettings:
    from pydantic import ValidationError

    from dodgeburn.rework.dpo.settings import DpoSettings

    full = settings.lora == "full"
    if not full and not (settings.lora.isdecimal() and int(settings.lora) > 0):
        raise UserError(f"--lora is {settings.lora}: expected a rank (a whole number from 1 up) or full")
    values = {name: getattr(settings, name) for name in DpoSettings.model_fields if hasattr(settings, name)}
    values["rank"] = None if full else int(settings.lora)
    try:
        return DpoSettings(**values)
    except ValidationError as error:
        raise UserError(first_problem(error, DpoSettings, as_option)) from None


def _device(device: str) -> str:
    """Each process of `accelerate launch` has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in ("auto", "cuda"):
        return device
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else device


def _dtype(device: str, full: bool) -> str:
    """The frozen weights of a LoRA in bf16 on a GPU: fp16's range loses small gradients. Otherwise fp32."""
    from dodgeburn.models.model import choose_device

    return "bf16" if not full and choose_device(device).type == "cuda" else "fp32"


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    if _first_process():
        print(line)
        sys.stdout.flush()


def _row(settings: Train, aligned: Aligned, pairs: PreferencePairs) -> dict[str, object]:
    from dodgeburn.rework.dpo.settings import betas

    return {
        "out": str(settings.out), "loss": settings.loss, "pairs": len(pairs), "dropped": pairs.dropped,
        "beta": betas(aligned.beta, aligned.elements), "last": aligned.last, "alarms": aligned.alarms,
        "forwards": aligned.forwards, "seconds": round(aligned.seconds, 2),
    }  # fmt: skip
