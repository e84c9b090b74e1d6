"""dodgeburn merge: two checkpoints into one, block by block, or many by a recipe."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dodgeburn.cli.options import Grouped, given, parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.cli.written import said_of
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.merge.settings import MergeSettings

HELP = "merge two checkpoints block by block, or many by a recipe, streamed and written safely"
_ESTIMATES = ("a", "b", "also", "estimate", "simplex", "json")  # options that --estimate goes with
_RECIPES = ("a", "out", "threads", "rehash", "dry_run", "json")  # and a recipe
EXAMPLE = "dodgeburn merge pocket-style pocket-bold -o merged.safetensors --preset ReverseSmoothstep --base 0.4"
EXAMPLE_RECIPE = "dodgeburn merge recipe.toml -o merged.safetensors"


@dataclass
class Shares:
    """Shares of B in detail: each replaces what stands before it, the preset first."""

    block: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=SHARE")] = field(
        default_factory=list
    )
    """B's share of single blocks, such as IN04=0.3 or OUT00=0,OUT01=0, or of all that a pattern matches ("OUT*=0.1",
    over which a name wins), or all as MBW lists them (25 or 26 numbers for SD1.5, 19 or 20 for SDXL, BASE first);
    replaces the preset's. Repeatable."""
    component: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=SHARE")] = field(
        default_factory=list
    )
    """B's share of a whole component: unet, clip_l, clip_g, vae. Repeatable."""
    rule: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="BLOCKS:WORDS:SHARE")] = field(
        default_factory=list
    )
    """B's share of tensors by block and name, such as IN04-IN08:attn2:0.3 or "NOT M00:NOT norm:0.2"; an empty
    part is all. The last rule that matches wins over components and blocks. Repeatable.
    """
    xl_presets: Literal["curve", "cut"] = "curve"
    """How the presets, made for SD1.5's 25 blocks, become SDXL's 19: formulas on 19 points, or
    supermerger's cut.
    """
    outside: Literal["dodgeburn", "mecha", "mbw", "supermerger", "comfyui"] = "dodgeburn"
    """Whose rule puts keys outside the U-Net's blocks (time_embed, label_emb, out, text encoders, VAE) into blocks;
    docs/merge.md has the table.
    """


@dataclass
class Method:
    """What other methods than weighted_sum take."""

    also: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="C")] = field(default_factory=list)
    """One more model, for methods that take three or more. Repeatable."""
    base_model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model that the others were tuned from, for methods that take differences."""
    param: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=NUMBER")] = field(
        default_factory=list
    )
    """A parameter of the method, such as beta=0.3 or density=0.2. Repeatable."""
    seed: int = 0
    """Of random methods (dare, della)."""


@dataclass
class File:
    """The values of the result, and how the file is written."""

    dtype: Literal["fp32", "fp16", "bf16", "fp8_e4m3fn"] | None = None
    """The output's type of float tensors; none: as in A, tensor by tensor. fp8: matrices of U-Net and text encoders,
    the rest fp16."""
    clip: bool = False
    """Bring every value of the result between A's and B's."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Threads to merge with; the file's bytes do not depend on it."""
    rehash: bool = False
    """Hash all input files, also large ones that have not changed since a merge hashed them."""


@dataclass
class Estimate:
    """Instead of a merge."""

    estimate: Annotated[str | None, tyro.conf.arg(metavar="C")] = None
    """Don't merge: estimate by least squares which shares of A, B and --also the model C has, block by block, and name
    the nearest preset.
    """
    simplex: bool = False
    """With --estimate: hold all shares at 0 or above with a sum of 1; otherwise they are free, which fits added
    differences too.
    """


