"""Captions say what the picture shows, and a prompt is read back exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import GRADED, LEVELS, LOOSE, NAMED, caption, level, parse
from dodgeburn.pocket.model import tokenizer
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.training.pocket import gate_prompts


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_parse_undoes_caption(index: int, share: float) -> None:
    a = attributes_of(index, 3)
    text, asked = caption(a, np.random.default_rng(index), share)
    assert parse(text) == asked
    for name, wish in asked.items():
        if name in CATEGORICAL:
            assert a[name] == wish
        else:
            assert wish[0] <= a[name] <= wish[1]


def test_all_attributes_can_be_named_at_once() -> None:
    a = attributes_of(1, 3)
    _, asked = caption(a, np.random.default_rng(0), 1.0)
    assert set(asked) == {*CONTINUOUS, *CATEGORICAL}


def test_there_are_at_least_thirty_directions_and_every_level_has_words() -> None:
    assert 2 * len(GRADED) + sum(len(v) for v in NAMED.values()) >= 30
    assert set(GRADED) == set(CONTINUOUS) and {k: tuple(v) for k, v in NAMED.items()} == CATEGORICAL
    assert all(len(levels) == len(LEVELS) for levels in GRADED.values())


def test_no_phrase_means_two_things() -> None:
    phrases = [p for levels in GRADED.values() for options in levels for p in options] + list(LOOSE)
    phrases += [p for values in NAMED.values() for options in values.values() for p in options]
    assert len(phrases) == len(set(phrases))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("A DOCTOR, smiling broadly", {"outfit": "doctor", "smile": (0.8, 1.0)}),
        ("very blurry", {"sharpness": (0.0, 0.2)}),
        ("very long hair, red hair", {"hair_length": (0.8, 1.0), "hair_colour": "red"}),
        ("a happy old person", {"smile": (0.6, 1.0), "age": (0.6, 1.0)}),
        ("a castle at dawn", {}),
        ("unsmiling", {}),
        ("", {}),
    ],
)
def test_parse_by_hand(prompt: str, asked: dict) -> None:
    assert parse(prompt) == asked


def test_level_edges() -> None:
    assert [level(v) for v in (0.0, 0.19, 0.2, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 4, 4]


def test_every_caption_fits_the_tokenizer_and_words_are_single_tokens() -> None:
    t = tokenizer()
    assert t.eos_token_id == len(t) - 1 and t.bos_token_id == len(t) - 2
    texts = [caption(attributes_of(i, 4), np.random.default_rng(i), 1.0)[0] for i in range(50)]
    assert max(len(t(text).input_ids) for text in texts) <= 140  # two chunks of 77 at the very most
    usual = [caption(attributes_of(i, 4), np.random.default_rng(i))[0] for i in range(300)]
    assert max(len(t(text).input_ids) for text in usual) <= 77
    assert t.convert_ids_to_tokens(t("a doctor").input_ids)[1:3] == ["a</w>", "doctor</w>"]


def test_gate_prompts_are_many_distinct_and_name_something() -> None:
    rows = gate_prompts()
    assert len(rows) == 1024 == len({r["prompt"] for r in rows}) == len({r["seed"] for r in rows})
    assert all(parse(r["prompt"]) for r in rows)


def test_what_is_always_and_never_named() -> None:
    for i in range(60):
        rng = np.random.default_rng(i)
        a = attributes_of(i, 3)
        text, asked = caption(a, rng, None, frozenset({"outfit", "age"}), frozenset({"glasses", "smile"}))
        assert {"outfit", "age"} <= set(asked) and not {"glasses", "smile"} & set(asked) and parse(text) == asked
        plain = caption(a, np.random.default_rng([i, 1]))
        assert plain == caption(a, np.random.default_rng([i, 1]), None, frozenset(), frozenset())
