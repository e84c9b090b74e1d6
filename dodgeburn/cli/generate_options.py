"""The options of `dodgeburn generate`: everyday ones, and the others in groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dodgeburn.cli.embeddings import Embeddings
from dodgeburn.cli.generate_foresee import Foresee
from dodgeburn.cli.generate_grid import Grid
from dodgeburn.cli.options import Grouped


@dataclass
class Loras:
    """Where LoRAs act and are found, and a tuned model's difference beside them."""

    lora_blocks: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=NUMBER,...")] = field(
        default_factory=list
    )
    """Weights of the LoRAs by block, as bake has them: "*=0,OUT*=1"; one for all LoRAs, or repeated for each."""
    lora_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder where LoRAs are found by name; none: beside the model and in this folder."""
    tuned: Annotated[str | None, tyro.conf.arg(metavar="MODEL[:STRENGTH]")] = None
    """A tuned model whose difference to --model is added at every step, STRENGTH (1) times: twice the work."""


@dataclass
class Sampling:
    """The way from noise to picture, and how the prompt is read."""

    spacing: str = "trailing"
    """Spacing of the noise levels: karras, exponential, or uniform: trailing, leading, linspace."""
    noise: str = "brownian"
    """Of samplers with noise: brownian keeps a seed's picture when the steps change, fresh draws anew each step."""
    zero_snr: bool = False
    """Start from pure noise (zero terminal SNR); for v-prediction models trained so."""
    prompt_syntax: str = "a1111"
    """How weights are read: a1111 ((x:1.2) multiplies, [x], BREAK), comfy ((x:1.2) replaces) or plain (no weights)."""
    clip_skip: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Text encoder layer, from the end: 1 (or -1) is the last; none: 2 for SDXL, 1 for SD1.5."""
    cfg_rescale: float = 0.0
    """0 to 1: take the contrast that guidance adds back, 0.7 is usual."""
    cfg_start: float = 0.0
    """Share of the steps after which guidance begins."""
    cfg_end: float = 1.0
    """Share of the steps after which guidance ends; steps without it are twice as fast."""


@dataclass
class Sdxl:
    """What SDXL is told of sizes beside the prompt."""

    size_scale: float | None = None
    """Tell the model this many times the picture's size ("CLIP scaling" 4)."""
    original_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """The original size to tell the model."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """The target size to tell the model."""
    crop: Annotated[str | None, tyro.conf.arg(metavar="LEFT,TOP")] = None
    """The crop's corner to tell the model."""
    negative_original_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """The same for the negative prompt; none: as for the prompt."""
    negative_target_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """The same for the negative prompt; none: as for the prompt."""
    negative_crop: Annotated[str | None, tyro.conf.arg(metavar="LEFT,TOP")] = None
    """The same for the negative prompt; none: as for the prompt."""


@dataclass
class DynamicThresholding:
    """Guidance of a high scale with the contrast of a low one."""

    mimic_scale: float | None = None
    """Switches dynamic thresholding on: the guidance scale whose contrast is imitated."""
    threshold_percentile: float | None = None
    """0 to 1, with AD; none: 1."""
    mimic_mode: str | None = None
    """Constant; Linear, Cosine, Half Cosine or Power with Up or Down; Linear or Cosine Repeating; Sawtooth."""
    mimic_scale_min: float | None = None
    """The mimic scale where its mode's curve is 0."""
    cfg_mode: str | None = None
    """The same modes, for the guidance scale."""
    cfg_scale_min: float | None = None
    """The guidance scale where its mode's curve is 0."""
    scheduler_value: float | None = None
    """Exponent of Power, repetitions of Repeating and Sawtooth; none: 4."""
    separate_feature_channels: bool = True
    """Measure every latent channel apart, instead of all together."""
    scaling_startpoint: str | None = None
    """MEAN (none) or ZERO."""
    variability_measure: str | None = None
    """AD (none) or STD."""
    interpolate_phi: float | None = None
    """0 to 1, share of the thresholded result; none: 1."""
    threshold_fraction: str | None = None
    """Modes run along the step (none; as A1111) or the time (as ComfyUI)."""


@dataclass
class Running:
    """Where and how it is computed, and the files' form."""

    batch_size: int | None = None
    """Pictures at a time; none: chosen by their size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str | None = None
    """fp32, fp16 or bf16; none: fp16 on cuda, else fp32."""
    tokenizer: Path | None = None
    """Folder with a CLIP tokenizer, for a single file of real Stable Diffusion."""
    format: str = "png"
    """png, jpg (quality 95) or webp (lossless); all carry the settings."""
    sheet: bool = True
    """Write a contact sheet too, if there are two pictures or more."""
    resume: bool = False
    """Go on after an interruption: pictures that the folder has already, by the same settings, are not made again."""


@dataclass
class Generate(Grouped):
    """Make pictures from a prompt: one file a seed, with all settings in its metadata, and a contact sheet.

    The same prompt, seed and settings give the same picture, whatever the batch size. With --from they are read from a
    picture: one of dodgeburn's is made again bit for bit; A1111's and ComfyUI's settings are taken as far as they go.
    """

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """What to draw. Over 75 tokens it is encoded in chunks of 75, as A1111 does."""
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PICTURE")] = None
    """PNG, JPEG or WebP to take prompt, seed, model and settings from; options given besides win."""
    model: str | None = None
    """A packaged model (pocket, pocket-style, pocket-bold, pocket-dpo), a file, a folder or a hub id; none: pocket."""
    lora: Annotated[
        list[str], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--slider"], metavar="FILE[:SCALE[:START]]")
    ] = field(default_factory=list)
    """LoRA or slider to apply, its scale (1) and the time step (0..1000) above which it is off (as its card says).
    Repeatable. Tags such as <lora:NAME:0.8> in the prompt find their files in --lora-dir.
    """
    seed: int = 0
    """Seed of the first picture; the next ones count up from it."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"], metavar="COUNT")] = 1
    """How many pictures."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("pictures")
    """Folder for the pictures, made if it is not there; or one picture's name (cat.png: the ending decides the format).
    """
    negative: str = ""
    """What to keep away from."""
    rule: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A rule that `bias fix --method random-prompt` wrote: each seed draws a class to say in the prompt."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Guidance scale (CFG); 1 is none, and twice as fast."""
    sampler: str = "dpmpp_2m"
    """ddim, euler, heun, dpm2, lms, dpmpp_2m; with noise on the way: euler_a, dpm2_a, dpmpp_2s_a, dpmpp_sde,
    dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, dpmpp_3m_sde_o3."""
    width: int | None = None
    """Pixels; none: what the model was trained at."""
    height: int | None = None
    """Pixels; none: what the model was trained at."""
    json: bool = False
    """Print one JSON object as the last line."""
    grid: Grid = field(default_factory=Grid)
    seeds: Foresee = field(default_factory=Foresee)
    loras: Loras = field(default_factory=Loras)
    embeddings: Embeddings = field(default_factory=Embeddings)
    sampling: Sampling = field(default_factory=Sampling)
    sdxl: Sdxl = field(default_factory=Sdxl)
    dynamic_thresholding: DynamicThresholding = field(default_factory=DynamicThresholding)
    running: Running = field(default_factory=Running)
