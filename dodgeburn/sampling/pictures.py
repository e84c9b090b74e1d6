"""A picture that is to be made, and one that was."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from PIL import Image

from dodgeburn.sampling.guidance import Tuned
from dodgeburn.sampling.loras import LoraUse
from dodgeburn.sampling.settings import GenerateSettings


@dataclass(frozen=True)
class Planned:
    """Everything that decides a picture but the model."""

    prompt: str
    seed: int
    settings: GenerateSettings  # with width and height filled in
    index: int  # position in the `prompts` and `seeds` given
    batch: tuple[int, int] = (0, 1)  # (row, pictures) of the batch it began in: what the last bit depends on
    adapters: tuple[LoraUse, ...] = ()  # with the scales of this picture
    tuned: Tuned | None = None  # of which a part was added

    def made(self, image: Image.Image) -> Generated:
        """The same with its picture."""
        return Generated(**{f.name: getattr(self, f.name) for f in fields(Planned)}, image=image)


@dataclass(frozen=True)
class Generated(Planned):
    """A finished picture and what made it."""

    image: Image.Image = field(kw_only=True)  # RGB
