"""A class said in the prompt: the rule that says it, and chances that even out what is not drawn as it is asked for."""

import json

import numpy as np
import pytest
from hair import CONCEPT, Hair
from hypothesis import given
from hypothesis import strategies as st

from dodgeburn.errors import UserError
from dodgeburn.jobs import KeptRows
from dodgeburn.rework.bias.asking import PromptRule, chances_to_ask, shown_when_asked


def test_the_rule_touches_only_its_concept_and_reaches_the_target() -> None:
    rule = PromptRule(CONCEPT, Hair().named)
    assert rule.rewrite("a cat", 0) == "a cat" and rule.rewrite("a doctor, red", 0) == "a doctor, red"
    said = [rule.rewrite("portrait of a doctor", seed) for seed in range(400)]
    red = sum("red" in s for s in said)
    assert 160 <= red <= 240 and {s.split(", ")[1] for s in said} == {"black hair", "dark hair", "red"}
    assert rule.rewrite("a doctor", 5) == rule.rewrite("a doctor", 5)
    assert sum(row["chance"] for row in rule.as_json()["append_one_of"]) == 1


def test_chances_even_out_what_is_not_drawn_as_asked() -> None:
    """Asked for red, half of the pictures are black: red has to be asked for always to be shown in half of them. By
    hand, without the hold: p solves p S = q."""
    assert chances_to_ask(np.eye(3), [0.2, 0.3, 0.5]) == pytest.approx((0.2, 0.3, 0.5))
    assert chances_to_ask(np.array([[1.0, 0.0], [0.5, 0.5]]), [0.5, 0.5]) == pytest.approx((0.0, 1.0), abs=0.01)
    assert chances_to_ask(np.array([[1.0, 0.0], [0.2, 0.8]]), [0.5, 0.5]) == pytest.approx((0.375, 0.625), abs=0.002)
    assert chances_to_ask(np.array([[1.0, 0.0], [1.0, 0.0]]), [0.5, 0.5]) == pytest.approx((0.5, 0.5))  # cannot be
    skipped = chances_to_ask(np.array([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.0, 0.0, 1.0]]), [0.5, 0.5, 0.0])
    assert skipped == pytest.approx((0.4, 0.6, 0.0), abs=0.002)
    unread = chances_to_ask(np.array([[0.9, 0.1], [0.0, 0.0]]), [0.5, 0.5])
    assert sum(unread) == pytest.approx(1) and min(unread) >= 0


@given(st.integers(2, 6).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 10_000))))
def test_chances_are_chances_and_never_show_the_target_worse(case) -> None:
    k, seed = case
    rng = np.random.default_rng(seed)
    shown, q = rng.dirichlet(np.full(k, 0.5), size=k), rng.dirichlet(np.ones(k))
    p = np.array(chances_to_ask(shown, q))
    assert p.min() >= 0 and p.sum() == pytest.approx(1)
    assert np.square(p @ shown - q).sum() <= np.square(q @ shown - q).sum() + 1e-6


def test_what_is_shown_when_asked_is_counted_once_and_kept(tmp_path) -> None:
    """A model that draws red hair when asked for it in every other picture; the second call draws nothing."""
    drawn: list[str] = []

    def draw(prompts, seeds):
        drawn.extend(prompts)
        reds = [("red" in p) and s % 2 == 0 for p, s in zip(prompts, seeds, strict=True)]
        return np.array(reds, np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)

    found = shown_when_asked(CONCEPT, draw, Hair(), 8, KeptRows(tmp_path / "asked.jsonl"))
    at = {name: i for i, name in enumerate(CONCEPT.classes)}
    assert found[at["red"], at["red"]] == 0.5 and found[at["black"], at["black"]] == 1 and len(drawn) == 16
    again = shown_when_asked(CONCEPT, draw, Hair(), 8, KeptRows(tmp_path / "asked.jsonl"))
    assert np.array_equal(found, again) and len(drawn) == 16
    rule = PromptRule(CONCEPT, Hair().named, chances_to_ask(found, CONCEPT.target))
    said = [rule.rewrite("a doctor", seed) for seed in range(400)]
    assert sum("red" in s for s in said) > 360
    assert [row["chance"] for row in rule.as_json()["append_one_of"]] == pytest.approx([0.0, 1.0], abs=0.01)


def test_a_rule_is_read_as_it_was_written(tmp_path) -> None:
    rule = PromptRule(CONCEPT, Hair().named, chances_to_ask(np.array([[1.0, 0.0], [0.2, 0.8]]), [0.5, 0.5]))
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rule.as_json()))
    again = PromptRule.read(path)
    prompts = ["portrait of a doctor", "a cat", "a doctor, red"]
    assert [again.rewrite(p, s) for s in range(200) for p in prompts] == [
        rule.rewrite(p, s) for s in range(200) for p in prompts
    ]
    assert again.as_json()["append_one_of"] == rule.as_json()["append_one_of"]
    assert rule.as_json()["dynamic_prompts"] == "a doctor, {0.3755::{black hair|dark hair}|0.6245::red}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("[]", "no rule"),
        ('{"where": ["doctor"], "attribute": "hair"}', "append_one_of is missing"),
        ('{"where": ["doctor"], "attribute": "hair", "append_one_of": []}', "append_one_of"),
        ('{"where": ["doctor"], "attribute": "hair", "append_one_of": [{"class": "a", "chance": 0.5, "phrases": ["a"]},'
         '{"class": "b", "chance": 0.2, "phrases": ["b"]}]}', "shares that sum to 1"),
        ('{"where": ["doctor"], "attribute": "hair", "append_one_of": [{"class": "a", "chance": NaN, "phrases": ["a"]},'
         '{"class": "b", "chance": 0.2, "phrases": ["b"]}]}', "chance is nan"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(tmp_path, text, said) -> None:
    path = tmp_path / "rule.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        PromptRule.read(path)
