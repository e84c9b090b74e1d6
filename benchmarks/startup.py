"""How long the command line takes before it does anything: every verb's help, and runs that do little.

    python benchmarks/startup.py --json
    PYTHONPATH=ANOTHER_CHECKOUT python benchmarks/startup.py       # the same of another version

Each command runs `--repeat` times in turn with the others; medians of processor time (user and system) and of the time
on the clock. Processor time is the one to compare where other programs run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dodgeburn.cli.main import VERBS

PARTS = {
    "slider": "train", "artifacts": "collect", "dpo": "train", "bias": "fix", "deconstruct": "run", "delta": "extract",
    "pocket": "draw",
}  # fmt: skip


def commands(folder: Path) -> dict[str, list[str]]:
    """What is run, by name."""
    found = {"--help": ["--help"]}
    for verb in VERBS:
        words = [verb, *([PARTS[verb]] if verb in PARTS else []), "--help"]
        found[" ".join(words)] = words
    found["inspect pocket"] = ["inspect", "pocket"]
    found["merge --dry-run"] = ["merge", "pocket-style", "pocket-bold", "--dry-run"]
    found["generate, 1 step"] = ["generate", "a face", "--steps", "1", "--device", "cpu", "-o", str(folder)]
    return found


def run(words: list[str]) -> tuple[float, float]:
    """(processor seconds, seconds on the clock) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dodgeburn", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise SystemExit(f"dodgeburn {' '.join(words)}: {said}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="each command once")
    parser.add_argument("--only", nargs="*", default=[], help="commands by name, as they are printed")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: words for name, words in commands(Path(folder)).items() if not args.only or name in args.only}
        for _ in range(1 if args.quick else args.repeat):
            for name, words in chosen.items():
                times.setdefault(name, []).append(run(words))
    rows = {
        name: {"processor": statistics.median(t[0] for t in found), "clock": statistics.median(t[1] for t in found)}
        for name, found in times.items()
    }
    for name, row in rows.items():
        print(f"{name:<26} {row['processor']:6.2f} s of processor time, {row['clock']:6.2f} s")
    if args.json:
        print(json.dumps({"repeat": 1 if args.quick else args.repeat, "commands": rows}))


if __name__ == "__main__":
    main()
