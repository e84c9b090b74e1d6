"""Sliders that train the text encoders too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from tiny import tiny_model

from dodgeburn.models.adapter_file import load_adapter
from dodgeburn.models.adapters import attached, new_adapter, trained_layers
from dodgeburn.sampling.adapted import Applied
from dodgeburn.sampling.loop import generate
from dodgeburn.sampling.predict import Predictor, predict_scaled
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.pairs import PairSpec
from dodgeburn.slide.spec import SliderSpec
from dodgeburn.slide.train import SliderMaker

TEXTS = ["a face", "", "a face", "a long one" + ", smiling" * 50]  # the last one takes two chunks
SCALES = torch.tensor([0.0, 1.0, -0.5, 2.0])


def asked(model):
    predictor = Predictor(model, model.native_size, model.native_size)
    channels = model.unet.config.in_channels
    x = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return predictor, x, torch.tensor([10, 300, 500, 900])


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_every_row_has_its_text_at_its_scale(layout: str) -> None:
    model = tiny_model(layout)
    adapter = random_adapter(model)
    predictor, x, timesteps = asked(model)
    with torch.no_grad(), attached(model.components(), [adapter], trains=True) as at:
        found = predict_scaled(predictor, at, SCALES, x, timesteps, TEXTS)
    one_by_one = []
    for i, scale in enumerate(SCALES):
        with torch.no_grad(), attached(model.components(), [adapter]) as at:
            at.set(float(scale))
            fresh, _, _ = asked(model)
            # a batch's texts are made as long as its longest
            both = fresh(x[[i, 3]], timesteps[[i, 3]], [TEXTS[i], TEXTS[3]])
        one_by_one.append(both[0])
    assert torch.allclose(found, torch.stack(one_by_one), atol=1e-5)
    with torch.no_grad():
        plain = predictor(x, timesteps, TEXTS)
    assert torch.allclose(found[0], plain[0], atol=1e-6) and not torch.allclose(found[2], plain[2], atol=1e-3)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_text_layers_get_gradients(layout: str) -> None:
    model = tiny_model(layout)
    components = model.components()
    layers = trained_layers(components, "selfattn", text_encoders=True)
    adapter = new_adapter(components, layers, rank=2)
    predictor, x, timesteps = asked(model)
    for module in components.values():
        module.requires_grad_(False)
    with attached(components, [adapter], trains=True) as at:
        predict_scaled(predictor, at, SCALES, x, timesteps, TEXTS).square().sum().backward()
    gradients = {m: adapter.up(m).grad for m in adapter.modules_changed}  # none where SDXL takes the layer before
    reached = {m.split(".")[0] for m, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert reached == {part for part in components if part.startswith(("unet", "text_encoder"))}


@pytest.mark.parametrize("begin", ["zero", "gradient", "closed-form"])
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_slider_with_text_encoders_is_trained_written_and_used(layout: str, begin: str, tmp_path: Path) -> None:
    model = tiny_model(layout)
    spec = SliderSpec(
        name="smile", target="a person", positive="smiling", negative="frowning", layers="xattn", text_encoders=True,
        latents=2, latent_steps=2, points=6, steps=3, batch=4, stop="never", rank=2, begin=begin,
    )  # fmt: skip
    (made,) = SliderMaker(model, dtype="fp32").text([spec], lambda s: tmp_path / "smile.safetensors")
    loaded = load_adapter(made.path, model)
    own = {m for m in trained_layers(model.components(), "selfattn", text_encoders=True) if m.startswith("text_")}
    assert own and own <= set(loaded.modules_changed) and loaded.changes_text
    assert all(bool(loaded.up(m).any()) for m in own if ".layers.0." in m)
    settings = GenerateSettings(steps=2)
    plain = generate(model, ["a person"], [0], settings)
    # Above the start the U-Net's part is off, the text's is on.
    moved = generate(model, ["a person"], [0], settings, adapters=[Applied(loaded, 4.0, start=0)])
    assert plain[0].image.tobytes() != moved[0].image.tobytes()
    assert SliderMaker(model, dtype="fp32").is_there(spec, made.path)


def test_pairs_have_the_same_setting() -> None:
    assert PairSpec(name="eyes").text_encoders is SliderSpec.model_fields["text_encoders"].default is False
