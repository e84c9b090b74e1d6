"""Memory of alignment by its reference, at real size: a step on SD1.5's U-Net with random weights, on the CPU in fp32.

Each kind of reference runs in a process of its own: what `dodgeburn dpo train` does but for reading and writing files
(pictures and captions encoded, then one step with gradient checkpointing, winner and loser one after the other; a LoRA
lets go of text encoder and VAE before it). Peak memory
is the highest anonymous resident size, looked at every few milliseconds; pages of files that the system may drop don't
count. `memory_ratio` is the LoRA that is its own reference, switched off, over the same LoRA with a second U-Net as
reference. `--full` adds what Diffusion-DPO's own trainer holds, the whole U-Net trained beside a second one (needs
about 20 GB free).

    python benchmarks/dpo_memory.py --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "off": "LoRA, its reference the LoRA switched off",
    "bank": "LoRA, its reference's errors worked out beforehand",
    "copy": "LoRA, its reference a second U-Net",
    "full": "the whole U-Net, its reference a second U-Net",
}


def anonymous_mb() -> float:
    """Anonymous resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("this system doesn't say how much of a process's memory is anonymous: run it on Linux")


class Peak:
    """The highest anonymous memory, by phase."""

    def __init__(self) -> None:
        self.phase = "start"
        self.peaks: dict[str, float] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), anonymous_mb())
            time.sleep(0.01)


def random_model() -> Any:
    """SD1.5 with random weights in fp32: one stretch of numbers again and again, which is quick to write."""
    import torch

    from dodgeburn.models.loading import assemble, empty_module, known_configs
    from dodgeburn.pocket.model import tokenizer

    configs = known_configs("sd15")
    stretch = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    modules = {part: empty_module(part, config) for part, config in configs.items() if part != "scheduler"}
    for module in modules.values():
        module.to_empty(device="cpu")
        for tensor in [*module.parameters(), *module.buffers()]:
            flat = tensor.detach().view(-1)
            if tensor.is_floating_point():
                for start in range(0, len(flat), len(stretch)):
                    flat[start : start + len(stretch)] = stretch[: len(flat) - start]
            else:
                flat.copy_(torch.arange(len(flat)))  # positions
    return assemble("random", None, configs, modules, [tokenizer()])


def child(kind: str, side: int, folder: Path) -> None:
    """One run; prints a JSON line."""
    peak = Peak()
    from dodgeburn.rework.dpo import train as aligning
    from dodgeburn.rework.dpo.pairs import Preference, checked
    from dodgeburn.rework.dpo.settings import DpoSettings
    from dodgeburn.rework.dpo.train import align

    imported = anonymous_mb()
    peak.phase = "build"
    model = random_model()
    loaded = anonymous_mb()
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2)]
    pairs = checked([Preference("a face", pictures[0], pictures[1])])
    peak.phase = "encode"
    entered = aligning.train

    def train(*args: Any, **named: Any) -> Any:
        peak.phase = "train"
        return entered(*args, **named)

    aligning.train = train
    reference = "copy" if kind == "full" else kind
    settings = DpoSettings.model_validate({
        "rank": None if kind == "full" else 8, "reference": reference, "steps": 1, "batch": 1, "bank": 1,
        "checkpointing": True, "one_by_one": True,
    })  # fmt: skip
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    aligned = align(model, pairs, settings, folder, release=kind != "full")
    print(
        json.dumps({
            "peak_mb": round(max(peak.peaks.values())), "imported_mb": round(imported), "loaded_mb": round(loaded),
            "phases_mb": {k: round(v) for k, v in peak.peaks.items()}, "seconds": round(time.perf_counter() - began, 1),
            "loss": aligned.last["loss"],
        })
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without --full: the same, it takes minutes")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["off", "copy"])
    parser.add_argument("--child", nargs=3, metavar=("KIND", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, side, folder = options.child
        child(kind, int(side), Path(folder))
        return
    side, found = 64 if options.quick else 512, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [*options.kinds, *(["full"] if options.full else [])]:
            args = ["--child", kind, str(side), str(Path(folder) / kind)]
            out = subprocess.run([sys.executable, __file__, *args], check=True, stdout=subprocess.PIPE, text=True)
            found[kind] = json.loads(out.stdout.splitlines()[-1])
            row = found[kind]
            print(f"{KINDS[kind]}: peak {row['peak_mb'] / 1e3:.2f} GB, by phase {row['phases_mb']}, {row['seconds']} s")
    from dodgeburn.measure.machine import machine

    result: dict[str, object] = {"kinds": found, "pixels": side, "machine": machine()}
    if "copy" in found:
        ratios = {kind: round(row["peak_mb"] / found["copy"]["peak_mb"], 3) for kind, row in found.items()}
        result = {"memory_ratio": ratios.get("off"), "memory_ratio_bank": ratios.get("bank"), **result}
        if "full" in found:
            result["memory_ratio_full"] = round(found["off"]["peak_mb"] / found["full"]["peak_mb"], 3)
    print(f"LoRA against itself, over LoRA against a second U-Net: {result.get('memory_ratio')}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
