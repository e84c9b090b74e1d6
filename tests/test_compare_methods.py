"""compare of any merge method: live is what a file would be, variants described in files, the command of a variant."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_pair import live_merge, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import PROMPTS, ColourReader, no_plots
from tiny import tiny_model, tiny_tokenizer

from dodgeburn.cli.compare import main
from dodgeburn.cli.merge import main as merge_main
from dodgeburn.errors import UserError
from dodgeburn.merge.command import merge_command
from dodgeburn.merge.compare import CompareSettings, Comparison, compare
from dodgeburn.merge.methods import METHODS
from dodgeburn.merge.methods.table import apply
from dodgeburn.merge.run import merge
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.merge.variants import MethodChoice, Variant, grid, read_variants
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from dodgeburn.sampling.loop import GenerateSettings

QUICK = GenerateSettings(steps=1, guidance=1.0, width=64, height=64)
assert no_plots  # a fixture of that module, used by all tests here too


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> dict[str, Path]:
    """Files a, b, c, d and their base o, a and c in half precision."""
    folder = tmp_path_factory.mktemp("models")
    tiny_tokenizer().save_pretrained(str(folder / "tokenizer"))
    for seed, name in enumerate("abcdo"):
        dtype = torch.float16 if name in "ac" else torch.float32
        save_single_file(tiny_model(seed=seed), folder / f"{name}.safetensors", dtype=dtype)
    return {name: folder / f"{name}.safetensors" for name in "abcdo"}


def models_of(name: str, five: dict[str, Path]) -> tuple[list[str], list[str]]:
    """(names of the further models, those of the base) that a method is tried with."""
    most = METHODS[name].models[1]
    return ["C", "D"][: max(0, most - 2)], ["O"] if METHODS[name].needs_base else []


# ------------------------------------------------------------------------------------------------------- live merging


@pytest.mark.parametrize("name", METHODS)
def test_every_method_live_is_its_file_bit_for_bit(five, tmp_path, name) -> None:
    model = load_model(five["a"], "cpu")
    before = weights(model)
    live = live_merge(model, five["b"], five["c"], five["d"], five["o"])
    more, base = models_of(name, five)
    paths = {"C": five["c"], "D": five["d"], "E": five["o"]}
    chosen = MergeSettings(method=name, preset="Smoothstep", base=0.3, blocks={"M00": 1.0}, keep=("vae",))
    if name != "weighted_sum":
        chosen = chosen.but(clip=True, preset=None, rules=("OUT00-OUT02:in_layers:0.9",))
    if METHODS[name].random:
        chosen = chosen.but(seed=5)
    for settings_, again in ((chosen, False), (chosen.but(base=0.6, dtype="bf16"), True)):
        live.apply(live.plan(settings_, more, "E" if base else None))
        merge(five["a"], five["b"], tmp_path / "m.safetensors", settings_, more=[paths[m] for m in more],
              base_model=five["o"] if base else None)  # fmt: skip
        written = load_model(tmp_path / "m.safetensors", "cpu", tokenizer=five["a"].parent / "tokenizer")
        assert same(weights(model), weights(written)), f"second: {again}"
    live.restore()
    assert same(weights(model), before)


def test_methods_follow_one_another_without_a_trace(five) -> None:
    def run(limit: int | None, order: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        model = load_model(five["a"], "cpu")
        live = live_merge(model, five["b"], five["c"], five["d"], five["o"], limit=limit)
        found = {}
        for name in order:
            more, base = models_of(name, five)
            found[name] = live.apply(live.plan(MergeSettings(method=name, base=0.4), more, "E" if base else None))
            found[name] = weights(model)
        return found

    names = ["ties", "dare", "slerp", "weighted_sum", "model_stock", "rotate", "ties"]
    one, two = run(None, names), run(0, names[::-1])
    assert all(same(one[name], two[name]) for name in names)
    assert not same(one["ties"], one["dare"]) and not same(one["slerp"], one["weighted_sum"])


def test_dear_parts_are_shared_and_reads_counted(five, monkeypatch) -> None:
    calls: list[float] = []
    from dodgeburn.merge import live as module

    monkeypatch.setattr(module, "apply", lambda *args: calls.append(args[2]) or apply(*args))
    for limit, reads in ((None, 1.0), (0, 4.0)):
        model = load_model(five["a"], "cpu")
        live = live_merge(model, five["b"], five["o"], limit=limit)
        calls.clear()
        for base in (0.2, 0.4, 0.6, 0.8):
            live.apply(live.plan(MergeSettings(method="ties", base=base), (), "C"))
        times = 1 if limit is None else 4
        assert len(calls) == times * len(live.shelf.models["A"].header.tensors) and set(calls) == {1.0}
        assert live.shelf.full_reads == pytest.approx(reads, rel=0.6) and live.shelf.full_reads >= reads


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.lerps])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), alpha=st.floats(0, 1))
def test_methods_that_lerp_do(name, seed, alpha) -> None:
    method, draw = METHODS[name], torch.Generator().manual_seed(seed)
    *models, base = (torch.randn(7, 5, generator=draw) for _ in range(4))
    one, two = torch.empty(7, 5), torch.empty(7, 5)
    apply(method, models, 1.0, one, base, method.check_params({}), seed, "k")
    apply(method, models, alpha, two, base, method.check_params({}), seed, "k")
    assert torch.equal(torch.lerp(models[0], one, alpha), two)


def test_equal_merges_have_equal_fingerprints_and_others_do_not(five) -> None:
    model = load_model(five["a"], "cpu")
    live = live_merge(model, five["b"], five["o"])

    def of(**options) -> frozenset:
        base = "C" if METHODS[options.get("method", "weighted_sum")].needs_base else None
        return live.fingerprint(live.plan(MergeSettings(**options), (), base))

    assert of(base=0.0) == live.fingerprint(live.plan_a()) == frozenset()
    assert of(base=1.0) == live.fingerprint(live.plan_b()) == of(method="slerp", base=1.0)
    assert of(base=0.5) == of(base=0.5, rules=["::0.5"]) == of(preset="GradV", base=0.5, rules=["::0.5"])
    different = [of(base=0.5), of(base=0.5, rules=["IN01:in_layers:0.1"]), of(base=0.5, rules=["IN01:out_layers:0.1"]),
                 of(method="slerp", base=0.5), of(method="ties", base=0.5), of(base=0.5, dtype="bf16"),
                 of(method="ties", base=0.5, params={"density": 0.3}), of(method="dare", base=0.5),
                 of(method="dare", base=0.5, seed=1), of(method="ties", base=0.5, clip=True)]  # fmt: skip
    assert len(set(different)) == len(different)


# --------------------------------------------------------------------------------------------------- what is compared


def test_methods_are_read_and_written_as_text() -> None:
    choice = MethodChoice.parse("TIES:density=0.1:strength=2:clip")
    assert choice == MethodChoice(method="ties", params={"density": 0.1, "strength": 2.0}, clip=True)
    assert MethodChoice.parse(str(choice)) == choice and str(MethodChoice.parse("dare:seed=7")) == "dare:seed=7"
    for bad, word in (("tie", "ties"), ("ties:densty=0.1", "density"), ("ties:density=x", "NAME=NUMBER"),
                      ("ties:density=2", "0.2|1"), ("slerp:clp", "NAME=NUMBER")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            MethodChoice.parse(bad)


def test_grid_gives_methods_the_models_they_take() -> None:
    methods = [MethodChoice.parse(t) for t in ("slerp", "triple_sum", "ties:density=0.1")]
    found = grid(methods, ["GradV", "none"], [None, 0.4], ("vae",), "cut", ["c", "d"], "o")
    assert [v.name for v in found[:4]] == ["slerp-GradV-0.5", "slerp-0.5", "slerp-GradV-0.4", "slerp-0.4"]
    assert found[0].more == () and found[0].base_model is None and found[0].merge.xl_presets == "cut"
    assert found[1].merge.xl_presets == "curve" and found[1].merge.preset is None
    assert found[4].more == ("c",) and found[8].more == ("c", "d") and found[8].base_model == "o"
    assert found[8].name == "ties-density-0.1-GradV-1" and len(found) == 12


def test_models_without_effect_and_taken_names_are_refused() -> None:
    chosen = CompareSettings(prompts=("x",), methods=("slerp",))
    with pytest.raises(UserError, match=r"c\.safetensors has no effect"):
        chosen.all_variants(["c.safetensors"])
    twice = [Variant(name=name, merge=MergeSettings()) for name in ("One", "one")]
    for variants, word in ((twice, "two variants"), (twice[:1] + [Variant(name="a/b", merge=MergeSettings())], "a/b"),
                           ([Variant(name="b", merge=MergeSettings())], "taken"),
                           ([Variant(name="search-1", merge=MergeSettings())], "search")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            CompareSettings(prompts=("x",), presets=(), bases=(), methods=(), variants=variants).all_variants()


TOML = """
[defaults]
keep = ["text", "vae"]
base = 0.5

