"""Sampling against diffusers' own pipelines, against exact solutions, and against itself (batches, seeds,
chunks).
"""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import Generated, GenerateSettings, Step, generate, stream
from dodgeburn.sampling.prompts import COMMA_BACKTRACK, encode, split_tokens, token_chunks
from dodgeburn.sampling.schedules import Schedule, initial_noise, schedule, scheduler_for
from dodgeburn.sampling.settings import SAMPLERS, SPACINGS, STOCHASTIC
from dodgeburn.sampling.solvers import SOLVERS, History
from tests.tiny import tiny_configs, tiny_model

pytestmark = [
    pytest.mark.sampling,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # inside diffusers
]

PROMPTS = ["a red hat", "an old man, smiling", "green"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return tiny_model("sdxl")


@pytest.fixture(scope="module")
def sd15() -> Model:
    return tiny_model("sd15")


def pixels(pictures: list[Generated]) -> np.ndarray:
    return np.stack([np.asarray(p.image).astype(int) for p in pictures])


def diffusers_pictures(
    model: Model, settings: GenerateSettings, prompts: list[str], seeds: list[int], **more: Any
) -> np.ndarray:
    """The same pictures by diffusers' pipeline, with a generator for each seed; `more` goes to the pipeline."""
    scheduler = scheduler_for(settings.sampler, model.scheduler_config, settings.spacing, settings.zero_snr)
    common: dict[str, Any] = {
        "vae": model.vae, "unet": model.unet, "scheduler": scheduler,
        "text_encoder": model.text_encoders[0], "tokenizer": model.tokenizers[0],
    }  # fmt: skip
    pipe: Any
    if model.has_added_conditions:
        pipe = StableDiffusionXLPipeline(
            **common, text_encoder_2=model.text_encoders[1], tokenizer_2=model.tokenizers[1],
            force_zeros_for_empty_prompt=False, add_watermarker=False,
        )  # fmt: skip
    else:
        pipe = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompts, negative_prompt=[settings.negative] * len(prompts), num_inference_steps=settings.steps,
        guidance_scale=settings.guidance, width=model.native_size, height=model.native_size,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="np",
        **more,
    ).images  # fmt: skip
    return (out * 255).round().astype(int)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_same_pictures_as_diffusers_sdxl(sdxl: Model, sampler: str, spacing: str) -> None:
    if sampler == "ddim" and spacing == "linspace":
        pytest.skip("diffusers' DDIM steps by 1000 // n, which is not where linspace's next time step lies")
    noise = "fresh" if sampler in STOCHASTIC else "brownian"  # diffusers draws anew each step
    settings = GenerateSettings(steps=5, guidance=3.0, sampler=sampler, spacing=spacing, negative="blue", noise=noise)
    ours = pixels(generate(sdxl, PROMPTS, SEEDS, settings))
    theirs = diffusers_pictures(sdxl, settings, PROMPTS, SEEDS)
    assert ours.std() > 20, "the random model must make pictures in which differences show"
    assert np.abs(ours - theirs).max() <= 1


