"""Preference pairs: both forms read, what is bad counted by reason, round trips."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.rework.dpo import pairs as module
from dodgeburn.rework.dpo.pairs import Preference, PreferencePairs, checked, read_pairs, read_sets, write_pairs


def pixels(seed: int, width: int = 32, height: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(label: float | None, seed: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "caption": f"a face {seed}", "jpg_0": encoded(pixels(2 * seed)), "jpg_1": encoded(pixels(2 * seed + 1)),
        "label_0": label, **other,
    }  # fmt: skip


def folder(root: Path, lines: list[Any], pictures: dict[str, np.ndarray]) -> Path:
    root.mkdir(exist_ok=True)
    for name, array in pictures.items():
        Image.fromarray(array).save(root / name)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "pairs.jsonl").write_text("\n".join(text) + "\n")
    return root


def test_labels_of_pick_a_pic_choose_the_winner_and_ties_are_counted(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [row(1.0, 0), row(0.0, 1), row(0.5, 2), row(0.5, 3), row(None, 4)])
    found = read_pairs(path)
    assert found.captions == ["a face 0", "a face 1"]
    for pair, (winner, loser) in zip(found, ((0, 1), (3, 2)), strict=True):
        assert np.array_equal(pair.pixels()[0], pixels(winner)) and np.array_equal(pair.pixels()[1], pixels(loser))
    assert found.dropped == {module.TIE: 2, module.LABEL: 1}
    assert "2 ties (first: a.parquet row 2)" in found.report() and "3 dropped" in found.report()


def test_a_folder_of_parquet_files_and_cells_of_the_datasets_library(tmp_path: Path) -> None:
    cell = {"bytes": encoded(pixels(7)), "path": "7.png"}
    parquet(tmp_path / "a.parquet", [row(1.0, 0)])
    parquet(tmp_path / "b.parquet", [row(0.0, 1, jpg_0=cell, jpg_1={"bytes": encoded(pixels(8)), "path": None})])
    found = read_pairs(tmp_path)
    assert len(found) == 2 and np.array_equal(found.pairs[1].pixels()[1], pixels(7))
    assert len(read_pairs(tmp_path, limit=1)) == 1


def test_bad_pairs_are_counted_by_reason(tmp_path: Path) -> None:
    good = {"caption": "a face", "win": "a.png", "lose": "b.png"}
    root = folder(
        tmp_path,
        [
            good, {**good, "lose": "gone.png"}, {**good, "lose": None}, {**good, "lose": "a.png"},
            {**good, "lose": "copy.png"}, {**good, "lose": "wide.png"}, {**good, "lose": "torn.png"},
            {**good, "lose": "dot.png"}, {**good, "weight": 0}, {**good, "weight": "much"}, {**good, "weight": True},
            {"win": "a.png", "lose": "b.png"}, "{torn", "[1]", {**good, "caption": 3}, "",
            {"caption": "a face", "winner": "a.png", "loser": "b.png"}, {**good, "weight": 0.5, "seed": 4},
        ],
        {
            "a.png": pixels(0), "b.png": pixels(1), "copy.png": pixels(0), "wide.png": pixels(2, 40),
            "dot.png": pixels(3, 8),
        },
    )  # fmt: skip
    (root / "torn.png").write_bytes(encoded(pixels(4))[:200])
    found = read_pairs(root)
    assert found.dropped == {
        module.MISSING: 2, module.SAME: 2, module.SIZES: 1, module.UNREADABLE: 1, module.SMALL: 1, module.WEIGHT: 3,
        module.LINE: 5,
    }  # fmt: skip
    assert found.first[module.SIZES] == "line 6, 32x24 and 40x24"
    assert [pair.weight for pair in found] == [1.0, 0.5] and found.pairs[1].notes == {"seed": 4}
    assert "\n" not in found.report()


def test_several_sets_are_one_behind_the_other(tmp_path: Path) -> None:
    pictures = {"a.png": pixels(0), "b.png": pixels(1)}
    tie = {"caption": "gone", "win": "a.png", "lose": None}
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    x = folder(tmp_path / "x", [{"caption": "one", "win": "a.png", "lose": "b.png"}, tie], pictures)
    y = folder(tmp_path / "y", [tie, {"caption": "two", "win": "b.png", "lose": "a.png", "weight": 0.5}], pictures)
    (y / "about.json").write_text('{"preference": "mine"}')
    found = read_sets([x, y])
    assert found.captions == ["one", "two"] and list(found.weights) == [1.0, 0.5]
    assert found.dropped == {module.MISSING: 2} and found.first[module.MISSING] == f"line 2 of {x}"
    assert found.about == {"sets": [{}, {"preference": "mine"}]}
    assert len({found.sha256, read_sets([y, x]).sha256, read_pairs(x).sha256}) == 3
    assert read_sets([y]).sha256 == read_pairs(y).sha256 and read_sets([y]).about == {"preference": "mine"}
    with pytest.raises(UserError, match="at least one"):
        read_sets([])
    with pytest.raises(UserError, match="named twice"):
        read_sets([x, y, tmp_path / "y" / ".." / "x"])


def test_sizes_can_be_cropped_instead(tmp_path: Path) -> None:
    lines = [{"caption": "a face", "win": "a.png", "lose": "b.png"}]
    root = folder(tmp_path, lines, {"a.png": pixels(0, 32, 24), "b.png": pixels(1, 40, 20)})
    with pytest.raises(UserError, match="1 with pictures of different sizes"):
        read_pairs(root)
    (pair,) = read_pairs(root, crop=True)
    assert [side.shape for side in pair.pixels()] == [(20, 32, 3)] * 2


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 pairs, 2 dropped: 2 ties \(first: a.parquet row 0\); nothing is left"):
        read_pairs(parquet(tmp_path / "a.parquet", [row(0.5, 0), row(0.5, 1)]))


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "torn parquet", "other columns", "picture"])
def test_what_holds_no_pairs_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.parquet"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "torn parquet":
        path.write_bytes(b"PAR1 and nothing")
    elif kind == "other columns":
        parquet(path, [{"caption": "a", "image": b""}])
    elif kind == "picture":
        path = tmp_path / "x.png"
        path.write_bytes(encoded(pixels(0)))
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_written_pairs_come_back(tmp_path: Path) -> None:
    made = checked([
        Preference("ein Gesicht", pixels(0), pixels(1), notes={"seeds": [0, 1]}),
        Preference("a face, \"quoted\"\nand broken", pixels(0), pixels(2), 0.25),
    ])  # fmt: skip
    write_pairs(tmp_path / "out", made, {"by": "contrast"})
    again = read_pairs(tmp_path / "out")
    assert again.captions == made.captions and again.about == {"by": "contrast"}
    assert again.sha256 == made.sha256 and np.array_equal(again.weights, [1.0, 0.25])
    assert again.pairs[0].notes == {"seeds": [0, 1]}
    assert len(list((tmp_path / "out/pictures").iterdir())) == 3  # the winner of both once
    with pytest.raises(UserError, match="exists already"):
        write_pairs(tmp_path / "out", made)


def test_the_hash_knows_pictures_captions_weights_and_order() -> None:
    def digest(*pairs: Preference) -> str:
        return checked(pairs).sha256

    a, b = Preference("a", pixels(0), pixels(1)), Preference("b", pixels(2), pixels(3))
    others = [
        digest(b, a), digest(a), digest(a, Preference("b", pixels(3), pixels(2))),
        digest(a, Preference("b", pixels(2), pixels(3), 2.0)), digest(a, Preference("c", pixels(2), pixels(3))),
    ]  # fmt: skip
    assert digest(a, b) == digest(a, b) and digest(a, b) not in others and len(set(others)) == 5


def test_an_empty_report() -> None:
    assert PreferencePairs([]).report() == "pairs: 0 pairs"
