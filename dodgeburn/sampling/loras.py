"""LoRAs as people and pictures name them: an option, a tag in a prompt, an entry of a picture's record (no torch here).

An option is `FILE[:SCALE[:START]]`, a tag A1111's `<lora:NAME:SCALE>`; a record has everything that decides the
picture, and names files by content.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.lora_file import names_adapter
from dodgeburn.errors import UserError
from dodgeburn.sampling.emphasis import finite_number

TAG = re.compile(r"<(?:lora|lyco):([^:<>]+)(?::\s*([^:<>]*))?>")
_ENDINGS = (".safetensors", ".pt", ".bin", "")
ALWAYS = 1000.0  # start: above every training time step
MOST = 64  # adapters at once; more is a mistake or an attack


@dataclass(frozen=True)
class LoraUse:
    """A LoRA and how it is applied."""

    name: str
    scale: float = 1.0
    start: float | None = None  # time step above which the U-Net's part is off; None: as its card says, or never off
    blocks: Mapping[str, float] = field(default_factory=dict)  # weights of blocks that aren't 1
    strengths: Mapping[str, float] = field(default_factory=dict)  # the same of modules
    file: str = ""  # name of its file, or a path
    sha256: str = ""  # of the file; "" is not known
    sha256_tensors: str = ""  # of all bytes after the header, or the first characters: A1111's "Lora hashes"

    @property
    def tag(self) -> str:
        """A1111's tag for it."""
        return f"<lora:{self.name}:{self.scale:g}>"

    def record(self) -> dict[str, Any]:
        """Plain values for a picture's record; what says nothing is left out."""
        return {key: value for key, value in asdict(self).items() if value not in ("", None, {})}


def parse_option(text: str) -> LoraUse:
    """`FILE`, `FILE:SCALE` or `FILE:SCALE:START`, START a time step from 0 to 1000. Raises UserError for no file
    name, and for numbers out of range.
    """
    rest = text
    numbers: list[float] = []
    while len(numbers) < 2 and not Path(rest).expanduser().exists():
        head, colon, tail = rest.rpartition(":")
        number = finite_number(tail)
        if not (head and colon) or number is None:
            break
        rest, numbers = head, [number, *numbers]
    if not rest.strip() or rest[0] == ":" or rest[-1] == ":":
        raise UserError(f"LoRA {text!r}: expected FILE, FILE:SCALE or FILE:SCALE:START, such as smile.safetensors:1.5")
    scale, start = [*numbers, 1.0][0], numbers[1] if len(numbers) == 2 else None
    _check(rest, scale, start)
    return LoraUse(Path(rest).stem, scale, start, file=rest)


def take_tags(prompt: str) -> tuple[str, list[tuple[str, LoraUse]]]:
    """The prompt's `<lora:NAME:SCALE>` tags, each with its text; and the prompt without them.

    Tags with two numbers or words after the name (strengths of their own for the text encoders) are no such tags.
    """
    found = []
    for match in TAG.finditer(prompt):
        number = 1.0 if match[2] is None else finite_number(match[2])
        if number is not None:
            found.append((match[0], LoraUse(match[1].strip(), number)))
    return without(prompt, (text for text, _ in found)), found


def without(prompt: str, tags: Iterable[str]) -> str:
    """The prompt without these texts and the blanks that stood around them."""
    for tag in tags:
        prompt = re.sub(rf"[ \t]*{re.escape(tag)}[ \t]*", " ", prompt, count=1).strip(" \t")
    return prompt


def find_lora(use: LoraUse, folders: Sequence[Path], deep: bool = False) -> Path | None:
    """The adapter file of that name in the folders (`deep`: and below), best one with the content that `use` asks for.

    Names are file names with or without ending; a name with a folder in it is taken by its last part.
    """
    wanted = re.split(r"[/\\]", use.file or use.name)[-1]
    if wanted in ("", ".", ".."):
        return None
    names = [wanted] if wanted.endswith(_ENDINGS[:-1]) else [wanted + ending for ending in _ENDINGS]
    found = []
    for folder in folders:
        places = [folder, *sorted(p for p in folder.rglob("*") if p.is_dir())] if deep else [folder]
        found += [place / name for place in places for name in names if _is_adapter(place / name)]
    same = [path for path in found if use.sha256 and _sha256(path) == use.sha256] if len(found) > 1 else []
    return next(iter(same or found), None)


def _sha256(path: Path) -> str:
    from dodgeburn.checkpoint.tensorfile import sha256_file

    return sha256_file(path) if path.is_file() else ""


def _is_adapter(path: Path) -> bool:
    try:
        return names_adapter(path)
    except UserError:
        return False  # a damaged file, or a pickle that isn't safe


def uses_of(record: Any) -> list[LoraUse]:
    """The LoRAs of a picture's record. Raises UserError for what is none."""
    if not isinstance(record, list) or len(record) > MOST or not all(isinstance(one, dict) for one in record):
        raise UserError("dodgeburn's record has adapters that are no list of entries")
    out = []
    for one in record:
        texts = {key: one.get(key, "") for key in ("name", "file", "sha256", "sha256_tensors")}
        weights = {key: one.get(key, {}) for key in ("blocks", "strengths")}
        numbers = [one.get("scale"), one.get("start", ALWAYS)]
        sound = all(isinstance(text, str) for text in texts.values()) and texts["name"]
        for table in weights.values():
            sound = sound and isinstance(table, dict)
            numbers += table.values() if isinstance(table, dict) else []
        if not sound or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise UserError(f"dodgeburn's record has a damaged adapter: {str(one)[:100]}")
        _check(texts["name"], numbers[0], numbers[1])
        out.append(LoraUse(scale=float(numbers[0]), start=float(numbers[1]), **texts, **weights))
    return out


def named_values(text: str) -> dict[str, str]:
    """What an infotext says by LoRA, such as A1111's "Lora hashes": `name: value, name: value`."""
    pairs = (item.rpartition(":") for item in text.split(","))
    return {name.strip(): found.strip() for name, _, found in pairs if name.strip()}


def _check(name: str, scale: float, start: float | None) -> None:
    if start is not None and not 0 <= start <= ALWAYS:
        raise UserError(f"LoRA {name} starts at time step {start:g}: expected 0 to 1000")
    if not abs(scale) <= 1000:
        raise UserError(f"LoRA {name} has the scale {scale:g}: expected -1000 to 1000")