def test_same_pictures_as_diffusers_karras(sdxl: Model) -> None:
    settings = GenerateSettings(steps=5, guidance=3.0, sampler="euler", spacing="karras")
    ours = pixels(generate(sdxl, PROMPTS, SEEDS, settings))
    assert np.abs(ours - diffusers_pictures(sdxl, settings, PROMPTS, SEEDS)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_same_pictures_as_diffusers_sd15(sd15: Model, sampler: str) -> None:
    settings = GenerateSettings(steps=5, guidance=3.0, sampler=sampler, negative="blue")
    ours = pixels(generate(sd15, PROMPTS, SEEDS, settings))
    theirs = diffusers_pictures(sd15, settings, PROMPTS, SEEDS)
    assert ours.std() > 20
    assert np.abs(ours - theirs).max() <= 1


def test_v_prediction_as_diffusers() -> None:
    model = tiny_model("sdxl", prediction_type="v_prediction")
    settings = GenerateSettings(steps=8, guidance=2.0)
    ours = pixels(generate(model, PROMPTS, SEEDS, settings))
    assert np.abs(ours - diffusers_pictures(model, settings, PROMPTS, SEEDS)).max() <= 1


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_batch_size_does_not_change_the_picture(sdxl: Model, sampler: str) -> None:
    settings = GenerateSettings(steps=4, sampler=sampler)
    prompts = PROMPTS + ["w" * 90]  # one needs two chunks of text
    seeds = [*SEEDS, 6]
    together = pixels(generate(sdxl, prompts, seeds, settings))
    alone = pixels(generate(sdxl, prompts, seeds, settings, batch_size=1))
    assert np.abs(together - alone).max() <= 1


def test_the_same_again_is_the_same_and_another_seed_is_not(sdxl: Model) -> None:
    settings = GenerateSettings(steps=3, sampler="dpmpp_2m_sde")
    once, again = (pixels(generate(sdxl, PROMPTS, SEEDS, settings)) for _ in range(2))
    assert (once == again).all()
    assert np.abs(pixels(generate(sdxl, PROMPTS, [9, 10, 11], settings)) - once).max() > 20


def test_order_seeds_and_settings(sdxl: Model) -> None:
    prompts = ["w" * 90, "b", "a", "w" * 91]
    made = generate(sdxl, prompts, [1, 2, 3, 4], GenerateSettings(steps=2), batch_size=2)
    assert [(m.prompt, m.seed, m.index) for m in made] == [(p, i + 1, i) for i, p in enumerate(prompts)]
    assert (made[0].settings.width, made[0].settings.height) == (16, 16)
    assert sorted(m.index for m in stream(sdxl, prompts, [1, 2, 3, 4], GenerateSettings(steps=1))) == [
        0,
        1,
        2,
        3,
    ]


def test_encoded_prompts_are_used(sdxl: Model) -> None:
    encoded = encode(sdxl, [*PROMPTS, ""])
    settings = GenerateSettings(steps=3)
    plain = pixels(generate(sdxl, PROMPTS, SEEDS, settings))
    assert (pixels(generate(sdxl, PROMPTS, SEEDS, settings, encoded=encoded)) == plain).all()
    swapped = {**encoded, PROMPTS[0]: encoded[PROMPTS[1]]}
    assert np.abs(pixels(generate(sdxl, PROMPTS, SEEDS, settings, encoded=swapped))[0] - plain[0]).max() > 2


def test_guidance_one_is_a_single_pass_and_zero_is_the_negative(sdxl: Model) -> None:
    rows: list[int] = []
    forward = sdxl.unet.forward

    def counting(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    sdxl.unet.forward = counting
    try:
        generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=2, guidance=1.0))
        assert rows == [3, 3]
    finally:
        del sdxl.unet.forward
    zero = pixels(generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=3, guidance=0.0, negative="hat")))
    hats = pixels(generate(sdxl, ["hat"] * 3, SEEDS, GenerateSettings(steps=3, guidance=1.0)))
    assert np.abs(zero - hats).max() <= 1


# ------------------------------------------------------------------------------------------------- callback


def test_callback_sees_every_step(sdxl: Model) -> None:
    seen: list[Step] = []
    generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=4), callback=lambda s: seen.append(s), batch_size=2)
    assert [(s.i, s.batch) for s in seen] == [(i, b) for b in (0, 1) for i in range(4)]
    assert seen[0].indices == (0, 1) and seen[-1].indices == (2,) and seen[0].batches == 2
    assert seen[0].latents.shape == seen[0].denoised.shape == (2, 4, 8, 8)
    assert [s.sigma for s in seen[:4]] == sorted((s.sigma for s in seen[:4]), reverse=True)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dropping_a_picture_leaves_the_others_alone(sdxl: Model, sampler: str) -> None:
    settings = GenerateSettings(steps=6, sampler=sampler)
    full = pixels(generate(sdxl, PROMPTS, SEEDS, settings))

    def drop_second(step: Step) -> list[bool] | None:
        return [index != 1 for index in step.indices] if step.i == 2 else None

    kept = generate(sdxl, PROMPTS, SEEDS, settings, callback=drop_second)
    assert [k.index for k in kept] == [0, 2]
    assert np.abs(pixels(kept) - full[[0, 2]]).max() <= 1


