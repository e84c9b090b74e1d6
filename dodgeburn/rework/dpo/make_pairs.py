"""Preference pairs made by a program: pictures sampled for each prompt, rated, the best and the worst of them kept.

A folder of pairs holds `pictures/` (with their settings inside), `scores.json`, and what `pairs.read_pairs` reads:
`pairs.jsonl` and `about.json`. Pictures come in batches that are finished or not there, so an interrupted run goes on.
Rating is cheap beside drawing: another preference can rate the same pictures again into a folder of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from dodgeburn.errors import UserError
from dodgeburn.jobs import RECORD, PartStore
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.rework.dpo.ratings import Rating
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.saving import save_picture

FIRST_SEED = 60_000  # of pictures for pairs; evaluations and calibrations of this project begin elsewhere
FIRST_PROMPT = 1_000  # of the development list: what settings are chosen on stands before it
MISSED = ("age", "smile", "eye_size", "brow_angle", "brightness", "saturation", "sharpness")
"""93 of 100 wishes that the pocket's pictures miss, by the reader, are for these (docs/notes/dpo.md)."""
NAMED = {name: 0.5 if name in MISSED else 0.15 for name in (*CONTINUOUS, *CATEGORICAL)}
"""How often prompts that are after these name each attribute."""
BATCH = 64  # pictures drawn, and written, at a time
PICTURES = "pictures"
NEAR_TIE = 0.5
Progress = Callable[[int], None]
"""Told the number of pictures that were just finished, or found."""


class DrawSettings(BaseModel):
    """Which pictures are drawn. Raises UserError for no prompts and for fewer than two pictures a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...]
    best_of: int = 8  # pictures a prompt
    guidances: tuple[float, ...] = ()  # every seed is drawn at each of these; none: at `generate`'s
    first_seed: int = FIRST_SEED  # of the first picture; the next ones count up
    generate: GenerateSettings = GenerateSettings(steps=10)

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise UserError("no prompts: pairs need at least one")
        return value

    @field_validator("best_of")
    @classmethod
    def _best_of(cls, value: int) -> int:
        if not 2 <= value <= 256:
            raise UserError(f"best of {value}: give 2 to 256 pictures a prompt")
        return value

    @model_validator(mode="after")
    def _whole_seeds(self) -> DrawSettings:
        if self.guidances and self.best_of % len(self.guidances):
            raise UserError(
                f"best of {self.best_of} at {len(self.guidances)} guidances: every seed is drawn at each of them, so "
                f"give a multiple of {len(self.guidances)}"
            )
        if len(set(self.guidances)) < len(self.guidances):
            raise UserError(f"guidances {self.guidances}: one stands there twice, and would give the same pictures")
        for guidance in self.guidances:
            self.at(guidance)  # refuses what is out of range
        return self

    @property
    def rows(self) -> list[tuple[str, int, str]]:
        """(prompt, seed, file name) of every picture, prompt by prompt, the guidances of a seed one after the other."""
        each = max(1, len(self.guidances))
        return [
            (prompt, self.first_seed + (p * self.best_of + k) // each, f"{PICTURES}/{p:05d}-{k:02d}.png")
            for p, prompt in enumerate(self.prompts)
            for k in range(self.best_of)
        ]

    def at(self, guidance: float) -> GenerateSettings:
        """The settings of the pictures at a guidance."""
        return GenerateSettings(**{**self.generate.model_dump(), "guidance": guidance})


@dataclass(frozen=True)
class Drawn:
    """Pictures that are there: uint8 [prompts, best_of, h, w, 3], their prompts and files."""

    folder: Path
    settings: DrawSettings
    model: str
    model_sha256: str
    pictures: np.ndarray

    def file(self, prompt: int, k: int) -> str:
        """A picture's file, from the folder."""
        return self.settings.rows[prompt * self.settings.best_of + k][2]


def pocket_prompts(n: int, missed: bool = False) -> tuple[str, ...]:
    """n captions of the pocket world that nothing is chosen or evaluated on; half of those that leave the hand open
    wave (docs/notes/dpo.md says what a third taught).

    missed: they name what the pocket gets wrong more often than the rest.
    """
    from dodgeburn.pocket.captions import caption, parse
    from dodgeburn.pocket.pictures import attributes_of
    from dodgeburn.training.pocket import DEVELOPMENT_LIST, development_prompts, gate_prompts

    never = {row["prompt"] for row in [*gate_prompts(), *development_prompts(FIRST_PROMPT)]}
    out: list[str] = []
    index = FIRST_PROMPT
    while len(out) < n:
        rng = np.random.default_rng([DEVELOPMENT_LIST, index, *([1] if missed else [])])
        prompt = caption(attributes_of(index, DEVELOPMENT_LIST), rng, NAMED if missed else None)[0]
        index += 1
        if len(out) % 2 == 0 and "hand" not in parse(prompt):
            prompt += ", waving"
        if prompt not in never:
            out.append(prompt)
    return tuple(out)


