import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_pair import tiny_pair
from tiny import tiny_model

from dodgeburn.cli.compare import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge import compare_pictures as job
from dodgeburn.merge import compare_report
from dodgeburn.merge.compare import CompareSettings, Comparison, compare
from dodgeburn.merge.compare_settings import packaged_prompts
from dodgeburn.merge.presets import preset_names
from dodgeburn.merge.ranking import Measured, Row, rank
from dodgeburn.merge.run import merge
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Readings
from dodgeburn.prompt_file import read_prompts
from dodgeburn.sampling.loop import GenerateSettings

FAST = GenerateSettings(steps=2, guidance=3.0)
PROMPTS = ("a doctor, smiling broadly, with red hair", "a face, blue backdrop")


class ColourReader:
    """Reads attributes out of mean colours: nonsense, but the same nonsense for the same picture."""

    def __init__(self, blind: bool = False) -> None:
        self.blind = blind

    def read(self, pictures: np.ndarray, /) -> Readings:
        mean = pictures.reshape(len(pictures), -1).mean(1) / 255
        values = {name: ((mean * (3 + i)) % 1).astype(np.float32) for i, name in enumerate(CONTINUOUS)}
        for i, (name, table) in enumerate(CATEGORICAL.items()):
            values[name] = np.array(table)[(mean * (50 + i)).astype(int) % len(table)]
        values["fingers"] = np.where(values["hand"] == "waving", 5, 0)
        return Readings(values, {}, np.full(len(pictures), self.blind))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """Plots take seconds; only `result`, which is made before this, has one."""
    monkeypatch.setattr("dodgeburn.merge.compare_report.add_plot", lambda *_: None)


def some(**changes) -> CompareSettings:
    settings = {"presets": ("GradV", "Flat_25"), "bases": (0.4,), "prompts": PROMPTS, "seeds": (0, 1), "generate": FAST}
    return CompareSettings(**{**settings, **changes})


# ------------------------------------------------------------------------------------------------------------ the job


@pytest.fixture(scope="module")
def result(pair, tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("job") / "out"
    return compare(*pair, some(bases=(0.4, 0.6)), folder, device="cpu", reader=ColourReader())


def test_rows_are_ranked_with_intervals_and_both_parents(result) -> None:
    found = json.loads(Path(result.files["results"]).read_text())
    assert found["variants"] == len(found["rows"]) == 4 and found["seconds"] > 0
    assert {(row["preset"], row["base"]) for row in found["rows"]} == {
        (preset, base) for preset in ("GradV", "Flat_25") for base in (0.4, 0.6)
    }
    fidelities = [row["fidelity"] for row in found["rows"]]
    assert fidelities == sorted(fidelities, reverse=True) and [row["rank"] for row in found["rows"]] == [1, 2, 3, 4]
    for row in found["rows"]:
        assert row["fidelity_ci"][0] <= row["fidelity"] <= row["fidelity_ci"][1]
        for key in ("resemblance_a", "resemblance_b", "pixel_resemblance_a", "pixel_resemblance_b"):
            assert 0 <= row[key] <= 1 and len(row[f"{key}_ci"]) == 2
        assert row["unreadable"] == 0
    assert any(row["pareto"] for row in found["rows"])
    a, b = found["parents"]
    assert a["name"] == "A" and a["resemblance_a"] == a["pixel_resemblance_a"] == 1 and a["resemblance_b"] < 1
    assert b["name"] == "B" and b["resemblance_b"] == 1 and a["resemblance_b"] == b["resemblance_a"]
    assert set(found["held_out"]["chosen"]) <= {row["name"] for row in found["rows"]}


def test_pictures_are_those_of_the_written_merge(result, pair, tmp_path) -> None:
    from dodgeburn.sampling.loop import generate

    a, b = pair
    merge(a, b, tmp_path / "m.safetensors", preset="GradV", base=0.6, keep=("text", "vae"))
    model = load_model(tmp_path / "m.safetensors", "cpu", tokenizer=a.parent / "tokenizer")
    prompts = [p for p in PROMPTS for _ in (0, 1)]
    made = np.stack([np.asarray(g.image) for g in generate(model, prompts, [0, 1, 0, 1], FAST)])
    shown = result.pictures("GradV-0.6")
    assert np.array_equal(shown.reshape(made.shape), made)
    other = load_model(b, "cpu")
    made_b = np.stack([np.asarray(g.image) for g in generate(other, prompts, [0, 1, 0, 1], FAST)])
    assert np.array_equal(result.pictures("B").reshape(made_b.shape), made_b)
    assert not np.array_equal(shown, result.pictures("A"))


def test_outputs_are_all_there(result) -> None:
    folder = result.folder
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == ["job.json", "pictures/A.npz", "pictures/B.npz", "pictures/Flat_25-0.4.npz",
                     "pictures/Flat_25-0.6.npz", "pictures/GradV-0.4.npz", "pictures/GradV-0.6.npz", "report.html",
                     "results.json", "sheets/01.png", "sheets/02.png", "table.csv"]  # fmt: skip
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("rank,name,preset,base,fidelity,fidelity_low,fidelity_high")
    assert all(line.count(",") == lines[0].count(",") for line in lines)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4  # the plot: light and dark, wide and narrow
    for word in (*PROMPTS, "GradV", "Flat_25", "--preset", "base 0.6", "sha256"):
        assert word in page
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:[^\"]*", "", page))
    assert str(folder) not in page and str(folder) not in (folder / "job.json").read_text()


