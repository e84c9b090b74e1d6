"""Merging into a model that is loaded already, so that many merges can be looked at without a file for any of them.

Every merge is worked out from the models' stored tensors by the very plan and method that write a merged file, and
copied into the live weights: the model then is, bit for bit, what that file would load as. Nothing is added to the
weights and subtracted again, so no rounding is left behind however many merges follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dodgeburn.checkpoint.convert import fit_names, single_file_to_diffusers, unet_key_map
from dodgeburn.checkpoint.header import torch_dtype
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.methods.sets import clip_between
from dodgeburn.merge.methods.table import apply
from dodgeburn.merge.plan import Plan, Work, plan_merge
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.merge.shelf import Shelf
from dodgeburn.merge.tiles import one_thread
from dodgeburn.models.model import Model

# What a tensor is at present: its action, and all that its values depend on besides. A's own, where nothing is said.
State = tuple[Any, ...]
OF_A: State = ("copy_a",)


@dataclass(frozen=True)
class LivePlan:
    """A merge's plan with the models that it takes, by their names in the `LiveMerge`: A, B, others, the base last."""

    plan: Plan
    models: tuple[str, ...]

    @property
    def method(self) -> State:
        """All that a tensor's result depends on besides its share and type."""
        seed = self.plan.settings.seed if self.plan.method.random else 0
        return self.plan.method.name, tuple(self.plan.params.items()), seed, self.models

    def state(self, work: Work) -> State:
        """What this merge makes of a tensor."""
        if work.action == "copy_a":
            return OF_A
        if work.action == "merge":
            return "merge", *self.method, work.alpha, self.plan.settings.clip, work.out_dtype
        return work.action, work.out_dtype


