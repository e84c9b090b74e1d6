"""dodgeburn compare: many merges of two models, seen and measured side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dodgeburn.cli.embeddings import Embeddings, check_named, find_embeddings
from dodgeburn.cli.lists import numbers, seeds_of
from dodgeburn.cli.options import Grouped, as_option, given, parse
from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.merge.compare import Comparison
    from dodgeburn.merge.gauges import Gauge
    from dodgeburn.merge.search import SearchSettings

HELP = "try every preset and base of two models, and rank the merges without writing one"
EXAMPLE = "dodgeburn compare pocket-style pocket-bold --presets all --bases 0.4,0.5,0.6 --seeds 0,1,2,3 -o compared"
TOP = 10  # rows that the terminal shows


@dataclass
class Merging:
    """How variants are merged, beside their methods and shares."""

    also: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="C")] = field(default_factory=list)
    """One more model, for methods that take three or more. Repeatable."""
    base_model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model that the others were tuned from, for methods that take differences."""
    keep: Annotated[str, tyro.conf.arg(metavar="PARTS")] = "text,vae"
    """Parts taken from A whatever the shares say: text, vae, text,vae or none."""
    xl_presets: Literal["curve", "cut"] = "curve"
    """How the presets, made for SD1.5's 25 blocks, become SDXL's 19: formulas on 19 points, or supermerger's cut."""


@dataclass
class Searching:
    """Further merges that a search proposes."""

    search: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Beside the variants, let Optuna propose N merges (curves of shares, bases, one of --methods) and grade what it
    found on held-out prompts and seeds. Without --prompts: drawn from the pocket world.
    """
    search_by: Literal["tpe", "nsga2", "random"] = "tpe"
    """What proposes: TPE, NSGA-II, or chance alone, to compare with."""
    search_seed: int = 0
    """Of the proposals: the same seed proposes the same."""
    goals: Annotated[str, tyro.conf.arg(metavar="NAMES")] = "fidelity,resemblance_a,resemblance_b"
    """What the search makes large, separated by commas."""
    held_out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompts that grade what the search found; none: every second one of --prompts."""
    held_out_seeds: Annotated[str | None, tyro.conf.arg(metavar="NUMBERS")] = None
    """Seeds that grade it; none: as many as --seeds, after the largest of them."""
    picks: int = 5
    """How many of the search's best are graded."""


@dataclass
class Pictures:
    """How pictures are made."""

    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    sampler: str = "dpmpp_2m"
    """Any that `generate` has: dpmpp_2m, euler, heun, dpmpp_3m_sde ..."""
    spacing: str = "trailing"
    """trailing, leading, linspace, karras or exponential."""
    negative: str = ""
    """Negative prompt, the same for all."""
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Picture width; none: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Picture height; none: the model's own."""


@dataclass
class Reading:
    """Who reads the pictures. Those of the pocket world have a reader and a judge of their own."""

    clip: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP model's local folder, as a proxy: its score of picture and prompt decides the ranks. Any model can then be
    searched too."""
    score: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    """Instead of CLIP a function of yours, called with pictures (uint8 [n, h, w, 3]) and their prompts, which answers
    with a number each: more is better."""
    clip_judge: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Another CLIP, which reads the same pictures and decides nothing but the grade of what a search found."""


@dataclass
class Running:
    """Where it is computed."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """fp32, fp16 or bf16; none: what suits the device."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""


