"""The truth about artifacts: clean pictures have none, what is put in is found, named and pointed at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dodgeburn.foresee.labels import TYPES
from dodgeburn.foresee.left_over import features
from dodgeburn.foresee.nearest import LIMITS, named, nearest
from dodgeburn.foresee.truth import MASS_CUTS, Finding, find_artifacts, graded, severity_of
from dodgeburn.pocket.attributes import CONTINUOUS, Attributes
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.pocket.reader import Reader
from dodgeburn.pocket.world import render

READER = Reader.load("reader")


def portrait(**given: object) -> Attributes:
    a = attributes_of(3, 99)
    plain = {"hand": "none", "fingers": 0, "glasses": "none", "hat": "none", "beard": 0.0, "sharpness": 0.9,
             "brightness": 0.5, "eye_size": 0.7, "style": "flat", "background": "green", "hair_colour": "brown",
             "outfit": "casual", "skin_tone": 0.2, "saturation": 0.6, "age": 0.4}  # fmt: skip
    return {**a, **plain, **given}


def of(picture: np.ndarray, prompt: str = "") -> Finding:
    return find_artifacts(picture[None], [prompt], READER)[0]


def test_clean_pictures_have_no_artifacts() -> None:
    portraits = [attributes_of(i, 98) for i in range(12)]
    portraits = [{**a, "fingers": 5 if a["hand"] == "waving" else 0} for a in portraits]
    found = find_artifacts(np.stack([render(a) for a in portraits]), [""] * 12, READER)
    assert max(f.severity for f in found) < 0.6
    assert sum(int(f.mask.sum()) for f in found) < 40
    big = find_artifacts(render(portraits[0], 128)[None], [""], READER)[0]
    assert big.severity < 2  # another size is averaged down, which is not quite how 64 is drawn


def test_the_fit_finds_the_attributes_again() -> None:
    a = portrait(smile=0.8, zoom=0.3, sharpness=0.7)
    picture = render(a)
    fit = nearest(picture, named(READER.read(picture[None]), 0))
    for name in CONTINUOUS:
        assert fit.attributes[name] == pytest.approx(a[name], abs=0.06), name
    assert np.abs(fit.pixels - picture).mean() < 1.5
    assert LIMITS["sharpness"][0] < 0


@pytest.mark.parametrize("fingers", [3, 4, 5, 6, 7])
def test_fingers_are_counted(fingers: int) -> None:
    found = of(render(portrait(hand="waving", fingers=fingers)))
    assert (found.types["fingers"] >= 3) == (fingers != 5)
    if fingers != 5:
        assert found.mask[30:60, 40:].mean() > 0.5 and not found.mask[:20, :30].any()
        assert f"fingers: {fingers}" in found.notes


def test_a_mouth_painted_over_is_a_missing_part() -> None:
    a = portrait()
    picture, area = render(a), features(a)[4]
    picture[area] = picture[34, 32]
    found = of(picture)
    assert found.severity >= 3 and "part" in found.label("reader").named
    assert (found.mask & area).sum() > 0.8 * area.sum()


def test_an_eye_too_many_is_a_part_too() -> None:
    picture = render(portrait())
    picture[2:14, 2:16] = picture[23:35, 18:32]
    found = of(picture)
    assert found.severity >= 3 and found.mask[2:14, 2:16].mean() > 0.2 and not found.mask[45:, 20:].any()


def test_bleeding_colour_blur_and_speckle() -> None:
    a = portrait()
    clean = render(a)
    green = clean.copy()
    green[46:60, 20:44] = (0.4 * green[46:60, 20:44] + 0.6 * np.array([230, 30, 200])).astype(np.uint8)
    assert of(green).label("x").named[0] in ("colour", "shape") and of(green).types["colour"] >= 2
    from scipy.ndimage import gaussian_filter

    soft = gaussian_filter(clean.astype(float), (2, 2, 0)).astype(np.uint8)
    assert of(soft).types["blur"] >= 3 and of(soft).mask.all()
    rng = np.random.default_rng(0)
    noisy = clean.copy()
    hit = rng.random((64, 64)) < 0.01
    noisy[hit] = 255 - noisy[hit]
    found = of(noisy)
    assert found.types["speckle"] >= 2.5 and (found.mask & hit).sum() > 0.5 * hit.sum()


def test_a_thin_line_is_no_artifact_and_a_band_is_one() -> None:
    clean = render(portrait()).astype(float)
    for wide, counts in ((1, False), (2, False), (4, True)):
        picture = clean.copy()
        picture[6 : 6 + wide] -= 70
        assert (of(picture.clip(0, 255).astype(np.uint8)).severity >= 1) == counts, wide


def test_what_the_prompt_asks_for_counts_and_what_it_leaves_open_does_not() -> None:
    bare = render(portrait())
    assert of(bare).severity < 1
    missing = of(bare, "a person, wearing a crown")
    assert missing.types["part"] == 4 and "asked for crown" in " ".join(missing.notes)
    crowned = render(portrait(hat="crown"))
    assert of(crowned, "a person, wearing a crown").severity < 1
    assert of(crowned, "a person, bareheaded").types["part"] == pytest.approx(3.4)
    assert of(bare, "a person, blue hair, purple backdrop").types["colour"] == pytest.approx(3.4)
    assert of(render(portrait(beard=0.0)), "a person, with a huge beard").types["part"] >= 3


def test_blur_that_was_asked_for_is_none() -> None:
    soft = render(portrait(sharpness=0.05))
    assert of(soft).types["blur"] < 1 and of(soft, "a person, very blurry").types["blur"] < 1
    assert of(soft, "a person, razor sharp").types["blur"] >= 2


def test_no_portrait_is_ruined() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = of(noise)
    assert found.severity == 5 and found.mask.all()


@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_severity_rises_with_the_amount(a: float, b: float) -> None:
    low, high = sorted((graded(min(a, b), MASS_CUTS), graded(max(a, b), MASS_CUTS)))
    assert graded(min(a, b), MASS_CUTS) == low and 0 <= low <= high <= 5


def test_cut_offs_and_labels() -> None:
    assert [graded(cut, MASS_CUTS) for cut in MASS_CUTS] == pytest.approx([1, 2, 3, 4, 5])
    assert graded(0, MASS_CUTS) == 0 and graded(1e9, MASS_CUTS) == 5
    found = Finding({**dict.fromkeys(TYPES, 0.0), "shape": 3.0, "blur": 2.0}, np.zeros((64, 64), bool))
    assert found.severity == pytest.approx(3.4)
    assert [severity_of(x) for x in ([0.9, 0.99], [1.0, 0.9], [5, 5], [])] == [0, 1, 5, 0]
    label = found.label("judge")
    assert label.types == (0, 0, 3, 0, 2, 0) and label.bad and label.source == "judge"
    with pytest.raises(ValueError, match="prompts"):
        find_artifacts(np.zeros((1, 64, 64, 3), np.uint8), [], READER)
