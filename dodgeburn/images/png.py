"""Generation settings inside PNG files: A1111's infotext, ComfyUI's API graph, and our own exact JSON.

Text chunks written: `parameters` (A1111 infotext, always), `dodgeburn` (JSON of all settings, always),
`prompt` (ComfyUI API graph, only for checkpoints that ComfyUI can load). Nothing here imports torch.

Infotext, as A1111, Civitai and ComfyUI read it: the prompt's lines; lines from one that begins with
"Negative prompt:" on are the negative prompt; the last line is `Key: value, Key: value, ...` if at least
three pairs are found in it, else it belongs to the prompts. A value with a comma, colon or line break is
written as a JSON string.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dodgeburn.checkpoint.tensorfile import write_atomic
from dodgeburn.errors import UserError

NEGATIVE = "Negative prompt:"
OWN_CHUNK = "dodgeburn"
# A pair: a key of two or more word characters, spaces, - and /, then a JSON string or all up to a comma.
_PAIR = re.compile(r'\s*(?P<key>\w[\w /-]+):\s*(?P<value>"(?:[^"\\]|\\.)+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Infotext:
    """Generation settings as A1111 writes them."""

    prompt: str
    negative: str = ""
    settings: dict[str, str] = field(default_factory=dict)  # in order: Steps, Sampler, CFG scale, ...

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels from "Size: 512x768", if there."""
        match = _SIZE.fullmatch(self.settings.get("Size", ""))
        return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class PngText:
    """What a PNG says about its making; parts that are not there are None."""

    infotext: Infotext | None
    own: dict[str, Any] | None  # our JSON: every setting, exactly
    graph: dict[str, Any] | None  # ComfyUI API graph
    chunks: dict[str, str]  # all text chunks as they are


# --------------------------------------------------------------------------------------------------- infotext


def quote(value: object) -> str:
    """A value as it stands in an infotext: with a comma, colon or line break it becomes a JSON string.

    So does one that a reader would otherwise change: with quotes around it, or with spaces at its ends.
    """
    text = str(value)
    if any(c in text for c in ",:\n\r") or text != text.strip() or text[:1] == '"':
        return json.dumps(text, ensure_ascii=False)
    return text


def unquote(text: str) -> str:
    """The inverse of `quote`; text that is no JSON string stays as it is."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def write_infotext(info: Infotext) -> str:
    """The text of the `parameters` chunk. The negative line is there even if empty: ComfyUI wants to see one.

    Empty values are left out, as A1111 does. Round trip: `read_infotext` gives back the same where the
    prompts' lines have no spaces at their ends, no prompt line begins with "Negative prompt:", neither
    prompt begins or ends with an empty line, and there are three settings or more.
    """
    pairs = ", ".join(f"{key}: {quote(value)}" for key, value in info.settings.items() if value != "")
    return f"{info.prompt}\n{NEGATIVE} {info.negative}\n{pairs}"


def read_infotext(text: str) -> Infotext:
    """Read A1111 infotext, leniently: every text is one (at worst all of it is the prompt)."""
    lines = text.strip().split("\n")
    settings: dict[str, str] = {}
    pairs = list(_PAIR.finditer(lines[-1]))
    if len(pairs) >= 3:
        settings = {pair["key"].strip(): unquote(pair["value"].strip()) for pair in pairs}
        lines.pop()
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in (line.strip() for line in lines):
        if line.startswith(NEGATIVE):
            negative = True
            line = line[len(NEGATIVE) :].strip()
        prompts[negative].append(line)
    return Infotext("\n".join(prompts[0]), "\n".join(prompts[1]), settings)


# ---------------------------------------------------------------------------------------------------- ComfyUI


def comfy_graph(
    checkpoint: str,
    prompt: str,
    negative: str,
    seed: int,
    steps: int,
    guidance: float,
    sampler: str,
    scheduler: str,
    width: int,
    height: int,
) -> dict[str, Any]:
    """ComfyUI API graph of a plain text-to-image generation: node id -> class_type and inputs; a link is
    [id, output].

    `checkpoint` is a file name in ComfyUI's checkpoints folder, `sampler` and `scheduler` are ComfyUI's
    names.
    """

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "3": node(
            "KSampler", seed=seed, steps=steps, cfg=guidance, sampler_name=sampler, scheduler=scheduler,
            denoise=1.0, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "5": node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "6": node("CLIPTextEncode", text=prompt, clip=["4", 1]),
        "7": node("CLIPTextEncode", text=negative, clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="dodgeburn", images=["8", 0]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ files


def png_bytes(
    image: Image.Image,
    infotext: Infotext | None = None,
    own: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> bytes:
    """A PNG file with these text chunks. The same picture and settings give the same bytes."""
    info = PngInfo()
    if infotext is not None:
        # Pillow writes tEXt for latin-1 and iTXt for the rest; a NUL would end the chunk early.
        info.add_text("parameters", write_infotext(infotext).replace("\0", ""))
    if graph is not None:
        info.add_text("prompt", json.dumps(graph))
    if own is not None:
        info.add_text(OWN_CHUNK, json.dumps(own, sort_keys=True))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(
    path: str | Path,
    image: Image.Image,
    infotext: Infotext | None = None,
    own: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG with its settings, atomically. Raises UserError for an unwritable folder or a full disk."""
    write_atomic(path, png_bytes(image, infotext, own, graph))


def read_png(path: str | Path) -> PngText:
    """What a picture file says about its making. Raises UserError for a missing file or one that is no
    picture.

    A1111 keeps the same infotext in the EXIF user comment of JPEG and WebP files; that is read too.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text chunks may come after the pixels
            chunks = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
            comment = image.getexif().get_ifd(0x8769).get(0x9286)  # EXIF IFD, UserComment
    except FileNotFoundError:
        raise UserError(f"no picture at {path}: the file does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture: expected a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if "parameters" not in chunks and isinstance(comment, bytes) and comment[:8] == b"UNICODE\0":
        chunks["parameters"] = comment[8:].decode("utf-16-be", errors="replace")
    parameters = chunks.get("parameters")
    return PngText(
        infotext=None if parameters is None else read_infotext(parameters),
        own=_json_object(chunks.get(OWN_CHUNK)),
        graph=_json_object(chunks.get("prompt")),
        chunks=chunks,
    )


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
