"""Prompts to embeddings: chunks of 75 tokens, weighted, of both SDXL encoders or SD1.5's one.

A prompt of more than 75 tokens is encoded in chunks of 75, each with its own begin and end token, whose
embeddings are put one after the other: the way A1111 and ComfyUI do it, so that nothing of the prompt is
cut.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dodgeburn.checkpoint.embedding_file import TextEmbedding
from dodgeburn.models.model import Model
from dodgeburn.sampling.clip_skip import clip_state, resolve_clip_skip
from dodgeburn.sampling.embeddings import ids_of, named_in, vectors_for, whole
from dodgeburn.sampling.emphasis import pieces

COMMA_BACKTRACK = 20  # a chunk that would end mid-phrase ends at a comma instead, if one is this near (A1111's default)
ENCODE_BATCH = 32  # chunks a forward pass


@dataclass(frozen=True)
class EncodedPrompt:
    """One text, encoded. Valid for models with the same text encoders."""

    text: str
    embeds: Tensor  # [chunks * 77, width], the U-Net's cross-attention input
    pooled: Tensor | None  # [width of the second encoder] for SDXL, of the first chunk; None for SD1.5
    chunks: int
    clip_skip: int | None = None  # which layer of the encoders it is from (clip_skip.py), if it came from `encode`
    syntax: str | None = None  # how its brackets were read (emphasis.py), likewise

    def padded(self, chunks: int, empty: "EncodedPrompt") -> Tensor:
        """`embeds` filled up to `chunks` chunks with the empty prompt's; [chunks * 77, width]."""
        return torch.cat([self.embeds, *[empty.embeds] * (chunks - self.chunks)])


Token = tuple[int, float]
"""(id, weight); an id below 0 is a vector of a textual inversion (embeddings.py)"""


@dataclass(frozen=True)
class Chunk:
    """One text encoder input: 77 ids (begin token, up to 75, end token, padding) and the weight of each."""

    ids: list[int]
    weights: list[float]


def split_tokens(tokens: Sequence[Token], length: int, comma: int | None) -> list[list[Token]]:
    """Cut tokens into chunks of at most `length`, at least one chunk (an empty prompt has one empty
    chunk).

    Where a chunk is full and a comma is among its last 20 tokens, it ends after that comma. Embeddings are not cut.
    """
    chunks: list[list[Token]] = []
    rest = list(tokens)
    while len(rest) > length:
        end = length
        for back in range(1, min(COMMA_BACKTRACK, length - 1) + 1):
            if rest[length - back][0] == comma:
                end = length - back + 1
                break
        end = whole(rest, end)
        chunks.append(rest[:end])
        rest = rest[end:]
    return [*chunks, rest]


def token_chunks(
    tokenizer: Any, text: str, syntax: str = "plain", embeddings: Sequence[TextEmbedding] = ()
) -> list[Chunk]:
    """The chunks of a prompt whose weights are written in `syntax` (emphasis.py)."""
    total = int(tokenizer.model_max_length)
    comma = tokenizer.get_vocab().get(",</w>")
    names, own = [embedding.name for embedding in embeddings], ids_of(embeddings)
    stretches: list[list[Token]] = [[]]
    for piece in pieces(text, syntax):
        for part in named_in(piece.text, syntax, names):
            if isinstance(part, int):
                ids = own[part]
            else:
                ids = tokenizer(part, add_special_tokens=False, truncation=False, verbose=False).input_ids
            stretches[-1] += [(i, piece.weight) for i in ids]
        if piece.ends_chunk:
            stretches.append([])
    rows = []
    for chunk in (c for stretch in stretches for c in split_tokens(stretch, total - 2, comma)):
        ids = [tokenizer.bos_token_id, *(i for i, _ in chunk), tokenizer.eos_token_id]
        fill = total - len(ids)
        weights = [1.0, *(w for _, w in chunk), 1.0, *[1.0] * fill]
        rows.append(Chunk(ids + [tokenizer.pad_token_id] * fill, weights))
    return rows


