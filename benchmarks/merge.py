"""Merging against the disk: our weighted sum beside `cp A OUT` and reading B, taking turns; memory; fixed cost.

Two random files of the chosen size (SD1.5's or SDXL's real keys and shapes) are made under a temporary folder and
removed again. `limit_s` is the time to read B plus `cp A OUT` in the same cache state; `anon_mb` the peak of anonymous
memory (RssAnon: no mapped file pages) that a merge adds to what importing it takes, measured in a process of its own;
`fixed_s` a merge of SDXL's 2 500 tensors cut to a few values each, imports not counted; `ties_ratio` TIES of three
models against the weighted sum (pocket's shapes), medians. With --peer PYTHON, an interpreter with sd-mecha, its
weighted sum takes turns too.

    python benchmarks/merge.py --size sdxl --json
    python benchmarks/merge.py --quick --json         SD1.5, one round
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dodgeburn.checkpoint.convert import diffusers_to_single_file
from dodgeburn.checkpoint.header import dtype_name
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view
from dodgeburn.measure.machine import machine
from dodgeburn.models.loading import empty_module, known_configs
from dodgeburn.pocket.model import component_configs

BLOCK = 32 * 2**20  # values of the random block that files are filled from

MERGE = """
import json, sys, threading, time
from dodgeburn.merge.run import merge
import torch, tqdm, safetensors  # what a merge imports
def anon():
    for line in open('/proc/self/status'):
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1e3
before, peak, done = anon(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anon())
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
a, b, out, more = json.loads(sys.argv[1])
start = time.perf_counter()
merge(a, b, out, **more)
seconds = time.perf_counter() - start
done = True; thread.join()
print(json.dumps({'seconds': seconds, 'anon_mb': peak - before}))
"""

PEER = """
import sys, time, torch, sd_mecha
a, b, out = sys.argv[1:4]
start = time.perf_counter()
recipe = sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=0.4)
sd_mecha.merge(recipe, output=out)
print(time.perf_counter() - start)
"""


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a single file of this size."""
    configs = component_configs() if size == "pocket" else known_configs(size)
    parts = {k: v for k, v in configs.items() if k != "scheduler"}
    states = {part: empty_module(part, config).state_dict() for part, config in parts.items()}
    states = {part: {k: v for k, v in s.items() if v.is_floating_point()} for part, s in states.items()}
    return {key: tuple(t.shape) for key, t in diffusers_to_single_file(states, parts).items()}


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """A file of fp16 values, N(0, 0.02^2): stretches of one random block, so that it is written at the disk's speed."""
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) * 0.02).half()
    infos = {key: (dtype_name(torch.float16), shape) for key, shape in shapes.items()}
    with TensorWriter(path, infos, {"format": "pt"}) as writer:
        for number, (key, info) in enumerate(writer.infos.items()):
            done, count = 0, info.numel
            while done < count:
                at = (number * 7919 + done) % (BLOCK // 2)
                piece = block[at : at + min(count - done, BLOCK // 2)]
                writer.write(key, 2 * done, byte_view(piece))
                done += len(piece)


def read(path: Path) -> float:
    """Seconds to read a file."""
    buffer = memoryview(bytearray(8 * 2**20))
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def copy(a: Path, out: Path) -> float:
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(["cp", str(a), str(out)], check=True)
    return time.perf_counter() - start


def ours(a: Path, b: Path, out: Path, **more: Any) -> dict[str, float]:
    """A merge in a process of its own: {"seconds", "anon_mb"}, imports not counted."""
    out.unlink(missing_ok=True)
    argument = json.dumps([str(a), str(b), str(out), more])
    done = subprocess.run([sys.executable, "-c", MERGE, argument], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer(python: str, a: Path, b: Path, out: Path) -> float:
    out.unlink(missing_ok=True)
    done = subprocess.run([python, "-c", PEER, str(a), str(b), str(out)], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def taking_turns(rounds: int, jobs: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each job, one after the other, `rounds` times; the order turns around every time."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs) if number % 2 == 0 else reversed(list(jobs)):
            found[name].append(jobs[name]())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("sdxl", "sd15", "pocket"), default="sd15")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with sd-mecha")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    shapes = shapes_of("sd15" if options.quick else options.size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, b, c, out = (folder / f"{n}.safetensors" for n in ("a", "b", "c", "out"))
        write_random(a, shapes, 1)
        write_random(b, shapes, 2)
        free = shutil.disk_usage(folder).free
        print(f"two files of {a.stat().st_size / 1e9:.2f} GB; {free / 1e9:.0f} GB free")
        anon: list[float] = []

        def run_ours() -> float:
            found = ours(a, b, out, preset="Cosine", base=0.4)
            anon.append(found["anon_mb"])
            return found["seconds"]

        jobs = {"cp": lambda: copy(a, out), "read": lambda: read(b), "ours": run_ours}
        if options.peer:
            jobs["peer"] = lambda: peer(options.peer, a, b, out)
        times = taking_turns(1 if options.quick else options.rounds, jobs)
        limits = [x + y for x, y in zip(times["cp"], times["read"], strict=True)]
        small = shapes_of("pocket")
        for path, seed in ((a, 1), (b, 2), (c, 3)):
            write_random(path, small, seed)
        plain = [ours(a, b, out, base=0.4)["seconds"] for _ in range(3)]
        ties = [ours(a, b, out, method="ties", more=[str(c)], base_model=str(c)) for _ in range(3)]
        tiny = {key: tuple(min(side, 2) for side in shape) for key, shape in shapes_of("sdxl").items()}
        write_random(a, tiny, 1)
        write_random(b, tiny, 2)
        fixed = [ours(a, b, out, base=0.4)["seconds"] for _ in range(3)]
    median = statistics.median
    result: dict[str, Any] = {
        "size": "sd15" if options.quick else options.size,
        "ours_s": median(times["ours"]), "limit_s": median(limits),
        "ratio_limit": median([o / limit for o, limit in zip(times["ours"], limits, strict=True)]),
        "peer_s": median(times["peer"]) if options.peer else None,
        "ratio_peer": None,
        "anon_mb": max(anon), "anon_mb_whole_tensor": max(t["anon_mb"] for t in ties), "fixed_s": median(fixed),
        "tiny_tensors": len(tiny), "ties_ratio": median([t["seconds"] for t in ties]) / median(plain),
        "rounds": len(times["ours"]), "machine": machine(),
    }  # fmt: skip
    if options.peer:
        result["ratio_peer"] = median([p / o for p, o in zip(times["peer"], times["ours"], strict=True)])
    for key, value in result.items():
        print(f"{key:<22} {value:.3f}" if isinstance(value, float) else f"{key:<22} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
