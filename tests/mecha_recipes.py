"""What sd-mecha makes of the oracle tests' files. Run by an interpreter that has sd-mecha, never imported by ours.

    PYTHON tests/mecha_recipes.py FOLDER     FOLDER/NAME-{a,b,c}.safetensors -> FOLDER/mecha/JOB.safetensors

One process for all jobs, because importing sd-mecha takes seconds. Blocks' shares come from FOLDER/shares.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (models A, B, C) -> sd-mecha's recipe. Where it takes the models' differences, C is the base.
Recipe = Callable[[Any, Any, Any], Any]


def recipes(m: Any) -> dict[str, Recipe]:
    """Job -> recipe, for sd-mecha's module `m`: what test_mecha_oracle.JOBS asks of us, in sd-mecha's words."""
    from sd_mecha.extensions.builtin.merge_methods import linear, svd

    def plus(model: Any, delta: Any, alpha: Any = 1.0) -> Any:
        return linear.add_difference(model, delta, alpha=alpha)

    def ties(*models: Any, base: Any, k: float, by_value: bool) -> Any:
        deltas = [m.subtract(model, base) for model in models]
        return plus(base, m.ties_sum(*deltas, k=k, vote_sgn=by_value))

    def della(*models: Any, base: Any) -> Any:
        deltas = [m.subtract(model, base) for model in models]
        kept = m.ties_sum_with_dropout(*deltas, probability=0.6, della_eps=0.4, k=1.0, seed=1, apply_stock=True)
        return plus(base, kept)

    return {
        "weighted_sum": lambda a, b, c: m.weighted_sum(a, b, alpha=0.3),
        "sum_twice": lambda a, b, c: m.weighted_sum(m.weighted_sum(a, b, alpha=0.3), c, alpha=0.6),
        "triple_sum": lambda a, b, c: plus(plus(a, m.subtract(b, a), 0.3), m.subtract(c, a), 0.5),
        "average": lambda a, b, c: m.n_average(a, b, c),
        "add_difference": lambda a, b, c: m.add_difference(a, b, c, alpha=0.7),
        "clipped": lambda a, b, c: m.add_difference(a, b, c, alpha=0.7, clamp_to_ab=True),
        "train_difference": lambda a, b, c: m.add_difference(
            a, b, c, alpha=m.train_difference_mask(a, b, c, alpha=0.7)
        ),
        "slerp": lambda a, b, c: m.slerp(a, b, alpha=0.3),
        "bislerp": lambda a, b, c: plus(c, m.slerp(m.subtract(a, c), m.subtract(b, c), alpha=0.3), 0.8),
        "cosine_a": lambda a, b, c: m.add_cosine_a(a, b, alpha=0.2),
        "cosine_b": lambda a, b, c: m.add_cosine_b(a, b, alpha=0.2),
        "tensor_sum": lambda a, b, c: m.tensor_sum(a, b, width=0.5, offset=0.25),
        "tensor_sum_around": lambda a, b, c: m.tensor_sum(a, b, width=0.5, offset=0.75),
        "top_k_sum": lambda a, b, c: m.top_k_tensor_sum(a, b, width=0.5),
        "rotate": lambda a, b, c: svd.rotate(a, b, alignment=1.0, alpha=0.0, centralization=0.0),
        "ties": lambda a, b, c: ties(a, b, base=c, k=1.0, by_value=True),
        "ties_trimmed": lambda a, b, c: ties(a, b, base=c, k=0.4, by_value=True),
        "ties_by_count": lambda a, b, c: ties(a, b, base=c, k=1.0, by_value=False),
        "model_stock": lambda a, b, c: m.n_model_stock(c, a, b),
        "geometric_median": lambda a, b, c: m.geometric_median(a, b, c),
        "della": lambda a, b, c: della(a, a, base=c),
    }


def main() -> None:
    import sd_mecha
    import torch

    folder = Path(sys.argv[1])
    shares: dict[str, dict[str, float]] = json.loads((folder / "shares.json").read_text())
    (folder / "mecha").mkdir()
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

    def run(recipe: Any, job: str, dtype: str) -> None:
        sd_mecha.merge(
            recipe, output=folder / "mecha" / f"{job}.safetensors", merge_dtype=torch.float32,
            output_dtype=types[dtype], strict_mandatory_keys=False, tqdm=Silent,
        )  # fmt: skip

    def models(name: str) -> list[Any]:
        return [sd_mecha.model(str(folder / f"{name}-{letter}.safetensors")) for letter in "abc"]

    for kind in ("sdxl", "sd15"):
        for job, recipe in recipes(sd_mecha).items():
            if job != "della" and (kind == "sdxl" or job in ("weighted_sum", "add_difference")):
                run(recipe(*models(f"{kind}-some")), f"{kind}-{job}", "fp32")
    for dtype in ("fp16", "bf16"):
        run(recipes(sd_mecha)["weighted_sum"](*models(f"sdxl-{dtype}")), f"sdxl-{dtype}", dtype)
    run(recipes(sd_mecha)["della"](*models("many")), "della", "fp32")
    configs = {"sdxl": ("sdxl-supermerger_blocks", "sdxl-sgm"), "sd15": ("sd1-supermerger_blocks", "sd1-ldm")}
    for kind, names in configs.items():
        a, b, _ = models(f"{kind}-all")
        alpha = sd_mecha.convert(sd_mecha.literal(shares[kind], config=names[0]), names[1])
        run(sd_mecha.weighted_sum(a, b, alpha=alpha), f"{kind}-blocks", "fp16")


class Silent:
    """Stands in for a progress bar."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


if __name__ == "__main__":
    main()
