"""compare --search: what Optuna proposes, what is graded on held-out prompts, and that it resumes to the same."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import PROMPTS, ColourReader, no_plots, pair

from dodgeburn.cli.compare import main
from dodgeburn.cli.merge import main as merge_main
from dodgeburn.errors import UserError
from dodgeburn.merge import compare_pictures as job
from dodgeburn.merge.compare import CompareSettings, Comparison, compare
from dodgeburn.merge.compare_settings import drawn_prompts
from dodgeburn.merge.presets import preset_alphas
from dodgeburn.merge.ranking import Measured, Row
from dodgeburn.merge.search import Graded, Proposer, SearchSettings, curve
from dodgeburn.merge.search_report import verdict
from dodgeburn.merge.variants import MethodChoice
from dodgeburn.pocket.captions import parse
from dodgeburn.sampling.loop import GenerateSettings, generate

QUICK = GenerateSettings(steps=1, guidance=1.0, width=32, height=32)
HELD_OUT = ("a person, with a very old face, wearing a cap", "comic drawing of a doctor, black hair")
assert no_plots and pair  # fixtures of that module, used here too


def chosen(**changes) -> CompareSettings:
    options = {"presets": ("GradV",), "bases": (0.4,), "prompts": PROMPTS, "seeds": (0,), "generate": QUICK}
    return CompareSettings(**{**options, **changes})


def wanted(trials: int = 4, **changes) -> SearchSettings:
    options = {"trials": trials, "prompts": HELD_OUT, "seeds": (7, 8), "seed": 3}
    return SearchSettings(**{**options, **changes})


# ---------------------------------------------------------------------------------------------------------- proposing


def test_curve_by_hand() -> None:
    assert curve(0.5, 0.25, 0.0, ["IN00", "M00", "OUT00"]) == {"IN00": 0.25, "M00": 0.5, "OUT00": 0.75}
    assert curve(0.5, 0.0, -0.5, ["IN00", "M00", "OUT00"]) == {"IN00": 1.0, "M00": 0.0, "OUT00": 1.0}
    assert curve(0.9, 0.5, 0.5, ["IN00", "M00", "OUT00"]) == {"IN00": 0.0, "M00": 1.0, "OUT00": 0.9}
    names = [str(i) for i in range(19)]
    for preset, numbers in (("GradV", (0.5, 0, -0.5)), ("GradA", (0.5, 0, 0.5)), ("Flat_25", (0.25, 0, 0))):
        assert list(curve(*numbers, names).values()) == pytest.approx(preset_alphas(preset, 9, 9), abs=6e-5)


@settings(max_examples=30, deadline=None)
@given(level=st.floats(0, 1), tilt=st.floats(-0.5, 0.5), bump=st.floats(-0.5, 0.5), n=st.integers(2, 25))
def test_curves_are_shares_and_mirrored_by_tilt(level, tilt, bump, n) -> None:
    names = [str(i) for i in range(n)]
    one, two = (list(curve(level, t, bump, names).values()) for t in (tilt, -tilt))
    assert all(0 <= share <= 1 for share in one) and one == pytest.approx(two[::-1], abs=1.01e-4)


def proposals(search: SearchSettings, n: int, goal=lambda p: [p["level"], p["base"], -p["tilt"]], methods=()) -> list:
    proposer = Proposer(search, methods or [MethodChoice()])
    out = []
    for _ in range(n):
        out.append(proposer.ask())
        proposer.tell(goal(out[-1]))
    return out


@pytest.mark.parametrize("by", ["tpe", "nsga2", "random"])
def test_same_seed_and_values_propose_the_same(by) -> None:
    search = wanted(by=by)
    found = proposals(search, 24)
    assert proposals(search, 24) == found and proposals(wanted(by=by, seed=4), 24) != found
    other = proposals(search, 24, lambda p: [-p["level"], p["base"], p["tilt"]])
    assert (other == found) == (by == "random")
    assert all(0 <= p["base"] <= 1 and -0.5 <= p["bump"] <= 0.5 and set(p) == {"level", "tilt", "bump", "base"}
               for p in found)  # fmt: skip


def test_methods_are_proposed_where_there_are_several() -> None:
    methods = [MethodChoice.parse("slerp"), MethodChoice.parse("ties:density=0.1")]
    found = proposals(wanted(), 20, methods=methods)
    assert {p["method"] for p in found} == {"slerp", "ties:density=0.1"}
    merge = Proposer(wanted(), methods).merge({**found[0], "method": "ties:density=0.1"}, ["IN00", "M00"], ("vae",))
    assert merge.method == "ties" and merge.params == {"density": 0.1} and merge.keep == ("vae",)
    assert merge.base == found[0]["base"] and set(merge.blocks) == {"IN00", "M00"}


def test_proposals_get_better() -> None:
    def goal(p) -> list[float]:
        return [-((p["level"] - 0.3) ** 2) - (p["base"] - 0.7) ** 2 - (p["tilt"] - 0.2) ** 2]

    search = wanted(goals=("fidelity",))
    values = [goal(p)[0] for p in proposals(search, 60, goal)]
    chance = [goal(p)[0] for p in proposals(wanted(goals=("fidelity",), by="random"), 60, goal)]
    assert np.mean(values[40:]) > np.mean(chance) + 0.1 and max(values) > -0.02


# ------------------------------------------------------------------------------------------------------------ the job


@pytest.fixture(scope="module")
def result(pair, tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("search") / "out"
    return compare(*pair, chosen(), folder, "cpu", reader=ColourReader(), search=wanted())


def test_trials_stand_in_the_table_and_what_is_found_is_graded(result) -> None:
    names = [f"search-00{i}" for i in range(4)]
    assert {row.name for row in result.rows} == {"GradV-0.4", *names}
    lines = [json.loads(line) for line in (result.folder / "trials.jsonl").read_text().splitlines()]
    rows = {row.name: row for row in result.rows}
    assert [line["name"] for line in lines] == names
    for line in lines:
        assert line["fidelity"] == rows[line["name"]].mean("fidelity") and line["merge"]["merge"]["blocks"]
        assert rows[line["name"]].shares["BASE"] == line["params"]["base"]
    found = json.loads(Path(result.files["results"]).read_text())["search"]
    graded = found["graded"]
    assert [g["role"] for g in graded[:3]] == ["A", "B", "best without search"] and graded[2]["name"] == "GradV-0.4"
    picks = [g["name"] for g in graded[3:]]
    assert picks and found["found"] == picks[0] and set(picks) <= set(names)
    assert picks == [row.name for row in result.rows if row.name in picks]  # best first, by what the search saw
    for g in graded:
        assert g["search"]["fidelity"] == round(rows[g["name"]].mean("fidelity"), 5) if g["name"] in rows else True
        assert g["grade_ci"][0] <= g["grade"] <= g["grade_ci"][1]
        assert g["excluded"] == (not g["grade_ci"][0] <= g["search"]["fidelity"] <= g["grade_ci"][1])
    page = (result.folder / "report.html").read_text()
    for word in (picks[0], "held out", *HELD_OUT, "Optuna, tpe, seed 3"):
        assert word in page


def test_held_out_pictures_are_of_other_prompts_and_seeds(result, pair) -> None:
    from dodgeburn.models.loading import load_model

    shown = job.load_pictures(result.folder / "held-out" / "A.npz")
    model = load_model(pair[0], "cpu")
    made = generate(model, [p for p in HELD_OUT for _ in (7, 8)], [7, 8, 7, 8], QUICK)
    assert shown is not None and shown.shape[:2] == (2, 2)
    assert np.array_equal(shown.reshape(4, *shown.shape[2:]), np.stack([np.asarray(g.image) for g in made]))


def test_interrupted_search_goes_on_to_the_same_and_may_be_longer(result, pair, tmp_path, monkeypatch) -> None:
    original, left = job.generate, [6]

    def counted(*args, **kw):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*args, **kw)

    def run(trials: int) -> Comparison:
        return compare(*pair, chosen(), tmp_path / "out", "cpu", reader=ColourReader(), search=wanted(trials))

    monkeypatch.setattr(job, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(4)
    left[0] = 1000
    again = run(4)
    assert again.resumed == 5
    assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in result.rows]
    one, two = (json.loads(Path(r.files["results"]).read_text())["search"] for r in (again, result))
    assert one == two
    made = left[0]
    longer = run(6)
    assert longer.search is not None and again.search is not None and len(longer.search.trials) == 6
    assert [t.params for t in longer.search.trials[:4]] == [t.params for t in again.search.trials]
    assert made - left[0] <= 2 + 5  # two trials, and picks that were not graded before
    with pytest.raises(UserError, match="other settings .*search"):
        compare(*pair, chosen(), tmp_path / "out", "cpu", reader=ColourReader(), search=wanted(seed=9))


def test_a_damaged_or_foreign_trial_is_made_again(result, pair, tmp_path) -> None:
    import shutil

    shutil.copytree(result.folder, tmp_path / "out")
    pictures = tmp_path / "out" / "pictures"
    shutil.copy(pictures / "search-001.npz", pictures / "search-000.npz")
    again = compare(*pair, chosen(), tmp_path / "out", "cpu", reader=ColourReader(), search=wanted())
    assert np.array_equal(again.pictures("search-000"), result.pictures("search-000"))


# ------------------------------------------------------------------------------------------------------ a lucky pick


def row(name: str, fidelity: list[float], judge: list[float] | None = None) -> Row:
    grid = np.array(fidelity).reshape(-1, 2)
    judged = None if judge is None else np.array(judge).reshape(-1, 2)
    return Row(name, None, 0.5, Measured(grid, grid, grid, grid, grid, grid * 0, judged), "weighted_sum")


def test_a_lucky_pick_is_marked_by_the_judge_on_held_out_pictures() -> None:
    seen = row("search-000", [1.0, 1.0, 0.9, 0.9])
    lucky = Graded("search-000", "found", None, seen, row("x", [1.0] * 4, [0.4, 0.5, 0.5, 0.4]), {})
    fair = Graded("search-000", "found", None, seen, row("x", [0.1] * 4, [1.0, 0.9, 0.8, 1.0]), {})
    assert lucky.excluded and not fair.excluded
    assert lucky.grade is not None and lucky.grade.mean == pytest.approx(0.45)

    class One:
        trials = [None]
        found = lucky
        graded = [lucky]
        proxy = False

    assert "luck" in verdict(One())  # type: ignore[arg-type]
    parent = Graded("A", "A", None, seen, lucky.held_out, {})
    One.graded = [parent, lucky]
    assert "luck" not in verdict(One()) and "so it is with A" in verdict(One())  # type: ignore[arg-type]
    One.found, One.graded = fair, [parent, fair]
    assert "excludes" not in verdict(One())  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_held_out_means_held_out(pair, tmp_path) -> None:
    for search, word in ((wanted(prompts=(*HELD_OUT, PROMPTS[0])), "searched with and held out"),
                         (wanted(seeds=(0, 5)), "seed 0")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            compare(*pair, chosen(), tmp_path / "out", "cpu", reader=ColourReader(), search=search)
    with pytest.raises(UserError, match="nothing to search by"):
        compare(*pair, chosen(), tmp_path / "out", "cpu", search=wanted())  # nobody reads these pictures
    with pytest.raises(UserError, match="fidelity"):
        wanted(goals=("beauty",))
    assert not (tmp_path / "out").exists()


def test_drawn_prompts_ask_for_much_and_are_none_of_the_gates() -> None:
    prompts = drawn_prompts(16)
    assert len(set(prompts)) == 16 and all(len(parse(prompt)) >= 4 for prompt in prompts)
    assert drawn_prompts(8) == prompts[:8]


def test_options_of_a_search_need_a_search(tmp_path) -> None:
    for option in (["--goals", "fidelity"], ["--search-seed", "3"], ["--picks", "2"], ["--held-out-seeds", "9"]):
        with pytest.raises(UserError, match=f"{option[0]} has no effect without --search"):
            main(["a", "b", "-o", str(tmp_path / "o"), *option])
    (tmp_path / "p.txt").write_text("a face\n")
    with pytest.raises(UserError, match="one prompt"):
        main(["a", "b", "-o", str(tmp_path / "o"), "--search", "3", "--prompts", str(tmp_path / "p.txt")])
    with pytest.raises(UserError, match="at least 1"):
        main(["a", "b", "-o", str(tmp_path / "o"), "--search", "0"])


# ------------------------------------------------------------------------------------------------------ end to end


def test_search_on_pocket_end_to_end(tmp_path, capsys) -> None:
    from dodgeburn.models.loading import load_model

    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS[:1], HELD_OUT[0]]))
    words = ["pocket-style", "pocket-bold", "--search", "4", "--presets", "GradV", "--bases", "0.5", "--seeds", "0",
             "--steps", "1", "--guidance", "1", "--prompts", str(tmp_path / "p.txt"), "--picks", "1", "--device", "cpu",
             "-o", str(tmp_path / "out"), "--json"]  # fmt: skip
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["search"]
    assert found["prompts"] == [HELD_OUT[0]] and found["seeds"] == [1] and len(found["trials_made"]) == 4
    assert [g["role"] for g in found["graded"]] == ["A", "B", "best without search", "found"]
    assert all(g["held_out"]["fidelity_judge"] is not None for g in found["graded"])
    command = shlex.split(next(line for line in lines if line.startswith("found: ")).removeprefix("found: "))
    command[command.index("-o") + 1] = str(tmp_path / "m.safetensors")
    assert merge_main(command[2:]) == 0
    made = generate(load_model(tmp_path / "m.safetensors", "cpu"), [PROMPTS[0]], [0],
                    GenerateSettings(steps=1, guidance=1.0))  # fmt: skip
    shown = job.load_pictures(tmp_path / "out" / "pictures" / f"{found['found']}.npz")
    assert shown is not None and np.array_equal(np.asarray(list(made)[0].image), shown[0, 0])
