"""Headers of safetensors files: good ones read, hostile ones refused by name in bounded memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.checkpoint.tensorfile import (
    read_header,
)
from dodgeburn.errors import UserError


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = raw({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16))


def test_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD)
    header = read_header(tmp_path / "x")
    assert list(header.tensors) == ["a", "b"] and header.tensors["b"].start == 8 and header.size == len(GOOD)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "too few"),
        (b"{}", "too few"),
        (GOOD[:-1], "truncated"),
        (GOOD[:30], "truncated"),
        (GOOD + b"x", "after its last tensor"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"GGUF" + bytes(100), "not a safetensors"),
        (b"<!DOCTYPE html><html>not found</html>", "not a safetensors"),
        (raw(b'{"a":', length=1 << 40), "claims"),
        (raw(b'{"a":', length=100_000_001), "claims"),
        (raw(b'{"a": nope}'), "JSON"),
        (raw(b'{"a": "\xff"}'), "JSON"),
        (raw(b"{" + b'"a":[' * 50_000), "JSON"),
        (raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],'
             b'"data_offsets":[0,0]}}'), "twice"),
        (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
        (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlap"),
        (raw({"a": entry(offsets=(8, 16))}, bytes(16)), "hole"),
        (raw({"a": entry(offsets=(0, 12))}, bytes(12)), "does not take 12"),
        (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "tensor a"),
        (raw({"a": entry(offsets=(0, 8.0))}, bytes(8)), "data_offsets"),
        (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets"),
        (raw({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
        (raw({"a": entry(shape="2")}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(2**63,))}, bytes(8)), "shape"),
        (raw({"a": entry(shape=[1] * 64 + [2])}, bytes(8)), "shape"),
        (raw({"a": entry(shape=[2**62] * 60)}, bytes(8)), "does not take 8"),
        (raw({"a": entry(offsets=(0, 2**64))}, bytes(8)), "data_offsets"),
        (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)), "JSON"),
        (raw({"line\nend\x1b[31m": 3}), r"line\\nend\\x1b\[31m"),
        (raw({"a": entry(dtype="F31")}, bytes(8)), "F31"),
        (raw({"a": entry(dtype=None)}, bytes(8)), "None"),
        (raw({"a": 3}), "object"),
        (raw({"__metadata__": {"a": {"b": 1}}}), "metadata 'a' is not text"),
        (raw({"__metadata__": {"a": 1}}), "not text"),
        (raw({"__metadata__": ["a"]}), "__metadata__"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


READ_AND_SAY_PEAK = """
import sys
from dodgeburn.checkpoint.header import read_header
from dodgeburn.errors import UserError
try:
    read_header(sys.argv[1])
    print("read")
except UserError as error:
    print(error)
print(next(int(line.split()[1]) // 1000 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("start", "repeated", "end", "said"),
    [
        (b'{"a":[', b"[],", b"[]]}", "not valid JSON"),
        (b'{"a":[', b"{},", b"{}]}", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[', b"9" * 4000 + b",", b'1],"data_offsets":[0,8]}}', "not a list of counts"),
        (b'{"__metadata__":{"a":"', b"x", b'"}}', "read"),
    ],
    ids=["lists", "objects", "sides", "text"],
)
def test_the_longest_headers_take_bounded_memory(
    tmp_path: Path, start: bytes, repeated: bytes, end: bytes, said: str
) -> None:
    """99 MB of JSON that would take 2.5 GB, or an hour of multiplying, if it were believed."""
    path = tmp_path / "long"
    text = start + repeated * ((99_000_000 - len(start) - len(end)) // len(repeated)) + end
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_SAY_PEAK, str(path)], capture_output=True, text=True, timeout=60
    )
    *words, peak = done.stdout.splitlines()
    assert said in words[0] and len(words) == 1, done.stdout + done.stderr
    assert int(peak) < 500


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="a pipe or a device"):
            read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, len(GOOD)))
def test_random_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(GOOD[:at] + junk + GOOD[at + len(junk) :])
    try:
        header = read_header(path)
    except UserError:
        return
    assert header.data_start + sum(info.nbytes for info in header.tensors.values()) == path.stat().st_size


def test_a_header_of_128_bytes_is_not_a_pickle(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode().ljust(128)
    (tmp_path / "x").write_bytes(raw(text, bytes(8)))
    assert (tmp_path / "x").read_bytes()[:1] == b"\x80"
    assert list(read_header(tmp_path / "x").tensors) == ["a"]


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="folder"):
        read_header(tmp_path)


def test_headers_need_no_torch() -> None:
    code = (
        "import sys; import dodgeburn.checkpoint.tensorfile, dodgeburn.checkpoint.layout, "
        "dodgeburn.checkpoint.metadata, dodgeburn.merge.presets, dodgeburn.merge.blocks, "
        "dodgeburn.cli.inspect, dodgeburn.cli.merge; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0


def test_a_picture_is_no_checkpoint_and_the_line_says_what_reads_it(tmp_path: Path) -> None:
    from dodgeburn.cli.inspect import inspect_file

    (tmp_path / "face.PNG").write_bytes(b"no picture either")
    with pytest.raises(UserError, match="named as a picture: .*`dodgeburn generate --from .*face.PNG`"):
        inspect_file(str(tmp_path / "face.PNG"))