def test_same_command_makes_nothing_again_and_a_lost_part_is_made_again(result, pair, monkeypatch) -> None:
    calls: list[str] = []
    original = job.generate
    monkeypatch.setattr(job, "generate", lambda *args, **kw: calls.append("made") or original(*args, **kw))
    before = result.pictures("GradV-0.4")
    again = compare(*pair, result.settings, result.folder, device="cpu", reader=ColourReader())
    assert calls == [] and again.resumed == 6
    (result.folder / "pictures/GradV-0.4.npz").write_bytes(b"damaged")
    (result.folder / "pictures/A.npz").unlink()
    again = compare(*pair, result.settings, result.folder, device="cpu", reader=ColourReader())
    assert len(calls) == 2 and again.resumed == 4
    assert np.array_equal(again.pictures("GradV-0.4"), before)
    assert [r.name for r in again.rows] == [r.name for r in result.rows]
    with pytest.raises(UserError, match="other settings .*seeds"):
        compare(*pair, some(bases=(0.4, 0.6), seeds=(5,)), result.folder, device="cpu", reader=ColourReader())


def test_interrupted_run_goes_on_to_the_same_rows(pair, tmp_path, monkeypatch) -> None:
    whole = compare(*pair, some(), tmp_path / "whole", device="cpu", reader=ColourReader())
    original, left = job.generate, [3]

    def interrupted(*args, **kw):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*args, **kw)

    monkeypatch.setattr(job, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(*pair, some(), tmp_path / "cut", device="cpu", reader=ColourReader())
    monkeypatch.setattr(job, "generate", original)
    assert not (tmp_path / "cut" / "results.json").exists()
    rest = compare(*pair, some(), tmp_path / "cut", device="cpu", reader=ColourReader())
    assert rest.resumed == 2
    assert [row.as_dict() for row in rest.rows] == [row.as_dict() for row in whole.rows]


def test_kept_text_is_encoded_once_and_merged_text_for_each_base(pair, tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    original = job.encode
    monkeypatch.setattr(job, "encode", lambda *args: calls.append(1) or original(*args))
    compare(*pair, some(), tmp_path / "kept", device="cpu", reader=ColourReader())
    assert len(calls) == 3  # A, then B with its own text encoders, then all variants with A's
    calls.clear()
    compare(*pair, some(keep=()), tmp_path / "merged", device="cpu", reader=ColourReader())
    assert len(calls) == 3  # A, B, and base 0.4


def test_equal_variants_are_said_and_made_once(tmp_path, pair) -> None:
    a = pair[0]
    result = compare(a, a, some(), tmp_path / "self", device="cpu", reader=ColourReader())
    assert [row.same_as for row in result.rows] == ["A", "A"]
    assert any("very same tensors" in note for note in result.notes)
    assert all(row.mean("pixel_resemblance_a") == 1 for row in result.rows)
    assert not (tmp_path / "self/pictures/GradV-0.4.npz").exists()


def test_without_a_reader_pixels_rank_and_fidelity_is_null(pair, tmp_path) -> None:
    result = compare(*pair, some(), tmp_path / "out", device="cpu")  # the tiny model's words are not the pocket's
    rows = json.loads(Path(result.files["results"]).read_text())["rows"]
    assert result.read_by is None and any("not of the pocket world" in note for note in result.notes)
    assert all(row["fidelity"] is None and row["resemblance_a"] is None for row in rows)
    least = [min(row["pixel_resemblance_a"], row["pixel_resemblance_b"]) for row in rows]
    assert least == sorted(least, reverse=True)
    assert "closest to both" in (result.folder / "report.html").read_text()


def test_prompts_that_name_nothing_and_unreadable_pictures(pair, tmp_path) -> None:
    nothing = compare(*pair, some(prompts=("hello", "world")), tmp_path / "n", device="cpu", reader=ColourReader())
    assert nothing.rows[0].mean("fidelity") is None and nothing.rows[0].mean("resemblance_a") is not None
    assert any("No prompt names" in note for note in nothing.notes)
    partly = compare(
        *pair, some(prompts=("hello", "a person, blue backdrop")), tmp_path / "p", device="cpu", reader=ColourReader()
    )
    assert any("1 of 2 prompts name nothing the reader knows ('hello');" in note for note in partly.notes)
    blind = compare(*pair, some(), tmp_path / "b", device="cpu", reader=ColourReader(blind=True))
    assert blind.rows[0].mean("fidelity") == 0 and blind.rows[0].as_dict()["unreadable"] == 1


def test_sd15_goes_the_same_way(pair, tmp_path) -> None:
    old = pair[0].parent / "old.safetensors"
    save_single_file(tiny_model("sd15", seed=3), tmp_path / "new.safetensors", dtype=torch.float16)
    result = compare(old, tmp_path / "new.safetensors", some(), tmp_path / "out", device="cpu", reader=ColourReader())
    assert len(result.rows) == 2 and len(result.rows[0].shares) == 27
    assert not np.array_equal(result.pictures("A"), result.pictures("GradV-0.4"))


def test_parents_that_predict_differently_are_warned_of(pair, tmp_path) -> None:
    save_single_file(
        tiny_model(seed=2, prediction_type="v_prediction"), tmp_path / "v.safetensors", dtype=torch.float16
    )
    with pytest.warns(DodgeburnWarning, match="prediction_type"):
        compare(pair[0], tmp_path / "v.safetensors", some(presets=("GradV",)), tmp_path / "out", device="cpu")


# --------------------------------------------------------------------------------------------------------- the ranking


def row(name: str, fidelity: list[list[float]], a: float, b: float) -> Row:
    grid = np.array(fidelity)
    fill = [np.full(grid.shape, v) for v in (a, b)]
    return Row(name, name, 0.4, Measured(grid, fill[0], fill[1], fill[0], fill[1], np.zeros(grid.shape)))


def test_ties_go_to_the_one_near_both_and_the_front_is_of_three_goals() -> None:
    rows = [row("lop", [[1, 0.5]], 0.9, 0.2), row("near", [[0.5, 1]], 0.6, 0.6), row("worse", [[0.4, 0.4]], 0.5, 0.5)]
    parents = [row("A", [[0.5, 0.5]], 1, 0.3), row("B", [[0.25, 0.25]], 0.3, 1)]
    ordered, held = rank(rows, parents)
    assert [r.name for r in ordered] == ["near", "lop", "worse"]
    assert [r.pareto for r in ordered] == [True, True, False]
    assert ordered[0].versus_a is not None and ordered[0].versus_a.mean == pytest.approx(0.25)
    assert held is None  # one prompt: nothing to leave out


def test_held_out_choice_is_not_flattered() -> None:
    lucky = row("lucky", [[1.0, 1.0], [0.0, 0.0]], 0.5, 0.5)
    unlucky = row("unlucky", [[0.0, 0.0], [0.9, 0.9]], 0.5, 0.5)
    parents = [row("A", [[0.5, 0.5]] * 2, 1, 0.3), row("B", [[0.5, 0.5]] * 2, 0.3, 1)]
    _, held = rank([lucky, unlucky], parents)
    assert held is not None and held["fidelity"] == 0 and held["vs_a"] == pytest.approx(-0.5)


# ----------------------------------------------------------------------------------------------- settings and bad input


def test_all_presets_are_the_sixteen_and_names_are_known() -> None:
    assert CompareSettings(prompts=("x",)).presets == tuple(preset_names()) and len(preset_names()) == 16
    assert CompareSettings(prompts=("x",), presets=("grad_v", "GradV")).presets == ("GradV",)
    assert CompareSettings(prompts=("x",), presets=("published",)).presets == tuple(preset_names("published"))
    with pytest.raises(UserError, match="GradV"):
        CompareSettings(prompts=("x",), presets=("GradW",))


@pytest.mark.parametrize(
    "bad", [{"bases": (1.5,)}, {"bases": ()}, {"seeds": (1, 1)}, {"seeds": ()}, {"seeds": (-1,)}, {"prompts": (" ",)},
            {"presets": ()}, {"keep": ("unet",)}],
)  # fmt: skip
def test_bad_settings(bad) -> None:
    with pytest.raises(UserError):
        CompareSettings(**{"prompts": ("x",), **bad})


def test_default_prompts_ask_for_much_and_are_the_example() -> None:
    prompts = packaged_prompts()
    assert len(prompts) == 8 and all(len(parse(prompt)) >= 5 for prompt in prompts)
    named = {name for prompt in prompts for name in parse(prompt)}
    assert set(CATEGORICAL) <= named and len(named) >= 16
    assert read_prompts(Path(__file__).parents[1] / "examples" / "compare-prompts.txt") == prompts


def test_architectures_that_differ_and_missing_files(pair, tmp_path) -> None:
    a, b = pair
    with pytest.raises(UserError, match="SD"):
        compare(a, a.parent / "old.safetensors", some(), tmp_path / "out", device="cpu")
    with pytest.raises(UserError):
        compare(a, tmp_path / "missing.safetensors", some(), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_or_holds_something_else(pair, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        compare(*pair, some(), tmp_path / "file", device="cpu", reader=ColourReader())
    with pytest.raises(UserError, match="not empty"):
        compare(*pair, some(), tmp_path, device="cpu", reader=ColourReader())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="not empty"):  # before a model is opened
        compare("none.safetensors", pair[1], some(), tmp_path, device="cpu", reader=ColourReader())


def test_settings_that_cannot_be_drawn_leave_no_folder_behind(pair, tmp_path) -> None:
    wrong = some(generate=GenerateSettings(steps=2, width=63))
    with pytest.raises(UserError, match="width|multiples"):
        compare(*pair, wrong, tmp_path / "out", device="cpu", reader=ColourReader())
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- the command line


def test_command_line_prints_table_and_json(pair, tmp_path, capsys) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a face, blue backdrop\n")
    code = main([str(pair[0]), str(pair[1]), "--presets", "GradV,out07", "--bases", "0.4", "--prompts", str(prompts),
                 "--seeds", "3", "--steps", "2", "-o", str(tmp_path / "out"), "--device", "cpu", "--json"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert code == 0 and found["variants"] == 2 and {row["preset"] for row in found["rows"]} == {"GradV", "Out07"}
    assert all(row["fidelity"] is None and row["fidelity_ci"] is None for row in found["rows"])
    assert any("report.html" in line for line in lines[:-1]) and any("GradV" in line for line in lines[:-1])


def test_command_line_refuses_numbers_that_are_none(pair) -> None:
    with pytest.raises(UserError, match="--bases 0.4,x"):
        main([str(pair[0]), str(pair[1]), "-o", "out", "--bases", "0.4,x"])
    with pytest.raises(UserError, match="--seeds 1.5.*whole numbers"):
        main([str(pair[0]), str(pair[1]), "-o", "out", "--seeds", "1.5"])
    with pytest.raises(UserError, match="-o DIR"):
        main([str(pair[0]), str(pair[1])])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.01, 0.1], [0.02, 0.1], "more than A and B"), ([-0.1, 0.1], None, "not told apart from A or B"),
        ([-0.2, -0.1], [-0.1, 0.1], "less than A and not told apart from B"),
    ],
)  # fmt: skip
def test_the_verdict_names_both_parents(a: list[float] | None, b: list[float] | None, said: str) -> None:
    assert compare_report._verdict({"vs_a_ci": a, "vs_b_ci": b}) == said


def test_names_of_parents_that_are_as_good_stand_together() -> None:
    from dodgeburn.merge.compare_plot import _named

    rows = [{"name": "A", "fidelity": 0.9}, {"name": "B", "fidelity": 0.901}]
    assert _named(rows, "fidelity", (0.8, 1.0)) == [("A, B", 0.9)]
    assert _named(rows, "fidelity", (0.9, 0.902)) == [("A", 0.9), ("B", 0.901)]
