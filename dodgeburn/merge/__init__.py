"""Merging checkpoints by block: presets, methods, plan, streamed run, recipe. Works on files, needs no
models.

`dodgeburn.merge(a, b, out, ...)` merges; the package itself can be called, so that the verb and the modules
below it share one name. See `dodgeburn.merge.run.merge` for the arguments.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from dodgeburn.merge.run import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
