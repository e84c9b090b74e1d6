"""Pictures with captions to train on: drawn by the pocket world, made by the model itself, or read from a folder
(image_folder.py); and the same encoded once, as the latents that a U-Net is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import Attributes
from dodgeburn.pocket.captions import caption
from dodgeburn.pocket.pictures import draw_pictures
from dodgeburn.sampling.loop import GenerateSettings, generate

Captions = tuple[str, ...]
"""A picture's captions: each time that it is trained on, one of them is drawn."""


@dataclass(frozen=True)
class Pictures:
    """n pictures of one size and what is said of them."""

    pixels: np.ndarray  # uint8 [n, height, width, 3]
    captions: list[Captions]
    weights: np.ndarray = field(
        default_factory=lambda: np.ones(0, np.float32)
    )  # [n], how much each counts; 1s if empty
    columns: Mapping[str, list[str]] = field(
        default_factory=dict
    )  # more about each, such as its attributes; "": unsaid

    def __post_init__(self) -> None:
        if not len(self.weights):
            object.__setattr__(self, "weights", np.ones(len(self.captions), np.float32))
        lengths = {len(self.pixels), len(self.captions), len(self.weights), *map(len, self.columns.values())}
        if len(lengths) > 1:
            raise ValueError(f"pictures, captions, weights and columns of different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def sha256(self) -> str:
        """Of the pictures and all that is said of them: names what was trained on."""
        said = [list(self.captions), self.weights.tolist(), {k: self.columns[k] for k in sorted(self.columns)}]
        found = hashlib.sha256(json.dumps([list(self.pixels.shape), said]).encode())
        found.update(np.ascontiguousarray(self.pixels).data)
        return found.hexdigest()

    def take(self, index: Sequence[int] | np.ndarray) -> Pictures:
        """Some of them, in this order."""
        rows = np.arange(len(self))[_index(index)]
        return Pictures(
            self.pixels[rows], [self.captions[i] for i in rows], self.weights[rows],
            {name: [column[i] for i in rows] for name, column in self.columns.items()},
        )  # fmt: skip

    def with_captions(self, captions: Sequence[Captions]) -> Pictures:
        """The same pictures with other captions."""
        return Pictures(self.pixels, list(captions), self.weights, self.columns)


def _index(index: Sequence[int] | np.ndarray) -> np.ndarray:
    found = np.asarray(index)
    return found if len(found) else found.astype(np.int64)  # an empty list would count as floats


def join(parts: Sequence[Pictures]) -> Pictures:
    """Several sets one after the other; a column that one of them lacks is "" there."""
    names = list(dict.fromkeys(name for part in parts for name in part.columns))
    return Pictures(
        np.concatenate([part.pixels for part in parts]), [c for part in parts for c in part.captions],
        np.concatenate([part.weights for part in parts]),
        {name: [v for part in parts for v in part.columns.get(name, [""] * len(part))] for name in names},
    )  # fmt: skip


def pocket_pictures(
    attributes: Sequence[Attributes], size: int, seed: int, captions: int = 4, never: frozenset[str] = frozenset(),
    share: float | None = None,
) -> Pictures:  # fmt: skip
    """Pictures of the pocket world with so many captions each, which name random attributes (`share`: the chance of
    each to be named). never: captions that are kept out (held-out prompts)."""
    said: list[Captions] = []
    for i, a in enumerate(attributes):
        rng = np.random.default_rng([seed, i])
        found: dict[str, None] = {}
        for _ in range(captions * 4):
            text = caption(a, rng, share)[0]
            if text not in never:
                found[text] = None
            if len(found) == captions:
                break
        said.append(tuple(found) or ("",))
    names = [name for name, value in attributes[0].items() if isinstance(value, str)] if attributes else []
    columns = {name: [str(a[name]) for a in attributes] for name in names}
    return Pictures(draw_pictures(list(attributes), size), said, columns=columns)


def model_pictures(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateSettings | None = None,
    captions: Sequence[Captions] | None = None,
) -> Pictures:  # fmt: skip
    """What the model makes of prompts and seeds, captioned by the prompts or otherwise."""
    made = generate(model, prompts, seeds, settings)
    if not made:
        raise UserError("no prompts: there is nothing to draw training pictures from")
    pixels = np.stack([np.asarray(one.image) for one in made])
    return Pictures(pixels, list(captions) if captions is not None else [(prompt,) for prompt in prompts])


@dataclass(frozen=True)
class Examples:
    """Pictures as the U-Net's latents, encoded once."""

    latents: Tensor  # float32 [n, c, h, w] on the CPU
    captions: list[Captions]
    weights: Tensor  # float32 [n]
    size: tuple[int, int]  # (height, width) of the pictures in pixels

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: Sequence[int] | np.ndarray) -> Examples:
        """Some of them, in this order."""
        rows = torch.from_numpy(np.arange(len(self))[_index(index)])
        return Examples(self.latents[rows], [self.captions[int(i)] for i in rows], self.weights[rows], self.size)

    def digest(self) -> str:
        """Hex digest of all of it: what a run that resumes must have been started with."""
        told = hashlib.sha256(repr((self.captions, self.weights.tolist(), self.size)).encode())
        told.update(self.latents.contiguous().numpy().tobytes())
        return told.hexdigest()[:16]


def encode_examples(model: Model, pictures: Pictures) -> Examples:
    """Latents of the pictures by the model's VAE. UserError if it gives any that are not finite (fp16 overflows), or if
    there are no pictures, or if their sides are no multiples of the model's factor."""
    if not len(pictures):
        raise UserError("no pictures: there is nothing to train on")
    height, width = pictures.pixels.shape[1:3]
    if height % model.vae_factor or width % model.vae_factor:
        raise UserError(f"pictures of {width}x{height}: this model needs multiples of {model.vae_factor} pixels")
    latents = encode_pictures(model.vae, torch.from_numpy(np.ascontiguousarray(pictures.pixels)))
    if not bool(torch.isfinite(latents).all()):
        raise UserError("the VAE gives latents that are not finite for these pictures: load the model in fp32")
    weights = torch.from_numpy(np.asarray(pictures.weights, np.float32))
    return Examples(latents, pictures.captions, weights, (height, width))


def join_examples(parts: Sequence[Examples]) -> Examples:
    """Several sets of one size one after the other."""
    sizes = {part.size for part in parts}
    if len(sizes) != 1:
        raise ValueError(f"examples of different sizes: {sorted(sizes)}")
    return Examples(
        torch.cat([part.latents for part in parts]), [c for part in parts for c in part.captions],
        torch.cat([part.weights for part in parts]), sizes.pop(),
    )  # fmt: skip
