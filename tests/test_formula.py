"""The formula a merge prints: right shares, equal blocks in one line, nothing left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny_checkpoints import single_file

from dodgeburn.cli.main import main
from dodgeburn.merge.formula import Line, formula_lines, formula_text
from dodgeburn.merge.methods import METHODS
from dodgeburn.merge.run import dry_run


def lines(more: int = 0, **options: Any) -> list[Line]:
    models = {"more": ["pocket"] * more} if more else {}
    plan, _ = dry_run("pocket-style", "pocket-bold", None, **models, **options)
    return formula_lines(plan, 2 + more)


def test_equal_blocks_share_a_line() -> None:
    found = lines(preset="Wrap2", base=0.4, keep=["vae"], blocks={"OUT03": 0.4})
    assert [(line.formula, line.places) for line in found] == [
        ("A 60 % + B 40 %", ("BASE", "OUT03", "clip_l", "clip_g")),
        ("B", ("IN00-IN05", "OUT04-OUT08")),
        ("A", ("IN06-OUT02", "VAE")),
    ]
    assert [line.alpha for line in found] == [0.4, 1.0, 0.0]
    assert sum(line.tensors for line in found) == 725


def test_rules_split_a_block() -> None:
    found = lines(base=0.5, rules=["IN04:attn2:0.1", "M00:NOT norm:0.25"])
    said = {line.formula: line.places for line in found}
    assert set(said) == {"A 50 % + B 50 %", "A 90 % + B 10 %", "A 75 % + B 25 %"}
    assert len(said["A 90 % + B 10 %"]) == 1 and said["A 90 % + B 10 %"][0].startswith("IN04 (5 of 38")
    partly = [place for places in said.values() for place in places if place.startswith(("IN04", "M00"))]
    assert len(partly) == 4 and all(" of " in place for place in partly)


@pytest.mark.parametrize(
    ("method", "more", "base", "options", "expected"),
    [
        ("weighted_sum", 0, False, {}, "A 60 % + B 40 %"),
        ("sum_twice", 1, False, {"params": {"beta": 0.25}}, "A 45 % + B 30 % + C 25 %"),
        ("triple_sum", 1, False, {"params": {"beta": 0.25}}, "A 35 % + B 40 % + C 25 %"),
        ("triple_sum", 1, False, {"params": {"beta": 0.8}}, "A -20 % + B 40 % + C 80 %"),
        ("average", 1, False, {}, "A 73.33 % + B 13.33 % + C 13.33 %"),
        ("add_difference", 0, True, {}, "A + 0.4 (B - base)"),
        ("train_difference", 0, True, {}, "A + 0.72 (B - base) |B - A| / (|B - base| + |B - A|)"),
        ("multiply_difference", 0, True, {}, "base +/- |A - base|^0.6 |B - base|^0.4, signs of A 50 % + B 50 % - base"),
        ("similarity_add_difference", 0, True, {},
         "A + 0.4 (B - base) where A and B differ, A 80 % + B 20 % where they are alike (weight 1)"),
        ("smooth_add", 0, True, {}, "A + 0.4 gauss(median(B - base))"),
        ("cosine_a", 0, False, {}, "B + clamp(cos - 0.4, 0, 1) (A - B), cos by column"),
        ("slerp", 0, False, {}, "40 % of the arc from A to B"),
        ("bislerp", 0, True, {"params": {"strength": -1}}, "base + -1 x (40 % of the arc from A - base to B - base)"),
        ("rotate", 0, False, {}, "A turned 40 % of the way to B"),
        ("tensor_sum", 0, False, {"params": {"beta": 0.3}},
         "40 % of the rows from B, beginning at 30 %; the others A's"),
        ("top_k_sum", 0, False, {}, "A's values in B's order, 40 % of them by size, beginning at 0 %"),
        ("distribution_crossover", 0, True, {},
         "the highest 40 % of the frequencies from B, the others from A (tilt 0)"),
        ("ties", 0, True, {}, "A 60 % + TIES(A, B; density 0.2, strength 1) 40 %"),
        ("model_stock", 1, True, {}, "A 60 % + model stock(A, B, C) 40 %"),
    ],
)  # fmt: skip
def test_each_method_says_what_alpha_means(
    method: str, more: int, base: bool, options: dict[str, Any], expected: str
) -> None:
    if base:
        options = options | {"base_model": "pocket"}
    assert lines(more, method=method, base=0.4, **options)[0].formula == expected


@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_is_without_words(method: str) -> None:
    found = METHODS[method]
    models = max(2, found.models[0])
    options: dict[str, Any] = {"base_model": "pocket"} if found.needs_base else {}
    (line, *_) = lines(models - 2, method=method, base=0.4, **options)
    # Numbers in place of the letters of the summary; alpha 1 of some methods is all of B.
    assert any(letter.isdigit() for letter in line.formula) and "alpha" not in line.formula


def test_text_names_the_letters() -> None:
    plan, text = dry_run("pocket-style", "pocket-bold", None, method="add_difference", base=0.4, base_model="pocket")
    said = formula_text(plan, ["a", "b", "o"])
    assert said[0] == "A = a, B = b, base = o" and said[1].startswith("  A + 0.4 (B - base)  in ")
    assert "  A + 0.4 (B - base)  in BASE, IN00-OUT08, VAE, clip_l, clip_g" in text.splitlines()
    clipped, _ = dry_run(
        "pocket-style", "pocket-bold", None, method="add_difference", base=0.4, base_model="pocket", clip=True
    )
    assert formula_text(clipped, ["a", "b", "o"])[-1] == "  then every value brought between A's and B's"


def test_what_cannot_be_merged_is_left_to_the_issues(tmp_path: Path) -> None:
    from dodgeburn.checkpoint.naming import find_checkpoint
    from dodgeburn.checkpoint.tensorfile import load_tensors, save_tensors

    state = load_tensors(find_checkpoint("pocket-bold"))
    del state["model.diffusion_model.time_embed.0.bias"]
    save_tensors(tmp_path / "b.safetensors", state, {})
    plan, _ = dry_run("pocket-style", tmp_path / "b.safetensors", None, base=0.5)
    assert sum(line.tensors for line in formula_lines(plan, 2)) == 724 and plan.counts == {"missing_in_b": 1}


def test_the_verb_prints_it_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "pocket-style", "pocket-bold", "-o", str(tmp_path / "m.safetensors"), "--block", "OUT03=0.4"]
    command += ["--base", "0.2", "--json"]
    said = []
    for options in (["--dry-run"], []):
        assert main([*command, *options]) == 0
        text = capsys.readouterr().out
        assert "  A 60 % + B 40 %  in OUT03" in text.splitlines()
        assert "ComfyUI's ratio is model1's" in text
        said.append(json.loads(text.splitlines()[-1])["formula"])
    assert said[0] == said[1]
    assert {"formula": "A 60 % + B 40 %", "alpha": 0.4, "in": ["OUT03"], "tensors": 38} in said[0]
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "ComfyUI" in capsys.readouterr().out


def test_lines_stand_in_the_models_order_whatever_the_files(tmp_path: Path) -> None:
    """Other programs sort a file's tensors by name: input_blocks.10 before input_blocks.2, the VAE before the U-Net."""
    for seed, name in enumerate("ab"):
        save_file(single_file("sd15", seed), tmp_path / f"{name}.safetensors")
    plan, _ = dry_run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", preset="Cosine", base=0.3, keep=["vae"])
    first = [line.places[0] for line in formula_lines(plan, 2)]
    assert first == ["BASE", *(f"IN{i:02d}" for i in range(12)), "M00", *(f"OUT{i:02d}" for i in range(12))]


def test_parts_of_blocks_stand_in_the_models_order(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_file(single_file("sd15", seed), tmp_path / f"{name}.safetensors")
    rules = ["IN10:in_layers:0.1", "IN02:in_layers:0.1"]
    plan, _ = dry_run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", base=0.5, rules=rules)
    said = {line.formula: line.places for line in formula_lines(plan, 2)}
    assert [place[:4] for place in said["A 90 % + B 10 %"]] == ["IN02", "IN10"]
