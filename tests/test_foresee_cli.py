"""`artifacts train`, `score`, `evaluate` and `generate --foresee`, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from foresee_store import made_up_store

from dodgeburn.cli.generate_foresee import spelled_out
from dodgeburn.cli.main import main
from dodgeburn.foresee.estimator import PACKAGED, Estimator
from dodgeburn.foresee.shards import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_up_store(tmp_path_factory.mktemp("cli") / "store", prompts=40)


def test_train_score_and_evaluate(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dodgeburn.foresee.train.LEAST_STEPS", 120)
    monkeypatch.setattr("dodgeburn.foresee.train.WARMUP", 20)
    folder, out = str(store.folders[0]), tmp_path / "foresee.safetensors"
    assert main(["artifacts", "train", folder, "-o", str(out), "--steps", "120", "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["generators"] == ["damaged", "sound"] and made["rules"]["chosen"] in made["rules"]["rules"]
    assert out.stat().st_size < 1_000_000 and Estimator.load(out).record["policy"]

    again = tmp_path / "again.safetensors"
    assert main(["artifacts", "train", folder, "--network", str(out), "-o", str(again)]) == 0
    assert f"the network is that of {out}; rules chosen on" in capsys.readouterr().out
    old, new = Estimator.load(out), Estimator.load(again)
    assert all(torch.equal(a, b) for a, b in zip(old.network.parameters(), new.network.parameters(), strict=True))

    lines = tmp_path / "scores.jsonl"
    assert main(["artifacts", "score", folder, "-e", str(out), "-o", str(lines), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert said["trajectories"] == len(rows) == 320 and all(len(r["bad"]) == len(r["progress"]) for r in rows)

    assert main(["artifacts", "score", folder, "-e", str(out), "--maps", str(tmp_path / "maps.png")]) == 2
    assert "--maps: this" in (said := capsys.readouterr().err) or "without their pictures" in said
    assert not (tmp_path / "maps.png").exists()

    assert main(["artifacts", "evaluate", folder, "-e", str(out), "--against", folder, "--json"]) == 0
    graded = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert graded["pictures"] == 80 and graded["figures"]["auroc_50"]["low"] < graded["figures"]["auroc_50"]["value"]
    assert set(graded["margin_25"]) == {"value", "low", "high"}


@pytest.mark.parametrize(
    "args, message",
    [
        (["train"], "no trajectories: name folders"),
        (["train", "STORE", "--steps", "50"], "50 optimiser steps: give at least 1500"),
        (["train", "STORE", "-o", "x.json"], "must end in .safetensors"),
        (["train", "STORE", "--inputs", "pixels"], "inputs are pixels: expected some of x_t"),
        (["train", "nowhere"], "nowhere: no such folder"),
        (["train", "STORE", "--network", "SHARD"], "no estimator of artifacts"),
        (["train", "STORE", "--network", str(PACKAGED)], "28 features, the estimator was trained on"),
        (["train", "STORE", "--network", str(PACKAGED), "--drawings", "9"], "have no effect with it"),
        (["collect", "x", "--ratings", "r.jsonl", "--look-ahead", "3"], "no effect with --ratings"),
        (
            ["collect", "x", "--ratings", "r.jsonl", "--trajectories", "9", "--hold-out", "x"],
            "--trajectories, --hold-out",
        ),
        (["collect", "x", "--no-replay"], "no effect without --ratings"),
        (["collect", "x", "--look-ahead", "-1"], "ahead is -1"),
        (["train", "STORE", "--without", "foo"], "no such generator there"),
        (["train", "STORE", "--seed", "-1"], "seed is -1"),
        (["score"], "no trajectories: name folders"),
        (["evaluate", "STORE", "--split", "some"], "--split is 'some'"),
        (["evaluate", "STORE", "-e", "SHARD"], "no estimator of artifacts"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = {"STORE": str(store.folders[0]), "SHARD": str(store.paths[0])}
    assert main(["artifacts", *(named.get(a, a) for a in args)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_trajectories_of_another_model(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["artifacts", "score", str(store.folders[0])]) == 2
    assert "28 features, the estimator was trained on" in capsys.readouterr().err


def test_foresee_without_a_file_is_the_packaged_one() -> None:
    assert spelled_out(["a", "--foresee", "-n", "2"]) == ["a", "--foresee", "packaged", "-n", "2"]
    assert spelled_out(["--foresee", "x.safetensors"]) == ["--foresee", "x.safetensors"]
    assert spelled_out(["--foresee"]) == ["--foresee", "packaged"]


def test_generate_takes_seeds_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "a waving old person", "--best-of", "4", "--foresee", "-n", "2", "--steps", "8"]
    assert main([*args, "-o", str(tmp_path / "new"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    said = found["foresee"]
    assert said["full_best_of"] == 2 * 4 * 8 * 2 and len(found["pictures"]) == 2
    kept = {f["seed"] for f in said["fates"] if f["fate"] == "kept"}
    assert kept == {p["seed"] for p in found["pictures"]}
    steps = sum(f["step"] or 8 for f in said["fates"])
    assert said["evaluations"] == 2 * steps, "what leaves is no longer paid for"
    assert Path(said["chart"]).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_later_rounds_do_not_take_the_places_of_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "a waving old person", "--best-of", "4", "--foresee", "-n", "6", "--steps", "8"]
    assert main([*args, "--guidance", "12", "-o", str(tmp_path / "new"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = [f for f in found["foresee"]["fates"] if f["fate"] == "kept"]
    assert len({f["round"] for f in kept}) > 1, "seeds of several rounds, or this shows nothing"
    by_slot = [f["seed"] for f in sorted(kept, key=lambda f: f["slot"])]
    assert [p["seed"] for p in found["pictures"]] == by_slot and len(by_slot) == 6
    assert all(Path(p["path"]).exists() for p in found["pictures"]) and found["kept"] == 0


def test_generate_looks_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "a waving old person", "--best-of", "2", "--foresee", "--look-ahead", "--steps", "12"]
    assert main([*args, "-o", str(tmp_path / "new"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["foresee"]
    looked = [f for f in said["fates"] if set(f["read"]) - {"1"}]
    assert looked and all(0 <= severity <= 5 for f in said["fates"] for severity in f["read"].values())
    assert said["evaluations"] == 2 * sum((f["step"] or 12) + 3 * len(set(f["read"]) - {"1"}) for f in said["fates"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--restarts", "2"], "--restarts does nothing without --foresee"),
        (["--look-ahead"], "--look-ahead does nothing without --foresee"),
        (["--best-of", "0"], "--best-of is 0"),
        (["--foresee", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_options_of_generate(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a person", "-o", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err


def test_the_packaged_estimator_is_small_and_says_where_it_comes_from() -> None:
    estimator = Estimator.load()
    assert PACKAGED.stat().st_size <= 1_000_000
    record = estimator.record
    assert record["model"] == "pocket" and len(record["model_sha256"]) == 64 and record["seed"] == 0
    assert estimator.ahead is not None and estimator.ahead.critic == "pocket" and "4" in record["searches"]
    assert record["training"]["steps"] >= 1500 and "pruned" not in record["generators"]
    assert all(torch.isfinite(p).all() for p in estimator.network.parameters())
