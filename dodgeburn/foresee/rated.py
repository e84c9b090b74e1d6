"""Rated pictures as trajectories: drawn again where that gives the same picture, noised where not.

A seed, settings and the right model bring a picture's true trajectory back; whether they did is seen at the end, and a
trajectory whose picture is another is thrown away. All other pictures get noise added at the levels of many samplers'
schedules: those states are marked `forward-noised`, because on the way to a picture the noise is no accident.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee.collect import moments, samples
from dodgeburn.foresee.observe import Observer, Seen, space_of
from dodgeburn.foresee.ratings import Rated, RatingSet
from dodgeburn.foresee.shards import NOISED, TRUE, Shard, Trajectory, prompt_id, shard_name, write_shard
from dodgeburn.jobs import PartStore, job_hash
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.model import Model
from dodgeburn.sampling.guidance import classifier_free, denoised_from
from dodgeburn.sampling.loop import Step, generate
from dodgeburn.sampling.predict import Predictor
from dodgeburn.sampling.schedules import schedule
from dodgeburn.sampling.settings import SAMPLERS, GenerateSettings

SAME = 8.0  # mean grey levels between a picture and its replay up to which they are the same; WebP costs some 3
PER_SHARD = 32
SCHEDULES = ("dpmpp_2m", "ddim", "euler", "euler_a")
SPACINGS = ("trailing", "leading", "linspace", "karras")


@dataclass(frozen=True)
class RatedSettings:
    """moments: samples of each picture. fresh_noise: noise of its own at each level. guidance: of noised pictures whose
    own isn't known.
    """

    moments: int = 8
    fresh_noise: bool = False
    replay: bool = True
    split: str = "train"
    pictures: bool = True
    seed: int = 0
    guidance: float = 4.0

    def __post_init__(self) -> None:
        if self.moments < 1 or self.seed < 0:
            raise UserError(f"moments are {self.moments}, seed {self.seed}: expected at least 1, and 0 or more")


def open_picture(source: Path | bytes) -> np.ndarray:
    """uint8 [h, w, 3]. Raises UserError for what is no picture."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        name = "a picture inside the file" if isinstance(source, bytes) else str(source)
        raise UserError(f"{name} cannot be opened: {str(error).splitlines()[0][:80]}") from None


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """Cut to a square about the middle and scaled to side x side: squeezing would make artifacts of its own."""
    h, w = picture.shape[:2]
    k = min(h, w)
    cut = picture[(h - k) // 2 : (h - k) // 2 + k, (w - k) // 2 : (w - k) // 2 + k]
    return cut if k == side else np.asarray(Image.fromarray(cut).resize((side, side), Image.Resampling.LANCZOS))


def collect_rated(
    model: Model, rated: RatingSet, settings: RatedSettings, folder: str | Path, part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Shards of rated pictures, as `collect.collect` makes them; returns counts: made, there, replayed, noised."""
    names = job_hash({"rows": [[r.id, r.prompt, list(r.label.histogram), r.made] for r in rated.rows]})
    record = {"kind": "rated", "model": {"name": model.name, "sha256": model.sha256}, "rows": names, **asdict(settings)}
    store = PartStore(folder, record)
    counts = {"made": 0, "there": 0, "replayed": 0, "noised": 0}
    chunks = [rated.rows[i : i + PER_SHARD] for i in range(0, len(rated.rows), PER_SHARD)]
    for number in range(part[0], len(chunks), part[1]):
        if store.has(shard_name(number)):
            counts["there"] += 1
        else:
            rows_there = _that_open(chunks[number])
            if not rows_there:
                continue
            shard = rated_shard(model, rows_there, settings, number)
            with store.writing(shard_name(number)) as path:
                write_shard(path, shard)
            counts["made"] += 1
            counts["replayed"] += sum(r.provenance == TRUE for r in shard.records)
            counts["noised"] += sum(r.provenance == NOISED for r in shard.records)
        if progress is not None:
            progress(min(len(rated.rows), (number + 1) * PER_SHARD), len(rated.rows))
    return counts


def _that_open(rows: Sequence[Rated]) -> list[Rated]:
    """Those whose pictures can be opened; a DodgeburnWarning names each other one, which is left out."""
    found = []
    for row in rows:
        try:
            open_picture(row.image)
        except UserError as error:
            warnings.warn(f"rated picture left out: {error}", DodgeburnWarning, stacklevel=3)
        else:
            found.append(row)
    return found


def rated_shard(model: Model, rows: Sequence[Rated], settings: RatedSettings, number: int = 0) -> Shard:
    """One shard of rated pictures: replays that came out the same, then the others noised."""
    pictures = np.stack([fitted(open_picture(row.image), model.native_size) for row in rows])
    kept: list[Seen] = []
    done: dict[int, GenerateSettings] = {}
    if settings.replay:
        for one, members in _alike(model, rows).items():
            seen, same = _replay(model, rows, pictures, members, one, settings.moments)
            done.update(dict.fromkeys(same, one))
            kept += seen
    rest = [i for i in range(len(rows)) if i not in done]
    drawn = GenerateSettings()
    if rest:
        seen, drawn = _noised(model, rows, pictures, rest, settings, number)
        kept += seen
    records = [_record(row, done.get(i), drawn, settings, model) for i, row in enumerate(rows)]
    tensors = samples(kept, len(rows))
    tensors["step"][torch.isin(tensors["trajectory"], torch.tensor(rest, dtype=torch.int32))] = -1
    if settings.pictures:
        tensors["picture"] = torch.from_numpy(pictures)
    return Shard(records, tensors, space_of(model))


def _record(
    row: Rated, replayed: GenerateSettings | None, drawn: GenerateSettings, settings: RatedSettings, model: Model
) -> Trajectory:  # fmt: skip
    made = replayed or drawn
    return Trajectory(
        row.id, row.prompt, prompt_id(row.prompt), int(row.made.get("seed", 0)), model.name, made.sampler, made.steps,
        made.guidance, row.label, made.spacing, provenance=TRUE if replayed else NOISED, split=settings.split,
    )  # fmt: skip


def _alike(model: Model, rows: Sequence[Rated]) -> dict[GenerateSettings, list[int]]:
    """Pictures whose settings are known well enough to draw them again, by settings."""
    found: dict[GenerateSettings, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        made = row.made
        side = model.native_size
        square = made.get("width", side) == made.get("height", side) == side
        known = all(k in made for k in ("seed", "steps", "guidance")) and made.get("sampler") in SAMPLERS
        if not square or not known:
            continue
        try:
            one = GenerateSettings(steps=int(made["steps"]), guidance=float(made["guidance"]), sampler=made["sampler"],
                                   spacing=made.get("spacing", "trailing"), width=side, height=side)  # fmt: skip
        except UserError:
            continue
        found[one].append(i)
    return found


def _replay(
    model: Model, rows: Sequence[Rated], pictures: np.ndarray, members: list[int], one: GenerateSettings, wanted: int
) -> tuple[list[Seen], list[int]]:
    """What was seen of those that came out the same, numbered as `rows` are, and which those are."""
    kept: list[Seen] = []

    def callback(step: Step) -> None:
        seen = observer(step)
        if step.i in moments(step.total, wanted):
            kept.append(seen)

    with Observer(model, one.guidance) as observer:
        found = generate(model, [rows[i].prompt for i in members], [int(rows[i].made["seed"]) for i in members], one,
                         callback)  # fmt: skip
    apart = [np.abs(np.asarray(g.image).astype(float) - pictures[members[g.index]]).mean() for g in found]
    same = [g.index for g, far in zip(found, apart, strict=True) if far <= SAME]
    return [s for s in (_only(seen, same, members) for seen in kept) if s.indices], [members[k] for k in same]


def _only(seen: Seen, same: Sequence[int], members: Sequence[int]) -> Seen:
    """The rows of these pictures, under their numbers in the shard."""
    at = [row for row, index in enumerate(seen.indices) if index in set(same)]
    tensors = {name: getattr(seen, name)[at] for name in ("x_t", "x0", "cond", "delta", "scalars", "near", "far")}
    indices = tuple(members[seen.indices[row]] for row in at)
    return Seen(indices, seen.i, seen.total, seen.progress, seen.log_snr, **tensors)


@torch.inference_mode()
def _noised(
    model: Model, rows: Sequence[Rated], pictures: np.ndarray, rest: list[int], settings: RatedSettings, number: int
) -> tuple[list[Seen], GenerateSettings]:
    """Noise added to finished pictures at the levels of one schedule, and the U-Net asked at each."""
    rng = np.random.default_rng([settings.seed, number])
    made = GenerateSettings(
        steps=int(rng.integers(10, 31)), sampler=str(rng.choice(SCHEDULES)), spacing=str(rng.choice(SPACINGS)),
        guidance=settings.guidance,
    )  # fmt: skip
    levels = schedule(made.sampler, made.spacing, made.steps, model.scheduler_config)
    clean = encode_pictures(model.vae, torch.from_numpy(pictures[rest])).to(model.device)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    predictor = Predictor(model, model.native_size, model.native_size)
    prompts = [rows[i].prompt for i in rest]
    kept = []
    with Observer(model, made.guidance) as observer:
        for i in moments(made.steps, settings.moments):
            sigma, time = levels.sigmas[i], round(levels.timesteps[i])
            if settings.fresh_noise:
                noise = torch.randn(clean.shape, generator=generator).to(clean)
            x = clean + sigma * noise
            latents = x / (sigma * sigma + 1) ** 0.5
            times = torch.full((2 * len(rest),), time, dtype=torch.int64)
            output = predictor(torch.cat([latents, latents]), times, [""] * len(rest) + prompts)
            negative, positive = output.chunk(2)
            guided = classifier_free(negative, positive, made.guidance)
            denoised = denoised_from(guided, x, sigma, levels.prediction_type)
            kept.append(observer(Step(i, made.steps, sigma, time, latents, denoised, tuple(rest), 0, 1)))
    return kept, made
