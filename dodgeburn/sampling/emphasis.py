"""Prompt weights: what `(a hat:1.3)` means, in A1111's dialect and in ComfyUI's. (No torch here.)

| | A1111 | ComfyUI |
|---|---|---|
| `(x)` | times 1.1 | times 1.1 |
| `(x:1.3)` | times 1.3 | exactly 1.3, whatever is around it |
| `[x]` | divided by 1.1 | the brackets are text |
| `((x:1.2))` | 1.1 * 1.2 = 1.32 | 1.2 |
| `\\(`, `\\)` | brackets as text (also `\\[`, `\\]`) | brackets as text |
| `BREAK` | ends the chunk of 75 tokens | a word |
| a bracket never closed | counts to the end | is text |

A1111 multiplies the text encoder's states by the weights and then scales each chunk back to its mean; ComfyUI moves
them along the line from the empty prompt's states (`prompts.py`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

SYNTAXES = ("a1111", "comfy", "plain")
STEP = 1.1  # what one pair of brackets multiplies by

_NUMBER_AND_END = re.compile(r":\s*([+-]?[.\d]{1,32})\s*\)")
# Markup of A1111 and ComfyUI that means something there and is words here.
_UNREAD = (
    re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"),
    re.compile(r"\[[^\[\]:|]*:[^\[\]:|]*:[^\[\]:|]*\]"),  # prompt editing, [from:to:when]
    re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"),  # alternation, [a|b]
    re.compile(r"\bAND\b"),
    re.compile(r"\bembedding:[\w.-]+"),
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt with one weight; `ends_chunk`: what follows begins a new chunk of tokens."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False


def pieces(prompt: str, syntax: str) -> list[Piece]:
    """A prompt's stretches in one of the `SYNTAXES`; their texts are what is left to be tokenized. Never fails."""
    if syntax == "a1111":
        return _a1111(prompt)
    if syntax == "comfy":
        return [Piece(text, weight) for text, weight in _merged(_comfy(prompt))]
    return [Piece(prompt)]


def unread(prompt: str, syntax: str) -> list[str]:
    """Markup in a prompt that other programs act on and that is read as words here: LoRA tags, prompt editing,
    alternation, AND, ComfyUI's names of embeddings (of those that are not there). Nothing of it means anything in
    `plain`.
    """
    return [] if syntax == "plain" else [found[0] for rule in _UNREAD for found in rule.finditer(prompt)]


def finite_number(text: str) -> float | None:
    """The number that a text says; None for none, and for NaN and infinity."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _merged(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight put together, so that their texts are tokenized as one; at least one stretch."""
    out: list[tuple[str, float]] = []
    for text, weight in found:
        if out and out[-1][1] == weight:
            out[-1] = out[-1][0] + text, weight
        elif text:
            out.append((text, weight))
    return out or [("", 1.0)]


def _a1111(prompt: str) -> list[Piece]:
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `found` brackets opened

    def multiply(start: int, factor: float) -> None:
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    at = 0
    while at < len(prompt):
        letter, step = prompt[at], 1
        number = _NUMBER_AND_END.match(prompt, at) if letter == ":" else None
        weight = finite_number(number[1]) if number else None
        if letter == "\\":  # what it protects is text; alone it vanishes
            protected = prompt[at + 1 : at + 2]
            if protected and protected in "()[]\\":
                found.append((protected, 1.0))
                step = 2
        elif letter in "([":
            opened[letter].append(len(found))
        elif number and weight is not None and opened["("]:
            multiply(opened["("].pop(), weight)
            step = number.end() - at
        elif letter == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif letter == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STEP)
        else:
            end = at + 1
            while letter not in "):]" and end < len(prompt) and prompt[end] not in "\\()[]:":
                end += 1
            found.append((prompt[at:end], 1.0))
            step = end - at
        at += step
    for start in opened["("]:
        multiply(start, STEP)
    for start in opened["["]:
        multiply(start, 1 / STEP)
    out: list[Piece] = []
    for text, weight in _merged(found):
        *before, last = _BREAK.split(text)
        out += [Piece(part, weight, ends_chunk=True) for part in before]
        out.append(Piece(last, weight))
    return out


def _comfy(prompt: str) -> list[tuple[str, float]]:
    # Protected brackets are set aside as characters that no prompt has, and put back at the end.
    open_mark, close_mark = "\0\1", "\0\2"
    text = prompt.replace("\0", "").replace(r"\)", close_mark).replace(r"\(", open_mark)
    found: list[tuple[str, float]] = []
    waiting = [(text, 1.0)]
    while waiting:
        text, weight = waiting.pop()
        parts = _groups(text)
        if len(parts) < 2 and not _is_group(text):
            found += [(part, weight) for part in parts]
            continue
        inside: list[tuple[str, float]] = []
        for part in parts:
            if not _is_group(part):
                inside.append((part, weight))
                continue
            head, colon, tail = part[1:-1].rpartition(":")
            said = finite_number(tail) if colon and head else None
            inside.append((part[1:-1], weight * STEP) if said is None else (head, said))
        waiting += reversed(inside)  # the order of the text: what lies deeper comes before what stands after it
    return [(t.replace(open_mark, "(").replace(close_mark, ")"), weight) for t, weight in found]


def _is_group(text: str) -> bool:
    return len(text) > 1 and text[0] == "(" and text[-1] == ")"


def _groups(text: str) -> list[str]:
    """Text cut into bracketed groups of the outermost level, brackets included, and what is between them."""
    out, current, depth = [], "", 0
    for letter in text:
        if letter == "(" and depth == 0:
            out.append(current)
            current = ""
        current += letter
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                out.append(current)
                current = ""
    return [part for part in [*out, current] if part]
