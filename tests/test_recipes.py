"""Recipes: what they may say, that they run as they read, and that a file's own recipe makes the file again."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import random_lora
from tiny_checkpoints import CONV_IN, single_file, small

from dodgeburn.checkpoint.metadata import recipe_of
from dodgeburn.checkpoint.tensorfile import (
    load_tensors,
    read_header,
    save_tensors,
    sha256_file,
    sha256_tensors,
)
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.merge.graph import Graph, parse_graph
from dodgeburn.merge.methods import METHODS
from dodgeburn.merge.presets import preset_names
from dodgeburn.merge.recipe import graph_of
from dodgeburn.merge.recipe_text import read_recipe, to_toml
from dodgeburn.merge.recipe_tree import recipe_lines
from dodgeburn.merge.run import merge
from dodgeburn.merge.run_recipe import RecipeResult, describe_recipe, run_recipe
from dodgeburn.merge.verify import verify

EXAMPLE = Path(__file__).parents[1] / "examples" / "recipe.toml"
FILES = {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of a few tensors (fp16), a delta, a whole tiny model and a LoRA for it."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        tensors = {key: (tensor / 4).contiguous() for key, tensor in small(seed).items()}
        save_tensors(folder / FILES[name], tensors, {"author": name})
    extract(folder / "b.safetensors", folder / "c.safetensors", folder / "d.safetensors", dtype="fp32")
    save_tensors(folder / "full.safetensors", single_file("sdxl", 1), {})
    save_tensors(folder / "other.safetensors", single_file("sdxl", 2), {})
    save_tensors(folder / "lora.safetensors", random_lora("sdxl", 2, 0.1), {})
    return folder


def graph(steps: dict[str, Any], models: dict[str, Any] | None = None) -> Graph:
    used = {name for step in steps.values() for name in json.dumps(step).replace('"', " ").split()}
    return parse_graph({"models": models or {n: f for n, f in FILES.items() if n in used}, "steps": steps})


def run(place: Path, found: Graph, out: Path, **more: Any) -> RecipeResult:
    text = place / f"{out.stem}.toml"
    text.write_text(to_toml(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DodgeburnWarning)
        return run_recipe(text, out, **more)


# ---- what runs


def test_two_steps_by_hand_with_nothing_rounded_between(place: Path, tmp_path: Path) -> None:
    steps = {"ab": {"merge": ["a", "b"], "base": 0.3}, "abc": {"merge": ["ab", "c"], "base": 0.6}}
    result = run(place, graph(steps), tmp_path / "m.safetensors")
    a, b, c = (load_tensors(place / FILES[name]) for name in "abc")
    rounded = 0
    out = load_tensors(result.path)
    assert list(out) == list(a) and read_header(result.path).metadata["author"] == "a"
    for key in a:
        between = torch.lerp(a[key].float(), b[key].float(), 0.3)
        assert out[key].dtype == torch.float16
        assert torch.equal(out[key], torch.lerp(between, c[key].float(), 0.6).half())
        rounded += int((torch.lerp(between.half().float(), c[key].float(), 0.6).half() != out[key]).sum())
    assert rounded > 0, "rounding between the steps would not show here"


@pytest.mark.parametrize("method", ["weighted_sum", "add_difference", "slerp", "dare", "triple_sum", "smooth_add"])
def test_one_step_is_the_plain_merge(place: Path, tmp_path: Path, method: str) -> None:
    found = METHODS[method]
    said: dict[str, Any] = {"method": method, "preset": "Cosine", "base": 0.4, "keep": ["vae"]}
    said |= {"seed": 7} if found.random else {}
    names = ["a", "b", "c"][: max(2, found.models[0])]
    more = [place / FILES[name] for name in names[2:]]
    base = "c" if found.needs_base else None
    one = run(place, graph({"m": said | {"merge": names, "base_model": base}}), tmp_path / "one.safetensors")
    two = merge(
        place / "a.safetensors", place / "b.safetensors", tmp_path / "two.safetensors", more=more,
        base_model=place / FILES[base] if base else None, **said,
    )  # fmt: skip
    assert one.sha256_tensors == two.sha256_tensors
    again = run(place, graph_of(two.recipe.as_dict()), tmp_path / "again.safetensors")
    assert again.sha256_tensors == two.sha256_tensors, "the flat recipe in the file is a recipe too"


@pytest.mark.parametrize("method", METHODS)
def test_large_tensors_come_out_the_same_from_a_graph(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, method: str
) -> None:
    """Tensors of more than one tile, and of more than one piece of a survey: merged directly, as a recipe, verified."""
    place = tmp_path_factory.getbasetemp() / "large"
    if not place.exists():
        place.mkdir()
        for seed, name in enumerate("abc"):
            large = torch.randn(400, 500, generator=torch.Generator().manual_seed(seed)) / 8
            save_tensors(place / FILES[name], small(seed) | {CONV_IN: large.half()}, {})
    found = METHODS[method]
    said: dict[str, Any] = {"method": method, "base": 0.4} | ({"seed": 3} if found.random else {})
    names = ["a", "b", "c"][: max(2, found.models[0])]
    base = "c" if found.needs_base else None
    one = run(place, graph({"m": said | {"merge": names, "base_model": base}}), tmp_path / "one.safetensors")
    two = merge(
        place / "a.safetensors", place / "b.safetensors", tmp_path / "two.safetensors",
        more=[place / FILES[name] for name in names[2:]], base_model=place / FILES[base] if base else None, **said,
    )  # fmt: skip
    assert one.sha256_tensors == two.sha256_tensors
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # must not matter
    try:
        assert verify(two.path, [place], samples=None).equal
    finally:
        torch.set_num_threads(before)


def test_a_bake_step_is_the_plain_bake_and_stands_between_merges(place: Path, tmp_path: Path) -> None:
    models = {"m": "full.safetensors", "o": "other.safetensors", "l": "lora.safetensors"}
    step = {"bake": "m", "add": {"l": -0.5}, "preset": "GradV", "blocks": {"OUT*": 0.25}}
    del_o = {name: file for name, file in models.items() if name != "o"}
    one = run(place, graph({"x": step}, del_o), tmp_path / "one.safetensors")
    weights = ["GradV", "OUT*=0.25"]
    two = bake(place / "full.safetensors", [(place / "lora.safetensors", -0.5)], tmp_path / "two.safetensors", weights)
    assert one.sha256_tensors == two.sha256_tensors
    again = run(place, graph_of(two.recipe.as_dict()), tmp_path / "again.safetensors")
    assert again.sha256_tensors == two.sha256_tensors
    last = {"x": step, "y": {"merge": ["x", "o"], "base": 0.5, "dtype": "fp32"}}
    found = load_tensors(run(place, graph(last, models), tmp_path / "y.safetensors").path)
    full, other = load_tensors(place / "full.safetensors"), load_tensors(place / "other.safetensors")
    baked = bake(place / "full.safetensors", [(place / "lora.safetensors", -0.5)], tmp_path / "z.safetensors", weights)
    changed = 0
    for key, tensor in load_tensors(baked.path).items():
        if tensor.is_floating_point():
            wanted = torch.lerp(tensor.float(), other[key].float(), 0.5)
            assert found[key].dtype == torch.float32
            slack = 0.5 * 2**-11 * tensor.float().abs() + 1e-6  # of the file in between, which is fp16
            assert bool(((found[key] - wanted).abs() <= slack).all()), key
            changed += not torch.equal(tensor, full[key])
    assert changed > 100


def test_a_delta_is_added_to_a_step(place: Path, tmp_path: Path) -> None:
    models = {**{n: FILES[n] for n in "ac"}, "d": "d.safetensors"}
    steps = {"ac": {"merge": ["a", "c"], "base": 1.0}, "x": {"bake": "ac", "add": {"d": 1.0}}}
    found = load_tensors(run(place, graph(steps, models), tmp_path / "m.safetensors").path)
    for key, tensor in load_tensors(place / "b.safetensors").items():  # c + (b - c)
        torch.testing.assert_close(found[key], tensor, rtol=2**-11, atol=1e-6)


def test_a_step_may_be_used_often_and_ends_are_bytes(place: Path, tmp_path: Path) -> None:
    steps = {
        "x": {"merge": ["a", "b"], "base": 0.5},
        "y": {"merge": ["x", "x"], "base": 0.25},
        "z": {"merge": ["y", "x", "c"], "method": "average", "base": 0.0},
        "w": {"merge": ["c", "z"], "base": 1.0},
    }
    found = run(place, graph(steps), tmp_path / "m.safetensors")
    plain = merge(place / "a.safetensors", place / "b.safetensors", tmp_path / "x.safetensors", base=0.5)
    assert found.sha256_tensors == plain.sha256_tensors
    ends = {"x": {"merge": ["a", "b"], "base": 1.0}, "y": {"merge": ["x", "c"], "base": 0.0}}
    assert run(place, graph(ends), tmp_path / "e.safetensors").sha256_tensors == sha256_tensors(place / "b.safetensors")
    assert json.loads(read_header(tmp_path / "m.safetensors").metadata["sd_merge_models"]).keys() == {
        sha256_file(place / FILES[name]) for name in "abc"
    }


def test_bytes_do_not_depend_on_threads_or_tiles(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"m": "full.safetensors", "o": "other.safetensors"}
    steps = {
        "x": {"merge": ["m", "o"], "preset": "GradA"},
        "s": {"merge": ["x", "m"], "base": 0.7, "clip": True, "method": "average"},
        "y": {"merge": ["s", "o"], "method": "slerp", "base": 0.3},
    }
    for steps_run in (steps, {name: steps[name] for name in ("x", "s")}):
        digests = set()
        for threads, tile in ((1, 1 << 20), (4, 1 << 20), (3, 997)):
            monkeypatch.setattr("dodgeburn.merge.tiles.TILE", tile)
            made = run(place, graph(steps_run, models), tmp_path / "m.safetensors", threads=threads)
            digests.add(made.path.read_bytes())
        assert len(digests) == 1


@st.composite
def graphs(draw: Any) -> Graph:
    """Graphs of one to four steps over the models of `place`."""
    steps: dict[str, Any] = {}
    names = ["a", "b", "c"]
    for i in range(draw(st.integers(1, 4))):
        pick = st.sampled_from(names)
        if draw(st.integers(0, 4)) == 0:
            strength = draw(st.floats(-2, 2))
            steps[f"s{i}"] = {"bake": draw(pick), "add": {"d": strength}, "blocks": {"IN*": draw(st.floats(-1, 1))}}
        else:
            method = draw(st.sampled_from(["weighted_sum", "slerp", "average", "add_difference", "dare", "cosine_a"]))
            step: dict[str, Any] = {"merge": [draw(pick), draw(pick)], "method": method}
            step["base"] = draw(st.floats(0, 1))
            if draw(st.booleans()):
                step["preset"] = draw(st.sampled_from(preset_names()))
            step["keep"] = draw(st.sampled_from([[], ["vae"], ["text", "vae"]]))
            if METHODS[method].needs_base:
                step["base_model"] = draw(pick)
            if METHODS[method].random:
                step["seed"] = draw(st.integers(0, 9))
            if draw(st.booleans()):
                step["rules"] = [f"IN00-M00::{draw(st.floats(0, 1))!r}"]
            steps[f"s{i}"] = step
        names.append(f"s{i}")
    # Whatever no step uses is left out; the last step stays.
    while True:
        used = set()
        for step in steps.values():
            used |= {*step.get("merge", ()), step.get("base_model"), step.get("bake"), *step.get("add", ())}
        idle = [name for name in list(steps)[:-1] if name not in used]
        if not idle:
            break
        del steps[idle[0]]
    files = {**FILES, "d": "d.safetensors"}
    return parse_graph({"models": {n: f for n, f in files.items() if n in used}, "steps": steps})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=graphs())
def test_the_recipe_in_the_file_makes_the_file_again(found: Graph, place: Path, tmp_path: Path) -> None:
    assert parse_graph(tomllib.loads(to_toml(found))) == found
    one = run(place, found, tmp_path / "one.safetensors")
    recipe = recipe_of(read_header(one.path).metadata)
    assert recipe == one.recipe.as_dict()
    again = graph_of(recipe)
    assert parse_graph(tomllib.loads(to_toml(again))) == again
    two = run(place, again, tmp_path / "two.safetensors")
    assert two.sha256_tensors == one.sha256_tensors
    assert recipe_lines(recipe)[0].startswith("  step ")


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
        ({"x": {"merge": "ab"}}, "step x: merge: "),
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


# ---- the verb, end to end on the pocket


def test_the_example_runs_and_explains_itself(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "m.safetensors"
    assert main(["merge", str(EXAMPLE), "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["sha256_tensors"] == sha256_tensors(out) and list(found["recipe"]["steps"]) == ["both", "result"]
    metadata = read_header(out).metadata
    assert str(EXAMPLE.parent) not in json.dumps(metadata)
    assert metadata["modelspec.merged_from"] == "pocket-style, pocket, pocket-bold"
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "step result = weighted_sum: ReverseSmoothstep, base 0.4, kept of A: text, vae" in text
    assert "A: step both = add_difference: no preset, base 0.8" in text and "base: base = pocket.safetensors" in text
    assert main(["inspect", str(out), "--recipe"]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert main(["merge", str(tmp_path / "again.toml"), "-o", str(tmp_path / "n.safetensors")]) == 0
    assert sha256_tensors(tmp_path / "n.safetensors") == sha256_tensors(out)
    capsys.readouterr()
    assert main(["merge", str(EXAMPLE), "--dry-run"]) == 0
    assert "step both: add_difference of SDXL" in (text := capsys.readouterr().out) and "725 tensors" in text


def test_the_python_names(place: Path, tmp_path: Path) -> None:
    import dodgeburn as db

    (place / "api.toml").write_text(to_toml(graph({"x": {"merge": ["a", "b"], "base": 0.5}})))
    result = db.run_recipe(place / "api.toml", tmp_path / "m.safetensors")
    assert db.verify(result.path, [place], samples=None).equal


def test_what_the_verb_refuses(tmp_path: Path, capsys: Any) -> None:
    for args, what in (
        (["merge", str(EXAMPLE), "--preset", "GradV", "-n"], "--preset has no effect"),
        (["merge", str(EXAMPLE), "--also", "pocket", "-n"], "--also has no effect"),
        (["merge", "pocket", "-n"], "name a second checkpoint B, or a recipe"),
        (["merge", str(tmp_path / "none.toml"), "-n"], "none.toml does not exist"),
        (["merge", str(EXAMPLE)], "-o OUT"),
        (["inspect", "pocket", "--recipe"], "pocket.safetensors"),
    ):
        assert main(args) == 2
        captured = capsys.readouterr()
        assert what in captured.err and captured.err.count("\n") == 1


def test_dry_runs_tell_of_bakes(place: Path) -> None:
    models = {"m": "full.safetensors", "l": "lora.safetensors"}
    text = place / "dry.toml"
    text.write_text(to_toml(graph({"x": {"bake": "m", "add": {"l": 0.5}, "blocks": {"M00": 0}}}, models)))
    said = describe_recipe(text)
    assert "added to m; block weights: M00 x 0" in said and "+ 0.5 x l: LoRA" in said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_a_chain_stays_bounded(tmp_path: Path) -> None:
    """Peak anonymous memory while three files of 96 MB are merged in four steps."""
    code = """
import sys, threading, time, torch
from dodgeburn.checkpoint.tensorfile import TensorWriter
from dodgeburn.merge.graph import parse_graph
from dodgeburn.merge.open_graph import beside
from dodgeburn.merge.run_recipe import run_recipe
folder = sys.argv[1]
u = "model.diffusion_model."
names = [u + n for n in ("input_blocks.0.0.weight", "output_blocks.0.0.weight", "label_emb.0.0.weight")]
for name in "abc":
    with TensorWriter(f"{folder}/{name}", {n: ("F16", (16, 1 << 20)) for n in names}, {}) as writer:
        for n in names:
            for i in range(16):
                writer.write(n, i << 21, bytes(1 << 21))
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))
steps = {"w": {"merge": ["a", "b"]}, "x": {"merge": ["w", "c"]}, "y": {"merge": ["x", "w"]}, "z": {"merge": ["y", "x"]}}
graph = parse_graph({"models": {n: n for n in "abc"}, "steps": steps})
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
run_recipe(graph, f"{folder}/m", 2, beside(folder))
done = True
thread.join()
print(before, peak)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    assert before < peak and peak - before < 200
