"""dodgeburn inspect: what a checkpoint is, from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dodgeburn.checkpoint.embedding_file import embedding_title
from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.lora_file import adapter_file
from dodgeburn.checkpoint.lora_inspect import adapter_lines, inspect_adapter
from dodgeburn.checkpoint.metadata import CONFIGS, RECIPE, recipe_of
from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.slider_card import SLIDER, card_lines, slider_of
from dodgeburn.checkpoint.sources import is_index, open_tensors
from dodgeburn.checkpoint.tensorfile import read_header
from dodgeburn.checkpoint.unet_kind import input_channels, kind_of, prediction_type
from dodgeburn.cli.options import parse
from dodgeburn.errors import UserError
from dodgeburn.images.png import KINDS
from dodgeburn.merge.recipe_tree import recipe_lines

HELP = "show what a checkpoint or a LoRA is: layout, components, types, metadata, recipe"
EXAMPLE = "dodgeburn inspect model.safetensors"
_WIDTH = 100  # characters of a metadata value that are shown


@dataclass
class Inspect:
    """Show a checkpoint's layout, components, types, metadata and recipe; of a LoRA its spelling, ranks and hashes too.

    Of a checkpoint only the header is read.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .safetensors file (checkpoint or adapter), a PEFT folder, or a packaged model such as pocket."""
    recipe: bool = False
    """Print only the recipe, as text that `dodgeburn merge` runs: redirect it to a .toml file beside the parents."""
    json: bool = False
    """Print one JSON object as the last line, with all metadata in full."""


def inspect_file(name: str) -> dict[str, Any]:
    """Everything the header says, as plain values; UserError for a file that is not a sound safetensors
    file. Of an adapter (a file, or a folder of PEFT's) also its kind, spelling, ranks, modules and hashes.
    """
    path = find_checkpoint(name)
    if path.suffix.lower() in KINDS:
        raise UserError(f"{path} is named as a picture: expected a .safetensors file, a folder of PEFT's or a packaged "
                        f"model; a picture's settings are read by `dodgeburn generate --from {path}`")  # fmt: skip
    if (path / "model_index.json").is_file():
        raise UserError(f"{path} is a diffusers folder: inspect one of its files, as {path}/unet/*.safetensors, or the "
                        f"single file that `dodgeburn convert {path} -o FILE` makes of it")  # fmt: skip
    if path.is_dir():
        path = adapter_file(path)
    if is_index(path):
        with open_tensors(path) as source:
            header = source.header
    else:
        header = read_header(path)
    values: Counter[str] = Counter()
    components: dict[str, dict[str, Any]] = {}
    layout, why = None, ""
    try:
        layout = detect_layout(header.tensors, {key: info.shape for key, info in header.tensors.items()})
    except UserError as error:
        why = str(error)
    for key, info in header.tensors.items():
        values[info.dtype] += info.numel
        part = components.setdefault(
            layout.component(key) if layout else "all", {"tensors": 0, "values": 0, "bytes": 0, "dtypes": {}}
        )
        part["tensors"] += 1
        part["values"] += info.numel
        part["bytes"] += info.nbytes
        part["dtypes"][info.dtype] = part["dtypes"].get(info.dtype, 0) + 1
    channels = input_channels({key: info.shape for key, info in header.tensors.items()}) if layout else None
    adapter = inspect_adapter(path) if layout is None and not is_index(path) else None
    embedding = embedding_title(header.tensors) if layout is None and adapter is None else None
    return {
        "file": path.name,
        "bytes": header.size,
        "layout": layout.name if layout else None,
        "layout_title": layout.title if layout else embedding or f"unknown: {why}",
        "blocks": list(layout.blocks) if layout else [],
        "tensors": len(header.tensors),
        "values": sum(values.values()),
        "dtypes": dict(values),
        "components": components,
        "in_channels": channels,
        "prediction_type": prediction_type(header) if layout else None,
        "clip_skip": _clip_skips(layout.name) if layout else {},
        "adapter": adapter,
        "metadata": header.metadata,
        "recipe": recipe_of(header.metadata),
        **_slider(header.metadata),
    }


def _slider(metadata: dict[str, str]) -> dict[str, Any]:
    """A slider's card and the same in words; a damaged one is no reason to say nothing of the file."""
    try:
        card = slider_of(metadata)
    except UserError as error:
        return {"slider": None, "slider_text": [f"slider: {error}"]}
    if card is None:
        return {"slider": None, "slider_text": []}
    return {"slider": card.model_dump(mode="json"), "slider_text": card_lines(card)}


def _clip_skips(layout: str) -> dict[int, str]:
    """What the usual CLIP skips are called elsewhere, the trained one first (sampling/clip_skip.py has the rule)."""
    trained = 2 if layout == "sdxl" else 1
    shown = (trained, *(n for n in (1, 2, 3) if n != trained))
    return {n: f"ComfyUI {-n}, diffusers {_of_diffusers(n - trained)}" for n in shown}


def _of_diffusers(count: int) -> str:
    return "none" if count == 0 else f"clip_skip={count}" if count > 0 else "has no number for it"


def _text(found: dict[str, Any]) -> str:
    adapter = found["adapter"]
    title = f"{adapter['kind']} file" if adapter else found["layout_title"]
    lines = [f"{found['file']}: {title}, {found['bytes'] / 1e6:,.2f} MB"]
    if adapter:
        lines += adapter_lines(adapter)
    lines += found["slider_text"]
    if found["blocks"]:
        ins = sum(block.startswith("IN") for block in found["blocks"])
        lines.append(f"blocks: {ins} IN + M00 + {len(found['blocks']) - ins - 1} OUT")
    if found["in_channels"] not in (None, 4):
        lines.append(f"{kind_of(found['in_channels'])}: its U-Net takes {found['in_channels']} channels")
    if found["prediction_type"] not in (None, "epsilon"):
        lines.append(f"the U-Net predicts {found['prediction_type']}")
    if found["clip_skip"]:
        lines.append("CLIP skip (as A1111 counts; the first as trained):")
        lines += [f"  {n} = {row}" for n, row in found["clip_skip"].items()]
    lines.append(f"{'component':<16}{'tensors':>8}{'values':>16}{'MB':>12}  types")
    for name, part in found["components"].items():
        types = ", ".join(f"{dtype} x {n}" for dtype, n in sorted(part["dtypes"].items()))
        lines.append(f"{name:<16}{part['tensors']:>8}{part['values']:>16,}{part['bytes'] / 1e6:>12,.2f}  {types}")
    lines.append(f"metadata: {len(found['metadata'])} keys" if found["metadata"] else "metadata: none")
    for key, value in found["metadata"].items():
        if key in (RECIPE, CONFIGS, SLIDER):
            lines.append(f"  {key}: JSON of {len(value):,} characters")
            continue
        short = value if len(value) <= _WIDTH else value[:_WIDTH] + f"… ({len(value):,} characters)"
        lines.append(f"  {key}: {short}")
    if found["recipe"]:
        lines += ["recipe:", *recipe_lines(found["recipe"])]
    return "\n".join(lines)


def _recipe_text(found: dict[str, Any]) -> str:
    """The recipe as TOML; UserError if there is none that can be run."""
    from dodgeburn.merge.recipe import graph_of
    from dodgeburn.merge.recipe_text import to_toml

    if found["recipe"] is None:
        raise UserError(f"{found['file']} has no dodgeburn.recipe in its metadata")
    try:
        return to_toml(graph_of(found["recipe"]))
    except UserError as error:
        raise UserError(f"{found['file']}: {error}") from None


def main(args: list[str]) -> int:
    """Run `dodgeburn inspect`; raises UserError for bad input."""
    settings = parse(Inspect, args, "inspect", EXAMPLE)
    found = inspect_file(settings.file)
    if settings.recipe:
        if settings.json:
            raise UserError("--recipe and --json: leave out one of them; the JSON has the recipe too")
        print(_recipe_text(found), end="")
        return 0
    print(_text(found))
    if settings.json:
        print(json.dumps(found))
    return 0
