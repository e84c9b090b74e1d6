"""Reading a comparison's pictures: rows of variants and parents, by a reader that decides and a judge that does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.merge.compare_models import PARENTS
from dodgeburn.merge.compare_pictures import PictureMaker
from dodgeburn.merge.ranking import Measured, PictureReader, Row, measure
from dodgeburn.merge.variants import Variant
from dodgeburn.models.model import Model
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.pocket.reader import Readings


class Measurer:
    """Figures of the pictures that one `PictureMaker` makes, against A's and B's of the same prompts and seeds.

    A and B must have been made.
    """

    def __init__(self, maker: PictureMaker, reader: PictureReader | None, judge: PictureReader | None) -> None:
        self.maker, self.reader, self.judge = maker, reader, judge
        self.asked = [parse(prompt) for prompt in maker.prompts]
        self._measured: dict[str, Measured] = {}
        self._parents: dict[str, tuple[np.ndarray, Readings | None]] = {}

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
            judged = self.judge.read(_flat(shown)) if self.judge else None
            self._measured[name] = measure(shown, seen, self.asked, self._parents["A"], self._parents["B"], judged)
        return self._measured[name]

    def _read(self, name: str) -> tuple[np.ndarray, Readings | None]:
        shown = self.maker.load(name)
        if shown is None:
            raise UserError(f"the pictures of {name} are missing or damaged: run the same command again")
        return shown, self.reader.read(_flat(shown)) if self.reader else None


def choose_readers(
    reader: PictureReader | None, model: Model, asked: Sequence[Asked]
) -> tuple[PictureReader | None, PictureReader | None, list[str]]:
    """Who decides the ranks, and who reads the same pictures without a say: a search must not grade itself."""
    notes = []
    judge: PictureReader | None = None
    if reader is None and speaks_pocket(model):
        from dodgeburn.pocket.reader import Reader

        reader, judge = Reader.load("reader"), Reader.load("judge")
    if reader is None:
        notes.append(
            "The models are not of the pocket world, so there is no reader for their pictures: no prompt fidelity and "
            "no reader distance. Variants are ranked by pixel resemblance to the parent they resemble less."
        )
    empty = sum(not wishes for wishes in asked)
    if reader is not None and empty == len(asked):
        notes.append("No prompt names anything the reader knows, so there is no prompt fidelity to rank by.")
    elif reader is not None and empty:
        notes.append(f"{empty} of {len(asked)} prompts name nothing the reader knows; fidelity is over the others.")
    return reader, judge, notes


def speaks_pocket(model: Model) -> bool:
    """Whether the model's words are those of the pocket world, so that its pictures may be read."""
    from dodgeburn.pocket.model import tokenizer

    return bool(model.tokenizers[0].get_vocab() == tokenizer().get_vocab())


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[2:])
