"""What a merge will do, decided from the headers alone: one line of work per tensor, and everything odd, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dodgeburn.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES, Header, TensorInfo
from dodgeburn.checkpoint.layout import VAE, Layout, detect_layout
from dodgeburn.checkpoint.rewrite import chosen_dtype
from dodgeburn.checkpoint.unet_keys import UNET
from dodgeburn.checkpoint.unet_kind import CONV_IN, input_channels, kind_of, prediction_type
from dodgeburn.errors import UserError
from dodgeburn.merge.blocks import alphas
from dodgeburn.merge.methods import Method, find_method
from dodgeburn.merge.rules import Rule, check_components, component_share, parse_rules
from dodgeburn.merge.settings import MergeSettings

Models = Sequence[tuple[str, Header]]  # file name and header of A, B, further models, and last the base if there is one
Action = Literal["copy_a", "copy_b", "cast_a", "merge"]

# Why a tensor is not merged as asked, and what was done instead. Those in WARNED deserve a warning.
ISSUES = {
    "missing_in_b": "not in B: A's are kept",
    "missing_elsewhere": "not in every other model: A's are kept",
    "extra_in_b": "only in B: left out",
    "outside": "outside the model (EMA copies, schedule buffers, markers): A's are kept",
    "dtype_differs": "of another type in B: computed in float32, rounded once to A's type",
    "integers": "of integers: A's are kept, never averaged",
    "shape_differs": "of another shape in B, but A's are kept anyway",
}
WARNED = ("missing_in_b", "missing_elsewhere", "extra_in_b", "outside")


@dataclass(frozen=True)
class Work:
    """One output tensor: where its bytes come from, and with which share of B."""

    name: str
    info: TensorInfo
    action: Action
    alpha: float
    block: str | None
    dtype: str = ""  # of the output, where it is not A's

    @property
    def out_dtype(self) -> str:
        return self.dtype or self.info.dtype

    @property
    def out_nbytes(self) -> int:
        return self.info.numel * DTYPE_BITS[self.dtype] // 8 if self.dtype else self.info.nbytes


@dataclass
class Plan:
    """A merge ready to run: the output's tensors in A's order, block shares, and issues (kind -> tensor
    names). `settings` are as asked for; `blocks`, `params`, `components` and `rules` are resolved and checked.
    """

    layout: Layout
    method: Method
    settings: MergeSettings
    blocks: dict[str, float]
    params: dict[str, float]
    components: dict[str, float]
    rules: tuple[Rule, ...]
    work: list[Work] = field(default_factory=list)
    issues: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in ISSUES})
    odd: list[str] = field(default_factory=list)  # what is odd about the models as wholes, in words

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by kind of issue, kinds without any left out."""
        return {kind: len(names) for kind, names in self.issues.items() if names}

    @property
    def bytes_written(self) -> int:
        return sum(w.out_nbytes for w in self.work)

    def bytes_read(self, models: Models) -> int:
        """Bytes of tensors to be read from all files."""
        (_, b), *more = models[1:]
        total = 0
        for w in self.work:
            total += w.info.nbytes if w.action != "copy_b" else 0
            total += b.tensors[w.name].nbytes if w.action in ("copy_b", "merge") else 0
            if w.action == "merge":
                total += sum(header.tensors[w.name].nbytes for _, header in more)
        return total

    def warnings(self) -> list[str]:
        """What a user should hear of: the issues, one counted line each, and the remarks."""
        return [*self.remarks(), *(issue_line(kind, self.issues[kind]) for kind in WARNED if self.issues.get(kind))]

    def remarks(self) -> list[str]:
        """What is odd about the merge as a whole."""
        if all(w.action in ("copy_a", "cast_a") for w in self.work):
            return [*self.odd, "no tensor takes anything from B: the output will hold A's tensors"]
        return self.odd


def issue_line(kind: str, names: list[str]) -> str:
    """One kind of issue in words, counted."""
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {ISSUES[kind]} (first {names[0]})"


