"""Reading a comparison's pictures: rows of variants and parents, by a reader that decides and a judge that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.merge.compare_models import PARENTS
from dodgeburn.merge.compare_pictures import PictureMaker
from dodgeburn.merge.gauges import ByClip, ByReader, Gauge
from dodgeburn.merge.ranking import Measured, Row, measure
from dodgeburn.merge.variants import Variant
from dodgeburn.models.model import Model

SHOWN = 3  # prompts that a note names


class Measurer:
    """Figures of the pictures that one `PictureMaker` makes, against A's and B's of the same prompts and seeds.

    A and B must have been made.
    """

    def __init__(self, maker: PictureMaker, gauge: Gauge | None, judge: Gauge | None) -> None:
        self.maker, self.gauge, self.judge = maker, gauge, judge
        self._measured: dict[str, Measured] = {}
        self._parents: dict[str, tuple[np.ndarray, Any]] = {}

    def parents(self) -> list[Row]:
        """Rows of A and B."""
        return [Row(name, None, None, self._figures(name)) for name in PARENTS]

    def row(self, variant: Variant, same_as: str | None = None, shares: dict[str, float] | None = None) -> Row:
        """A variant's row; with the pictures of `same_as`, where that has the same tensors."""
        return Row(
            variant.name, variant.merge.preset, variant.base, self._figures(same_as or variant.name),
            str(variant.choice), shares or {}, same_as=same_as,
        )  # fmt: skip

    def _figures(self, name: str) -> Measured:
        if name not in self._measured:
            if not self._parents:
                self._parents = {p: self._read(p) for p in PARENTS}
            shown, seen = self._parents[name] if name in PARENTS else self._read(name)
            (a, of_a), (b, of_b) = (self._parents[p] for p in PARENTS)
            judged = self.judge.see(_flat(shown)) if self.judge else None
            self._measured[name] = measure(
                shown, self.maker.prompts, a, b, self.gauge, (seen, of_a, of_b), self.judge, judged
            )
        return self._measured[name]

    def _read(self, name: str) -> tuple[np.ndarray, Any]:
        shown = self.maker.load(name)
        if shown is None:
            raise UserError(f"the pictures of {name} are missing or damaged: run the same command again")
        return shown, self.gauge.see(_flat(shown)) if self.gauge else None


def choose_gauges(
    gauge: Gauge | None, judge: Gauge | None, model: Model, prompts: Sequence[str]
) -> tuple[Gauge | None, Gauge | None, list[str]]:
    """Who decides the ranks, and who reads the same pictures without a say: a search must not grade itself. And what
    there is to say of it."""
    if gauge is None and speaks_pocket(model):
        from dodgeburn.pocket.reader import Reader

        gauge, judge = ByReader(Reader.load("reader")), ByReader(Reader.load("judge"))
    if gauge is None:
        return None, None, [
            "The models are not of the pocket world, so there is no reader for their pictures: no prompt fidelity and "
            "no reader distance. Variants are ranked by pixel resemblance to the parent they resemble less. CLIP would "
            "read them, as a proxy (--clip FOLDER), or a function of your own (--score FILE.py:FUNCTION)."
        ]  # fmt: skip
    if gauge.proxy:
        return gauge, judge, [
            f"Read by {gauge.name}, a proxy: fidelity is {gauge.means[0]}, resemblance {gauge.means[1]} the parent's "
            "picture. Small differences mean little."
            + (" CLIP knows words, not beauty, hands or counts." if isinstance(gauge, ByClip) else "")
        ]  # fmt: skip
    known = gauge.knows(prompts)
    if not any(known):
        return gauge, judge, ["No prompt names anything the reader knows, so there is no prompt fidelity to rank by."]
    if not all(known):
        others = [repr(prompt) for prompt, reads in zip(prompts, known, strict=True) if not reads]
        named = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        count = f"{len(others)} of {len(known)}"
        return gauge, judge, [f"{count} prompts name nothing the reader knows ({named}); fidelity is over the others."]
    return gauge, judge, []


def speaks_pocket(model: Model) -> bool:
    """Whether the model's words are those of the pocket world, so that its pictures may be read."""
    from dodgeburn.pocket.model import tokenizer

    return bool(model.tokenizers[0].get_vocab() == tokenizer().get_vocab())


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[2:])
