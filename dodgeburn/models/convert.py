"""A model of any form as a single file or a diffusers folder, tensor by tensor: bit for bit unless cast on request.

Nothing is loaded into modules, so a 7 GB model converts in the memory of its largest tensor. Components are checked
against the shapes that their configs ask for before anything is written.
"""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.checkpoint.moves import Move, moves_to_diffusers
from dodgeburn.checkpoint.rewrite import Piece, chosen_dtype, piece_of, write_pieces
from dodgeburn.checkpoint.sources import PICKLES, Tensors, files_of, open_tensors, weights_in
from dodgeburn.checkpoint.text_keys import POSITION_IDS, classic_text_name, fit_names
from dodgeburn.checkpoint.unet_keys import unet_key_map
from dodgeburn.checkpoint.vae_file import vae_moves
from dodgeburn.checkpoint.vae_keys import modern_vae_name
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.as_single_file import FolderAsFile
from dodgeburn.models.loading import (
    check_shapes,
    configs_of_file,
    empty_module,
    find_model,
    known_configs,
    load_tokenizers,
)
from dodgeburn.models.model import Configs
from dodgeburn.models.saving import kept_metadata, new_folder, weights_name, write_descriptions
from dodgeburn.models.tokenizers import find_tokenizers

EMA = ("model_ema.", "first_stage_model.model_ema.")
_From = tuple[Tensors, Move]


@dataclass(frozen=True)
class ConvertSettings:
    """What to change on the way. `dtype`: stored, fp32, fp16, bf16, fp8_e4m3fn; `vae`: a file whose VAE replaces the
    model's; `tokenizer`: a folder, for a single file of real Stable Diffusion that becomes a diffusers folder.
    """

    dtype: str = "stored"
    prune_ema: bool = False
    vae: str | Path | None = None
    repair_position_ids: bool = False
    tokenizer: str | Path | None = None


@dataclass
class Converted:
    """What was written: a "single file" or a "diffusers folder", and what happened to how many tensors."""

    out: Path
    kind: str
    layout: Layout | None
    counts: dict[str, int] = field(default_factory=dict)  # tensors, pruned, vae, position_ids


def convert(src: str | Path, out: str | Path, settings: ConvertSettings | None = None) -> Converted:
    """Convert `src` (a packaged model, single file, index of shards, .ckpt/.pt/.bin, diffusers folder or hub id) to a
    single file if `out` ends in .safetensors, else to a diffusers folder.

    Single file to single file keeps every tensor, EMA copies too, unless pruned; a file of another kind than SD1.5 and
    SDXL (a VAE alone, say) is only rewritten as it is. Raises UserError for missing, extra-sized or unreadable tensors,
    for an output that exists (folder) or is an input, and for values that `dtype` cannot hold; warns of settings
    without effect and of tensors that have no place in the output.
    """
    settings = settings or ConvertSettings()
    out = Path(out)
    path = find_model(src)
    with ExitStack() as stack:
        parts: _File | _Folder = _Folder(path, stack) if path.is_dir() else _File(path, stack)
        vae = stack.enter_context(_open_vae(settings.vae)) if settings.vae is not None else None
        if out.suffix.lower() in (".safetensor", ".sft"):
            raise UserError(f"{out}: name a file {out.stem}.safetensors, or give a folder")
        if out.suffix.lower() in PICKLES:
            raise UserError(f"{out}: pickles are read, not written: name it {out.stem}.safetensors, or give a folder")
        make = _to_single if out.suffix == ".safetensors" else _to_folder
        done = make(parts, out, settings, vae)
    if settings.repair_position_ids and not done.counts.get("position_ids"):
        _warn("--repair-position-ids has no effect: there are none, or they are sound")
    return done


def _open_vae(place: str | Path) -> Tensors:
    path = Path(place).expanduser()
    if (path / "model_index.json").is_file():
        path = path / "vae"  # a whole model's folder
    return open_tensors(weights_in(path) if path.is_dir() else path)