def check_layouts(a: Header, b: Header, name_a: str, name_b: str) -> Layout:
    """The one layout of both files; UserError that names both if they are not of one architecture."""
    found = []
    for header, name in ((a, name_a), (b, name_b)):
        try:
            found.append(detect_layout(header.tensors, {k: i.shape for k, i in header.tensors.items()}))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    one, two = found
    if one.name != two.name:
        raise UserError(
            f"{name_a} is {one.title}, {name_b} is {two.title}: only models of one architecture can be merged"
        )
    if (one.n_in, one.n_out) != (two.n_in, two.n_out):
        raise UserError(
            f"{name_a} has {one.n_in} + 1 + {one.n_out} blocks, {name_b} has {two.n_in} + 1 + {two.n_out}: "
            "only models of one size can be merged"
        )
    return one


def plan_merge(models: Models, settings: MergeSettings, has_base: bool = False) -> Plan:
    """Check settings against the models and decide every tensor of the output; see make_plan.

    `models` are A, B, further ones, and last the base if `has_base`. Raises UserError for models of different
    architectures, a number of them that the method does not take, settings that contradict each other and
    settings without effect.
    """
    found = find_method(settings.method)
    found.check_models(len(models) - has_base, has_base)
    (name_a, a), *others = models
    layout = [check_layouts(a, other, name_a, name) for name, other in others][0]
    layout = replace(layout, outside=settings.outside)
    keep, named = settings.keep, {*settings.blocks}
    base = found.alpha if settings.base is None else settings.base
    shares = alphas(layout, settings.preset, base, settings.blocks, settings.xl_presets)
    components = set(check_components(settings.components, layout))
    if "vae" in keep and ("VAE" in named or "vae" in components):
        raise UserError("the VAE is kept from A and given a share of B: leave out one of the two")
    if "text" in keep and {"clip_l", "clip_g"} & components:
        raise UserError("the text encoders are kept from A and given a share of B: leave out one of the two")
    if "unet" in components and settings.preset is not None:
        raise UserError("component unet replaces every share of the preset: leave out one of the two")
    if settings.xl_presets != "curve" and (settings.preset is None or layout.name != "sdxl"):
        raise UserError(f"--xl-presets {settings.xl_presets} has no effect: it says how a preset becomes SDXL's blocks")
    if settings.outside != "dodgeburn" and len(set(shares.values())) == 1:
        raise UserError(f"--outside {settings.outside} has no effect: every block has the same share")
    if settings.clip and found.name == "weighted_sum":
        raise UserError("clipping has no effect: a weighted sum lies between A and B already")
    if settings.seed and not found.random:
        raise UserError(f"the seed has no effect: {found.name} is not random")
    plan = make_plan(models, layout, shares, settings)
    if any(w.action in ("merge", "copy_b") and layout.is_unet(w.name) for w in plan.work):
        plan.odd = _predictions(models, has_base)
    return plan


def _predictions(models: Models, has_base: bool) -> list[str]:
    """A warning where U-Nets are mixed that say that they predict different things.

    What B has learned beyond a base of its own kind is a change of weights, which may be added to any model.
    """
    said = [prediction_type(header) for _, header in models]
    (name, _), first = models[0], said[0]
    compared = range(1, len(models) - has_base)
    odd = [i for i in compared if said[i] != (said[-1] if has_base else first)]
    if not odd:
        return []
    other = models[odd[0]][0]
    if has_base:
        name, first = models[-1][0], said[-1]
    return [f"{name} predicts {first}, {other} {said[odd[0]]}: a mix of two such U-Nets predicts neither"]


