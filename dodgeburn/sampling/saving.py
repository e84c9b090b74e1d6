"""Generated pictures to files that say how they were made."""

from pathlib import Path
from typing import Any

from dodgeburn import __version__
from dodgeburn.checkpoint.embedding_file import TextEmbedding
from dodgeburn.images.comfy import ComfyRequest, write_graph
from dodgeburn.images.png import Infotext, write_picture
from dodgeburn.models.loading import is_stock
from dodgeburn.models.model import Model
from dodgeburn.sampling.embeddings import as_comfy, used_in
from dodgeburn.sampling.guidance import Tuned
from dodgeburn.sampling.loras import ALWAYS
from dodgeburn.sampling.pictures import Generated, Planned
from dodgeburn.sampling.settings import SAMPLERS, SPACINGS, GenerateSettings
from dodgeburn.sampling.sizes import SIZE_FIELDS, time_ids
from dodgeburn.sampling.thresholding import SCHEDULER_VALUE, USES_VALUE


def infotext_of(made: Generated, model: Model) -> Infotext:
    """A1111's settings line for a picture, in A1111's names, order and counting."""
    settings = made.settings
    # A folder has no hash that other tools would know.
    is_file = model.source is not None and model.source.is_file()
    skip = settings.clip_skip or 1
    return Infotext(
        prompt=" ".join([made.prompt, *(use.tag for use in made.adapters)]),
        negative=settings.negative,
        settings={
            "Steps": str(settings.steps),
            "Sampler": SAMPLERS[settings.sampler][0],
            "Schedule type": SPACINGS[settings.spacing][0],
            "CFG scale": f"{settings.guidance:g}",
            "Seed": str(made.seed),
            "Size": f"{settings.width}x{settings.height}",
            "Model hash": model.sha256[:10] if is_file else "",
            "Model": model.name,
            "Clip skip": str(skip) if skip > 1 else "",
            **_thresholding_pairs(settings),
            **_lora_pairs(made),
            "TI hashes": ", ".join(f"{one.name}: {one.sha256[:12]}" for one in embeddings_of(made, model)),
            "Tuned model": "" if made.tuned is None else f"{made.tuned.model.name}:{made.tuned.strength:g}",
            "RNG": "CPU",  # where noise is drawn; A1111's own default is the GPU
            "Version": f"dodgeburn {__version__}",
        },
    )


def embeddings_of(made: Planned, model: Model) -> list[TextEmbedding]:
    """The textual inversions that a picture's prompts name."""
    names = [one.name for one in model.embeddings]
    texts = [made.prompt, made.settings.negative]
    return [model.embeddings[i] for i in used_in(texts, made.settings.prompt_syntax, names)]


def _lora_pairs(made: Generated) -> dict[str, str]:
    """A1111's "Lora hashes" (AutoV3's first 12 digits), and what its tags have no place for."""
    hashes = [f"{use.name}: {use.sha256_tensors[:12]}" for use in made.adapters if use.sha256_tensors]
    starts = [f"{use.name}: {use.start:g}" for use in made.adapters if use.start is not None and use.start < ALWAYS]
    blocks = [
        f"{use.name}: {' '.join(f'{block}={weight:g}' for block, weight in use.blocks.items())}"
        for use in made.adapters
        if use.blocks
    ]
    return {"Lora hashes": ", ".join(hashes), "Lora starts": ", ".join(starts), "Lora blocks": ", ".join(blocks)}


