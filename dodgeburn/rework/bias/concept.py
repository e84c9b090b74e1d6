"""What is to be fixed: prompts that leave an attribute open, its classes, how to ask for each, the shares to reach.

A remedy that is taught by the sentences it is read with is good for these sentences alone. So a concept may bring two
more lists of neutral prompts: `phrasings`, which training may use, and `watched`, which only readings use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.measure.bias import target_shares

SHORT_EVERY = 4  # every fourth neutral prompt is one of the concept's own short ones


@dataclass(frozen=True)
class Concept:
    """A tie to be dissolved. Prompts are neutral: none says a class."""

    prompts: tuple[str, ...]
    attribute: str
    classes: tuple[str, ...]
    phrases: Mapping[str, tuple[str, ...]]  # by class: what makes a prompt ask for it
    target: tuple[float, ...]  # shares to reach
    phrasings: tuple[str, ...] = ()  # other neutral prompts that mean the concept, for training
    watched: tuple[str, ...] = ()  # such that nothing is trained on, for readings
    others: tuple[str, ...] = ()  # prompts of other things, which are to stay

    def explicit(self, prompt: str, value: str, which: int = 0) -> str:
        """The prompt, asking for a class in one of its phrases."""
        phrases = self.phrases[value]
        return f"{prompt}, {phrases[which % len(phrases)]}"

    def neutral(self, n: int, seed: int, watched: bool = False) -> list[str]:
        """n neutral prompts: every fourth one of `prompts`, in turn, the rest from `phrasings` (or from `watched`) in
        shuffled rounds; `prompts` alone where there are none."""
        more = self.watched if watched else self.phrasings
        if not more:
            return [self.prompts[i % len(self.prompts)] for i in range(n)]
        rng = np.random.default_rng([seed, 5])
        order: list[int] = []
        while len(order) < n:
            order += [int(i) for i in rng.permutation(len(more))]
        return [self.prompts[(i // SHORT_EVERY) % len(self.prompts)] if i % SHORT_EVERY == 0 else more[order[i]]
                for i in range(n)]  # fmt: skip

    def drawn_classes(self, n: int, seed: int) -> list[str]:
        """n classes in a random order, as near to the target's shares as whole numbers allow."""
        rng = np.random.default_rng([seed, 6])
        counts = np.floor(np.asarray(self.target) * n).astype(int)
        for i in np.argsort(-(np.asarray(self.target) * n - counts), kind="stable")[: n - counts.sum()]:
            counts[i] += 1
        listed = [c for c, k in zip(self.classes, counts, strict=True) for _ in range(k)]
        return [listed[int(i)] for i in rng.permutation(n)]


def make_concept(
    prompts: Sequence[str], attribute: str, classes: Sequence[str], phrases: Mapping[str, Sequence[str]] | None = None,
    target: Sequence[float] | None = None, phrasings: Sequence[str] = (), watched: Sequence[str] = (),
    others: Sequence[str] = (),
) -> Concept:  # fmt: skip
    """A concept; phrases default to the classes' names. Raises UserError for what is no concept."""
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError("no prompt: name at least one that leaves the attribute open, as in --prompt 'a firefighter'")
    if len(set(classes)) < 2 or len(set(classes)) != len(classes):
        raise UserError(f"{attribute} has the classes {', '.join(classes) or 'none'}: expected at least two, each once")
    try:
        shares = target_shares(len(classes), target)
    except ValueError as error:
        raise UserError(f"{attribute}: {error}") from None
    said = {c: tuple((phrases or {}).get(c) or (c,)) for c in classes}
    return Concept(tuple(prompts), attribute, tuple(classes), said, tuple(float(q) for q in shares), tuple(phrasings),
                   tuple(watched), tuple(others))  # fmt: skip
