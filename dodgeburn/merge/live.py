"""Merging into a model that is loaded already, so that many merges can be looked at without a file for any
of them.

Every merge is worked out from A's and B's stored tensors by the very plan and method that write a merged
file, and copied into the live weights: the model then is, bit for bit, what that file would load as.
Nothing is added to the weights and subtracted again, so no rounding is left behind however many merges
follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dodgeburn.checkpoint.convert import diffusers_to_single_file, fit_names, single_file_to_diffusers, unet_key_map
from dodgeburn.checkpoint.header import Header, TensorInfo, dtype_name, tensor_bytes
from dodgeburn.checkpoint.sources import open_tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.methods import Method, find_method, merge_tensors
from dodgeburn.merge.plan import Plan, Work, make_plan
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.models.model import Model


class Tensors(Protocol):
    """A model's tensors under single-file names: a header, and each tensor when asked for (on the CPU)."""

    header: Header

    def tensor(self, name: str) -> torch.Tensor: ...


class HeldTensors:
    """Tensors of a model in memory (from a diffusers folder), copied, under single-file names."""

    def __init__(self, model: Model) -> None:
        states = {part: module.state_dict() for part, module in model.components().items()}
        single = diffusers_to_single_file(states, {part: model.configs[part] for part in states})
        self._tensors = {name: tensor.detach().cpu().clone() for name, tensor in single.items()}
        infos: dict[str, TensorInfo] = {}
        end = 0
        for name, tensor in self._tensors.items():
            kind, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            infos[name] = TensorInfo(kind, shape, end, end := end + tensor_bytes(kind, shape))
        self.header = Header(infos, {}, 0, end)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def stored_tensors(model: Model) -> Tensors:
    """The tensors a model was loaded from: its single file, opened, or a copy of what is in memory."""
    if model.source is not None and Path(model.source).is_file():
        return open_tensors(model.source)
    return HeldTensors(model)


class LiveMerge:
    """A loaded model A whose weights become any merge of A and B, and A again.

    `model` must be freshly loaded from A, `a` and `b` are both sides' stored tensors. One at a time a model.
    """

    def __init__(self, model: Model, a: Tensors, b: Tensors, name_b: str = "B", method: str = "weighted_sum") -> None:
        self.model = model
        self.a = a
        self.b = b
        self.method: Method = find_method(method)
        self._name_b = name_b
        self._components = model.components()
        self._configs = {part: model.configs[part] for part in self._components}
        self._unet_names = unet_key_map(model.configs["unet"])
        self._unet_targets = model.unet.state_dict(keep_vars=False)
        self._now: dict[str, tuple[str, float]] = {}  # what each tensor is at present; A where not named
        self._differs: dict[str, bool] = {}

    def plan(self, blocks: Mapping[str, float], keep: tuple[str, ...] = ()) -> Plan:
        """What a merge with these block shares does to every tensor; raises UserError as `make_plan`."""
        models = [("A", self.a.header), (self._name_b, self.b.header)]
        settings = MergeSettings.of(method=self.method.name, keep=keep)
        return make_plan(models, self.model.layout, blocks, settings)

    @torch.no_grad()
    def apply(self, plan: Plan, progress: Callable[[str], object] | None = None) -> set[str]:
        """Make the model this merge; only tensors that change are touched. Returns the components that
        changed.

        Raises UserError for NaN or infinite values; the model is A again then.
        """
        changed: set[str] = set()
        try:
            for work in plan.work:
                if self._state(work) == self._now.get(work.name, ("copy_a", 0.0)):
                    continue
                component = self.model.layout.component(work.name)
                if component not in self._components:
                    continue
                changed.add(component)
                if component == "unet" and work.name in self._unet_names:
                    self._unet_targets[self._unet_names[work.name]].copy_(self.merged(work))
                if progress is not None:
                    progress(work.name)
            if changed & {"text_encoder", "text_encoder_2"}:
                self._convert(plan, [part for part in self._components if part.startswith("text_encoder")])
            if "vae" in changed:
                self._convert(plan, ["vae"])
        except UserError:
            self._now = {work.name: ("unknown", 0.0) for work in plan.work}
            self.restore()
            raise
        self._now = {work.name: self._state(work) for work in plan.work}
        return changed

    def restore(self) -> set[str]:
        """Make the model A again, bit for bit."""
        nothing = dict.fromkeys(self.model.layout.all_blocks, 0.0)
        return self.apply(self.plan(nothing, ("text", "vae")))

    @staticmethod
    def _state(work: Work) -> tuple[str, float]:
        return work.action, work.alpha if work.action == "merge" else 0.0

    def merged(self, work: Work) -> torch.Tensor:
        """One tensor as the merged file would hold it: A's stored dtype, on the CPU."""
        if work.action == "copy_a":
            return self.a.tensor(work.name)
        other = self.b.tensor(work.name)
        result = other
        if work.action == "merge":
            result = merge_tensors((self.a.tensor(work.name), other), work.alpha, self.method.name)
        if result.is_floating_point() and not bool(torch.isfinite(result.float()).all()):
            raise UserError(f"tensor {work.name} has NaN or infinite values in A, in {self._name_b}, or when merged")
        return result

    def _convert(self, plan: Plan, parts: list[str]) -> None:
        """Load whole components whose tensors are not one to one with a file's (fused and transposed ones)."""
        tensors = {
            work.name: self.merged(work) for work in plan.work if self.model.layout.component(work.name) in parts
        }
        states = single_file_to_diffusers(tensors, {part: self._configs[part] for part in parts})
        for part, state in states.items():
            targets: dict[str, Any] = self._components[part].state_dict(keep_vars=False)
            for name, tensor in fit_names(state, targets).items():
                if name in targets:
                    targets[name].copy_(tensor)

    def fingerprint(self, plan: Plan) -> tuple[tuple[str, str, float], ...]:
        """What decides a merge's weights: its shares in those blocks in which A and B differ at all.

        Merges with equal fingerprints are equal tensors (a base that no tensor depends on, a preset named
        twice).
        """
        found = set()
        for work in plan.work:
            if work.block is None or self.model.layout.component(work.name) not in self._components:
                continue
            if work.action != "copy_a" and self._differ(work.name):
                # By block and component: BASE holds the time embedding and, unless kept, the text encoders.
                share = 1.0 if work.action == "copy_b" else work.alpha
                found.add((self.model.layout.component(work.name), work.block, share))
        return tuple(sorted(found))

    def _differ(self, name: str) -> bool:
        if name not in self._differs:
            one, two = self.a.tensor(name), self.b.tensor(name)
            self._differs[name] = not torch.equal(one.float(), two.float())
        return self._differs[name]
