"""Preferences as programs, and pairs made by them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.foresee.preference import artifact_rating
from dodgeburn.images.png import read_png
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, draw_attributes
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Readings
from dodgeburn.pocket.world import LOOKS, render
from dodgeburn.rework.dpo.make_pairs import (
    MISSED,
    Drawn,
    DrawSettings,
    choose_by,
    choose_from,
    open_drawn,
    pocket_prompts,
    write_chosen,
)
from dodgeburn.rework.dpo.pairs import read_pairs
from dodgeburn.rework.dpo.ratings import Rating, centring, contrast, faithfulness, looks, rating, wins
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.training.pocket import development_prompts, gate_prompts


def square(at: tuple[int, int], light: int = 255) -> np.ndarray:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[at[0] - 4 : at[0] + 4, at[1] - 4 : at[1] + 4] = light
    return picture


def test_contrast_and_centring_by_hand() -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    assert contrast(half[None])[0] == pytest.approx(0.5)  # half black, half white: the largest there is
    middle, aside = square((16, 16)), square((16, 24))
    found = centring(np.stack([middle, aside, np.full((32, 32, 3), 7, np.uint8)]))
    assert found[0] == pytest.approx(1.0) and found[2] == 1.0
    assert found[1] == pytest.approx(0.5)  # 8 of 16 pixels from the middle
    assert looks(middle[None])[0] > looks(aside[None])[0] > looks(square((16, 24), 60)[None])[0]


def readings(**values: list) -> Readings:
    n = len(next(iter(values.values())))
    unreadable = np.array(values.pop("unreadable", [False] * n))
    found = {"hand": np.array(["none"] * n), "fingers": np.zeros(n, int)} | {k: np.array(v) for k, v in values.items()}
    return Readings(found, {k: np.ones(n, np.float32) for k in found}, unreadable)


def test_faithfulness_by_hand() -> None:
    asked = [{"hat": "cap", "smile": (0.6, 1.0)}] * 4
    seen = readings(
        hat=["cap", "cap", "none", "cap"], smile=[0.7, 0.45, 0.7, 0.7], hand=["waving", "waving", "none", "none"],
        fingers=[5, 4, 0, 0], unreadable=[False, False, False, True],
    )  # fmt: skip
    # (1 + 1 + 2) / 4; (1 + (1 - 0.15 / 0.3) + 0) / 4; (0 + 1 + 2 * 0.7) / 4; unreadable
    assert faithfulness(asked, seen) == pytest.approx([1.0, 0.375, 0.6, 0.0])


def test_faithfulness_prefers_the_drawing_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    rows = [draw_attributes(rng) for _ in range(24)]
    for a in rows:
        a |= {"hand": "waving", "fingers": 5, "sharpness": 0.8, "brightness": 0.5}
    words = ["a person, waving, " + ("wearing a cap" if a["hat"] == "cap" else "bareheaded") for a in rows]
    for a in rows:
        a["hat"] = "cap" if a["hat"] == "cap" else "none"
    right = np.stack([render(a) for a in rows])
    hats = {"cap": "none", "none": "cap"}
    variants = {
        "fingers": np.stack([render({**a, "fingers": 3}) for a in rows]),
        "hat": np.stack([render({**a, "hat": hats[str(a["hat"])]}) for a in rows]),
        "noise": rng.integers(0, 255, right.shape, dtype=np.uint8),
    }
    rates = rating("faithful").scores
    for name, wrong in variants.items():
        assert wins(rates(right, words), rates(wrong, words)).mean() >= 0.9, name


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.integers(0, 2**31))
def test_wins_are_antisymmetric(scores: list[float], seed: int) -> None:
    a = np.array(scores)
    b = np.random.default_rng(seed).permutation(a)
    assert np.allclose(wins(a, b) + wins(b, a), 1)
    assert np.all(wins(a, a) == 0.5)


def test_wishes_and_hands_are_the_halves_of_faithfulness() -> None:
    drawn = {**draw_attributes(np.random.default_rng(4)), "hand": "waving", "fingers": 5, "outfit": "doctor"}
    changes = ({}, {"fingers": 3}, {"outfit": "gardener"}, {"hand": "none", "fingers": 0})
    pictures = np.stack([render({**drawn, **change}) for change in changes])  # type: ignore[dict-item]
    prompts = ["a doctor, waving", "a doctor", "a doctor", "someone"]
    wishes, hands, both = (rating(by).scores(pictures, prompts) for by in ("wishes", "hands", "faithful"))
    assert wishes[:2] == pytest.approx([1, 1], abs=0.02) and wishes[2] == 0 and np.isnan(wishes[3])
    assert hands[:3].tolist() == [1, 0, 1] and np.isnan(hands[3])
    assert both[0] == pytest.approx((2 + 2) / 4, abs=0.02) and both[1] == pytest.approx(1 / 3, abs=0.02)
    assert both[2] == pytest.approx(2 / 3) and both[3] == pytest.approx(0.7)


def test_artifacts_of_a_drawing_are_none_and_of_a_spoilt_one_some() -> None:
    told: list[int] = []
    drawn = {**draw_attributes(np.random.default_rng(4)), "hand": "waving", "fingers": 5}
    right = render(drawn)  # type: ignore[arg-type]
    spoilt = right.copy()
    spoilt[20:36, 20:44] = (255, 0, 255)
    three = render({**drawn, "fingers": 3})  # type: ignore[arg-type]
    bold = render(drawn, look="bold")  # type: ignore[arg-type]
    pictures = np.stack([right, spoilt, three, bold])
    prompts = ["someone, waving"] * 4
    plain, worst, fingers, styled = artifact_rating(progress=told.append).scores(pictures, prompts)
    assert plain == 0 and not np.signbit(plain) and worst <= -3 and fingers <= -3 and told == [4]
    with pytest.raises(UserError, match="96 x 100: the artifact oracles"):
        artifact_rating().scores(np.zeros((1, 100, 96, 3), np.uint8), [""])
    assert artifact_rating(looks=LOOKS).scores(pictures, prompts)[3] >= styled


def test_a_picture_that_cannot_be_rated_loses() -> None:
    assert list(wins(np.array([np.nan, 1.0, np.nan]), np.array([0.0, np.nan, np.nan]))) == [0, 1, 0.5]


def drawn(scores: list[list[float]], folder: Path = Path()) -> tuple[Drawn, Rating]:
    """Pictures of which a program reads the scores that are given."""
    grid = np.array(scores)
    settings = DrawSettings(prompts=tuple(f"prompt {i}" for i in range(len(grid))), best_of=grid.shape[1])
    pictures = np.zeros((*grid.shape, 64, 64, 3), np.uint8)
    pictures[..., 0, 0, 0] = np.arange(grid.size).reshape(grid.shape)
    return Drawn(folder, settings, "m", "0" * 64, pictures), Rating("given", "test", lambda p, w: grid.ravel())


def test_best_and_worst_are_kept_and_the_rest_is_counted() -> None:
    nan = float("nan")
    pictures, by = drawn([[1, 9, 5, 3], [4, 4, 4, 4], [5, 5.2, 5.1, 5], [nan, nan, 3, nan], [nan, 2, 8, nan]])
    found = choose_by(pictures, by, near=0.5)
    assert [(c.prompt, c.win, c.lose) for c in found.choices] == [(0, 1, 0), (4, 2, 1)]
    assert found.choices[0].notes == {"scores": [9.0, 1.0]}
    assert found.dropped == {"ties": 1, "near ties": 1, "without two pictures that can be rated": 1}
    two = choose_by(pictures, by, near=0, pairs=2)
    assert [(c.prompt, c.win, c.lose) for c in two.choices] == [
        (0, 1, 0), (0, 2, 3), (2, 1, 3), (2, 2, 0), (4, 2, 1)
    ]  # fmt: skip
    with pytest.raises(UserError, match="pairs a prompt"):
        choose_by(pictures, by, pairs=3)
    nothing, _ = drawn([[1, 2]])
    with pytest.raises(UserError, match="rated none of 2"):
        choose_by(nothing, Rating("blind", "test", lambda p, w: np.full(2, np.nan)))


def test_a_persons_choices_are_checked(tmp_path: Path) -> None:
    pictures, _ = drawn([[1, 2], [3, 4]], tmp_path)
    path = tmp_path / "choices.json"

    def said(*entries: object) -> Path:
        path.write_text(json.dumps(list(entries)))
        return path

    found = choose_from(pictures, said({"win": "00001-01.png", "lose": "00001-00.png"}, {"tie": True}, {"win": None}))
    assert [(c.prompt, c.win, c.lose) for c in found.choices] == [(1, 1, 0)]
    assert found.dropped == {"ties": 1, "left open": 1}
    for entry, words in (
        ({"win": "00001-01.png", "lose": "00000-00.png"}, "two prompts"),
        ({"win": "00001-01.png", "lose": "00001-01.png"}, "twice"),
        ({"win": "00009-01.png", "lose": "00001-01.png"}, "no picture 00009-01.png"),
        ("yes", "expected win and lose"),
    ):
        with pytest.raises(UserError, match=words):
            choose_from(pictures, said(entry))
    path.write_text("{}")
    with pytest.raises(UserError, match="expected a list"):
        choose_from(pictures, path)


def test_no_pair_left_writes_nothing(tmp_path: Path) -> None:
    pictures, by = drawn([[1, 1], [2, 2]], tmp_path / "there")
    with pytest.raises(UserError, match="no pair is left of 2 prompts .2 ties"):
        write_chosen(pictures, choose_by(pictures, by), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_for_pairs_are_no_ones_that_anything_is_chosen_or_judged_on() -> None:
    prompts = pocket_prompts(60) + pocket_prompts(60, missed=True)
    assert len(prompts) == 120 and prompts[:20] == pocket_prompts(20)
    others = {row["prompt"] for row in [*development_prompts(1000), *gate_prompts()]}
    assert not others & set(prompts)
    assert sum(parse(p).get("hand") == "waving" for p in prompts) >= 36


def test_a_scorer_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def dark(pictures, prompts):\n    return -pictures.mean((1, 2, 3))\n"
        "def one(pictures, prompts):\n    return 1.0\n"
        "def fails(pictures, prompts):\n    raise KeyError('x')\n"
    )
    pictures = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (9, 3)])
    assert list(rating(f"{path}:dark").scores(pictures, ["a", "b"])) == [-9, -3]
    for name, words in (("one", "one number for each"), ("fails", "KeyError")):
        with pytest.raises(UserError, match=words):
            rating(f"{path}:{name}").scores(pictures, ["a", "b"])
    with pytest.raises(UserError, match="no function none"):
        rating(f"{path}:none")
    with pytest.raises(UserError, match="no such file"):
        rating(f"{tmp_path}/other.py:dark")
    with pytest.raises(UserError, match="no preference 'lookz': did you mean looks"):
        rating("lookz")
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        rating(f"{path}:dark")


def test_pairs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs"
    command = ["dpo", "pairs", "--by", "looks", "-n", "3", "--best-of", "4", "--steps", "2", "--near-tie", "0",
               "--device", "cpu", "-o", str(out), "--json"]  # fmt: skip
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["pairs"] == 3 and said["preference"] == "looks" and said["generate"]["steps"] == 2
    first = (out / "pairs.jsonl").read_bytes()
    pairs = read_pairs(out)
    assert len(pairs) == 3 and not pairs.dropped and pairs.captions == list(pocket_prompts(3))
    for pair in pairs:
        winner, loser = looks(np.stack(pair.pixels()))
        assert winner > loser and pair.notes["scores"] == pytest.approx([winner, loser], abs=1e-5)
    record = read_png(out / "pictures" / "00001-02.png").own
    assert record is not None and record["prompt"] == pocket_prompts(2)[1] and record["steps"] == 2
    # A run that was cut off: what is missing is made again, the same.
    kept = (out / "pictures" / "00000-00.png").stat().st_mtime_ns
    before = np.asarray(Image.open(out / "pictures" / "00002-03.png"))
    (out / "pictures" / "00002-03.png").unlink()
    (out / "pairs.jsonl").unlink()
    assert main(command) == 0
    assert (out / "pairs.jsonl").read_bytes() == first
    assert np.array_equal(np.asarray(Image.open(out / "pictures" / "00002-03.png")), before)
    there = (out / "pictures" / "00000-00.png").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "pictures" / "00000-00.png").stat().st_mtime_ns == there != kept
    capsys.readouterr()
    # Another preference on the same pictures.
    (tmp_path / "mine.py").write_text("def dark(pictures, prompts):\n    return -pictures.mean((1, 2, 3))\n")
    again = ["dpo", "pairs", "--pictures", str(out), "--by", f"{tmp_path}/mine.py:dark"]
    assert main([*again, "-o", str(out)]) == 2
    assert "holds other pairs" in capsys.readouterr().err
    assert main([*again, "-o", str(tmp_path / "dark"), "--near-tie", "0"]) == 0
    for pair in read_pairs(tmp_path / "dark"):
        assert pair.pixels()[0].mean() < pair.pixels()[1].mean()
    # The artifact oracles.
    oracle = tmp_path / "oracle"
    by = ["dpo", "pairs", "--pictures", str(out), "--by", "artifacts", "--near-tie", "0", "-o", str(oracle), "--json"]
    assert main(by) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["preference"] == "artifacts" and said["by"] == "reader" and said["pairs"] >= 1
    for row in map(json.loads, (oracle / "pairs.jsonl").read_text().splitlines()):
        assert 0 >= row["scores"][0] > row["scores"][1] >= -5
    # A person's choices on them.
    capsys.readouterr()
    person = tmp_path / "person"
    assert main(["dpo", "pairs", "--pictures", str(out), "--by", "none", "-o", str(person), "--json"]) == 0
    assert (person / "sheet-000.png").is_file()
    entries = json.loads((person / "choices.json").read_text())
    entries[1] |= {"win": entries[1]["pictures"][3], "lose": entries[1]["pictures"][0]}
    (person / "choices.json").write_text(json.dumps(entries))
    capsys.readouterr()
    by = ["--by", str(person / "choices.json"), "-o", str(tmp_path / "chosen")]
    assert main(["dpo", "pairs", *by]) == 2
    assert "--pictures" in capsys.readouterr().err
    assert main(["dpo", "pairs", "--pictures", str(out), *by]) == 0
    assert "wrote 1 pairs" in (printed := capsys.readouterr().out) and "2 left open" in printed
    won = read_pairs(tmp_path / "chosen").pairs[0].pixels()[0]
    assert np.array_equal(won, open_drawn(out).pictures[1, 3])


def test_every_seed_is_drawn_at_every_guidance(tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    command = ["dpo", "pairs", "--by", "none", "-n", "2", "--best-of", "4", "--steps", "2", "--guidance", "4", "1.5",
               "--device", "cpu", "-o", str(out)]  # fmt: skip
    assert main(command) == 0
    found = open_drawn(out)
    assert found.settings.guidances == (4, 1.5)
    records = [read_png(out / name).own for _, _, name in found.settings.rows]
    told = [(r["seed"] - 60_000, r["guidance"]) for r in records if r is not None]
    assert told == [(s, g) for s in range(4) for g in (4, 1.5)]
    assert all(not np.array_equal(found.pictures[p, k], found.pictures[p, k + 1]) for p in (0, 1) for k in (0, 2))
    # The pictures are those of `generate` at that guidance.
    model = load_model("pocket", "cpu")
    rows = found.settings.rows[1::2]
    made = generate(model, [p for p, _, _ in rows], [s for _, s, _ in rows], GenerateSettings(steps=2, guidance=1.5))
    again = np.stack([np.asarray(one.image) for one in made])
    assert np.array_equal(again, found.pictures.reshape(8, 64, 64, 3)[1::2])


def test_prompts_for_pairs_name_what_is_missed_more_often() -> None:
    asked = [parse(prompt) for prompt in pocket_prompts(200, missed=True)]
    named = {name: np.mean([name in one for one in asked]) for name in (*CONTINUOUS, *CATEGORICAL)}
    assert min(named[name] for name in MISSED) > 0.4
    assert max(share for name, share in named.items() if name not in (*MISSED, "hand")) < 0.25


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "x", "--by", "lookz"], "no preference 'lookz'"),
        (["--by", "looks"], "no output folder"),
        (["-o", "x", "-n", "0"], "number of prompts"),
        (["-o", "x", "--best-of", "1"], "2 to 256"),
        (["-o", "x", "--best-of", "3", "--guidance", "4", "2"], "a multiple of 2"),
        (["-o", "x", "--best-of", "4", "--guidance", "4", "4"], "stands there twice"),
        (["-o", "x", "--best-of", "4", "--guidance", "4", "-1"], "guidance"),
        (["-o", "x", "--pictures", "nowhere"], "holds no pictures"),
        (["-o", "x", "--pictures", "nowhere", "--steps", "3"], "--steps has no effect"),
        (["-o", "x", "--prompts", "missing.txt"], "missing.txt"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "pairs", *args]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "pears"]) == 2
    assert "did you mean pairs" in capsys.readouterr().err
    assert main(["dpo"]) == 0
    assert "dodgeburn dpo pairs" in capsys.readouterr().out
