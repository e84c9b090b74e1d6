"""Block shares: preset, base and single numbers put together."""

from __future__ import annotations

import pytest
from tiny_checkpoints import single_file

from dodgeburn.checkpoint.layout import Layout, detect_layout
from dodgeburn.errors import UserError
from dodgeburn.merge.addends import block_weights
from dodgeburn.merge.blocks import alphas, parse_blocks
from dodgeburn.merge.presets import preset_alphas, preset_names


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return detect_layout(single_file(request.param))


def test_without_preset_every_block_is_base(layout: Layout) -> None:
    assert alphas(layout, None, 0.3) == dict.fromkeys(layout.all_blocks, 0.3)


@pytest.mark.parametrize("name", preset_names())
def test_preset_never_touches_base(layout: Layout, name: str) -> None:
    found = alphas(layout, name, 0.4)
    assert list(found) == list(layout.all_blocks)
    assert found["BASE"] == found["VAE"] == 0.4
    assert [found[b] for b in layout.blocks] == preset_alphas(name, layout.n_in, layout.n_out)


def test_single_blocks_replace(layout: Layout) -> None:
    found = alphas(layout, "Flat_25", 0.5, {"in04": 0.9, "M00": 0, "VAE": 1, "base": 0.1})
    assert (found["IN04"], found["M00"], found["VAE"], found["BASE"], found["IN05"]) == (0.9, 0, 1, 0.1, 0.25)


@pytest.mark.parametrize("order", [1, -1])
def test_patterns_replace_and_names_win_in_any_order(order: int) -> None:
    said = {"*": 0.9, "out*": 0.1, "OUT03": 0.7, "IN0?": 0.2}
    found = alphas(detect_layout(single_file("sdxl")), "Cosine", 0.4, dict(list(said.items())[::order]))
    assert (found["OUT03"], found["OUT04"], found["IN08"], found["M00"], found["VAE"]) == (0.7, 0.1, 0.2, 0.9, 0.9)


def test_cut_convention_is_passed_on() -> None:
    layout = detect_layout(single_file("sdxl"))
    assert alphas(layout, "GradV", xl_presets="cut")["IN08"] == pytest.approx(1 / 3)
    assert alphas(layout, "GradV")["IN08"] == pytest.approx(1 / 9)


@pytest.mark.parametrize("base", [-0.1, 1.01, float("nan"), float("inf"), "half"])
def test_base_outside_range(layout: Layout, base: float) -> None:
    with pytest.raises(UserError, match="base is .*0 .all A. to 1"):
        alphas(layout, "GradV", base)


def test_unknown_blocks_list_near_ones() -> None:
    layout = detect_layout(single_file("sdxl"))
    with pytest.raises(UserError, match="SDXL has no block 'IN11'.*IN01"):
        alphas(layout, blocks={"IN11": 0.5})
    with pytest.raises(UserError, match="block IN01"):
        alphas(layout, blocks={"IN01": 2.0})


def test_parse_blocks() -> None:
    assert parse_blocks(["IN04=0.3", " out00=0 , OUT01=1"]) == {"IN04": 0.3, "OUT00": 0.0, "OUT01": 1.0}
    for wrong in ("IN04", "IN04=x", "IN04=1.5", "IN04="):
        with pytest.raises(UserError, match="IN04"):
            parse_blocks([wrong])


SD15, SDXL = (detect_layout(single_file(kind)) for kind in ("sd15", "sdxl"))


@pytest.mark.parametrize(("layout", "count"), [(SD15, 25), (SD15, 26), (SDXL, 19), (SDXL, 20)])
def test_lists_as_mbw_has_them(layout: Layout, count: int) -> None:
    numbers = [round(i / 100, 2) for i in range(count)]
    found = alphas(layout, base=0.9, blocks=parse_blocks([",".join(map(str, numbers))]))
    blocks = numbers[1:] if count % 2 == 0 else numbers
    assert [found[block] for block in layout.blocks] == blocks
    assert found["BASE"] == (numbers[0] if count % 2 == 0 else 0.9) and found["VAE"] == 0.9


def test_lists_of_another_length() -> None:
    with pytest.raises(UserError, match=r"3 block weights without names.*19 \(IN00 … OUT08\), 20 \(BASE … OUT08\)"):
        parse_blocks(["0.1,0.2, 0.3"])
    with pytest.raises(UserError, match="no block 'IN09'"):
        alphas(SDXL, blocks=parse_blocks([",".join(["0.5"] * 25)]))


def test_lists_of_lora_block_weights() -> None:
    found = block_weights(SD15, ["1,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0"])
    assert {b for b, weight in found.items() if weight == 0} == {
        "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02d}" for i in range(6, 12))
    }  # fmt: skip
    found = block_weights(SDXL, ["0.5,0,0,0,0,0,1,1,1,1,1,-0.3", "VAE=0"])
    assert (found["BASE"], found["IN04"], found["M00"], found["OUT05"], found["VAE"]) == (0.5, 0, 0, -0.3, 0)
    assert found["IN00"] == found["OUT08"] == 1
    with pytest.raises(UserError, match=r"12 \(BASE … OUT05\), 17 \(BASE … OUT11\)"):
        block_weights(SD15, ["1,0,0"])
