"""Two tiny models to merge and compare, as files."""

from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer

from dodgeburn.models.saving import save_single_file


def tiny_pair(folder: Path) -> tuple[Path, Path]:
    """Two tiny SDXL-shaped fp16 files with a tokenizer beside them, and `old.safetensors` of SD1.5's shape."""
    tiny_tokenizer().save_pretrained(str(folder / "tokenizer"))
    for name, seed in (("a", 1), ("b", 2)):
        save_single_file(tiny_model(seed=seed), folder / f"{name}.safetensors", dtype=torch.float16)
    save_single_file(tiny_model("sd15"), folder / "old.safetensors", dtype=torch.float16)
    return folder / "a.safetensors", folder / "b.safetensors"
