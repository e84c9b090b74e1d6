"""Adapters at work while pictures are made: nothing at scale 0, a scale for each picture, sums, starts and blocks."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import LAYER_SETS, Adapter, Factors, attached, layers_of, new_adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.adapted import Applied
from dodgeburn.sampling.loop import Generated, GenerateSettings, Step, generate
from dodgeburn.slide.compose import concatenated
from tests.adapters import change, random_adapter
from tests.tiny import tiny_model

pytestmark = pytest.mark.adapters
KINDS = ("sdxl", "sd15")
SETTINGS = GenerateSettings(steps=4)
PROMPTS = ["a cat", "a dog", "a red hat", "nothing"]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {kind: tiny_model(kind) for kind in KINDS}


def pixels(found: list[Generated]) -> np.ndarray:
    return np.stack([np.asarray(one.image).astype(int) for one in found])


def apart(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one - two).max())


# -------------------- which layers


@pytest.mark.parametrize(
    ("layer_set", "sd15", "sdxl"),
    [
        ("full", 214, 626), ("noxattn", 150, 346), ("xattn", 64, 280), ("selfattn", 64, 280), ("xattn-strict", 48, 210),
    ],
)  # fmt: skip
def test_layer_sets_are_those_of_the_paper(layer_set: str, sd15: int, sdxl: int) -> None:
    """Counted on the real architectures, without their weights."""
    for kind, count in (("sd15", sd15), ("sdxl", sdxl)):
        config = json.loads(resources.files("dodgeburn.models").joinpath(f"configs/{kind}.json").read_text())["unet"]
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        layers = layers_of(unet, layer_set)
        assert len(layers) == len(set(layers)) == count, kind
        assert not any(part in layer for layer in layers for part in ("ff.", "proj_in", "proj_out", "time_embedding"))
    assert layer_set in LAYER_SETS


def test_a_layer_set_that_is_none(models: dict[str, Model]) -> None:
    with pytest.raises(UserError, match="unknown layer set 'attn'"):
        layers_of(models["sd15"].unet, "attn")
    with pytest.raises(UserError, match="rank 0"):
        new_adapter(models["sd15"].components(), [], rank=0)


# -------------------- one layer by hand


def test_the_formula_on_one_layer() -> None:
    """h = W x + s (alpha / rank) up down x, for two rows with scales of their own."""
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    unet = torch.nn.ModuleDict({"layer": layer})
    adapter = Adapter({"unet.layer": Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)})
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    with torch.no_grad(), attached({"unet": unet}, [adapter]) as at:
        assert torch.equal(layer(x), x)
        at.set([[1.0, -2.0]])
        # down x = 3 and 2; times 0.5 and the scale: 1.5 and -2
        assert torch.equal(layer(x), torch.tensor([[1 + 4.5, 1 + 6.0], [2 - 6.0, -8.0]]))
    assert torch.equal(layer(x), x)


# -------------------- pictures


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_changes_no_bit(kind: str, models: dict[str, Model]) -> None:
    model = models[kind]
    adapters = [Applied(random_adapter(model, 1), 0.0), Applied(random_adapter(model, 2), [0.0] * 4, start=500)]
    plain = generate(model, PROMPTS, [1, 2, 3, 4], SETTINGS)
    found = generate(model, PROMPTS, [1, 2, 3, 4], SETTINGS, adapters=adapters)
    assert apart(pixels(plain), pixels(found)) == 0
    # Beside others that are changed, too.
    mixed = [Applied(random_adapter(model, 1, text=False), [0.0, 2.0, 0.0, -2.0])]
    beside = pixels(generate(model, PROMPTS, [1, 2, 3, 4], SETTINGS, adapters=mixed))
    assert apart(pixels(plain)[[0, 2]], beside[[0, 2]]) == 0
    assert all(apart(pixels(plain)[i], beside[i]) > 10 for i in (1, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_has_its_scale(kind: str, models: dict[str, Model]) -> None:
    """A sweep in one batch, text encoders included, is the pictures made alone."""
    model = models[kind]
    adapter, scales = random_adapter(model, 1), [-3.0, 0.0, 1.5, 4.0]
    together = generate(model, PROMPTS, [5, 5, 6, 6], SETTINGS, adapters=[Applied(adapter, scales)])
    for i, (prompt, seed, scale) in enumerate(zip(PROMPTS, [5, 5, 6, 6], scales, strict=True)):
        alone = generate(model, [prompt], [seed], SETTINGS, adapters=[Applied(adapter, scale)])
        assert apart(pixels(alone)[0], pixels(together)[i]) <= 1
        assert together[i].adapters[0].scale == scale
    one = generate(model, ["a cat"] * 4, [5] * 4, SETTINGS, adapters=[Applied(adapter, scales)])
    assert min(apart(pixels(one)[i], pixels(one)[j]) for i in range(4) for j in range(i)) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_several_at_once_are_their_sum(kind: str, models: dict[str, Model]) -> None:
    model = models[kind]
    parts = [
        random_adapter(model, i, layer_set, rank=i + 1) for i, layer_set in enumerate(("noxattn", "full", "xattn"))
    ]
    scales = [1.5, -1.0, 0.5]
    found = generate(
        model, PROMPTS[:2], [1, 2], SETTINGS, adapters=[Applied(p, s) for p, s in zip(parts, scales, strict=True)]
    )
    summed = generate(model, PROMPTS[:2], [1, 2], SETTINGS, adapters=[Applied(concatenated(parts, scales))])
    assert apart(pixels(found), pixels(summed)) <= 1
    other_order = [Applied(p, s) for p, s in zip(parts[::-1], scales[::-1], strict=True)]
    assert apart(pixels(found), pixels(generate(model, PROMPTS[:2], [1, 2], SETTINGS, adapters=other_order))) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_u_net_moves_by_the_products(kind: str, models: dict[str, Model]) -> None:
    """Hooks against weights that were changed by hand: W + s (alpha / rank) up down."""
    model, fresh = models[kind], tiny_model(kind)
    adapter = random_adapter(model, 3, text=False)
    with torch.no_grad():
        for module in adapter.modules_changed:
            weight = fresh.unet.get_submodule(module.removeprefix("unet.")).weight
            weight += (0.7 * change(adapter, module)).float().reshape(weight.shape)
    generator = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(1, 77, 40 if kind == "sdxl" else 16, generator=generator),
    )
    added = {"text_embeds": torch.ones(1, 20), "time_ids": torch.ones(1, 6)} if kind == "sdxl" else None
    with torch.no_grad(), attached(model.components(), [adapter]) as at:
        at.set(0.7)
        ours = model.unet(x, 500, text, added_cond_kwargs=added).sample
        wanted = fresh.unet(x, 500, text, added_cond_kwargs=added).sample
    assert torch.allclose(ours, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_start(kind: str, models: dict[str, Model]) -> None:
    """Off above the time step: not a bit of the steps before it differs; below it everything is the adapted model's."""
    model = models[kind]
    adapter = random_adapter(model, 1, text=False)
    seen: dict[str, list[Step]] = {}

    def keep(name: str) -> None:
        def callback(step: Step) -> None:
            seen.setdefault(name, []).append(step)

        applied = {"plain": [], "late": [Applied(adapter, 1.0, start=600)], "never": [Applied(adapter, 1.0, start=0)],
                   "always": [Applied(adapter, 1.0)]}[name]  # fmt: skip
        seen[name + " picture"] = generate(model, PROMPTS[:2], [1, 2], SETTINGS, callback, adapters=applied)  # type: ignore[assignment]

    for name in ("plain", "late", "never", "always"):
        keep(name)
    steps = [step.timestep for step in seen["plain"]]
    before = sum(t > 600 for t in steps)
    assert 0 < before < len(steps)
    for i in range(before):
        assert torch.equal(seen["late"][i].denoised, seen["plain"][i].denoised)
        assert not torch.equal(seen["always"][i].denoised, seen["plain"][i].denoised)
    assert not torch.equal(seen["late"][before].denoised, seen["plain"][before].denoised)
    assert torch.equal(seen["late"][before].latents, seen["plain"][before].latents)
    assert apart(pixels(seen["never picture"]), pixels(seen["plain picture"])) == 0  # type: ignore[arg-type]


