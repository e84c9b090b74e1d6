"""Stage 1 of a deconstruction: the band, rollback, and whether it is predictable."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from deconstruct_tiny import (
    made_meters,
    reading,
    short_spec,
    some,
)
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.rework.deconstruct.meters import Meters, Reading
from dodgeburn.rework.deconstruct.overtrain import in_band, overtrain, predictability, too_far
from dodgeburn.rework.deconstruct.stage_log import unet_state
from dodgeburn.training.examples import encode_examples


def test_the_band_and_what_is_too_far() -> None:
    s = short_spec(overtrain={"loss_low": 1.5, "loss_high": 4.0, "unread_high": 0.8}).overtrain
    assert in_band(reading(loss=1.5), s) and in_band(reading(variety=0.5), s) and not in_band(reading(loss=1.49), s)
    assert too_far(reading(loss=4.01), s) and too_far(reading(loss=math.inf), s) and too_far(reading(unread=0.81), s)
    assert not too_far(reading(loss=4.0, unread=0.8), s)
    assert predictability([8, 8, 12], 0.25) == {"stops": [8, 8, 12], "cv": 0.2474, "predictable": True}
    assert not predictability([4, 8, 12], 0.25)["predictable"] and not predictability([4, None, 4], 0.25)["predictable"]


class Scripted:
    """Meters that read what they are told, one after another."""

    def __init__(self, meters: Meters, losses: list[float]) -> None:
        self.meters, self.losses = meters, list(losses)

    def __getattr__(self, name: str) -> object:
        return getattr(self.meters, name)

    def quick(self) -> Reading:
        return reading(loss=self.losses.pop(0))


@pytest.mark.parametrize(
    "losses,step,attempts,steps",
    [
        ([1.2, 1.6, 1.7], 6, 1, 6),  # twice running: stop
        ([1.6, 1.2, 1.6, 1.6], 8, 1, 8),  # once is not enough
        ([1.2, 1.6, 9.0], 4, 1, 6),  # too far: back to the check in the band
        ([9.0, 1.2, 1.6, 1.7], 6, 2, 8),  # too far at once: half the learning rate
        ([1.2, 1.2, 1.6, 1.2], 6, 1, 8),  # steps used up: the last one in the band
    ],
)
def test_overtraining_stops_rolls_back_and_halves(
    tmp_path: Path, losses: list[float], step: int, attempts: int, steps: int
) -> None:
    spec = short_spec(overtrain={"steps": 8, "loss_low": 1.5, "loss_high": 4.0})
    model = tiny_model()
    meters = Scripted(made_meters(model), losses)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    base = unet_state(model)
    found = overtrain(model, base, stress, meters, spec, tmp_path / "a")  # type: ignore[arg-type]
    assert (found.detail["step"], found.detail["attempts"], found.steps, found.reached) == (step, attempts, steps, True)
    assert found.detail["lr"] == pytest.approx(1e-3 / 2 ** (attempts - 1))
    # the same weights as a training of just so many steps
    lr = spec.overtrain.model_copy(update={"steps": step, "base_lr": found.detail["lr"] / 10})
    plain = tiny_model()
    overtrain(plain, base, stress, Scripted(meters.meters, [1.2] * 4), spec.model_copy(update={"overtrain": lr}),  # type: ignore[arg-type]
              tmp_path / "b")  # fmt: skip
    assert all(torch.equal(v, unet_state(plain)[k]) for k, v in unet_state(model).items())


def test_predictability_is_measured_over_seeds_and_the_first_one_stays(tmp_path: Path) -> None:
    model = tiny_model()
    meters, base = made_meters(model), unet_state(model)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    losses = [1.6, 1.6, 1.2, 1.6, 1.6, 1.6, 1.6]  # stops at steps 4, 6 and 4
    states = []
    for seeds in (3, 1):
        spec = short_spec(overtrain={"steps": 8, "loss_low": 1.5, "loss_high": 4.0, "predict": seeds})
        found = overtrain(model, base, stress, Scripted(meters, losses), spec, tmp_path / str(seeds))  # type: ignore[arg-type]
        states.append(unet_state(model))
        if seeds == 3:
            assert found.detail["stops"] == [4, 6, 4] and found.detail["predictable"] and found.detail["cv"] == 0.2474
            assert found.steps == 14 and found.detail["step"] == 4
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_overtraining_that_always_goes_too_far_is_an_error(tmp_path: Path) -> None:
    spec = short_spec(overtrain={"loss_high": 4.0, "loss_low": 1.5, "retries": 2})
    model = tiny_model()
    base = unet_state(model)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    with pytest.raises(UserError, match="3 times"):
        overtrain(model, base, stress, Scripted(made_meters(model), [9.0] * 3), spec, tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(v, base[k]) for k, v in unet_state(model).items())
