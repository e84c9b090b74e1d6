"""Recipes as texts, and what they may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipes import FILES, graph, place, run
from tiny_checkpoints import CONV_IN

from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    save_tensors,
    sha256_file,
)
from dodgeburn.errors import UserError
from dodgeburn.merge.graph import parse_graph
from dodgeburn.merge.recipe import graph_of
from dodgeburn.merge.recipe_text import read_recipe, to_toml
from dodgeburn.merge.recipe_tree import recipe_lines

__all__ = ["place"]  # a fixture


# ---- what is refused


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        ({"x": {"merge": ["a", "x"]}}, "in a circle: x <- x"),
        ({"x": {"merge": ["a", "y"]}, "y": {"merge": ["x", "b"]}}, "in a circle: x <- y <- x"),
        ({"x": {"merge": ["a", "y"]}, "y": {"merge": ["a", "b"]}}, "uses y, which comes later"),
        ({"x": {"merge": ["a", "bb"]}}, "uses 'bb', which is no model or step: did you mean b"),
        ({"x": {"merge": ["a", "a"]}}, "model b is used by no step"),
        ({"x": {"merge": ["a", "b"]}, "y": {"merge": ["a", "b"]}}, "step x is used by no step"),
        ({"x": {"merge": ["a", "b"], "presett": "GradV"}}, "step x has no setting 'presett': did you mean preset"),
        ({"x": {"merge": ["a", "b"], "preset": "GradX"}}, "step x: no preset is named 'GradX'"),
        ({"x": {"merge": ["a", "b"], "base": 2}}, "step x: base is 2"),
        ({"x": {"merge": ["a"]}}, "step x: merge names 1 models"),
        ({"x": {"merge": "ab"}}, "step x: merge is 'ab': expected a list"),
        ({"x": {}}, "step x: expected either merge"),
        ({"x": {"merge": ["a", "b"], "bake": "a"}}, "step x: expected either merge"),
        ({"x": {"bake": "a", "add": {}}}, "step x: add names nothing"),
        ({"x": {"bake": "a", "add": {"b": float("inf")}}}, "strength of b is inf"),
        ({"x": {"bake": "a", "add": {"b": 1}}, "y": {"merge": ["x", "b"]}}, "b is used both as a model and as"),
        ({"a": {"merge": ["a", "b"]}}, "a is both a model and a step"),
        ({"x y": {"merge": ["a", "b"]}}, "the name 'x y'"),
        ({"x": {"merge": ["a", "b"], "dtype": "fp32"}, "y": {"merge": ["x", "b"]}}, "dtype fp32 has no effect"),
        ({}, "has no steps"),
    ],
)
def test_wrong_graphs_are_one_line(steps: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_graph({"models": {"a": "a.safetensors", "b": "b.safetensors"}, "steps": steps})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ([], "the recipe is \\[\\]"),
        ({"steps": {}}, "models is missing"),
        ({"models": {"a": 3}, "steps": {}}, "model a is 3"),
        ({"models": {"a": {"file": "x"}}, "steps": {}}, "model a has no setting 'file'"),
        ({"models": {"a": {}}, "steps": {}}, "model a: path is missing"),
        ({"models": {"a": {"path": "x", "sha256": "12"}}, "steps": {}}, "sha256 is '12'"),
        ({"dodgeburn": 2, "models": {}, "steps": {}}, "reads recipes of version 1"),
        ({"model": {}, "steps": {}}, "has no part 'model': did you mean models"),
    ],
)
def test_wrong_parts_are_one_line(raw: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_graph(raw)


WORDS = st.sampled_from(["models", "steps", "a", "x", "merge", "bake", "add", "path", "base", "blocks", "preset"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS


def inside(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4)


@settings(max_examples=150, deadline=None)
@given(raw=st.recursive(PLAIN, inside, max_leaves=12))
def test_no_value_is_more_than_an_error(raw: Any) -> None:
    for value in (raw, {"models": {"a": "x"}, "steps": raw}, {"models": raw, "steps": {"s": {"merge": ["a", "b"]}}}):
        try:
            parse_graph(value)
        except UserError as error:
            assert str(error)
    if isinstance(raw, dict):
        assert all(isinstance(line, str) for line in recipe_lines({"kind": "graph", "steps": raw, **raw}))
        assert all(isinstance(line, str) for line in recipe_lines({"kind": "merge", "a": raw, "blocks": raw, **raw}))
        assert all(isinstance(line, str) for line in recipe_lines({"kind": "bake", "added": [raw], "model": raw}))
        for kind in ("graph", "merge", "bake", "delta_apply", "else"):
            with pytest.raises(UserError):
                graph_of({**raw, "kind": kind})


def test_files_that_are_missing_or_others(place: Path, tmp_path: Path) -> None:
    step = {"x": {"merge": ["a", "b"], "base": 0.5}}
    for models, what in (
        ({"a": "a.safetensors", "b": "none.safetensors"}, "model b: .*none.safetensors does not exist"),
        ({"a": "a.safetensors", "b": {"path": "b.safetensors", "sha256": "0" * 63 + "1"}}, "model b: .*another file"),
        ({"a": "a.safetensors", "b": "d.safetensors"}, "step x: d.safetensors: .*it is a delta"),
        ({"a": "a.safetensors", "b": "lora.safetensors"}, "step x: lora.safetensors: .*it is a LoRA"),
    ):
        with pytest.raises(UserError, match=what):
            run(place, graph(step, models), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="step x: model l: .*no.safetensors does not exist"):
        no_lora = graph({"x": {"bake": "a", "add": {"l": 1}}}, {"a": "a.safetensors", "l": "no.safetensors"})
        run(place, no_lora, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="step y: x is a step's result"):
        steps = {"x": {"merge": ["a", "b"]}, "y": {"bake": "a", "add": {"x": 1}}}
        run(place, graph(steps), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="also an input"):
        run(place, graph(step), place / "b.safetensors")
    right = {n: {"path": FILES[n], "sha256": sha256_file(place / FILES[n])} for n in "ab"}
    run(place, graph(step, right), tmp_path / "right.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["right.safetensors"], "nothing half-written"


def test_nan_is_named_in_the_file_that_has_it(place: Path, tmp_path: Path) -> None:
    bad = load_tensors(place / "b.safetensors")
    bad[CONV_IN][0, 0] = float("nan")
    save_tensors(tmp_path / "bad.safetensors", bad, {})
    models = {"a": str(place / "a.safetensors"), "b": "bad.safetensors", "c": str(place / "c.safetensors")}
    for base in (0.5, 1.0):
        steps = {"x": {"merge": ["a", "b"], "base": base}, "y": {"merge": ["x", "c"], "base": 0.1}}
        with pytest.raises(UserError, match=f"tensor {CONV_IN} of bad.safetensors has NaN"):
            run(tmp_path, graph(steps, models), tmp_path / "m.safetensors")


# ---- text


def test_yaml_and_json_say_the_same(place: Path, tmp_path: Path) -> None:
    found = graph({"x": {"merge": ["a", "b"], "preset": "GradV", "blocks": {"IN00": 0.1}, "rules": ["::0.5"]}})
    (tmp_path / "r.toml").write_text(to_toml(found))
    (tmp_path / "r.json").write_text(json.dumps(found.as_dict()))
    (tmp_path / "r.yaml").write_text(
        """\
models: {a: a.safetensors, b: b.safetensors}
steps:
  x:
    merge: [a, b]
    preset: GRAD_V
    blocks: {IN00: 1.0e-1}
    rules: ['::0.5']
"""
    )
    for ending in ("toml", "json", "yaml"):
        assert read_recipe(tmp_path / f"r.{ending}") == found


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("r.toml", "[models\n", "not valid TOML"),
        ("r.toml", "[models]\na = 1\na = 2\n", "not valid TOML"),
        ("r.yaml", "a: [", "not valid YAML"),
        ("r.yaml", "models: {a: x, a: y}", "'a' is given twice"),
        ("r.yaml", "models: &m {a: x}\nsteps: *m", "aliases"),
        ("r.yaml", "models: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("r.json", '{"models": ' + "[" * 2000, "not valid YAML"),
        ("r.yaml", "just words", "the recipe is 'just words'"),
    ],
)
def test_text_that_is_no_recipe(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        read_recipe(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
