"""Merging against the disk: our weighted sum beside `cp A OUT` and reading B, taking turns; memory; fixed cost.

Random files of the chosen size (SD1.5's or SDXL's real keys and shapes) are made under a temporary folder and removed
again, also after Ctrl-C.

`limit_s`: reading B plus `cp A OUT` in the same cache state; `limit_flushed_s`: the same with the copy flushed to the
disk, which ours always is. `ours_s` hashes all files; `ours_kept_s` and `ratio_limit_kept` are the same merge with the
inputs' hashes kept from a merge before (checkpoint/hash_cache.py). In these the system holds both inputs in memory if
it can; `cold` are the same figures with the inputs put out of it before each job. `cpu` is the processor time of both
(all threads, imports included). `anon_mb`: the peak of anonymous memory (RssAnon: no mapped file pages) that a merge
adds to what importing it takes, in a process of its own. `anon_mb_by_method`: the same of methods that look at whole
tensors, on files with SDXL's names and its four largest tensors (the others are tiny), three models where a method
takes them; `anon_mb_whole_tensor` is the largest of it, `whole_tensor_limit_mb` four times the largest tensor as
float32. `fixed_s`: a merge of SDXL's 2 500 tensors cut to a few values each, imports not counted.
`ties_ratio`: TIES of three models over a base against the weighted sum of two, taking turns, at SD1.5's size (pocket's
with --size pocket). `compare_*`: the 16 strategies x three bases put one after the other into a live pocket model, and
how often that read all of both models' tensors. Medians of rounds. With --peer PYTHON, an interpreter with sd-mecha
(CONTRIBUTING.md), its weighted sum takes turns too; `ratio_peer` is its time over ours.

    python benchmarks/merge.py --size sdxl --peer ~/mecha/bin/python --json      needs 22 GB of disk, 5 minutes a round
    python benchmarks/merge.py --quick --json                                    SD1.5, one round, fewer methods
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dodgeburn.checkpoint.convert import diffusers_to_single_file
from dodgeburn.checkpoint.header import dtype_name
from dodgeburn.checkpoint.tensorfile import TensorWriter, byte_view
from dodgeburn.measure.machine import machine
from dodgeburn.merge.live import LiveMerge
from dodgeburn.merge.methods import METHODS
from dodgeburn.merge.presets import preset_names
from dodgeburn.merge.settings import MergeSettings
from dodgeburn.models.as_single_file import open_as_single_file
from dodgeburn.models.loading import empty_module, known_configs, load_model
from dodgeburn.pocket.model import component_configs

BLOCK = 32 * 2**20  # values of the random block that files are filled from

MERGE = """
import json, os, sys, threading, time
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
print(json.dumps({'seconds': seconds, 'anon_mb': peak - before, 'cpu': sum(os.times()[:2])}))
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


def cold(job: Callable[[], float], *inputs: Path) -> float:
    """The job's seconds where the system holds nothing of the inputs in memory."""
    for path in inputs:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return job()


def copy(a: Path, out: Path, flush: bool = False) -> float:
    """Seconds of `cp`; `flush`: until the copy is on the disk, as ours is when it ends."""
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(["cp", str(a), str(out)], check=True)
    if flush:
        with out.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def ours(a: Path, b: Path, out: Path, **more: Any) -> dict[str, float]:
    """A merge in a process of its own: {"seconds", "anon_mb", "cpu"}, imports not counted but in "cpu". All files are
    hashed but for `rehash=False`.
    """
    out.unlink(missing_ok=True)
    more = {"rehash": True, **more}
    argument = json.dumps([str(a), str(b), str(out), more])
    kept = {**os.environ, "DODGEBURN_CACHE": str(out.parent)}  # not the user's own
    done = subprocess.run([sys.executable, "-c", MERGE, argument], check=True, capture_output=True, text=True, env=kept)
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
            os.sync()  # what a job left unwritten is not the next one's to pay for
            found[name].append(jobs[name]())
    return found


