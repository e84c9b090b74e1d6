"""Peak anonymous memory while files are merged: it does not grow with the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dodgeburn.merge.methods import METHODS

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

MEASURE = """
import sys, threading, time, torch
from dodgeburn.checkpoint.tensorfile import TensorWriter
from dodgeburn.merge.graph import parse_graph
from dodgeburn.merge.open_graph import beside
from dodgeburn.merge.run import merge
from dodgeburn.merge.run_recipe import run_recipe
folder = sys.argv[1]
u = "model.diffusion_model."
names = [u + n for n in ("input_blocks.0.0.weight", "output_blocks.0.0.weight", "label_emb.0.0.weight")]
def files(letters, *rows):
    for seed, name in enumerate(letters):
        rows_of = dict(zip(names, rows))
        with TensorWriter(f"{folder}/{name}", {n: ("F16", (r, 1 << 20)) for n, r in rows_of.items()}, {}) as writer:
            row = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).half().numpy().tobytes()
            for n, r in rows_of.items():
                for i in range(r):
                    writer.write(n, i << 21, row)
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
def measured(job):
    before, peak, done = anonymous(), 0, False
    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        job()
    finally:
        done = True
    thread.join()
    print(before, peak)
"""


def measured(job: str, folder: Path) -> tuple[float, float]:
    """MB of anonymous memory before a job and at its peak, in a process of its own."""
    command = [sys.executable, "-c", MEASURE + job, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, peak = map(float, done.stdout.split())
    return before, peak


def test_of_a_merge(tmp_path: Path) -> None:
    """Files of 96 MB."""
    job = """
files("ab", 16, 16, 16)
measured(lambda: merge(f"{folder}/a", f"{folder}/b", f"{folder}/m.safetensors", base=0.5, threads=4))
"""
    before, peak = measured(job, tmp_path)
    assert before < peak < 300 and peak - before < 130


def test_of_a_chain(tmp_path: Path) -> None:
    """Three files of 96 MB in four steps."""
    job = """
files("abc", 16, 16, 16)
steps = {"w": {"merge": ["a", "b"]}, "x": {"merge": ["w", "c"]}, "y": {"merge": ["x", "w"]}, "z": {"merge": ["y", "x"]}}
graph = parse_graph({"models": {n: n for n in "abc"}, "steps": steps})
measured(lambda: run_recipe(graph, f"{folder}/m.safetensors", 2, beside(folder)))
"""
    before, peak = measured(job, tmp_path)
    assert before < peak and peak - before < 200


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.held])
def test_of_methods_that_hold_whole_tensors(method: str, tmp_path: Path) -> None:
    """At most four times the largest tensor as float32, 42 MB, beside buffers of fixed size."""
    entry = METHODS[method]
    base = 'f"{folder}/o"' if entry.needs_base else "None"
    job = f"""
files("abo", 1, 0, 0)
settings = dict(method="{method}", base=0.4, base_model={base}, threads=2)
merge(f"{{folder}}/a", f"{{folder}}/b", f"{{folder}}/m.safetensors", **settings)  # what it imports is not counted
files("abo", 10, 0, 0)
measured(lambda: merge(f"{{folder}}/a", f"{{folder}}/b", f"{{folder}}/m.safetensors", **settings))
"""
    before, peak = measured(job, tmp_path)
    assert peak - before < 4 * 42 + 40
