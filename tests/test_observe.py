"""What is seen of pictures on their way: the U-Net's own blocks, pooled, without changing a picture."""

import math

import numpy as np
import pytest
import torch

from dodgeburn.errors import UserError
from dodgeburn.foresee.features import MAP_CHANNELS, Probe, mapped, mixing, pooled, stages_of
from dodgeburn.foresee.observe import SCALARS, Observer, Seen, high_frequency, space_of
from dodgeburn.sampling.loop import GenerateSettings, Step, generate
from tests.tiny import tiny_model

PROMPTS = ["a cat", "a dog", "a hat"]


def at(name: str) -> int:
    return SCALARS.index(name)


@pytest.mark.parametrize("layout", ["sdxl", "sd15"])
def test_seen_is_what_the_blocks_gave(layout: str) -> None:
    model = tiny_model(layout)
    settings = GenerateSettings(steps=3, guidance=3.0)
    raw: list[torch.Tensor] = []
    handle = model.unet.mid_block.register_forward_hook(lambda m, i, o: raw.append(o))
    seen: list[Seen] = []
    plain = generate(model, PROMPTS, [1, 2, 3], settings)
    raw.clear()
    with Observer(model, 3.0) as observer:
        pictures = generate(model, PROMPTS, [1, 2, 3], settings, callback=lambda step: seen.append(observer(step)))
    handle.remove()
    assert [np.array_equal(a.image, b.image) for a, b in zip(plain, pictures, strict=True)] == [True] * 3
    space = space_of(model)
    widths = list(model.unet.config["block_out_channels"])
    assert [w for _, w in space.stages] == [*widths, widths[-1], *reversed(widths)]
    start = 2 * sum(widths)
    for one, mid in zip(seen, raw, strict=True):
        assert one.cond.shape == one.delta.shape == (3, space.features)
        expected = torch.cat([mid.mean((2, 3)), mid.std((2, 3), correction=0)], 1)
        width = 2 * widths[-1]
        assert torch.allclose(one.cond[:, start : start + width], expected[3:], atol=1e-5)
        assert torch.allclose(one.delta[:, start : start + width], expected[3:] - expected[:3], atol=1e-5)
    assert not any(module._forward_hooks for module in model.unet.modules())
    assert [round(one.progress, 3) for one in seen] == [0.333, 0.667, 1.0]


def test_scalars_by_hand() -> None:
    model = tiny_model()
    seen: list[Seen] = []
    steps: list[Step] = []
    outputs: list[torch.Tensor] = []

    def callback(step: Step) -> None:
        steps.append(step)
        outputs.append(observer.probe.output.clone())
        seen.append(observer(step))

    with Observer(model, 2.0) as observer:
        generate(model, PROMPTS[:2], [1, 2], GenerateSettings(steps=4, guidance=2.0), callback)
    x0 = torch.stack([s.denoised for s in steps])
    differences = torch.stack([(o[2:] - o[:2]).square().mean((1, 2, 3)).sqrt() for o in outputs])
    for k, one in enumerate(seen):
        s = one.scalars
        assert torch.allclose(s[:, at("log_snr")], torch.full((2,), -2 * math.log(steps[k].sigma)))
        assert torch.allclose(s[:, at("guidance_difference")], differences[k], rtol=1e-4)
        assert torch.allclose(s[:, at("guidance_sum")], differences[: k + 1].sum(0), rtol=1e-4)
        change = (x0[k] - x0[k - 1]).square().mean((1, 2, 3)).sqrt() if k else torch.zeros(2)
        assert torch.allclose(s[:, at("x0_change")], change, rtol=1e-4)
        variance = x0[: k + 1].var(0, correction=0).mean((1, 2, 3))
        assert torch.allclose(s[:, at("x0_variance")], variance, rtol=1e-3, atol=1e-6)
        assert torch.allclose(s[:, at("x0_max")], x0[k].flatten(1).amax(1))
        assert torch.equal(one.x0, x0[k]) and torch.equal(one.x_t, steps[k].latents)
        assert one.scalars[0, at("guidance")] == 2


