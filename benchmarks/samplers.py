"""Every sampler against known answers, and on the pocket.

1. Order: error against steps in a Gaussian world whose exact denoiser is known (`known_worlds.py`), with exponential
   noise levels between Stable Diffusion's ends, as a table and with --plot as a picture; and of the bare formula. Exact
   arithmetic on weights, no random numbers.
2. What a generation gets: the deviation with the real schedule, the step from the smallest level to 0 included.
3. Fidelity on the pocket at 20 steps: share of what the prompts ask for that the reader finds in the pictures.

    python benchmarks/samplers.py --json
    python benchmarks/samplers.py --plot docs/images/samplers.png --no-fidelity
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from known_worlds import ENDS, FORMULA_NOMINAL, NOMINAL, GaussianWorld, curve_orders, gaussian_error, gaussian_orders
from tqdm import tqdm

from dodgeburn.errors import UserError
from dodgeburn.measure.machine import machine
from dodgeburn.pocket.model import component_configs
from dodgeburn.sampling.schedules import schedule
from dodgeburn.sampling.settings import SAMPLERS
from dodgeburn.sampling.solvers import SOLVERS, History

TABLE_STEPS = (5, 8, 12, 20, 30, 45, 90, 180)


def std_at(sampler: str, steps: int, spacing: str = "exponential") -> float:
    """Deviation of what a whole generation makes of data with deviation 0.5, the step to 0 included."""
    plan = schedule(sampler, spacing, steps, component_configs()["scheduler"])
    return GaussianWorld(plan.sigmas).run(SOLVERS[sampler])[1]


def calls_of(sampler: str, steps: int) -> int:
    """Model calls of a generation: counted, not looked up."""
    count = 0

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal count
        count += 1
        return torch.zeros_like(x)

    plan = schedule(sampler, "exponential", steps, component_configs()["scheduler"])
    history = History(lambda *_: torch.zeros(1, 1, 1, 1), denoise)
    x = torch.ones(1, 1, 1, 1)
    for sigma, sigma_next in zip(plan.sigmas, plan.sigmas[1:], strict=False):
        x = SOLVERS[sampler](x, denoise(x, sigma), sigma, sigma_next, history)
    return count


def fidelity_of(samplers: list[str], prompts: int, steps: int, spacing: str, device: str) -> dict[str, dict[str, Any]]:
    """Mean prompt fidelity of each sampler on the pocket, by the reader, on prompts and seeds that are not the gate's
    (a default is chosen by them); with the 95 % interval over prompts, seconds, and model calls a picture.
    """
    import time

    from dodgeburn.measure.fidelity import fidelity
    from dodgeburn.measure.intervals import bootstrap_mean
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.captions import parse
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.sampling.loop import GenerateSettings, generate
    from dodgeburn.sampling.prompts import encode
    from dodgeburn.training.pocket import development_prompts

    model, reader = load_model("pocket", device), Reader.load("reader")
    rows = development_prompts(prompts)
    texts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    asked, encoded = [parse(text) for text in texts], encode(model, [*texts, ""])
    out: dict[str, dict[str, Any]] = {}
    for sampler in tqdm(samplers, unit="sampler", disable=None, file=sys.stderr, leave=False):
        settings = GenerateSettings(steps=steps, sampler=sampler, spacing=spacing)
        began = time.perf_counter()
        made = generate(model, texts, seeds, settings, encoded=encoded)
        seconds = time.perf_counter() - began
        readings = reader.read(np.stack([np.asarray(m.image) for m in made]))
        found = bootstrap_mean(fidelity(asked, readings)[:, None])
        out[sampler] = {
            "fidelity": round(found.mean, 4),
            "interval": [round(end, 4) for end in found.ends or []],
            "seconds": round(seconds, 1),
            "unreadable": round(float(readings.unreadable.mean()), 4),
            "calls": calls_of(sampler, steps),
        }
    return out


def plot(path: Path, table: dict[str, dict[str, float]], calls: dict[str, dict[str, int]]) -> None:
    """Error against model calls, one line a sampler."""
    from matplotlib.figure import Figure

    colours = ("#0072b2", "#d55e00", "#009e73", "#8f4f87", "#7a6a00", "#56b4e9", "#444444")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, row) in enumerate(table.items()):
        x = [calls[name][steps] for steps in row]
        if name == "ddim":
            continue  # Euler's line
        y = [max(value, 1e-7) for value in row.values()]
        axes.loglog(x, y, ("-", "--")[i // len(colours)], color=colours[i % len(colours)], marker="o", ms=3,
                    label="euler, ddim" if name == "euler" else name)  # fmt: skip
    axes.set_xlabel("model calls")
    axes.set_ylabel("error of the deviation")
    axes.set_title("data N(0.7, 0.5²), exponential noise levels from 14.6 to 0.03", fontsize=10)
    axes.grid(color="#e4e7ea", lw=0.8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace) -> dict[str, Any]:
    fine = (40, 80, 160) if options.quick else (80, 160, 320, 640)
    steps = (8, 20, 45) if options.quick else TABLE_STEPS
    table = {name: {str(n): round(std_at(name, n), 6) for n in steps} for name in SAMPLERS}
    errors = {
        name: {str(n): float(f"{gaussian_error(SOLVERS[name], *ENDS, n):.3g}") for n in steps} for name in SAMPLERS
    }
    calls = {name: {str(n): calls_of(name, n) for n in steps} for name in SAMPLERS}
    found: dict[str, Any] = {
        "orders": {name: round(value, 3) for name, value in gaussian_orders(fine).items()},
        "nominal": NOMINAL,
        "formula_orders": {name: round(value, 3) for name, value in curve_orders(fine).items()},
        "formula_nominal": FORMULA_NOMINAL,
        "std_3m_45": round(std_at("dpmpp_3m_sde", 45), 6),
        "error": errors,
        "std": table,
        "calls": calls,
        "fidelity": {},
    }
    if options.plot is not None:
        plot(options.plot, errors, calls)
    if not options.no_fidelity:
        prompts = 48 if options.quick else options.prompts
        names = list(SAMPLERS) if options.samplers is None else options.samplers.split(",")
        unknown = [name for name in names if name not in SAMPLERS]
        if unknown:
            raise UserError(f"unknown sampler {unknown[0]!r}: known: {', '.join(SAMPLERS)}")
        rows = fidelity_of(names, prompts, options.steps, options.spacing, options.device)
        found["fidelity"] = {name: row["fidelity"] for name, row in rows.items()}
        found |= {"fidelity_rows": rows, "prompts": prompts, "steps": options.steps, "spacing": options.spacing}
    found["machine"] = machine(options.device)
    return found


def text(found: dict[str, Any]) -> str:
    """The result as tables."""
    head = f"{'sampler':<18}{'order':>7}{'nominal':>8}  {'formula':>7}{'nominal':>8}"
    lines = [f"{head}   error of the deviation at steps:"]
    steps = list(next(iter(found["error"].values())))
    lines.append(" " * 51 + "".join(f"{n:>9}" for n in steps))
    for name, row in found["error"].items():
        formula = found["formula_orders"].get(name)
        second = f"{formula:>7.2f}{found['formula_nominal'][name]:>8}" if formula is not None else f"{'-':>7}{'':>8}"
        values = "".join(f"{value:>9.1e}" for value in row.values())
        lines.append(f"{name:<18}{found['orders'][name]:>7.2f}{found['nominal'][name]:>8}  {second}   {values}")
    lines.append(f"dpmpp_3m_sde at 45 steps: deviation {found['std_3m_45']:.4f} (true 0.5)")
    if found["fidelity"]:
        lines.append(f"pocket, {found['prompts']} prompts, {found['steps']} steps, {found['spacing']}:")
        lines.append(f"{'sampler':<18}{'fidelity':>9}  {'95 % interval':<18}{'calls':>6}{'seconds':>9}")
        best_first = sorted(found["fidelity_rows"].items(), key=lambda item: -item[1]["fidelity"])
        for name, row in best_first:
            ends = "[{:.3f}, {:.3f}]".format(*row["interval"]) if row["interval"] else ""
            lines.append(f"{name:<18}{row['fidelity']:>9.4f}  {ends:<18}{row['calls']:>6}{row['seconds']:>9.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="prompts for the fidelity")
    parser.add_argument("--steps", type=int, default=20, help="steps for the fidelity")
    parser.add_argument("--spacing", default="trailing", help="spacing for the fidelity")
    parser.add_argument("--samplers", help="samplers for the fidelity, with commas; all by default")
    parser.add_argument("--device", default="cpu", help="device for the fidelity")
    parser.add_argument("--no-fidelity", action="store_true", help="known worlds only: seconds instead of minutes")
    parser.add_argument("--plot", type=Path, help="write the plot of error against model calls here")
    parser.add_argument("--quick", action="store_true", help="fewer steps and 48 prompts: rougher numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    try:
        if options.prompts < 1 or options.steps < 1:
            raise UserError("prompts and steps must be at least 1")
        found = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert all(math.isfinite(order) for order in found["orders"].values())
    print(text(found))
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
