"""Two tiny models to merge and compare, as files, and their merges in memory."""

from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer

from dodgeburn.merge.live import LiveMerge
from dodgeburn.models.as_single_file import open_as_single_file
from dodgeburn.models.saving import save_single_file


def tiny_pair(folder: Path) -> tuple[Path, Path]:
    """Two tiny SDXL-shaped fp16 files with a tokenizer beside them, and `old.safetensors` of SD1.5's shape."""
    tiny_tokenizer().save_pretrained(str(folder / "tokenizer"))
    for name, seed in (("a", 1), ("b", 2)):
        save_single_file(tiny_model(seed=seed), folder / f"{name}.safetensors", dtype=torch.float16)
    save_single_file(tiny_model("sd15"), folder / "old.safetensors", dtype=torch.float16)
    return folder / "a.safetensors", folder / "b.safetensors"


def weights(model) -> dict[str, torch.Tensor]:
    return {f"{part}.{key}": tensor.clone() for part, module in model.components().items()
            for key, tensor in module.state_dict().items()}  # fmt: skip


def live_merge(model, *others: Path, limit: int | None = None) -> LiveMerge:
    """Of a loaded model and files named B, C, ... in order."""
    files = {name: open_as_single_file(path) for name, path in zip("ABCDE", (model.source, *others), strict=False)}
    return LiveMerge(model, files, limit)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
