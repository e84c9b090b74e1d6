"""People's ratings of pictures, from the files in which they are shared: told apart by their columns.

Every source is brought to one scale, AI-Horde's artifacts from 0 (flawless) to 5 (ruined), as a histogram over raters
where there are several. Scores of quality are turned round. Preferences (Pick-a-Pic, HPD, ImageReward's rankings) have
no such scale: a picture's share of won comparisons within its prompt, with one comparison won and one lost added, is
turned round onto it and marked `preference`; that is a rank, and not a measure of artifacts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.foresee.labels import BAD_FROM, LEVELS, Label, one_opinion, opinions
from dodgeburn.foresee.tables import Row, read_table

ENDINGS = (".png", ".webp", ".jpg", ".jpeg")
# DiffusionDB's numbers (docs of the dataset) and names in use -> ours; None: not one of ours.
DIFFUSIONDB_SAMPLERS = {1: "ddim", 2: None, 3: "euler", 4: "euler_a", 5: "heun", 6: "dpm2", 7: "dpm2_a", 8: "lms"}


@dataclass
class Rated:
    """A rated picture: where it is (a file, or its bytes), its prompt, its label, and how it was made where known."""

    id: str
    prompt: str
    label: Label
    image: Path | bytes
    made: dict[str, Any] = field(default_factory=dict)  # seed, steps, guidance, sampler, spacing, width, height


@dataclass
class RatingSet:
    """What files of ratings gave: the pictures, the format of each file, and lines to tell the user."""

    rows: list[Rated]
    formats: dict[str, str]
    said: list[str]


@dataclass
class _Pool:
    """What is known so far, by picture."""

    labels: dict[str, Label] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, str | bytes] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    wins: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    said: list[str] = field(default_factory=list)


def _key(name: Any) -> str:
    return Path(str(name)).stem if str(name).lower().endswith(ENDINGS) else str(name)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _text(value: Any) -> str | None:
    """A text; None for what stands where there is none: null, and pandas' NaN."""
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _made(said: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture was made, as far as it can be used: whole numbers, a guidance scale, names."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        number = _number(value)
        if name in ("sampler", "spacing"):
            if (text := _text(value)) is not None:
                found[name] = text
        elif number is not None and (name == "guidance" or (number == int(number) and number >= 0)):
            found[name] = number if name == "guidance" else int(number)
    return found


def _severity(value: Any, low: float = 0.0, high: float = 5.0, worst_is_high: bool = True) -> float | None:
    """A number of a scale as a severity; None if it is none or lies outside the scale."""
    found = _number(value)
    if found is None or not low <= found <= high:
        return None
    share = (found - low) / (high - low)
    return 5 * (share if worst_is_high else 1 - share)


# -------------------- the formats


def _diffusiondb(rows: list[Row], pool: _Pool) -> None:
    for row in rows:
        key = _key(row["image_name"])
        pool.prompts[key], pool.images[key] = _text(row.get("prompt", row.get("p"))) or "", str(row["image_name"])
        if row.get("image_nsfw") == 2.0:  # blurred by the dataset's makers
            pool.hidden.add(key)
        sampler = row.get("sampler", row.get("sa"))
        if isinstance(sampler, str):
            sampler = sampler.removeprefix("k_").replace("euler_ancestral", "euler_a")
        else:
            sampler = DIFFUSIONDB_SAMPLERS.get(int(_number(sampler) or 0))
        made = {"seed": row.get("seed", row.get("se")), "steps": row.get("step", row.get("st")),
                "guidance": row.get("cfg", row.get("c")), "sampler": sampler, "width": row.get("width"),
                "height": row.get("height"), "spacing": "leading" if sampler == "ddim" else "linspace"}  # fmt: skip
        pool.made[key] = _made(made)


def _horde(rows: list[Row], pool: _Pool) -> None:
    """One row per rating; a user's latest rating of a picture counts."""
    latest: dict[tuple[str, str], tuple[str, float]] = {}
    unusable = 0
    for i, row in enumerate(rows):
        severity = _severity(row.get("artifacts"))
        if severity is None:
            unusable += 1
            continue
        who = str(row.get("user_id") if row.get("user_id") is not None else f"row {i}")
        when = str(row.get("created_at", ""))
        place = (_key(row["id"]), who)
        if place not in latest or when >= latest[place][0]:
            latest[place] = (when, severity)
    _tell(pool, unusable, len(rows))
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(LEVELS))
    for (key, _), (_, severity) in latest.items():
        counts[key] += np.array(one_opinion(severity, "").histogram)
    pool.labels.update({key: opinions(c.tolist(), "ai-horde") for key, c in counts.items()})