def test_pictures_leave_the_batch_and_the_rest_stays_as_it_was() -> None:
    model = tiny_model()
    settings = GenerateSettings(steps=4, sampler="heun")  # a second U-Net call a step that must not be seen

    def run(drop: bool) -> list[Seen]:
        seen: list[Seen] = []

        def callback(step: Step) -> list[bool]:
            seen.append(observer(step))
            return [not (drop and step.i == 1 and i == 1) for i in step.indices]

        with Observer(model, 4.0) as observer:
            generate(model, PROMPTS, [1, 2, 3], settings, callback)
        return seen

    whole, fewer = run(False), run(True)
    assert fewer[2].indices == (0, 2)
    for a, b in zip(whole, fewer, strict=True):
        rows = [a.indices.index(i) for i in b.indices]
        assert torch.allclose(a.scalars[rows], b.scalars, rtol=1e-3, atol=1e-4)
        assert torch.allclose(a.cond[rows], b.cond, rtol=1e-3, atol=1e-4)


def test_without_guidance_there_is_no_difference() -> None:
    model = tiny_model("sd15")
    with Observer(model, 1.0) as observer:
        seen: list[Seen] = []
        generate(model, PROMPTS, [1, 2, 3], GenerateSettings(steps=2, guidance=1.0), lambda s: seen.append(observer(s)))
        generate(model, PROMPTS[:1], [1], GenerateSettings(steps=2, guidance=1.0), lambda s: seen.append(observer(s)))
    assert not seen[1].delta.any() and not seen[1].scalars[:, at("guidance_sum")].any()
    assert seen[2].scalars[0, at("x0_change")] == 0  # a new run knows nothing of the one before
    assert torch.allclose(seen[3].scalars[0], seen[1].scalars[0], rtol=1e-3, atol=1e-4)


def test_pieces() -> None:
    x = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
    assert pooled(x).tolist() == [[2.0, 1.0]]
    assert high_frequency(torch.ones(1, 1, 4, 4).cumsum(3)).item() == pytest.approx(0.2)  # 1.25 whole, 1 smooth
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert high_frequency(noise).item() == pytest.approx(0.75, abs=0.02)
    model = tiny_model()
    with Probe(model.unet) as probe, pytest.raises(UserError, match="not been called"):
        _ = probe.features
    assert len(stages_of(model.unet)) == 7


@pytest.mark.parametrize("layout", ["sdxl", "sd15"])
def test_maps_are_the_last_up_blocks_with_the_prompt(layout: str) -> None:
    model = tiny_model(layout)
    raw: list[torch.Tensor] = []
    handle = model.unet.up_blocks[-1].register_forward_hook(lambda m, i, o: raw.append(o))
    seen: list[Seen] = []
    with Observer(model, 3.0) as observer:
        generate(model, PROMPTS, [1, 2, 3], GenerateSettings(steps=2, guidance=3.0), lambda s: seen.append(observer(s)))
    handle.remove()
    names = dict(space_of(model).maps)
    last = f"up{len(model.unet.up_blocks) - 1}"
    assert list(names)[0] == last and seen[0].near.shape == (3, names[last], 8, 8)
    assert seen[0].far.shape[2:] == (8, 8)  # no larger than it is allowed to be: left as it is
    for one, hidden in zip(seen, raw, strict=True):
        assert torch.allclose(one.near, torch.nn.functional.group_norm(hidden[3:], 8), atol=1e-5)


def test_wide_blocks_are_mixed_and_large_ones_pooled() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 320, 48, 32, generator=generator)
    found = mapped(x, 16)
    assert found.shape == (2, MAP_CHANNELS, 16, 11)
    assert torch.equal(found, mapped(x.clone(), 16)) and mixing(320).abs().max() == pytest.approx(320**-0.5)
    apart = [(a[0] - a[1]).square().mean() for a in (found, torch.nn.functional.adaptive_avg_pool2d(x, (16, 11)))]
    assert 0.7 < apart[0] / (apart[1] / torch.nn.functional.adaptive_avg_pool2d(x, (16, 11)).var()) < 1.4


def test_blocks_are_asked_at_wanted_steps_only() -> None:
    model = tiny_model()

    def run(**wanted: object) -> list[Seen]:
        seen: list[Seen] = []
        with Observer(model, 3.0, **wanted) as observer:  # type: ignore[arg-type]
            for _ in range(2):  # a second batch begins anew
                generate(model, PROMPTS[:2], [1, 2], GenerateSettings(steps=4), lambda s: seen.append(observer(s)))
        return seen

    whole, some = run(), run(wanted=lambda i, total: i == 2, features=False)
    for i, (a, b) in enumerate(zip(whole, some, strict=True)):
        assert torch.equal(a.scalars, b.scalars) and torch.equal(a.x0, b.x0)
        assert b.cond.numel() == 0 and b.near.numel() == (a.near.numel() if i % 4 == 2 else 0)
        assert i % 4 != 2 or torch.equal(a.near, b.near)
