"""pocket-dpo: the packaged model aligned with faithfulness, and the settings that both programmed preferences use.

The settings were chosen on development prompts with the reader (docs/notes/dpo.md). Pairs are drawn from prompts that
nothing is chosen or judged on. The result ships as a LoRA; `checkpoint/packaged.py` makes the checkpoint of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.packaged import pack
from dodgeburn.errors import UserError
from dodgeburn.models.model import Model
from dodgeburn.pocket.model import weights_path
from dodgeburn.rework.dpo.file import save_aligned
from dodgeburn.rework.dpo.make_pairs import Drawn, DrawSettings, choose_by, draw_all, pocket_prompts, write_chosen
from dodgeburn.rework.dpo.pairs import LIST, PreferencePairs, read_sets
from dodgeburn.rework.dpo.ratings import rating
from dodgeburn.rework.dpo.settings import DpoSettings
from dodgeburn.rework.dpo.train import Aligned, align
from dodgeburn.sampling.loop import GenerateSettings

NAME = "pocket-dpo"
PREFERENCE = "faithful"
PROMPTS = 832
BEST_OF = 8
STEPS = 10  # of sampling, for pairs and for what is measured of them
SETTINGS: dict[str, DpoSettings] = {
    # Long, and heard at noisy time steps, where light, colour and layout are settled: else the prompt gains nothing.
    "faithful": DpoSettings(
        rank=8, steps=900, batch=16, lr=1e-3, constant=0.5, beta=1000, safeguard=True, slack=0.3, emphasis=1, end=300
    ),
    "looks": DpoSettings(rank=8, steps=60, batch=16, lr=1e-3, constant=0.5),
}
PAIRING: dict[str, tuple[tuple[str, int, float], ...]] = {
    # What is rated, pairs a prompt, and how near a near tie is. Hands apart: with fingers among the wishes a pair
    # differs mostly in them, and little is learned of the rest.
    "faithful": (("wishes", 3, 0.75), ("hands", 1, 0.0)),
    "looks": (("looks", 2, 0.5),),
}
Progress = Callable[[int], None]


def draw_settings(prompts: int = PROMPTS) -> DrawSettings:
    """Which pictures the pairs are chosen among."""
    settings = GenerateSettings(steps=STEPS)
    return DrawSettings(prompts=pocket_prompts(prompts), best_of=BEST_OF, generate=settings)


def pairs_by(drawn: Drawn, preference: str, folder: Path) -> PreferencePairs:
    """The pairs of a preference, written to folders in this one unless they are there, and read from them."""
    folders = []
    for by, pairs, near in PAIRING[preference]:
        folders.append(folder / by)
        if not (folders[-1] / LIST).is_file():
            write_chosen(drawn, choose_by(drawn, rating(by), near, pairs), folders[-1])
    return read_sets(folders)


def aligned(
    model: Model, pairs: PreferencePairs, folder: Path, preference: str = PREFERENCE, **changes: Any
) -> Aligned:
    """The model aligned with pairs, by the settings of a preference with these changes."""
    return align(model, pairs, DpoSettings(**{**SETTINGS[preference].model_dump(), **changes}), folder)


def make_pocket_dpo(model: Model, folder: Path, progress: Progress | None = None, seed: int = 0) -> Path:
    """Pairs, training and the LoRA file as it ships, in a folder; repeated, it goes on where it was.

    Raises UserError unless `model` is the packaged pocket.
    """
    base = weights_path("pocket")
    if model.source is None or model.source.resolve() != base.resolve():
        raise UserError(f"{NAME} is made from the packaged pocket, not from {model.name}")
    out = folder / f"{NAME}.safetensors"
    if out.is_file():
        return out
    drawn = draw_all(model, draw_settings(), folder / f"{NAME}-drawn", progress)
    pairs = pairs_by(drawn, PREFERENCE, folder / f"{NAME}-pairs")
    found = aligned(model, pairs, folder / f"{NAME}-training", seed=seed)
    plain = folder / f"{NAME}-training" / f"{NAME}.safetensors"
    save_aligned(model, pairs, found, plain)
    training = {"config": {"seed": seed, **found.settings.model_dump()}, "logs": {"dpo": found.history}}
    pack(plain, base, out, json.dumps(training))
    return out
