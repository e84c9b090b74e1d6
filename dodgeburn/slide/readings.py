"""Sweeps read: what a reader saw in the pictures of an edit at several strengths, for every prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.reader import Readings
from dodgeburn.slide.edits import Edit

ATTRIBUTES: tuple[str, ...] = (*CONTINUOUS, *CATEGORICAL)
FINGERS = "fingers"
"""What repair sliders are for: right or wrong, so without a natural deviation and a unit (slide/repair.py)."""

# Root mean square error on 2 000 fresh drawings (list 98, 64 x 64; `dodgeburn pocket evaluate --reader` grades the same
# way): how far a reading may be off without anything having moved.
RMSE: dict[str, dict[str, float]] = {
    "reader": {
        "age": 0.0371, "smile": 0.0326, "eye_size": 0.0488, "brow_angle": 0.0323, "hair_length": 0.0287,
        "skin_tone": 0.0245, "face_width": 0.0283, "beard": 0.0316, "zoom": 0.0166, "brightness": 0.0269,
        "saturation": 0.0409, "sharpness": 0.0375,
    },
    "judge": {
        "age": 0.0403, "smile": 0.0328, "eye_size": 0.0495, "brow_angle": 0.0295, "hair_length": 0.0332,
        "skin_tone": 0.0279, "face_width": 0.0311, "beard": 0.0434, "zoom": 0.0187, "brightness": 0.0282,
        "saturation": 0.0392, "sharpness": 0.0350,
    },
}  # fmt: skip


class ReadsPictures(Protocol):
    """A reader, or what stands for one."""

    def read(self, pictures: np.ndarray, /) -> Readings:
        """Readings of uint8 pictures [n, h, w, 3]."""
        ...


def attribute_of(target: str) -> str:
    """The attribute that a target names: "smile", or "hat" of "hat=crown". Raises UserError for an unknown one."""
    name, _, value = target.partition("=")
    if target == FINGERS:
        raise UserError(
            "fingers are right or wrong and have no natural deviation, so a slider for them is neither calibrated, "
            "composed nor unmixed by the reader: measure it alone, dodgeburn slider evaluate FILE --attribute fingers"
        )
    if name not in ATTRIBUTES:
        raise UserError(
            f"no attribute {name!r} in the pocket world: "
            f"{did_you_mean(name, (*ATTRIBUTES, FINGERS))}expected one of {', '.join(ATTRIBUTES)}"
        )
    if name in CATEGORICAL and value not in CATEGORICAL[name]:
        raise UserError(f"{target!r}: {name} has values, say {name}=VALUE with one of {', '.join(CATEGORICAL[name])}")
    if name in CONTINUOUS and value:
        raise UserError(f"{target!r}: {name} is continuous, say {name} alone")
    return name


def others_of(target: str) -> tuple[str, ...]:
    """All attributes but the target's."""
    return tuple(name for name in ATTRIBUTES if name != attribute_of(target))


def values_of(readings: Readings, target: str) -> np.ndarray:
    """A target's readings as numbers: float64 [n], NaN where unreadable; of "hat=crown" 1 where it is read, else 0; of
    "fingers" how many.
    """
    name, _, value = target.partition("=")
    if target != FINGERS:
        attribute_of(target)
    read = readings.values[name]
    return np.where(readings.unreadable, np.nan, np.asarray(read == value if value else read, dtype=np.float64))


@dataclass(frozen=True)
class SweepReadings:
    """Readings of sweeps over a strength; k scales in rising order, 0 among them."""

    scales: np.ndarray  # float64 [k]
    values: Mapping[str, np.ndarray]  # by attribute [prompts, seeds, k]; float for continuous ones, str for the rest
    unreadable: np.ndarray  # bool [prompts, seeds, k]

    def __post_init__(self) -> None:
        if list(self.scales) != sorted(set(self.scales)) or 0 not in self.scales:
            raise ValueError(f"scales {list(self.scales)}: expected rising numbers with 0 among them")
        if self.unreadable.ndim != 3 or self.unreadable.shape[2] != len(self.scales):
            raise ValueError(f"readings {self.unreadable.shape} for {len(self.scales)} scales")

    @property
    def zero(self) -> int:
        """Position of scale 0."""
        return int(np.flatnonzero(self.scales == 0)[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(prompts, seeds)"""
        return self.unreadable.shape[0], self.unreadable.shape[1]

    def of(self, target: str) -> np.ndarray:
        """float64 [prompts, seeds, k], NaN where unreadable; of "hat=crown" 1 where it is read, else 0."""
        return values_of(Readings(dict(self.values), {}, self.unreadable), target)

    def changed(self, attribute: str) -> np.ndarray:
        """Whether a categorical attribute is another than in the unedited picture: float64 [prompts, seeds, k].

        An unreadable picture has changed; where the unedited one is unreadable nothing can be said: NaN.
        """
        read = self.values[attribute]
        different = (read != read[:, :, self.zero, None]) | self.unreadable
        return np.where(self.unreadable[:, :, self.zero, None], np.nan, different.astype(np.float64))

    def moves(self, target: str) -> np.ndarray:
        """Signed change of a reading against the unedited picture's: float64 [prompts, seeds, k], NaN if unreadable."""
        read = self.of(target)
        return read - read[:, :, self.zero, None]

    def within(self, low: float, high: float) -> SweepReadings:
        """Only the scales from low to high (0 stays)."""
        keep = np.flatnonzero((self.scales >= low - 1e-9) & (self.scales <= high + 1e-9) | (self.scales == 0))
        values = {name: v[:, :, keep] for name, v in self.values.items()}
        return SweepReadings(self.scales[keep], values, self.unreadable[:, :, keep])

    def take(self, prompts: np.ndarray, seeds: np.ndarray) -> SweepReadings:
        """Resampled: row i is prompt prompts[i] with its seeds seeds[i]; int [p] and [p, n]."""
        rows = np.asarray(prompts)[:, None]
        values = {name: v[rows, seeds] for name, v in self.values.items()}
        return SweepReadings(self.scales, values, self.unreadable[rows, seeds])


def sweep_rows(
    prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float]
) -> tuple[list[str], list[int], list[float]]:
    """Parallel lists of every prompt with every seed at every scale, scales innermost."""
    rows = [(prompt, seed, scale) for prompt in prompts for seed in seeds for scale in scales]
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def read_sweep(
    edit: Edit, reader: ReadsPictures, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float]
) -> SweepReadings:
    """Draw and read every prompt with every seed at every scale (0 is added where it is missing)."""
    rising = sorted({*map(float, scales), 0.0})
    return as_sweep(reader.read(edit.pictures(*sweep_rows(prompts, seeds, rising))), len(prompts), len(seeds), rising)


def as_sweep(readings: Readings, prompts: int, seeds: int, scales: Sequence[float]) -> SweepReadings:
    """Readings of `sweep_rows`' pictures as an array of sweeps."""
    shape = (prompts, seeds, len(scales))
    values = {name: np.asarray(v).reshape(shape) for name, v in readings.values.items()}
    return SweepReadings(np.asarray(scales, dtype=np.float64), values, readings.unreadable.reshape(shape))
