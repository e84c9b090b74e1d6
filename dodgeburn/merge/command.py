"""A merge as the command that writes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from dodgeburn.merge.settings import MergeSettings
from dodgeburn.merge.variants import Variant


def merge_command(variant: Variant, models: Mapping[str, str], out: str = "merged.safetensors") -> str:
    """The `dodgeburn merge` command for this variant; `models` says how A, B and the others are called."""
    words = ["dodgeburn", "merge", models["A"], models["B"], "-o", out, *options(variant.merge)]
    for name in variant.more:
        words += ["--also", models[name]]
    if variant.base_model is not None:
        words += ["--base-model", models[variant.base_model]]
    return shlex.join(words)


def options(merge: MergeSettings) -> list[str]:
    """The options of `dodgeburn merge` that give these settings, those at their defaults left out. Numbers are written
    so that they are read back as they were.
    """
    plain = MergeSettings()
    words: list[str] = []
    if merge.method != plain.method:
        words += ["--method", merge.method]
    for name, value in merge.params.items():
        words += ["--param", f"{name}={value!r}"]
    if merge.preset is not None:
        words += ["--preset", merge.preset]
    if merge.base is not None:
        words += ["--base", repr(merge.base)]
    if merge.blocks:
        words += ["--block", ",".join(f"{name}={share!r}" for name, share in merge.blocks.items())]
    for name, share in merge.components.items():
        words += ["--component", f"{name}={share!r}"]
    for rule in merge.rules:
        words += ["--rule", rule]
    if merge.keep:
        words += ["--keep", ",".join(merge.keep)]
    if merge.xl_presets != plain.xl_presets:
        words += ["--xl-presets", merge.xl_presets]
    if merge.outside != plain.outside:
        words += ["--outside", merge.outside]
    if merge.seed != plain.seed:
        words += ["--seed", str(merge.seed)]
    if merge.clip:
        words.append("--clip")
    if merge.dtype is not None:
        words += ["--dtype", merge.dtype]
    return words
