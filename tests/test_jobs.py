import json
from pathlib import Path

import pytest

from dodgeburn.errors import UserError
from dodgeburn.jobs import KeptRows, PartStore, check_folder, check_job_folder, job_hash


def test_hash_depends_on_values_not_on_order() -> None:
    one = job_hash({"steps": 20, "bases": [0.4, 0.5]})
    assert one == job_hash({"bases": (0.4, 0.5), "steps": 20})
    assert one != job_hash({"bases": [0.4, 0.5], "steps": 21})
    assert len(one) == 16 and int(one, 16) >= 0
    with pytest.raises(ValueError):
        job_hash({"x": float("nan")})


def test_parts_appear_whole_and_stay(tmp_path) -> None:
    store = PartStore(tmp_path / "job", {"steps": 20})
    assert store.new and not store.has("parts/a.bin")
    with store.writing("parts/a.bin") as part:
        part.write_bytes(b"whole")
        assert part.suffix == ".bin" and not store.has("parts/a.bin")
    again = PartStore(tmp_path / "job", {"steps": 20})
    assert not again.new and again.has("parts/a.bin") and again.path("parts/a.bin").read_bytes() == b"whole"
    assert json.loads((tmp_path / "job" / "job.json").read_text())["settings"] == {"steps": 20}


def test_failed_part_leaves_nothing(tmp_path) -> None:
    store = PartStore(tmp_path / "job", {})
    with pytest.raises(KeyboardInterrupt), store.writing("a.bin") as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "job").iterdir()] == ["job.json"]


def test_other_settings_are_refused_by_name(tmp_path) -> None:
    PartStore(tmp_path / "job", {"steps": 20, "seeds": [0]})
    with pytest.raises(UserError, match="steps was 20, now 12"):
        PartStore(tmp_path / "job", {"steps": 12, "seeds": [0]})


def test_a_job_that_fails_before_its_first_part_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    for folder, there in ((tmp_path / "new", False), (tmp_path, True)):
        with pytest.raises(UserError, match="width"), PartStore(folder, {"width": 63}).begun():
            raise UserError("width is 63")
        assert folder.exists() == there and not (folder / "job.json").exists()
    store = PartStore(tmp_path / "new", {"width": 64})
    with store.writing("part.txt") as part:
        part.write_text("x")
    with pytest.raises(UserError), store.begun():
        raise UserError("later")
    assert store.has("part.txt") and PartStore(tmp_path / "new", {"width": 64}).has("part.txt")


def test_a_folder_that_could_be_no_jobs_is_known_before(tmp_path: Path) -> None:
    check_job_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="not empty"):
        check_job_folder(tmp_path)
    with pytest.raises(UserError, match="cannot be written to|is a file"):
        check_job_folder(tmp_path / "x")


def test_what_differs_inside_of_a_setting_is_named(tmp_path) -> None:
    PartStore(tmp_path / "job", {"generate": {"guidance": 4.0, "steps": 20, "size": {"width": 64}}, "seeds": [0]})
    with pytest.raises(UserError, match=r"\(generate\.size\.width was 64, now 96\)"):
        PartStore(tmp_path / "job", {"generate": {"guidance": 4.0, "steps": 20, "size": {"width": 96}}, "seeds": [0]})


def test_foreign_folder_and_file_are_refused(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="mine.txt"):
        PartStore(tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        PartStore(tmp_path / "mine.txt" / "job", {})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "job.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        PartStore(tmp_path / "bad", {})


def test_kept_rows_are_there_again_and_a_torn_one_is_not(tmp_path: Path) -> None:
    rows = KeptRows(tmp_path / "new" / "rows.jsonl")
    rows.add("1", seen=[0.5])
    rows.add("2", seen=[])
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole + b'{"key": "3", "se')
    again = KeptRows(rows.path)
    assert again.rows == rows.rows == {"1": {"key": "1", "seen": [0.5]}, "2": {"key": "2", "seen": []}}
    assert again.path.read_bytes() == whole
    again.add("3", seen=[1])
    assert list(KeptRows(rows.path).rows) == ["1", "2", "3"]


def test_a_folder_is_checked_without_being_made(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "b", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="cannot be written to"):
            check_folder(folder)
