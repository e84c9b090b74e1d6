"""Train the pocket model from one config and one seed: tokenizer, VAE, text encoders, U-Net, fine-tunes, readers.

Every stage leaves its result in the folder and is skipped when that is there, and resumes within itself, so the
whole can be run in pieces by repeating one command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dodgeburn.checkpoint.tensorfile import save_tensors, sha256_tensors
from dodgeburn.errors import UserError
from dodgeburn.models.loading import assemble, load_model
from dodgeburn.models.model import Model
from dodgeburn.models.saving import save_diffusers_folder, save_single_file
from dodgeburn.pocket import model as pocket
from dodgeburn.pocket.attributes import Attributes
from dodgeburn.pocket.captions import caption
from dodgeburn.pocket.pictures import attributes_of, draw_pictures, picture_list
from dodgeburn.pocket.world import Look
from dodgeburn.training.loop import LoopSettings
from dodgeburn.training.pocket_readers import train_reader
from dodgeburn.training.pocket_text import train_text
from dodgeburn.training.pocket_unet import UnetLoss, train_unet
from dodgeburn.training.pocket_vae import decode, encode, normalise, train_decoder, train_vae

Callback = Callable[[int, dict[str, float]], None]
DEVELOPMENT_LIST = 97  # a picture list for choices on the way; never trained on, and no part of the gate


@dataclass
class PocketTraining:
    """Everything that decides the weights. The defaults made the shipped model on two CPU cores."""

    size: int = pocket.PICTURE_SIZE  # picture side: 64 (VAE factor 4) or 128 (factor 8, SDXL's four levels)
    seed: int = 0
    pictures: int = 60_000  # the U-Net sees these, with fresh captions and noise each time
    vae_pictures: int = 40_000
    vae_batch: int = 24
    text_first: bool = True  # train the text encoders contrastively before the U-Net
    text_with_unet: bool = False  # train them (on) together with the U-Net; must be true unless `text_first`
    compiled: bool = field(default_factory=lambda: shutil.which("g++") is not None)  # torch.compile for the U-Net
    text_batch: int = 256
    unet_batch: int = 64
    vae: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=2400, lr=3e-3, warmup=100, constant=0.5, final=0.01, ema=0.995)
    )
    vae_polish: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1000, lr=1.5e-3, warmup=50, constant=0.1, final=0.01, ema=0.995)
    )
    vae_decoder: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1500, lr=1.5e-3, warmup=50, constant=0.2, final=0.01, ema=0.995)
    )
    text: LoopSettings = field(default_factory=lambda: LoopSettings(steps=600, lr=1.5e-3, warmup=50, ema=0.99))
    unet: LoopSettings = field(default_factory=lambda: LoopSettings(steps=6500, lr=1.5e-3, constant=0.45, ema=0.998))
    unet_loss: UnetLoss = field(default_factory=UnetLoss)
    unet_polish: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=5000, lr=1.2e-3, warmup=100, constant=0.3, ema=0.998)
    )
    polish_loss: UnetLoss = field(  # faces, and every noise level about equally: what the first stage learns last
        default_factory=lambda: UnetLoss(gamma=10.0, noise_power=0.4, face=3.0)
    )
    finetune: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=320, lr=5e-4, warmup=40, constant=0.4, ema=0.99)
    )
    finetune_pictures: int = 6_000
    reader: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=2000, lr=2e-3, warmup=100, constant=0.3, final=0.01, ema=0.995)
    )
    reader_polish: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=6000, lr=1e-3, warmup=50, constant=0.2, final=0.01, ema=0.995)
    )
    reader_batch: int = 64
    reader_pictures: int = 30_000
    reader_trips: int = 20_000  # as many of them are also seen as VAE round trips


NOTES = "notes.txt"  # in a run's folder: what was changed by hand, copied into the metadata of what is written


@dataclass(frozen=True)
class Finetune:
    """What a fine-tune is trained on: a look, and attributes that are no longer drawn freely."""

    look: Look
    style: str | None = None
    least_saturation: float = 0.0


FINETUNES: dict[str, Finetune] = {
    "pocket-style": Finetune("ink", style="comic"),  # one picture style with its own look
    "pocket-bold": Finetune("bold", least_saturation=0.5),  # high contrast and saturation
}


def gate_prompts() -> list[dict[str, Any]]:
    """The held-out prompts and seeds of the gate: [{"prompt": ..., "seed": ...}], 1 024 of them."""
    return json.loads((Path(pocket.__file__).parent / "gate_prompts.json").read_text(encoding="utf-8"))


def development_prompts(n: int) -> list[dict[str, Any]]:
    """Prompts and seeds like the gate's but none of them, for choosing settings: [{"prompt": ..., "seed": ...}]."""
    return [
        {"prompt": caption(attributes_of(i, DEVELOPMENT_LIST), np.random.default_rng([DEVELOPMENT_LIST, i]))[0],
         "seed": 5000 + i}
        for i in range(n)
    ]  # fmt: skip


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


