"""What a loaded model is: components, configs, and what sampling needs to know of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dodgeburn.checkpoint.embedding_file import TextEmbedding
from dodgeburn.checkpoint.layout import Layout
from dodgeburn.checkpoint.sources import is_index, open_tensors, sha256_source
from dodgeburn.checkpoint.tensorfile import sha256_file
from dodgeburn.errors import UserError

Configs = dict[str, dict[str, Any]]


@dataclass
class Model:
    """A text-to-image model in memory. SDXL, SD1.5 and pocket differ only in `configs`."""

    name: str  # shown in pictures' metadata: the packaged name, or the file's or folder's without ending
    source: Path | None  # file or folder it came from
    layout: Layout
    configs: Configs  # unet, vae, text_encoder[, text_encoder_2], scheduler: as in a diffusers folder
    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL; in fp32 where its config has force_upcast and the rest is fp16
    text_encoders: list[Any]  # CLIPTextModel[, CLIPTextModelWithProjection]
    tokenizers: list[Any]  # CLIPTokenizer, one an encoder
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype  # of the U-Net, and of the text encoders unless loaded as stored
    metadata: dict[str, str] = field(default_factory=dict)  # of its file: recipe, ModelSpec, ...
    embeddings: list[TextEmbedding] = field(default_factory=list)  # that prompts can name

    @property
    def has_added_conditions(self) -> bool:
        """Whether the U-Net takes pooled text and sizes; such models (SDXL) also use other hidden states."""
        return self.unet.config.get("addition_embed_type") == "text_time"

    @property
    def vae_factor(self) -> int:
        """Pixels a latent, along one side."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures the model was trained on."""
        return int(self.unet.config["sample_size"]) * self.vae_factor

    @cached_property
    def sha256(self) -> str:
        """Hex digest: of the single file, or over the weight files of a folder. Computed when first asked
        for (a 7 GB file takes seconds); empty for a model that came from nowhere.
        """
        if self.source is None:
            return ""
        if is_index(self.source):
            with open_tensors(self.source) as source:
                return sha256_source(source)
        if self.source.is_file():
            return sha256_file(self.source)
        digest = hashlib.sha256()
        for path in sorted(self.source.rglob("*.safetensors")):
            digest.update(f"{path.relative_to(self.source).as_posix()} {sha256_file(path)}\n".encode())
        return digest.hexdigest()

    @property
    def text_widths(self) -> list[int]:
        """Of each text encoder's token embeddings."""
        return [int(encoder.get_input_embeddings().weight.shape[1]) for encoder in self.text_encoders]

    def components(self) -> dict[str, Any]:
        """Modules by the names of a diffusers folder: unet, vae, text_encoder[, text_encoder_2]."""
        names = ["text_encoder", "text_encoder_2"]
        return {"unet": self.unet, "vae": self.vae, **dict(zip(names, self.text_encoders, strict=False))}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is cuda, else mps, else cpu. Raises UserError for one that is not there."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}: expected auto, cpu, cuda or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {device!r}: expected auto, cpu, cuda or mps")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device {device} is not there: this machine has {count} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: this machine (or this torch) has none")
    return chosen


DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """None is fp16 on cuda and fp32 elsewhere; else "fp32", "fp16", "bf16" or a torch dtype; "stored" gives
    None, which leaves every component as its file has it. Raises UserError.
    """
    if dtype == "stored":
        return None
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise UserError(f"unknown dtype {dtype!r}: expected {', '.join(DTYPES)}")
    return chosen