def largest_only(count: int = 4) -> dict[str, tuple[int, ...]]:
    """SDXL's keys with the shapes of its `count` largest tensors; the others at most 2 a side."""
    shapes = shapes_of("sdxl")
    large = sorted(shapes, key=lambda key: -math.prod(shapes[key]))[:count]
    return {key: shape if key in large else tuple(min(side, 2) for side in shape) for key, shape in shapes.items()}


WHOLE = ("ties", "slerp", "cosine_b", "tensor_sum", "model_stock", "geometric_median", "rotate", "top_k_sum",
         "distribution_crossover", "della", "smooth_add")  # fmt: skip


def whole_tensors(folder: Path, methods: Sequence[str]) -> dict[str, float]:
    """MB of anonymous memory of each method on SDXL's largest tensors. Leaves no files."""
    files = {name: folder / f"whole-{name}.safetensors" for name in "abco"}
    shapes = largest_only()
    for seed, path in enumerate(files.values()):
        write_random(path, shapes, seed)
    found = {}
    for name in methods:
        entry = METHODS[name]
        more: dict[str, Any] = {"method": name, "base": 0.4}
        if entry.models[1] > 2:
            more["more"] = [str(files["c"])]
        if entry.needs_base:
            more["base_model"] = str(files["o"])
        found[name] = ours(files["a"], files["b"], folder / "out.safetensors", **more)["anon_mb"]
        print(f"{name:<22} {found[name]:,.0f} MB", flush=True)
    for path in (*files.values(), folder / "out.safetensors"):
        path.unlink()
    return found