def _thresholding_pairs(settings: GenerateSettings) -> dict[str, str]:
    """The keys of A1111's dynamic thresholding extension, which says modes only where one is not Constant."""
    t = settings.thresholding
    if t is None:
        return {}
    pairs = {
        "Dynamic thresholding enabled": "True",
        "Mimic scale": f"{t.mimic_scale:g}",
        "Separate Feature Channels": str(t.separate_feature_channels),
        "Scaling Startpoint": t.scaling_startpoint,
        "Variability Measure": t.variability_measure,
        "Interpolate Phi": f"{t.interpolate_phi:g}",
        "Threshold percentile": f"{100 * t.threshold_percentile:g}",
    }
    if t.mimic_mode != "Constant":
        pairs |= {"Mimic mode": t.mimic_mode, "Mimic scale minimum": f"{t.mimic_scale_min:g}"}
    if t.cfg_mode != "Constant":
        pairs |= {"CFG mode": t.cfg_mode, "CFG scale minimum": f"{t.cfg_scale_min:g}"}
    if t.scheduler_value is not None or {t.mimic_mode, t.cfg_mode} & set(USES_VALUE):
        value = SCHEDULER_VALUE if t.scheduler_value is None else t.scheduler_value
        pairs["Scheduler value"] = f"{value:g}"
    return pairs


def record_of(made: Planned, model: Model) -> dict[str, Any]:
    """Everything that decides the picture, exactly, as JSON values: the `dodgeburn` chunk."""
    return {
        "prompt": made.prompt,
        "seed": made.seed,
        "batch": list(made.batch),
        **made.settings.model_dump(),
        **({"adapters": [use.record() for use in made.adapters]} if made.adapters else {}),
        **(
            {"embeddings": [{"name": one.name, "file": one.file, "sha256": one.sha256} for one in embeddings]}
            if (embeddings := embeddings_of(made, model))
            else {}
        ),
        **({} if made.tuned is None else {"tuned": _tuned_record(made.tuned)}),
        "model": model.name,
        "model_sha256": model.sha256,
        "layout": model.layout.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "version": __version__,
    }


def _tuned_record(tuned: Tuned) -> dict[str, Any]:
    return {"model": tuned.model.name, "sha256": tuned.model.sha256, "strength": tuned.strength}


def graph_of(made: Generated, model: Model) -> dict[str, Any] | None:
    """ComfyUI's graph that makes the same kind of picture; None for models that ComfyUI cannot load, and for LoRAs that
    its core nodes cannot apply so.
    """
    settings = made.settings
    if not is_stock(model) or model.source is None or not model.source.is_file():
        return None
    if any(use.start not in (None, ALWAYS) or use.blocks or use.strengths or not use.file for use in made.adapters):
        return None  # core nodes have neither late starts nor block weights
    if made.tuned is not None:
        return None  # nor two models at once
    assert settings.width is not None and settings.height is not None
    prompt, negative = made.prompt, settings.negative
    if settings.prompt_syntax == "a1111":
        prompt, negative = (as_comfy(text, [one.name for one in model.embeddings]) for text in (prompt, negative))
    sizes: list[dict[str, tuple[int, int]]] = [{}, {}]
    if model.has_added_conditions and any(getattr(settings, name) is not None for name in SIZE_FIELDS):
        rows = reversed(time_ids(settings))  # the prompt's, the negative prompt's
        sizes = [{"original": (r[1], r[0]), "crop": (r[3], r[2]), "target": (r[5], r[4])} for r in rows]
    return write_graph(
        ComfyRequest(
            checkpoint=model.source.name, prompt=prompt, negative=negative, seed=made.seed,
            steps=settings.steps, guidance=settings.guidance, sampler=SAMPLERS[settings.sampler][1],
            scheduler=SPACINGS[settings.spacing][1], width=settings.width, height=settings.height,
            clip_stop=None if settings.clip_skip is None else -settings.clip_skip,
            sizes=sizes[0], negative_sizes=sizes[1], loras=[(use.file, use.scale) for use in made.adapters],
        )
    )  # fmt: skip


def save_picture(path: str | Path, made: Generated, model: Model) -> None:
    """Write a picture with its settings as PNG, JPEG or WebP by the ending, atomically.

    Raises UserError for an unwritable folder or full disk.
    """
    write_picture(path, made.image, infotext_of(made, model), record_of(made, model), graph_of(made, model))
