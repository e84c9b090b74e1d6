"""The models of a comparison: A loaded, B and the others open, and what is odd about them said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dodgeburn.checkpoint.metadata import configs_of
from dodgeburn.checkpoint.sources import Tensors, sha256_source
from dodgeburn.checkpoint.unet_kind import prediction_type
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.live import LiveMerge
from dodgeburn.merge.plan import Plan, check_layouts, plan_merge
from dodgeburn.merge.variants import Variant
from dodgeburn.models.as_single_file import open_as_single_file
from dodgeburn.models.loading import find_model, load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.model import NAMES

PARENTS = ("A", "B")


@dataclass
class OpenModels:
    """A's model with its `LiveMerge`; by the names "A" and "B" and those given, what the models are called and their
    sha256; and notes for the report. Closed at the end of a `with` block.
    """

    model: Model
    live: LiveMerge
    facts: dict[str, dict[str, str]]
    notes: list[str]
    stack: ExitStack

    def __enter__(self) -> OpenModels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:  # fmt: skip
        self.stack.close()


def open_models(
    a: str | Path, b: str | Path, variants: Sequence[Variant], device: str, dtype: str | None,
    tokenizer: str | Path | None,
) -> OpenModels:  # fmt: skip
    """Load A, open B and every model that a variant takes. All variants are planned before A is loaded; what the plans
    warn of is noted once.

    Raises UserError for models that cannot be read or merged in one of these ways.
    """
    others = dict.fromkeys(
        name for v in variants for name in (*v.more, *([] if v.base_model is None else [v.base_model]))
    )
    for name in PARENTS:
        if name in others:
            raise UserError(f"a model named {name} would be taken for parent {name}: write ./{name}")
    names = {"A": a, "B": b, **{name: name for name in others}}
    with ExitStack() as stack:
        # B is never loaded as a model: its pictures, too, are made in A's modules.
        sources = {key: stack.enter_context(open_as_single_file(find_model(name))) for key, name in names.items()}
        check_layouts(sources["A"].header, sources["B"].header, sources["A"].path.name, sources["B"].path.name)
        said = dict.fromkeys(line for variant in variants for line in _planned(variant, sources).warnings())
        model = load_model(a, device, dtype, tokenizer)
        live = LiveMerge(model, sources)
        notes = [*_odd(model, sources["B"]), *said]
        for line in notes:
            warnings.warn(line, DodgeburnWarning, stacklevel=3)
        facts = {key: {"name": shown(name), "sha256": sha256_source(sources[key])} for key, name in names.items()}
        return OpenModels(model, live, facts, notes, stack.pop_all())


def _planned(variant: Variant, sources: Mapping[str, Tensors]) -> Plan:
    base = [] if variant.base_model is None else [variant.base_model]
    models = [(sources[key].path.name, sources[key].header) for key in ("A", "B", *variant.more, *base)]
    try:
        return plan_merge(models, variant.merge, bool(base))
    except UserError as error:
        raise UserError(f"{variant.name}: {error}") from None


def _odd(model: Model, b: Tensors) -> list[str]:
    """What B's own configs say against sampling it A's way."""
    configs: Mapping[str, Mapping[str, object]] = configs_of(b.header.metadata) or {}
    said = {
        "prediction_type": prediction_type(b.header),
        "scaling_factor": configs.get("vae", {}).get("scaling_factor"),
    }
    notes = []
    for part, key in (("scheduler", "prediction_type"), ("vae", "scaling_factor")):
        ours, theirs = model.configs[part].get(key), said[key]
        if theirs is not None and ours != theirs:
            notes.append(f"A's {key} is {ours}, B's is {theirs}: everything is sampled A's way, so B will look wrong")
    return notes


def shown(name: str | Path) -> str:
    """A model's name without local folders (hub ids keep their owner)."""
    path = Path(str(name))
    return path.name if path.exists() or path.suffix else str(name)


def typed(name: str | Path) -> str:
    """A model's name as a command needs it: packaged names as they are, files with their folders, from here if they lie
    below (so that a page that is passed on names no more of the machine than it must).
    """
    if str(name) in NAMES:
        return str(name)
    path = Path(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
