"""dodgeburn bias audit: which prompts show something that nobody asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dodgeburn.models.model import Model
    from dodgeburn.rework.bias.audit import Audit, AuditSettings
    from dodgeburn.rework.bias.classify import Classifier
    from dodgeburn.sampling.settings import GenerateSettings

HELP = "scan all prompts and attributes for ties, with the false alarms under control"
EXAMPLE = "dodgeburn bias audit pocket -n 64 --confirm 256 -o audit --json"
EXAMPLE_CLIP = (
    "dodgeburn bias audit model.safetensors --prompts jobs.txt --clip clip-vit-l-14 --attributes people.yaml -o audit"
)


@dataclass
class AuditOptions:
    """Draw every prompt, read every picture, and name the prompts whose shares stand out from all others'.

    Pocket models are read by the reader. For any other give a classifier: --clip FOLDER with --attributes FILE (YAML:
    `gender: {woman: a photo of a woman, man: a photo of a man}`) is CLIP zero-shot, a proxy. What is tested, and when
    it fails: docs/bias.md.
    """

    model: Annotated[str, tyro.conf.Positional] = "pocket"
    """A packaged model, a .safetensors file, a diffusers folder or a hub id."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A text file, a prompt a line (# begins a comment); none: one for every value of the pocket world (30)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """Prompts given here."""
    guidance: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SCALE ...")] = (4.0,)
    """Guidance scales, as in 1 4 7.5: guidance changes what is tied to what."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """Pictures a prompt and scale at the first look."""
    confirm: int = 256
    """Fresh pictures of the prompts with candidates, which alone decide; 0: one look."""
    tolerance: float = 0.05
    """Total variation from the other prompts that is no alarm."""
    level: float = 0.05
    """Chance of one false alarm or more in the whole audit (holm), or share of false alarms (bh)."""
    control: str = "holm"
    """holm or bh."""
    attribute: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Only these attributes."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP model's local folder, as classifier."""
    attributes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --clip: attributes, their classes and texts."""
    margin: float = 0.0
    """With --clip: by how much (100 x cosine) a class must lead to be read."""
    judge: bool = False
    """Pocket: read by the judge (for a last evaluation; choices are the reader's)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder for report.html, audit.json and what was drawn (the same command goes on there)."""
    steps: int = 20
    """Denoising steps."""
    sampler: str = "dpmpp_2m"
    """Any that `generate` has."""
    seed: int = 0
    """Another one draws other pictures."""
    batch_size: int | None = None
    """Pictures at a time; none: chosen by their size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """fp32, fp16 or bf16; none: what suits the device."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = field(default=False)
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn bias audit`; raises UserError for bad input."""
    options = parse(AuditOptions, args, "bias audit", EXAMPLE, EXAMPLE_CLIP)
    if (options.clip is None) != (options.attributes is None):
        raise UserError("--clip and --attributes belong together: a CLIP folder, and what to tell apart with it")
    if options.clip is not None and options.judge:
        raise UserError("--judge is the pocket's: leave it out with --clip")
    if options.clip is None and options.margin:
        raise UserError("--margin has no effect without --clip")
    for guidance in options.guidance:
        _at(options, guidance)  # refuses what no picture can be drawn with
    from dodgeburn.rework.bias.audit import as_json

    settings = _settings(options)
    model, classifier = _loaded(options)
    found = _run(options, settings, model, classifier)
    result = {"model": model.name, "sha256": model.sha256, **as_json(found)}
    _print(found)
    if options.out is not None:
        from dodgeburn.checkpoint.tensorfile import write_atomic
        from dodgeburn.rework.bias.audit_report import audit_report

        write_atomic(options.out / "audit.json", (json.dumps(result, indent=1) + "\n").encode())
        page = audit_report(found, model.name, classifier.classes).save(options.out / "report.html")
        print(f"report: {page}")
        result["report"] = str(page)
    if options.json:
        print(json.dumps(result))
    return 0


def _settings(options: AuditOptions) -> AuditSettings:
    from dodgeburn.prompt_file import read_prompts
    from dodgeburn.rework.bias.audit import AuditSettings, pocket_prompts

    prompts = (*options.prompt, *(read_prompts(options.prompts) if options.prompts else ()))
    if not prompts and options.clip is not None:
        raise UserError("no prompts: name them with --prompts FILE or --prompt TEXT ...")
    return AuditSettings(
        tuple(dict.fromkeys(prompts)) or pocket_prompts(), options.guidance, options.n, options.confirm,
        options.tolerance, options.level, options.control, attributes=options.attribute or None, seed=options.seed,
    )  # fmt: skip


def _loaded(options: AuditOptions) -> tuple[Model, Classifier]:
    from dodgeburn.merge.compare_measure import speaks_pocket
    from dodgeburn.models.loading import load_model
    from dodgeburn.rework.bias.classify import ClipClassifier, PocketClassifier, read_attributes

    texts = read_attributes(options.attributes) if options.attributes is not None else {}
    model = load_model(options.model, options.device, options.dtype, options.tokenizer)
    if options.clip is not None:
        from dodgeburn.measure.clip import ClipScore

        return model, ClipClassifier(ClipScore(options.clip, str(model.device)), texts, options.margin)
    if not speaks_pocket(model):
        raise UserError(f"{model.name} is no model of the pocket world, and nothing reads its pictures: give a "
                        "classifier with --clip FOLDER --attributes FILE")  # fmt: skip
    from dodgeburn.pocket.reader import Reader

    name = "judge" if options.judge else "reader"
    return model, PocketClassifier(Reader.load(name), name)


def _at(options: AuditOptions, guidance: float) -> GenerateSettings:
    from dodgeburn.sampling.settings import GenerateSettings

    return GenerateSettings(steps=options.steps, sampler=options.sampler, guidance=guidance)


def _run(options: AuditOptions, settings: AuditSettings, model: Model, classifier: Classifier) -> Audit:
    from tqdm import tqdm

    from dodgeburn.jobs import PartStore
    from dodgeburn.rework.bias.audit import audit
    from dodgeburn.sampling.settings import GenerateSettings
    from dodgeburn.slide.edits import draw

    made = GenerateSettings(steps=options.steps, sampler=options.sampler)

    def drawn(prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> np.ndarray:
        return draw(model, prompts, seeds, _at(options, guidance), batch_size=options.batch_size)

    store = None
    if options.out is not None:
        # What decides the pictures and their labels; prompts and numbers of pictures may grow.
        told = {"model": model.sha256, "by": classifier.name, "classes": {k: list(v) for k, v in
                classifier.classes.items()}, "margin": options.margin, "sampling": made.model_dump(mode="json"),
                "audit": {k: v for k, v in asdict(settings).items() if k in ("n", "confirm", "seed")},
                **classifier.job}  # fmt: skip
        store = PartStore(options.out, told)
    total = settings.n * len(settings.prompts) * len(settings.guidance)
    with tqdm(total=total, unit="picture", desc="audit", disable=None, file=sys.stderr, leave=False) as bar:

        def tell(n: int) -> None:
            bar.total = max(int(bar.total or 0), int(bar.n) + n)  # the second look's pictures are not known before
            bar.update(n)

        return audit(drawn, classifier, settings, store, tell)


def _print(found: Audit) -> None:
    rows: list[Any] = found.alarms
    print(f"{found.pictures} pictures, {len(found.rows)} tests, {len(rows)} alarms (read by {found.by})")
    for row in rows:
        low, high = row.tv_interval
        print(f"  {row.prompt}: {row.attribute} = {row.value} in {row.share:.0%} of pictures, "
              f"{row.reference_share:.0%} with other prompts; TV {row.tv:.3f} [{low:.3f}, {high:.3f}], "
              f"floor {row.floor_95:.3f}, guidance {row.guidance:g}")  # fmt: skip