def draw_all(model: Model, settings: DrawSettings, folder: str | Path, progress: Progress | None = None) -> Drawn:
    """Draw what is not there yet. Raises UserError for a folder that holds anything else."""
    told = {"kind": "pictures for pairs", "model": model.name, "model_sha256": model.sha256}
    store = PartStore(folder, {**told, "draw": settings.model_dump(mode="json")})
    rows = settings.rows
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        if not all(store.has(name) for _, _, name in part):
            # A batch is made whole: its mates decide a picture's last bit.
            guidances = settings.guidances or (settings.generate.guidance,)
            for turn, guidance in enumerate(guidances):
                mine = [row for i, row in enumerate(part, start) if i % len(guidances) == turn]
                if not mine:
                    continue
                made = generate(model, [p for p, _, _ in mine], [s for _, s, _ in mine], settings.at(guidance))
                for one, (_, _, name) in zip(made, mine, strict=True):
                    with store.writing(name) as path:
                        save_picture(path, one, model)
        if progress is not None:
            progress(len(part))
    return _load(store.folder, settings, model.name, model.sha256)


def open_drawn(folder: str | Path) -> Drawn:
    """Pictures that `draw_all` made. Raises UserError if the folder holds none, or not all of them."""
    folder = Path(folder).expanduser()
    try:
        said = json.loads((folder / RECORD).read_text())["settings"]
        settings = DrawSettings(**said["draw"])
        name, sha256 = said["model"], said["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds no pictures for pairs: draw some with `dodgeburn dpo pairs`") from None
    return _load(folder, settings, name, sha256)


def _load(folder: Path, settings: DrawSettings, model: str, sha256: str) -> Drawn:
    pictures = []
    for _, _, name in settings.rows:
        try:
            with Image.open(folder / name) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        except OSError:
            raise UserError(f"{folder / name} is missing or damaged: draw the pictures again") from None
    grid = np.stack(pictures).reshape(len(settings.prompts), settings.best_of, *pictures[0].shape)
    return Drawn(folder, settings, model, sha256, grid)


@dataclass(frozen=True)
class Choice:
    """One pair: pictures `win` and `lose` of a prompt."""

    prompt: int
    win: int
    lose: int
    notes: dict[str, Any]


@dataclass
class Chosen:
    """Pairs, and how many prompts gave none and why."""

    choices: list[Choice]
    dropped: dict[str, int]
    about: dict[str, Any]
    scores: np.ndarray | None = None  # [prompts, best_of]


def choose_by(drawn: Drawn, rating: Rating, near: float = NEAR_TIE, pairs: int = 1) -> Chosen:
    """The best and the worst picture of each prompt by a program; with `pairs` > 1 also the second best and worst, ...

    Two pictures whose scores are apart by less than `near` standard deviations of all scores are a near tie and are
    dropped, as are ties, and pictures that cannot be rated; each is counted. Raises UserError for settings out of
    range and if no picture can be rated.
    """
    prompts, best_of = drawn.pictures.shape[:2]
    if not near >= 0:
        raise UserError(f"near ties {near:g}: expected at least 0")
    if not 1 <= pairs <= best_of // 2:
        raise UserError(f"{pairs} pairs a prompt (--pairs-per-prompt) of the best of {best_of} pictures (--best-of): "
                        f"expected 1 to {best_of // 2}, for a pair takes two")  # fmt: skip
    flat = drawn.pictures.reshape(-1, *drawn.pictures.shape[2:])
    words = [prompt for prompt in drawn.settings.prompts for _ in range(best_of)]
    scores = np.asarray(rating.scores(flat, words), dtype=np.float64)
    known = scores[np.isfinite(scores)]
    if not len(known):
        raise UserError(f"{rating.name} rated none of {len(scores)} pictures")
    least = near * float(known.std())
    scores = scores.reshape(prompts, best_of)
    choices: list[Choice] = []
    dropped = {"ties": 0, "near ties": 0, "without two pictures that can be rated": 0}
    for p in range(prompts):
        order = [int(k) for k in np.argsort(-scores[p], kind="stable") if np.isfinite(scores[p, k])]
        for i in range(pairs):
            if len(order) < 2 * (i + 1):
                dropped["without two pictures that can be rated"] += 1
                continue
            win, lose = order[i], order[-1 - i]
            apart = float(scores[p, win] - scores[p, lose])
            if apart <= 0:
                dropped["ties"] += 1
            elif apart < least:
                dropped["near ties"] += 1
            else:
                notes = {"scores": [round(float(scores[p, k]), 6) for k in (win, lose)]}
                choices.append(Choice(p, win, lose, notes))
    about = {
        "preference": rating.name, "by": rating.by, "near_tie": near, "pairs_per_prompt": pairs,
        "score_mean": round(float(known.mean()), 6), "score_deviation": round(float(known.std()), 6),
    }  # fmt: skip
    return Chosen(choices, dropped, about, scores)


