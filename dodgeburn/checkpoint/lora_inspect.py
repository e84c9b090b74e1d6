"""What an adapter file is, as plain values and in words; without torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.header import read_header
from dodgeburn.checkpoint.lora_file import Adapter, architecture_title, is_adapter, open_adapter
from dodgeburn.checkpoint.tensorfile import sha256_file, sha256_tensors

_SHOWN = 5  # unmatched keys that are named


def inspect_adapter(path: Path) -> dict[str, Any] | None:
    """Kind, spelling, ranks, alphas, modules, base architecture and hashes of an adapter; None if the file is none.

    `path` is a .safetensors file. Hashes: sha256 of the file (its first 10 digits: AutoV2), of all bytes after the
    header (A1111's LoRA hash and "addnet" hash; its first 12 digits: AutoV3), and the older addnet hash, the first 8
    digits of the sha256 of 64 KiB from 1 MiB on. Raises UserError for a damaged file, and for an adapter that cannot be
    read (DoRA and others, named).
    """
    if path.is_file() and not is_adapter(read_header(path).tensors):
        return None
    with open_adapter(path) as adapter:
        return _values(adapter, adapter.source.path)


def _values(adapter: Adapter, path: Path) -> dict[str, Any]:
    modules = adapter.modules.values()
    components = Counter(name.partition(".")[0] for name in adapter.modules)
    whole, tensors = sha256_file(path), sha256_tensors(path)
    return {
        "kind": adapter.title,
        "kinds": dict(Counter(module.kind for module in modules)),
        "spellings": dict(adapter.spellings.most_common()),
        "architecture": adapter.architecture,
        "architecture_title": architecture_title(adapter.architecture),
        "modules": len(adapter.modules),
        "components": dict(components),
        "ranks": dict(Counter(module.rank for module in modules if module.rank is not None).most_common()),
        "alphas": dict(Counter(module.alpha for module in modules if module.alpha is not None).most_common()),
        "missing_alphas": len(adapter.missing_alphas()),
        "scales": sorted({round(module.scale, 6) for module in modules}),
        "unmatched": adapter.unmatched,
        "hashes": {
            "sha256": whole,
            "AutoV2": whole[:10],
            "sha256_tensors": tensors,
            "AutoV3": tensors[:12],
            "addnet_legacy": _legacy_hash(path),
        },
    }


def _legacy_hash(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def adapter_lines(found: dict[str, Any]) -> list[str]:
    """The values in words, a line each."""

    def counted(values: dict[Any, int]) -> str:
        if len(values) == 1:
            return f"{next(iter(values)):g}"
        return ", ".join(f"{value:g} ({count})" for value, count in values.items())

    parts = ", ".join(f"{name} {count}" for name, count in found["components"].items())
    lines = [
        f"{found['kind']} for {found['architecture_title']}",
        f"modules: {found['modules']} ({parts})",
        f"spelling: {', '.join(f'{name} ({count} tensors)' for name, count in found['spellings'].items())}",
    ]
    if found["ranks"]:
        alphas = counted(found["alphas"]) if found["alphas"] else "not given, so equal to the rank"
        some = (
            f"; {found['missing_alphas']} modules without one: scale 1"
            if found["alphas"] and found["missing_alphas"]
            else ""
        )
        scales = found["scales"]
        scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        lines += [f"rank: {counted(found['ranks'])}", f"alpha: {alphas}{some}", f"scale (alpha / rank): {scale}"]
    if found["unmatched"]:
        shown = ", ".join(found["unmatched"][:_SHOWN]) + (" …" if len(found["unmatched"]) > _SHOWN else "")
        lines.append(f"unmatched: {len(found['unmatched'])} keys ({shown})")
    hashes = found["hashes"]
    lines.append(f"hashes: AutoV2 {hashes['AutoV2']}, AutoV3 (A1111, addnet) {hashes['AutoV3']}")
    lines.append(f"        addnet legacy {hashes['addnet_legacy']}, sha256 {hashes['sha256']}")
    return lines
