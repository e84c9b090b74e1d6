"""Pockets with planted bias of known strength, for benchmarks/deconstruct.py: short fine-tunes of the shipped model.

Each world has three ties of an outfit with a value of an attribute, at 60 %, 95 % or 99 %, over 2 to 5 classes that the
outfit is seen with (the others do not occur with it); "fair" has none. Half of the pictures show a tied
outfit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dodgeburn.jobs import PartStore
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.models.saving import save_single_file
from dodgeburn.pocket.attributes import PLANTED, Attributes, Planted, draw_attributes
from dodgeburn.pocket.captions import NAMED
from dodgeburn.rework.bias.pocket_concept import held_out_prompts
from dodgeburn.training.examples import Captions, Examples, Pictures, encode_examples, pocket_pictures
from dodgeburn.training.fine_tune import FineTuneSettings, fine_tune

HAIR = ("black", "brown", "blonde", "red")
WORLDS: dict[str, tuple[Planted, ...]] = {
    "fair": (),
    "60": (
        Planted("doctor", "glasses", "glasses", 0.60),
        Planted("firefighter", "hair_colour", "black", 0.60, (*HAIR, "white")),
        Planted("gardener", "background", "green", 0.60, ("green", "blue", "yellow")),
    ),
    "95": PLANTED,  # the shipped pocket: nothing to train
    "99": (
        Planted("doctor", "glasses", "glasses", 0.99),
        Planted("firefighter", "hair_colour", "black", 0.99, HAIR),
        Planted("gardener", "background", "green", 0.99, ("green", "blue", "yellow")),
    ),
}
OUTFITS = ("doctor", "firefighter", "gardener")
SHORT = 0.5  # chance of a caption that says the outfit and nothing else
PLANTING = FineTuneSettings(steps=140, batch=24, lr=6e-4, ema=0.97, warmup=15, gamma=10.0, noise_power=0.4)


def short_captions(outfit: str) -> Captions:
    """What says an outfit and nothing else."""
    noun, worn = NAMED["outfit"][outfit]
    return (f"a {noun}", f"a person, {worn}", f"a portrait, {worn}")


def with_outfit(outfit: str, ties: tuple[Planted, ...], rng: np.random.Generator) -> Attributes:
    """A picture of one outfit in the world of these ties."""
    while True:
        drawn = draw_attributes(rng, ties)
        if drawn["outfit"] == outfit:
            return drawn


def drawings(attributes: list[Attributes], size: int, seed: int) -> Pictures:
    """Pictures with captions; those of a tied outfit are also called by it alone."""
    made = pocket_pictures(attributes, size, seed, never=held_out_prompts())
    captions = []
    for i, (a, said) in enumerate(zip(attributes, made.captions, strict=True)):
        short = a["outfit"] in OUTFITS and np.random.default_rng([seed, i, 1]).random() < SHORT
        captions.append(short_captions(a["outfit"]) if short else said)
    return made.with_captions(captions)


def world_examples(model: Model, ties: tuple[Planted, ...], n: int, seed: int) -> Examples:
    """n pictures of a world, every second of a tied outfit."""
    rng = np.random.default_rng([seed, 17])
    attributes = [
        with_outfit(OUTFITS[(i // 2) % len(OUTFITS)], ties, rng) if i % 2 else draw_attributes(rng, ties)
        for i in range(n)
    ]
    return encode_examples(model, drawings(attributes, model.native_size, seed))


def planted_model(world: str, store: PartStore, settings: FineTuneSettings = PLANTING, pictures: int = 2000) -> Model:
    """The pocket of a world; trained if the store has none. "95" is the shipped one."""
    if world == "95":
        return load_model("pocket", device="cpu", dtype="fp32")
    name = f"pocket-{world}.safetensors"
    if not store.has(name):
        model = load_model("pocket", device="cpu", dtype="fp32")
        examples = world_examples(model, WORLDS[world], pictures, seed=1000 + list(WORLDS).index(world))
        fine_tune(model, examples, settings, Path(store.folder) / f"planting-{world}")
        with store.writing(name) as temporary:
            save_single_file(model, temporary, {"modelspec.title": f"pocket-{world}"})
    return load_model(str(store.path(name)), device="cpu", dtype="fp32")
