"""Names that are nearly right, and messages that stay on one line."""

from __future__ import annotations

import pytest

from dodgeburn.errors import UserError, did_you_mean, near_names


def test_near_names_come_nearest_first_whatever_their_case() -> None:
    known = ("MBW_A", "balanced", "Balancing", "uce")
    assert near_names("balancd", known) == ["balanced", "Balancing"]
    assert near_names("BALANCED", known, n=1) == ["balanced"]
    assert near_names("mbw_a", known) == ["MBW_A"]
    assert near_names("xyz", known) == []


@pytest.mark.parametrize(
    ("name", "cutoff", "said"),
    [("balancd", 0.5, "did you mean balanced? "), ("zzz", 0.5, ""), ("", 0.5, ""), ("uc", 0.9, "")],
)
def test_a_hint_stands_before_what_is_known_or_is_empty(name: str, cutoff: float, said: str) -> None:
    assert did_you_mean(name, ("balanced", "uce"), cutoff=cutoff) == said


def test_an_error_writes_out_control_characters() -> None:
    assert str(UserError("no model 'a\nb\x1b[2J'")) == "no model 'a\\nb\\x1b[2J'"
