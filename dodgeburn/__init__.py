"""dodgeburn edits text-to-image diffusion models in weight space and measures what each edit did.

The Python API mirrors the command line: `dodgeburn.load("pocket")`, `dodgeburn.generate(model, prompts, seeds)`,
`dodgeburn.merge(a, b, out, preset="ReverseSmoothstep", base=0.4)`, `dodgeburn.compare(...)`. Nothing heavy is
imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dodgeburn.merge.bake import bake
    from dodgeburn.merge.compare import compare
    from dodgeburn.merge.delta import extract as extract_delta
    from dodgeburn.merge.diff import diff
    from dodgeburn.merge.estimate import estimate
    from dodgeburn.merge.run import merge
    from dodgeburn.merge.run_recipe import run_recipe
    from dodgeburn.merge.verify import verify
    from dodgeburn.models.adapter_file import load_adapter, save_adapter
    from dodgeburn.models.loading import load_model as load
    from dodgeburn.sampling.adapted import Applied
    from dodgeburn.sampling.loop import GenerateSettings, generate
    from dodgeburn.slide.compose import compose

__all__ = [
    "Applied", "GenerateSettings", "bake", "compare", "compose", "diff", "estimate", "extract_delta", "generate",
    "load", "load_adapter", "merge", "run_recipe", "save_adapter", "verify",
]  # fmt: skip

_HOMES = {
    "load": ("dodgeburn.models.loading", "load_model"),
    "generate": ("dodgeburn.sampling.loop", "generate"),
    "load_adapter": ("dodgeburn.models.adapter_file", "load_adapter"),
    "save_adapter": ("dodgeburn.models.adapter_file", "save_adapter"),
    "Applied": ("dodgeburn.sampling.adapted", "Applied"),
    "compose": ("dodgeburn.slide.compose", "compose"),
    "GenerateSettings": ("dodgeburn.sampling.settings", "GenerateSettings"),
    "compare": ("dodgeburn.merge.compare", "compare"),
    "merge": ("dodgeburn.merge.run", "merge"),
    "run_recipe": ("dodgeburn.merge.run_recipe", "run_recipe"),
    "verify": ("dodgeburn.merge.verify", "verify"),
    "bake": ("dodgeburn.merge.bake", "bake"),
    "diff": ("dodgeburn.merge.diff", "diff"),
    "estimate": ("dodgeburn.merge.estimate", "estimate"),
    "extract_delta": ("dodgeburn.merge.delta", "extract"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dodgeburn' has no attribute '{name}'")
    from importlib import import_module

    home, attribute = _HOMES[name]
    return getattr(import_module(home), attribute)
