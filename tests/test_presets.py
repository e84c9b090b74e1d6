"""Every digit of the 16 presets against the published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dodgeburn.errors import UserError
from dodgeburn.merge.presets import PRESETS, find_preset, preset_alphas, preset_names

TABLE = json.loads((Path(__file__).parent / "data" / "block_presets.json").read_text())


def test_there_are_the_cards_sixteen() -> None:
    assert sorted(preset_names()) == sorted(TABLE["sd15"])
    assert len(PRESETS) == 16


@pytest.mark.parametrize("name", preset_names())
def test_sd15_digits(name: str) -> None:
    published = TABLE["sd15"][name]
    assert published[0] == 0 and len(published) == 26  # BASE, which is not the preset's business
    # GradV and GradA were published rounded to 10 digits, the others in full.
    tolerance = 5.1e-11 if name.startswith("Grad") else 3e-15
    assert preset_alphas(name) == pytest.approx(published[1:], rel=0, abs=tolerance)


@pytest.mark.parametrize("name", preset_names())
def test_sdxl_cut_is_supermergers(name: str) -> None:
    tolerance = 5.1e-11 if name.startswith("Grad") else 3e-15
    found = preset_alphas(name, 9, 9, "cut")
    assert found == pytest.approx(TABLE["sdxl_cut"][name][1:], rel=0, abs=tolerance)


@pytest.mark.parametrize("name", list(TABLE["sdnext"]))
def test_sdxl_curve_is_sd_nexts(name: str) -> None:
    assert preset_alphas(name, 9, 9, "curve") == pytest.approx(TABLE["sdnext"][name][1:], rel=0, abs=5.1e-7)


def test_sdxl_curve_of_the_presets_that_nobody_else_has() -> None:
    def ones(blocks: str, value: float = 1.0) -> list[float]:
        order = [f"IN{i:02d}" for i in range(9)] + ["M00"] + [f"OUT{i:02d}" for i in range(9)]
        return [value if name in blocks.split() else 0.0 for name in order]

    middle = "IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert preset_alphas("Mid2_50", 9, 9) == ones(middle, 0.5)
    assert preset_alphas("Ring08_5", 9, 9) == ones("IN03 IN04 IN05 IN06 OUT02 OUT03 OUT04 OUT05")
    soft = ones("IN03 IN04 IN05 OUT03 OUT04 OUT05")
    edge = ones("IN02 IN06 OUT02 OUT06", 0.5)
    assert preset_alphas("Ring08Soft", 9, 9) == [a + b for a, b in zip(soft, edge, strict=True)]
    true = preset_alphas("TrueCubicHermite", 9, 9)
    fake = preset_alphas("FakeCubicHermite", 9, 9)
    assert true[0] == 0 and true[-1] == 1 and true[9] == pytest.approx(fake[9] + 0.5 / 18)


@pytest.mark.parametrize("convention", ["curve", "cut"])
@pytest.mark.parametrize("name", preset_names())
def test_shares_stay_in_range_and_mirror(name: str, convention: str) -> None:
    for shape in ((9, 9), (12, 12)):
        values = preset_alphas(name, *shape, convention)  # type: ignore[arg-type]
        assert len(values) == sum(shape) + 1
        assert all(0 <= v <= 1 for v in values)
        if "Reverse" in name:
            straight = preset_alphas(name.replace("Reverse", ""), *shape, convention)  # type: ignore[arg-type]
            assert values == pytest.approx([1 - v for v in straight], abs=1e-15)


def test_both_spellings_in_any_case() -> None:
    assert find_preset("GRAD_V").name == find_preset("gradv").name == "GradV"
    assert find_preset("WRAP12").name == find_preset("wrap2").name == "Wrap2"
    assert find_preset("MID12_50").name == "Mid2_50"
    assert (
        find_preset("reverse-smoothstep").name
        == find_preset("REVERSE_SMOOTHSTEP").name
        == "ReverseSmoothstep"
    )
    for name, preset in PRESETS.items():
        assert find_preset(name) is find_preset(preset.published) is preset


def test_wrong_names_list_near_ones() -> None:
    with pytest.raises(UserError, match="'Smoothsteps'.*Smoothstep"):
        find_preset("Smoothsteps")
    with pytest.raises(UserError, match="no preset"):
        preset_alphas("")
    with pytest.raises(UserError, match="curve or cut"):
        preset_alphas("GradV", 9, 9, "stretch")  # type: ignore[arg-type]
