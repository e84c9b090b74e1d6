"""`dodgeburn bias` end to end on the pocket, and its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodgeburn.cli.main import main

QUICK = ["--prompt", "a doctor", "a person", "-n", "8", "--confirm", "8", "--steps", "2", "--device", "cpu"]


def test_audit_writes_a_page_and_goes_on_from_its_folder(tmp_path, capsys) -> None:
    out = tmp_path / "audit"
    command = ["bias", "audit", "pocket", *QUICK, "--attribute", "glasses", "hair_colour", "-o", str(out), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["model"] == "pocket" and found["by"] == "reader" and not found["proxy"]
    assert {(r["prompt"], r["attribute"]) for r in found["rows"]} == {
        (p, a) for p in ("a doctor", "a person") for a in ("glasses", "hair_colour")
    }
    assert len(found["rows"][0]["uniform"]["counts"]) == 2
    assert json.loads((out / "audit.json").read_text())["rows"] == found["rows"]
    page = (out / "report.html").read_text()
    assert "Bias audit of pocket" in page and "glasses" in page and "data:image/webp" in page
    parts = {p.name: p.stat().st_mtime_ns for p in out.glob("*.npz")}
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == found["rows"]
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.npz")} == parts


FIX = ["--prompt", "a firefighter", "--attribute", "hair_colour", "-n", "16", "--sampling-steps", "2"]


def test_fix_trains_writes_and_says_what_it_did(tmp_path, capsys) -> None:
    out = tmp_path / "fair.safetensors"
    small = ["--method", "balanced", "--steps", "2", "--batch", "4", "--pictures", "12", "--device", "cpu"]
    assert main(["bias", "fix", "pocket", *FIX, *small, "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["chosen"] == "balanced" and found["tried"][0]["done"]["steps"] == 2
    assert found["before"]["bias"]["n"] == 16 and found["written"] == str(out)
    page = (tmp_path / "fair-fix" / "report.html").read_text()
    assert "balanced" in page and json.loads((tmp_path / "fair-fix" / "fix.json").read_text())["chosen"] == "balanced"
    from dodgeburn.checkpoint.tensorfile import read_header
    from dodgeburn.models.loading import load_model

    said = json.loads(read_header(out).metadata["dodgeburn.bias_fix"])
    assert said["method"] == "balanced" and said["base"]["name"] == "pocket" and said["read_by"] == "reader"
    changed = load_model(str(out), device="cpu").unet.state_dict()
    before = load_model("pocket", device="cpu").unet.state_dict()
    assert any(not torch.equal(before[k], v) for k, v in changed.items())


def test_a_rule_is_written_as_json_and_leaves_the_model(tmp_path, capsys) -> None:
    out = tmp_path / "rule.json"
    assert main(["bias", "fix", "pocket", *FIX, "--method", "random-prompt", "-o", str(out), "--device", "cpu"]) == 0
    rule = json.loads(out.read_text())
    assert rule["where"] == ["firefighter"] and len(rule["append_one_of"]) == 6
    assert "random-prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fix", "pocket", "--prompt", "a firefighter"], "name the prompt and the attribute"),
        (["fix", "pocket", *FIX], "no output file"),
        (["fix", "pocket", *FIX, "--method", "balancd", "-o", "x.safetensors"], "'balancd': did you mean balanced"),
        (["fix", "pocket", *FIX, "-o", "x.ckpt"], "ends in .safetensors"),
        (["fix", "pocket", *FIX, "--tv", "nan", "-o", "x.safetensors"], "--tv is nan"),
        (["uce", "pocket", *FIX, "--slack", "-0.1", "-o", "x.safetensors"], "--slack is -0.1"),
        (["fix", "pocket", *FIX, "--lr", "-1", "-o", "x.safetensors"], "--lr is -1"),
        (["fix", "pocket", *FIX, "--lr", "nan", "-o", "x.safetensors"], "--lr is nan"),
        (["fix", "pocket", *FIX, "--steps", "0", "-o", "x.safetensors"], "--steps is 0"),
        (["fix", "pocket", *FIX, "--others", "none.txt", "-o", "x.safetensors"], "none.txt cannot be read"),
        (["fix", "pocket", *FIX, "--classes", "green", "red", "-o", "x.safetensors"], "no value 'green'"),
        (
            ["fix", "pocket", "--prompt", "red hair", "--attribute", "hair_colour", "-o", "x.safetensors"],
            "itself names",
        ),
        (["uce", "pocket", *FIX, "--method", "self", "-o", "x.safetensors"], "leave --method out"),
        (["audt"], "did you mean audit"),
        (["audit", "pocket", "--prompt", "a doctor"], "at least two"),
        (["audit", "pocket", *QUICK, "--attribute", "gender"], "no attribute 'gender'"),
        (["audit", "pocket", *QUICK, "--attribute", "glases"], "did you mean glasses"),
        (["audit", "pocket", *QUICK, "--control", "x"], "holm or bh"),
        (["audit", "pocket", *QUICK, "--clip", "folder"], "belong together"),
        (["audit", "pocket", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["audit", "nothing.safetensors", *QUICK], "nothing.safetensors"),
        (["audit", "pocket", *QUICK, "--guidance", "4", "nan"], "guidance is nan"),
        (["audit", "pocket", *QUICK, "--guidance", "-5"], "guidance is -5"),
        (["audit", "pocket", *QUICK, "--seed", "-1"], "seed is -1"),
        (["audit", "pocket", *QUICK, "--margin", "5"], "no effect without --clip"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(args, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bias", *args, *(["-o", "out"] if args[0] == "audit" else [])]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "report.html").exists()


def folder_of_pictures(place: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        value = ("black", "brown", "blonde", "red", "white", "blue")[i % 6]
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": "a firefighter", "hair_colour": value})
    (place / "0.png").write_bytes(b"no picture")
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def test_bad_pictures_stop_a_fix_or_are_left_out_and_counted(tmp_path, capsys) -> None:
    (tmp_path / "data").mkdir()
    data = folder_of_pictures(tmp_path / "data")
    small = ["--method", "balanced", "--steps", "1", "--batch", "4", "--pictures", "12", "--device", "cpu"]
    args = ["bias", "fix", "pocket", *FIX, *small, "--data", str(data), "-o", str(tmp_path / "fair.safetensors")]
    assert main(args) == 2
    assert "1 bad of 12: line 1" in capsys.readouterr().err
    assert not (tmp_path / "fair-fix").exists() and not (tmp_path / "fair.safetensors").exists()
    assert main([*args, "--skip-bad"]) == 0
    assert f"left out 1 of {data}: line 1" in capsys.readouterr().out
    # Finished: the same again makes nothing anew, other pictures are another run.
    before = (tmp_path / "fair.safetensors").read_bytes()
    assert main([*args, "--skip-bad"]) == 0 and (tmp_path / "fair.safetensors").read_bytes() == before
    assert "made before" in capsys.readouterr().out
    (data / "1.png").unlink()
    assert main([*args, "--skip-bad"]) == 2
    assert "pictures_sha256 was" in capsys.readouterr().err
    assert main(["bias", "fix", "pocket", *FIX, "--skip-bad", "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "--skip-bad has no effect" in capsys.readouterr().err
