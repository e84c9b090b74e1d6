"""Generation settings inside PNG, JPEG and WebP files: A1111's infotext, ComfyUI's API graph, our own exact JSON.

PNG text chunks written: `parameters` (A1111 infotext, always), `dodgeburn` (JSON of all settings, always),
`prompt` (ComfyUI API graph, only for checkpoints that ComfyUI can load). JPEG and WebP have the same in EXIF: the
infotext as the user comment, as A1111 does; the graph as "prompt:{...}" in the tag Model, as ComfyUI does; our own as
"dodgeburn:{...}" in the tag ImageDescription. Nothing here imports torch.

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
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # file endings and Pillow's names
MOST_TEXT = 4_000_000  # characters; large ComfyUI workflows have some 100 000
EXIF_IFD, USER_COMMENT, DESCRIPTION_TAG, MODEL_TAG = 0x8769, 0x9286, 0x010E, 0x0110
UNICODE = b"UNICODE\0"  # says how the user comment is written
OWN_MARK, GRAPH_MARK = "dodgeburn:", "prompt:"
# A pair: a key of 2 to 101 word characters, spaces, - and / (the bound keeps hostile lines fast), then a JSON string
# or all up to a comma.
_PAIR = re.compile(r'\s*(?P<key>\w[\w /-]{1,100}):\s*(?P<value>"(?:[^"\\]|\\.)+"|[^,]*)(?:,|$)')
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


def exif_bytes(image: Image.Image, kind: str, infotext: Infotext | None, own: Mapping[str, Any] | None,
               graph: Mapping[str, Any] | None) -> bytes:  # fmt: skip
    """A JPEG or (lossless) WebP file with these settings in its EXIF. Raises UserError when they don't fit there."""
    exif = Image.Exif()
    if infotext is not None:
        text = write_infotext(infotext).replace("\0", "")
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", errors="surrogatepass")
    if graph is not None:
        exif[MODEL_TAG] = GRAPH_MARK + json.dumps(graph)
    if own is not None:
        exif[DESCRIPTION_TAG] = OWN_MARK + json.dumps(own, sort_keys=True)
    buffer = BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    try:
        image.save(buffer, kind, exif=exif, **options)
    except ValueError as error:  # a JPEG's EXIF segment has 64 KiB
        raise UserError(f"the settings don't fit into a {kind} file ({error}): write PNG instead") from error
    return buffer.getvalue()


def write_picture(
    path: str | Path,
    image: Image.Image,
    infotext: Infotext | None = None,
    own: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> None:
    """Write a picture with its settings, atomically: PNG, JPEG (quality 95) or WebP (lossless) by the file's ending.

    Raises UserError for another ending, an unwritable folder or a full disk.
    """
    kind = KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"{path}: pictures are written as {', '.join(KINDS)}")
    if kind == "PNG":
        write_atomic(path, png_bytes(image, infotext, own, graph))
    else:
        write_atomic(path, exif_bytes(image, kind, infotext, own, graph))


def read_png(path: str | Path, pixels: bool = True) -> PngText:
    """What a picture file (PNG, JPEG, WebP) says about its making. pixels: read them too, and the texts that other
    programs write behind them; what `write_picture` wrote stands before.

    Raises UserError for a missing file, one that is no picture, one with more than `MOST_TEXT` characters of text, or
    one whose pixels or texts unpack to more than a picture can need.
    """
    try:
        with Image.open(path, formats=list(KINDS.values())) as image:
            if pixels:
                image.load()  # text chunks may come after the pixels
            chunks = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
            exif = image.getexif() if pixels or image.format != "PNG" else Image.Exif()  # a PNG's reads the pixels
            comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
            tags = [exif.get(tag) for tag in (DESCRIPTION_TAG, MODEL_TAG)]
    except FileNotFoundError:
        raise UserError(f"no picture at {path}: the file does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture: expected a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if "parameters" not in chunks and isinstance(comment, bytes) and comment[:8] == UNICODE:
        chunks["parameters"] = comment[8:].decode("utf-16-be", errors="replace")
    for text in tags:
        for mark, name in ((OWN_MARK, OWN_CHUNK), (GRAPH_MARK, "prompt")):
            if isinstance(text, str) and text.startswith(mark):
                chunks.setdefault(name, text[len(mark) :])
    if (length := sum(map(len, chunks.values()))) > MOST_TEXT:
        raise UserError(f"{path} holds {length:,} characters of text: no settings of a picture are longer "
                        f"than {MOST_TEXT:,}")  # fmt: skip
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
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
