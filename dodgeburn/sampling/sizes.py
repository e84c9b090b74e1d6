"""SDXL's size conditioning: which size the U-Net is told that the picture had, and where it was cropped.

SDXL was trained with the original size, the crop's corner and the target size of every picture (arXiv 2307.01952,
section 2.2). Telling it a size `size_scale` times the picture's own is what some ComfyUI nodes call CLIP scaling or
size_cond_factor: it asks for the look of a larger, sharper original. (No torch here.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dodgeburn.sampling.settings import GenerateSettings

SIZE_FIELDS = (
    "size_scale", "original_size", "target_size", "crop", "negative_original_size", "negative_target_size",
    "negative_crop",
)  # fmt: skip


def time_ids(settings: GenerateSettings) -> tuple[list[int], list[int]]:
    """(negative's, positive's) row: original height and width, crop's top and left, target height and width, pixels.

    What is not given: the picture's own size times `size_scale`, no crop; and for the negative what the positive has.
    `settings` must have width and height.
    """
    assert settings.width is not None and settings.height is not None
    factor = settings.size_scale if settings.size_scale is not None else 1.0
    own = round(settings.width * factor), round(settings.height * factor)
    original, target = settings.original_size or own, settings.target_size or own
    crop = settings.crop or (0, 0)
    negative = _row(
        settings.negative_original_size or original,
        settings.negative_crop or crop,
        settings.negative_target_size or target,
    )
    return negative, _row(original, crop, target)


def _row(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> list[int]:
    # Settings have (width, height) and (left, top); SDXL was trained with the vertical first.
    return [original[1], original[0], crop[1], crop[0], target[1], target[0]]
