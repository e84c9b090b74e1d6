"""CLIP skip, size conditioning, guidance rescale and range, zero terminal SNR, and the command line's way to them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.images.png import read_png
from dodgeburn.models.loading import assemble
from dodgeburn.models.model import Model
from dodgeburn.models.saving import save_single_file
from dodgeburn.sampling.guidance import classifier_free, rescaled
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.prompts import encode, token_chunks
from dodgeburn.sampling.schedules import schedule
from dodgeburn.sampling.sizes import time_ids
from tests.test_sampling import PROMPTS, SEEDS, diffusers_pictures, pixels
from tests.tiny import tiny_configs, tiny_model, tiny_modules, tiny_tokenizer

pytestmark = [
    pytest.mark.sampling,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # inside diffusers
]


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return tiny_model("sdxl")


def deep(layout: str) -> Model:
    """A tiny model whose text encoders have four layers."""
    configs = tiny_configs(layout)
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            configs[name]["num_hidden_layers"] = 4
    modules = tiny_modules(configs)
    return assemble(layout, None, configs, modules, [tiny_tokenizer() for _ in range(len(modules) - 2)])


# ------------------------------------------------------------------------------------------------- CLIP skip


@pytest.mark.parametrize("skip", [1, 2, 3, 4])
def test_clip_skip_of_sd15_is_an_encoder_with_fewer_layers(skip: int) -> None:
    model = deep("sd15")
    config = CLIPTextConfig(**{**tiny_configs("sd15")["text_encoder"], "num_hidden_layers": 5 - skip})
    shorter = CLIPTextModel(config).eval()
    state = {k: v for k, v in model.text_encoders[0].state_dict().items() if k in shorter.state_dict()}
    shorter.load_state_dict(state)
    wanted = shorter(torch.tensor([token_chunks(model.tokenizers[0], "a hat")[0].ids])).last_hidden_state[0]
    got = encode(model, ["a hat"], skip)["a hat"].embeds
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.equal(got, encode(model, ["a hat"], -skip)["a hat"].embeds)
    assert torch.equal(encode(model, ["a hat"])["a hat"].embeds, encode(model, ["a hat"], 1)["a hat"].embeds)


@pytest.mark.parametrize("skip", [2, 3, 4])
def test_clip_skip_of_sdxl_as_diffusers(skip: int) -> None:
    model = deep("sdxl")
    pipe = StableDiffusionXLPipeline(
        model.vae, *model.text_encoders, *model.tokenizers, model.unet, None,  # type: ignore[arg-type]
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    wanted, _, pooled, _ = pipe.encode_prompt("a hat", clip_skip=skip - 2, do_classifier_free_guidance=False)
    got = encode(model, ["a hat"], skip)["a hat"]
    assert torch.allclose(got.embeds, wanted[0], atol=1e-5) and got.pooled is not None
    assert torch.allclose(got.pooled, pooled[0], atol=1e-5)


def test_clip_skip_1_of_sdxl_is_the_last_state_without_its_norm() -> None:
    model = deep("sdxl")
    got = encode(model, ["a hat"], 1)["a hat"].embeds
    ids = torch.tensor([token_chunks(model.tokenizers[0], "a hat")[0].ids])
    for encoder, part in zip(model.text_encoders, got.split([16, 24], dim=-1), strict=True):
        out = encoder(ids, output_hidden_states=True)
        assert torch.allclose(part, out.hidden_states[-1][0], atol=1e-5)
        assert not torch.allclose(part, out.last_hidden_state[0], atol=1e-2)


# diffusers' clip_skip of CLIP skip 1, 2, 3, 4 (docs/generate.md); 0 there is the same as not asking. None: no number
DIFFUSERS: dict[str, list[int | None]] = {"sd15": [0, 1, 2, 3], "sdxl": [None, 0, 1, 2]}


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
@pytest.mark.parametrize("skip", [1, 2, 3, 4])
def test_clip_skip_means_the_same_in_other_programs(layout: str, skip: int) -> None:
    """ComfyUI's and diffusers' own rules, with the numbers of the table, find the state that ours finds."""
    model = deep(layout)
    comfy, theirs = [], []
    k = DIFFUSERS[layout][skip - 1]
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        out = encoder(torch.tensor([token_chunks(tokenizer, "a hat")[0].ids]), output_hidden_states=True)
        norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
        state = out.hidden_states[-skip][0]
        comfy.append(norm(state) if layout == "sd15" else state)
        if k is not None:
            theirs.append(norm(out.hidden_states[-(k + 1)])[0] if layout == "sd15" else out.hidden_states[-(k + 2)][0])
    got = encode(model, ["a hat"], skip)["a hat"].embeds
    assert torch.allclose(got, torch.cat(comfy, dim=-1), atol=1e-5)
    if theirs:
        assert torch.allclose(got, torch.cat(theirs, dim=-1), atol=1e-5)


def test_clip_skip_reaches_both_prompts() -> None:
    model = deep("sdxl")
    asked = GenerateSettings(steps=2, guidance=3.0, negative="blue", clip_skip=3)
    by_setting = pixels(generate(model, PROMPTS, SEEDS, asked))
    assert np.abs(by_setting - pixels(generate(model, PROMPTS, SEEDS, asked.model_copy(update={"clip_skip": 2})))).max()
    third, second = (encode(model, [*PROMPTS, "blue", ""], n) for n in (3, 2))
    assert (pixels(generate(model, PROMPTS, SEEDS, asked, encoded=third)) == by_setting).all()
    with pytest.raises(UserError, match="encoded with CLIP skip 2, but the settings ask for 3"):
        generate(model, PROMPTS, SEEDS, asked, encoded={"blue": second["blue"]})


def test_clip_skip_out_of_range(sdxl: Model) -> None:
    with pytest.raises(UserError, match="CLIP skip is 3: this model's text encoder has 2 layers"):
        generate(sdxl, ["a"], [0], GenerateSettings(steps=1, clip_skip=-3))
    with pytest.raises(UserError, match="CLIP skip is 0"):
        GenerateSettings(clip_skip=0)
    assert GenerateSettings(clip_skip=-2) == GenerateSettings(clip_skip=2)


# ----------------------------------------------------------------------------------------------------- sizes


def test_size_rows() -> None:
    card = GenerateSettings(width=1344, height=768, size_scale=4)
    assert time_ids(card) == ([3072, 5376, 0, 0, 3072, 5376],) * 2
    told = GenerateSettings(
        width=64, height=32, original_size=(100, 50), crop=(7, 9), negative_target_size=(8, 6), negative_crop=(1, 2)
    )
    assert time_ids(told) == ([50, 100, 2, 1, 6, 8], [50, 100, 9, 7, 32, 64])
    half = GenerateSettings(width=64, height=32, size_scale=0.5, target_size=(11, 12))
    assert time_ids(half)[1] == [16, 32, 0, 0, 12, 11]
    with pytest.raises(UserError, match="size scale has no effect"):
        GenerateSettings(size_scale=2, original_size=(1, 2), target_size=(3, 4))


def test_sizes_as_diffusers(sdxl: Model) -> None:
    asked = GenerateSettings(
        steps=3, guidance=3.0, original_size=(640, 480), target_size=(90, 70), crop=(30, 20),
        negative_original_size=(20, 10), negative_target_size=(500, 600), negative_crop=(5, 6),
    )  # fmt: skip
    got = pixels(generate(sdxl, PROMPTS, SEEDS, asked))
    for i in range(3):  # one by one: in a batch diffusers gives the negative's rows to the wrong prompts
        theirs = diffusers_pictures(
            sdxl, asked, PROMPTS[i : i + 1], SEEDS[i : i + 1],
            original_size=(480, 640), target_size=(70, 90), crops_coords_top_left=(20, 30),
            negative_original_size=(10, 20), negative_target_size=(600, 500), negative_crops_coords_top_left=(6, 5),
        )  # fmt: skip
        assert np.abs(got[i] - theirs[0]).max() <= 1
    assert np.abs(got - pixels(generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=3, guidance=3.0)))).max() > 1


def test_sizes_without_effect_are_said(sdxl: Model) -> None:
    with pytest.warns(DodgeburnWarning, match="size scale, crop: no effect"):
        generate(tiny_model("sd15"), ["a"], [0], GenerateSettings(steps=1, size_scale=4, crop=(0, 0)))
    with pytest.warns(DodgeburnWarning, match="negative crop: no effect at guidance 1"):
        generate(sdxl, ["a"], [0], GenerateSettings(steps=1, guidance=1, negative_crop=(1, 1)))


# -------------------------------------------------------------------------------------------------- guidance


def test_cfg_rescale_as_diffusers(sdxl: Model) -> None:
    asked = GenerateSettings(steps=4, guidance=8.0, cfg_rescale=0.7)
    got = pixels(generate(sdxl, PROMPTS, SEEDS, asked))
    theirs = diffusers_pictures(sdxl, asked, PROMPTS, SEEDS, guidance_rescale=0.7)
    assert np.abs(got - theirs).max() <= 1
    assert np.abs(got - pixels(generate(sdxl, PROMPTS, SEEDS, GenerateSettings(steps=4, guidance=8.0)))).max() > 1


def test_guidance_and_rescale_as_diffusers_guider() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    negative, positive = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guider = ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=0.7)
    wanted = guider.forward(pred_cond=positive, pred_uncond=negative).pred
    assert torch.allclose(rescaled(classifier_free(negative, positive, 7.5), positive, 0.7), wanted, atol=1e-5)


def rows_of(model: Model, asked: GenerateSettings) -> list[int]:
    """Rows of each U-Net call."""
    rows: list[int] = []
    forward = model.unet.forward

    def counting(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    model.unet.forward = counting
    try:
        generate(model, PROMPTS, SEEDS, asked)
    finally:
        del model.unet.forward
    return rows


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_guidance_in_a_range_of_steps(sdxl: Model, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = GenerateSettings(steps=4, guidance=5.0, negative="blue", cfg_start=0.25, cfg_end=0.75, sampler=sampler)
    once = {"dpmpp_2m": [3, 6, 6, 3], "heun": [3, 3, 6, 6, 6, 6, 3]}
    assert rows_of(sdxl, asked) == once[sampler]
    got = pixels(generate(sdxl, PROMPTS, SEEDS, asked))
    for other in ({"cfg_start": 0.0, "cfg_end": 1.0}, {"guidance": 1.0, "negative": ""}):
        changed = GenerateSettings(**{**asked.model_dump(), "cfg_start": 0.0, "cfg_end": 1.0, **other})
        assert np.abs(got - pixels(generate(sdxl, PROMPTS, SEEDS, changed))).max() > 1
    dropped = generate(sdxl, PROMPTS, SEEDS, asked, lambda s: [i != 0 for i in s.indices] if s.i == 1 else None)
    assert np.abs(pixels(dropped) - got[1:]).max() <= 1

    @contextlib.contextmanager
    def nothing(unet: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr("dodgeburn.sampling.loop.text_cache", nothing)
    assert np.abs(pixels(generate(sdxl, PROMPTS, SEEDS, asked)) - got).max() <= 1


def test_ranges_and_rescale_without_effect_are_said(sdxl: Model) -> None:
    for more, said in (
        ({"cfg_start": 0.6, "cfg_end": 0.7}, "none of the 2 steps lies between"),
        ({"guidance": 1, "cfg_end": 0.5}, "CFG start and end have no effect"),
        ({"guidance": 1, "cfg_rescale": 0.5}, "CFG rescale has no effect"),
        ({"noise": "fresh"}, "noise fresh has no effect: dpmpp_2m adds no noise"),
    ):
        with pytest.warns(DodgeburnWarning, match=said):
            generate(sdxl, ["a"], [0], GenerateSettings(steps=2, **more))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="start below its end"):
        GenerateSettings(cfg_start=0.5, cfg_end=0.5)
    for bad in ({"cfg_rescale": 1.5}, {"cfg_start": -1}, {"size_scale": 0}, {"crop": (-1, 0)}, {"noise": "pink"}):
        with pytest.raises(UserError):
            GenerateSettings(**bad)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- zero SNR


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_zero_terminal_snr_as_diffusers(sampler: str) -> None:
    model = tiny_model("sdxl", prediction_type="v_prediction")
    asked = GenerateSettings(steps=6, guidance=2.0, zero_snr=True, sampler=sampler)
    plan = schedule(sampler, "trailing", 6, model.scheduler_config, zero_snr=True)
    assert plan.timesteps[0] == 999 and plan.sigmas[0] == pytest.approx(4096, rel=1e-3)
    assert schedule(sampler, "trailing", 6, model.scheduler_config).sigmas[0] < 15
    got = pixels(generate(model, PROMPTS, SEEDS, asked))
    assert np.abs(got - diffusers_pictures(model, asked, PROMPTS, SEEDS)).max() <= 1


def test_zero_terminal_snr_of_an_eps_model_is_said(sdxl: Model) -> None:
    with pytest.warns(DodgeburnWarning, match="meant for v-prediction"):
        made = generate(sdxl, ["a"], [0], GenerateSettings(steps=3, zero_snr=True, sampler="dpmpp_3m_sde"))
    assert len(made) == 1


def test_zero_terminal_snr_without_effect_is_said() -> None:
    model = tiny_model("sdxl", prediction_type="v_prediction")
    with pytest.warns(DodgeburnWarning, match="leading spacing: it does not visit the last time step"):
        generate(model, ["a"], [0], GenerateSettings(steps=3, zero_snr=True, spacing="leading"))
    model.scheduler_config["rescale_betas_zero_snr"] = True
    with pytest.warns(DodgeburnWarning, match="has it already"):
        generate(model, ["a"], [0], GenerateSettings(steps=3, zero_snr=True))


# ---------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    model = deep("sdxl")
    save_single_file(model, root / "tiny.safetensors")
    model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
    return root / "tiny.safetensors"


def test_the_cards_settings_run_and_are_recorded(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "robotic (Chicken:1.1) ,", "--model", str(model_file), "-o", str(tmp_path), "--json"]
    first = [
        *common, "--width", "28", "--height", "16", "--steps", "5", "--guidance", "4", "--sampler",
        "dpmpp_3m_sde_gpu", "--spacing", "exponential", "--size-scale", "4", "--negative", "watermark",
        "--clip-skip", "-3", "--cfg-rescale", "0.5", "--cfg-end", "0.8", "--crop", "3,4", "--original-size", "9x8",
    ]  # fmt: skip
    assert main(first) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"][0]
    own = read_png(found["path"]).own
    assert own is not None
    wanted = {
        "sampler": "dpmpp_3m_sde", "size_scale": 4.0, "clip_skip": 3, "cfg_rescale": 0.5, "cfg_end": 0.8,
        "crop": [3, 4], "original_size": [9, 8], "thresholding": None, "noise": "brownian",
    }  # fmt: skip
    assert {name: own[name] for name in wanted} == wanted
    second = [
        *common, "--steps", "3", "--guidance", "1.5", "--mimic-scale", "30", "--threshold-percentile", "0.9",
        "--mimic-mode", "Half Cosine Up", "--cfg-mode", "Half Cosine Up", "--mimic-scale-min", "4",
        "--cfg-scale-min", "4", "--scheduler-value", "4", "--no-separate-feature-channels",
    ]  # fmt: skip
    assert main(second) == 0
    out = capsys.readouterr()
    told = json.loads(out.out.splitlines()[-1])["pictures"][0]["settings"]["thresholding"]
    assert told["mimic_scale"] == 30 and told["separate_feature_channels"] is False
    assert "plain CFG, 4 to 2.851" in out.err and "scheduler value 4 has no effect" in out.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip-skip", "9"], "text encoder has 4 layers"),
        (["--crop", "3"], "--crop is '3': expected LEFT,TOP"),
        (["--original-size", "9 by 8"], "expected WIDTHxHEIGHT"),
        (["--mimic-mode", "Sawtooth"], "mimic-mode: no effect without dynamic thresholding"),
        (["--no-separate-feature-channels"], "separate-feature-channels: no effect"),
        (["--sampler", "dpmpp_3m_sd"], "did you mean dpmpp_3m_sde"),
    ],
)
def test_bad_options(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["generate", "a", "--model", str(model_file), "-o", str(tmp_path), "--steps", "2", *more]) == 2
    assert message in capsys.readouterr().err