def test_two_starts_at_once(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    one, two = random_adapter(model, 1, text=False), random_adapter(model, 2, text=False)
    both = generate(model, ["a cat"], [1], SETTINGS, adapters=[Applied(one, 1.0, 600), Applied(two, 1.0, 0)])
    assert (
        apart(pixels(both), pixels(generate(model, ["a cat"], [1], SETTINGS, adapters=[Applied(one, 1.0, 600)]))) == 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_block_weights(kind: str, models: dict[str, Model]) -> None:
    """Blocks at 0 are as if the adapter had only the others' modules; all at a half is the scale at a half."""
    model = models[kind]
    adapter = random_adapter(model, 1)
    blocks = model.layout.all_blocks
    off = {block: 0.0 for block in blocks if not block.startswith("OUT")}
    only_up = Adapter({m: f for m, f in adapter.factors().items() if m.startswith(("unet.up_blocks", "unet.conv_out"))})
    assert 0 < len(only_up.modules_changed) < len(adapter.modules_changed)

    def made(applied: Applied) -> np.ndarray:
        return pixels(generate(model, PROMPTS[:2], [1, 2], SETTINGS, adapters=[applied]))

    assert apart(made(Applied(adapter, 1.0, blocks=off)), made(Applied(only_up))) <= 1
    half = made(Applied(adapter, 1.0, blocks=dict.fromkeys(blocks, 0.5)))
    assert apart(half, made(Applied(adapter, 0.5))) <= 1 < apart(half, made(Applied(adapter, 1.0)))
    module = adapter.modules_changed[0]
    without = Adapter({m: f for m, f in adapter.factors().items() if m != module})
    assert apart(made(Applied(adapter, strengths={module: 0.0})), made(Applied(without))) <= 1
    with pytest.raises(UserError, match="has no block 'IN77'"):
        made(Applied(adapter, blocks={"IN77": 1.0}))


def test_middle_block_is_m00(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    adapter = random_adapter(model, 1)
    middle = Adapter({m: f for m, f in adapter.factors().items() if ".mid_block." in m})
    blocks = {b: 0.0 for b in model.layout.all_blocks if b != "M00"}
    found = generate(model, ["a cat"], [1], SETTINGS, adapters=[Applied(adapter, 2.0, blocks=blocks)])
    wanted = generate(model, ["a cat"], [1], SETTINGS, adapters=[Applied(middle, 2.0)])
    assert apart(pixels(found), pixels(wanted)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_are_each_pictures_own(kind: str, models: dict[str, Model]) -> None:
    """An adapter of the text encoders alone, at scales of their own, changes each picture as alone."""
    model = models[kind]
    whole = random_adapter(model, 4)
    adapter = Adapter({m: f for m, f in whole.factors().items() if m.startswith("text_encoder")})
    scales = [0.0, 8.0, -8.0]
    found = pixels(generate(model, ["a cat"] * 3, [1] * 3, SETTINGS, adapters=[Applied(adapter, scales)]))
    plain = pixels(generate(model, ["a cat"], [1], SETTINGS))
    assert apart(found[0], plain[0]) <= 1 and apart(found[1], found[0]) > 3 and apart(found[2], found[1]) > 3
    for i in (1, 2):
        alone = generate(model, ["a cat"], [1], SETTINGS, adapters=[Applied(adapter, scales[i])])
        assert apart(pixels(alone)[0], found[i]) <= 1


@pytest.mark.parametrize(
    "settings", [SETTINGS, GenerateSettings(steps=4, cfg_start=0.5), GenerateSettings(steps=4, guidance=1)]
)
def test_stopped_pictures_leave_the_others_their_scales(settings: GenerateSettings, models: dict[str, Model]) -> None:
    model = models["sdxl"]
    adapters = [Applied(random_adapter(model, 1), [2.0, -1.0, 0.5, 1.0], start=700)]
    whole = generate(model, PROMPTS, [1, 2, 3, 4], settings, adapters=adapters)

    def stop(step: Step) -> list[bool]:
        return [index not in {1: (0,), 2: (2,)}.get(step.i, ()) for index in step.indices]

    kept = generate(model, PROMPTS, [1, 2, 3, 4], settings, stop, adapters=adapters)
    assert [one.index for one in kept] == [1, 3] and [one.adapters[0].scale for one in kept] == [-1.0, 1.0]
    assert apart(pixels(kept), pixels(whole)[[1, 3]]) <= 1


def test_the_model_is_as_before(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    before, hooks = pixels(generate(model, ["a cat"], [1], SETTINGS)), _hooks(model)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, ["a cat"], [1], SETTINGS, _stop, adapters=[Applied(random_adapter(model))])
    assert apart(before, pixels(generate(model, ["a cat"], [1], SETTINGS))) == 0
    assert _hooks(model) == hooks


def _hooks(model: Model) -> int:
    return sum(len(module._forward_hooks) for part in model.components().values() for module in part.modules())


def _stop(step: Step) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("applied", "message"),
    [
        ({"scale": [1.0, 2.0, 3.0]}, "3 scales of adapter for 2 pictures"),
        ({"start": 1001}, "starts at time step 1001"),
        ({"scale": float("nan")}, "NaN"),
    ],
)
def test_what_cannot_be_applied(applied: dict[str, float], message: str, models: dict[str, Model]) -> None:
    model = models["sd15"]
    with pytest.raises(UserError, match=message):
        generate(model, PROMPTS[:2], [1, 2], SETTINGS, adapters=[Applied(random_adapter(model), **applied)])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another architecture"):
        generate(model, ["a"], [1], SETTINGS, adapters=[Applied(random_adapter(models["sdxl"]))])
