"""Stage 2 of the pocket: its two text encoders, trained contrastively against what the pictures show.

The loss is CLIP's (arXiv:2103.00020, figure 3), and beside it a reading loss: from the pooled embedding alone, a linear
head says what the caption asks for. Telling 256 pictures apart needs only a few attributes of a caption; reading needs
all of them, and the U-Net gets them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, Attributes
from dodgeburn.pocket.captions import LEVELS, Asked, caption
from dodgeburn.training.loop import LoopSettings, train


def captions_of(
    attributes: list[Attributes], index: Tensor, generator: torch.Generator, empty: float, never: frozenset[str]
) -> tuple[list[str], list[Asked]]:
    """Fresh captions of the pictures in `index`, naming 10 to 70 % of the attributes, and what each asks for; a share
    `empty` of them is "", and none is in `never`."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    rng = np.random.default_rng(seed)
    texts, wishes = [], []
    for i in index.tolist():
        text, asked = ("", {}) if rng.random() < empty else caption(attributes[i], rng, rng.uniform(0.1, 0.7))
        while text in never:
            text, asked = caption(attributes[i], rng)
        texts.append(text)
        wishes.append(asked)
    return texts, wishes


def tokens_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids [n, 77], padded and cut as the pipelines do."""
    out = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return out.input_ids


def encode_text(encoder_1: Any, encoder_2: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: penultimate states of both encoders side by side [n, 77, w1 + w2], and the second's
    projected pooled embedding [n, w2]."""
    first = encoder_1(tokens, output_hidden_states=True)
    second = encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


CENTRES = torch.linspace(0, 1, 6)


def truth_vectors(attributes: list[Attributes]) -> Tensor:
    """What each picture shows as numbers [n, features]: six bumps along [0, 1] for a continuous attribute, one-hot
    for a categorical one."""
    values = torch.tensor([[a[k] for k in CONTINUOUS] for a in attributes])
    bumps = torch.exp(-0.5 * ((values[..., None] - CENTRES) / 0.12) ** 2).flatten(1)
    codes = [torch.tensor([values.index(a[k]) for a in attributes]) for k, values in CATEGORICAL.items()]
    hot = [F.one_hot(c, len(v)).float() for c, v in zip(codes, CATEGORICAL.values(), strict=True)]
    return torch.cat([bumps, *hot], dim=1)


READ_SIZES = [len(LEVELS) + 1] * len(CONTINUOUS) + [len(v) + 1 for v in CATEGORICAL.values()]
"""Per attribute: its levels or values, and "not named"."""


def reading_targets(wishes: list[Asked]) -> Tensor:
    """What captions ask for as probabilities [n, sum(READ_SIZES)], one block an attribute: the named value or level
    (equal shares of the levels that a loose word covers), or the last entry where the caption is silent."""
    out = torch.zeros(len(wishes), sum(READ_SIZES))
    for row, asked in zip(out, wishes, strict=True):
        for block, name in zip(row.split(READ_SIZES), (*CONTINUOUS, *CATEGORICAL), strict=True):
            value = asked.get(name)
            if value is None:
                block[-1] = 1
            elif isinstance(value, str):
                block[CATEGORICAL[name].index(value)] = 1
            else:
                inside = [k for k, (low, high) in enumerate(LEVELS) if value[0] <= low and high <= value[1]]
                block[inside] = 1 / len(inside)
    return out


def reading_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every attribute's block, averaged over attributes and captions."""
    blocks = zip(logits.float().split(READ_SIZES, 1), targets.split(READ_SIZES, 1), strict=True)
    return torch.stack([F.cross_entropy(x, y) for x, y in blocks]).mean()


class ContrastiveHeads(nn.Module):
    """The tower of the other side, a projection for the encoder that has none, the learned temperature, the readers.

    The other side is the picture's true attributes, which the world knows, not its pixels: a picture tower would
    spend the whole stage on learning to see. The tower only serves this stage and is thrown away.
    """

    def __init__(self, features: int, width_1: int, width_2: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(features, 384), nn.SiLU(), nn.Linear(384, width_2))
        self.project_1 = nn.Linear(width_1, width_2, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.6))
        self.read_1 = nn.Linear(width_1, sum(READ_SIZES))
        self.read_2 = nn.Linear(width_2, sum(READ_SIZES))


def contrast(pictures: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss for matching rows."""
    logits = F.normalize(pictures.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    logits = logits * log_scale.clamp(max=4.6).exp()
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def train_text(
    encoder_1: Any,
    encoder_2: Any,
    tokenizer: Any,
    attributes: list[Attributes],
    folder: Path,
    settings: LoopSettings,
    batch: int,
    never: frozenset[str] = frozenset(),
    device: str = "cpu",
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train both encoders in place to tell, among `batch` pictures, which one a caption was written for, and to keep
    all that it says in the pooled embedding."""
    truth = truth_vectors(attributes)
    heads = ContrastiveHeads(truth.shape[1], encoder_1.config.hidden_size, encoder_2.config.projection_dim)

    def make(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        index = torch.randint(len(truth), (batch,), generator=generator)
        texts, wishes = captions_of(attributes, index, generator, 0.02, never)
        return tuple(x.to(device) for x in (truth[index], tokens_of(tokenizer, texts), reading_targets(wishes)))

    def losses(made: tuple[Tensor, ...], generator: torch.Generator) -> dict[str, Tensor]:
        shown, tokens, asked = made
        pictures = heads.tower(shown)
        first, second = encoder_1(tokens).pooler_output, encoder_2(tokens).text_embeds
        return {
            "first": contrast(pictures, heads.project_1(first), heads.log_scale),
            "second": contrast(pictures, second, heads.log_scale),
            "read_1": 4 * reading_loss(heads.read_1(first), asked),
            "read_2": 4 * reading_loss(heads.read_2(second), asked),
        }

    modules = {"text_encoder": encoder_1, "text_encoder_2": encoder_2, "heads": heads}
    train("text", modules, make, losses, folder, settings, callback, device)
