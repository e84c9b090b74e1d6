"""Where an estimator expects the defects: its map laid over finished pictures, on the way and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dodgeburn.images.sheet import contact_sheet

SHOWN = (0.25, 0.5, 1.0)
"""Shares of the way whose maps stand on a sheet."""
TINT = np.array([255.0, 0.0, 80.0])


@dataclass(frozen=True)
class Place:
    """One trajectory: its finished picture uint8 [h, w, 3], the maps [k, h', w'] of its moments (probabilities), how
    far along those are [k], and the probability that it ends badly [k]."""

    name: str
    picture: np.ndarray
    heat: np.ndarray
    progress: np.ndarray
    bad: np.ndarray


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: the picture in grey, tinted where the map [h', w'] says that a defect is likely."""
    h, w = picture.shape[:2]
    map_ = Image.fromarray((heat.clip(0, 1) * 255).astype(np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    share = np.asarray(map_, np.float32)[..., None] / 255
    grey = picture.astype(np.float32).mean(-1, keepdims=True)
    return (grey * (1 - share) + TINT * share).round().astype(np.uint8)


def sheet(places: Sequence[Place]) -> Image.Image:
    """A row for each: the picture, and its map at the moments nearest to `SHOWN`. UserError for none."""
    rows: list[list[Image.Image | None]] = []
    captions = []
    for one in places:
        at = [int(np.abs(one.progress - share).argmin()) for share in SHOWN]
        rows.append([Image.fromarray(one.picture), *(Image.fromarray(overlay(one.picture, one.heat[k])) for k in at)])
        captions.append([one.name, *(f"P(bad) {one.bad[k]:.2f}" for k in at)])
    columns = ["picture", *(f"expected after {share:.0%}" for share in SHOWN)]
    return contact_sheet(rows, column_labels=columns, captions=captions)
