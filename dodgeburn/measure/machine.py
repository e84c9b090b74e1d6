"""What machine a number was measured on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version


def machine(device: str = "cpu") -> dict[str, str]:
    """Processor, cores, memory, device and versions, as text; nothing that names the machine or its owner."""
    out = {"processor": _processor(), "cores": str(_cores())}
    memory = _memory_gib()
    if memory:
        out["memory"] = f"{memory:.0f} GiB"
    out["device"] = _device(device)
    out["system"] = f"{platform.system()} {platform.machine()}"
    out["python"] = platform.python_version()
    for package in ("torch", "diffusers", "transformers", "numpy", "dodgeburn"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0


def _device(device: str) -> str:
    torch = sys.modules.get("torch")  # whoever measured with it has imported it
    if torch is not None and device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(device)}"
    if torch is not None and device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return device
