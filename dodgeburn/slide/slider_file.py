"""Slider files opened for use, and what was found out about them written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dodgeburn.checkpoint.lora_write import lora_hashes
from dodgeburn.checkpoint.slider_card import Certificate, SliderCard
from dodgeburn.checkpoint.tensorfile import TensorFile, TensorWriter
from dodgeburn.errors import UserError
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.adapted import ALWAYS
from dodgeburn.slide.calibrate import Calibration
from dodgeburn.slide.evaluate import Evaluation


@dataclass(frozen=True)
class Slider:
    """A slider or LoRA from a file, fitted to a model."""

    path: Path
    adapter: Adapter
    card: SliderCard  # an empty one where the file has none

    @property
    def name(self) -> str:
        """As its card or its file says."""
        return self.card.name or self.path.stem

    @property
    def start(self) -> float:
        """Time step above which it is off."""
        return ALWAYS if self.card.start is None else float(self.card.start)

    @property
    def calibrated(self) -> bool:
        """Whether the file says what its 1.0 means and how far it goes."""
        return bool(self.card.unit) and self.card.safe_range is not None

    def target(self, said: str | None = None) -> str:
        """The attribute it moves: what is said, else its card's. UserError if neither says."""
        found = said or self.card.attribute
        if not found:
            raise UserError(f"{self.path.name} does not say which attribute it moves: name it with --attribute smile")
        return found


def open_slider(path: str | Path, model: Model) -> Slider:
    """A file as a slider, fitted to the model. Raises UserError as `load_adapter`."""
    path = Path(path).expanduser()
    adapter = load_adapter(path, model)
    card = adapter.origin.card if adapter.origin is not None else None
    return Slider(path, adapter, card or SliderCard(name=adapter.name))


def open_sliders(paths: Sequence[str | Path], model: Model) -> list[Slider]:
    """Several; UserError for none, or for one that is named twice."""
    if not paths:
        raise UserError("no slider: name at least one file")
    twice = [str(path) for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise UserError(f"{twice[0]} is named twice")
    return [open_slider(path, model) for path in paths]


# ------------------------------------------------------------------------------------------------------------ writing


def calibrated_card(card: SliderCard, found: Calibration) -> SliderCard:
    """The card of the file that `Calibration.applied` belongs in: unit, sigma, safe range and curve; no certificate,
    since that was of the file as it was. What a proxy follows is a phrase and no attribute.
    """
    own = card.attribute if found.by.startswith("proxy") else found.attribute
    said = {"attribute": own, "unit": found.unit, "sigma": found.sigma, "safe_range": found.safe_range,
            "curve": found.curve, "certificate": None}  # fmt: skip
    return SliderCard(**{**card.model_dump(), **said})


def certificate_of(found: Evaluation) -> Certificate:
    """An evaluation as it stands in a file. Beside the schema's fields it has the others that `evaluate` reports."""
    from dodgeburn.slide.evaluate import REPORTED, number

    figures = {key: number(found.mean(key)) for key in REPORTED}
    return Certificate(
        reader=found.reader, n=len(found.split.prompts) * len(found.split.seeds), seeds=found.split.seeds,
        prompts_sha256=found.split.sha256,
        leakage={k: value for k, leak in found.leaks.items() if (value := number(leak.absolute)) is not None},
        intervals={k: (round(ends[0], 4), round(ends[1], 4)) for k in found.figures
                   if (ends := found.ends(k)) is not None},
        **{key: value for key, value in figures.items() if value is not None},
    )  # fmt: skip


def save_slider(adapter: Adapter, card: SliderCard, out: str | Path, layout: str, like: str | Path | None = None,
                spelling: str = "kohya", dtype: str | None = None) -> None:  # fmt: skip
    """Write a slider. like: the file it was made from, which the output may not be, and whose number type is taken
    where none is said. Raises UserError as `save_adapter`.
    """
    inputs: tuple[str | Path, ...] = (like,) if like is not None and Path(like).is_file() else ()
    save_adapter(adapter, out, layout, spelling, dtype or _dtype_of(like), card, inputs=inputs)


def _dtype_of(path: str | Path | None) -> str:
    if path is None or Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return "fp32"
    with TensorFile(path) as file:
        found = {file.info(key).dtype for key in file.keys() if file.info(key).shape}
    return "fp16" if found == {"F16"} else "fp32"


def check_card_file(path: str | Path) -> Path:
    """The path of a .safetensors file; UserError for anything else, which holds no card."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        hint = "make one with dodgeburn convert --lora"
        raise UserError(f"{path} is no .safetensors file, and only these hold a card: {hint}")
    return path


def write_card(path: str | Path, card: SliderCard) -> None:
    """Put another card into a .safetensors file, atomically; every tensor stays as it is, byte for byte.

    Raises UserError for another kind of file.
    """
    path = check_card_file(path)
    with TensorFile(path) as source:
        infos = {key: (source.info(key).dtype, source.info(key).shape) for key in source.keys()}
        said = {**source.header.metadata, "modelspec.usage_hint": card.usage_hint(), **card.as_metadata()}
        with TensorWriter(path, infos, said) as writer:
            for key in infos:
                writer.write(key, 0, source.bytes(key))
            source.check_unchanged()
            # Another program may have laid the tensors out in another order: hashes are of the bytes as they lie.
            digest = writer.sha256_tensors()
            hashes = lora_hashes(digest)
            writer.replace_metadata({key: hashes.get(key, value) for key, value in said.items()})
