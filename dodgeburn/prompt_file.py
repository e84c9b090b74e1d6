"""Prompts that somebody wrote into a file, one a line: read the same way by every verb."""

from __future__ import annotations

from pathlib import Path

from dodgeburn.errors import UserError


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file in UTF-8, as they stand; empty lines and those that begin with # are left out.

    Raises UserError for a file that is missing, no text, or without a prompt.
    """
    wanted = "expected a text file with one prompt a line"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: {wanted}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {wanted}") from None
    if any(c < " " and c not in "\t\n\v\f\r" for c in text):  # a model's header decodes as UTF-8, for one
        raise UserError(f"{path} is not a text file, it has control characters: {wanted}")
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))
    if not prompts:
        raise UserError(f"{path} has no prompts: {wanted} (lines that begin with # are left out)")
    return prompts
