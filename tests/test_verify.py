"""verify: a sound file is equal, a single changed bit is found and named, parents are known by their hashes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import random_lora
from tiny_checkpoints import CONV_IN, single_file, small

from dodgeburn.checkpoint.metadata import RECIPE, SPEC_HASH, to_json
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, save_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.merge.graph import parse_graph
from dodgeburn.merge.open_graph import beside
from dodgeburn.merge.run import merge
from dodgeburn.merge.run_recipe import run_recipe
from dodgeburn.merge.verify import verify


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parents of a few tensors, a merge, a graph's result, and a baked model with its parents."""
    folder = tmp_path_factory.mktemp("verify")
    for seed, name in enumerate("abc"):
        tensors: dict[str, torch.Tensor] = {"model_ema.steps": torch.tensor([seed])} | small(seed)
        save_tensors(folder / f"{name}.safetensors", tensors, {})
    models = {name: f"{name}.safetensors" for name in "abc"}
    steps = {
        "x": {"merge": ["a", "b"], "base_model": "c", "method": "dare", "seed": 3, "preset": "GradA"},
        "y": {"merge": ["x", "c"], "base": 0.5, "keep": ["vae"]},
    }
    save_tensors(folder / "full.safetensors", single_file("sdxl", 1), {})
    save_tensors(folder / "lora.safetensors", random_lora("sdxl", 2, 0.1), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DodgeburnWarning)
        run_recipe(parse_graph({"models": models, "steps": steps}), folder / "graph.safetensors", 2, beside(folder))
        merge(folder / "a.safetensors", folder / "b.safetensors", folder / "flat.safetensors", base=0.3, keep="vae")
    bake(folder / "full.safetensors", [(folder / "lora.safetensors", 0.7)], folder / "baked.safetensors", ["M00=0"])
    return folder


def flipped(source: Path, out: Path, offset: int, bit: int) -> str:
    """A copy with one bit of the tensors' bytes changed; the name of the tensor that it is in."""
    header = read_header(source)
    raw = bytearray(source.read_bytes())
    place = header.data_start + offset % (header.size - header.data_start)
    raw[place] ^= 1 << bit
    out.write_bytes(raw)
    at = place - header.data_start
    return next(name for name, info in header.tensors.items() if info.start <= at < info.end)


@pytest.mark.parametrize("name", ["flat", "graph", "baked"])
def test_what_we_wrote_is_equal(place: Path, name: str) -> None:
    path = place / f"{name}.safetensors"
    result = verify(path, samples=None)
    assert result.equal and result.hash_equal and not result.different
    assert len(result.checks) == result.tensors == len(read_header(path).tensors)
    assert sum(row["checked"] for row in result.blocks().values()) == result.tensors
    if name == "graph":
        assert set(result.parents) == {"a", "b", "c"} and "none" in result.blocks()


