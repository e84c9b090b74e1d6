"""bf16 products: only where the processor is quick at them, only within the context, and nearly the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.models.quick import bf16_is_quick, quick_products
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.sampling.predict import Predictor
from dodgeburn.slide.edits import draw
from dodgeburn.slide.text import _plain_attention


@pytest.fixture(scope="module")
def pocket() -> Model:
    return load_model("pocket", device="cpu", dtype="fp32")


ASKED = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def has_unit(monkeypatch: pytest.MonkeyPatch, answer: bool, names: tuple[str, ...] = ASKED) -> None:
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: answer, raising=False)


def product() -> torch.dtype:
    return F.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype


def test_only_where_the_processor_has_the_unit_and_the_model_is_in_fp32(pocket, monkeypatch) -> None:
    has_unit(monkeypatch, True)
    assert bf16_is_quick(pocket)
    assert not bf16_is_quick(replace(pocket, dtype=torch.float16))
    assert not bf16_is_quick(replace(pocket, device=torch.device("cuda")))
    for name in ASKED:  # either will do
        has_unit(monkeypatch, False)
        assert not bf16_is_quick(pocket)
        has_unit(monkeypatch, True, (name,))
        assert bf16_is_quick(pocket)
    for name in ASKED:
        monkeypatch.delattr(torch.cpu, name)
    assert not bf16_is_quick(pocket)


def test_only_within_the_context_and_only_if_wanted(pocket, monkeypatch) -> None:
    has_unit(monkeypatch, True)
    with quick_products(pocket):
        assert product() == torch.bfloat16
        with quick_products(pocket, wanted=False):
            assert product() == torch.bfloat16  # an outer context stays what it is
    with quick_products(pocket, wanted=False):
        assert product() == torch.float32
    assert product() == torch.float32
    has_unit(monkeypatch, False)
    with quick_products(pocket):
        assert product() == torch.float32


def test_predictions_and_pictures_are_nearly_the_same(pocket, monkeypatch) -> None:
    has_unit(monkeypatch, True)
    predictor = Predictor(pocket, 64, 64)
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    times, texts = torch.tensor([10, 300, 600, 900]), ["a person, smiling broadly"] * 4
    exact, quick = predictor.frozen(x, times, texts), predictor.frozen(x, times, texts, quick=True)
    apart = float((quick - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < apart < 0.01 and quick.dtype == torch.float32
    settings = GenerateSettings(steps=4)
    one, two = (draw(pocket, ["a doctor"] * 2, [0, 1], settings, quick=on).astype(np.int64) for on in (False, True))
    assert 0 < np.abs(one - two).mean() < 3


def test_plain_attention_is_the_same_attention_with_the_same_gradient(pocket) -> None:
    predictor = Predictor(pocket, 64, 64)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before = dict(pocket.unet.attn_processors)

    def asked() -> tuple[torch.Tensor, torch.Tensor]:
        at = x.clone().requires_grad_(True)
        said = predictor(at, torch.tensor([100, 700]), ["a person", "a doctor, waving"])
        said.square().sum().backward()
        assert at.grad is not None
        return said.detach(), at.grad

    usual, slope = asked()
    with _plain_attention(pocket):
        assert {type(one) for one in pocket.unet.attn_processors.values()} != {type(one) for one in before.values()}
        plain, plain_slope = asked()
    assert torch.allclose(plain, usual, atol=1e-4) and torch.allclose(plain_slope, slope, atol=1e-3, rtol=1e-3)
    assert pocket.unet.attn_processors == before
