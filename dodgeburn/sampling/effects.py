"""Settings that have no effect on a generation, or another one than they seem to have, said before the work."""

from collections.abc import Iterator, Sequence

from dodgeburn.models.model import Model
from dodgeburn.sampling.embeddings import named_in
from dodgeburn.sampling.emphasis import unread
from dodgeburn.sampling.schedules import Schedule
from dodgeburn.sampling.settings import STOCHASTIC, GenerateSettings
from dodgeburn.sampling.sizes import SIZE_FIELDS
from dodgeburn.sampling.thresholding import explain


def without_effect(model: Model, settings: GenerateSettings, plan: Schedule) -> list[str]:
    """One line for each setting that does nothing with this model and these others, with the reason."""
    return [*_of_guidance(settings, plan), *_of_model(model, settings, plan)]


def _of_guidance(settings: GenerateSettings, plan: Schedule) -> Iterator[str]:
    if settings.thresholding is not None:
        yield from explain(settings.thresholding, settings.guidance, settings.steps, plan.timesteps)
    elif settings.guidance == 1.0:
        if settings.negative:
            yield "the negative prompt has no effect at guidance 1"
        if settings.cfg_rescale:
            yield "CFG rescale has no effect at guidance 1"
        if (settings.cfg_start, settings.cfg_end) != (0.0, 1.0):
            yield "CFG start and end have no effect at guidance 1"
        return
    if not any(settings.cfg_start <= i / settings.steps < settings.cfg_end for i in range(settings.steps)):
        yield (
            f"guidance has no effect: none of the {settings.steps} steps lies between CFG start {settings.cfg_start:g} "
            f"and end {settings.cfg_end:g}"
        )


def _of_model(model: Model, settings: GenerateSettings, plan: Schedule) -> Iterator[str]:
    if settings.noise == "fresh" and settings.sampler not in STOCHASTIC:
        yield f"noise fresh has no effect: {settings.sampler} adds no noise"
    sizes = [name for name in SIZE_FIELDS if getattr(settings, name) is not None]
    if sizes and not model.has_added_conditions:
        yield f"{', '.join(sizes).replace('_', ' ')}: no effect, this model takes no sizes (SDXL does)"
    elif settings.guidance == 1.0 and settings.thresholding is None:
        negatives = [name for name in sizes if name.startswith("negative_")]
        if negatives:
            yield f"{', '.join(negatives).replace('_', ' ')}: no effect at guidance 1"
    if settings.zero_snr and model.scheduler_config.get("rescale_betas_zero_snr"):
        yield "zero terminal SNR has no effect: this model's noise schedule has it already"
    if settings.zero_snr and plan.sigmas[0] < plan.table[-1] * 0.999:
        yield (
            f"zero terminal SNR with {settings.spacing} spacing: it does not visit the last time step, so nothing "
            "starts from pure noise; take trailing"
        )
    if settings.zero_snr and plan.prediction_type == "epsilon":
        yield (
            "zero terminal SNR with a model that predicts eps: in pure noise its answer says nothing of the picture, "
            "so colours may break; it is meant for v-prediction models"
        )


def read_as_words(texts: Sequence[str], syntax: str, embeddings: Sequence[str]) -> list[str]:
    """A line, if there is need for one, about markup in prompts that means something in other programs and is read as
    words here. embeddings: names that do mean something."""
    words = [p for t in dict.fromkeys(texts) for p in named_in(t, syntax, embeddings) if isinstance(p, str)]
    found = list(dict.fromkeys(part for text in words for part in unread(text, syntax)))
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"read as words: {', '.join(found[:3])}{more}. LoRAs are given by --lora FILE:SCALE or lie in --lora-dir, "
            "embeddings likewise; prompt editing and AND have no effect here"]  # fmt: skip