@dataclass
class Merge(Grouped):
    """Merge checkpoint B into checkpoint A, block by block; or run a recipe, a text with many such steps.

    Every share, preset and base is B's: 0 = all A, 1 = all B. (ComfyUI's merge nodes count the other way:
    their ratio is model1's share.) A preset sets the U-Net's blocks only. Base is everything else: time and
    label embeddings, text encoders and VAE, unless kept. The output has A's tensor names, shapes and types.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint A: a .safetensors file (SD1.5 or SDXL names), an index of shards, a .ckpt, a diffusers folder, or a
    packaged model such as pocket-style. Or a recipe (.toml, .yaml, .json), and no B.
    """
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    """Checkpoint B, of the same architecture and size."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; never one of the inputs."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """One of the 38 published block presets, 16 of them the card's, by either's name (GradV = GRAD_V); docs/merge.md
    lists them. Or what lies between two: Cosine:GradV:0.3 is 0.7 Cosine + 0.3 GradV. None: every block is base.
    """
    base: float | None = None
    """B's share of everything outside the U-Net's blocks (without a preset, of all), 0 to 1; none: the
    method's default, 0.5 for weighted_sum.
    """
    keep: Annotated[str, tyro.conf.arg(metavar="PARTS")] = ""
    """Parts to take from A whatever the shares say: text, vae, or text,vae."""
    method: str = "weighted_sum"
    """The merge method: weighted_sum, sum_twice, triple_sum, average, add_difference, train_difference,
    multiply_difference, similarity_add_difference, smooth_add, cosine_a, cosine_b, slerp, bislerp, rotate,
    tensor_sum, top_k_sum, distribution_crossover, ties, dare, della, model_stock, geometric_median.
    """
    dry_run: Annotated[bool, tyro.conf.arg(aliases=["-n"])] = False
    """Only print what would be done."""
    json: bool = False
    """Print one JSON object as the last line."""
    shares: Shares = field(default_factory=Shares)
    methods: Method = field(default_factory=Method)
    output: File = field(default_factory=File)
    estimating: Estimate = field(default_factory=Estimate)


def main(args: list[str]) -> int:
    """Run `dodgeburn merge`; raises UserError for bad input."""
    try:
        settings = parse(Merge, args, "merge", EXAMPLE, EXAMPLE_RECIPE)
    except UserError as error:
        raise UserError(f"{error}{_elsewhere(str(error))}") from None
    if settings.estimate is not None:
        return _estimate(settings)
    if settings.simplex:
        raise UserError("--simplex has no effect: it belongs to --estimate C")
    if settings.out is None and not settings.dry_run:
        raise UserError("no output file: say where to write with -o OUT.safetensors, or look first with --dry-run")
    from dodgeburn.merge.recipe_text import is_recipe_name

    if settings.b is None:
        return _recipe(settings)
    if is_recipe_name(settings.a):
        raise UserError(f"{settings.a} is a recipe, which names its models itself: leave {settings.b} out")
    if settings.dry_run:
        return _dry_run(settings, settings.b)
    assert settings.out is not None
    from dodgeburn.merge.formula import formula_lines, formula_text
    from dodgeburn.merge.run import merge

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        result = merge(
            settings.a, settings.b, settings.out, _settings(settings), more=settings.also,
            base_model=settings.base_model, threads=settings.threads, rehash=settings.rehash,
        )  # fmt: skip
    print_warnings(caught)
    merged = sum(w.action == "merge" for w in result.plan.work)
    copied = len(result.plan.work) - merged
    size = result.path.stat().st_size
    print(f"wrote {result.path}: {size / 1e6:,.1f} MB, {merged} tensors merged, {copied} copied")
    print(f"{result.plan.method.name}: {result.plan.method.summary}, alpha is B's share (ComfyUI's ratio is model1's)")
    print("\n".join(formula_text(result.plan, result.recipe.files)))
    print(f"in {result.seconds:.1f} s")
    if settings.json:
        lines = [line.as_dict() for line in formula_lines(result.plan, len(result.recipe.models))]
        found = said_of(
            result, len(result.plan.work), merged=merged, counts=result.plan.counts, formula=lines,
            recipe=result.recipe.as_dict(),
        )  # fmt: skip
        print(json.dumps(found))
    return 0


def _elsewhere(message: str) -> str:
    """What is meant here by an option of another program, or by a third model, that was not understood."""
    _, found, rest = message.partition("not understood: ")
    if not found:
        return ""
    word = rest.split(",")[0].split(" (")[0].partition("=")[0]
    if word in ("--multiplier", "--alpha", "--weight"):
        return "; B's share is --base (A1111's multiplier)"
    if word == "--ratio":
        return "; B's share is --base (ComfyUI's ratio is model1's: its 0.6 is --base 0.4)"
    return (
        ""
        if word.startswith("-")
        else "; a third model is given with --also, what others were tuned from with --base-model"
    )


def _settings(options: Merge) -> MergeSettings:
    """The merge's settings from the command line's texts."""
    from dodgeburn.merge.blocks import parse_blocks
    from dodgeburn.merge.settings import MergeSettings

    texts = {
        "blocks": parse_blocks(options.block),
        "keep": options.keep,
        "params": _numbers(options.param, "parameter"),
        "components": _numbers(options.component, "component share"),
        "rules": options.rule,
    }
    same = MergeSettings.model_fields.keys() - texts.keys()
    return MergeSettings.of(**texts, **{name: getattr(options, name) for name in same})


def _recipe(options: Merge) -> int:
    """Run the recipe that stands in place of A and B."""
    from dodgeburn.merge.recipe_text import ENDINGS, is_recipe_name

    if not is_recipe_name(options.a):
        raise UserError(f"{options.a} alone: name a second checkpoint B, or a recipe ({', '.join(ENDINGS)})")
    if asked := _asked(options, _RECIPES):
        raise UserError(f"--{asked} has no effect: the recipe says how its models are merged")
    from dodgeburn.merge.run_recipe import describe_recipe, run_recipe

    if options.dry_run:
        print(describe_recipe(options.a, options.out))
        return 0
    assert options.out is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        result = run_recipe(options.a, options.out, options.threads, rehash=options.rehash)
    print_warnings(caught)
    size = result.path.stat().st_size
    print(f"wrote {result.path}: {size / 1e6:,.1f} MB, {result.tensors} tensors")
    steps, models = len(result.recipe.steps), len(result.recipe.models)
    print(f"{steps} {'step' if steps == 1 else 'steps'} of {models} models, in {result.seconds:.1f} s")
    if options.json:
        print(json.dumps(said_of(result, result.tensors, recipe=result.recipe.as_dict())))
    return 0


def _dry_run(settings: Merge, b: str) -> int:
    from dodgeburn.merge.formula import formula_lines
    from dodgeburn.merge.run import dry_run

    plan, text = dry_run(
        settings.a, b, settings.out, _settings(settings), more=settings.also, base_model=settings.base_model
    )
    print(text)
    if settings.json:
        found = {
            "dry_run": True,
            "layout": plan.layout.name,
            "blocks": plan.blocks,
            "keep": list(plan.settings.keep),
            "tensors": len(plan.work),
            "bytes_written": plan.bytes_written,
            "counts": plan.counts,
            "formula": [line.as_dict() for line in formula_lines(plan, 2 + len(settings.also))],
        }
        print(json.dumps(found))
    return 0


def _estimate(options: Merge) -> int:
    """Print the estimated shares; UserError for options that only a merge has."""
    if name := _asked(options, _ESTIMATES):
        hint = ": give that model with --also" if name == "base-model" else ""
        raise UserError(f"--{name} has no effect with --estimate, which only reads{hint}")
    if options.b is None:
        raise UserError(f"{options.a} alone: name a second checkpoint B whose shares are estimated")
    assert options.estimate is not None
    from dodgeburn.cli.merge_estimate import text
    from dodgeburn.merge.estimate import estimate
    from dodgeburn.merge.nearest import nearest_preset

    found = estimate(options.estimate, options.a, options.b, options.also, options.simplex)
    print(text(found))
    if options.json:
        near = nearest_preset(found) if not options.also else None
        print(json.dumps({**found.as_dict(), "nearest": near.as_dict() if near else None}))
    return 0


def _asked(options: Merge, known: tuple[str, ...]) -> str:
    """The first option given that is none of these, as it is written; empty if there is none."""
    return min((name for name in given(options) if name not in known), default="").replace("_", "-")


def _numbers(texts: list[str], what: str) -> dict[str, float]:
    """NAME=NUMBER texts as a dict; UserError for anything else."""
    out: dict[str, float] = {}
    for item in (part for text in texts for part in text.split(",") if part.strip()):
        name, _, number = item.partition("=")
        try:
            out[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"{what} {item!r} is not NAME=NUMBER") from None
    return out
