"""SIGKILL at random moments: whatever is left must be what was there before, or the complete new file.

Each run writes over an older file, is killed at a moment drawn from 0 to 1.5 times the run's usual length, and is clean
if the output is the older file or the complete new one byte for byte, every input is as it was, and nothing else in
the folder can be read as a checkpoint, unless it is the complete one. Then the same job runs to its end in what the
killed runs left behind. Children are forked, so that the moments fall on the job and not on imports. Runs of merge,
bake, convert and delta extract, on copies of the packaged models.

    python benchmarks/kill_merge.py --json
    python benchmarks/kill_merge.py --times 5 --verb merge
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch

from dodgeburn.checkpoint.naming import find_checkpoint
from dodgeburn.checkpoint.tensorfile import sha256_file
from dodgeburn.measure.machine import machine
from dodgeburn.merge.bake import bake
from dodgeburn.merge.delta import extract
from dodgeburn.merge.run import merge
from dodgeburn.models.convert import ConvertSettings, convert

VERBS = ("merge", "bake", "convert", "delta")


def jobs(folder: Path) -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """Verb -> the job that is killed, and another that makes the older file; both write to the path they are given.

    Makes the inputs in the folder.
    """
    a, b, delta = folder / "a.safetensors", folder / "b.safetensors", folder / "delta.safetensors"
    shutil.copy(find_checkpoint("pocket-style"), a)
    shutil.copy(find_checkpoint("pocket-bold"), b)
    extract(b, a, delta, "full")
    return {
        "merge": (lambda out: merge(a, b, out, preset="Cosine", base=0.4), lambda out: merge(a, b, out, base=0.7)),
        "bake": (lambda out: bake(a, [(delta, 0.5)], out), lambda out: bake(a, [(delta, 0.1)], out)),
        "convert": (
            lambda out: convert(a, out, ConvertSettings(dtype="fp16")),
            lambda out: convert(a, out, ConvertSettings(dtype="bf16")),
        ),
        "delta": (lambda out: extract(b, a, out, "full"), lambda out: extract(b, a, out, "full", dtype="bf16")),
    }


def killed(job: Callable[[Path], Any], out: Path, after: float) -> bool:
    """Run the job in a child and kill it `after` seconds; True if it was killed before it had ended."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(go, b"!")
            job(out)
            os._exit(0)
        except BaseException as error:
            print(f"the job failed: {error}", flush=True)
            os._exit(1)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("a job ended by itself with an error: nothing was measured")
    return os.WIFSIGNALED(status)


def readable(path: Path) -> bool:
    """Whether the safetensors library takes the file for a checkpoint, whatever its name."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            return len(file.keys()) >= 0
    except Exception:
        return False


def trial(verb: str, times: int, draw: random.Random) -> dict[str, Any]:
    """Kill one verb's job `times` times: counts, and what was wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name) / "work", Path(name) / "made"
        folder.mkdir()
        made.mkdir()
        job, other = jobs(folder)[verb]
        inputs = {path: sha256_file(path) for path in folder.iterdir()}
        # The title in the metadata is the output's name, so old and new are made under that name elsewhere.
        out, old, new = folder / "out.safetensors", made / "old" / "out.safetensors", made / "out.safetensors"
        old.parent.mkdir()
        other(old)
        job(new)  # warms up
        started = time.perf_counter()
        job(new)
        length = time.perf_counter() - started
        states = {sha256_file(old): "old", sha256_file(new): "new"}
        found: dict[str, Any] = {"clean": 0, "killed": 0, "old": 0, "new": 0, "left": 0, "problems": []}
        for _ in range(times):
            shutil.copy(old, out)
            found["killed"] += killed(job, out, draw.uniform(0, 1.5 * length))
            problems = [str(path.name) + " was touched" for path, sha in inputs.items() if sha256_file(path) != sha]
            state = states.get(sha256_file(out), "damaged")
            if state == "damaged":
                problems.append("the output is neither the old file nor the new one")
            else:
                found[state] += 1
            rest = [path for path in folder.iterdir() if path not in inputs and path != out]
            # Between the last flush and the rename the part is the complete file.
            whole = [path for path in rest if sha256_file(path) == sha256_file(new)]
            problems += [f"{path.name} can be read" for path in rest if path not in whole and readable(path)]
            found["left"] += bool(rest)
            found["clean"] += not problems
            found["problems"] += problems
        job(out)
        leftover = [path.name for path in folder.iterdir() if path not in inputs and path != out]
        if sha256_file(out) != sha256_file(new) or leftover:
            found["problems"].append(f"a run after the killed ones left {leftover} or another file")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="3 times")
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.times = 3
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # before a fork: torch's own threads would not live on in the child
    draw = random.Random(options.seed)
    result: dict[str, Any] = {"times": options.times, "seed": options.seed, "machine": machine()}
    for verb in options.verb or VERBS:
        found = result[verb] = trial(verb, options.times, draw)
        print(
            f"{verb:<8} {found['clean']} of {options.times} clean: {found['killed']} killed before the end, "
            f"{found['old']} old and {found['new']} new files, {found['left']} runs left an unreadable part"
        )
        for problem in found["problems"]:
            print(f"         {problem}")
    if options.json:
        print(json.dumps(result))
    if any(result[verb]["problems"] for verb in options.verb or VERBS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
