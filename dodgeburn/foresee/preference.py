"""The artifact oracles as a preference: of a prompt's pictures those with less severe artifacts are better.

Pocket pictures only, as the oracles (`truth.py`) fit drawings of that world. Of other models' pictures an estimator or
a person says it (`dpo pairs --by FILE.py:FUNCTION`, or a JSON of choices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.pocket.reader import SIZE, Reader
from dodgeburn.pocket.world import Look
from dodgeburn.rework.dpo.ratings import Rating

NAME = "artifacts"
AT_ONCE = 32  # pictures between two reports


def artifact_rating(
    reader: Reader | None = None, name: str = "reader", looks: tuple[Look, ...] = ("plain",),
    progress: Callable[[int], None] | None = None,
) -> Rating:  # fmt: skip
    """Scores from -5 (worst) to 0 (nothing that can be seen): minus the severity of artifacts against the prompt.

    `reader`, called `name`, says what pictures show; None: the shipped reader. looks: whose drawings pictures are
    compared with; a fine-tune's style is no artifact. progress: told how many pictures were just looked at.
    The scores raise UserError for pictures of a size that the pocket does not draw.
    """
    chosen = reader or Reader.load("reader")

    def scores(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        height, width = pictures.shape[1:3]
        if height != width or height % SIZE:
            raise UserError(
                f"pictures of {width} x {height}: the artifact oracles know the pocket's, {SIZE} or {2 * SIZE} pixels "
                "a side"
            )
        out = []
        for start in range(0, len(pictures), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            found = find_artifacts(pictures[part], prompts[part], chosen, looks)
            out += [-one.severity for one in found]
            if progress is not None:
                progress(len(found))
        return np.array(out) + 0.0  # no negative zeros

    return Rating(NAME, name, scores)
