"""Constructive deconstruction as a whole: killed in every stage it ends the same; files, report, commands."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deconstruct_tiny import (
    SHORT,
    ByBrightness,
    reading,
    short_materials,
    short_panel,
    short_run,
    short_spec,
)
from tiny import tiny_model

from dodgeburn.checkpoint.tensorfile import load_tensors, sha256_tensors
from dodgeburn.errors import UserError
from dodgeburn.rework.deconstruct.report import deconstruct_report
from dodgeburn.rework.deconstruct.run import SPEC, is_biased, read_state, write_model
from dodgeburn.rework.deconstruct.spec import load_spec, make_spec
from dodgeburn.rework.deconstruct.stage_log import unet_state

HERE = Path(__file__).parent


def _process(folder: Path, *kill: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE / "deconstruct_tiny.py"), str(folder), *kill], capture_output=True,
                          text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def test_sigkill_in_every_stage_and_again_gives_the_same_hashes(tmp_path: Path) -> None:
    for stage in ("overtrain", "nightshade", "bucket", "retrain"):
        killed = _process(tmp_path / "b", stage, "2")
        assert killed.returncode == -signal.SIGKILL, (stage, killed.stderr[-2000:])
        assert not (tmp_path / "b" / f"{stage}.json").exists()
    again, whole = _process(tmp_path / "b"), _process(tmp_path / "a")
    assert whole.returncode == again.returncode == 0, whole.stderr[-2000:] + again.stderr[-2000:]
    assert whole.stdout == again.stdout and whole.stdout.count("'") > 8
    for name in ("overtrain", "nightshade", "nightshade-first", "nightshade-base", "bucket", "retrain"):
        a, b = (sha256_tensors(tmp_path / side / f"{name}.safetensors") for side in "ab")
        assert a == b, name
    assert not (tmp_path / "b" / "working").exists()
    # every stage left its meters, and told them once
    for stage in ("overtrain", "nightshade", "bucket", "retrain"):
        rows = [json.loads(line) for line in (tmp_path / "b" / f"{stage}.jsonl").read_text().splitlines()]
        assert len({row["key"] for row in rows}) == len(rows) and any("tv" in row for row in rows), stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model()
    before = unet_state(model)
    return short_run(folder, model=model), model, before


def test_the_model_ends_as_the_last_stage_and_only_its_unet_changes(finished) -> None:  # type: ignore[no-untyped-def]
    found, model, before = finished
    last = load_tensors(found.folder / "retrain.safetensors")
    now = unet_state(model)
    assert all(torch.equal(now[k], last[k]) for k in now) and any(not torch.equal(now[k], before[k]) for k in now)
    assert found.steps == 4 + 8 + 6 and found.samples == 8 + 16 + 6 * 4
    others = tiny_model()
    for mine, theirs in ((model.vae, others.vae), *zip(model.text_encoders, others.text_encoders, strict=True)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())


def test_a_finished_run_is_only_loaded_and_another_spec_is_refused(finished) -> None:  # type: ignore[no-untyped-def]
    found, _, _ = finished

    def never(stage: str, step: int, reading: object) -> None:
        raise AssertionError("measured again")

    from dodgeburn.rework.deconstruct.run import deconstruct

    panel = short_panel(found.spec)
    again = deconstruct(
        tiny_model(), found.spec, found.folder, ByBrightness(), short_materials(), panel, tell=never, bias_needed=False
    )
    assert [s.sha256 for s in again.stages] == [s.sha256 for s in found.stages]
    with pytest.raises(UserError, match="other settings"):
        short_run(found.folder, short_spec(retrain={"steps": 6}))


def test_file_card_and_report_say_how_it_was_made(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from dodgeburn.checkpoint.tensorfile import read_header
    from dodgeburn.models.loading import load_model

    found, model, _ = finished
    path = tmp_path / "out.safetensors"
    write_model(model, found, path, "fp32")
    said = json.loads(read_header(path).metadata[SPEC])
    assert [s["sha256"] for s in said["stages"]] == [s.sha256 for s in found.stages]
    assert said["spec"]["overtrain"]["steps"] == 4 and "own definition" in said["what"]
    first = path.read_bytes()
    (tmp_path / "again").mkdir()
    write_model(model, found, tmp_path / "again" / "out.safetensors", "fp32")
    assert (tmp_path / "again" / "out.safetensors").read_bytes() == first
    model.tokenizers[0].save_pretrained(str(tmp_path / "tokenizer"))
    loaded = load_model(str(path), device="cpu", dtype="fp32")
    assert all(torch.equal(v, unet_state(model)[k]) for k, v in unet_state(loaded).items())
    card = path.with_suffix(".md").read_text()
    assert "CLIP skip" in card and "negative" in card and "own" in card and "overtrain" in card
    page = deconstruct_report(found, "tiny").html()
    for text in ("Curves", "1 overtrained", "<svg", "unbeaten", "nightshaded", "confirm"):
        assert text in page, text
    assert page.count("<img") > 40


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    spec = short_spec()
    model = tiny_model()
    half = ByBrightness(0.0)  # everything is light: as far from the target as can be
    from dodgeburn.rework.deconstruct.run import deconstruct

    panel = short_panel(spec)
    fair = replace(panel, concept=replace(panel.concept, target=(0.0, 1.0)))
    found = deconstruct(model, spec, tmp_path, half, short_materials(), fair)
    assert not found.biased and not found.stages and "Nothing to do" in deconstruct_report(found, "tiny").html()
    assert is_biased(reading(tv=0.5), short_panel(spec)) and not is_biased(reading(tv=0.1), short_panel(spec))


def test_a_stage_alone_takes_weights_from_files(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found, _, before = finished
    model = tiny_model()
    spec = short_spec(stages=("bucket",))
    with pytest.raises(UserError, match="nothing to merge"):
        short_run(tmp_path / "a", spec)
    given = {name: read_state(found.folder / f"{name}.safetensors", model) for name in ("overtrain", "nightshade")}
    given["nightshade-base"] = read_state(found.folder / "nightshade-base.safetensors", model)
    alone = short_run(tmp_path / "b", spec, model=model, given=given)
    assert alone.stages[0].sha256 == found.stages[2].sha256  # as in the whole run
    wrong = {k: v for k, v in before.items() if "conv_out" not in k}
    from dodgeburn.checkpoint.tensorfile import save_tensors

    save_tensors(tmp_path / "wrong.safetensors", wrong, {})
    with pytest.raises(UserError, match="does not fit"):
        read_state(tmp_path / "wrong.safetensors", model)


def test_no_run_writes_poison_unasked(finished) -> None:  # type: ignore[no-untyped-def]
    found, _, _ = finished
    written = {path.suffix for path in found.folder.rglob("*") if path.is_file() and path.parent.name != "strips"}
    assert written <= {".json", ".jsonl", ".safetensors"}


# -------------------- command line


OWN_TOKENIZER = HERE.parent / "dodgeburn" / "pocket" / "tokenizer"


def test_bad_commands_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.main import main

    example = str(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    out = str(tmp_path / "out")
    for args, message in (
        (["overtrian"], "did you mean overtrain"), (["run", example], "no output"),
        (["run", str(tmp_path / "none.yaml"), "-o", out], "is not there"),
        (["overtrain", example, "-o", out, "--export-poison", "x"], "no effect"),
        (["run", example, "-o", out, "--overtrained", "x"], "no effect"),
        (["run", example, "-o", out, "--begin", "x"], "for retrain alone"),
    ):  # fmt: skip
        assert main(["deconstruct", *args]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
    assert main(["deconstruct", "--help"]) == 0 and "example:" in capsys.readouterr().out


def test_a_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retraining alone, as short as can be, on the pocket, with another tokenizer's folder."""
    from dodgeburn.cli.main import main
    from dodgeburn.models import loading
    from dodgeburn.models.loading import load_model

    asked = []
    monkeypatch.setattr(loading, "load_model", lambda *args: asked.append(args[3]) or load_model(*args))

    (tmp_path / "spec.yaml").write_text(
        "concept: {prompts: [a doctor], attribute: glasses, values: {glasses: wearing glasses, none: no glasses}}\n"
        "data: {each: 4, others: 8, held_out: 8}\n"
        "watching: {pairs: 8, neutral: 8, quick: 8, each: 2, steps: 2}\n"
        "retrain: {steps: 2, every: 2, batch: 4, prior_points: 4, prior_batch: 2, polish_steps: 0}\n"
    )
    folder = tmp_path / "out"
    more = ["--tokenizer", str(OWN_TOKENIZER), "--json"]
    assert main(["deconstruct", "retrain", str(tmp_path / "spec.yaml"), "-o", str(folder), *more]) == 0
    assert asked == [OWN_TOKENIZER]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["stage"] for s in result["stages"]] == ["retrain"] and result["steps"] == 2
    assert "Constructive deconstruction" in (folder / "report.html").read_text()
    assert "CLIP skip" in (folder / "deconstructed.md").read_text()
    model = load_model(str(folder / "deconstructed.safetensors"), device="cpu")
    assert SPEC in model.metadata


