"""Proxies on a tiny random CLIP in a folder, and a stand-in for the package lpips."""

import sys
import types

import numpy as np
import pytest
import torch

from dodgeburn.errors import UserError
from dodgeburn.measure.clip import ClipScore
from dodgeburn.slide.proxies import LPIPS_WEIGHTS, Lpips, clip_scorer, proxy_figures


@pytest.fixture(scope="module")
def folder(clip_folder):
    return clip_folder


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def test_clip_scores_are_cosines_of_the_models_embeddings(folder) -> None:
    clip, drawn = ClipScore(folder, batch=2), pictures(5)
    found = clip.scores(drawn, "a smile")
    assert found.shape == (5,) and (np.abs(found) <= 100).all() and np.ptp(found) > 0
    inputs = clip.processor(text=["a smile"], images=list(drawn), return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = clip.model(**inputs)
    # The model's own logits are the same cosines times its temperature.
    wanted = 100 * out.logits_per_image[:, 0] / clip.model.logit_scale.detach().exp()
    assert found == pytest.approx(wanted.numpy(), abs=1e-3)
    apart = clip_scorer(clip, "a smile", "a frown")
    assert apart.by.startswith("proxy: CLIP")
    assert apart.scores(drawn) == pytest.approx(found - clip.scores(drawn, "a frown"))


def test_no_clip_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="no CLIP model's folder"):
        ClipScore(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a CLIP model"):
        ClipScore(tmp_path)


def test_lpips_says_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"dodgeburn\[proxies\]"):
        Lpips()
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=LPIPS_WEIGHTS):
        Lpips()


class Mean(torch.nn.Module):
    """Stands for LPIPS: mean absolute difference, shaped as lpips gives it; refuses what is not in [-1, 1]."""

    def __init__(self, **_) -> None:
        super().__init__()

    def forward(self, a, b):
        assert a.shape[1] == 3 and a.min() >= -1 and a.max() <= 1 and a.abs().max() > 0.5
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Lpips:
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Mean))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_WEIGHTS).touch()
    return Lpips()


def test_lpips_goes_through_in_batches_and_in_range(stand_in) -> None:
    a, b = pictures(5), pictures(5)[::-1]
    wanted = np.abs(a.astype(float) - b).mean((1, 2, 3)) / 127.5
    assert stand_in.distances(a, b, batch=2) == pytest.approx(wanted, abs=1e-5)


class Brighter:
    """Every scale makes the picture brighter by 20."""

    def pictures(self, prompts, seeds, strengths):
        rows = zip(seeds, strengths, strict=True)
        return np.stack([np.full((4, 4, 3), 100 + seed + 20 * s, np.uint8) for seed, s in rows])


class Brightness:
    def scores(self, pictures, text):
        assert text == "bright"
        return pictures.mean((1, 2, 3))


def test_figures_are_against_the_unedited_picture(stand_in) -> None:
    found = proxy_figures(Brighter(), "bright", ["a", "b"], [1, 2, 3], [-2, 2, 1], Brightness(), stand_in)
    assert [row["scale"] for row in found["scales"]] == [-2, 0, 1, 2]
    assert [row["clip_change"] for row in found["scales"]] == pytest.approx([-40, 0, 20, 40])
    assert [row["lpips"] for row in found["scales"]] == pytest.approx([40 / 127.5, 0, 20 / 127.5, 40 / 127.5], abs=1e-5)
    assert found["clip_spearman"] == pytest.approx(1.0) and found["proxy"] is True
    assert "lpips" not in proxy_figures(Brighter(), "bright", ["a"], [1], [1], Brightness())["scales"][0]
