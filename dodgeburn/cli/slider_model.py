"""What the verbs of `dodgeburn slider` that make pictures have in common: on which model, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.settings import GenerateSettings
    from dodgeburn.slide.edits import Unedited


@dataclass
class OnModel:
    """Options of pictures made on a model."""

    model: str = "pocket"
    """A packaged model, a .safetensors file, a diffusers folder or a hub id."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    sampler: str = "dpmpp_2m"
    """Any that `generate` has."""
    batch_size: int | None = None
    """Pictures at a time; none: chosen by their size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """fp32, fp16 or bf16; none: what suits the device."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""

    def settings(self) -> GenerateSettings:
        """How pictures are made."""
        from dodgeburn.sampling.settings import GenerateSettings

        return GenerateSettings(steps=self.steps, guidance=self.guidance, sampler=self.sampler)

    def load(self) -> Model:
        """The model."""
        from dodgeburn.models.loading import load_model

        return load_model(self.model, self.device, self.dtype, self.tokenizer)


def of_pocket(model: Model, what: str) -> None:
    """UserError if the model's pictures are not of the pocket world, where `what` reads attributes."""
    from dodgeburn.merge.compare_measure import speaks_pocket

    if not speaks_pocket(model):
        raise UserError(
            f"{model.name} is no model of the pocket world: there is no reader for its pictures, so {what} has no "
            "figures for it; look at it with slider sweep, or measure proxies with slider evaluate --clip FOLDER"
        )


@contextmanager
def drawing(model: Model, options: OnModel, what: str) -> Iterator[Unedited]:
    """Unedited pictures to share, with a bar on a terminal that counts what is drawn; warnings are said at once."""
    from tqdm import tqdm

    from dodgeburn.slide.edits import Unedited

    with said_at_once(), tqdm(unit="picture", desc=what, disable=None, file=sys.stderr, leave=False) as bar:
        yield Unedited(model, options.settings(), options.batch_size, lambda n: None if bar.update(n) else None)


def need_files(files: Sequence[str], example: str) -> None:
    """UserError without a file."""
    if not files:
        raise UserError(f"no slider: name at least one file, as in {example}")
