"""A merge against disks of several speeds: our weighted sum beside reading B and `cp A OUT`, inputs not in memory.

benchmarks/merge.py measures the disk that is there. Here a control group of the system's block controller (Linux,
/sys/fs/cgroup/blkio, to be run as root) holds reading and writing to so many MB a second each, as slower disks would.
The inputs are put out of the system's memory before each job. `ratio_limit`: a merge that hashes all files, over
reading B and copying A; `ratio_limit_kept`: one that has the inputs' hashes from before; `_flushed`: against a copy
that is flushed to the disk, as ours always is. Medians of rounds, and all rounds under `times`.

    python benchmarks/merge_disk.py --size sdxl --json      needs 22 GB of disk, 7 minutes
    python benchmarks/merge_disk.py --quick --json          SD1.5, one round, 2 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from merge import cold, copy, ours, read, shapes_of, taking_turns, write_random

from dodgeburn.measure.machine import machine

BLOCK_CONTROLLER = Path("/sys/fs/cgroup/blkio")


class SlowDisk:
    """A control group that this process and those it starts belong to, with a limit for one disk."""

    def __init__(self, folder: Path) -> None:
        if not BLOCK_CONTROLLER.is_dir() or not os.access(BLOCK_CONTROLLER, os.W_OK):
            raise SystemExit(
                f"{BLOCK_CONTROLLER} is missing or not writable: run as root where the block controller is"
            )
        device = folder.stat().st_dev
        self.disk = f"{os.major(device)}:{os.minor(device)}"
        self.group = BLOCK_CONTROLLER / f"dodgeburn-{os.getpid()}"
        self.group.mkdir()
        (self.group / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, mb_per_s: int) -> None:
        """Reading and writing, each; 0 is without a limit."""
        for way in ("read", "write"):
            (self.group / f"blkio.throttle.{way}_bps_device").write_text(f"{self.disk} {mb_per_s * 10**6}")

    def close(self) -> None:
        """Leave the group and remove it."""
        (BLOCK_CONTROLLER / "cgroup.procs").write_text(str(os.getpid()))
        self.group.rmdir()


def at_speed(a: Path, b: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each job, and the ratios."""
    merged = {"preset": "Cosine", "base": 0.4}
    times = taking_turns(rounds, {
        "cp": lambda: cold(lambda: copy(a, out), a),
        "cp_flushed": lambda: cold(lambda: copy(a, out, flush=True), a),
        "read": lambda: cold(lambda: read(b), b),
        "ours": lambda: cold(lambda: ours(a, b, out, **merged)["seconds"], a, b),
        "ours_kept": lambda: cold(lambda: ours(a, b, out, **merged, rehash=False)["seconds"], a, b),
    })  # fmt: skip

    def ratio(name: str, of: str) -> float:
        limits = [x + y for x, y in zip(times[of], times["read"], strict=True)]
        return statistics.median([x / y for x, y in zip(times[name], limits, strict=True)])

    return {
        "ratio_limit": ratio("ours", "cp"), "ratio_limit_kept": ratio("ours_kept", "cp"),
        "ratio_limit_flushed": ratio("ours", "cp_flushed"),
        "ratio_limit_kept_flushed": ratio("ours_kept", "cp_flushed"), "times": times,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sdxl", "sd15"), default="sdxl")
    parser.add_argument("--mb-per-s", type=int, nargs="+", default=[2000, 1000, 500], help="speeds of the disk")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to make the files; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    size, rounds = ("sd15", 1) if options.quick else (options.size, options.rounds)
    result: dict[str, Any] = {"size": size, "rounds": rounds, "speeds": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        a, b, out = (Path(name) / f"{n}.safetensors" for n in ("a", "b", "out"))
        disk = SlowDisk(Path(name))
        try:
            for seed, path in enumerate((a, b), 1):
                write_random(path, shapes_of(size), seed)
            os.sync()
            ours(a, b, out, base=0.4)  # warms up, and keeps the hashes
            for speed in options.mb_per_s:
                disk.limit(speed)
                found = result["speeds"][str(speed)] = at_speed(a, b, out, rounds)
                said = ", ".join(f"{key} {value:.2f}" for key, value in found.items() if key != "times")
                print(f"{speed} MB/s: {said}", flush=True)
        finally:
            disk.limit(0)
            disk.close()
    result["machine"] = machine()
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
