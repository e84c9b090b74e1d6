"""Making a comparison's pictures: one file a variant, those that are there already left alone."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dodgeburn.jobs import PartStore
from dodgeburn.merge.live import LiveMerge
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings, Step, default_batch_size, generate
from dodgeburn.sampling.prompts import EncodedPrompt, encode


@dataclass(frozen=True)
class Variant:
    """One merge to look at: a preset with a base, and the block shares that they make."""

    preset: str
    base: float
    shares: dict[str, float]

    @property
    def name(self) -> str:
        """Also the name of its pictures' file."""
        return f"{self.preset}-{self.base:g}"


def part_name(name: str) -> str:
    """Where the pictures of a variant or a parent lie, within the job's folder."""
    return f"pictures/{name}.npz"


def load_pictures(path: Path) -> np.ndarray | None:
    """uint8 [prompts, seeds, h, w, 3], or None for a file that is missing or damaged (it is made again
    then).
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return np.asarray(stored["pictures"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def twins_of(live: LiveMerge, variants: Sequence[Variant], keep: tuple[str, ...]) -> dict[str, str]:
    """Variants whose tensors equal an earlier one's, by name -> that one's name (A and B count as earlier
    ones).
    """
    everything = dict.fromkeys(live.model.layout.all_blocks, 1.0)
    seen = {live.fingerprint(live.plan(everything)): "B", (): "A"}
    out: dict[str, str] = {}
    for variant in variants:
        first = seen.setdefault(live.fingerprint(live.plan(variant.shares, keep)), variant.name)
        if first != variant.name:
            out[variant.name] = first
    return out


def twin_notes(twins: Mapping[str, str]) -> list[str]:
    """What the reader of a report should know of `twins_of`."""
    if not twins:
        return []
    shown = "; ".join(f"{name} = {first}" for name, first in list(twins.items())[:8])
    more = f"; and {len(twins) - 8} more" if len(twins) > 8 else ""
    return [f"{len(twins)} variants have the very same tensors as another, so they share its pictures: {shown}{more}"]


def make_pictures(
    live: LiveMerge,
    variants: Sequence[Variant],
    twins: Mapping[str, str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerateSettings,
    keep_of_a: tuple[str, ...],
    store: PartStore,
) -> int:
    """Make the pictures of A, B and the variants (but twins) that are not in the store; returns how many files were.

    Each file holds every prompt with every seed. The model is left as the last variant.
    """
    layout = live.model.layout
    jobs: list[tuple[str, dict[str, float], tuple[str, ...]]] = [
        ("A", dict.fromkeys(layout.all_blocks, 0.0), ("text", "vae")),
        ("B", dict.fromkeys(layout.all_blocks, 1.0), ()),
        *((v.name, v.shares, keep_of_a) for v in variants if v.name not in twins),
    ]
    todo = [job for job in jobs if load_pictures(store.path(part_name(job[0]))) is None]
    texts = [*prompts, settings.negative, ""]
    every_prompt = [prompt for prompt in prompts for _ in seeds]
    every_seed = [seed for _ in prompts for seed in seeds]
    shape = (len(prompts), len(seeds))
    encoded: dict[str, EncodedPrompt] | None = None
    with _Progress(live.model, settings, len(every_seed), len(todo), len(jobs) - len(todo)) as progress:
        for name, shares, keep in todo:
            progress.begin(name)
            changed = live.apply(live.plan(shares, keep))
            if encoded is None or any(part.startswith("text_encoder") for part in changed):
                encoded = encode(live.model, texts, settings.clip_skip, settings.prompt_syntax)
            start = time.perf_counter()
            made = generate(live.model, every_prompt, every_seed, settings, progress.step, encoded=encoded)
            pictures = np.stack([np.asarray(picture.image) for picture in made])
            _save(store, name, pictures.reshape(*shape, *pictures.shape[1:]), time.perf_counter() - start)
            progress.end()
    return len(jobs) - len(todo)


def _save(store: PartStore, name: str, pictures: np.ndarray, seconds: float) -> None:
    about = json.dumps({"variant": name, "seconds": round(seconds, 3), "job": store.hash, **store.settings})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pictures=pictures, about=np.array(about))
    with store.writing(part_name(name)) as part:
        part.write_bytes(buffer.getvalue())


class _Progress:
    """One bar over all variants with the time left, moving at every denoising step."""

    def __init__(self, model: Model, settings: GenerateSettings, pictures: int, todo: int, done: int) -> None:
        height, width = settings.height or model.native_size, settings.width or model.native_size
        size = default_batch_size(height // model.vae_factor, width // model.vae_factor)
        self.steps = settings.steps * -(-pictures // size)
        self._bar: Any = tqdm(
            total=todo * self.steps, desc="compare", unit="step", disable=None, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )  # fmt: skip
        self._number, self._count = done, todo + done
        self._made = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, name: str) -> None:
        self._number += 1
        self._made = 0
        self._bar.set_description_str(f"{self._number}/{self._count} {name}")

    def step(self, step: Step) -> None:
        self._made += 1
        if self._made <= self.steps:
            self._bar.update(1)

    def end(self) -> None:
        self._bar.update(self.steps - min(self._made, self.steps))