def ties_and_sum(folder: Path, size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a weighted sum of two and of TIES of three models over a base, taking turns. Leaves no files."""
    files = {name: folder / f"ties-{name}.safetensors" for name in "abco"}
    shapes = shapes_of(size)
    for seed, path in enumerate(files.values()):
        write_random(path, shapes, seed)
    out = folder / "out.safetensors"
    more = {"method": "ties", "more": [str(files["c"])], "base_model": str(files["o"])}
    jobs = {
        "sum": lambda: ours(files["a"], files["b"], out, base=0.4)["seconds"],
        "ties": lambda: ours(files["a"], files["b"], out, **more)["seconds"],
    }
    for job in jobs.values() if rounds > 1 else ():
        job()  # warms up
    found = taking_turns(rounds, jobs)
    for path in (*files.values(), out):
        path.unlink()
    return found


def live_variants() -> tuple[int, float, float]:
    """The 16 strategies x bases 0.4, 0.5, 0.6 in a live pocket model: how many, seconds, full reads of both models."""
    model = load_model("pocket-style", "cpu")
    with open_as_single_file("pocket-style") as a, open_as_single_file("pocket-bold") as b:
        live = LiveMerge(model, {"A": a, "B": b})
        start = time.perf_counter()
        variants = [MergeSettings(preset=preset, base=base) for preset in preset_names() for base in (0.4, 0.5, 0.6)]
        for variant in variants:
            live.apply(live.plan(variant))
        return len(variants), time.perf_counter() - start, live.shelf.full_reads


def stop(*_: object) -> None:
    """A polite kill removes the files too."""
    raise SystemExit("stopped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sdxl", "sd15", "pocket"), default="sd15")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with sd-mecha")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the files; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    size, rounds = ("sd15", 1) if options.quick and options.size == "sdxl" else (options.size, options.rounds)
    rounds = 1 if options.quick else rounds
    ties_size = "pocket" if size == "pocket" else "sd15"
    shapes = shapes_of(size)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        bytes_of = {s: 2 * sum(math.prod(shape) for shape in shapes_of(s).values()) for s in {size, ties_size}}
        need, free = max(3 * bytes_of[size], 5 * bytes_of[ties_size]) + 2 * 10**9, shutil.disk_usage(folder).free
        if free < need:
            raise SystemExit(f"{free / 1e9:.0f} GB are free, {need / 1e9:.0f} GB needed: name another --folder")
        a, b, out = (folder / f"{n}.safetensors" for n in ("a", "b", "out"))
        write_random(a, shapes, 1)
        write_random(b, shapes, 2)
        print(f"two files of {a.stat().st_size / 1e9:.2f} GB; {free / 1e9:.0f} GB were free", flush=True)
        anon: list[float] = []
        cpu: dict[bool, list[float]] = {True: [], False: []}

        def run_ours(rehash: bool = True) -> float:
            found = ours(a, b, out, preset="Cosine", base=0.4, rehash=rehash)
            anon.append(found["anon_mb"])
            cpu[rehash].append(found["cpu"])
            return found["seconds"]

        jobs = {
            "cp": lambda: copy(a, out), "cp_flushed": lambda: copy(a, out, flush=True), "read": lambda: read(b),
            "ours": run_ours, "ours_kept": lambda: run_ours(False),
            "cp_cold": lambda: cold(lambda: copy(a, out), a), "read_cold": lambda: cold(lambda: read(b), b),
            "ours_cold": lambda: cold(run_ours, a, b), "ours_kept_cold": lambda: cold(lambda: run_ours(False), a, b),
        }  # fmt: skip
        if options.peer:
            jobs["peer"] = lambda: peer(options.peer, a, b, out)
        run_ours()  # warms up, and keeps the hashes
        for found in (anon, *cpu.values()):
            found.clear()
        times = taking_turns(rounds, jobs)
        limits, flushed = ([x + y for x, y in zip(times[n], times["read"], strict=True)] for n in ("cp", "cp_flushed"))
        limits_cold = [x + y for x, y in zip(times["cp_cold"], times["read_cold"], strict=True)]
        for path in (a, b, out):
            path.unlink()
        tiny = {key: tuple(min(side, 2) for side in shape) for key, shape in shapes_of("sdxl").items()}
        write_random(a, tiny, 1)
        write_random(b, tiny, 2)
        fixed = [ours(a, b, out, base=0.4)["seconds"] for _ in range(3)]
        turns = ties_and_sum(folder, ties_size, rounds)
        whole = whole_tensors(folder, WHOLE[:4] if options.quick else WHOLE)
    variants, live_s, reads = live_variants()
    median = statistics.median

    def ratio(over: list[float], under: list[float]) -> float:
        return median([x / y for x, y in zip(over, under, strict=True)])

    result: dict[str, Any] = {
        "size": size, "ours_s": median(times["ours"]), "limit_s": median(limits),
        "ratio_limit": ratio(times["ours"], limits),
        "ours_kept_s": median(times["ours_kept"]),
        "ratio_limit_kept": ratio(times["ours_kept"], limits),
        "cpu": {"ours": median(cpu[True]), "ours_kept": median(cpu[False])},
        "limit_flushed_s": median(flushed),
        "cold": {
            "limit_s": median(limits_cold), "ours_s": median(times["ours_cold"]),
            "ours_kept_s": median(times["ours_kept_cold"]), "ratio_limit": ratio(times["ours_cold"], limits_cold),
            "ratio_limit_kept": ratio(times["ours_kept_cold"], limits_cold),
        },
        "ratio_limit_flushed": ratio(times["ours"], flushed),
        "peer_s": None, "ratio_peer": None, "anon_mb": max(anon), "anon_mb_whole_tensor": max(whole.values()),
        "whole_tensor_limit_mb": 4 * 4 * max(math.prod(shape) for shape in largest_only().values()) / 1e6,
        "anon_mb_by_method": {name: round(mb) for name, mb in whole.items()},
        "fixed_s": median(fixed), "tiny_tensors": len(tiny),
        "ties_size": ties_size, "ties_s": median(turns["ties"]), "sum_s": median(turns["sum"]),
        "ties_ratio": ratio(turns["ties"], turns["sum"]),
        "compare_variants": variants, "compare_s": live_s, "compare_full_reads": reads,
        "rounds": len(times["ours"]), "times": times, "machine": machine(),
    }  # fmt: skip
    if options.peer:
        result["peer_s"] = median(times["peer"])
        result["ratio_peer"] = ratio(times["peer"], times["ours"])
    for key, value in result.items():
        print(f"{key:<22} {value:.3f}" if isinstance(value, float) else f"{key:<22} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
