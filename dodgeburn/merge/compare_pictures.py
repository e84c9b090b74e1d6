"""Making a comparison's pictures: one file a variant, those that are there already left alone."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dodgeburn.jobs import PartStore
from dodgeburn.merge.live import LiveMerge, LivePlan
from dodgeburn.merge.variants import Variant
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings, Step, default_batch_size, generate
from dodgeburn.sampling.prompts import EncodedPrompt, encode

FOLDER = "pictures"


def part_name(name: str, folder: str = FOLDER) -> str:
    """Where the pictures of a variant or a parent lie, within the job's folder."""
    return f"{folder}/{name}.npz"


def load_pictures(path: Path, merge: Mapping[str, Any] | None = None) -> np.ndarray | None:
    """uint8 [prompts, seeds, h, w, 3], or None for a file that is missing or damaged (it is made again then), or is of
    another merge than `merge` (a Variant's dump).
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if merge is not None and json.loads(str(stored["about"]))["merge"] != merge:
                return None
            return np.asarray(stored["pictures"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


class Twins:
    """Which variants have the very same tensors as an earlier one; A and B count as earlier ones."""

    def __init__(self, live: LiveMerge) -> None:
        self._live = live
        self._seen = {live.fingerprint(live.plan_b()): "B", frozenset[Any](): "A"}

    def first(self, variant: Variant) -> str | None:
        """The name of the earlier one, or None for a variant that is new (and is an earlier one from now on)."""
        plan = self._live.plan(variant.merge, variant.more, variant.base_model)
        first = self._seen.setdefault(self._live.fingerprint(plan), variant.name)
        return None if first == variant.name else first


def twin_notes(twins: Mapping[str, str]) -> list[str]:
    """What the reader of a report should know of variants (by name) that equal another one."""
    if not twins:
        return []
    shown = "; ".join(f"{name} = {first}" for name, first in list(twins.items())[:8])
    more = f"; and {len(twins) - 8} more" if len(twins) > 8 else ""
    return [f"{len(twins)} variants have the very same tensors as another, so they share its pictures: {shown}{more}"]


class PictureMaker:
    """Makes the same prompts' and seeds' pictures with one merge after another, each into a file of its own."""

    def __init__(
        self,
        live: LiveMerge,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: GenerateSettings,
        store: PartStore,
        folder: str = FOLDER,
    ) -> None:
        self.live, self.prompts, self.seeds, self.settings = live, list(prompts), list(seeds), settings
        self.store, self.folder = store, folder
        self.resumed = 0  # files that were there
        self._encoded: tuple[int, dict[str, EncodedPrompt]] | None = None

    def make(self, variants: Sequence[Variant], parents: bool = False, of: tuple[int, int] | None = None) -> None:
        """Make the pictures of the variants that are not in the store, after A's and B's with `parents`. The model is
        left as the last one. `of`: how many were made before and how many there will be, for the progress bar.
        """
        jobs: list[tuple[str, dict[str, Any] | None, LivePlan]] = []
        if parents:
            jobs = [("A", None, self.live.plan_a()), ("B", None, self.live.plan_b())]
        for v in variants:
            jobs.append((v.name, about_merge(v), self.live.plan(v.merge, v.more, v.base_model)))
        todo = [job for job in jobs if self.load(job[0], job[1]) is None]
        self.resumed += len(jobs) - len(todo)
        n = len(self.prompts) * len(self.seeds)
        done, count = of or (len(jobs) - len(todo), len(jobs))
        with _Progress(self.live.model, self.settings, n, len(todo), done, count) as progress:
            for name, merge, plan in todo:
                progress.begin(name)
                self._make(name, merge, plan, progress)
                progress.end()

    def load(self, name: str, merge: Mapping[str, Any] | None = None) -> np.ndarray | None:
        """A variant's pictures, as `load_pictures`."""
        return load_pictures(self.store.path(part_name(name, self.folder)), merge)

    def _make(self, name: str, merge: dict[str, Any] | None, plan: LivePlan, progress: _Progress) -> None:
        self.live.apply(plan)
        settings = self.settings
        if self._encoded is None or self._encoded[0] != self.live.text_changes:
            texts = [*self.prompts, settings.negative, ""]
            encoded = encode(self.live.model, texts, settings.clip_skip, settings.prompt_syntax)
            self._encoded = (self.live.text_changes, encoded)
        prompts = [prompt for prompt in self.prompts for _ in self.seeds]
        seeds = [seed for _ in self.prompts for seed in self.seeds]
        start = time.perf_counter()
        made = generate(self.live.model, prompts, seeds, settings, progress.step, encoded=self._encoded[1])
        seconds = time.perf_counter() - start
        pictures = np.stack([np.asarray(picture.image) for picture in made])
        about = {
            "variant": name, "merge": merge, "seconds": round(seconds, 3), "job": self.store.hash,
            **self.store.settings,
        }  # fmt: skip
        buffer = io.BytesIO()
        shaped = pictures.reshape(len(self.prompts), len(self.seeds), *pictures.shape[1:])
        np.savez_compressed(buffer, pictures=shaped, about=np.array(json.dumps(about)))
        with self.store.writing(part_name(name, self.folder)) as part:
            part.write_bytes(buffer.getvalue())


def about_merge(variant: Variant) -> dict[str, Any]:
    """A variant as plain values, its models without local folders."""
    found = variant.model_dump(mode="json", exclude={"name"})
    found["more"] = [Path(name).name for name in variant.more]
    if variant.base_model is not None:
        found["base_model"] = Path(variant.base_model).name
    return found


class _Progress:
    """One bar over all variants with the time left, moving at every denoising step."""

    def __init__(
        self, model: Model, settings: GenerateSettings, pictures: int, todo: int, done: int, count: int
    ) -> None:
        height, width = settings.height or model.native_size, settings.width or model.native_size
        size = default_batch_size(height // model.vae_factor, width // model.vae_factor)
        self.steps = settings.steps * -(-pictures // size)
        self._bar: Any = tqdm(
            total=todo * self.steps, desc="compare", unit="step", disable=None, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )  # fmt: skip
        self._number, self._count = done, count
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
