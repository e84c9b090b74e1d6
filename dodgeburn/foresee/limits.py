"""What exact reading would reach: the oracles that make the labels, asked on a picture's way and once more at its end.

Two limits of every estimator of pocket pictures. The pixel oracles on the decoded guess of the clean latents need no
training and see all that is settled there, at many times the price of an estimator: what they miss at a share of the
steps is not there to be read yet. And labels agree with themselves only so far: after a little noise on the finished
picture, or with another reader behind the same oracles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dodgeburn.foresee import scores
from dodgeburn.foresee.ahead import hazy
from dodgeburn.foresee.feed import Where
from dodgeburn.foresee.labels import BAD_FROM
from dodgeburn.foresee.shards import Store, Trajectory, slot_of
from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.model import Model
from dodgeburn.pocket.reader import Reader

SHARES = (0.25, 0.5, 0.75, 1.0)


def limits(model: Model, store: Store, where: Where, most: int) -> dict[str, Any]:
    """`srcc` (within prompts) and `auroc` of the oracles against the labels of the first `most` pictures that `where`
    lets through: `oracle_25` .. `oracle_100` by the share of the steps, `noise`, and `judge` (the labels are taken to
    be the reader's). The store must have kept pictures.
    """
    records: list[Trajectory] = []
    guesses: list[torch.Tensor] = []
    pictures: list[np.ndarray] = []
    for shard in store.shards(("x0", "progress", "picture")):
        for i, record in enumerate(shard.records):
            if record.label is None or not where(record) or len(records) == most:
                continue
            rows = shard.rows(i)
            steps = shard.tensors["progress"][rows]
            at = [max(0, int((steps <= share + 0.03).sum()) - 1) for share in SHARES]
            records.append(record)
            guesses.append(shard.tensors["x0"][rows][at].float())
            pictures.append(shard.tensors["picture"][i].numpy())
        if len(records) == most:
            break
    true = np.array([r.label.severity for r in records if r.label])
    slots, prompts = np.array([slot_of(r) for r in records]), [r.prompt for r in records]

    def said(seen: np.ndarray, reader: str = "reader") -> dict[str, float]:
        found = np.array([f.severity for f in find_artifacts(seen, prompts, Reader.load(reader))])
        return {
            "srcc": scores.within_prompt_spearman(found, true, slots), "auroc": scores.auroc(found, true >= BAD_FROM)
        }  # fmt: skip

    out: dict[str, Any] = {"pictures": len(records), "prompts": len(set(prompts))}
    for k, share in enumerate(SHARES):
        decoded = decode_pictures(model.vae, torch.stack([g[k] for g in guesses])).numpy()
        out[f"oracle_{100 * share:.0f}"] = said(decoded)
    last = np.stack(pictures)
    out["noise"] = said(hazy(last, 0))
    return {**out, "judge": said(last, "judge")}