@dataclass
class Compare(Grouped):
    """Compare the merges of models A and B: all presets at all bases, with the same prompts and seeds.

    Every variant is merged into the loaded model, so no file is written. The folder gets report.html (one file, for any
    browser), contact sheets, table.csv and results.json. Interrupted, the same command goes on where it was.
    All shares are B's: 0 = all A, 1 = all B (ComfyUI's ratio is model1's share, the other way round).
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Model A: a packaged one (pocket-style), a .safetensors file, a diffusers folder or a hub id."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Model B, of the same architecture and size."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """The folder to write to: a new or empty one, or that of an interrupted run."""
    presets: Annotated[str | None, tyro.conf.arg(metavar="NAMES")] = None
    """Presets separated by commas; all (the card's 16), published (all 38), or none (every block at the base). Not
    given: all, or none with --methods.
    """
    bases: Annotated[str | None, tyro.conf.arg(metavar="NUMBERS")] = None
    """B's shares of what is outside the U-Net's blocks, 0.4,0.5 or 0.2..0.8/4, or default, the method's own. Not
    given: 0.4,0.5,0.6, or default with --methods.
    """
    methods: Annotated[str | None, tyro.conf.arg(metavar="NAMES")] = None
    """Merge methods separated by commas, each NAME[:PARAMETER=NUMBER ...][:seed=N][:clip], such as
    slerp,ties:density=0.1,ties:density=0.3; see dodgeburn merge --help. Not given: weighted_sum.
    """
    variants: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A .toml, .yaml or .json file of variants with names and any settings of a merge; compared alone, or beside the
    grid that --presets, --bases and --methods make.
    """
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A text file with one prompt a line (lines beginning with # are left out); none: eight of the pocket world."""
    seeds: Annotated[str, tyro.conf.arg(metavar="NUMBERS")] = "0,1,2,3"
    """Seeds, 0,1,2 or 0-3; every prompt is drawn with each."""
    json: bool = False
    """Print one JSON object as the last line."""
    merging: Merging = field(default_factory=Merging)
    searching: Searching = field(default_factory=Searching)
    pictures: Pictures = field(default_factory=Pictures)
    embeddings: Embeddings = field(default_factory=Embeddings)
    reading: Reading = field(default_factory=Reading)
    running: Running = field(default_factory=Running)


def main(args: list[str]) -> int:
    """Run `dodgeburn compare`; raises UserError for bad input."""
    chosen = parse(Compare, args, "compare", EXAMPLE)
    if chosen.out is None:
        raise UserError("no output folder: say where to write with -o DIR")
    seeds = seeds_of(chosen.seeds)
    from dodgeburn.merge.compare import CompareSettings, compare
    from dodgeburn.sampling.settings import GenerateSettings

    prompts, search = _search(chosen, seeds)
    settings = CompareSettings(
        **_merges(chosen),
        prompts=prompts,
        seeds=tuple(seeds),
        keep=() if chosen.keep.strip().lower() == "none" else (chosen.keep,),
        xl_presets=chosen.xl_presets,
        generate=GenerateSettings(
            steps=chosen.steps, guidance=chosen.guidance, sampler=chosen.sampler, spacing=chosen.spacing,
            width=chosen.width, height=chosen.height, negative=chosen.negative,
        ),
    )  # fmt: skip
    texts = [*prompts, *([] if search is None else search.prompts), chosen.negative]
    syntax = settings.generate.prompt_syntax
    embeddings, _ = find_embeddings(chosen.embedding, chosen.embedding_dir, texts, syntax)
    check_named(chosen.embedding, embeddings, syntax)
    reader, judge = _gauges(chosen)
    with said_at_once():
        result = compare(
            chosen.a, chosen.b, settings, chosen.out, chosen.device, chosen.dtype, reader, chosen.tokenizer,
            judge=judge, more=chosen.also, base_model=chosen.base_model, search=search, embeddings=embeddings,
        )  # fmt: skip
    print(table(result))
    if result.search is not None:
        from dodgeburn.merge.search_report import search_text

        print(search_text(result.search, result.typed))
    print(f"report: {result.files['report']}")
    if chosen.json:
        from dodgeburn.merge.compare_report import as_json

        print(json.dumps(as_json(result)))
    return 0


def _merges(chosen: Compare) -> dict[str, Any]:
    """What is merged: the grid's presets, bases and methods, and the file's variants."""
    given = (chosen.presets, chosen.bases, chosen.methods)
    found: dict[str, Any] = {}
    if chosen.variants is not None:
        from dodgeburn.merge.variants import read_variants

        found["variants"] = read_variants(chosen.variants, chosen.also, chosen.base_model)
        if given == (None, None, None):
            return {**found, "presets": (), "bases": (), "methods": ()}
    presets, bases, methods = given
    if presets is None:
        presets = "all" if methods is None else "none"
    if bases is None:
        bases = "0.4,0.5,0.6" if methods is None else "default"
    found["presets"] = tuple(name for name in presets.split(",") if name.strip())
    words = [word.strip() for word in bases.split(",") if word.strip()]
    own = [word for word in words if word.lower() != "default"]
    found["bases"] = (*([None] if len(own) < len(words) else []), *(numbers(",".join(own), "bases") if own else []))
    if methods is not None:
        found["methods"] = tuple(name.strip() for name in methods.split(",") if name.strip())
    return found


def _gauges(chosen: Compare) -> tuple[Gauge | None, Gauge | None]:
    """CLIP as who reads, and another as the judge, where they are asked for."""
    if chosen.clip is not None and chosen.score is not None:
        raise UserError("--clip and --score: one decides the ranks, leave out the other")
    if chosen.clip is None and chosen.clip_judge is not None:
        raise UserError("--clip-judge has no effect without --clip FOLDER: leave it out")
    from dodgeburn.measure.clip import ClipScore
    from dodgeburn.merge.gauges import ByClip, ByOwn
    from dodgeburn.models.model import choose_device

    if chosen.clip is None:
        return (None if chosen.score is None else ByOwn(chosen.score)), None

    device = str(choose_device(chosen.device))
    reader = ByClip(ClipScore(chosen.clip, device))
    if chosen.clip_judge is None:
        return reader, None
    judge = ByClip(ClipScore(chosen.clip_judge, device))
    if judge.clip.sha256 == reader.clip.sha256:
        raise UserError(f"--clip-judge {chosen.clip_judge} is the same model as --clip: nobody grades their own choice")
    return reader, judge


def _search(chosen: Compare, seeds: list[int]) -> tuple[tuple[str, ...], SearchSettings | None]:
    """The comparison's prompts, and the search's settings if one is wanted."""
    from dodgeburn.merge.compare_settings import drawn_prompts, packaged_prompts
    from dodgeburn.merge.search import SearchSettings
    from dodgeburn.prompt_file import read_prompts

    if chosen.search is None:
        if useless := given(chosen.searching):
            raise UserError(f"{as_option(useless[0])} has no effect without --search N")
        return packaged_prompts() if chosen.prompts is None else read_prompts(chosen.prompts), None
    if chosen.search < 1 or chosen.picks < 1:
        raise UserError(f"--search {chosen.search} --picks {chosen.picks}: expected at least 1 of each")
    prompts = drawn_prompts(16) if chosen.prompts is None else read_prompts(chosen.prompts)
    if chosen.held_out is not None:
        prompts = drawn_prompts(8) if chosen.prompts is None else prompts
        held_out = read_prompts(chosen.held_out)
    elif len(prompts) < 2:
        raise UserError(f"{chosen.prompts} has one prompt: a search needs others to be graded by, see --held-out")
    else:
        prompts, held_out = prompts[::2], prompts[1::2]
    graded_by = list(range(max(seeds, default=0) + 1, max(seeds, default=0) + 1 + len(seeds)))
    if chosen.held_out_seeds is not None:
        graded_by = seeds_of(chosen.held_out_seeds, "held-out-seeds")
    return prompts, SearchSettings(
        trials=chosen.search, prompts=held_out, seeds=tuple(graded_by), seed=chosen.search_seed, by=chosen.search_by,
        goals=tuple(name.strip() for name in chosen.goals.split(",") if name.strip()), picks=chosen.picks,
    )  # fmt: skip


def table(result: Comparison, top: int = TOP) -> str:
    """The first rows and both parents, as text."""
    plain = all(row.method == "weighted_sum" and row.preset for row in result.rows)
    names = {row.name: row.preset if plain and row.preset else row.name for row in [*result.parents, *result.rows]}
    wide = max(25, *(len(name) + 2 for name in names.values()))
    what = "preset" if plain else "variant"
    score = result.score[:20] if result.proxy else "fidelity"
    lines = [f"{'rank':>4}  {what:<{wide}}{'base':>5}  {score:<22}{'like A':>7}{'like B':>8}  Pareto"]
    read = result.rows[0].measured.resemblance_a is not None
    prefix = "resemblance" if read else "pixel_resemblance"
    for row in [*result.parents, *result.rows[:top]]:
        found = row.interval("fidelity")
        ends = f" [{found.low:.3f}, {found.high:.3f}]" if found and found.ends else ""
        fidelity = f"{found.mean:.3f}{ends}" if found else "-"
        like = [f"{row.mean(f'{prefix}_{side}') or 0.0:.3f}" for side in "ab"]
        base = "" if row.base is None else f"{row.base:g}"
        first = f"{row.rank or '':>4}  {names[row.name]:<{wide}}{base:>5}"
        lines.append(f"{first}  {fidelity:<22}{like[0]:>7}{like[1]:>8}  {'yes' if row.pareto else ''}".rstrip())
    if len(result.rows) > top:
        lines.append(f"      and {len(result.rows) - top} more")
    lines += [f"note: {note}" for note in result.notes]
    made = f", {result.resumed} picture files were there already" if result.resumed else ""
    lines.append(f"{len(result.rows)} variants in {result.seconds:.0f} s{made}")
    return "\n".join(lines)
