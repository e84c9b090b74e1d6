"""How well `merge --estimate` finds known shares again: merges of pocket-style and pocket-bold by all 38 presets, in
both SDXL conventions, stored as float16.

    python benchmarks/estimate_presets.py --json        (--quick: every sixth preset)

Takes about a minute on 2 cores. Deterministic: no seeds are involved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from dodgeburn.merge.estimate import estimate
from dodgeburn.merge.nearest import nearest_preset
from dodgeburn.merge.presets import CONVENTIONS, preset_alphas, preset_names
from dodgeburn.merge.run import merge

A, B, BASE = "pocket-style", "pocket-bold", 0.37


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every sixth preset")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    apart: list[tuple[float, float, str]] = []  # distance, its error, where
    named = merges = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.safetensors"
        for name in preset_names("published")[:: 6 if options.quick else 1]:
            for rule in CONVENTIONS:
                merge(A, B, out, preset=name, base=BASE, xl_presets=rule)
                found = estimate(out, A, B)
                merges += 1
                near = nearest_preset(found)
                named += near is not None and near.fits and (name, rule) in near.names
                blocks = zip(found.layout.blocks, preset_alphas(name, 9, 9, rule), strict=True)
                true = [*blocks, *((part, BASE) for part in ("time_embed", "label_emb", "clip_l", "clip_g"))]
                for part, share in true:
                    fit = found.parts[part]
                    if 0 < share < 1 and fit.share is not None and fit.error is not None:
                        apart.append((abs(fit.share - share), fit.error, f"{part} of {name} ({rule})"))
    far = [row for row in apart if row[0] > 4 * row[1]]
    worst = max(apart)
    mean = sum(distance**2 for distance, _, _ in apart) ** 0.5 / len(apart) ** 0.5
    ratio = (sum((distance / error) ** 2 for distance, error, _ in apart) / len(apart)) ** 0.5
    print(f"{merges} merges of {A} and {B}: preset and convention named rightly {named} times")
    largest = f"largest {worst[0]:.5f} ({worst[2]})"
    print(f"{len(apart)} shares between 0 and 1: root mean square distance {mean:.5f}, {largest}")
    print(f"distance over error: root mean square {ratio:.2f}; {len(far)} shares beyond 4 errors", end="")
    print(f", of these the largest distance {max(far)[0]:.5f}" if far else "")
    if options.json:
        print(json.dumps({"merges": merges, "named": named, "shares": len(apart), "distance": mean, "ratio": ratio,
                          "largest": worst[0], "beyond_four_errors": len(far)}))  # fmt: skip


if __name__ == "__main__":
    main()