def weighted(states: Tensor, weights: Tensor, empty: Tensor, syntax: str) -> Tensor:
    """Text encoder states [chunks, 77, width] by the weights [chunks, 77] of their tokens.

    a1111: states * weight, then every chunk scaled back to the mean it had. comfy: empty + weight * (states - empty),
    with the empty prompt's states [77, width]. A chunk whose weights are all 1 stays as it is, to the bit.
    """
    touched = (weights != 1).any(1)
    if not bool(touched.any()):
        return states
    wide, w = states[touched].float(), weights[touched].unsqueeze(-1).to(states.device)
    if syntax == "comfy":
        result = torch.where(w != 1, empty.float() + w * (wide - empty.float()), wide)
    else:
        result = wide * w
        mean, after = wide.mean((1, 2), keepdim=True), result.mean((1, 2), keepdim=True)
        # a mean of about 0 says nothing of the size: scaling by it would blow the states up
        result = torch.where(after.abs() > 1e-6 * result.abs().mean(), result * (mean / after), result)
    out = states.clone()
    out[touched] = result.to(states.dtype)
    return out


@torch.no_grad()
def encode(
    model: Model, texts: Iterable[str], clip_skip: int | None = None, syntax: str = "a1111"
) -> dict[str, EncodedPrompt]:
    """Encode each distinct text once; give the result to `generate(..., encoded=...)` as often as wanted.

    SDXL shape: the last but one hidden state of both encoders side by side, and the second one's pooled
    projection. SD1.5 shape: the only encoder's last hidden state after its final norm. `clip_skip` takes
    an earlier one (`clip_skip.py`; UserError if there is none). `syntax` says how weights in brackets are read
    (`emphasis.py`); the pooled projection is of the unweighted first chunk. The model's textual inversions stand for
    their names (`embeddings.py`).
    """
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode_each(model, distinct, clip_skip, syntax), strict=True))


def encode_each(
    model: Model, texts: Sequence[str], clip_skip: int | None = None, syntax: str = "a1111",
    before: Callable[[list[int]], None] | None = None,
) -> list[EncodedPrompt]:  # fmt: skip
    """As `encode`, each text by itself even where two are the same, and with gradients.

    before(rows) is told ahead of each call of an encoder which text each of its inputs is of: adapters on the encoders
    can have a scale for every text. All texts then have as many chunks as the longest.
    """
    skip = resolve_clip_skip(model, clip_skip)
    if not texts:
        return []
    per_tokenizer = [
        [token_chunks(tokenizer, text, syntax, model.embeddings) for text in texts] for tokenizer in model.tokenizers
    ]
    counts = [max(len(rows[i]) for rows in per_tokenizer) for i in range(len(texts))]
    if before is not None:
        counts = [max(counts)] * len(texts)
    owners = [i for i, n in enumerate(counts) for _ in range(n)]
    embeds: list[Tensor] = []
    pooled: Tensor | None = None
    encoders = zip(model.tokenizers, model.text_encoders, per_tokenizer, strict=True)
    for number, (tokenizer, encoder, rows) in enumerate(encoders):
        blank = token_chunks(tokenizer, "")
        flat = [row for i, n in enumerate(counts) for row in rows[i] + blank * (n - len(rows[i]))]
        weights = torch.tensor([chunk.weights for chunk in flat], dtype=torch.float32)
        if syntax == "comfy" and bool((weights != 1).any()):
            flat = [*flat, blank[0]]  # whose states the others are weighed against
            owners = [*owners[: len(weights)], 0]
        states, pools = [], []
        for start in range(0, len(flat), ENCODE_BATCH):
            ids = torch.tensor([chunk.ids for chunk in flat[start : start + ENCODE_BATCH]], device=model.device)
            if before is not None:
                before(owners[start : start + ENCODE_BATCH])
            with vectors_for(encoder, number, ids, model.embeddings) as given:
                out = encoder(given, output_hidden_states=True)
            states.append(clip_state(encoder, out, skip, final_norm=not model.has_added_conditions))
            if model.has_added_conditions and getattr(out, "text_embeds", None) is not None:
                pools.append(out.text_embeds)
        found = torch.cat(states)
        embeds.append(weighted(found[: len(weights)], weights, found[-1], syntax))
        if pools:
            pooled = torch.cat(pools)  # the last encoder that has one wins: SDXL's second
    side_by_side = torch.cat(embeds, dim=-1)  # [all chunks, 77, width]
    result: list[EncodedPrompt] = []
    start = 0
    for text, n in zip(texts, counts, strict=True):
        tokens = side_by_side[start : start + n].reshape(-1, side_by_side.shape[-1])
        result.append(EncodedPrompt(text, tokens, None if pooled is None else pooled[start], n, skip, syntax))
        start += n
    return result
