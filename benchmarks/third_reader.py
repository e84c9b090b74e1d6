"""A third reader of pocket pictures, and its labels for a collection of trajectories.

    python benchmarks/third_reader.py WORK                      # trains it: some 20 minutes of one processor
    python benchmarks/third_reader.py WORK --label DIR -o OUT   # DIR: a folder of `artifacts collect`, with pictures

What is chosen on trajectories (rules, searches, opinions on looks ahead) is chosen too boldly where the reader labels
them: the critic who reads finished pictures is the same reader, and agrees with itself. The judge, who labels what is
graded, must have no part in a choice. So choices have a labeller of their own: a network like the judge's, begun from
other weights and trained on other drawings than either.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dodgeburn.checkpoint.tensorfile import save_tensors
from dodgeburn.foresee.rating import relabelled
from dodgeburn.foresee.shards import Label, Store
from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.foresee.zoo import pocket_zoo
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.pictures import attributes_of, draw_pictures, picture_list
from dodgeburn.pocket.reader import Reader, network
from dodgeburn.pocket.world import LOOKS
from dodgeburn.training.pocket import PocketTraining
from dodgeburn.training.pocket_readers import train_reader
from dodgeburn.training.pocket_vae import decode, encode

SEED = 71  # of its drawings and its first weights; the reader has 21, the judge 31
KIND = "judge"  # whose network it has


def third_reader(folder: Path) -> Reader:
    """The one that is in the folder, or a new one."""
    path = folder / "third.safetensors"
    if path.exists():
        net = network(KIND)
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return Reader(net, "third")
    c, vae = PocketTraining(), load_model("pocket", device="cpu", dtype="fp32").vae
    attributes, pictures = picture_list(c.reader_pictures, SEED, 64, folder)
    with torch.autocast("cpu", torch.bfloat16):
        trips = decode(vae, encode(vae, pictures[: c.reader_trips], "cpu"), "cpu")
    others = [attributes_of(i, SEED + 1) for i in range(8000)]
    looks = np.concatenate([draw_pictures(others[:4000], 64, "ink"), draw_pictures(others[4000:], 64, "bold")])
    torch.manual_seed(SEED)
    reader = train_reader(
        KIND, [pictures, trips, looks], [attributes, attributes[: c.reader_trips], others], folder / "third",
        c.reader, c.reader_batch, c.reader_polish,
    )  # fmt: skip
    save_tensors(path, {k: v.half() for k, v in reader.net.state_dict().items()}, {"format": "pt"})
    return Reader(reader.net, "third")


def label(reader: Reader, collection: Path, out: Path) -> int:
    """The collection's shards with the pixel oracles' labels by this reader; how many trajectories."""
    store = Store(collection)
    zoo = {member.name: member for member in pocket_zoo(load_model("pocket", device="cpu", dtype="fp32")).members}
    labels: dict[str, Label] = {}
    for shard in store.shards():
        # A merge with a fine-tune takes on its look, which is no failure.
        towards = zoo[shard.records[0].generator].change == "towards"
        found = find_artifacts(
            shard.tensors["picture"].numpy(),
            [r.prompt for r in shard.records],
            reader,
            LOOKS if towards else ("plain",),
        )
        labels |= {r.id: f.label("third") for r, f in zip(shard.records, found, strict=True)}
        print(f"{len(labels)} of {len(store.records)}", flush=True)
    return relabelled(store, labels, out)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="WORK")
    parser.add_argument("--label", type=Path, metavar="DIR")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    reader = third_reader(args.folder)
    if args.label:
        if args.out is None:
            parser.error("--label writes a new folder: name it with -o")
        print(json.dumps({"labelled": label(reader, args.label, args.out)}))


if __name__ == "__main__":
    main()
