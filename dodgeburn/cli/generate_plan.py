"""What `dodgeburn generate` is to make: the options, and with --from what a picture says under them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodgeburn.cli.embeddings import check_named, find_embeddings, put_on
from dodgeburn.cli.generate_options import Generate
from dodgeburn.cli.loras import Finder
from dodgeburn.cli.tuned import TunedUse, tuned_use
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.rework.bias.asking import PromptRule
    from dodgeburn.sampling.loras import LoraUse
    from dodgeburn.sampling.reproduce import Request
    from dodgeburn.sampling.settings import GenerateSettings, Thresholding

# Settings whose option has another name.
OPTIONS = {"fraction": "threshold_fraction"}


@dataclass
class Plan:
    """What to make: the pictures' prompt and seeds, and where they came from."""

    prompt: str  # what files are named after
    seeds: list[int]
    settings: GenerateSettings
    model: str
    batch_size: int | None
    dtype: str | None
    source: Request | None = None
    loras: list[tuple[Path, LoraUse]] = field(default_factory=list)
    tuned: TunedUse | None = None
    not_honoured: list[str] = field(default_factory=list)  # of the picture's settings
    embeddings: list[Path] = field(default_factory=list)
    row: int | None = None  # only this row of the batch is kept: the picture that is made again
    rule: PromptRule | None = None

    @property
    def prompts(self) -> list[str]:
        """Each seed's prompt."""
        return [self.prompt if self.rule is None else self.rule.rewrite(self.prompt, seed) for seed in self.seeds]


def _settings(options: Generate) -> GenerateSettings:
    from dodgeburn.sampling.settings import GenerateSettings
    from dodgeburn.sampling.sizes import SIZE_FIELDS

    sizes: dict[str, Any] = {name: _pair(name, getattr(options, name)) for name in SIZE_FIELDS[1:]}
    return GenerateSettings(
        steps=options.steps, guidance=options.guidance, sampler=options.sampler, spacing=options.spacing,
        width=options.width, height=options.height, negative=options.negative,
        prompt_syntax=options.prompt_syntax, noise=options.noise,
        zero_snr=options.zero_snr, clip_skip=options.clip_skip, cfg_rescale=options.cfg_rescale,
        cfg_start=options.cfg_start, cfg_end=options.cfg_end, thresholding=_thresholding(options),
        size_scale=options.size_scale, **sizes,
    )  # fmt: skip


def plan_of(options: Generate, given: frozenset[str], varied: Mapping[str, Any] | None = None) -> Plan:
    """The generation as asked for; with --from, the picture's settings under those given as options, whose names are
    `given` (an option can be given its default). varied: settings of a grid's cell, above both; another cell can then
    be the one that names an --embedding."""
    from dodgeburn.sampling.settings import GenerateSettings

    plan = _asked(options, given)
    if varied:
        plan.settings = GenerateSettings(**{**plan.settings.model_dump(), **varied})
    plan = _with_loras(plan, options)
    if varied is None:
        check_named(options.embedding, plan.embeddings, plan.settings.prompt_syntax)
    return plan


def _asked(options: Generate, given: frozenset[str]) -> Plan:
    """The same without LoRAs and embeddings."""
    settings = _settings(options)
    if options.source is None:
        if options.prompt is None:
            raise UserError("no prompt: give one, or a picture to take it from with --from PICTURE")
        seeds = [options.seed + i for i in range(options.n)]
        model = "pocket" if options.model is None else options.model
        plan = Plan(options.prompt, seeds, settings, model, options.batch_size, options.dtype)
        plan.tuned = tuned_use(options.tuned)
        return plan
    from dodgeburn.pocket.model import NAMES
    from dodgeburn.sampling.reproduce import request_of
    from dodgeburn.sampling.settings import GenerateSettings, Thresholding

    asked = request_of(options.source)
    dynamic = {OPTIONS.get(name, name) for name in Thresholding.model_fields}
    over = {k: getattr(settings, k) for k in GenerateSettings.model_fields if k in given}
    if dynamic & given:
        over["thresholding"] = settings.thresholding
    if options.model is None and asked.model not in NAMES:
        name, short = asked.model or "a model without a name", asked.model_hash[:10] or "not known"
        raise UserError(f"{options.source} was made with {name} (hash {short}): give its file with --model")
    plan = Plan(
        prompt=asked.prompt if options.prompt is None else options.prompt,
        seeds=asked.seeds, settings=GenerateSettings(**{**asked.settings.model_dump(), **over}),
        model=asked.model if options.model is None else options.model,
        batch_size=options.batch_size, dtype=options.dtype or asked.dtype,
        source=asked, tuned=tuned_use(options.tuned, asked),
    )  # fmt: skip
    if "seed" in given or options.n > 1:
        first = options.seed if "seed" in given else asked.seeds[0]
        plan.seeds = [first + i for i in range(options.n)]
    elif len(plan.seeds) == 1 and plan.batch_size is None:
        # The last bit of a picture depends on its batch's size and its row there: it is made in the same place.
        plan.row, plan.batch_size = asked.batch
        plan.seeds = plan.seeds * plan.batch_size
    return plan


