"""Imports that libraries make and that no verb needs, spared or put off.

Only the command line does this, in a process that is its own. diffusers imports every scheduler with every model, and
with them scipy.stats and scipy.integrate; transformers a loss for finding objects, and with it scipy.optimize; where
peft is installed, diffusers imports it too, and with it more of transformers, while our own adapters do the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

# Modules, and what is imported from them by name without being called.
PUT_OFF: dict[str, tuple[str, ...]] = {
    "scipy.stats": (), "scipy.integrate": (), "scipy.optimize": ("linear_sum_assignment",),
}  # fmt: skip


def spare_imports() -> None:
    """Put modules off until something of them is used, and hide peft. What is loaded already stays as it is."""
    sys.modules.setdefault("peft", None)  # type: ignore[arg-type]  # how Python marks what cannot be imported
    for name, functions in PUT_OFF.items():
        package, _, part = name.partition(".")
        found = PathFinder.find_spec(package)  # imports nothing
        if name not in sys.modules and found is not None:
            folders = found.submodule_search_locations or []
            sys.modules[name] = _stand_in(name, functions, [f"{folder}/{part}" for folder in folders])


def _stand_in(name: str, functions: tuple[str, ...], folders: list[str]) -> ModuleType:
    """A module that gives way to the real one as soon as it is asked for anything but `functions`, and then too when
    one of these is called.
    """
    module: Any = ModuleType(name)

    def real() -> ModuleType:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return import_module(name)

    def put_off(function: str) -> Callable[..., Any]:
        return lambda *given, **named: getattr(real(), function)(*given, **named)

    for function in functions:
        setattr(module, function, put_off(function))
    # What `inspect` and the import system ask every module for.
    module.__file__, module.__path__ = None, folders
    module.__getattr__ = lambda attribute: getattr(real(), attribute)  # PEP 562
    return module
