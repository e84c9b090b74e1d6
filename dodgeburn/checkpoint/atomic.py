"""Files that are complete under their name or not there: temporary name, fsync, rename; never over an input."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dodgeburn.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def explain(error: OSError, path: Path) -> UserError:
    """What a failed write means to the user, as an error to raise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path} cannot be written: the disk is full; free some space or write elsewhere")
    if error.errno == errno.EFBIG:
        return UserError(f"{path} cannot be written: the file would be larger than the system allows")
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def check_output(path: str | Path, inputs: Sequence[str | Path] = ()) -> Path:
    """The real path to write to, after following links; UserError if it is a folder, in no folder, in one that
    cannot be written to, or one of `inputs`.

    The same file under another name (symbolic or hard link) counts as an input too.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"{path} is not a file name to write to")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"{path} is a folder: expected the name of a file to write")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is not a folder: make it first, or write {path.name} elsewhere")
    for source in inputs:
        same = os.path.realpath(source) == str(target)
        if not same and target.exists() and Path(source).exists():
            same = os.path.samefile(source, target)
        if same:
            raise UserError(f"{path} is also an input ({source}): choose another output name")
    probe = _temporary(target, "tmp")
    try:  # by doing it: a root's rights say nothing about a disk that is read-only
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise explain(error, path) from None
    return target


def _temporary(target: Path, ending: str) -> Path:
    # Short and in the same folder: a rename must not cross disks, and long names must not grow past 255
    # bytes.
    return target.parent / f".dodgeburn-{os.getpid()}-{secrets.token_hex(4)}.{ending}"


def open_part(target: Path) -> tuple[int, Path]:
    """A new file beside `target` to fill and to rename: its descriptor, locked as long as it is open, and its path.

    Parts of runs that were killed, which nobody holds a lock on any more, are removed first.
    """
    _remove_abandoned(target.parent)
    while True:
        part = _temporary(target, "part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _lock(fd) and part.exists():
            return fd, part
        os.close(fd)  # another run took it for abandoned before it was locked
        part.unlink(missing_ok=True)


def _lock(fd: int) -> bool:
    """Lock an open file for this process; False if another has it. Where there are no locks, nothing is abandoned."""
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _remove_abandoned(folder: Path) -> None:
    if fcntl is None:
        return
    for part in folder.glob(".dodgeburn-*.part"):
        try:
            if not stat.S_ISREG(part.lstat().st_mode):
                continue
            fd = os.open(part, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        except OSError:
            pass  # in use, or a disk without locks
        finally:
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open folders; the file itself is on disk already
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: str | Path, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, removed if anything went
    wrong.

    Raises UserError for an output that is an input, an unwritable folder and a full disk.
    """
    target = check_output(path, inputs)
    part = _temporary(target, "tmp")
    try:
        yield part
        fd = os.open(part, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        # Only trouble with our own file is ours to explain; anything else happened inside the caller's block.
        if error.filename in (None, str(part), str(target)):
            raise explain(error, Path(path)) from None
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write bytes to a file so that it is either complete or not there; UserError as in atomic_path."""
    with atomic_path(path) as part:
        part.write_bytes(data)