class _File:
    """A model that comes as a single file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.source = stack.enter_context(open_tensors(path))
        self.metadata = dict(self.source.header.metadata)
        self.shapes = {key: info.shape for key, info in self.source.header.tensors.items()}
        self.why = ""
        self.layout: Layout | None
        try:
            self.layout = detect_layout(self.shapes, self.shapes)
        except UserError as error:
            self.layout, self.why = None, str(error)
        self.inputs = files_of(self.source)

    def configs(self) -> Configs:
        return configs_of_file(self.metadata, self.shapes, self.path)

    def single(self) -> dict[str, _From]:
        return {key: (self.source, Move((key,))) for key in self.source.keys()}

    def components(self, configs: Configs) -> dict[str, dict[str, _From]]:
        moves, left = moves_to_diffusers(self.shapes, configs)
        _warn_left(left)
        return {part: {name: (self.source, move) for name, move in found.items()} for part, found in moves.items()}

    def tokenizers(self, configs: Configs, folder: str | Path | None) -> list[Any]:
        return find_tokenizers(configs, self.path, folder)

    def single_metadata(self) -> dict[str, str]:
        return kept_metadata(self.metadata)


class _Folder:
    """A model that comes as a diffusers folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.path = folder
        self.file = stack.enter_context(FolderAsFile(folder))
        self.sources = self.file.sources
        self.metadata = dict(self.sources["unet"].header.metadata)
        self.layout: Layout | None = detect_layout(unet_key_map(self.file.configs["unet"]))
        self.why = ""
        self.inputs = self.file.files()

    def configs(self) -> Configs:
        return self.file.configs

    def single(self) -> dict[str, _From]:
        return {key: (piece.source, piece.move) for key, piece in self.file.pieces.items() if piece.source is not None}

    def components(self, configs: Configs) -> dict[str, dict[str, _From]]:
        out: dict[str, dict[str, _From]] = {}
        for part, source in self.sources.items():
            rename = modern_vae_name if part == "vae" else classic_text_name if part.startswith("text") else str
            out[part] = {rename(name): (source, Move((name,))) for name in source.keys()}
        return out

    def tokenizers(self, configs: Configs, folder: str | Path | None) -> list[Any]:
        return load_tokenizers(self.path, configs)

    def single_metadata(self) -> dict[str, str]:
        return self.file.header.metadata


def _to_single(parts: _File | _Folder, out: Path, settings: ConvertSettings, vae: Tensors | None) -> Converted:
    found = parts.single()
    counts: dict[str, int] = {}
    if parts.layout is None and (settings.dtype.startswith("fp8") or vae is not None):
        raise UserError(f"{parts.path.name}: {parts.why}; fp8 and --vae need an SD1.5 or SDXL checkpoint")
    if settings.prune_ema:
        copies = [key for key in found if key.startswith(EMA)]
        counts["pruned"] = len(copies)
        if not copies:
            _warn("--prune-ema has no effect: there are no EMA copies (model_ema.…) to leave out")
        found = {key: value for key, value in found.items() if key not in set(copies)}
    if vae is not None:
        assert parts.layout is not None
        config = _vae_config(parts, parts.layout)
        moves = vae_moves(vae, config, "single")
        _check_vae(moves, vae, found)
        old = [key for key in found if parts.layout.is_vae(key)]
        counts["vae"] = len(moves)
        new = {key: (vae, move) for key, move in moves.items()}
        # In place, so that the tensors' order stays the file's.
        found = {key: new.pop(key, value) for key, value in found.items() if key in moves or key not in old} | new

    def component(key: str) -> str:
        return parts.layout.component(key) if parts.layout is not None else "other"

    pieces = {key: _piece(made, settings.dtype, component(key)) for key, made in found.items()}
    counts |= _position_ids(pieces, settings.repair_position_ids)
    write_pieces(out, pieces, parts.single_metadata(), parts.inputs)
    return Converted(out, "single file", parts.layout, {"tensors": len(pieces), **counts})


def _vae_config(parts: _File | _Folder, layout: Layout) -> Mapping[str, Any]:
    try:
        return parts.configs()["vae"]
    except UserError:
        return known_configs(layout.name)["vae"]