def make_plan(models: Models, layout: Layout, blocks: Mapping[str, float], settings: MergeSettings) -> Plan:
    """Decide every tensor of the output from the headers, with these shares by block instead of the settings' own.

    The output has A's names and shapes, and A's types or, for floats, `settings.dtype`. A tensor's share is that of
    the last rule that matches it, or else its component's, or else its block's; what is kept is always A's.

    Raises UserError if tensors to be merged differ in shape,
    are of a type that cannot be computed with, if the two files have no tensor in common, or for a rule that
    matches no tensor.
    """
    (_, a), (name_b, b), *more = models
    method, kept, clip, dtype = find_method(settings.method), settings.keep, settings.clip, settings.dtype
    shares = dict(blocks)
    if "vae" in kept and VAE in shares:
        shares[VAE] = 0.0
    plan = Plan(
        layout, method, settings, shares, method.check_params(settings.params),
        check_components(settings.components, layout), parse_rules(settings.rules, layout),
    )  # fmt: skip
    mismatched: list[str] = []
    unused = dict.fromkeys(plan.rules)
    for name, info in a.tensors.items():
        block = layout.block(name)
        of_a_only = _is_kept(name, layout, kept)
        alpha = 0.0
        if block is not None and not of_a_only:
            alpha = shares[block]
            if (share := component_share(name, layout, plan.components)) is not None:
                alpha = share
            for rule in plan.rules:
                if rule.matches(name, block):
                    alpha = rule.share
                    unused.pop(rule, None)
        other = b.tensors.get(name)
        action: Action = "copy_a"
        wanted = ""
        if dtype is not None and info.dtype in FLOAT_DTYPES:
            wanted = chosen_dtype(dtype, layout.component(name), info.shape)
        if block is None:
            plan.issues["outside"].append(name)
        elif of_a_only or (alpha == 0.0 and method.zero_is_a):
            if other is not None and other.shape != info.shape:
                plan.issues["shape_differs"].append(name)
        elif other is None:
            plan.issues["missing_in_b"].append(name)
        elif any(name not in header.tensors for _, header in more):
            plan.issues["missing_elsewhere"].append(name)
        elif info.dtype not in FLOAT_DTYPES or other.dtype not in FLOAT_DTYPES:
            if info.dtype in FLOAT_DTYPES or _is_packed_float(info.dtype):
                raise UserError(f"{name} is {info.dtype} in A and {other.dtype} in {name_b}: these cannot be mixed")
            plan.issues["integers"].append(name)
        elif other.shape != info.shape:
            mismatched.append(name)
        elif alpha == 1.0 and other.dtype == (wanted or info.dtype) and method.one_is_b and not clip:
            action = "copy_b"
        else:
            action = "merge"
            _check_more(name, info, more)
            if other.dtype != info.dtype:
                plan.issues["dtype_differs"].append(name)
        if action == "copy_a" and wanted and wanted != info.dtype:
            action = "cast_a"
        used = alpha if action in ("copy_b", "merge") else 0.0
        plan.work.append(Work(name, info, action, used, block, wanted if wanted != info.dtype else ""))
    for rule in unused:
        raise UserError(f"rule {rule.text!r} matches no tensor that could be merged: check its blocks and words")
    if mismatched:
        first = mismatched[0]
        if mismatched == [CONV_IN] and (said := _other_inputs(models)):
            raise UserError(said)
        raise UserError(
            f"{len(mismatched)} tensors of {name_b} have other shapes than A's, first {first}: "
            f"{list(b.tensors[first].shape)} instead of {list(a.tensors[first].shape)}; "
            "only models of one size can be merged"
        )
    plan.issues["extra_in_b"] = [
        name for name in b.tensors
        if name not in a.tensors and layout.block(name) is not None and not _is_kept(name, layout, kept)
    ]  # fmt: skip
    if not any(name in b.tensors for name in a.tensors):
        raise UserError(f"{name_b} has none of A's {len(a.tensors)} tensors: nothing to merge")
    return plan


def _other_inputs(models: Models) -> str:
    """What to do where A and B differ in the U-Net's first convolution alone, as an inpainting model and another do."""
    (name_a, a), (name_b, b), *_ = models
    ours, theirs = ((input_channels({CONV_IN: header.tensors[CONV_IN].shape}) or 0) for header in (a, b))
    if 4 not in (ours, theirs) or ours == theirs:
        return ""
    odd = name_b if ours == 4 else name_a
    first = f"name {odd} first, and " if ours == 4 else ""
    return (
        f"{odd} is {kind_of(max(ours, theirs))}: its first convolution takes {max(ours, theirs)} channels instead of "
        f"4; {first}keep that of A with --rule IN00:{CONV_IN.removeprefix(UNET)}:0"
    )


def _check_more(name: str, info: TensorInfo, more: Sequence[tuple[str, Header]]) -> None:
    for file, header in more:
        other = header.tensors[name]
        if other.dtype not in FLOAT_DTYPES:
            raise UserError(f"{name} is {info.dtype} in A and {other.dtype} in {file}: these cannot be mixed")
        if other.shape != info.shape:
            raise UserError(f"{name} of {file} is {list(other.shape)} instead of {list(info.shape)} as in A")


def _is_kept(name: str, layout: Layout, keep: tuple[str, ...]) -> bool:
    return ("text" in keep and layout.is_text(name)) or ("vae" in keep and layout.is_vae(name))


def _is_packed_float(dtype: str) -> bool:
    return dtype.startswith("F") or dtype == "C64"
