"""Settings read back from a picture: our own exactly, A1111's and ComfyUI's as far as they mean something here.

No torch at module level.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError
from dodgeburn.images.comfy import ComfyRequest, read_graph
from dodgeburn.images.png import Infotext, read_png
from dodgeburn.sampling.loras import ALWAYS, LoraUse, named_values, take_tags, uses_of
from dodgeburn.sampling.settings import ALIASES, SAMPLERS, SPACINGS, STOCHASTIC, GenerateSettings
from dodgeburn.sampling.spelling import plain
from dodgeburn.sampling.thresholding import Thresholding

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as a record has it, as `load_model` wants it
_HYPERNET = re.compile(r"<(?:lora|lyco|hypernet):([^:>]+)(?::([^>]*))?>")  # tags that nothing here acts on

# A1111's "Automatic" schedule, and what an infotext from before 1.9 means by a sampler's bare name.
AUTOMATIC = {
    "dpm2": "karras", "dpm2_a": "karras", "dpmpp_2s_a": "karras", "dpmpp_2m": "karras", "dpmpp_sde": "karras",
    "dpmpp_2m_sde": "exponential", "dpmpp_2m_sde_heun": "exponential", "dpmpp_3m_sde": "exponential",
}  # fmt: skip

# Keys of an infotext that are honoured below, or that change no pixel.
HONOURED = {
    "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash", "Clip skip", "Version",
    "RNG", "Dynamic thresholding enabled", "Mimic scale", "Separate Feature Channels", "Scaling Startpoint",
    "Variability Measure", "Interpolate Phi", "Threshold percentile", "Mimic mode", "Mimic scale minimum", "CFG mode",
    "CFG scale minimum", "Scheduler value", "Lora hashes", "Lora starts", "TI hashes", "Prompt", "Negative prompt",
    "User", "Created Date",
}  # fmt: skip


@dataclass(frozen=True)
class EmbeddingUse:
    """A textual inversion that a picture was made with."""

    name: str
    sha256: str = ""  # of the file, or its first digits
    file: str = ""


@dataclass
class Request:
    """What a picture asks for when it is to be made again."""

    kind: str  # "dodgeburn", "A1111" or "ComfyUI": whose settings they are
    prompt: str
    seeds: list[int]  # one, or those of a contact sheet
    settings: GenerateSettings
    model: str = ""  # the name that stands in the picture
    model_hash: str = ""  # sha256, or the first characters of it
    batch: tuple[int, int] = (0, 1)  # (row, pictures) of the batch that it was made in
    dtype: str | None = None
    device: str | None = None
    adapters: list[LoraUse] = field(default_factory=list)  # to be found by name and hash
    embeddings: list[EmbeddingUse] = field(default_factory=list)  # likewise
    tuned: tuple[str, str, float] | None = None  # name, sha256 and strength of a tuned model
    not_honoured: list[str] = field(default_factory=list)  # what it says besides that can't be followed here


def request_of(path: str | Path) -> Request:
    """Read a picture's settings: ours, else A1111's, else ComfyUI's.

    Raises UserError for a file that can't be read, has no settings, or has settings outside what can be sampled.
    """
    text = read_png(path)
    try:
        if text.own is not None:
            return _own(text.own)
        if text.infotext is not None and "Steps" in text.infotext.settings:
            return _a1111(text.infotext)
        graph = None if text.graph is None else read_graph(text.graph)
        if graph is not None:
            return _comfy(graph)
    except UserError as error:
        raise UserError(f"{path}: its settings can't be used: {error}") from error
    said = ", ".join(text.chunks) or "no text at all"
    raise UserError(
        f"{path} has no generation settings: expected an A1111 infotext ('parameters'), a ComfyUI graph ('prompt') or "
        f"dodgeburn's own, found {said}"
    )


def _own(record: dict[str, Any]) -> Request:
    known = {name: record[name] for name in GenerateSettings.model_fields if name in record}
    known.setdefault("prompt_syntax", "plain")  # pictures from before there were prompt weights
    try:
        settings = GenerateSettings(**known)
    except ValueError as error:  # pydantic's, of values of a wrong type
        raise UserError(f"dodgeburn's record is damaged ({str(error).splitlines()[0]})") from error
    if "prompts" in record:
        raise UserError("it is a sheet of pictures with prompts of their own: give one of its pictures")
    seeds, batch = record.get("seeds", [record.get("seed")]), record.get("batch", [0, 1])
    if not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError("dodgeburn's record has no whole-number seed")
    if not (isinstance(batch, list) and len(batch) == 2 and all(type(b) is int for b in batch)
            and 0 <= batch[0] < batch[1] <= 4096):  # fmt: skip
        raise UserError(f"dodgeburn's record has a batch of {batch}")

    def string(name: str) -> str:
        value = record.get(name)
        return value if isinstance(value, str) else ""

    return Request(
        kind="dodgeburn", prompt=string("prompt"), seeds=seeds, settings=settings, model=string("model"),
        model_hash=string("model_sha256"), batch=(batch[0], batch[1]), dtype=DTYPES.get(string("dtype")),
        device=string("device") or None, adapters=uses_of(record.get("adapters", [])),
        embeddings=_embeddings(record.get("embeddings", [])), tuned=_tuned(record.get("tuned")),
    )  # fmt: skip


def _embeddings(said: Any) -> list[EmbeddingUse]:
    known = isinstance(said, list) and len(said) <= 1000
    rows = [[one.get(key, "") for key in ("name", "sha256", "file")] if isinstance(one, dict) else [None]
            for one in (said if known else [])]  # fmt: skip
    if not known or not all(row[0] and all(isinstance(text, str) for text in row) for row in rows):
        raise UserError("dodgeburn's record has damaged embeddings")
    return [EmbeddingUse(*row) for row in rows]


def _tuned(said: Any) -> tuple[str, str, float] | None:
    if said is None:
        return None
    found = [said.get(key) for key in ("model", "sha256", "strength")] if isinstance(said, dict) else []
    match found:
        case [str(name), str(sha256), int() | float() as strength] if math.isfinite(strength):
            return name, sha256, float(strength)
    raise UserError(f"dodgeburn's record has a damaged tuned model: {str(said)[:100]}")


def _number(settings: dict[str, str], key: str, default: float) -> float:
    try:
        return float(settings.get(key, default))
    except ValueError:
        raise UserError(f"{key} is {settings[key]!r}, not a number") from None


def _whole(settings: dict[str, str], key: str, default: int) -> int:
    text = settings.get(key, str(default))
    if not re.fullmatch(r"-?\d{1,20}", text):
        raise UserError(f"{key} is {text!r}, not a whole number")
    return int(text)


def _spoken(name: str, names: dict[str, tuple[str, str]], column: int) -> str | None:
    """Our name for another program's: the first whose name there is this one."""
    for ours, theirs in names.items():
        if plain(theirs[column]) == plain(name):
            return ours
    spelled = ALIASES.get(plain(name), plain(name))
    return spelled if spelled in names else None