def test_callback_can_end_everything(sdxl: Model) -> None:
    steps: list[int] = []

    def stop(step: Step) -> bool:
        steps.append(step.i)
        return step.i < 1

    assert generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=4), callback=stop, batch_size=1) == []
    assert steps == [0, 1]
    nobody = generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=4), callback=lambda s: [False] * len(s.indices))
    assert nobody == []


def test_unet_is_left_as_it_was_even_after_an_error(sdxl: Model) -> None:
    before = {name: type(p) for name, p in sdxl.unet.attn_processors.items()}

    def fail(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=2), callback=fail)
    assert {name: type(p) for name, p in sdxl.unet.attn_processors.items()} == before
    assert "get_aug_embed" not in vars(sdxl.unet)


# ----------------------------------------------------------------------------------------- solvers, schedules


def gaussian_samples(sampler: str, steps: int, n: int = 200_000) -> torch.Tensor:
    """Samples of a world whose data are N(0.7, 0.5^2): the exact denoiser is known, so only the solver
    errs.
    """
    config = tiny_configs()["scheduler"]
    plan: Schedule = schedule(sampler, "exponential", steps, config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64) * plan.sigmas[0] + 0.7

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return 0.7 + (x - 0.7) * 0.25 / (0.25 + sigma**2)

    history = History(lambda *_: torch.randn(x.shape, generator=generator, dtype=torch.float64), denoise)
    for sigma, sigma_next in zip(plan.sigmas, plan.sigmas[1:], strict=False):
        x = SOLVERS[sampler](x, denoise(x, sigma), sigma, sigma_next, history)
    return x


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_solvers_converge_to_the_data(sampler: str) -> None:
    # The start N(0.7, sigma_max) is off by (0.5 / 14.6)^2 / 2 = 0.06 %; the rest is the solver's own error.
    second_order = sampler not in ("ddim", "euler", "euler_a")
    error = abs(float(gaussian_samples(sampler, 60).std()) - 0.5)
    assert error < (0.004 if second_order else 0.03)
    coarse = abs(float(gaussian_samples(sampler, 15).std()) - 0.5)
    assert coarse > error


def test_schedules_fall_and_end() -> None:
    config = tiny_configs()["scheduler"]
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            for steps in (1, 2, 7, 20, 30):
                plan = schedule(sampler, spacing, steps, config)
                assert len(plan.timesteps) == steps and len(plan.sigmas) == steps + 1
                assert all(a > b for a, b in zip(plan.sigmas, plan.sigmas[1:], strict=False)), (
                    sampler,
                    spacing,
                    steps,
                )
                assert 0 <= min(plan.timesteps) and max(plan.timesteps) <= 999
                assert plan.sigmas[-1] < 0.03


def test_karras_timesteps_lie_at_their_sigmas() -> None:
    plan = schedule("dpmpp_2m", "exponential", 45, tiny_configs()["scheduler"])
    ratios = [math.log(a / b) for a, b in zip(plan.sigmas, plan.sigmas[1:-1], strict=False)]
    assert max(ratios) - min(ratios) < 1e-9
    assert len(set(plan.timesteps)) == 45  # diffusers' whole numbers repeat here


def test_initial_noise_is_of_the_seed_alone() -> None:
    a, _ = initial_noise(7, (4, 8, 8))
    assert torch.equal(a, initial_noise(7, (4, 8, 8))[0])
    assert torch.equal(a[None], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)))
    assert abs(float(initial_noise(2**64 - 1, (4, 64, 64))[0].std()) - 1) < 0.05


# ------------------------------------------------------------------------------------------------- prompts


