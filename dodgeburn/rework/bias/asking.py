"""A class said in the prompt: what the model then shows, how often to ask for each, and the rule that asks.

A model does not draw all that it is asked for, and what it draws instead is not spread evenly: asked for blue hair the
pocket shows black now and then. With S[i, j] the share of class j where i is asked for, chances p that show the target
q solve S' p = q.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem
from dodgeburn.jobs import KeptRows
from dodgeburn.measure.bias import counts_of
from dodgeburn.rework.bias.before_after import DrawPictures
from dodgeburn.rework.bias.classify import Classifier
from dodgeburn.rework.bias.concept import Concept, make_concept

ASK_SEED = 37_000_000
_HOLD = 0.05  # how firmly chances keep to the target, so that a few pictures' luck does not move them far
_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class _Class(BaseModel):
    """One class of a rule's file."""

    model_config = ConfigDict(extra="forbid")

    name: _Text = Field(alias="class")
    chance: float = Field(ge=0, le=1, allow_inf_nan=False)
    phrases: list[_Text] = Field(min_length=1)


class _RuleFile(BaseModel):
    """What `PromptRule.as_json` writes."""

    model_config = ConfigDict(extra="forbid")

    where: list[_Text] = Field(min_length=1)
    attribute: _Text
    append_one_of: list[_Class] = Field(min_length=2)
    dynamic_prompts: str = ""


@dataclass(frozen=True)
class PromptRule:
    """random-prompt: which prompts get a class said, and with which chances. (After Fair Diffusion, arXiv 2302.10893,
    with the class in the prompt instead of a guidance direction.)"""

    concept: Concept
    named: Callable[[str], frozenset[str]]  # attributes that a prompt names
    chances: tuple[float, ...] = ()  # of each class to be said; none: the target's shares

    def rewrite(self, prompt: str, seed: int) -> str:
        """The prompt with a class drawn for this seed; as it is if it isn't about the concept or says a class."""
        about = any(_subject(p) in prompt.lower() for p in self.concept.prompts)
        if not about or self.concept.attribute in self.named(prompt):
            return prompt
        rng = np.random.default_rng([seed, 9])
        drawn = int(rng.choice(len(self.concept.classes), p=self.chances or self.concept.target))
        return self.concept.explicit(prompt, self.concept.classes[drawn], int(rng.integers(64)))

    def drawing(self, draw: DrawPictures) -> DrawPictures:
        """A draw function that rewrites first."""
        return lambda prompts, seeds: draw([self.rewrite(p, s) for p, s in zip(prompts, seeds, strict=True)], seeds)

    def as_json(self) -> dict[str, Any]:
        """The rule, for `read` and for programs that make prompts. `dynamic_prompts` is a prompt with the choice in it,
        as the Dynamic Prompts extension writes it for A1111 and others: {weight::this|weight::that}."""
        c = self.concept
        chances = dict(zip(c.classes, self.chances or c.target, strict=True))
        choice = "|".join(f"{p:.4g}::{_one_of(c.phrases[k])}" for k, p in chances.items() if p > 0)
        return {"where": [_subject(p) for p in c.prompts], "attribute": c.attribute,
                "append_one_of": [{"class": k, "chance": p, "phrases": list(c.phrases[k])} for k, p in chances.items()],
                "dynamic_prompts": f"{c.prompts[0]}, {{{choice}}}"}  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Self:
        """A rule that `bias fix --method random-prompt` wrote. A prompt names the attribute where it has one of the
        phrases of the rule in it. UserError for anything else."""
        try:
            said = _RuleFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValidationError as error:
            raise UserError(f"{path} is no rule for prompts: {first_problem(error, _RuleFile)}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no rule for prompts: no JSON ({error})") from None
        classes = said.append_one_of
        concept = make_concept(said.where, said.attribute, [c.name for c in classes],
                               {c.name: c.phrases for c in classes}, [c.chance for c in classes])  # fmt: skip
        phrases = [phrase.lower() for c in classes for phrase in c.phrases]

        def named(prompt: str) -> frozenset[str]:
            return frozenset([said.attribute] if any(p in prompt.lower() for p in phrases) else [])

        return cls(concept, named)


def _one_of(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{{{'|'.join(phrases)}}}"


def _subject(prompt: str) -> str:
    """A prompt without its article."""
    words = prompt.lower().split()
    return " ".join(words[1:] if words and words[0] in ("a", "an", "the") else words)


def shown_when_asked(
    concept: Concept, draw: DrawPictures, classifier: Classifier, n: int, log: KeptRows
) -> np.ndarray:  # fmt: skip
    """S [classes asked for, classes shown], float64: shares among the readable of n pictures of watched prompts a class
    (zeros where none is readable). Classes that are in the log already are not drawn again."""
    for i, value in enumerate(concept.classes):
        if value in log.rows:
            continue
        first = ASK_SEED + i * n
        prompts = [concept.explicit(p, value, k) for k, p in enumerate(concept.neutral(n, first, watched=True))]
        labels = classifier.labels(draw(prompts, [first + k for k in range(n)]))[concept.attribute]
        log.add(value, counts=[int(k) for k in counts_of(labels, concept.classes)[0]])
    counts = np.array([log.rows[value]["counts"] for value in concept.classes], np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def chances_to_ask(shown: np.ndarray, target: Sequence[float]) -> tuple[float, ...]:
    """Chances p >= 0, sum 1, with which to ask for each class so that S' p is as near to the target q as can be:
    least |S' p - q|^2 + 0.05^2 |p - q|^2. A class that the target leaves out is not asked for."""
    from scipy.optimize import nnls

    q = np.asarray(target, np.float64)
    wanted = np.flatnonzero(q > 0)
    firm = 1e3  # a row that says that chances sum to 1
    rows = np.vstack([shown[wanted].T, np.full((1, len(wanted)), firm), _HOLD * np.eye(len(wanted))])
    p, _ = nnls(rows, np.concatenate([q, [firm], _HOLD * q[wanted]]))
    out = np.zeros(len(q))
    out[wanted] = p / p.sum()
    return tuple(out.tolist())