def _tell(pool: _Pool, unusable: int, total: int) -> None:
    if unusable:
        pool.said.append(f"{unusable} of {total} ratings say nothing of artifacts on their scale and are left out")


def _prepared(rows: list[Row], pool: _Pool) -> None:
    unusable = 0
    for row in rows:
        key, severity = _key(row["image_name"]), _severity(row["artifacts"])
        pool.prompts[key], pool.images[key] = _text(row.get("prompt")) or "", str(row["image_name"])
        if severity is None:
            unusable += 1
        else:
            n = _number(row.get("ratings_count")) or 1.0
            pool.labels[key] = one_opinion(severity, "aesthetics-scorer", weight=2 * n / (n + 1))
    _tell(pool, unusable, len(rows))


def _image_reward(rows: list[Row], pool: _Pool) -> None:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        key, severity = _key(row["image_path"]), _severity(row["fidelity_rating"], 1, 7, worst_is_high=False)
        pool.prompts[key], pool.images[key] = str(row["prompt"]), str(row["image_path"])
        if severity is not None:
            found[key].append(severity)
    _tell(pool, len(rows) - sum(map(len, found.values())), len(rows))
    for key, values in found.items():
        histogram = np.sum([one_opinion(v, "").histogram for v in values], 0)
        pool.labels[key] = opinions(histogram.tolist(), "imagereward")


def _ranked(images: str, ranks: str) -> Callable[[list[Row], _Pool], None]:
    """Lists of pictures with ranks (1 the best)."""

    def read(rows: list[Row], pool: _Pool) -> None:
        for row in rows:
            names, given = list(row[images]), list(row[ranks])
            for name, own in zip(names, given, strict=False):
                _win(pool, str(row["prompt"]), name, [float(own < r) + 0.5 * (own == r) for r in given], own=True)

    return read


def _hpd_pairs(rows: list[Row], pool: _Pool) -> None:
    for row in rows:
        for name, preferred in zip(row["file_path"], row["human_preference"], strict=False):
            _win(pool, str(row["prompt"]), name, [float(preferred)])


def _pick_a_pic(rows: list[Row], pool: _Pool) -> None:
    for row in rows:
        if row.get("has_label") is False:
            continue
        for side in ("0", "1"):
            key = str(row[f"image_{side}_uid"])
            _win(pool, str(row["caption"]), key, [float(row[f"label_{side}"])])
            if isinstance(row.get(f"jpg_{side}"), bytes):
                pool.images[_key(key)] = row[f"jpg_{side}"]


def _win(pool: _Pool, prompt: str, name: Any, shares: Sequence[float], own: bool = False) -> None:
    key = _key(name)
    pool.prompts[key] = prompt
    pool.images.setdefault(key, str(name))
    values = list(shares)
    if own:
        values.remove(0.5)  # against itself
    pool.wins[prompt][key] += values


