"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dodgeburn.errors import UserError
from dodgeburn.prompt_file import read_prompts


def test_lines_are_prompts_but_for_comments_and_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("# a comment\n\n  a face \na doctor\na face\n", encoding="utf-8-sig")
    assert read_prompts(file) == ("a face", "a doctor", "a face")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# only comments\n", "has no prompts"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"\x02\0\0\0\0\0\0\0{}", "has control characters"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_read_is_said_with_what_was_expected(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{said}.*expected a text file with one prompt a line"):
        read_prompts(file)
