"""`dodgeburn bias` with CLIP for a classifier: what its answers depend on is what a run goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dodgeburn.cli.main import main

TEXTS = "mood: {glad: a glad face, sad: a sad face}\nhair: {dark: dark hair, fair: fair hair}\n"


@pytest.fixture
def place(tmp_path: Path, clip_folder: Path) -> Path:
    """A CLIP, attributes, and prompts of other things."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "people.yaml").write_text(TEXTS)
    (tmp_path / "others.txt").write_text("a doctor\na farmer\n")
    return tmp_path


def other_clip(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = place / "clip" / "model.safetensors"
    save_file({k: v + 0.05 for k, v in load_file(file).items()}, file, {"format": "pt"})


def audit(place: Path, *more: str) -> int:
    return main(["bias", "audit", "pocket", "--prompt", "a doctor", "a person", "-n", "8", "--confirm", "0", "--steps",
                 "1", "--device", "cpu", "--clip", str(place / "clip"), "--attributes", str(place / "people.yaml"),
                 "-o", str(place / "audit"), "--json", *more])  # fmt: skip


def fix(place: Path, *more: str) -> int:
    return main(["bias", "fix", "pocket", "--prompt", "a person", "--attribute", "mood", "-n", "16",
                 "--sampling-steps", "1", "--method", "random-prompt", "--device", "cpu", "--clip", str(place / "clip"),
                 "--attributes", str(place / "people.yaml"), "--others", str(place / "others.txt"), "-o",
                 str(place / "rule.json"), "--json", *more])  # fmt: skip


def test_an_audit_goes_on_with_the_same_texts_and_weights_only(place: Path, capsys) -> None:
    assert audit(place) == 0 and audit(place) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["proxy"] and found["by"] == "proxy: CLIP clip"
    (place / "people.yaml").write_text(TEXTS.replace("a sad face", "tears"))
    assert audit(place) == 2
    assert 'texts.mood.sad was "a sad face", now "tears"' in capsys.readouterr().err
    (place / "people.yaml").write_text(TEXTS)
    other_clip(place)
    assert audit(place) == 2 and "clip_sha256 was" in capsys.readouterr().err


def test_a_fix_goes_on_with_the_same_texts_weights_and_other_prompts_only(place: Path, capsys) -> None:
    assert fix(place) == 0 and fix(place) == 0
    (place / "people.yaml").write_text(TEXTS.replace("a sad face", "tears"))
    assert fix(place) == 2 and "texts.mood.sad was" in capsys.readouterr().err
    (place / "people.yaml").write_text(TEXTS)
    (place / "others.txt").write_text("a doctor\na gardener\n")
    assert fix(place) == 2 and "other_prompts was" in capsys.readouterr().err
    (place / "others.txt").write_text("a doctor\na farmer\n")
    other_clip(place)
    assert fix(place) == 2 and "clip_sha256 was" in capsys.readouterr().err
