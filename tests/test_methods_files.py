"""Every merge method on files, and hostile settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_merge import left, same
from tiny_checkpoints import CONV_IN, small

from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.tensorfile import TensorFile, load_tensors, save_tensors, sha256_file
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.methods import METHODS, merge_tensors
from dodgeburn.merge.rules import parse_rules
from dodgeburn.merge.run import dry_run, merge
from dodgeburn.merge.tiles import tiles

# ---- files


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    out = {}
    for seed, name in enumerate("abco"):
        out[name] = tmp_path / f"{name}.safetensors"
        save_tensors(out[name], small(seed), {})
    return out


def arguments(method: str, four: dict[str, Path]) -> dict[str, object]:
    entry = METHODS[method]
    return {
        "method": method,
        "more": [four["c"]] if entry.models[1] > 2 else [],
        "base_model": four["o"] if entry.needs_base else None,
    }


@pytest.mark.parametrize("method", list(METHODS))
def test_files_hold_what_the_function_gives_at_any_number_of_threads(
    method: str, four: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dodgeburn.merge.tiles.TILE", 4)
    digests = set()
    for threads in (1, 3):
        out = tmp_path / str(threads) / "m.safetensors"
        out.parent.mkdir()
        merge(four["a"], four["b"], out, base=0.4, threads=threads, **arguments(method, four))  # type: ignore[arg-type]
        digests.add(sha256_file(out))
    assert len(digests) == 1
    tensors = {name: load_tensors(path) for name, path in four.items()}
    names = "abc" if METHODS[method].models[1] > 2 else "ab"
    found = load_tensors(out)
    for key in found:
        base = tensors["o"][key] if METHODS[method].needs_base else None
        expected = merge_tensors([tensors[n][key] for n in names], 0.4, method, base, key=key)
        assert torch.equal(found[key], expected), key


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_nan_and_infinity_in_any_model(
    method: str, clip: bool, value: float, four: dict[str, Path], tmp_path: Path
) -> None:
    if clip and method == "weighted_sum":
        return
    settings = arguments(method, four) | {"clip": clip}
    names = "ab" + ("c" if METHODS[method].models[1] > 2 else "") + ("o" if METHODS[method].needs_base else "")
    for name in names:
        good = four[name].read_bytes()
        tensors = load_tensors(four[name])
        tensors[CONV_IN][2, 1] = value
        save_tensors(four[name], tensors, {})
        with pytest.raises(UserError, match=f"tensor {CONV_IN} of {name}.safetensors has NaN"):
            merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0.4, **settings)  # type: ignore[arg-type]
        four[name].write_bytes(good)


def test_small_tensors_share_a_tile_and_errors_still_name_one(four: dict[str, Path], tmp_path: Path) -> None:
    plan = dry_run(four["a"], four["b"], base=0.3, rules=["OUT00::0.1"])[0]
    with TensorFile(four["a"]) as a, TensorFile(four["b"]) as b:
        found = list(tiles(plan, [a, b]))
    assert [w.name for tile in found for w in tile.works] == [w.name for w in plan.work]
    assert 1 < len(found) < len(plan.work)
    assert all(tile.count == sum(w.info.numel for w in tile.works) for tile in found)
    key = "model.diffusion_model.out.2.bias"
    large = {k: t.float() * (1e6 if k == key else 1) for k, t in load_tensors(four["b"]).items()}
    save_tensors(four["b"], large, {})
    with pytest.raises(UserError, match=f"{key} of the result is too large for F16"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0.3)
    merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0.3, dtype="bf16")


def test_float8_does_not_cut_off_what_is_too_large(four: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_tensors(four["b"])
    tensors[CONV_IN][0, 0] = 2000.0
    save_tensors(four["b"], tensors, {})
    with pytest.raises(UserError, match=f"{CONV_IN} of the result is too large for F8_E4M3"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0.5, dtype="fp8_e4m3fn")


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].zero_is_a])
def test_alpha_zero_is_a_in_files(method: str, four: dict[str, Path], tmp_path: Path) -> None:
    with pytest.warns(DodgeburnWarning, match="takes anything from B"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0, **arguments(method, four))  # type: ignore[arg-type]
    assert same(load_tensors(tmp_path / "m.safetensors"), load_tensors(four["a"]))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8_e4m3fn"])
def test_output_types(dtype: str, four: dict[str, Path], tmp_path: Path) -> None:
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}
    merge(four["a"], four["b"], tmp_path / "m.safetensors", base=0.3, keep=["vae"], dtype=dtype)
    a, b, out = load_tensors(four["a"]), load_tensors(four["b"]), load_tensors(tmp_path / "m.safetensors")
    for key in a:
        wide = a[key].float() if "first_stage" in key else torch.lerp(a[key].float(), b[key].float(), 0.3)
        # As `convert` has it: fp8 visibly spoils a VAE, and norms and biases are small.
        fine = dtype.startswith("fp8") and (wide.ndim < 2 or "first_stage" in key)
        kind = torch.float16 if fine else kinds[dtype]
        assert out[key].dtype == kind and torch.equal(out[key].float(), wide.to(kind).float())
    assert dtype != "fp8_e4m3fn" or {t.dtype for t in out.values()} == {torch.float16, torch.float8_e4m3fn}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_bytes_of_b_in_another_type_than_a(
    dtype: str, four: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dodgeburn.merge.tiles.TILE", 8)  # tensors of two tiles, and some that share one
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    save_tensors(four["b"], small(1, kind), {})
    for other in {torch.float16, torch.float32} - {kind}:
        save_tensors(four["a"], small(0, other), {})
        result = merge(four["a"], four["b"], tmp_path / "m.safetensors", base=1, keep=["vae"], dtype=dtype)
        assert {w.action for w in result.plan.work} == {"copy_b", "cast_a"}
        expected = small(1, kind) | {k: t.to(kind) for k, t in small(0, other).items() if k.startswith("first_stage")}
        assert same(load_tensors(tmp_path / "m.safetensors"), expected)


def test_rules_and_components(four: dict[str, Path], tmp_path: Path) -> None:
    merge(
        four["a"], four["b"], tmp_path / "m.safetensors", base=0.5, components={"clip_g": 1, "vae": 0},
        rules=["IN00-IN01:NOT layers:0", "M00::1", "NOT IN00,M00,IN01:emb:0"],
    )  # fmt: skip
    a, b, out = load_tensors(four["a"]), load_tensors(four["b"]), load_tensors(tmp_path / "m.safetensors")
    from_a, from_b = [CONV_IN, "time_embed", "label_emb", "first_stage"], ["middle_block", "embedders.1"]
    for key in a:
        of_a, of_b = any(w in key for w in from_a), any(w in key for w in from_b)
        # "embedders" has "emb" too: the last rule that matches wins over the component
        if "embedders" in key:
            of_a, of_b = True, False
        expected = a[key] if of_a else b[key] if of_b else merge_tensors([a[key], b[key]], 0.5)
        assert torch.equal(out[key], expected), key


def test_rules_that_are_wrong(four: dict[str, Path]) -> None:
    layout = detect_layout(small(0))
    for text, message in (
        ("IN00:0.3", "is not BLOCKS"), ("IN07::1", "no block 'IN07'"), ("IN00::2", "expected a number from 0"),
        ("OUT00-IN00::1", "comes after"), ("NOT::1", "without anything"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            parse_rules([text], layout)
    with pytest.raises(UserError, match="matches no tensor"):
        dry_run(four["a"], four["b"], rules=[":nothing:0.5"])
    with pytest.raises(UserError, match="no component 'clip'"):
        dry_run(four["a"], four["b"], components={"clip": 0.5})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "tie"}, "expected one of ties"),
        ({"method": "ties"}, "needs the model that the others were tuned from"),
        ({"method": "triple_sum"}, "takes 3 models"),
        ({"base_model": "o"}, "no effect: weighted_sum takes none"),
        ({"more": ["c"]}, "takes 2 models"),
        ({"params": {"beta": 0.5}}, "has no parameter 'beta': it has none"),
        ({"method": "dare", "base_model": "o", "params": {"density": 0.0}}, "density is 0.0"),
        ({"seed": 1}, "seed has no effect"),
        ({"clip": True}, "clipping has no effect"),
        ({"dtype": "int8"}, "no output type"),
    ],
)
def test_settings_that_are_wrong(wrong: dict[str, object], message: str, four: dict[str, Path], tmp_path: Path) -> None:
    if "base_model" in wrong:
        wrong = wrong | {"base_model": four["o"]}
    if "more" in wrong:
        wrong = wrong | {"more": [four["c"]]}
    before = left(tmp_path)
    with pytest.raises(UserError, match=message):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", **wrong)  # type: ignore[arg-type]
    assert left(tmp_path) == before


def test_hostile_third_models(four: dict[str, Path], tmp_path: Path) -> None:
    bad = small(2)
    bad[CONV_IN] = torch.zeros(4, 9).half()
    save_tensors(tmp_path / "shape", bad, {})
    with pytest.raises(UserError, match=rf"{CONV_IN} of shape is \[4, 9\] instead of \[4, 4\]"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", method="average", more=[tmp_path / "shape"])
    bad[CONV_IN] = torch.full((4, 4), float("nan")).half()
    save_tensors(tmp_path / "nan", bad, {})
    with pytest.raises(UserError, match=f"{CONV_IN} of nan has NaN"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", method="average", more=[tmp_path / "nan"])
    bad = small(2)
    del bad["model.diffusion_model.out.2.bias"]
    save_tensors(tmp_path / "less", bad, {})
    with pytest.warns(DodgeburnWarning, match="1 tensor not in every other model"):
        merge(four["a"], four["b"], tmp_path / "m.safetensors", method="average", more=[tmp_path / "less"])
    with pytest.raises(UserError, match="also an input"):
        merge(four["a"], four["b"], four["o"], method="add_difference", base_model=four["o"])


def test_command_line(four: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.merge import main

    a, b, c, o = (str(four[n]) for n in "abco")
    args = [a, b, "--also", c, "--base-model", o, "--method", "ties", "--param", "density=0.5"]
    assert main([*args, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "density = 0.5" in said and "c.safetensors" in said and "MB of memory" in said
    out = tmp_path / "m.safetensors"
    assert main([*args, "-o", str(out), "--rule", "M00::0", "--component", "vae=0", "--dtype", "bf16"]) == 0
    assert "ties" in capsys.readouterr().out and load_tensors(out)[CONV_IN].dtype == torch.bfloat16
    assert main([a, b, "--dry-run"]) == 0 and "A 50 % + B 50 %" in capsys.readouterr().out
    with pytest.raises(UserError, match="not NAME=NUMBER"):
        main([*args, "-o", str(tmp_path / "n"), "--param", "density"])
