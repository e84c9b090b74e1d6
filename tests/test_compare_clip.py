"""`compare --clip`: models of any world ranked and searched by CLIP, a proxy that is named as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from dodgeburn.cli.main import main
from dodgeburn.measure.clip import ClipScore
from dodgeburn.merge.compare_pictures import load_pictures, part_name
from dodgeburn.models.saving import save_single_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """Two tiny SDXL models, prompts, and two CLIPs of which the second has other weights."""
    root = tmp_path_factory.mktemp("clip-compare")
    for seed, name in enumerate("ab"):
        model = tiny_model()
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.unet.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.05)
        save_single_file(model, root / f"{name}.safetensors")
    model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
    (root / "prompts.txt").write_text("a hat\na long coat\n")
    (root / "others.txt").write_text("a shoe\na scarf\n")
    shutil.copytree(clip_folder, root / "other-clip")
    from safetensors.torch import load_file, save_file

    tensors = load_file(root / "other-clip" / "model.safetensors")
    save_file({k: v + 0.05 for k, v in tensors.items()}, root / "other-clip" / "model.safetensors", {"format": "pt"})
    return root


def run(place: Path, out: Path, *more: str) -> int:
    return main(["compare", str(place / "a.safetensors"), str(place / "b.safetensors"), "--prompts",
                 str(place / "prompts.txt"), "--presets", "none", "--bases", "0.3,0.7", "--seeds", "0,1", "--steps",
                 "1", "-o", str(out), "--json", *more])  # fmt: skip


def last(capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    text = capsys.readouterr().out.strip()
    return json.loads(text.splitlines()[-1]), text


def test_rows_are_clips_cosines(place: Path, clip_folder: Path, tmp_path: Path, capsys) -> None:
    assert run(place, tmp_path, "--clip", str(clip_folder)) == 0
    found, text = last(capsys)
    clip = ClipScore(clip_folder)
    shown = {
        name: load_pictures(tmp_path / part_name(name)) for name in ("A", "B", *(r["name"] for r in found["rows"]))
    }
    for row in [*found["parents"], *found["rows"]]:
        pictures = shown[row["name"]]
        scores = [clip.scores(pictures[i], prompt) / 100 for i, prompt in enumerate(("a hat", "a long coat"))]
        assert row["fidelity"] == pytest.approx(np.mean(scores), abs=1e-5)
        seen, of_a = (clip.seen(p.reshape(-1, *p.shape[2:])) for p in (pictures, shown["A"]))
        assert row["resemblance_a"] == pytest.approx(np.mean(np.sum(seen * of_a, axis=1)), abs=1e-5)
        assert row["unreadable"] is None and row["fidelity_judge"] is None
    assert found["parents"][0]["resemblance_a"] == pytest.approx(1)
    assert [row["rank"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["fidelity"] >= found["rows"][1]["fidelity"]
    assert found["read_by"] == clip.name and any("a proxy" in note for note in found["notes"])
    assert "CLIP score" in text and "%" not in text.splitlines()[0]
    page = (tmp_path / "report.html").read_text()
    assert "CLIP score" in page and "follows the prompts best by CLIP" in page and "shows most of what" not in page
    assert "asks for" not in page and "Every picture could be read" not in page
    # The pictures are those of a run that nobody reads.
    assert run(place, tmp_path) == 0
    bare, _ = last(capsys)
    assert bare["resumed"] == 4 and bare["read_by"] is None and any("--clip FOLDER" in note for note in bare["notes"])


def test_any_model_can_be_searched(place: Path, clip_folder: Path, tmp_path: Path, capsys) -> None:
    search = ["--search", "2", "--held-out", str(place / "others.txt"), "--picks", "1"]
    assert run(place, tmp_path / "s", *search) == 2
    assert "nothing to search by" in capsys.readouterr().err
    both = ["--clip", str(clip_folder), "--clip-judge", str(place / "other-clip")]
    assert run(place, tmp_path / "s", *search, *both) == 0
    found, text = last(capsys)
    graded = found["search"]["graded"]
    assert {line["role"] for line in graded} == {"A", "B", "best without search", "found"}
    judge = ClipScore(place / "other-clip")
    pictures = load_pictures(tmp_path / "s" / "held-out" / "A.npz")
    scores = [judge.scores(pictures[i], prompt) / 100 for i, prompt in enumerate(("a shoe", "a scarf"))]
    assert graded[0]["grade"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert not any(line["excluded"] for line in graded) and "had the CLIP score" in text and "luck" not in text
    # Another CLIP would propose other merges.
    assert run(place, tmp_path / "s", *search, "--clip", str(place / "other-clip")) == 2
    assert "clip was" in capsys.readouterr().err


def test_a_function_of_ones_own_decides(place: Path, tmp_path: Path, capsys) -> None:
    own = tmp_path / "taste.py"
    own.write_text(
        "def warmth(pictures, prompts):\n"
        "    assert set(prompts) <= {'a hat', 'a long coat', 'a shoe', 'a scarf'}\n"
        "    return pictures[..., 0].mean((1, 2)) * 1.0\n"
    )
    search = ["--search", "2", "--held-out", str(place / "others.txt"), "--picks", "1", "--goals", "fidelity"]
    assert run(place, tmp_path / "s", "--score", f"{own}:warmth", *search) == 0
    found, text = last(capsys)
    by_name = {row["name"]: row for row in [*found["parents"], *found["rows"]]}
    for name, row in by_name.items():
        pictures = load_pictures(tmp_path / "s" / part_name(name))
        assert row["fidelity"] == pytest.approx(pictures[..., 0].mean(), abs=1e-4)
        assert row["resemblance_a"] == row["pixel_resemblance_a"]
    ranked = [row["fidelity"] for row in found["rows"]]
    assert ranked == sorted(ranked, reverse=True) and found["read_by"] == "taste.py:warmth"
    assert "warmth" in text and "CLIP" not in text and "warmth" in (tmp_path / "s" / "report.html").read_text()
    held = load_pictures(tmp_path / "s" / "held-out" / "A.npz")
    assert found["search"]["graded"][0]["grade"] == pytest.approx(held[..., 0].mean(), abs=1e-4)
    own.write_text(own.read_text().replace("1.0", "2.0"))
    assert run(place, tmp_path / "s", "--score", f"{own}:warmth", *search) == 2
    assert "scorer was" in capsys.readouterr().err


def test_bad_input_is_one_line(place: Path, clip_folder: Path, tmp_path: Path, capsys) -> None:
    for more, said in (
        (["--clip", str(tmp_path)], "no CLIP model's folder"), (["--clip-judge", str(clip_folder)], "without --clip"),
        (["--clip", str(clip_folder), "--clip-judge", str(clip_folder)], "the same model"),
        (["--clip", str(clip_folder), "--score", "x.py:f"], "one decides"), (["--score", "x.py:f"], "no such file"),
    ):  # fmt: skip
        assert run(place, tmp_path / "out", *more) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(err) == 1 and said in err[0]
    assert not (tmp_path / "out").exists()
