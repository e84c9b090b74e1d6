"""Tables that users bring, whatever they are written in: parquet, JSON lines, JSON, CSV, TFRecord; rows as dicts."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError

Row = dict[str, Any]
ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tfrecord")


def read_table(path: Path) -> list[Row]:
    """The rows of a table. Raises UserError for a file that is missing, empty, or in none of ENDINGS."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of ratings")
    kind = ".tfrecord" if ".tfrecord" in path.name else path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        elif kind == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif kind == ".json":
            rows = _of_json(json.loads(path.read_text(encoding="utf-8")))
        elif kind == ".csv":
            import pyarrow.csv

            rows = pyarrow.csv.read_csv(path).to_pylist()
        elif kind == ".tfrecord":
            rows = [_example(record) for record in _records(path.read_bytes())]
        else:
            raise UserError(f"{path}: expected one of {', '.join(ENDINGS)}")
    # pyarrow's errors are ValueErrors too
    except (OSError, ValueError, RecursionError, struct.error, IndexError) as error:
        raise UserError(f"{path}: cannot be read as {kind[1:]} ({str(error).splitlines()[0][:80]})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no rows with named columns in it")
    return rows


def _of_json(value: Any) -> list[Row]:
    """A list of objects; or an object of objects, whose keys become `image_name` (DiffusionDB's parts)."""
    if isinstance(value, dict):
        return [{"image_name": key, **row} for key, row in value.items() if isinstance(row, dict)]
    return value if isinstance(value, list) else []


# -------------------- TFRecord, without TensorFlow: records framed by their length, each one a tf.train.Example


def _records(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            raise ValueError("the last record is cut short")
        yield data[at + 12 : at + 12 + length]  # 8 of length, 4 of its checksum; 4 of the record's checksum follow
        at += 16 + length


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Protocol buffers: (field number, value) of a message; a value is an int or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"unknown wire type {wire}")
            size, at = _varint(data, at)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _example(record: bytes) -> Row:
    """Example { features { feature { key, value { bytes_list | float_list | int64_list } } } }; single values alone."""
    row: Row = {}
    for _, features in _fields(record):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))
            values: list[Any] = []
            for kind, body in _fields(parts.get(2, b"")):
                for _, value in _fields(body):
                    if kind == 2:  # floats, packed or one by one
                        values += struct.unpack(f"<{len(value) // 4}f", value)
                    else:
                        values.append(value)
            name = parts[1].decode()
            texts = [_text(v) for v in values]
            row[name] = texts[0] if len(texts) == 1 else texts
    return row


def _text(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value  # an encoded picture