@pytest.mark.parametrize("name", ["flat", "graph"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found_and_named(place: Path, tmp_path: Path, name: str, offset: int, bit: int) -> None:
    changed = flipped(place / f"{name}.safetensors", tmp_path / "t.safetensors", offset, bit)
    result = verify(tmp_path / "t.safetensors", [place], samples=None)
    assert [check.name for check in result.different] == [changed] and not result.equal
    assert result.different[0].different == 1 and result.hash_equal is False
    sampled = verify(tmp_path / "t.safetensors", [place], samples=1, seed=0)
    assert not sampled.equal, "the hash tells even where the sample does not"


def test_a_lie_in_the_recipe_is_found(place: Path, tmp_path: Path) -> None:
    path = place / "flat.safetensors"
    metadata = dict(read_header(path).metadata)
    recipe = json.loads(metadata[RECIPE])
    recipe["blocks"]["M00"] = 0.31
    save_tensors(tmp_path / "t.safetensors", load_tensors(path), metadata | {RECIPE: to_json(recipe)})
    result = verify(tmp_path / "t.safetensors", [place], samples=None)
    assert {check.block for check in result.different} == {"M00"} and result.hash_equal


def test_other_shapes_types_and_names_are_said(place: Path, tmp_path: Path) -> None:
    path = place / "flat.safetensors"
    tensors = load_tensors(path)
    norm = "conditioner.embedders.1.model.ln_final.bias"
    time = "model.diffusion_model.time_embed.0.weight"
    bias = "model.diffusion_model.out.2.bias"
    tensors[norm] = tensors[norm].float()
    tensors[time] = tensors[time].reshape(-1)
    del tensors[bias]
    tensors["added"] = torch.zeros(1)
    kept = {k: v for k, v in read_header(path).metadata.items() if k != SPEC_HASH}
    save_tensors(tmp_path / "t.safetensors", tensors, kept)
    result = verify(tmp_path / "t.safetensors", [place], samples=2)  # what only one side has is always checked
    notes = {check.name: check.note for check in verify(tmp_path / "t.safetensors", [place], samples=None).different}
    assert notes == {
        norm: "F32 [4], the recipe gives F16 [4]",
        time: "F16 [4], the recipe gives F16 [2, 2]",
        bias: "not in the file",
        "added": "not of the recipe",
    }
    assert result.hash_equal is None and {bias, "added"} <= {check.name for check in result.different}


# ---- samples


def test_samples_look_into_every_block_and_repeat_by_seed(place: Path) -> None:
    path = place / "baked.safetensors"
    one, two = (verify(path, samples=30, seed=5) for _ in range(2))
    assert one.seed == 5 and [c.name for c in one.checks] == [c.name for c in two.checks]
    assert len(one.checks) == 30 and len(one.blocks()) == 21 and max(r["checked"] for r in one.blocks().values()) == 2
    other = verify(path, samples=30, seed=6)
    assert {c.name for c in other.checks} != {c.name for c in one.checks}
    assert verify(path, samples=10_000).seed is None
    with pytest.raises(UserError, match="0 samples"):
        verify(path, samples=0)


# ---- parents


def test_parents_are_known_by_hash_not_by_name(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "m" / "flat.safetensors"
    out.parent.mkdir()
    shutil.copy(place / "flat.safetensors", out)
    with pytest.raises(UserError, match=r"2 of 2 parents not found: a.safetensors \(\w+…\) is missing; b.safetensors"):
        verify(out)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(place / "a.safetensors", tmp_path / "deep" / "er" / "a.safetensors")
    shutil.copy(place / "b.safetensors", tmp_path / "renamed.safetensors")
    assert verify(out, [tmp_path / "deep", tmp_path / "renamed.safetensors"]).equal
    shutil.copy(place / "c.safetensors", tmp_path / "m" / "a.safetensors")
    with pytest.raises(UserError, match=r"1 of 2 .*a.safetensors \(\w+…\) is another file: .*a.safetensors has sha256"):
        verify(out, [tmp_path / "renamed.safetensors"])
    # The right one further away is taken, not the wrong one beside the file.
    assert verify(out, [tmp_path / "deep", tmp_path / "renamed.safetensors"]).parents["a"].parent.name == "er"
    with pytest.raises(UserError, match="nowhere does not exist"):
        verify(out, [tmp_path / "nowhere"])


def test_files_without_a_recipe_that_runs(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a.safetensors has no dodgeburn.recipe"):
        verify(place / "a.safetensors")
    extract(place / "b.safetensors", place / "a.safetensors", tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="d.safetensors: a recipe of kind 'delta_extract' cannot be run"):
        verify(tmp_path / "d.safetensors")
    for text in ("[]", "{", '{"kind": "merge"}', '{"kind": "graph", "layout": "sdxl", "models": {}, "steps": {}}'):
        save_tensors(tmp_path / "x.safetensors", {CONV_IN: torch.zeros(1)}, {RECIPE: text})
        with pytest.raises(UserError, match="x.safetensors"):
            verify(tmp_path / "x.safetensors")


def test_a_recipe_cannot_point_outside_the_given_folders(place: Path, tmp_path: Path) -> None:
    metadata = dict(read_header(place / "flat.safetensors").metadata)
    recipe = json.loads(metadata[RECIPE])
    recipe["a"]["file"] = f"../{place.name}/a.safetensors"
    (tmp_path / "m").mkdir()
    out = tmp_path / "m" / "t.safetensors"
    save_tensors(out, load_tensors(place / "flat.safetensors"), metadata | {RECIPE: to_json(recipe)})
    shutil.copytree(place, tmp_path / place.name)
    with pytest.raises(UserError, match=r"a.safetensors \(\w+…\) is missing"):
        verify(out)


# ---- the verb, end to end on the pocket


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "m.safetensors"
    assert main(["merge", "pocket-style", "pocket-bold", "-o", str(out), "--preset", "Cosine", "--base", "0.4"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--seed", "1", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert found["equal"] and found["checked"] == 50 and found["tensors"] == 725 and found["kind"] == "merge"
    assert found["parents"] == {"a": "pocket-style.safetensors", "b": "pocket-bold.safetensors"}
    assert "50 of 725 tensors derived again (drawn by seed 1): all equal" in text
    changed = flipped(out, tmp_path / "t.safetensors", 7_654_321, 0)
    assert main(["verify", str(tmp_path / "t.safetensors"), "--all"]) == 1
    text = capsys.readouterr().out
    assert f"different: {changed}" in text and "725 of 725 tensors derived again: 1 differ" in text
    for args, what in (
        (["verify", "pocket"], "no dodgeburn.recipe"),
        (["verify", str(out), "--all", "--samples", "3"], "no effect beside --all"),
        (["verify", str(tmp_path / "none.safetensors")], "does not exist"),
    ):
        assert main(args) == 2
        captured = capsys.readouterr()
        assert what in captured.err and captured.err.count("\n") == 1


def test_blocks_stand_in_the_models_order(tmp_path: Path) -> None:
    """Whatever order the file has: here the alphabet's, in which IN10 comes before IN02."""
    for seed, name in enumerate("ab"):
        save_tensors(tmp_path / f"{name}.safetensors", dict(sorted(single_file("sd15", seed).items())), {})
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "m.safetensors", base=0.3)
    blocks = list(verify(tmp_path / "m.safetensors", samples=None).blocks())
    ins, outs = [f"IN{i:02d}" for i in range(12)], [f"OUT{i:02d}" for i in range(12)]
    assert blocks == ["BASE", *ins, "M00", *outs, "VAE"]
