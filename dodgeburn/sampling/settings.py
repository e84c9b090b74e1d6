"""What a generation can be asked for, as one schema for command line, Python and picture metadata (no torch
here).
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from dodgeburn.errors import UserError
from dodgeburn.sampling.emphasis import SYNTAXES
from dodgeburn.sampling.spelling import nearest, resolve
from dodgeburn.sampling.thresholding import Thresholding

__all__ = [
    "ALIASES", "SAMPLERS", "SPACINGS", "STOCHASTIC", "TWO_CALLS", "GenerateSettings", "Thresholding", "nearest",
]  # fmt: skip

# Our name -> (name in A1111's infotext, name in ComfyUI's KSampler). For dpmpp_3m_sde_o3, which they don't have, the
# nearest; what their names mean when read is in ALIASES.
SAMPLERS: dict[str, tuple[str, str]] = {
    "ddim": ("DDIM", "ddim"),
    "euler": ("Euler", "euler"),
    "euler_a": ("Euler a", "euler_ancestral"),
    "heun": ("Heun", "heun"),
    "dpm2": ("DPM2", "dpm_2"),
    "dpm2_a": ("DPM2 a", "dpm_2_ancestral"),
    "lms": ("LMS", "lms"),
    "dpmpp_2s_a": ("DPM++ 2S a", "dpmpp_2s_ancestral"),
    "dpmpp_sde": ("DPM++ SDE", "dpmpp_sde"),
    "dpmpp_2m": ("DPM++ 2M", "dpmpp_2m"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "dpmpp_2m_sde"),
    "dpmpp_2m_sde_heun": ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun"),
    "dpmpp_3m_sde": ("DPM++ 3M SDE", "dpmpp_3m_sde"),
    "dpmpp_3m_sde_o3": ("DPM++ 3M SDE", "dpmpp_3m_sde"),
}

# Samplers that add noise on the way.
STOCHASTIC = (
    "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde",
    "dpmpp_3m_sde_o3",
)  # fmt: skip

TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
"""Samplers that ask the U-Net twice a step, except in the last one."""

# Our name (diffusers' where there is one) -> (A1111 "Schedule type", ComfyUI scheduler). The three uniform
# ones go by what the schedules do: trailing takes the same time steps as "Simple", linspace as
# "Uniform"/"normal", leading as DDIM.
SPACINGS: dict[str, tuple[str, str]] = {
    "trailing": ("Simple", "simple"),
    "leading": ("DDIM", "ddim_uniform"),
    "linspace": ("Uniform", "normal"),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
}

# Other spellings in use, so that what users type elsewhere works here. "uniform" without more is trailing:
# it starts at the last time step, where training noise is strongest (arXiv 2305.08891, table 2).
ALIASES: dict[str, str] = {
    "uniform": "trailing",
    "simple": "trailing",
    "normal": "linspace",
    "ddim_uniform": "leading",
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "dpm2_ancestral": "dpm2_a",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "dpm++_2s_a": "dpmpp_2s_a",
    "dpm++_sde": "dpmpp_sde",
    "dpm++_2m": "dpmpp_2m",
    "dpm++_2m_sde": "dpmpp_2m_sde",
    "dpm++_2m_sde_heun": "dpmpp_2m_sde_heun",
    "dpm++_3m_sde": "dpmpp_3m_sde",
    # ComfyUI's names for noise drawn on the GPU; here it is always drawn on the CPU.
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
}

NOISES = ("brownian", "fresh")
Size = tuple[int, int]


def check_seed(seed: int) -> None:
    """UserError for a seed outside 0 .. 2^64 - 1."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}: give a whole number from 0 to 2^64 - 1")