# -------------------- specs


def test_the_example_reads_and_bad_specs_are_one_line(tmp_path: Path) -> None:
    spec = load_spec(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    assert spec.concept.shares == (0.5, 0.5) and spec.stages == ("overtrain", "nightshade", "bucket", "retrain")
    concept = SHORT["concept"]
    for said, message in (
        ({}, "concept is missing"), ({"concept": concept, "stagse": 1}, "stagse is not known: did you mean stages"),
        ({"concept": {**concept, "values": {"dark": "dark"}}}, "concept.values"),
        ({"concept": {**concept, "target": {"dark": 1}}}, "a share for each"),
        ({"concept": {**concept, "target": {"dark": 0.9, "light": 0.9}}}, "sums to 1.8"),
        ({"concept": {**concept, "prompts": []}}, "concept.prompts"),
        ({"concept": concept, "stages": ["retrain", "bucket"]}, "in order"),
        ({"concept": concept, "data": {"source": "folder"}}, "belong together"),
        ({"concept": concept, "overtrain": {"loss_low": 5.0}}, "not below"),
        ({"concept": concept, "bucket": {"scales": [-0.6]}}, "from -0.5 to 1"),
        ({"concept": concept, "bucket": {"method": "slerp"}}, "from 0 to 1"),
        ({"concept": concept, "nightshade": {"poison": 1.0}}, "nightshade.poison"),
        ({"concept": concept, "name": "retrain"}, "a stage's own file"),
        ({"concept": concept, "name": "../evil"}, "no name for a file"),
        ({"concept": concept, "name": ""}, "no name for a file"),
        ({"concept": {**concept, "target": {"dark": math.nan, "light": 0.5}}}, "concept.target"),
        ({"concept": concept, "watching": {"guidance": math.nan}}, "watching.guidance"),
        ({"concept": concept, "overtrain": {"base_lr": math.inf}}, "overtrain.base_lr"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
            make_spec(said)
        assert "\n" not in str(caught.value)
    lacking = make_spec({"concept": {**concept, "attribute": "moustache"}})
    with pytest.raises(UserError, match="the spec's concept: 'moustache' is no attribute"):
        lacking.concept.concept(pocket=True)
    for text in ("", "[1]", "a: ["):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError):
            load_spec(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="is not there"):
        load_spec(tmp_path / "none.yaml")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    said = {"concept": SHORT["concept"], "clip": "clip", "nightshade": {"export": "poison"}, "model": "own.safetensors",
            "data": {"source": "folder", "folder": "mine"}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(said))
    found = load_spec(tmp_path / "run.yaml")
    assert (found.clip, found.nightshade.export, found.data.folder) == (
        tmp_path / "clip", tmp_path / "poison", tmp_path / "mine",
    )  # fmt: skip
    assert found.model == "own.safetensors"  # not there: a packaged name, or a hub id
    (tmp_path / "own.safetensors").write_bytes(b"")
    assert load_spec(tmp_path / "run.yaml").model == str(tmp_path / "own.safetensors")