def _with_loras(plan: Plan, options: Generate) -> Plan:
    """The plan with LoRAs: options', else the picture's; and those that tags in the prompt name."""
    from dodgeburn.sampling.settings import check_seed

    for seed in (plan.seeds[0], plan.seeds[-1]):
        check_seed(seed)  # now rather than when a model was loaded
    finder = Finder(options.lora_dir, plan.model)
    finder.options(options.lora)
    if plan.source is not None:
        if not options.lora:
            plan.not_honoured = finder.picture(plan.source.adapters, plan.source.kind == "dodgeburn")
        plan.not_honoured = plan.source.not_honoured + plan.not_honoured
    if plan.settings.prompt_syntax != "plain":
        plan.prompt = finder.tags(plan.prompt)
    plan.loras = finder.found
    if options.rule is not None:
        plan.rule = _rule(options.rule, plan)
    used, exact = ([], False) if plan.source is None else (plan.source.embeddings, plan.source.kind == "dodgeburn")
    texts, syntax = [*plan.prompts, plan.settings.negative], plan.settings.prompt_syntax
    plan.embeddings, missed = find_embeddings(options.embedding, options.embedding_dir, texts, syntax, used, exact)
    plan.not_honoured = plan.not_honoured + missed
    return plan


def read_embeddings(plan: Plan, models: Sequence[Model | None], tell: bool = True) -> None:
    """The plan's textual inversions, for each model that draws."""
    for i, model in enumerate(models):
        if model is not None:
            put_on(model, plan.embeddings, [] if plan.source is None else plan.source.embeddings, tell and not i)


def _rule(path: Path, plan: Plan) -> PromptRule:
    """The rule of a file; UserError where it has nothing to say of the prompt."""
    from dodgeburn.rework.bias.asking import PromptRule

    rule = PromptRule.read(path)
    if all(rule.rewrite(plan.prompt, seed) == plan.prompt for seed in plan.seeds):
        subjects = " or ".join(repr(p) for p in rule.concept.prompts)
        raise UserError(f"{path} is a rule for prompts with {subjects} that leave {rule.concept.attribute} open: "
                        f"{plan.prompt!r} is none, leave --rule out")  # fmt: skip
    return rule


def tell_source(plan: Plan, model: Model) -> None:
    """Warn of what a picture's settings say that isn't followed."""
    asked = plan.source
    if asked is None:
        return
    if asked.model_hash and not model.sha256.startswith(asked.model_hash):
        warnings.warn(
            f"the picture was made with another model: {asked.model or 'hash'} {asked.model_hash[:10]}, this one is "
            f"{model.name} {model.sha256[:10]}", DodgeburnWarning, stacklevel=2,
        )  # fmt: skip
    if asked.device and asked.device != model.device.type:
        warnings.warn(
            f"the picture was made on {asked.device}, this is {model.device.type}: expect small differences",
            DodgeburnWarning, stacklevel=2,
        )  # fmt: skip
    for line in plan.not_honoured:
        warnings.warn(f"not honoured from {asked.kind}'s settings: {line}", DodgeburnWarning, stacklevel=2)


def _thresholding(options: Generate) -> Thresholding | None:
    """Dynamic thresholding as asked for; UserError for settings of it without the one that switches it on."""
    from dodgeburn.sampling.settings import Thresholding

    asked = {name: getattr(options, OPTIONS.get(name, name)) for name in Thresholding.model_fields}
    if asked["separate_feature_channels"]:
        del asked["separate_feature_channels"]  # the default; without it nothing may be asked for at all
    given = {name: value for name, value in asked.items() if value is not None}
    if given and options.mimic_scale is None:
        names = ", ".join(OPTIONS.get(name, name).replace("_", "-") for name in given)
        raise UserError(f"{names}: no effect without dynamic thresholding, switch it on with --mimic-scale 7")
    return Thresholding(**given) if given else None


def _pair(name: str, text: str | None) -> tuple[int, int] | None:
    """Two whole numbers from "5376x3072" or "0,0"; UserError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*[x,]\s*(\d{1,9})\s*", text.lower())
    if match is None:
        wanted = "LEFT,TOP such as 0,0" if name.endswith("crop") else "WIDTHxHEIGHT such as 1344x768"
        raise UserError(f"--{name.replace('_', '-')} is {text!r}: expected {wanted}")
    return int(match[1]), int(match[2])