def _rich_hf(rows: list[Row], pool: _Pool) -> None:
    """RichHF-18K. Its artifact_score is a plausibility (1 the best); where heatmaps are there, that is checked."""
    scores = [_number(row["artifact_score"]) for row in rows]
    heat = [_heat(row.get("artifact_map")) for row in rows]
    pairs = [(s, h) for s, h in zip(scores, heat, strict=True) if s is not None and h is not None]
    worst_is_high = False
    if len(pairs) >= 3:
        a, b = np.array(pairs).T
        if a.std() > 0 and b.std() > 0 and np.corrcoef(a, b)[0, 1] > 0.2:
            worst_is_high = True
            pool.said.append("artifact_score rises with the heatmaps' sum: read as 1 = worst")
    unusable = 0
    for row, score in zip(rows, scores, strict=True):
        key, severity = _key(row["filename"]), _severity(score, 0, 1, worst_is_high)
        pool.images[key] = str(row["filename"])
        pool.prompts[key] = _text(row.get("prompt", row.get("caption"))) or ""
        if severity is None:
            unusable += 1
        else:
            pool.labels[key] = one_opinion(severity, "richhf")
    _tell(pool, unusable, len(rows))


def _heat(value: Any) -> float | None:
    if not isinstance(value, bytes):
        return None
    from dodgeburn.foresee.rated import open_picture

    return float(open_picture(value).mean())


def _native(rows: list[Row], pool: _Pool) -> None:
    """A row a picture, or one for each of its raters, whose opinions are summed."""
    found: dict[str, list[Label]] = defaultdict(list)
    unusable = 0
    for row in rows:
        key = str(row.get("id", row["image"]))
        pool.images[key] = str(row["image"])
        if (prompt := _text(row["prompt"])) is not None:
            pool.prompts[key] = prompt
        guidance = row.get("guidance", row.get("cfg"))
        made = {k: row.get(k) for k in ("seed", "steps", "sampler", "spacing", "width", "height")}
        pool.made[key] = _made({**made, "guidance": guidance})
        if row.get("histogram") is not None:
            try:
                found[key].append(opinions([float(x) for x in row["histogram"]], "ratings"))
            except (TypeError, ValueError):
                raise UserError(f"{key}: histogram {row['histogram']!r}, expected counts of severity 0 to 5") from None
        elif (severity := _severity(row.get("severity", row.get("artifacts")))) is not None:
            found[key].append(one_opinion(severity, "ratings"))
        else:
            unusable += 1
    _tell(pool, unusable, len(rows))
    for key, labels in found.items():
        summed = np.sum([label.histogram for label in labels], 0).tolist()
        pool.labels[key] = labels[0] if len(labels) == 1 else opinions(summed, "ratings")


@dataclass(frozen=True)
class _Format:
    name: str
    needs: tuple[str, ...]
    read: Callable[[list[Row], _Pool], None]