def test_split_tokens() -> None:
    comma = 9

    def split(ids: list[int], length: int) -> list[list[int]]:
        return [[i for i, _ in chunk] for chunk in split_tokens([(i, 1.0) for i in ids], length, comma)]

    assert split([], 5) == [[]]
    assert split([1] * 5, 5) == [[1] * 5]
    assert split([1] * 6, 5) == [[1] * 5, [1]]
    assert split([1, 9, 2, 3, 4, 5], 5) == [[1, 9], [2, 3, 4, 5]]
    far = [9] + [1] * 80
    assert split(far, 75)[0] == far[:75]
    near = [1] * (75 - COMMA_BACKTRACK) + [9] + [1] * 40
    assert split(near, 75)[0] == near[: 75 - COMMA_BACKTRACK + 1]
    for length in range(1, 200, 7):
        ids = [comma if i % 11 == 0 else i for i in range(length)]
        assert [i for chunk in split(ids, 75) for i in chunk] == ids


def test_chunks_are_encoded_each_on_its_own(sdxl: Model) -> None:
    text = "b" * 60 + "c" * 60
    rows = [chunk.ids for chunk in token_chunks(sdxl.tokenizers[0], text)]
    assert [len(r) for r in rows] == [77, 77] and rows[1][0] == 0 and rows[0][-1] == 1
    whole = encode(sdxl, [text, "b", ""])
    assert whole[text].embeds.shape == (154, 40) and whole[text].chunks == 2
    assert whole["b"].padded(2, whole[""]).shape == (154, 40)
    assert torch.allclose(whole["b"].padded(2, whole[""])[77:], whole[""].embeds)
    # The second chunk reaches the picture, so nothing was cut.
    a, b = (generate(sdxl, [text + tail], [1], GenerateSettings(steps=2)) for tail in ("x", "yyyy"))
    assert np.abs(pixels(a) - pixels(b)).max() > 0


def test_sd15_uses_the_last_state_after_its_norm(sd15: Model) -> None:
    ids = torch.tensor([token_chunks(sd15.tokenizers[0], "a hat")[0].ids])
    wanted = sd15.text_encoders[0](ids).last_hidden_state[0]
    got = encode(sd15, ["a hat"])["a hat"]
    assert torch.allclose(got.embeds, wanted, atol=1e-6) and got.pooled is None


# ------------------------------------------------------------------------------------------------- bad input


def test_settings_name_near_ones() -> None:
    with pytest.raises(UserError, match="did you mean.*dpmpp_2m"):
        GenerateSettings(sampler="dpmp_2m")
    with pytest.raises(UserError, match="karras"):
        GenerateSettings(spacing="karas")
    assert GenerateSettings(sampler="DPM++ 2M SDE", spacing="Uniform").sampler == "dpmpp_2m_sde"
    for bad in ({"steps": 0}, {"guidance": -1}, {"guidance": float("nan")}, {"width": 4}):
        with pytest.raises(UserError):
            GenerateSettings(**bad)


def test_bad_calls(sdxl: Model) -> None:
    with pytest.raises(UserError, match="seeds"):
        generate(sdxl, PROMPTS, [1])
    with pytest.raises(UserError, match="seed is -1"):
        generate(sdxl, ["a"], [-1])
    with pytest.raises(UserError, match="multiples of 2"):
        generate(sdxl, ["a"], [1], GenerateSettings(width=17))
    with pytest.raises(UserError, match="batch size"):
        generate(sdxl, ["a"], [1], batch_size=0)
    assert generate(sdxl, [], []) == []


def test_other_sizes(sdxl: Model) -> None:
    (made,) = generate(sdxl, ["a"], [1], GenerateSettings(steps=1, width=24, height=16))
    assert made.image.size == (24, 16)


def test_nan_is_counted(sdxl: Model) -> None:
    weight = sdxl.unet.conv_out.bias
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.warns(DodgeburnWarning, match="3 of 3"):
            generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=1))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DodgeburnWarning)
        generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=1))
