"""A job is its settings: their hash names it, and the parts it has finished let it go on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError

RECORD = "job.json"


def job_hash(settings: Mapping[str, Any]) -> str:
    """16 hex digits that depend on the settings alone (not on the order of their keys).

    Settings are what JSON can hold; tuples count as lists. NaN raises ValueError.
    """
    return hashlib.sha256(_canonical(settings).encode()).hexdigest()[:16]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class PartStore:
    """A job's folder with its finished parts: files that are there are whole, so a second run makes only the rest.

    The folder holds `job.json` with the settings. Raises UserError for a folder that belongs to other settings, that
    holds anything else, or that cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._made = Path(folder), False
        self.settings = json.loads(_canonical(settings))
        self.hash = job_hash(settings)
        record = self.folder / RECORD
        if record.exists():
            self._check(record)
            self.new = False
        else:
            made = not self.folder.exists()
            make_folder(self.folder)
            _check_empty(self.folder)
            self._made = made
            with self.writing(RECORD) as part:
                part.write_text(json.dumps({"hash": self.hash, "settings": self.settings}, indent=2) + "\n")
            self.new = True

    def _check(self, record: Path) -> None:
        try:
            stored = json.loads(record.read_text())
            found, before = stored["hash"], dict(stored["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{record} cannot be read: remove the folder or give another one") from None
        if found == self.hash:
            return
        name, was, now = _first_difference("", before, self.settings)
        what = f"{name} was {_short(was)}, now {_short(now)}" if name else ""
        raise UserError(
            f"{self.folder} holds a run with other settings ({what}): give another folder, or the same to go on"
        )

    def path(self, name: str) -> Path:
        """Where a part lies (or will lie)."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the part is finished."""
        return self.path(name).is_file()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Around a job's work: after an error that left no part, the folder is as it was before, for the same command
        with that mended has other settings."""
        try:
            yield
        except UserError:
            if self.new and not any(p.name != RECORD for p in self.folder.iterdir()):
                self.path(RECORD).unlink()
                if self._made:
                    self.folder.rmdir()
            raise

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path to write a part to. It gets its name when the block ends, and is removed if it fails.

        The temporary name keeps the part's ending, by which picture libraries choose the format.
        """
        target = self.path(name)
        temporary = target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.filename in (None, str(temporary), str(target), str(target.parent)):
                raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
            raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class KeptRows:
    """JSON lines that survive being killed: a row is on the disk when `add` returns, and one that was cut off while it
    was written is dropped when the file is opened again. Every row has a key, by which it is found in `rows`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                key = str(row["key"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self.rows[key] = row
            whole += len(line)
        os.truncate(path, whole)

    def add(self, key: str, **said: Any) -> None:
        """Append a row."""
        row = {"key": key, **said}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self.rows[key] = row


def make_folder(folder: Path) -> None:
    """Make the folder and those above it; UserError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from None


def check_job_folder(folder: Path) -> None:
    """UserError if no `PartStore` could be there, whatever its settings; nothing stays. For before the work."""
    check_folder(folder)
    if folder.exists() and not (folder / RECORD).exists():
        _check_empty(folder)


def _check_empty(folder: Path) -> None:
    others = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != RECORD]
    if others:
        raise UserError(f"{folder} is not empty ({min(others)}) and no job of ours: give a new or empty folder")


def check_folder(folder: Path) -> None:
    """UserError if the folder cannot be made or written to; nothing stays. For verbs that write late."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    probe = there / f".{os.getpid()}-{secrets.token_hex(4)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from None


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first setting that differs, looked for inside of settings that are tables, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return name, before, now
    key = next((k for k in {**before, **now} if before.get(k) != now.get(k)), None)
    if key is None:
        return "", None, None
    return _first_difference(f"{name}.{key}" if name else key, before.get(key), now.get(key))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
