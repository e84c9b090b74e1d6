"""Where the training of a text slider begins: at nothing, at the closed form, or in the gradient's directions."""

from __future__ import annotations

from torch import Tensor

from dodgeburn.models.adapters import Adapter, new_adapter, trained_layers
from dodgeburn.models.model import Model
from dodgeburn.sampling.predict import Predictor
from dodgeburn.slide.cache import Points, directions
from dodgeburn.slide.closed_form import closed_form
from dodgeburn.slide.gradient_start import gradient_start
from dodgeburn.slide.spec import SliderSpec

GRADIENTS = 6  # batches whose mean gradient is taken


def begin(model: Model, predictor: Predictor, points: Points, spec: SliderSpec) -> Adapter | None:
    """The adapter that training begins with, by `spec.begin`; None is a fresh one that changes nothing.

    closed-form: cross-attention's keys and values as `closed_form` has them, beside the spec's own layers, fresh.
    gradient: the spec's layers with the leading directions of the mean gradient, changing nothing yet (LoRA-GA); those
    of text encoders, whose frozen words the loss is taken with, fresh.
    """
    if spec.begin == "zero":
        return None
    components = model.components()
    layers = trained_layers(components, spec.layers, spec.text_encoders)
    if spec.begin == "closed-form":
        fresh = new_adapter(components, layers, spec.rank, spec.alpha, spec.seed, spec.name)
        return Adapter({**fresh.factors(), **closed_form(model, spec).factors()}, spec.name)
    shift = directions(predictor, points, spec) * spec.eta

    def loss(i: int) -> Tensor:
        rows = [(i * spec.batch + k) % len(points.x) for k in range(spec.batch)]
        said = predictor(points.x[rows], points.timesteps[rows], [points.texts[k] for k in rows])
        return (said - (points.neutral[rows] + shift[rows]).to(said.device)).square().mean()

    of_unet = [layer for layer in layers if layer.startswith("unet.")]
    first = gradient_start(components, of_unet, loss, GRADIENTS, spec.rank, spec.alpha, name=spec.name)
    if of_unet == layers:
        return first
    fresh = new_adapter(components, layers[len(of_unet) :], spec.rank, spec.alpha, spec.seed, spec.name)
    return Adapter({**first.factors(), **fresh.factors()}, spec.name)