def _other_noise(sampler: str, program: str) -> list[str]:
    return [f"the noise that {sampler} adds: {program} draws it otherwise"] if sampler in STOCHASTIC else []


def _a1111(info: Infotext) -> Request:
    said, missed = info.settings, []
    name, spacing = said.get("Sampler", "Euler"), said.get("Schedule type", "Automatic")
    for suffix in ("Karras", "Exponential"):  # before 1.9 the schedule stood in the sampler's name
        if name.endswith(" " + suffix):
            name, spacing = name.removesuffix(" " + suffix), suffix
    sampler = _spoken(name, SAMPLERS, 0)
    if sampler is None:
        missed.append(f"Sampler {name}: not here, DPM++ 2M instead")
        sampler = "dpmpp_2m"
    ours = AUTOMATIC.get(sampler, "linspace") if spacing == "Automatic" else _spoken(spacing, SPACINGS, 0)
    if ours is None:
        missed.append(f"Schedule type {spacing}: not here, Karras instead")
        ours = "karras"
    if said.get("RNG", "GPU") != "CPU":
        missed.append(f"RNG {said.get('RNG', 'GPU')}: noise is drawn on the CPU here, so the picture is another one")
    missed += _other_noise(sampler, "A1111")
    prompt, tags = take_tags(info.prompt)
    hashes = named_values(said.get("Lora hashes", ""))
    starts = named_values(said.get("Lora starts", ""))
    adapters = [
        replace(use, sha256_tensors=hashes.get(use.name, ""), start=_number(starts, use.name, ALWAYS))
        for _, use in tags
    ]
    embeddings = [EmbeddingUse(name, hash) for name, hash in named_values(said.get("TI hashes", "")).items()]
    missed += [f"LoRA {tag} at strength {strength or '1'}" for tag, strength in _HYPERNET.findall(prompt)]
    prompt = _HYPERNET.sub("", prompt)
    missed += [f"{key}: {value}" for key, value in said.items() if key not in HONOURED]
    size = info.size
    settings = GenerateSettings(
        steps=_whole(said, "Steps", 20), guidance=_number(said, "CFG scale", 7.0), sampler=sampler, spacing=ours,
        width=size[0] if size else None, height=size[1] if size else None, negative=_HYPERNET.sub("", info.negative),
        clip_skip=_whole(said, "Clip skip", 1) if "Clip skip" in said else None, thresholding=_thresholding(said),
    )  # fmt: skip
    return Request("A1111", prompt.strip(), [_whole(said, "Seed", 0)], settings, said.get("Model", ""),
                   said.get("Model hash", ""), adapters=adapters, embeddings=embeddings,
                   not_honoured=missed)  # fmt: skip


