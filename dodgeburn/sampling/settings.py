"""What a generation can be asked for, as one schema for command line, Python and picture metadata (no torch
here).
"""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, field_validator

from dodgeburn.errors import UserError

# Our name -> (name in A1111's infotext, name in ComfyUI's KSampler).
SAMPLERS: dict[str, tuple[str, str]] = {
    "ddim": ("DDIM", "ddim"),
    "euler": ("Euler", "euler"),
    "euler_a": ("Euler a", "euler_ancestral"),
    "dpmpp_2m": ("DPM++ 2M", "dpmpp_2m"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "dpmpp_2m_sde"),
}

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
    "dpm++_2m": "dpmpp_2m",
    "dpm++_2m_sde": "dpmpp_2m_sde",
}


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown `name`: near spellings first, then all that is known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}"


def _resolve(kind: str, name: str, known: Iterable[str]) -> str:
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in known:
        raise UserError(nearest(kind, name, known))
    return plain


class GenerateSettings(BaseModel):
    """Settings of one generation; prompts and seeds come apart because they differ from picture to picture.

    Raises UserError for a value out of range or an unknown sampler or spacing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 20  # denoising steps, 1..1000
    guidance: float = 4.0  # classifier-free guidance scale, 0..100; 1 = no guidance, half the work
    sampler: str = "dpmpp_2m"  # a key of SAMPLERS
    spacing: str = "trailing"  # a key of SPACINGS
    width: int | None = None  # pixels; None = the size the model was trained at
    height: int | None = None  # pixels
    negative: str = ""  # negative prompt, encoded even if empty (as A1111 and ComfyUI do)

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, value: str) -> str:
        return _resolve("sampler", value, SAMPLERS)

    @field_validator("spacing")
    @classmethod
    def _spacing(cls, value: str) -> str:
        return _resolve("spacing", value, SPACINGS)

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
    def _size(cls, value: int | None) -> int | None:
        if value is not None and not 8 <= value <= 16384:
            raise UserError(f"width or height is {value}: give pixels from 8 to 16384")
        return value
