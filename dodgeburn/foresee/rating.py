"""People's labels for trajectories that were collected: their pictures out as files, and the ratings back in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.foresee.labels import Label
from dodgeburn.foresee.shards import Store, read_shard, write_shard
from dodgeburn.jobs import PartStore

LIST = "ratings.jsonl"


def write_pictures(store: Store, folder: str | Path) -> int:
    """Write every trajectory's finished picture as PNG, named by its id, and a list of them with an empty `severity` to
    fill in; how many. The folder is new, empty, or one of the same pictures. Raises UserError where none were kept.
    """
    parts = PartStore(folder, {"kind": "pictures to rate", "trajectories": store.digest})
    lines = []
    for shard in store.shards():
        if "picture" not in shard.tensors:
            raise UserError("these trajectories were collected without their pictures: nobody can rate them")
        for record, picture in zip(shard.records, shard.tensors["picture"].numpy(), strict=True):
            name = f"{record.id}.png"
            if not parts.has(name):
                with parts.writing(name) as path:
                    Image.fromarray(picture).save(path, format="PNG")
            said = {"id": record.id, "image": name, "prompt": record.prompt, "severity": None}
            lines.append(json.dumps({**said, "generator": record.generator, "seed": record.seed}, ensure_ascii=False))
    if not parts.has(LIST):  # may be half filled in by now
        with parts.writing(LIST) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def relabelled(store: Store, labels: Mapping[str, Label], folder: str | Path) -> tuple[int, list[str]]:
    """Write the shards with these labels by trajectory; those without one keep what they have. How many got one, and
    names that no trajectory has. Raises UserError for a folder of something else, and when none of the names is there.
    """
    ids = {record.id for record in store.records}
    unknown = sorted(set(labels) - ids)
    if not ids & set(labels):
        raise UserError(
            f"none of the {len(labels)} ratings is of these trajectories: is {unknown[0]!r} of another folder?"
        )
    said = {name: list(label.histogram) for name, label in sorted(labels.items())}
    parts = PartStore(folder, {"kind": "relabelled", "trajectories": store.digest, "labels": said})
    for path in store.paths:
        if parts.has(path.name):
            continue
        shard = read_shard(path)
        shard.records = [replace(r, label=labels.get(r.id, r.label)) for r in shard.records]
        with parts.writing(path.name) as out:
            write_shard(out, shard)
    return len(ids & set(labels)), unknown
