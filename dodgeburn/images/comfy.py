"""ComfyUI's API graphs inside pictures: written for plain text-to-image generations, and read back from any.

A graph maps a node's id to {"class_type": ..., "inputs": {...}}; an input is a value or a link [id, output]. Core nodes
only are written, so that every ComfyUI can open them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Graph = dict[str, Any]
MOST_NODES = 10_000  # a graph of more is no graph of a picture


@dataclass
class ComfyRequest:
    """A text-to-image generation as a graph describes it; ComfyUI's own names and counting."""

    checkpoint: str
    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    sampler: str
    scheduler: str
    width: int
    height: int
    clip_stop: int | None = None  # stop_at_clip_layer, -1 is the last layer; None: the model's own
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # SDXL: original, target (w, h), crop (left, top)
    negative_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    loras: list[tuple[str, float]] = field(default_factory=list)  # (file, strength), in order
    ignored: list[str] = field(default_factory=list)  # what the graph does besides, found when it was read


def write_graph(request: ComfyRequest) -> Graph:
    """The API graph of a generation. `checkpoint` is a file name in ComfyUI's checkpoints folder."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    # LoRAs in a chain from the checkpoint on: their outputs are 0 (model) and 1 (CLIP), as the loader's.
    chain = ["4", *(str(11 + i) for i in range(len(request.loras)))]
    clip = [chain[-1], 1] if request.clip_stop is None else ["10", 0]

    def text(prompt: str, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        if not sizes:
            return node("CLIPTextEncode", text=prompt, clip=clip)
        original, target, crop = sizes["original"], sizes["target"], sizes["crop"]
        return node(
            "CLIPTextEncodeSDXL", width=original[0], height=original[1], crop_w=crop[0], crop_h=crop[1],
            target_width=target[0], target_height=target[1], text_g=prompt, text_l=prompt, clip=clip,
        )  # fmt: skip

    graph = {
        "3": node(
            "KSampler", seed=request.seed, steps=request.steps, cfg=request.guidance, sampler_name=request.sampler,
            scheduler=request.scheduler, denoise=1.0, model=[chain[-1], 0], positive=["6", 0], negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name=request.checkpoint),
        "5": node("EmptyLatentImage", width=request.width, height=request.height, batch_size=1),
        "6": text(request.prompt, request.sizes),
        "7": text(request.negative, request.negative_sizes),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="dodgeburn", images=["8", 0]),
    }  # fmt: skip
    if request.clip_stop is not None:
        graph["10"] = node("CLIPSetLastLayer", stop_at_clip_layer=request.clip_stop, clip=[chain[-1], 1])
    for key, before, (file, strength) in zip(chain[1:], chain, request.loras, strict=False):
        graph[key] = node(
            "LoraLoader", lora_name=file, strength_model=strength, strength_clip=strength, model=[before, 0],
            clip=[before, 1],
        )  # fmt: skip
    return graph


class _Reader:
    """Walks a graph against its links, from the sampler to what feeds it, and notes what it passes by."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self.nodes: dict[str, tuple[str, dict[str, Any]]] = {}
        for key, node in graph.items():
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
                self.nodes[str(key)] = str(node.get("class_type", "")), node["inputs"]
        self.ignored: list[str] = []
        self.loras: list[tuple[str, float]] = []  # nearest to the sampler first

    def kind(self, key: str | None) -> str:
        return self.nodes[key][0] if key in self.nodes else ""

    def inputs(self, key: str | None) -> dict[str, Any]:
        return self.nodes[key][1] if key in self.nodes else {}

    def link(self, value: Any) -> str | None:
        """The node that a link points to."""
        return str(value[0]) if isinstance(value, list) and len(value) == 2 and str(value[0]) in self.nodes else None

    def value(self, key: str, name: str, default: Any = None) -> Any:
        """A node's input; a link is followed to a primitive that holds one value."""
        value: Any = self.inputs(key).get(name, default)
        for _ in range(20):
            linked = self.link(value)
            if linked is None:
                return default if isinstance(value, list | dict) else value
            held = [v for k, v in self.inputs(linked).items() if k in (name, "value", "seed", "string", "text", "int")]
            value = held[0] if held else default
        return default

    def upwards(self, key: str | None, name: str) -> Iterator[str]:
        """The node at `key` and those that its input `name` comes from, nearest first."""
        seen: set[str] = set()
        while key is not None and key not in seen:
            seen.add(key)
            yield key
            key = self.link(self.inputs(key).get(name))

    def number(self, key: str, name: str, default: float) -> float:
        value = self.value(key, name, default)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    def ignore(self, line: str) -> None:
        if line not in self.ignored:
            self.ignored.append(line)

    def encoder(self, key: str | None) -> str | None:
        """The text encoding node behind a conditioning."""
        last = None
        for last in self.upwards(key, "conditioning"):
            kind = self.kind(last)
            if kind.startswith("CLIPTextEncode"):
                return last
            self.ignore(f"node {kind}")
        return last

    def model(self, key: str | None) -> str:
        """The checkpoint's name at the end of a chain of model nodes, which are noted."""
        for at in self.upwards(key, "model"):
            kind = self.kind(at)
            name = self.value(at, "ckpt_name")
            if isinstance(name, str):
                return name
            lora = self.value(at, "lora_name")
            if isinstance(lora, str):
                strength = self.number(at, "strength_model", 1.0)
                self.loras.append((lora, strength))
                if kind == "LoraLoaderModelOnly":
                    self.ignore(f"LoRA {lora} for the U-Net only: the text encoders get its part too, if it has one")
                if (clip := self.number(at, "strength_clip", strength)) != strength:
                    self.ignore(f"strength {clip:g} of LoRA {lora} on the text encoders: {strength:g} instead")
            elif not kind.startswith("KSampler"):
                self.ignore(f"node {kind}")
        return ""

    def clip_stop(self, key: str | None) -> int | None:
        for at in self.upwards(self.link(self.inputs(key).get("clip")), "clip"):
            if self.kind(at) == "CLIPSetLastLayer":
                return int(self.number(at, "stop_at_clip_layer", -1))
        return None

    def sizes(self, key: str | None) -> dict[str, tuple[int, int]]:
        if key is None or self.kind(key) != "CLIPTextEncodeSDXL":
            return {}

        def pair(a: str, b: str) -> tuple[int, int]:
            return int(self.number(key, a, 0)), int(self.number(key, b, 0))

        return {"original": pair("width", "height"), "target": pair("target_width", "target_height"),
                "crop": pair("crop_w", "crop_h")}  # fmt: skip

    def text(self, key: str | None) -> str:
        if key is None:
            return ""
        names = ("text", "text_g", "text_l")
        found = [self.value(key, name) for name in names if name in self.inputs(key)]
        words = [value for value in found if isinstance(value, str)]
        if len(set(words)) > 1:
            self.ignore("another text for the first text encoder (text_l)")
        return words[0] if words else ""


