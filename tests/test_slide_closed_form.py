"""The closed form: the equations by hand and by their properties, the places of tokens, and a smile on the pocket."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.closed_form import closed_form, in_layers, key_value_layers, solve, token_places, token_shifts
from dodgeburn.slide.edits import AdapterEdit
from dodgeburn.slide.spec import SliderSpec


def product(adapter: Adapter, layer: str) -> Tensor:
    return adapter.up(layer).double() @ adapter.down(layer).double()


def objective(change: Tensor, weight: Tensor, c: Tensor, d: Tensor, p: Tensor, keep: float, ridge: float) -> float:
    """The sum that is minimised, for dW = change [out, in]; written out from the definition."""
    level = ridge * float((c.T @ c / len(c)).trace()) / c.shape[1]
    moved = (c @ change.T - d @ weight.T).square().sum(1).mean()
    stayed = (p @ change.T).square().sum(1).mean() if len(p) else torch.zeros(())
    return float((moved + keep * stayed + level * change.square().sum()).detach())


def problem(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = {"c": (12, 5), "d": (12, 5), "p": (4, 5), "weight": (3, 5)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in drawn.items()}


def test_two_tokens_by_hand() -> None:
    # one token state (1, 0) to move by (0, 2); mean of c c^T is diag(1, 0), trace/2 = 0.5, ridge 2 -> A = diag(2, 1)
    c, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    found = solve(c, d, torch.zeros(0, 2), ridge=2.0).matrix
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    # the same state kept as well, at weight 3: A = diag(1 + 3 + 1, 1)
    found = solve(c, d, c, keep=3.0, ridge=2.0).matrix
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [0.4, 0.0]], dtype=torch.float64))


@given(st.integers(0, 10_000), st.floats(0, 5), st.floats(1e-3, 1))
@settings(max_examples=30, deadline=None)
def test_no_change_nearby_is_better(seed: int, keep: float, ridge: float) -> None:
    x = problem(seed)
    best = x["weight"] @ solve(x["c"], x["d"], x["p"], keep, ridge).matrix
    least = objective(best, x["weight"], x["c"], x["d"], x["p"], keep, ridge)
    noise = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 1.0):
        other = best + size * torch.randn(best.shape, generator=noise, dtype=torch.float64)
        assert objective(other, x["weight"], x["c"], x["d"], x["p"], keep, ridge) > least


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_kept_states_move_the_less_the_more_they_weigh(seed: int) -> None:
    x = problem(seed)
    moves = [float((x["p"] @ solve(x["c"], x["d"], x["p"], keep, 1e-3).matrix.T).norm()) for keep in (0, 1, 100, 1e6)]
    assert moves[0] > moves[1] > moves[2] > moves[3]
    assert moves[3] < 1e-3 * moves[0]


@given(st.integers(0, 10_000), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_change_is_linear_in_eta_and_zero_at_zero(seed: int, eta: float) -> None:
    x = problem(seed)
    one = solve(x["c"], x["d"], x["p"]).matrix
    assert torch.allclose(solve(x["c"], eta * x["d"], x["p"]).matrix, eta * one)
    assert not bool(solve(x["c"], 0 * x["d"], x["p"]).matrix.any())


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_lora_of_full_rank_is_exact_and_of_low_rank_the_best(seed: int, rank: int) -> None:
    x = problem(seed)
    solution = solve(x["c"], x["d"], x["p"], 1.0, 0.1)
    exact = x["weight"] @ solution.matrix
    whole = in_layers(solution, {"unet.a": x["weight"]})
    assert torch.allclose(product(whole, "unet.a"), exact, atol=1e-5)
    assert whole.alphas["unet.a"] == len(whole.down("unet.a"))  # scale 1 is the plain product
    low = product(in_layers(solution, {"unet.a": x["weight"]}, rank), "unet.a")
    assert torch.linalg.matrix_rank(low, rtol=1e-5) <= rank
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]  # the nearest matrix, which isn't the best for the states
    rest = x["c"], x["d"], x["p"], 1.0, 0.1
    assert objective(low, x["weight"], *rest) <= objective(plain, x["weight"], *rest) * (1 + 1e-4)


def test_places_of_tokens() -> None:
    tokenizer = tiny_tokenizer()  # a letter a token
    same = token_places(tokenizer, "ab", "ab")
    assert same == list(range(77))
    longer = token_places(tokenizer, "ab", "abcd")  # begin a b end pad pad pad: the end token is at 5 there
    assert longer[:8] == [0, 1, 2, 5, 6, 6, 6, 7]  # "b" ends a word here and not there: put for another
    assert longer[8:] == list(range(8, 77))
    replaced = token_places(tokenizer, "a b c", "a x c")
    assert replaced[:6] == [0, 1, 2, 3, 4, 5]
    missing = token_places(tokenizer, "a b c", "a c")
    assert missing[:6] == [0, 1, None, 2, 3, 5]  # padding stays at its position
    chunks = token_places(tokenizer, "x " * 80, "x")
    assert len(chunks) == 154 and chunks[77:] == list(range(77, 154))


def test_nothing_moves_before_the_first_difference() -> None:
    model = tiny_model()
    states, shifts = token_shifts(model, [("a b", "a b hot", "a b cold")])
    assert states.shape == shifts.shape == (77, 40)
    assert not bool(shifts[:3].any())  # begin, a, b: text encoders are causal
    assert bool(shifts[3].any()) and bool(shifts[40:].any())


@pytest.mark.parametrize("layout", ["sdxl", "sd15"])
def test_it_changes_keys_and_values_of_text_and_nothing_else(layout: str) -> None:
    model = tiny_model(layout)
    adapter = closed_form(model, SliderSpec(name="warm", target="cup", positive="cup hot", negative="cup ice", rank=2))
    assert adapter.modules_changed == [f"unet.{name}" for name in key_value_layers(model.unet)]
    assert all(".attn2.to_k" in m or ".attn2.to_v" in m for m in adapter.modules_changed)
    assert all(adapter.down(m).shape[0] == 2 for m in adapter.modules_changed)


@pytest.mark.parametrize(
    "wrong", [{"ridge": 0.0}, {"keep": -1.0}, {"rank": 0}, {"eta": 0.0}, {"ridge": float("nan")}], ids=str
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        closed_form(tiny_model(), SliderSpec(name="x", target="a", positive="a b", negative="a c"), **wrong)


def test_prompts_that_mean_the_same() -> None:
    with pytest.raises(UserError, match="change nothing"):
        closed_form(tiny_model(), SliderSpec(name="x", target="a", positive="a b", negative="a  b"))


def test_it_moves_a_smile_on_the_pocket_without_calling_the_unet() -> None:
    model = load_model("pocket")
    spec = SliderSpec(
        name="smile", target="a face", positive="a face, smiling broadly", negative="a face, frowning deeply",
        preserve=("black hair", "an old face", "waving", "wearing a top hat", "with a long beard"),
    )  # fmt: skip
    calls: list[int] = []
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    start = time.process_time()  # of this process: what else the machine does plays no part
    adapter = closed_form(model, spec)
    seconds = time.process_time() - start
    handle.remove()
    assert not calls and seconds < 5
    prompts = ["a person, black hair", "someone, green wall, long hair", "someone, wearing a cap", "a face, blue hair"]
    edit = AdapterEdit(model, adapter, settings=GenerateSettings(steps=8))
    smile = {}
    for s in (-1.0, 0.0, 1.0):
        smile[s] = np.asarray(Reader.load().read(edit.pictures(prompts, [1, 2, 3, 4], [s] * 4)).values["smile"])
    assert (smile[1.0] > 0.6).all() and (smile[-1.0] < 0.4).all()  # 0.5 is a straight mouth
    assert (smile[-1.0] <= smile[0.0] + 0.05).all() and (smile[0.0] <= smile[1.0] + 0.05).all()
