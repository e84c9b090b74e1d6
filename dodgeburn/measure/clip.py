"""CLIP (arXiv 2103.00020) as a measure of models whose world nobody knows: a proxy, and named as one wherever its
figures stand.

CLIP score: cosine of the embeddings of a picture and a text (Hessel et al. 2021, arXiv 2104.08718, without factor 2.5
and clipping at 0). It knows words, not measures or beauty, and has biases of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.quiet import quiet


class ClipScore:
    """CLIP's embeddings and their cosines, by a CLIP model in a local folder."""

    def __init__(self, folder: str | Path, device: str = "cpu", batch: int = 32) -> None:
        """folder: a transformers CLIPModel with its processor (config.json, model.safetensors, tokenizer and
        preprocessor files). Raises UserError if it isn't one; nothing is downloaded.
        """
        from transformers import CLIPModel, CLIPProcessor

        folder = Path(folder).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no CLIP model's folder: expected config.json, weights, tokenizer")
        try:
            with quiet():
                network: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True)
                self.processor: Any = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} cannot be read as a CLIP model: {' '.join(str(error).split())[:200]}") from None
        self.model = network.to(device).eval()
        self.name, self.folder, self.device, self.batch = f"CLIP {folder.name}", folder, device, batch

    @cached_property
    def sha256(self) -> str:
        """Of the folder's weights."""
        from dodgeburn.checkpoint.tensorfile import sha256_file

        files = sorted(p for p in self.folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        return " ".join(sha256_file(path) for path in files)

    @torch.inference_mode()
    def seen(self, pictures: np.ndarray) -> np.ndarray:
        """Embeddings of pictures uint8 [n, h, w, 3], of length 1: float64 [n, width]."""
        out = []
        for i in range(0, len(pictures), self.batch):
            inputs = self.processor(images=list(pictures[i : i + self.batch]), return_tensors="pt").to(self.device)
            found = self.model.vision_model(pixel_values=inputs.pixel_values).pooler_output
            out.append(_unit(self.model.visual_projection(found)))
        return np.concatenate(out) if out else np.zeros((0, self.model.config.projection_dim))

    @torch.inference_mode()
    def said(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, cut off after CLIP's 77 tokens, of length 1: float64 [n, width]."""
        inputs = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        found = self.model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
        return _unit(self.model.text_projection(found))

    def similarities(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 x the cosine of every picture uint8 [n, h, w, 3] with every text: float64 [n, texts]."""
        return 100 * self.seen(pictures) @ self.said(texts).T

    def scores(self, pictures: np.ndarray, text: str) -> np.ndarray:
        """100 x the cosine of every picture uint8 [n, h, w, 3] with one text: float64 [n]."""
        return self.similarities(pictures, [text])[:, 0]


def _unit(embeddings: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).double().cpu().numpy()