class PocketRun:
    """One training run in one folder."""

    def __init__(self, folder: Path, config: PocketTraining, device: str = "cpu", callback: Callback | None = None):
        self.folder, self.config, self.device, self.callback = folder, config, device, callback
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        if not (config.text_first or config.text_with_unet):
            raise UserError("untrained text encoders: set text_first, text_with_unet or both to true")
        self.configs = pocket.component_configs(config.size)
        self.modules: dict[str, Any] = {k: m.to(device) for k, m in pocket.build(self.configs).items()}
        self.never = frozenset(row["prompt"] for row in gate_prompts())
        self._latents: tuple[list[Attributes], Tensor] | None = None
        self._there: set[str] = set()  # stages whose outcome the modules hold: they aren't loaded over a later one's

    def _load_stage(self, name: str, parts: tuple[str, ...]) -> bool:
        if name in self._there:
            return True
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return False
        self._there.add(name)
        state = load_file(path)
        for part in parts:
            prefix = part + "."
            self.modules[part].load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
        return True

    def _save_stage(self, name: str, parts: tuple[str, ...]) -> None:
        tensors = {f"{part}.{k}": v for part in parts for k, v in _state(self.modules[part]).items()}
        save_tensors(self.folder / f"{name}.safetensors", tensors, {"format": "pt"})
        self._there.add(name)

    def vae(self) -> None:
        """Stage 1: the VAE, normalised."""
        if self._load_stage("vae", ("vae",)):
            return
        c = self.config
        _, pictures = picture_list(c.vae_pictures, c.seed + 1, c.size, self.folder)
        train_vae(
            self.modules["vae"], pictures, self.folder / "vae", c.vae, c.vae_polish, c.vae_batch, self.device,
            self.callback,
        )  # fmt: skip
        normalise(self.modules["vae"], pictures[:4000], self.device)
        self._save_stage("vae", ("vae",))

    def latents(self) -> tuple[list[Attributes], Tensor]:
        """The training pictures' attributes and scaled latents [n, 4, 16, 16], encoded once."""
        if self._latents is None:
            self.vae()
            c = self.config
            path = self.folder / f"latents-{c.pictures}-{c.size}.safetensors"
            attributes, pictures = picture_list(c.pictures, c.seed + 1, c.size, self.folder)
            if not path.exists():
                with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                    save_tensors(path, {"latents": encode(self.modules["vae"], pictures, self.device)}, {})
            self._latents = attributes, load_file(path)["latents"]
        return self._latents

    def vae_decoder(self) -> None:
        """Stage 2: the decoder goes on alone, on the latents as they are."""
        self.vae()
        if self._load_stage("vae_decoder", ("vae",)):
            return
        _, latents = self.latents()
        c = self.config
        _, pictures = picture_list(c.pictures, c.seed + 1, c.size, self.folder)
        train_decoder(
            self.modules["vae"], pictures, latents, self.folder / "vae_decoder", c.vae_decoder, c.vae_batch,
            self.device, self.callback,
        )  # fmt: skip
        self._save_stage("vae_decoder", ("vae",))

    def text(self) -> None:
        """Stage 3: both text encoders, contrastively; skipped unless `text_first`."""
        if not self.config.text_first or self._load_stage("text", ("text_encoder", "text_encoder_2")):
            return
        m, c = self.modules, self.config
        attributes = [attributes_of(i, c.seed + 1) for i in range(c.pictures)]
        train_text(
            m["text_encoder"], m["text_encoder_2"], pocket.tokenizer(), attributes, self.folder / "text",
            c.text, c.text_batch, self.never, self.device, self.callback,
        )  # fmt: skip
        self._save_stage("text", ("text_encoder", "text_encoder_2"))

    def unet(self) -> None:
        """Stage 4: the U-Net, and the text encoders with it when `text_with_unet`."""
        parts = ("unet", "text_encoder", "text_encoder_2")
        if self._load_stage("unet", parts):
            return
        attributes, latents = self.latents()
        self.text()
        c = self.config
        self._train_unet("unet", latents, attributes, c.unet, c.unet_loss, c.text_with_unet, c.compiled)
        self._save_stage("unet", parts)

    def unet_polish(self) -> None:
        """Stage 5: the U-Net goes on with `polish_loss`."""
        parts = ("unet", "text_encoder", "text_encoder_2")
        if self._load_stage("unet_polish", parts):
            return
        self.unet()
        attributes, latents = self.latents()
        c = self.config
        self._train_unet(
            "unet_polish", latents, attributes, c.unet_polish, c.polish_loss, c.text_with_unet, c.compiled
        )  # fmt: skip
        self._save_stage("unet_polish", parts)

    def _train_unet(
        self, name: str, latents: Tensor, attributes: list[Attributes], settings: LoopSettings, loss: UnetLoss,
        train_text: bool, compiled: bool,
    ) -> None:  # fmt: skip
        train_unet(
            name, self.modules, pocket.tokenizer(), self.configs["scheduler"], latents, attributes, self.config.size,
            self.folder / name, settings, self.config.unet_batch, train_text, compiled, loss,
            never=self.never, device=self.device, callback=self.callback,
        )  # fmt: skip

    def base(self) -> Path:
        """All stages of `pocket`; returns the single file."""
        out = self.folder / "pocket.safetensors"
        self.vae_decoder()
        self.text()
        self.unet_polish()
        if not out.exists():
            self._write("pocket", ("vae", "vae_decoder", "text", "unet", "unet_polish"))
        return out

    def finetune(self, name: str) -> Path:
        """A fine-tune of this run's pocket, or of the shipped one when this folder has none."""
        if name not in FINETUNES:
            raise UserError(f"no fine-tune named '{name}': expected {' or '.join(FINETUNES)}")
        out = self.folder / f"{name}.safetensors"
        if out.exists():
            return out
        own = self.folder / "pocket.safetensors"
        start = load_model(str(own) if own.exists() else "pocket", device=self.device, dtype="fp32")
        for part, module in start.components().items():
            self.modules[part].load_state_dict(module.state_dict())
        for part in ("unet", "text_encoder", "text_encoder_2"):
            self.modules[part].requires_grad_(True)
        kind, c = FINETUNES[name], self.config
        attributes = [attributes_of(i, c.seed + 11) for i in range(c.finetune_pictures)]
        for a in attributes:
            if kind.style:
                a["style"] = kind.style
            a["saturation"] = kind.least_saturation + (1 - kind.least_saturation) * a["saturation"]
        latents = encode(self.modules["vae"], draw_pictures(attributes, c.size, kind.look), self.device)
        self._train_unet(name, latents, attributes, c.finetune, c.polish_loss, train_text=True, compiled=False)
        self._write(name, (name,))
        return out

    def readers(self, names: tuple[str, ...] = ("reader", "judge")) -> list[Path]:
        """Both readers, on different picture lists: drawings, their VAE round trips, and the fine-tunes' looks."""
        self.vae_decoder()
        paths, c = [], self.config
        for k, name in enumerate(names):
            out = self.folder / f"{name}.safetensors"
            paths.append(out)
            if out.exists():
                continue
            seed = c.seed + 21 + 10 * ("reader", "judge").index(name)
            attributes, pictures = picture_list(c.reader_pictures, seed, 64, self.folder)
            if c.size == 64:
                large = pictures
            else:
                _, large = picture_list(c.reader_pictures, seed, c.size, self.folder)
            n, vae = c.reader_trips, self.modules["vae"]
            with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                trips = decode(vae, encode(vae, large[:n], self.device), self.device)
            others = [attributes_of(i, seed + 1) for i in range(8000)]
            looks = np.concatenate([
                draw_pictures(others[:4000], 64, "ink"), draw_pictures(others[4000:], 64, "bold")
            ])  # fmt: skip
            torch.manual_seed(seed)
            reader = train_reader(
                name, [pictures, trips, looks], [attributes, attributes[:n], others], self.folder / name,
                c.reader, c.reader_batch, c.reader_polish, self.callback,
            )  # fmt: skip
            state = {k: v.half() for k, v in _state(reader.net).items()}
            save_tensors(out, state, {"format": "pt", "dodgeburn.training": self._record((name,))})
        return paths

    def _record(self, stages: tuple[str, ...]) -> str:
        """Config, thinned logs and hashes of the stages behind a file, as JSON; and what stands in the folder's
        notes.txt, for a run that was steered by hand."""
        notes = self.folder / NOTES
        logs = {}
        for path in (p for stage in stages for p in sorted((self.folder / stage).glob("*.jsonl"))):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            logs[path.stem] = [*rows[:: max(1, len(rows) // 12)], *rows[-1:]]
        hashes = {p.stem: sha256_tensors(p) for s in stages if (p := self.folder / f"{s}.safetensors").exists()}
        told = {"notes": notes.read_text(encoding="utf-8").strip()} if notes.exists() else {}
        return json.dumps({"config": asdict(self.config), "logs": logs, "sha256_tensors": hashes, **told})

    def _write(self, name: str, stages: tuple[str, ...]) -> None:
        model = self.model(name)
        metadata = {
            "format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": name,
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.resolution": f"{self.config.size}x{self.config.size}", "modelspec.license": "Apache-2.0",
            "modelspec.prediction_type": "epsilon", "dodgeburn.training": self._record(stages),
        }  # fmt: skip
        save_single_file(model, self.folder / f"{name}.safetensors", metadata, torch.float16)
        folder = self.folder / name
        target = folder if not folder.exists() else self.folder / f"{name}-diffusers"
        save_diffusers_folder(model, target, torch.float16)

    def model(self, name: str = "pocket") -> Model:
        """The run's modules as a model for sampling."""
        tokenizer = pocket.tokenizer()
        return assemble(name, None, self.configs, self.modules, [tokenizer, tokenizer], self.device)