def read_graph(graph: Mapping[str, Any]) -> ComfyRequest | None:
    """What a graph generates, by its first sampler with prompts; None if it has none, or isn't a graph.

    What the request can't hold (control nets, upscaling, image inputs) is listed in `ignored`.
    """
    if not 0 < len(graph) <= MOST_NODES:
        return None
    reader = _Reader(graph)
    samplers = [k for k, (kind, inputs) in reader.nodes.items() if {"positive", "negative", "model"} <= inputs.keys()
                and "Sampler" in kind]  # fmt: skip
    if not samplers:
        return None
    # The first of a chain is the one whose latents come from nothing: that's the text-to-image pass.
    empty = [k for k in samplers if "Empty" in reader.kind(reader.link(reader.inputs(k).get("latent_image")))]
    at = (empty or samplers)[0]
    latent = reader.link(reader.inputs(at).get("latent_image"))
    if not empty:
        reader.ignore(f"a start from {reader.kind(latent) or 'given latents'} instead of noise")
    for other in samplers:
        if other != at:
            reader.ignore(f"a further pass ({reader.kind(other)})")
    if (denoise := reader.number(at, "denoise", 1.0)) != 1.0:
        reader.ignore(f"denoise {denoise:g}")
    inputs = reader.inputs(at)
    positive = reader.encoder(reader.link(inputs["positive"]))
    negative = reader.encoder(reader.link(inputs["negative"]))
    request = ComfyRequest(
        checkpoint=reader.model(reader.link(inputs["model"])),
        prompt=reader.text(positive), negative=reader.text(negative),
        seed=int(reader.number(at, "seed", reader.number(at, "noise_seed", 0))),
        steps=int(reader.number(at, "steps", 20)), guidance=reader.number(at, "cfg", 8.0),
        sampler=str(reader.value(at, "sampler_name", "euler")), scheduler=str(reader.value(at, "scheduler", "normal")),
        width=int(reader.number(latent or at, "width", 0)), height=int(reader.number(latent or at, "height", 0)),
        clip_stop=reader.clip_stop(positive), sizes=reader.sizes(positive), negative_sizes=reader.sizes(negative),
    )  # fmt: skip
    known = {"SaveImage", "PreviewImage", "VAEDecode", "VAELoader", "EmptyLatentImage", "EmptySD3LatentImage", "Note"}
    for kind, _ in reader.nodes.values():
        if kind == "VAELoader":
            reader.ignore("a VAE of its own (VAELoader)")
        elif kind not in known and any(word in kind for word in ("ControlNet", "Upscale", "IPAdapter", "Threshold")):
            reader.ignore(f"node {kind}")
    request.ignored = reader.ignored
    request.loras = reader.loras[::-1]
    return request
