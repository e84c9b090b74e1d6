"""Grow the pocket's CLIP-style byte-pair tokenizer from captions of the world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from dodgeburn.pocket.captions import caption, vocabulary_text
from dodgeburn.pocket.model import VOCABULARY
from dodgeburn.pocket.pictures import attributes_of

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def grow_tokenizer(folder: Path, seed: int, captions: int = 4000) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, in CLIP's layout: bytes, bytes that end a word,
    merges, then the two marks last (so that the end mark is the largest id, which OpenCLIP's pooling relies on)."""
    rng = np.random.default_rng([seed, 77])
    texts = [caption(attributes_of(i, seed), rng)[0] for i in range(captions)] + vocabulary_text() * 20
    grown = Tokenizer(BPE(end_of_word_suffix="</w>"))
    grown.normalizer = Lowercase()
    grown.pre_tokenizer = Sequence(
        [Split(Regex(CLIP_SPLIT), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    grown.train_from_iterator(
        texts, BpeTrainer(vocab_size=8 * VOCABULARY, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    )
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in
              json.loads(grown.to_str())["model"]["merges"]]  # fmt: skip
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *[c + "</w>" for c in letters]]
    kept = []
    for left, right in merges:
        if len(tokens) >= VOCABULARY - 2:
            break
        kept.append((left, right))
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += [f"<|unused{i}|>" for i in range(VOCABULARY - 2 - len(tokens))] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in kept)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
        "unk_token": END, "pad_token": END, "do_lower_case": True,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
