"""Shares of parents estimated from a merge: known ones come back, what cannot be known is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dodgeburn.checkpoint.outside import RULES
from dodgeburn.checkpoint.tensorfile import load_tensors, save_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.merge.estimate import Estimate, _on_simplex, estimate
from dodgeburn.merge.nearest import nearest_preset, rest_of
from dodgeburn.merge.presets import find_preset, preset_alphas
from dodgeburn.merge.run import merge

U = "model.diffusion_model."
NAMES = [f"{U}input_blocks.0.0.weight", f"{U}middle_block.0.w.weight", f"{U}output_blocks.0.0.w.weight"]
VAE = "first_stage_model.decoder.conv_out.weight"
Tensors = dict[str, torch.Tensor]


def model(seed: int, dtype: torch.dtype = torch.float64, size: int = 500, **more: torch.Tensor) -> Tensors:
    """Random tensors of the least that is an SD1.5 checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    out = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name in [*NAMES, VAE]}
    return {name: tensor.to(dtype) for name, tensor in out.items()} | more


def write(path: Path, tensors: Tensors) -> Path:
    save_tensors(path, tensors, {})
    return path


def combined(parents: list[Tensors], shares: list[float], dtype: torch.dtype = torch.float64) -> Tensors:
    a = parents[0]
    out = {}
    for name in a:
        wide = a[name].double()
        out[name] = wide + sum(s * (p[name].double() - wide) for s, p in zip(shares, parents[1:], strict=True))
    return {name: tensor.to(dtype) for name, tensor in out.items()}


def estimated(folder: Path, merged: Tensors, parents: list[Tensors], **options: Any) -> Estimate:
    paths = [write(folder / f"{i}.safetensors", parent) for i, parent in enumerate(parents)]
    return estimate(write(folder / "c.safetensors", merged), *paths[:2], paths[2:], **options)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3), st.integers(0, 1000))
def test_known_shares_come_back(tmp_path: Path, shares: list[float], seed: int) -> None:
    parents = [model(seed + i) for i in range(len(shares) + 1)]
    found = estimated(tmp_path, combined(parents, shares), parents)
    for name in ("IN00", "M00", "OUT00", "VAE"):
        assert found.parts[name].shares == pytest.approx(shares, abs=1e-10)
        assert found.parts[name].residual == pytest.approx(0, abs=1e-6)
    assert found.components["unet"].shares == pytest.approx(shares, abs=1e-10)


def test_one_value_by_hand(tmp_path: Path) -> None:
    """d = (1, 2), r = (1, 0): the share is 1/5, what is left over (4/5, -2/5), residual sqrt(4/5) / sqrt(5)."""
    a = model(0, size=2, **{NAMES[1]: torch.zeros(2)})
    b, c = a | {NAMES[1]: torch.tensor([1.0, 2.0])}, a | {NAMES[1]: torch.tensor([1.0, 0.0])}
    part = estimated(tmp_path, c, [a, b]).parts["M00"]
    assert part.share == pytest.approx(0.2) and part.residual == pytest.approx(0.4)
    assert part.explained == pytest.approx(0.2)
    # White: sum d² e² / (sum d²)² = (0.64 + 4 * 0.16) / 25
    assert part.error == pytest.approx(math.sqrt(1.28 / 25), rel=1e-6)


def test_added_differences_are_a_share_and_its_opposite(tmp_path: Path) -> None:
    a, b, base = model(1), model(2), model(3)
    c = {name: a[name] + 0.8 * (b[name] - base[name]) for name in a}
    assert estimated(tmp_path, c, [a, b, base]).parts["M00"].shares == pytest.approx([0.8, -0.8])


def test_errors_cover_the_truth_after_rounding(tmp_path: Path) -> None:
    """Fine-tunes that are small against the weights, stored as fp16: 40 shares, three parts each."""
    generator = torch.Generator().manual_seed(5)
    ratios = []
    for share in torch.linspace(0.01, 0.99, 40).tolist():
        a = model(int(torch.randint(1 << 30, (1,), generator=generator)), torch.float16, 4000)
        noise = model(int(torch.randint(1 << 30, (1,), generator=generator)), torch.float64, 4000)
        b = {name: (a[name].double() + 0.01 * noise[name]).half() for name in a}
        found = estimated(tmp_path, combined([a, b], [share], torch.float16), [a, b])
        for name in ("IN00", "M00", "OUT00"):
            part = found.parts[name]
            assert part.share is not None and part.error is not None
            assert part.error < 0.01
            ratios.append((part.share - share) / part.error)
    spread = float(np.sqrt(np.mean(np.square(ratios))))
    assert 0.4 < spread < 1.6 and max(map(abs, ratios)) < 5