def choose_from(drawn: Drawn, path: str | Path) -> Chosen:
    """A person's choices: JSON [{"win": FILE, "lose": FILE}, ...], file names as the drawn pictures have them.

    Entries with "tie": true, or with either side null, are counted and dropped. Raises UserError, naming the entry, for
    a file that isn't there, one that is of another prompt, or the same picture twice.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f'{path}: expected a list of {{"win": FILE, "lose": FILE}}')
    places = {Path(name).name: divmod(i, drawn.settings.best_of) for i, (_, _, name) in enumerate(drawn.settings.rows)}
    choices: list[Choice] = []
    dropped = {"ties": 0, "left open": 0}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, entry {number}: expected win and lose")
        if entry.get("tie"):
            dropped["ties"] += 1
            continue
        sides = [entry.get("win"), entry.get("lose")]
        if not all(sides):
            dropped["left open"] += 1
            continue
        names = [Path(str(side)).name for side in sides]
        for name in names:
            if name not in places:
                raise UserError(f"{path}, entry {number}: no picture {name} in {drawn.folder}")
        (p, win), (q, lose) = (places[name] for name in names)
        if p != q or win == lose:
            what = "is one picture twice" if (p, win) == (q, lose) else "are pictures of two prompts"
            raise UserError(f"{path}, entry {number}: {' and '.join(names)} {what}")
        choices.append(Choice(p, win, lose, {}))
    return Chosen(choices, dropped, {"preference": "a person's", "by": Path(path).name})


def write_chosen(drawn: Drawn, chosen: Chosen, folder: str | Path) -> dict[str, Any]:
    """Write `pairs.jsonl` and `about.json` into the pictures' folder, or into another, which gets the pictures that
    are in a pair. Returns what `about.json` says. Raises UserError if no pair is left, or the folder holds other pairs.
    """
    from dodgeburn.checkpoint.tensorfile import write_atomic
    from dodgeburn.rework.dpo.pairs import ABOUT, LIST

    folder = Path(folder).expanduser()
    counted = ", ".join(f"{count} {reason}" for reason, count in chosen.dropped.items() if count)
    if not chosen.choices:
        raise UserError(f"no pair is left of {len(drawn.settings.prompts)} prompts ({counted or 'no choices'})")
    about = {
        **chosen.about, "pairs": len(chosen.choices), "dropped": chosen.dropped, "prompts": len(drawn.settings.prompts),
        "best_of": drawn.settings.best_of, "first_seed": drawn.settings.first_seed, "model": drawn.model,
        "model_sha256": drawn.model_sha256, "generate": drawn.settings.generate.model_dump(mode="json"),
    }  # fmt: skip
    _check_other(folder, about)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    lines = []
    for choice in chosen.choices:
        files = [drawn.file(choice.prompt, k) for k in (choice.win, choice.lose)]
        if folder.resolve() != drawn.folder.resolve():
            for name in files:
                shutil.copyfile(drawn.folder / name, folder / name)
        row = {"caption": drawn.settings.prompts[choice.prompt], "win": files[0], "lose": files[1], **choice.notes}
        lines.append(json.dumps(row, ensure_ascii=False))
    if chosen.scores is not None:
        rows = [[None if np.isnan(s) else round(float(s), 6) for s in row] for row in chosen.scores]
        write_atomic(folder / "scores.json", (json.dumps(rows) + "\n").encode())
    write_atomic(folder / ABOUT, (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    write_atomic(folder / LIST, ("\n".join(lines) + "\n").encode("utf-8"))
    return about


def _check_other(folder: Path, about: dict[str, Any]) -> None:
    """UserError if the folder holds pairs of another kind."""
    from dodgeburn.rework.dpo.pairs import ABOUT

    try:
        there = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for key in ("preference", "by", "model_sha256", "near_tie", "pairs_per_prompt"):
        if there.get(key) != about.get(key):
            raise UserError(
                f"{folder} holds other pairs ({key} was {there.get(key)!r}, now {about.get(key)!r}): give another "
                f"folder, and --pictures {folder} to rate the same pictures"
            )


def template(drawn: Drawn) -> list[dict[str, Any]]:
    """What a person fills in: an entry a prompt, with the names of its pictures."""
    names = [Path(name).name for _, _, name in drawn.settings.rows]
    return [
        {"prompt": prompt, "pictures": names[p * drawn.settings.best_of : (p + 1) * drawn.settings.best_of],
         "win": None, "lose": None}
        for p, prompt in enumerate(drawn.settings.prompts)
    ]  # fmt: skip


def sheets(drawn: Drawn, prompts: Sequence[int]) -> Image.Image:
    """A contact sheet of some prompts' pictures, labelled as `choices.json` names them."""
    from dodgeburn.images.sheet import contact_sheet

    best_of = drawn.settings.best_of
    rows = [[Image.fromarray(drawn.pictures[p, k]) for k in range(best_of)] for p in prompts]
    names = [[Path(drawn.file(p, k)).name for k in range(best_of)] for p in prompts]
    return contact_sheet(rows, [drawn.settings.prompts[p] for p in prompts], captions=names)
