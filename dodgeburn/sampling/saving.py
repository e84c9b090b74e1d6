"""Generated pictures to PNG files that say how they were made."""

from pathlib import Path
from typing import Any

from dodgeburn import __version__
from dodgeburn.images.png import Infotext, comfy_graph, write_png
from dodgeburn.models.loading import is_stock
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import Generated
from dodgeburn.sampling.settings import SAMPLERS, SPACINGS


def infotext_of(made: Generated, model: Model) -> Infotext:
    """A1111's settings line for a picture, in A1111's names and order."""
    settings = made.settings
    # A folder has no hash that other tools would know.
    is_file = model.source is not None and model.source.is_file()
    return Infotext(
        prompt=made.prompt,
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
            "Version": f"dodgeburn {__version__}",
        },
    )


def record_of(made: Generated, model: Model) -> dict[str, Any]:
    """Everything that decides the picture, exactly, as JSON values: the `dodgeburn` chunk."""
    return {
        "prompt": made.prompt,
        "seed": made.seed,
        **made.settings.model_dump(),
        "model": model.name,
        "model_sha256": model.sha256,
        "layout": model.layout.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "version": __version__,
    }


def graph_of(made: Generated, model: Model) -> dict[str, Any] | None:
    """ComfyUI's graph that makes the same kind of picture; None for models that ComfyUI cannot load."""
    settings = made.settings
    if not is_stock(model) or model.source is None or not model.source.is_file():
        return None
    assert settings.width is not None and settings.height is not None
    return comfy_graph(
        model.source.name,
        made.prompt,
        settings.negative,
        made.seed,
        settings.steps,
        settings.guidance,
        SAMPLERS[settings.sampler][1],
        SPACINGS[settings.spacing][1],
        settings.width,
        settings.height,
    )


def save_picture(path: str | Path, made: Generated, model: Model) -> None:
    """Write a picture with its settings as PNG, atomically. Raises UserError for an unwritable folder or
    full disk.
    """
    write_png(path, made.image, infotext_of(made, model), record_of(made, model), graph_of(made, model))