def test_equal_parents_are_said_to_be_undetermined(tmp_path: Path) -> None:
    a, b = model(1), model(2)
    same = {VAE: a[VAE], NAMES[0]: a[NAMES[0]]}
    b |= same
    c = combined([a, b], [0.3]) | {NAMES[0]: a[NAMES[0]] + 1}
    found = estimated(tmp_path, c, [a, b])
    assert found.parts["VAE"].share is None and found.parts["VAE"].error is None
    assert found.parts["VAE"].why == "undetermined: all parents are equal here, and C is that too"
    assert found.parts["IN00"].why == "undetermined: all parents are equal here, but C is not the same"
    assert found.parts["M00"].share == pytest.approx(0.3)
    # Of two parents one is A here: the other's share is still known.
    found = estimated(tmp_path, c, [a, b, model(3)])
    assert found.parts["VAE"].shares[0] is None and found.parts["VAE"].shares[1] == pytest.approx(0.0, abs=1e-9)
    assert "equal to A" in found.parts["VAE"].why


def test_dependent_parents_are_said(tmp_path: Path) -> None:
    a, b = model(1), model(2)
    found = estimated(tmp_path, combined([a, b], [0.3]), [a, b, combined([a, b], [0.5])])
    assert found.parts["M00"].shares == [None, None] and "depend on each other" in found.parts["M00"].why


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_simplex_is_the_best_feasible_point(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    differences = random.normal(size=(count, 12)) * 10 ** random.uniform(-1, 1, (count, 1))
    gram, target = differences @ differences.T, differences @ random.normal(size=12) * 2
    found = _on_simplex(gram, target)

    def error(shares: np.ndarray[Any, Any]) -> float:
        return float(shares @ gram @ shares - 2 * shares @ target)

    assert found.min() >= 0 and found.sum() <= 1 + 1e-9
    others = random.dirichlet(np.ones(count + 1) * 0.5, 300)[:, :count]
    near = np.clip(found + random.normal(size=(300, count)) * 0.01, 0, None)
    near /= np.maximum(1, near.sum(1, keepdims=True))
    assert all(error(found) <= error(other) + 1e-9 for other in [*others, *near])
    free = np.linalg.solve(gram, target)
    if free.min() >= 0 and free.sum() <= 1:
        assert found == pytest.approx(free)


def test_simplex_holds_shares_that_would_be_outside(tmp_path: Path) -> None:
    parents = [model(1), model(2), model(3)]
    merged = combined(parents, [1.3, -0.3])
    assert estimated(tmp_path, merged, parents).parts["M00"].shares == pytest.approx([1.3, -0.3])
    held = estimated(tmp_path, merged, parents, simplex=True).parts["M00"]
    assert held.shares == pytest.approx([1.0, 0.0]) and held.residual is not None and held.residual > 0.1
    inside = estimated(tmp_path, combined(parents, [0.2, 0.5]), parents, simplex=True).parts["M00"]
    assert inside.shares == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize(
    ("preset", "rule"),
    [("Cosine", "curve"), ("Cosine", "cut"), ("GradV", "cut"), ("TrueCubicHermite", "curve"), ("Wrap2", "cut"),
     ("SMOOTHSTEP*3", "curve"), ("RING10_3", "curve"), ("R_SMOOTHSTEP/4", "cut")],
)  # fmt: skip
def test_presets_of_pocket_merges_are_recovered(tmp_path: Path, preset: str, rule: Any) -> None:
    """The recovered error, fp16 rounding included: below 0.001 in every block (the worst of 900 blocks was 0.0005)."""
    out = tmp_path / "m.safetensors"
    merge("pocket-style", "pocket-bold", out, preset=preset, base=0.4, xl_presets=rule)
    found = estimate(out, "pocket-style", "pocket-bold")
    true = dict(zip(found.layout.blocks, preset_alphas(preset, 9, 9, rule), strict=True))
    outside = ("time_embed", "label_emb", "clip_l", "clip_g", "text_other")
    true |= dict.fromkeys(outside, 0.4) | {"out": true["OUT08"]}
    apart = {name: abs((found.parts[name].share or 0.0) - share) for name, share in true.items()}
    recovered = {name: far for name, far in apart.items() if name != "out"}
    assert max(recovered.values()) < 0.001, f"recovered error {max(recovered.values()):.5f}"
    # Four small tensors, of 1,179 values in all: rounding leaves less of them.
    assert apart["out"] < 0.01
    assert found.parts["VAE"].share is None and "all parents are equal here" in found.parts["VAE"].why
    near = nearest_preset(found)
    assert near is not None and near.fits and near.worst < 0.001
    assert near.names == ((find_preset(preset).name, rule),)


@pytest.mark.parametrize(("outside", "keep"), [*((rule, ()) for rule in RULES), ("supermerger", ("text",))])
def test_base_and_rule_outside_the_blocks_are_found(tmp_path: Path, outside: Any, keep: tuple[str, ...]) -> None:
    """Or others that make the same tensors: the two VAEs are equal, and what is kept no longer shows a base."""
    out = tmp_path / "m.safetensors"
    merge("pocket-style", "pocket-bold", out, preset="Cosine", base=0.4, outside=outside, keep=keep)
    found = estimate(out, "pocket-style", "pocket-bold")
    near = nearest_preset(found)
    rest = near and rest_of(found, near)
    assert rest is not None
    if not keep:
        same_here = {"mecha": "dodgeburn"}
        assert (rest.outside, rest.keep) == (same_here.get(outside, outside), ())
        assert rest.base == pytest.approx(0.4, abs=0.001)
    base = None if rest.base is None else round(rest.base, 3)
    again = tmp_path / "again.safetensors"
    merge("pocket-style", "pocket-bold", again, preset="Cosine", base=base, outside=rest.outside, keep=rest.keep)
    one, two = load_tensors(out), load_tensors(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_preset_is_named_where_none_fits(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    merge("pocket-style", "pocket-bold", out, preset="Cosine", base=0.4, blocks={"M00": 0.3})
    near = nearest_preset(estimate(out, "pocket-style", "pocket-bold"))
    assert near is not None and not near.fits and near.block == "M00"
    assert near.worst == pytest.approx(0.2, abs=0.001) and near.names == (("Cosine", "curve"),)
    merge("pocket-style", "pocket-bold", out, base=0.35)
    near = nearest_preset(estimate(out, "pocket-style", "pocket-bold"))
    assert near is not None and near.fits and near.names == (("none", None),)


def test_a_model_that_is_no_merge_leaves_a_residual(tmp_path: Path) -> None:
    found = estimated(tmp_path, model(3), [model(1), model(2)])
    assert (found.parts["M00"].residual or 0) > 0.5 and (found.parts["M00"].explained or 0) < 0.5 + 0.1


def test_tensors_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    a, b = model(1), model(2)
    c = combined([a, b], [0.5])
    extra = {ids: torch.arange(4), "model_ema.x": torch.ones(1), f"{U}time_embed.0.bias": torch.ones(2)}
    c |= extra | {f"{U}time_embed.2.bias": torch.ones(3), f"{U}time_embed.4": torch.tensor([float("nan")])}
    b |= extra | {f"{U}time_embed.0.bias": torch.ones(5), f"{U}time_embed.4": torch.ones(1)}
    found = estimated(tmp_path, c, [a | extra | {f"{U}time_embed.4": torch.ones(1), f"{U}out.0": torch.ones(1)}, b])
    assert found.left == {
        "of integers or packed types": [ids],
        "outside the model": ["model_ema.x"],
        "of another shape in a parent": [f"{U}time_embed.0.bias"],
        "not in every parent": [f"{U}time_embed.2.bias"],
        "with NaN or infinite values": [f"{U}time_embed.4"],
        "only in A": [f"{U}out.0"],
    }
    assert found.parts["M00"].share == pytest.approx(0.5)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 8"):
        estimate("pocket", "pocket", "pocket", ["pocket"] * 7)
    part = write(tmp_path / "v.safetensors", {"decoder.x": torch.ones(2)})
    with pytest.raises(UserError, match="no SD1.5 or SDXL checkpoint"):
        estimate(part, part, part)
    sd15 = write(tmp_path / "sd15.safetensors", model(1))
    with pytest.raises(UserError, match="only models of one architecture"):
        estimate("pocket", sd15, sd15)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.safetensors")
    merge("pocket-style", "pocket-bold", out, preset="GradA", base=0.6, xl_presets="cut", keep=["text"])
    before = (tmp_path / "m.safetensors").read_bytes()
    assert main(["merge", "--estimate", out, "pocket-style", "pocket-bold", "--json"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("such a merge: "))
    options = "--preset GradA --xl-presets cut --base 0.6 --keep text"
    assert line.endswith(f"dodgeburn merge pocket-style pocket-bold -o OUT.safetensors {options}")
    found = json.loads(text.splitlines()[-1])
    assert found["nearest"]["fits"] and found["nearest"]["presets"] == [{"name": "GradA", "xl_presets": "cut"}]
    assert found["parts"]["M00"]["shares"] == [1.0] and found["fit"] == "least squares, unconstrained"
    # The command, run, makes the same tensors again.
    command = line.removeprefix("such a merge: dodgeburn ")
    assert main(command.replace("OUT.safetensors", str(tmp_path / "again.safetensors")).split()) == 0
    one, two = load_tensors(out), load_tensors(tmp_path / "again.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    capsys.readouterr()
    assert main(["merge", "--estimate", "pocket-bold", "pocket", "pocket-style", "--simplex"]) == 0
    text = capsys.readouterr().out
    assert "no weighted sum of these" in text and "no published preset fits" in text
    for wrong, named in (("--preset GradV", "--preset"), ("-o x", "--out"), ("--base-model pocket", "--also")):
        assert main(["merge", "--estimate", out, "pocket-style", "pocket-bold", *wrong.split()]) == 2
        assert named in capsys.readouterr().err
    assert main(["merge", "pocket-style", "pocket-bold", "-o", out, "--simplex"]) == 2
