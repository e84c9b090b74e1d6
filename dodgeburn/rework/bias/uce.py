"""Unified Concept Editing against a tie: cross-attention's keys and values by least squares, in seconds, without data.

Gandikota et al. 2023 (arXiv 2308.14761, eq. 7 and section 4.2). For keys and values W and the token states c of neutral
prompts in their contexts,

    W' c = W (c + sum_i s_i c_i)        c_i: the same prompt asking for class i, at the same place

as nearly as the states p of prompts that are not to move allow (W' p = W p: the explicit prompts, and those of other
things). s_i are found by looking: a round draws a few neutral pictures, has them read, and adds gain x (q_i - share_i)
to s_i (an integrator, as in the published code). They stay a zero-sum: what one class gains the others lose. The round
with the least total variation wins.

Written anew from the formula; least squares as in slide/closed_form.py (all tokens instead of the last one, a ridge
instead of the identity). Pooled text (SDXL) is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.measure.bias import BiasFigures
from dodgeburn.models.model import Model
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.slide.closed_form import key_value_layers, places_in, solve, token_states

Look = Callable[[], tuple[BiasFigures, float]]
"""Bias of a few neutral pictures by the model as it is now, and the share of unreadable ones."""


@dataclass(frozen=True)
class UceSettings:
    """How the closed form looks for its strengths."""

    rounds: int = 8
    gain: float = 1.5
    keep: float = 0.3  # weight of what is not to move
    ridge: float = 0.01  # share of the mean squared token state
    contexts: int = 48  # neutral prompts that are moved
    unmoved: int = 48  # prompts of other things
    enough: float = 0.05  # stop when every share is this near to its target


@dataclass(frozen=True)
class UceFound:
    """What was found: the winning strengths by class, and total variation before and after each round."""

    strengths: dict[str, float]
    curve: list[float]


def uce(model: Model, concept: Concept, look: Look, settings: UceSettings | None = None) -> UceFound:
    """Edit `model.unet` in place. Raises UserError for a model without cross-attention, or phrases without a tokens."""
    s = settings or UceSettings()
    layers = key_value_layers(model.unet)
    if not layers:
        raise UserError(f"{model.name} has no cross-attention: there is nothing that a prompt could move")
    original = {name: model.unet.get_submodule(name).weight.detach().clone() for name in layers}
    texts = concept.neutral(s.contexts, 0)
    states, towards = class_states(model, concept, list(dict.fromkeys(texts)))
    explicit = [concept.explicit(p, c, k) for p in concept.prompts for c in concept.classes
                for k in range(len(concept.phrases[c]))]  # fmt: skip
    kept = token_states(model, ["", *explicit, *concept.others[: s.unmoved]])
    strengths = np.zeros(len(concept.classes))
    best, best_tv, curve = strengths, float("inf"), []
    for _ in range(s.rounds + 1):
        apply(model, original, states, towards, kept, strengths, s)
        figures, _unread = look()
        curve.append(figures.tv_cons)
        if figures.tv_cons < best_tv:
            best, best_tv = strengths, figures.tv_cons
        miss = np.asarray(concept.target) - np.nan_to_num(np.asarray(figures.shares))
        if np.abs(miss).max() <= s.enough:
            break
        strengths = strengths + s.gain * (miss - miss.mean())
    apply(model, original, states, towards, kept, best, s)
    return UceFound(dict(zip(concept.classes, best.tolist(), strict=True)), curve)


def class_states(model: Model, concept: Concept, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token states of neutral prompts [n, d], and of the same asking for each class at the same places [k, n, d]; a
    token that the explicit prompt lacks is its own."""
    states = []
    towards: list[list[Tensor]] = [[] for _ in concept.classes]
    for i, prompt in enumerate(prompts):
        explicit = [concept.explicit(prompt, value, i) for value in concept.classes]
        own, others = places_in(model, prompt, explicit)
        states.append(own)
        for k, other in enumerate(others):
            towards[k].append(other)
    return torch.cat(states), torch.stack([torch.cat(rows) for rows in towards])


@torch.no_grad()
def apply(
    model: Model, original: dict[str, Tensor], states: Tensor, towards: Tensor, kept: Tensor, strengths: np.ndarray,
    settings: UceSettings,
) -> None:  # fmt: skip
    """Set keys and values to the original ones plus the closed form's change for these strengths [k]."""
    weights = torch.as_tensor(strengths, dtype=towards.dtype)
    shifts = torch.einsum("k,knd->nd", weights, towards - states)
    if not bool(shifts.abs().max() > 0):
        for name, weight in original.items():
            model.unet.get_submodule(name).weight.copy_(weight)
        return
    matrix = solve(states, shifts, kept, settings.keep, settings.ridge).matrix
    for name, weight in original.items():
        changed = weight.double() + weight.double() @ matrix.to(weight.device)
        model.unet.get_submodule(name).weight.copy_(changed.to(weight.dtype))
