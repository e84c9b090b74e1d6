"""Textual inversions in prompts: where they are named, and their vectors in the place of tokens.

A1111 takes a file's name wherever it stands as words of its own, in capitals or not; ComfyUI wants `embedding:NAME`.
Within a chunk of tokens an embedding takes as many places as it has vectors, and is not cut where a chunk ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dodgeburn.checkpoint.embedding_file import ENDINGS, TextEmbedding
from dodgeburn.sampling.emphasis import pieces

Found = str | int
"""A stretch of a prompt's text, or the number of an embedding."""


def named_in(text: str, syntax: str, names: Sequence[str]) -> list[Found]:
    """The text cut where it names one of `names` (at least one stretch), the longest name first."""
    if not names or syntax == "plain":
        return [text]
    order = sorted(range(len(names)), key=lambda i: -len(names[i]))
    any_name = "|".join(f"(?P<n{i}>{re.escape(names[i])})" for i in order)
    endings = "|".join(re.escape(e) for e in ENDINGS)
    before, after = (r"embedding:", rf"(?:{endings})?(?!\w)") if syntax == "comfy" else (r"(?<!\w)", r"(?!\w)")
    out: list[Found] = []
    at = 0
    for match in re.finditer(f"{before}(?:{any_name}){after}", text, re.IGNORECASE):
        out += [text[at : match.start()], int(str(match.lastgroup)[1:])]
        at = match.end()
    return [*out, text[at:]]


def used_in(texts: Sequence[str], syntax: str, names: Sequence[str]) -> list[int]:
    """The numbers of the names that these prompts name, each once, in the order of `names`."""
    read = [piece.text for text in texts for piece in pieces(text, syntax)]  # as they are encoded: weights taken out
    found = {part for text in read for part in named_in(text, syntax, names) if isinstance(part, int)}
    return sorted(found)


def as_comfy(text: str, names: Sequence[str]) -> str:
    """A1111's prompt with its embeddings named as ComfyUI wants them."""
    protected = [re.sub(r"[()\[\]\\]", r"\\\g<0>", name) for name in names]  # as a prompt has a name with brackets
    there = [re.sub(r"[()]", r"\\\g<0>", name) for name in names]
    parts = named_in(text, "a1111", protected)
    return "".join(part if isinstance(part, str) else f"embedding:{there[part]}" for part in parts)


# -------------------- as tokens


def ids_of(embeddings: Sequence[TextEmbedding]) -> list[list[int]]:
    """Token ids of each embedding's vectors: below 0, counting down, with a gap between one embedding and the next."""
    out, start = [], 0
    for embedding in embeddings:
        out.append([-1 - start - k for k in range(len(embedding))])
        start += len(embedding) + 1
    return out


def whole(tokens: Sequence[tuple[int, float]], end: int) -> int:
    """Where to cut tokens at `end` or before, so that no embedding is cut; `end` where one is longer than that."""
    start = end
    while 0 < start < len(tokens) and tokens[start][0] < 0 and tokens[start][0] == tokens[start - 1][0] - 1:
        start -= 1
    return start or end


@contextmanager
def vectors_for(encoder: Any, number: int, ids: Tensor, embeddings: Sequence[TextEmbedding]) -> Iterator[Tensor]:
    """Ids [chunks, 77] to give to a text encoder (the model's `number`th), which then sees the embeddings' vectors
    where `ids` are below 0."""
    at = ids < 0
    if not bool(at.any()):
        yield ids
        return
    rows = []
    for embedding in embeddings:
        vectors = embedding.vectors[number]
        rows += [vectors, vectors.new_zeros(len(embedding) - len(vectors) + 1, vectors.shape[1])]
    chosen = torch.cat(rows).to(ids.device)[-1 - ids[at]]

    def put(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[at] = chosen.to(out.dtype)
        return out

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield ids.masked_fill(at, 0)
    finally:
        handle.remove()