def _check_vae(moves: Mapping[str, Move], vae: Tensors, found: Mapping[str, _From]) -> None:
    shapes = {name: info.shape for name, info in vae.header.tensors.items()}
    for key, move in moves.items():
        if key in found:
            source, old = found[key]
            before = old.shape({name: source.info(name).shape for name in old.sources})
            if move.shape(shapes) != before:
                raise UserError(
                    f"{vae.path.name} is a VAE of another size: {key} is {list(move.shape(shapes))}, "
                    f"the model's {list(before)}"
                )


def _to_folder(parts: _File | _Folder, out: Path, settings: ConvertSettings, vae: Tensors | None) -> Converted:
    if parts.layout is None:
        raise UserError(f"{parts.path.name}: {parts.why}")
    if settings.prune_ema:
        _warn("--prune-ema has no effect: a diffusers folder has no place for EMA copies anyway")
    configs = parts.configs()
    found = parts.components(configs)
    counts: dict[str, int] = {}
    if vae is not None:
        moves = vae_moves(vae, configs["vae"], "diffusers")
        _check_vae(moves, vae, found["vae"])
        found["vae"] = {name: (vae, move) for name, move in moves.items()}
        counts["vae"] = len(moves)
    modules = {part: empty_module(part, configs[part]) for part in found}
    pieces: dict[str, dict[str, Piece]] = {}
    for part, module in modules.items():
        pieces[part] = {name: _piece(made, settings.dtype, part) for name, made in found[part].items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        shapes: Mapping[str, Any] = fit_names({name: piece.shape for name, piece in pieces[part].items()}, wanted)  # type: ignore[misc]
        check_shapes(part, wanted, shapes, parts.path)
        extra = [name for name in shapes if name not in wanted]
        if extra:
            _warn(f"{len(extra)} tensors are none of the {part}'s and are left out, first {extra[0]}")
            pieces[part] = {name: piece for name, piece in pieces[part].items() if name not in extra}
        for key, count in _position_ids(pieces[part], settings.repair_position_ids).items():
            counts[key] = counts.get(key, 0) + count
    tokenizers = parts.tokenizers(configs, settings.tokenizer)
    with new_folder(out) as folder:
        layout = parts.layout
        write_descriptions(folder, layout.name, modules, tokenizers, configs["scheduler"])
        for part, made in pieces.items():
            notes = kept_metadata(parts.metadata) if part == "unet" else {}
            write_pieces(folder / part / weights_name(part), made, notes, parts.inputs)
    total = sum(len(made) for made in pieces.values())
    return Converted(out, "diffusers folder", layout, {"tensors": total, **counts})


def _piece(made: _From, dtype: str, component: str) -> Piece:
    source, move = made
    shape = move.shape({name: source.info(name).shape for name in move.sources})
    return piece_of(source, move, chosen_dtype(dtype, component, shape))


def _position_ids(pieces: dict[str, Piece], repair: bool) -> dict[str, int]:
    """Put 0, 1, 2, … where a text encoder's position ids are not that (merges that averaged them), or say so."""
    import torch

    repaired = 0
    for key, piece in pieces.items():
        if not key.endswith(POSITION_IDS) or piece.source is None:
            continue
        stored = piece.source.tensor(piece.move.sources[0])
        right = torch.arange(stored.numel(), dtype=torch.int64).reshape(1, -1)
        if stored.dtype == torch.int64 and torch.equal(stored.reshape(1, -1), right):
            continue
        if not repair:
            _warn(f"{key} is not 0, 1, 2, … as integers, which spoils prompts: add --repair-position-ids")
            continue
        pieces[key] = Piece(None, piece.move, "I64", (1, stored.numel()), right.numpy().astype("<i8").tobytes())
        repaired += 1
    return {"position_ids": repaired} if repaired else {}


def _warn_left(left: list[str]) -> None:
    if left:
        _warn(f"{len(left)} tensors of the checkpoint belong to no component and are left out, first {left[0]}")


def _warn(line: str) -> None:
    warnings.warn(line, DodgeburnWarning, stacklevel=3)