class GenerateSettings(BaseModel):
    """Settings of one generation; prompts and seeds come apart because they differ from picture to picture.

    Raises UserError for a value out of range, an unknown sampler or spacing, or settings that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 20  # denoising steps, 1..1000
    guidance: float = 4.0  # classifier-free guidance scale, 0..100; 1 = no guidance, half the work
    sampler: str = "dpmpp_2m"  # a key of SAMPLERS
    spacing: str = "trailing"  # a key of SPACINGS
    width: int | None = None  # pixels; None = the size the model was trained at
    height: int | None = None  # pixels
    negative: str = ""  # negative prompt, encoded even if empty (as A1111 and ComfyUI do)
    prompt_syntax: str = "a1111"  # how weights in the prompts are read: one of emphasis.SYNTAXES
    noise: str = "brownian"  # of stochastic samplers: one path a seed, or "fresh" draws each step as in diffusers
    zero_snr: bool = False  # rescale the noise schedule to a terminal signal-to-noise ratio of 0
    clip_skip: int | None = None  # A1111's counting, 1 = last layer; None = as trained (SD1.5: 1, SDXL: 2)
    cfg_rescale: float = 0.0  # 0..1: share of rescaling guided output to the positive prompt's deviation
    cfg_start: float = 0.0  # guidance acts in the steps i with cfg_start <= i / steps < cfg_end
    cfg_end: float = 1.0
    thresholding: Thresholding | None = None  # dynamic thresholding; None = off
    size_scale: float | None = None  # SDXL: tell the U-Net this many times the picture's size; None = 1
    original_size: Size | None = None  # SDXL: (width, height) told, instead of size_scale's
    target_size: Size | None = None
    crop: Size | None = None  # SDXL: (left, top) told; None = (0, 0)
    negative_original_size: Size | None = None  # SDXL: for the negative prompt; None = as for the positive
    negative_target_size: Size | None = None
    negative_crop: Size | None = None

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, value: str) -> str:
        return resolve("sampler", value, SAMPLERS, ALIASES)

    @field_validator("spacing")
    @classmethod
    def _spacing(cls, value: str) -> str:
        return resolve("spacing", value, SPACINGS, ALIASES)

    @field_validator("prompt_syntax")
    @classmethod
    def _prompt_syntax(cls, value: str) -> str:
        return resolve("prompt syntax", value, SYNTAXES)

    @field_validator("noise")
    @classmethod
    def _noise(cls, value: str) -> str:
        return resolve("noise", value, NOISES)

    @field_validator("steps")
    @classmethod
    def _steps(cls, value: int) -> int:
        if not 1 <= value <= 1000:
            raise UserError(f"steps is {value}: give a number from 1 to 1000")
        return value

    @field_validator("guidance")
    @classmethod
    def _guidance(cls, value: float) -> float:
        if not 0 <= value <= 100:  # also refuses NaN
            raise UserError(f"guidance is {value}: give a number from 0 to 100 (1 = no guidance)")
        return value

    @field_validator("width", "height")
    @classmethod
    def _pixels(cls, value: int | None) -> int | None:
        if value is not None and not 8 <= value <= 16384:
            raise UserError(f"width or height is {value}: give pixels from 8 to 16384")
        return value

    @field_validator("clip_skip")
    @classmethod
    def _clip_skip(cls, value: int | None) -> int | None:
        if value is not None and not 1 <= abs(value) <= 64:
            raise UserError(f"CLIP skip is {value}: 1 (or -1) is the last layer, 2 (or -2) the one before, and so on")
        return None if value is None else abs(value)

    @field_validator("cfg_rescale", "cfg_start", "cfg_end")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise UserError(f"CFG rescale, start or end is {value}: give a number from 0 to 1")
        return value

    @field_validator("size_scale")
    @classmethod
    def _size_scale(cls, value: float | None) -> float | None:
        if value is not None and not 0.1 <= value <= 64:
            raise UserError(f"size scale is {value}: give a number from 0.1 to 64 (1 = the picture's own size)")
        return value

    @field_validator("original_size", "target_size", "negative_original_size", "negative_target_size")
    @classmethod
    def _told_size(cls, value: Size | None) -> Size | None:
        if value is not None and not all(1 <= side <= 65504 for side in value):
            raise UserError(f"a size to tell the model is {value[0]}x{value[1]}: give pixels from 1 to 65504")
        return value

    @field_validator("crop", "negative_crop")
    @classmethod
    def _corner(cls, value: Size | None) -> Size | None:
        if value is not None and not all(0 <= side <= 65504 for side in value):
            raise UserError(f"a crop to tell the model is {value[0]},{value[1]}: give pixels from 0 to 65504")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.cfg_start >= self.cfg_end:
            raise UserError(
                f"CFG start is {self.cfg_start:g} and CFG end {self.cfg_end:g}: guidance needs a start below its end "
                "(no guidance at all is guidance 1)"
            )
        if self.size_scale is not None and self.original_size and self.target_size:
            raise UserError("size scale has no effect beside both an original and a target size: leave one out")
        return self