def _thresholding(said: dict[str, str]) -> Thresholding | None:
    if said.get("Dynamic thresholding enabled") != "True":
        return None
    given: dict[str, Any] = {
        "mimic_scale": _number(said, "Mimic scale", 7.0),
        "threshold_percentile": _number(said, "Threshold percentile", 100.0) / 100,
        "mimic_scale_min": _number(said, "Mimic scale minimum", 0.0),
        "cfg_scale_min": _number(said, "CFG scale minimum", 0.0),
        "separate_feature_channels": said.get("Separate Feature Channels", "True") == "True",
        "interpolate_phi": _number(said, "Interpolate Phi", 1.0),
        "mimic_mode": said.get("Mimic mode", "Constant"), "cfg_mode": said.get("CFG mode", "Constant"),
        "scaling_startpoint": said.get("Scaling Startpoint", "MEAN"),
        "variability_measure": said.get("Variability Measure", "AD"),
    }  # fmt: skip
    if "Scheduler value" in said:
        given["scheduler_value"] = _number(said, "Scheduler value", 4.0)
    return Thresholding(**given)


def _comfy(graph: ComfyRequest) -> Request:
    missed = list(graph.ignored)
    sampler, spacing = _spoken(graph.sampler, SAMPLERS, 1), _spoken(graph.scheduler, SPACINGS, 1)
    if sampler is None:
        missed.append(f"sampler {graph.sampler}: not here, dpmpp_2m instead")
        sampler = "dpmpp_2m"
    if spacing is None:
        missed.append(f"scheduler {graph.scheduler}: not here, karras instead")
        spacing = "karras"
    missed += _other_noise(sampler, "ComfyUI")
    sizes: dict[str, Any] = {}
    for prefix, told in (("", graph.sizes), ("negative_", graph.negative_sizes)):
        names = {"original": "original_size", "target": "target_size", "crop": "crop"}
        sizes |= {prefix + names[key]: value for key, value in told.items()}
    settings = GenerateSettings(
        steps=graph.steps, guidance=graph.guidance, sampler=sampler, spacing=spacing, width=graph.width or None,
        height=graph.height or None, negative=graph.negative, prompt_syntax="comfy", clip_skip=graph.clip_stop, **sizes,
    )  # fmt: skip
    adapters = [LoraUse(Path(file.replace("\\", "/")).stem, scale, ALWAYS, file=file) for file, scale in graph.loras]
    return Request("ComfyUI", graph.prompt, [graph.seed], settings, graph.checkpoint, adapters=adapters,
                   not_honoured=missed)  # fmt: skip
