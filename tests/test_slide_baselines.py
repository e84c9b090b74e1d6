"""Baselines: each is unedited at 0, deterministic, does what its equation says, and moves a smile on pocket."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.sampling.prompts import encode
from dodgeburn.slide.attention_reuse import PromptToPrompt, Table
from dodgeburn.slide.baselines import (
    EmbeddingInterpolation,
    PromptWeight,
    Words,
    interpolated,
    product_norm,
    random_like,
    words_of,
)
from dodgeburn.slide.edits import Edit, Unedited, draw
from dodgeburn.slide.score_edits import Composition, GuidanceDirection, ShiftedUNet
from dodgeburn.slide.spec import SliderSpec

WORDS = Words("hot", "ice")
Make = Callable[[Unedited], Edit]
EDITS: dict[str, Make] = {
    "weight": lambda base: PromptWeight(base, WORDS),
    "interpolation": lambda base: EmbeddingInterpolation(base, WORDS),
    "direction": lambda base: GuidanceDirection(base, WORDS),
    "composition": lambda base: Composition(base, WORDS),
    "attention": lambda base: PromptToPrompt(base, WORDS),
}


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return tiny_model("sdxl")


def unedited(model: Model, **more: object) -> Unedited:
    return Unedited(model, GenerateSettings(steps=3, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layout"), [*((name, "sdxl") for name in EDITS), ("attention", "sd15")])
def test_zero_is_unedited_and_the_rest_is_deterministic_and_different(name: str, layout: str) -> None:
    base = unedited(tiny_model(layout))
    edit = EDITS[name](base)
    prompts, seeds, strengths = ["a cup", "b", "a cup", "long " * 16], [1, 2, 1, 3], [1.0, 0.0, -1.0, 2.0]
    made = edit.pictures(prompts, seeds, strengths)
    plain = base.pictures(prompts, seeds)
    assert made.shape == plain.shape and made.dtype == np.uint8
    assert np.array_equal(made[1], plain[1])
    assert all((made[i] != plain[i]).any() for i in (0, 2, 3))
    assert (made[0] != made[2]).any()
    assert np.array_equal(EDITS[name](base).pictures(prompts, seeds, strengths), made)
    order = [3, 2, 1, 0]  # rows may come in any order; batch mates change a picture by rounding at most
    turned = edit.pictures(*([x[i] for i in order] for x in (prompts, seeds, strengths)))  # type: ignore[arg-type]
    assert np.abs(turned[order].astype(int) - made).max() <= 1


@pytest.mark.parametrize("name", EDITS)
def test_the_model_is_as_before(name: str, sdxl: Model) -> None:
    processors = [type(m.processor) for m in sdxl.unet.modules() if hasattr(m, "processor")]
    hooks = len(sdxl.unet._forward_pre_hooks)
    EDITS[name](unedited(sdxl)).pictures(["a"], [1], [1.0])
    assert [type(m.processor) for m in sdxl.unet.modules() if hasattr(m, "processor")] == processors
    assert len(sdxl.unet._forward_pre_hooks) == hooks


def test_weights_are_written_in_both_directions(sdxl: Model) -> None:
    edit = PromptWeight(unedited(sdxl), Words("a (b)", "c"))
    assert edit.prompt("x", 1.3) == r"x, (a \(b\):1.3000)"
    assert edit.prompt("x", -0.5) == "x, (c:0.5000)"
    base = unedited(sdxl)
    at_one = PromptWeight(base, WORDS).pictures(["x"], [1], [1.0])
    assert np.array_equal(at_one, draw(sdxl, ["x, hot"], [1], base.settings))
    with pytest.raises(UserError, match="plain"):
        PromptWeight(unedited(sdxl, prompt_syntax="plain"), WORDS)


def test_interpolation_ends_at_the_prompts_with_their_words(sdxl: Model) -> None:
    base = unedited(sdxl)
    made = EmbeddingInterpolation(base, WORDS).pictures(["x", "x"], [1, 1], [1.0, -1.0])
    assert np.array_equal(made, draw(sdxl, ["x, hot", "x, ice"], [1, 1], base.settings))
    encoded = encode(sdxl, ["x", "x, hot", ""])
    half = interpolated(encoded["x"], encoded["x, hot"], 0.5, encoded[""])
    assert torch.allclose(half.embeds, (encoded["x"].embeds + encoded["x, hot"].embeds) / 2, atol=1e-6)
    assert half.pooled is not None and half.pooled.shape == encoded["x"].pooled.shape  # type: ignore[union-attr]


def test_a_direction_between_the_same_words_and_a_late_start_change_nothing(sdxl: Model) -> None:
    base = unedited(sdxl)
    plain = base.pictures(["x"], [1])
    same = GuidanceDirection(base, Words("hot", "hot")).pictures(["x"], [1], [3.0])
    never = GuidanceDirection(base, WORDS, start=0)
    assert np.abs(same.astype(int) - plain).max() <= 1
    assert np.abs(never.pictures(["x"], [1], [3.0]).astype(int) - plain).max() <= 1 and never.forwards == 0


def test_further_samples_are_counted(sdxl: Model) -> None:
    base = unedited(sdxl)
    direction, composed = GuidanceDirection(base, WORDS), Composition(base, WORDS, start=1000)
    for edit in (direction, composed):
        edit.pictures(["x", "y"], [1, 2], [1.0, 1.0])
    assert direction.forwards == 2 * 3 * 2 and composed.forwards == 3 * 2


def test_the_shift_goes_to_the_conditional_half_alone() -> None:
    class Same:
        config: dict[str, object] = {}

        def __call__(self, x: torch.Tensor, timestep: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
            return (x * 2,)

    unet = ShiftedUNet(Same(), 2, lambda x, timestep, output: torch.ones_like(x))
    x = torch.arange(4.0).view(4, 1, 1, 1)
    assert unet(x, torch.tensor(5))[0].flatten().tolist() == [0, 2, 5, 7]


def test_composition_at_guidance_one_by_hand(sdxl: Model) -> None:
    """s (eps(words) - eps("")) added to eps(prompt): with strength 1 and the empty prompt that is eps(words)."""
    base = unedited(sdxl, guidance=1.0)
    composed = Composition(base, WORDS, start=1000).pictures([""], [1], [1.0])
    words = draw(sdxl, ["hot"], [1], base.settings)
    assert np.abs(composed.astype(int) - words).max() <= 1


def test_attention_tables() -> None:
    table = Table.of(tiny_tokenizer(), "a", "a b", 0.5, 1)  # begin a b end: b is new
    assert table.shared[0, :4].tolist() == [True, True, False, True]
    assert table.places[0, :5].tolist() == [0, 1, 0, 2, 4]
    assert table.weights[0, :4].tolist() == [1, 1, 0.5, 1]


def test_without_reuse_it_is_the_edited_prompt(sdxl: Model) -> None:
    base = unedited(sdxl)
    made = PromptToPrompt(base, WORDS, 0.0, 0.0).pictures(["x"], [1], [1.0])
    assert np.abs(made.astype(int) - draw(sdxl, ["x, hot"], [1], base.settings)).max() <= 1


def test_random_control_has_the_norm_of_every_layer() -> None:
    g = torch.Generator().manual_seed(0)
    factors = {
        "unet.a": Factors(torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g), 1.0),
        "unet.b": Factors(torch.randn(3, 2, 3, 3, generator=g), torch.randn(4, 3, 1, 1, generator=g), 6.0),
    }
    adapter = Adapter(factors)
    for name, f in factors.items():
        by_hand = (f.alpha / f.rank * f.up.flatten(1) @ f.down.flatten(1)).norm()
        assert product_norm(f) == pytest.approx(float(by_hand), rel=1e-5)
        control = random_like(adapter, seed=1).factors()[name]
        assert product_norm(control) == pytest.approx(product_norm(f), rel=1e-4)
        assert control.down.shape == f.down.shape and not torch.allclose(control.down, f.down)
    again, other = random_like(adapter, seed=1).factors(), random_like(adapter, seed=2).factors()
    assert torch.equal(again["unet.b"].up, random_like(adapter, seed=1).factors()["unet.b"].up)
    assert not torch.equal(again["unet.b"].up, other["unet.b"].up)


def test_words_of_a_spec() -> None:
    spec = SliderSpec(name="x", target="a face", positive="a face, smiling", negative="a grim face")
    assert words_of(spec) == Words("smiling", "a grim face")
    with pytest.raises(UserError):
        Words("", "x")


POCKET: dict[str, tuple[Make, float]] = {
    "weight": (lambda base: PromptWeight(base, SMILE), 1.0),
    "interpolation": (lambda base: EmbeddingInterpolation(base, SMILE), 1.0),
    "direction": (lambda base: GuidanceDirection(base, SMILE), 0.5),
    "composition": (lambda base: Composition(base, SMILE), 1.0),
    "attention": (lambda base: PromptToPrompt(base, SMILE), 1.0),
}
SMILE = Words("smiling broadly", "frowning deeply")


@pytest.fixture(scope="module")
def pocket() -> Unedited:
    return Unedited(load_model("pocket"), GenerateSettings(steps=5))


@pytest.mark.parametrize("name", POCKET)
def test_it_moves_a_smile_on_the_pocket(name: str, pocket: Unedited) -> None:
    make, strength = POCKET[name]
    prompts, seeds = ["a person, black hair", "someone, wearing a cap"], [1, 2]
    made = make(pocket).pictures(prompts * 2, seeds * 2, [-strength] * 2 + [strength] * 2)
    smile = np.asarray(Reader.load().read(made).values["smile"])
    assert (smile[2:] - smile[:2] > 0.3).all()


def test_reused_attention_keeps_more_of_the_picture(pocket: Unedited) -> None:
    prompts, seeds = ["a person", "someone, wearing a cap", "a character, blue hair"], [1, 2, 3]
    plain = pocket.pictures(prompts, seeds).astype(int)
    free, kept = (
        np.abs(PromptToPrompt(pocket, SMILE, cross, own).pictures(prompts, seeds, [1.0] * 3) - plain).mean()
        for cross, own in ((0.0, 0.0), (0.8, 0.4))
    )
    assert kept < 0.8 * free