# The first whose columns are all there; narrower ones stand before wider ones.
FORMATS: tuple[_Format, ...] = (
    _Format("Pick-a-Pic", ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1"), _pick_a_pic),
    _Format("HPD pairs", ("human_preference", "prompt", "file_path"), _hpd_pairs),
    _Format("HPD ranks", ("prompt", "image_path", "rank", "raw_annotations"), _ranked("image_path", "rank")),
    _Format("ImageReward", ("image_path", "prompt", "fidelity_rating"), _image_reward),
    _Format("ImageReward ranks", ("prompt", "generations", "ranking"), _ranked("generations", "ranking")),
    _Format("RichHF-18K", ("filename", "artifact_score"), _rich_hf),
    _Format("aesthetics-scorer", ("image_name", "artifacts"), _prepared),
    _Format("DiffusionDB", ("image_name", "prompt", "seed"), _diffusiondb),
    _Format("DiffusionDB part", ("image_name", "p"), _diffusiondb),
    _Format("plain", ("image", "prompt", "severity"), _native),
    _Format("plain histograms", ("image", "prompt", "histogram"), _native),
    _Format("AI-Horde", ("id", "artifacts"), _horde),
)


def format_of(rows: Sequence[Row], name: str) -> _Format:
    """Which format a table's columns are. Raises UserError that lists what was found and what is needed."""
    columns = list(dict.fromkeys(key for row in rows[:100] for key in row))
    for one in FORMATS:
        if set(one.needs) <= set(columns):
            return one
    shown = ", ".join(columns[:14]) + (", ..." if len(columns) > 14 else "")
    needs = "; ".join(f"{one.name}: {', '.join(one.needs)}" for one in FORMATS)
    raise UserError(f"{name}: its columns ({shown}) are those of no known ratings. Needed are, of {needs}")


def read_ratings(files: Sequence[Path], images: Path) -> RatingSet:
    """Read and join files of ratings, and find the pictures under `images` (or in the files themselves).

    Raises UserError for unknown columns, ratings without pictures, and labels that are all the same or of one class.
    """
    pool, formats = _Pool(), {}
    for path in files:
        rows = read_table(Path(path))
        one = format_of(rows, Path(path).name)
        formats[Path(path).name] = one.name
        whole = [row for row in rows if set(one.needs) <= set(row)]
        if len(whole) < len(rows):
            pool.said.append(f"{len(rows) - len(whole)} of {len(rows)} rows of {path} lack a column and are left out")
        one.read(whole, pool)
    for keys in pool.wins.values():
        for key, shares in keys.items():
            won = (sum(shares) + 1) / (len(shares) + 2)
            pool.labels.setdefault(key, one_opinion(5 * (1 - won), "preference"))
    return RatingSet(_found(pool, images, formats), formats, pool.said)


def _found(pool: _Pool, images: Path, formats: Mapping[str, str]) -> list[Rated]:
    if not pool.labels:
        raise UserError(f"no rating of artifacts in {', '.join(formats)} ({', '.join(formats.values())}): add a file "
                        "of ratings, such as AI-Horde's")  # fmt: skip
    files = _files(images)
    rows, lost, no_prompt = [], [], 0
    for key, label in pool.labels.items():
        if key in pool.hidden:
            continue
        image = pool.images.get(key, key)
        where = image if isinstance(image, bytes) else files.get(str(image)) or files.get(_key(Path(str(image)).name))
        if where is None:
            lost.append(str(image if not isinstance(image, bytes) else key))
        elif key not in pool.prompts:
            no_prompt += 1
        else:
            rows.append(Rated(key, pool.prompts[key], label, where, pool.made.get(key, {})))
    if not rows and no_prompt:
        raise UserError(f"{no_prompt} rated pictures but no prompts: add the file that has them, such as DiffusionDB's")
    if not rows:
        raise UserError(
            f"{len(lost)} ratings but none of their pictures is in {images} (first missing: {lost[0]}): give "
            "--images FOLDER"
        )
    for n, what in ((len(lost), f"have no picture in {images}"), (no_prompt, "have no prompt"),
                    (len(pool.hidden & set(pool.labels)), "were blurred by DiffusionDB")):  # fmt: skip
        if n:
            pool.said.append(f"{n} of {len(pool.labels)} rated pictures {what} and are left out")
    severities = [row.label.severity for row in rows]
    if max(severities) - min(severities) < 1e-6:
        raise UserError(f"all {len(rows)} ratings say {severities[0]:g}: nothing can be learned from a constant")
    bad = sum(row.label.bad for row in rows)
    if bad in (0, len(rows)):
        raise UserError(
            f"{bad} of {len(rows)} rated pictures are bad (severity {BAD_FROM:g} or more): both bad and good are needed"
        )
    return sorted(rows, key=lambda row: row.id)


def _files(folder: Path) -> dict[str, Path]:
    """Pictures under a folder by relative path, by name and by stem."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures; give --images FOLDER")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS:
            for key in (path.stem, path.name, re.sub(r"\\", "/", str(path.relative_to(folder)))):
                found.setdefault(key, path)
    return found
