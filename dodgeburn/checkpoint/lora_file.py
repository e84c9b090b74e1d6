"""Adapter files: which modules of a model they change, by which algorithm, at which rank and scale.

Everything here is read from the header and the few bytes of the alphas, without torch (pickles aside). The change
itself is worked out in lora_delta.py, other spellings are written in lora_write.py.

scale = alpha / rank. An alpha that is missing counts as the rank (scale 1), as in A1111, ComfyUI and diffusers; PEFT
keeps its alphas in `adapter_config.json` beside the file, diffusers in the metadata key `lora_adapter_metadata`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dodgeburn.checkpoint.lora_keys import parse_key
from dodgeburn.checkpoint.metadata import json_of
from dodgeburn.checkpoint.modules import ARCHITECTURES, guess_architecture
from dodgeburn.checkpoint.sources import Tensors, is_index, open_tensors
from dodgeburn.errors import UserError

Kind = Literal["lora", "loha", "lokr", "full"]
DIFFUSERS_ALPHAS = "lora_adapter_metadata"
_KINDS: dict[Kind, str] = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full difference"}
_ALPHA_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b"}


@dataclass(frozen=True)
class AdapterModule:
    """One module's change: `keys` of the file by role, rank (None where the algorithm has none), and scale."""

    name: str
    kind: Kind
    keys: Mapping[str, str]
    rank: int | None
    alpha: float | None  # as the file (or its config) says it; None if it does not
    size: int  # values in the weight that the factors make

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank if self.rank and self.alpha is not None else 1.0


@dataclass
class Adapter:
    """An open adapter file: its modules by diffusers name, and what could not be understood."""

    source: Tensors
    modules: dict[str, AdapterModule]
    unmatched: list[str]  # keys that belong to no module of SD1.5 or SDXL
    spellings: Counter[str]
    architecture: str | None  # "sd15", "sdxl", "sd2", or None if the modules fit more than one
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.source.path.name

    @property
    def title(self) -> str:
        """What it is, in words: "LoRA", or "LoRA and LoKr"."""
        kinds = {module.kind for module in self.modules.values()}
        return " and ".join(title for kind, title in _KINDS.items() if kind in kinds)

    def missing_alphas(self) -> list[str]:
        """Modules whose alpha is not said anywhere."""
        return [m.name for m in self.modules.values() if m.alpha is None and m.rank is not None]


@contextmanager
def open_adapter(path: str | Path) -> Iterator[Adapter]:
    """Open an adapter: a .safetensors file, a pickle (.pt, .bin), or a folder of PEFT or diffusers.

    Raises UserError for a file that is none, whose factors do not fit each other, or that holds an algorithm that
    cannot be read (DoRA, OFT, IA3, GLoRA: named).
    """
    file, config = _find(Path(path).expanduser())
    with open_tensors(file) as source:
        yield _read(source, config)


_FOLDER_NAMES = (
    "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin",
)  # fmt: skip


