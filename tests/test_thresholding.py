"""Dynamic thresholding: golden values worked by hand, pictures independent of each other, no-ops said."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.thresholding import MODES, Thresholding, explain, scale_at, threshold
from tests.tiny import tiny_model

pytestmark = pytest.mark.sampling

# Scale 7 with minimum 1 and scheduler value 2, at a quarter and at 0.6 of the way.
GOLDEN = {
    "Constant": (7.0, 7.0),
    "Linear Down": (5.5, 3.4),
    "Cosine Down": (6.543277, 4.526712),
    "Half Cosine Down": (6.813475, 5.952014),
    "Linear Up": (2.5, 4.6),
    "Cosine Up": (1.456723, 3.473288),
    "Half Cosine Up": (1.186525, 2.047986),
    "Power Up": (1.375, 3.16),
    "Power Down": (6.625, 4.84),
    "Linear Repeating": (1.0, 4.6),
    "Cosine Repeating": (1.0, 4.927051),
    "Sawtooth": (4.0, 2.2),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    assert [scale_at(7, mode, 1, f, 2) for f in (0.25, 0.6)] == pytest.approx(GOLDEN[mode], abs=2e-6)
    at_start = 7.0 if mode.endswith("Down") or mode in ("Constant", "Linear Repeating", "Cosine Repeating") else 1.0
    assert scale_at(7, mode, 1, 0.0, 2) == pytest.approx(at_start)


def test_every_mode_has_its_golden_values() -> None:
    assert set(GOLDEN) == set(MODES) and len(MODES) == 12


def tensor(*channels: list[float]) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64).unsqueeze(0).unsqueeze(2)  # [1, c, 1, w]


NEGATIVE, POSITIVE = tensor([4, 4, 4, 4]), tensor([5, 3, 6, 2])  # guided by 10: 4 + (10, -10, 20, -20)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, [9, -1, 14, -6]),  # extremes 20 and 10 (at 5): shrunk by half around the mean 4
        ({"threshold_percentile": 0.5}, [4 + 20 / 3, 4 - 20 / 3, 14, -6]),  # clamped at 15, then shrunk by 10 / 15
        ({"variability_measure": "STD"}, [9, -1, 14, -6]),
        ({"scaling_startpoint": "ZERO"}, [7, -3, 12, -8]),
        ({"scaling_startpoint": "ZERO", "variability_measure": "STD"}, [7, -3, 12, -8]),
        ({"scaling_startpoint": "ZERO", "threshold_percentile": 0.5}, [28 / 3, -4, 16, -32 / 3]),
        ({"interpolate_phi": 0.25}, [12.75, -4.75, 21.5, -13.5]),
        ({"interpolate_phi": 0.0}, [14, -6, 24, -16]),
    ],
)
def test_golden_values(more: dict[str, Any], wanted: list[float]) -> None:
    got, changed = threshold(NEGATIVE, POSITIVE, 10, 5, Thresholding(mimic_scale=5, **more))
    assert got.flatten().tolist() == pytest.approx(wanted)
    assert int(changed) == (0 if more.get("interpolate_phi") == 0 else 1)


def test_channels_apart_and_together() -> None:
    positive, negative = tensor([1, -1, 1, -1], [3, -3, 3, -3]), tensor([0] * 4, [0] * 4)
    apart = Thresholding(threshold_percentile=0.25)
    got, _ = threshold(negative, positive, 10, 5, apart)
    assert got.abs().amax(3).flatten().tolist() == pytest.approx([5, 15])
    # Together: the quarter quantile of (10, 30) is 10, the mimic's extreme 15; clamped at 15, nothing to shrink.
    together = apart.model_copy(update={"separate_feature_channels": False})
    got, _ = threshold(negative, positive, 10, 5, together)
    assert got.abs().amax(3).flatten().tolist() == pytest.approx([10, 15])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(1, 40), st.floats(1, 40), st.sampled_from(["MEAN", "ZERO"]),
    st.sampled_from(["AD", "STD"]), st.booleans(), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_pictures_are_thresholded_each_on_its_own(
    seed: int, cfg: float, mimic: float, start: str, measure: str, apart: bool, percentile: float, phi: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    negative, positive = torch.randn(2, 3, 4, 6, 6, generator=generator)
    negative[1] *= 20  # a loud batch mate
    positive[2] = negative[2] = 0.5  # and one without any variation
    chosen = Thresholding(
        scaling_startpoint=start, variability_measure=measure, separate_feature_channels=apart,
        threshold_percentile=percentile, interpolate_phi=phi,
    )  # fmt: skip
    together, _ = threshold(negative, positive, cfg, mimic, chosen)
    assert torch.isfinite(together).all()
    for i in range(3):
        alone, _ = threshold(negative[i : i + 1], positive[i : i + 1], cfg, mimic, chosen)
        assert torch.allclose(together[i], alone[0], atol=1e-5, rtol=1e-5)


def test_a_high_scale_gets_the_spread_of_the_mimic_scale() -> None:
    negative, positive = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    difference = positive - negative
    plain, low = negative + 20 * difference, negative + 7 * difference
    got, changed = threshold(negative, positive, 20, 7, Thresholding(mimic_scale=7))
    assert int(changed) == 4
    assert float(got.std() / low.std()) == pytest.approx(1, abs=0.05) and float(got.std() / plain.std()) < 0.4


# ------------------------------------------------------------------------------------------------ no effect

CARD: dict[str, Any] = {
    "mimic_scale": 30, "threshold_percentile": 0.9, "mimic_mode": "Half Cosine Up", "cfg_mode": "half_cosine_up",
    "mimic_scale_min": 4, "cfg_scale_min": 4, "scheduler_value": 4,
}  # fmt: skip


def test_the_cards_recipe_is_plain_guidance_and_says_so() -> None:
    card = Thresholding(**CARD)
    assert card.scales(1.5, 0.0) == pytest.approx((4, 4))
    assert card.scales(1.5, 1.0) == pytest.approx((15.9521, 2.8508), abs=1e-4)
    said = "\n".join(explain(card, 1.5, 45, tuple(range(999, 0, -22))[:45]))
    assert "hardly acts here" in said and "4 to 15.95" in said and "plain CFG, 4 to 2.851" in said
    assert "1.5 lies below its minimum 4" in said and "scheduler value 4 has no effect" in said
    for step in range(45):
        negative, positive = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        mimic, cfg = card.scales(1.5, card.progress(step, 45, 0.0))
        got, changed = threshold(negative, positive, cfg, mimic, card)
        assert int(changed) == 0
        assert torch.allclose(got, negative + cfg * (positive - negative), atol=1e-5)
    with_std = card.model_copy(update={"variability_measure": "STD"})
    assert not any("hardly acts" in line for line in explain(with_std, 1.5, 45, (999.0,) * 45))
    assert any("percentile" in line for line in explain(with_std, 1.5, 45, (999.0,) * 45))


@pytest.mark.parametrize(
    ("more", "guidance", "said"),
    [
        ({"interpolate_phi": 0}, 20, "interpolate phi 0"),
        ({"mimic_scale_min": 3}, 20, "the mimic scale's minimum 3 has no effect with mode Constant"),
        ({"cfg_scale_min": 3}, 20, "the CFG scale's minimum 3 has no effect"),
        ({"mimic_scale": 20, "variability_measure": "STD"}, 20, "are the same, 20 throughout"),
        ({"mimic_scale": 20, "scaling_startpoint": "ZERO"}, 20, "are the same, 20 throughout"),
        ({"mimic_scale": 20, "scaling_startpoint": "ZERO", "threshold_percentile": 0.9}, 20, None),
        ({}, 7, "MEAN with AD"),
        ({"mimic_scale": 7, "cfg_mode": "Sawtooth"}, 20, None),
        ({"mimic_scale": 7}, 20, None),
    ],
)
def test_what_is_said(more: dict[str, Any], guidance: float, said: str | None) -> None:
    lines = explain(Thresholding(**more), guidance, 4, (999.0, 700.0, 400.0, 100.0))
    assert lines == [] if said is None else len(lines) == 1 and said in lines[0]


def test_progress_by_step_and_by_time() -> None:
    by_step, by_time = Thresholding(), Thresholding(fraction="time")
    assert [by_step.progress(i, 5, 0.0) for i in (0, 2, 4)] == [0, 0.5, 1] and by_step.progress(0, 1, 0.0) == 0
    assert by_time.progress(0, 5, 999) == 0 and by_time.progress(0, 5, 500) == pytest.approx(0.5)
    assert by_time.progress(0, 5, 0) == 1


# ------------------------------------------------------------------------------------------------- in the loop


def pixels(asked: GenerateSettings, n: int = 2) -> np.ndarray:
    made = generate(tiny_model("sdxl"), ["a hat", "b"][:n], [1, 2][:n], asked)
    return np.stack([np.asarray(m.image).astype(int) for m in made])


@pytest.mark.filterwarnings("ignore:dynamic thresholding changed 14 of 32")  # said beside what is looked for
def test_generation_with_thresholding() -> None:
    asked = GenerateSettings(steps=4, guidance=20, thresholding=Thresholding(mimic_scale=5))
    got, plain = pixels(asked), pixels(GenerateSettings(steps=4, guidance=20))
    assert np.abs(got - plain).max() > 5
    with pytest.warns(DodgeburnWarning, match="hardly acts"):
        same = pixels(asked.model_copy(update={"thresholding": Thresholding(mimic_scale=40)}))
    assert np.abs(same - plain).max() <= 4  # guidance 20 makes much of rounding
    # CFG exceeds the mimic scale in the first steps only, in which guidance pauses.
    late = asked.model_copy(update={"thresholding": Thresholding(mimic_scale=20, mimic_mode="Linear Up")})
    with pytest.warns(DodgeburnWarning, match="changed 0 of 8 channels: these pictures are those of plain CFG"):
        pixels(late.model_copy(update={"cfg_start": 0.75}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DodgeburnWarning)
        pixels(late)
    assert np.abs(pixels(asked, 1)[0] - got[0]).max() <= 1  # whatever the batch


def test_guidance_one_with_a_minimum_asks_both_prompts() -> None:
    card = Thresholding(**{**CARD, "variability_measure": "STD", "threshold_percentile": 1.0})
    with pytest.warns(DodgeburnWarning):
        one = pixels(GenerateSettings(steps=3, guidance=1.0, negative="blue", thresholding=card))
        other = pixels(GenerateSettings(steps=3, guidance=1.0, negative="a sky of green", thresholding=card))
    assert np.abs(one - other).max() > 1


def test_bad_settings() -> None:
    for bad in (
        {"mimic_scale": -1}, {"mimic_scale": float("nan")}, {"threshold_percentile": 90}, {"interpolate_phi": 2},
        {"scheduler_value": -1}, {"mimic_mode": "Quarter Cosine"}, {"scaling_startpoint": "MEDIAN"},
        {"variability_measure": "MAD"}, {"fraction": "sigma"},
    ):  # fmt: skip
        with pytest.raises(UserError):
            Thresholding(**bad)
    with pytest.raises(UserError, match="did you mean Half Cosine Up"):
        Thresholding(cfg_mode="Half Cosin Up")
    asked = GenerateSettings(thresholding={"mimic_scale": 5, "mimic_mode": "sawtooth"})  # type: ignore[arg-type]
    assert asked.thresholding is not None and asked.thresholding.mimic_mode == "Sawtooth"
    assert GenerateSettings(**asked.model_dump(mode="json")) == asked
