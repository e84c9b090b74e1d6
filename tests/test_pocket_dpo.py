"""The recipe of pocket-dpo, from pairs to the LoRA as it ships, at a tiny size; and how the benchmark sums up."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dodgeburn.checkpoint import packaged
from dodgeburn.checkpoint.metadata import recipe_of
from dodgeburn.checkpoint.tensorfile import read_header, sha256_tensors
from dodgeburn.errors import UserError
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.model import weights_path
from dodgeburn.rework.dpo import pocket_dpo
from dodgeburn.rework.dpo.make_pairs import FIRST_PROMPT, pocket_prompts
from dodgeburn.rework.dpo.settings import DpoSettings
from dodgeburn.training.pocket import development_prompts, gate_prompts


def test_from_pairs_to_the_file_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket_dpo, "BEST_OF", 4)
    monkeypatch.setattr(pocket_dpo, "STEPS", 2)
    monkeypatch.setitem(pocket_dpo.SETTINGS, "faithful", DpoSettings(rank=1, steps=1, batch=2, lr=1e-3))
    monkeypatch.setitem(pocket_dpo.PAIRING, "faithful", (("wishes", 1, 0.0), ("faithful", 1, 0.0)))
    draw = pocket_dpo.draw_settings
    monkeypatch.setattr(pocket_dpo, "draw_settings", lambda: draw(4))
    model = load_model("pocket", "cpu", "fp32")
    out = pocket_dpo.make_pocket_dpo(model, tmp_path)
    first = out.read_bytes()
    said = json.loads(read_header(out).metadata[packaged.TRAINING])
    assert said["config"]["seed"] == 0 and said["logs"]["dpo"][-1]["step"] == 1
    recipe = recipe_of(read_header(out).metadata)
    assert recipe is not None and recipe["base"]["sha256"] == model.sha256
    sets = recipe["pairs"]["about"]["sets"]
    assert [(one["preference"], one["by"]) for one in sets] == [("wishes", "reader"), ("faithful", "reader")]
    whole = packaged._made("pocket-dpo", out, weights_path("pocket"), tmp_path / "cache")
    assert read_header(out).metadata[packaged.WHOLE_HASH] == sha256_tensors(whole)
    out.unlink()
    assert pocket_dpo.make_pocket_dpo(model, tmp_path).read_bytes() == first  # the same bytes, and resumable
    with pytest.raises(UserError, match="not from pocket-style"):
        pocket_dpo.make_pocket_dpo(load_model("pocket-style", "cpu", "fp32"), tmp_path / "other")


def test_no_pair_comes_from_a_held_out_prompt() -> None:
    held_out = {row["prompt"] for row in gate_prompts()}
    chosen_on = {row["prompt"] for row in development_prompts(FIRST_PROMPT)}
    shipped = pocket_dpo.draw_settings().prompts
    assert len(shipped) == pocket_dpo.PROMPTS and not (held_out | chosen_on) & set(shipped)
    assert shipped == pocket_prompts(pocket_dpo.PROMPTS)


# -------------------- the benchmark's sums


@pytest.fixture(scope="module")
def bench() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "dpo.py"
    spec = importlib.util.spec_from_file_location("bench_dpo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_dpo"] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # it imports what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_win_rate_at_equal_drift_lies_between_the_scales(bench: Any) -> None:
    rows = [{"drift": d, "win_faithful": [w]} for d, w in ((2.0, 0.6), (6.0, 0.7), (9.0, 0.4))]
    assert bench.at_drift(rows, (0.5, 1.0, 1.5), 4.0) == pytest.approx({"scale": 0.75, "win": 0.65})
    assert bench.at_drift(rows, (0.5, 1.0, 1.5), 1.0) == pytest.approx({"scale": 0.25, "win": 0.55})
    assert bench.at_drift(rows, (0.5, 1.0, 1.5), 9.5) is None


def test_over_has_prompts_and_seeds(bench: Any) -> None:
    mean, ends = bench.over([{"gain": [0.0, 1.0]}, {"gain": [0.5, 0.5]}], "gain")
    assert mean == 0.5 and ends is not None and ends[0] < 0.5 < ends[1]


def row(name: str, fidelity: float, like: float, judged: float) -> SimpleNamespace:
    grids = {"fidelity": fidelity, "resemblance_a": like, "fidelity_judge": judged}
    measured = SimpleNamespace(**{key: np.full((4, 2), value) for key, value in grids.items()})
    return SimpleNamespace(name=name, measured=measured, mean=lambda key: grids[key])


def test_the_reader_chooses_and_the_judge_grades(bench: Any) -> None:
    parents = [row("A", 0.8, 1.0, 0.8), row("B", 0.9, 0.6, 0.9)]
    rows = [row("x", 0.9, 0.9, 0.7), row("y", 0.86, 0.81, 0.99), row("z", 0.5, 0.99, 0.5)]
    best, count = bench.chosen(rows, parents)
    assert best.name == "x" and count == 2
    found = bench.graded(best, parents)
    assert found["chosen"] == "x" and not found["beats_parents_mean"]
    assert found["fidelity_minus_mean"] == pytest.approx(-0.15)
    assert found["resemblance_minus_mean"] == pytest.approx(0.1)