def adapter_file(folder: Path) -> Path:
    """The adapter in a folder of PEFT or diffusers; UserError if there is none."""
    found = [folder / name for name in _FOLDER_NAMES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds no adapter: expected {' or '.join(_FOLDER_NAMES[:2])} in it")
    return found[0]


def _find(path: Path) -> tuple[Path, dict[str, Any] | None]:
    if path.is_dir():
        path = adapter_file(path)
    config = path.parent / "adapter_config.json"
    if not path.name.startswith("adapter_model") or not config.is_file():
        return path, None
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError(f"{config} cannot be read: expected a JSON object")
    return path, said


def is_adapter(keys: Mapping[str, object]) -> bool:
    """Whether tensors of these names are an adapter's: most of them are spelled as one's."""
    return bool(keys) and 2 * sum(parse_key(key) is not None for key in keys) > len(keys)


def names_adapter(name: str | Path) -> bool:
    """Whether a path is an adapter's: a folder with one (and no model), or a file most of whose keys are one's.

    False for anything that is no readable file. Pickles are opened, safely; raises UserError if one is hostile.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return not (path / "model_index.json").exists() and any((path / one).is_file() for one in _FOLDER_NAMES)
    if not path.is_file() or is_index(path):
        return False
    with open_tensors(path) as source:
        return is_adapter(source.header.tensors)


def _read(source: Tensors, config: dict[str, Any] | None) -> Adapter:
    name = source.path.name
    found: dict[str, dict[str, str]] = {}
    spellings: Counter[str] = Counter()
    prefixes: set[str] = set()
    unmatched: list[str] = []
    refused: Counter[str] = Counter()
    for key in source.keys():
        parsed = parse_key(key)
        if parsed is None or parsed.module is None:
            unmatched.append(key)
            continue
        if parsed.role == "dora" or parsed.role.startswith("unknown:"):
            refused["DoRA" if parsed.role == "dora" else parsed.role.removeprefix("unknown:")] += 1
            continue
        roles = found.setdefault(parsed.module, {})
        if parsed.role in roles:
            raise UserError(f"{name} says {parsed.role} of {parsed.module} twice: {roles[parsed.role]} and {key}")
        roles[parsed.role] = key
        prefixes.add(parsed.prefix)
        if parsed.role != "alpha":
            spellings[parsed.spelling] += 1
    if refused:
        what = ", ".join(f"{algorithm} in {count} modules" for algorithm, count in refused.most_common())
        raise UserError(
            f"{name} holds {what}, which is not supported: only LoRA, LoCon, LoHa, LoKr and full differences are"
        )
    alphas = _said_alphas(source.header.metadata, config)
    modules = {}
    for module, roles in found.items():
        if set(roles) == {"alpha"}:
            unmatched.append(roles["alpha"])
            continue
        modules[module] = _module(source, module, roles, alphas)
    if not modules:
        first = f", first {unmatched[0]}" if unmatched else ""
        raise UserError(
            f"{name} is no adapter for SD1.5 or SDXL: none of its {len(source.keys())} keys is a known module's{first}"
        )
    return Adapter(
        source, modules, unmatched, spellings, _architecture(source, modules, prefixes), dict(source.header.metadata)
    )


# -------------------- one module


def _module(source: Tensors, name: str, roles: Mapping[str, str], alphas: _Alphas) -> AdapterModule:
    shapes = {role: source.info(key).shape for role, key in roles.items() if role != "alpha"}

    def wrong(why: str) -> UserError:
        return UserError(f"{source.path.name}: module {name} {why}")

    kind = _kind(shapes)
    if kind is None:
        raise wrong(f"has {', '.join(sorted(shapes))}, which is no complete LoRA, LoHa, LoKr or full difference")
    for role, shape in shapes.items():
        if 0 in shape or len(shape) > 5 or (role not in ("diff", "diff_b") and len(shape) < 2):
            raise wrong(f"has {role} of shape {list(shape)}")
    rank = _rank(kind, shapes)
    if not _fits(kind, shapes, rank):
        raise wrong(f"has factors that do not fit each other: {', '.join(f'{r} {list(s)}' for r, s in shapes.items())}")
    alpha = _alpha(source, roles["alpha"]) if "alpha" in roles else None
    if alpha is None and rank is not None:
        alpha = alphas.of(name, rank)
    if alpha is not None and not math.isfinite(alpha):
        raise wrong(f"has the alpha {alpha}")
    keys = {role: key for role, key in roles.items() if role != "alpha"}
    return AdapterModule(name, kind, keys, rank, alpha, _size(kind, shapes))


def _kind(roles: Mapping[str, object]) -> Kind | None:
    has = set(roles)
    if {"down", "up"} <= has <= {"down", "up", "mid"}:
        return "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= has and (("hada_t1" in has) == ("hada_t2" in has)):
        return "loha" if all(role.startswith("hada_") for role in has) else None
    if has and all(role.startswith("lokr_") for role in has):
        one = ("lokr_w1" in has) != ({"lokr_w1_a", "lokr_w1_b"} <= has)
        two = ("lokr_w2" in has) != ({"lokr_w2_a", "lokr_w2_b"} <= has)
        return "lokr" if one and two else None
    return "full" if has and has <= {"diff", "diff_b"} else None


def _rank(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if kind == "lora":
        return shapes["down"][0]
    if kind == "loha":
        return shapes["hada_w1_b"][0]
    if kind == "lokr":  # as LyCORIS: the rank of either factor; with two whole factors there is no scale
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in shapes:
                return shapes[role][0]
    return None


_Shapes = Mapping[str, tuple[int, ...]]
_PAIRS: dict[Kind, list[tuple[str, str, str]]] = {
    "loha": [("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")],
    "lokr": [("lokr_w1_a", "lokr_w1_b", ""), ("lokr_w2_a", "lokr_w2_b", "lokr_t2")],
}


def _fits(kind: Kind, shapes: _Shapes, rank: int | None) -> bool:
    """Whether the factors can be multiplied as lora_delta.py does, so that no file makes torch stumble."""
    if kind == "lora":
        down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
        if up[1] != rank or math.prod(up[2:]) != 1:
            return False
        return mid is None or (len(mid) > 2 and mid[:2] == (rank, rank) and math.prod(down[2:]) == 1)
    for a, b, core in _PAIRS.get(kind, []):
        if a not in shapes:
            continue
        if len(shapes[a]) != 2 or (len(shapes[b]) != 2 and kind == "loha"):
            return False
        if core in shapes:
            if len(shapes[core]) < 3 or len(shapes[b]) != 2 or shapes[core][:2] != (shapes[a][0], shapes[b][0]):
                return False
        elif shapes[a][1] != shapes[b][0]:
            return False
    sizes = _halves(kind, shapes)
    return kind != "loha" or sizes[0] == sizes[1]


def _halves(kind: Kind, shapes: _Shapes) -> list[tuple[int, int]]:
    """Rows and values a row of the two factors of LoHa and LoKr."""
    out = []
    for a, b, core in _PAIRS.get(kind, []):
        if a not in shapes:
            whole = shapes[a.removesuffix("_a")]
            out.append((whole[0], math.prod(whole[1:])))
        elif core in shapes:
            out.append((shapes[a][1], shapes[b][1] * math.prod(shapes[core][2:])))
        else:
            out.append((shapes[a][0], math.prod(shapes[b][1:])))
    return out


def _size(kind: Kind, shapes: _Shapes) -> int:
    """Values in the product: known before it is made, for a small file can ask for a product of any size."""
    if kind == "lora":
        return shapes["up"][0] * math.prod(shapes["down"][1:]) * math.prod(shapes.get("mid", (1, 1))[2:])
    if kind == "full":
        return math.prod(shapes["diff"]) if "diff" in shapes else 0
    (rows, columns), (more_rows, more_columns) = _halves(kind, shapes)
    return rows * columns if kind == "loha" else rows * more_rows * columns * more_columns


# -------------------- alphas


def _alpha(source: Tensors, key: str) -> float:
    info = source.info(key)
    if info.numel != 1:
        raise UserError(f"{source.path.name}: {key} is of shape {list(info.shape)}, expected one number")
    buffer = bytearray(info.nbytes)
    source.read_into(key, 0, memoryview(buffer))
    if info.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + bytes(buffer))[0])
    if info.dtype not in _ALPHA_FORMATS:
        raise UserError(f"{source.path.name}: {key} is of type {info.dtype}, expected a number")
    return float(struct.unpack(_ALPHA_FORMATS[info.dtype], buffer)[0])


class _Alphas:
    """Alphas that stand beside the tensors: by component ("" for all) a PEFT config."""

    def __init__(self, configs: dict[str, dict[str, Any]]) -> None:
        self._configs = configs

    def of(self, module: str, rank: int) -> float | None:
        """PEFT: scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; patterns by end of the name."""
        component, _, name = module.partition(".")
        config = self._configs.get(component) or self._configs.get("")
        if config is None or "lora_alpha" not in config:
            return None
        alpha = config["lora_alpha"]
        patterns = config.get("alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if name == pattern or name.removeprefix("text_model.") == pattern or _ends(name, pattern):
                alpha = value
                break
        try:
            number = float(alpha)
        except (TypeError, ValueError):
            raise UserError(f"the adapter's config says lora_alpha {alpha!r}: expected a number") from None
        return number * math.sqrt(rank) if config.get("use_rslora") else number


def _ends(name: str, pattern: str) -> bool:
    # As PEFT's get_pattern_key: a regular expression for the end of a name, whole parts of it.
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error:
        return False


def _said_alphas(metadata: Mapping[str, str], config: dict[str, Any] | None) -> _Alphas:
    if config is not None:
        return _Alphas({"": config})
    said = json_of(metadata, DIFFUSERS_ALPHAS)
    if not isinstance(said, dict):
        return _Alphas({})
    if "lora_alpha" in said:
        return _Alphas({"": said})
    configs: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return _Alphas(configs)


# -------------------- architecture


def _architecture(source: Tensors, modules: Mapping[str, AdapterModule], prefixes: set[str]) -> str | None:
    said = " ".join(
        source.header.metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")
    ).lower()
    if "xl" in said:
        return "sdxl"
    if "stable-diffusion-v1" in said or "sd_v1" in said:
        return "sd15"
    width = None
    for name, module in modules.items():
        if name.endswith("attn2.to_k") and module.kind == "lora":
            width = source.info(module.keys["down"]).shape[1]
            break
    guess = guess_architecture(set(modules), width)
    if guess is None and prefixes & {"lora_te1_", "lora_te2_"}:
        return "sdxl"
    return "sd15" if guess is None and "lora_te_" in prefixes else guess


def architecture_title(name: str | None) -> str:
    """In words, as far as the file tells."""
    return ARCHITECTURES[name] if name else "SD1.5 or SDXL (its modules fit both)"