class LiveMerge:
    """A loaded model A whose weights become any merge of several models, and A again. One at a time a model.

    `model` must be freshly loaded from A. `models` are the stored tensors of "A", "B" and any others by name. Up to
    `limit` bytes of tensors are held in memory between merges (see Shelf).
    """

    def __init__(self, model: Model, models: Mapping[str, Tensors], limit: int | None = None) -> None:
        self.model = model
        self.shelf = Shelf(models, limit)
        self.text_changes = 0  # how often the text encoders became others, so that prompts must be encoded again
        self._components = model.components()
        self._configs = {part: model.configs[part] for part in self._components}
        self._unet_names = unet_key_map(model.configs["unet"])
        self._unet_targets = model.unet.state_dict(keep_vars=False)
        self._now: dict[str, State] = {}
        self._differs: dict[str, bool] = {}

    def plan(self, settings: MergeSettings, more: Sequence[str] = (), base_model: str | None = None) -> LivePlan:
        """What a merge does to every tensor; raises UserError as `plan_merge`."""
        names = ("A", "B", *more, *([] if base_model is None else [base_model]))
        models = [(self._file(name), self.shelf.models[name].header) for name in names]
        return LivePlan(plan_merge(models, settings, base_model is not None), names)

    def plan_a(self) -> LivePlan:
        """The plan of A as it is."""
        return self.plan(MergeSettings(base=0.0, keep=("text", "vae")))

    def plan_b(self) -> LivePlan:
        """The plan of B in A's modules."""
        return self.plan(MergeSettings(base=1.0))

    @torch.no_grad()
    def apply(self, merge: LivePlan, progress: Callable[[str], object] | None = None) -> set[str]:
        """Make the model this merge; only tensors that change are touched. Returns the components that changed.

        Raises UserError for NaN or infinite values; the model is A again then.
        """
        self.shelf.drop(lambda key: isinstance(key, tuple) and key[0] == "target" and key[1] != merge.method)
        changed: set[str] = set()
        work = merge.plan.work
        try:
            with one_thread():
                changed = self._apply(merge, progress)
        except UserError:
            self._now = {one.name: ("unknown",) for one in work}
            self.restore()
            raise
        self._now = {one.name: merge.state(one) for one in work}
        self.text_changes += any(part.startswith("text_encoder") for part in changed)
        return changed

    def _apply(self, merge: LivePlan, progress: Callable[[str], object] | None) -> set[str]:
        changed: set[str] = set()
        for work in merge.plan.work:
            component = self.model.layout.component(work.name)
            if merge.state(work) == self._now.get(work.name, OF_A) or component not in self._components:
                continue
            changed.add(component)
            if component == "unet" and work.name in self._unet_names:
                self._unet_targets[self._unet_names[work.name]].copy_(self.merged(merge, work))
            if progress is not None:
                progress(work.name)
        if changed & {"text_encoder", "text_encoder_2"}:
            self._convert(merge, [part for part in self._components if part.startswith("text_encoder")])
        if "vae" in changed:
            self._convert(merge, ["vae"])
        return changed

    def restore(self) -> set[str]:
        """Make the model A again, bit for bit."""
        return self.apply(self.plan_a())

    def merged(self, merge: LivePlan, work: Work) -> torch.Tensor:
        """One tensor as the merged file would hold it, on the CPU."""
        own = self.shelf.tensor("A", work.name)
        if work.action == "copy_a":
            return own
        if work.action == "copy_b":
            result = self.shelf.tensor("B", work.name)
        elif work.action == "cast_a":
            result = own.to(torch_dtype(work.out_dtype))
        else:
            result = self._computed(merge, work).to(torch_dtype(work.out_dtype))
        if result.is_floating_point() and not bool(torch.isfinite(result.float()).all()):
            raise UserError(f"tensor {work.name} has NaN or infinite values in {self._names(merge)}, or when merged")
        return result

    def _computed(self, merge: LivePlan, work: Work) -> torch.Tensor:
        """The method's result, not rounded yet."""
        plan, method = merge.plan, merge.plan.method
        wide = torch.float64 if work.info.dtype == "F64" else torch.float32

        def run(alpha: float, clip: bool) -> torch.Tensor:
            inputs = [self.shelf.tensor(name, work.name).to(wide) for name in merge.models]
            shape = inputs[0].shape
            if method.elementwise:  # as in the file's tiles
                inputs = [values.reshape(-1) for values in inputs]
            base = inputs.pop() if method.needs_base else None
            out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
            apply(method, inputs, alpha, out, base, plan.params, plan.settings.seed, work.name, clip)
            return out.reshape(shape)

        if not method.lerps:
            return run(work.alpha, plan.settings.clip)
        # The dear part does not depend on alpha, so merges that differ in shares only have it in common.
        target = self.shelf.held(("target", merge.method, work.name), lambda: run(1.0, False))
        own = self.shelf.tensor("A", work.name).to(wide)
        out = torch.lerp(own, target, work.alpha)
        if plan.settings.clip:
            clip_between(own, self.shelf.tensor("B", work.name).to(wide), out)
        return out

    def _convert(self, merge: LivePlan, parts: list[str]) -> None:
        """Load whole components whose tensors are not one to one with a file's (fused and transposed ones)."""
        wanted = [work for work in merge.plan.work if self.model.layout.component(work.name) in parts]
        tensors = {work.name: self.merged(merge, work) for work in wanted}
        states = single_file_to_diffusers(tensors, {part: self._configs[part] for part in parts})
        for part, state in states.items():
            targets: dict[str, Any] = self._components[part].state_dict(keep_vars=False)
            for name, tensor in fit_names(state, targets).items():
                if name in targets:
                    targets[name].copy_(tensor)

    def fingerprint(self, merge: LivePlan) -> frozenset[tuple[str, State]]:
        """What decides a merge's weights. Merges with equal fingerprints are equal tensors (a base that no tensor
        depends on, a preset named twice); A's is empty.
        """
        plan, found = merge.plan, set()
        clip = plan.settings.clip
        for work in plan.work:
            if work.action == "copy_a" or self.model.layout.component(work.name) not in self._components:
                continue
            state = merge.state(work)
            is_b = work.action == "copy_b" or (work.alpha == 1.0 and plan.method.one_is_b and not clip)
            if work.action != "cast_a" and is_b:
                state = ("copy_b", work.out_dtype)
            # Where A and B agree, so do their weighted sums; other methods may have more models.
            if (state[0] == "copy_b" or plan.method.name == "weighted_sum") and not self._differ(work.name):
                state = ("cast_a", work.out_dtype)
            if state[0] != "cast_a" or work.out_dtype != work.info.dtype:
                found.add((work.name, state))
        return frozenset(found)

    def _differ(self, name: str) -> bool:
        if name not in self._differs:
            one, two = self.shelf.tensor("A", name), self.shelf.tensor("B", name)
            self._differs[name] = not torch.equal(one.float(), two.float())
        return self._differs[name]

    def _file(self, name: str) -> str:
        return self.shelf.models[name].path.name

    def _names(self, merge: LivePlan) -> str:
        return ", ".join(f"{self._file(name)}" for name in merge.models)
