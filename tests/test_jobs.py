import json

import pytest

from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore, job_hash


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