[[variant]]
name = "thin"
method = "ties"
params = { density = 0.1 }

[[variant]]
name = "plain"
preset = "GradV"
base = 0.25
blocks = { M00 = 0.9 }
rules = ["IN01:in_layers:0"]
"""


@pytest.mark.parametrize("kind", ["toml", "yaml", "json"])
def test_variants_are_read_from_files(tmp_path, kind) -> None:
    import tomllib

    import yaml

    data = tomllib.loads(TOML)
    path = tmp_path / f"v.{kind}"
    path.write_text({"toml": TOML, "yaml": yaml.safe_dump(data), "json": json.dumps(data)}[kind])
    thin, plain = read_variants(path, ["c"], "o")
    assert thin.merge == MergeSettings(method="ties", params={"density": 0.1}, base=0.5, keep=("text", "vae"))
    assert thin.more == ("c",) and thin.base_model == "o" and plain.more == () and plain.base_model is None
    assert plain.merge.blocks == {"M00": 0.9} and plain.base == 0.25 and plain.merge.rules == ("IN01:in_layers:0",)


@pytest.mark.parametrize(
    "text, word",
    [("", "no list"), ("[[variant]]\nmethod='slerp'", "variant 1 has no name"), ("variant = 3", "no list"),
     ("[[variant]]\nname='x'\nmethod='slrp'", "variant x: .*slerp"), ("[[variant]]\nname='x'\npreest=1", "preest"),
     ("[[variant]]\nname='x'\nbase=2", "variant x: .*0 .*1"), ("[[variants]]\nname='x'", "no list"), ("= 1", "read"),
     ("[[variant]]\nname='x'\n[other]\ny=1", "other"), ("[[variant]]\nname='x'\nalso=3", "variant x")],
)  # fmt: skip
def test_bad_files_of_variants(tmp_path, text, word) -> None:
    (tmp_path / "v.toml").write_text(text)
    with pytest.raises(UserError, match=word):
        read_variants(tmp_path / "v.toml")


def test_hostile_files_of_variants(tmp_path) -> None:
    (tmp_path / "v.yaml").write_text("variant: !!python/object/apply:os.system ['true']")
    (tmp_path / "v.json").write_text("[" * 100_000)
    (tmp_path / "v.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "v.txt").write_text(TOML)
    for name in ("v.yaml", "v.json", "v.toml", "v.txt", "missing.toml"):
        with pytest.raises(UserError, match=name):
            read_variants(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ the job


@pytest.fixture(scope="module")
def result(five, tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("job")
    (folder / "v.toml").write_text(TOML)
    chosen = CompareSettings(
        presets=("none",), bases=(None,), methods=("slerp", "dare:seed=3"), prompts=PROMPTS, seeds=(0, 1),
        generate=QUICK, variants=read_variants(folder / "v.toml", [str(five["c"])], str(five["o"])),
    )  # fmt: skip
    return compare(five["a"], five["b"], chosen, folder / "out", "cpu", reader=ColourReader(),
                   more=[five["c"]], base_model=five["o"])  # fmt: skip


def test_rows_say_method_and_name(result) -> None:
    found = json.loads(Path(result.files["results"]).read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"slerp-0.5", "dare-seed-3-1", "thin", "plain"}
    assert rows["thin"]["method"] == "ties:density=0.1" and rows["plain"]["method"] == "weighted_sum"
    assert rows["slerp-0.5"]["preset"] is None and rows["slerp-0.5"]["base"] == 0.5
    assert rows["plain"]["preset"] == "GradV" and rows["dare-seed-3-1"]["base"] == 1.0
    assert all(row["fidelity_ci"] and row["resemblance_a"] is not None for row in rows.values())
    assert 0 < found["full_reads"] < 4 and found["merges"]["thin"]["base_model"] == "o.safetensors"
    page = (result.folder / "report.html").read_text()
    assert "ties:density=0.1" in page and "slerp" in page
    others = [p for p in result.folder.rglob("*") if p.suffix in (".json", ".csv", ".npz") and p.is_file()]
    folder = str(Path(result.typed["A"]).parent)
    assert len(others) > 7 and not any(folder.encode() in p.read_bytes() for p in others)


def test_the_command_writes_the_very_variant(result, five, tmp_path) -> None:
    model = load_model(five["a"], "cpu")
    live = live_merge(model, five["b"], five["c"], five["o"])
    for name, models in (("thin", (["C"], "D")), ("plain", ([], None)), ("dare-seed-3-1", (["C"], "D"))):
        command = merge_command(result.variants[name], result.typed, str(tmp_path / f"{name}.safetensors"))
        words = shlex.split(command)
        assert words[:2] == ["dodgeburn", "merge"] and str(five["a"]) in words
        assert merge_main(words[2:]) == 0
        live.apply(live.plan(result.variants[name].merge, *models))
        written = load_model(tmp_path / f"{name}.safetensors", "cpu", tokenizer=five["a"].parent / "tokenizer")
        assert same(weights(model), weights(written))
    best = merge_command(result.variants[result.rows[0].name], result.typed)
    from html import escape

    assert escape(best) in (result.folder / "report.html").read_text()


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(["weighted_sum", "ties", "della"]), base=st.none() | st.floats(0, 1),
    preset=st.none() | st.sampled_from(["GradV", "SmoothstepTimes2", "Cosine:GradV:0.3"]),
    outside=st.sampled_from(["dodgeburn", "mbw", "comfyui"]), shares=st.lists(st.floats(0, 1), max_size=3),
    keep=st.sampled_from([(), ("vae",), ("text", "vae")]), seed=st.integers(0, 9), clip=st.booleans(),
    dtype=st.none() | st.just("fp16"), density=st.none() | st.floats(0.1, 0.9),
)  # fmt: skip
def test_options_are_read_back_as_they_were(
    method, base, preset, outside, shares, keep, seed, clip, dtype, density
) -> None:
    from dodgeburn.cli.merge import Merge, _settings
    from dodgeburn.cli.options import parse

    params = {} if density is None or method == "weighted_sum" else {"density": density}
    chosen = MergeSettings(
        method=method, base=base, preset=preset, blocks={f"IN0{i}": s for i, s in enumerate(shares)}, keep=keep,
        seed=seed, clip=clip, dtype=dtype, params=params, components={"clip_l": 0.25} if "text" not in keep else {},
        rules=("NOT M00:NOT norm:0.2", "::0.3"), outside=outside,
    )  # fmt: skip
    words = shlex.split(merge_command(Variant(name="x", merge=chosen), {"A": "a b", "B": "b"}))
    parsed = parse(Merge, words[2:], "merge", "")
    assert _settings(parsed) == chosen and (parsed.a, parsed.b) == ("a b", "b")


def test_command_line_compares_methods(five, tmp_path, capsys) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text(PROMPTS[0])
    common = ["--prompts", str(prompts), "--seeds", "3", "--steps", "1", "--guidance", "1", "--device", "cpu", "--json",
              "--width", "64", "--height", "64"]  # fmt: skip
    code = main([str(five["a"]), str(five["b"]), "--methods", "slerp,ties:density=0.3", "--bases", "default,0.4",
                 "--base-model", str(five["o"]), "-o", str(tmp_path / "out"), *common])  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {row["name"] for row in found["rows"]}
    assert code == 0 and names == {"slerp-0.5", "slerp-0.4", "ties-density-0.3-1", "ties-density-0.3-0.4"}
    (tmp_path / "v.toml").write_text(TOML)
    main([str(five["a"]), str(five["b"]), "--variants", str(tmp_path / "v.toml"), "--base-model", str(five["o"]),
          "-o", str(tmp_path / "two"), *common])  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"] for row in found["rows"]} == {"thin", "plain"}
    with pytest.raises(UserError, match="ties.*base model"):
        main([str(five["a"]), str(five["b"]), "--methods", "ties", "-o", str(tmp_path / "three"), *common])
    assert not (tmp_path / "three").exists()


def test_changed_variant_is_made_again_only_in_its_own_folder(result, five) -> None:
    other = result.settings.model_copy(update={"variants": result.settings.variants[:1]})
    with pytest.raises(UserError, match="other settings .*variants"):
        compare(five["a"], five["b"], other, result.folder, "cpu", reader=ColourReader(), more=[five["c"]],
                base_model=five["o"])  # fmt: skip


def test_same_seed_gives_the_same_random_merge(result, five, tmp_path) -> None:
    chosen = result.settings.model_copy(update={"variants": (), "methods": (MethodChoice.parse("dare:seed=3"),)})
    again = compare(five["a"], five["b"], chosen, tmp_path / "out", "cpu", reader=ColourReader(), more=[five["c"]],
                    base_model=five["o"])  # fmt: skip
    assert np.array_equal(again.pictures("dare-seed-3-1"), result.pictures("dare-seed-3-1"))


def test_example_file_is_read() -> None:
    found = read_variants(Path(__file__).parents[1] / "examples" / "variants.toml", (), "pocket")
    assert [v.name for v in found] == ["half", "details-from-b", "thin-task-vectors", "attention-only"]
    assert [v.base_model for v in found] == [None, None, "pocket", None]
