"""Prompt weights: both dialects as documented, no string that crashes them, and what they do to the embeddings."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.sampling.emphasis import SYNTAXES, pieces, unread
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.prompts import encode, token_chunks, weighted
from tests.tiny import tiny_model

pytestmark = pytest.mark.sampling


def read(prompt: str, syntax: str) -> list[tuple[str, float]]:
    return [(p.text, round(p.weight, 4)) for p in pieces(prompt, syntax)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1)]),
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("robotic (Chicken:1.1) ,", [("robotic ", 1), ("Chicken", 1.1), (" ,", 1)]),
        ("((a:1.2))", [("a", 1.32)]),
        ("(a (b:1.5) c)", [("a ", 1.1), ("b", 1.65), (" c", 1.1)]),
        ("[less] more", [("less", 0.9091), (" more", 1)]),
        ("([a])", [("a", 1)]),
        ("(a: 0.5 )b", [("a", 0.5), ("b", 1)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("12:30, a) b]", [("12:30, a) b]", 1)]),
        ("back\\slash \\\\", [("backslash \\", 1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
    ],
)
def test_a1111(prompt: str, wanted: list[tuple[str, float]]) -> None:
    assert read(prompt, "a1111") == wanted


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1)]),
        ("", [("", 1)]),
        ("robotic (Chicken:1.1) ,", [("robotic ", 1), ("Chicken", 1.1), (" ,", 1)]),
        ("((a:1.2))", [("a", 1.2)]),
        ("((a))", [("a", 1.21)]),
        ("(a (b:1.5) c)", [("a ", 1.1), ("b", 1.5), (" c", 1.1)]),
        ("(a (b) c:2)", [("a ", 2), ("b", 2.2), (" c", 2)]),
        ("[as is] BREAK", [("[as is] BREAK", 1)]),
        ("(unbalanced", [("(unbalanced", 1)]),
        (r"\(literal\) (x)", [("(literal) ", 1), ("x", 1.1)]),
        ("(time 12:30)", [("time 12", 30)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("()", [("", 1)]),
    ],
)
def test_comfy(prompt: str, wanted: list[tuple[str, float]]) -> None:
    assert read(prompt, "comfy") == wanted


def test_plain_leaves_everything() -> None:
    assert read("(a:1.2) [b] \\( BREAK", "plain") == [("(a:1.2) [b] \\( BREAK", 1)]


def test_break_ends_a_chunk() -> None:
    found = pieces("a BREAK (b BREAK c)", "a1111")
    assert [(p.text, round(p.weight, 2), p.ends_chunk) for p in found] == [
        ("a", 1, True), ("", 1, False), ("b", 1.1, True), ("c", 1.1, False)]  # fmt: skip
    tokenizer = tiny_model().tokenizers[0]
    rows = token_chunks(tokenizer, "a BREAK (bb:1.5)", "a1111")
    assert len(rows) == 2 and all(len(r.ids) == len(r.weights) == 77 for r in rows)
    assert rows[0].weights == [1.0] * 77 and rows[1].weights[:4] == [1.0, 1.5, 1.5, 1.0]


@given(st.text(alphabet="ab(:)[]\\ 1.2-BREAK,é\0", max_size=60), st.sampled_from(SYNTAXES))
@hypothesis_settings(max_examples=400, deadline=None)
def test_no_string_crashes_a_parser(prompt: str, syntax: str) -> None:
    found = pieces(prompt, syntax)
    assert found and all(torch.isfinite(torch.tensor(p.weight)) for p in found)
    letters = iter(prompt)  # what is left stands in the prompt, in this order
    assert all(letter in letters for p in found for letter in p.text)


def test_deep_brackets_are_read() -> None:
    for syntax in SYNTAXES:
        assert pieces("(" * 3000 + "a" + ")" * 100, syntax)


def test_weights_by_hand() -> None:
    states = torch.arange(12.0).reshape(1, 4, 3)  # mean 5.5
    empty = torch.ones(4, 3)
    weights = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    doubled = states * weights.unsqueeze(-1)  # mean 6.5
    assert torch.allclose(weighted(states, weights, empty, "a1111"), doubled * (5.5 / 6.5))
    moved = weighted(states, weights, empty, "comfy")
    assert torch.equal(moved[0, 1], torch.tensor([5.0, 7.0, 9.0])) and torch.equal(moved[0, 2:], states[0, 2:])
    half = weighted(states.half(), weights, empty.half(), "comfy")
    assert half.dtype == torch.float16 and torch.equal(half, moved.half())
    zero = weighted(states - 5.5, weights, empty, "a1111")  # a mean of 0 is no measure of size
    assert torch.isfinite(zero).all() and zero.abs().max() < 20


def test_a_weight_of_one_changes_no_bit() -> None:
    model = tiny_model()
    plain = encode(model, ["a hat, red"], syntax="plain")["a hat, red"]
    for syntax in ("a1111", "comfy"):
        again = encode(model, ["a hat, (red:1)"], syntax=syntax)["a hat, (red:1)"]
        assert again.pooled is not None and plain.pooled is not None
        assert again.chunks == 1 and again.embeds.shape == plain.embeds.shape
        same = encode(model, ["a hat, red"], syntax=syntax)["a hat, red"]
        assert torch.equal(same.embeds, plain.embeds) and torch.equal(same.pooled, plain.pooled)


@pytest.mark.parametrize("layout", ["sdxl", "sd15"])
def test_weights_reach_the_embeddings_and_leave_the_pooled(layout: str) -> None:
    model = tiny_model(layout)
    a, b, c = "a (hat:1.4) b", "a (hat:1.4) b", "a hat b"
    theirs = encode(model, [b], syntax="comfy")[b]
    ours, plain = (encode(model, [t])[t] for t in (a, c))
    assert not torch.allclose(ours.embeds, theirs.embeds)
    if layout == "sdxl":
        assert ours.pooled is not None and plain.pooled is not None and torch.allclose(ours.pooled, plain.pooled)
    width = 16  # of the first encoder: its chunk keeps its mean
    assert torch.allclose(ours.embeds[:, :width].mean(), plain.embeds[:, :width].mean(), atol=1e-5)
    empty = encode(model, [""])[""].embeds
    moved = theirs.embeds != plain.embeds
    assert torch.allclose(theirs.embeds[moved], (empty + 1.4 * (plain.embeds - empty))[moved], atol=1e-5)


def test_a_syntax_of_encoding_and_settings_must_agree() -> None:
    model = tiny_model()
    encoded = encode(model, ["a"], syntax="comfy")
    with pytest.raises(UserError, match="prompt syntax comfy"):
        generate(model, ["a"], [1], GenerateSettings(steps=1), encoded=encoded)
    with pytest.raises(UserError, match="did you mean comfy"):
        GenerateSettings(prompt_syntax="comfi")


def test_markup_that_is_read_as_words_is_said() -> None:
    text = "a <lora:smile:0.8> [cat:dog:0.5] [a|b] x AND y embedding:bad (b:1.2) [less] time 12:30"
    assert unread(text, "a1111") == ["<lora:smile:0.8>", "[cat:dog:0.5]", "[a|b]", "AND", "embedding:bad"]
    assert unread(text, "plain") == [] and unread("(a:1.2), [b] and 1:2", "a1111") == []
    with pytest.warns(DodgeburnWarning, match="read as words: <lora:x:1>"):
        generate(tiny_model(), ["a <lora:x:1>"], [1], GenerateSettings(steps=1))
