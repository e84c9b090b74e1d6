"""LoRAs on the command line: files found for options, prompts' tags and pictures' records, and put on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError
from dodgeburn.sampling.loras import ALWAYS, LoraUse, find_lora, parse_option, take_tags, without

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.adapted import Applied


@dataclass
class Finder:
    """Where LoRA files are looked for: `--lora-dir` and all below it, or else beside the model and in this folder."""

    folder: Path | None
    model: str
    found: list[tuple[Path, LoraUse]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.expanduser().is_dir():
            raise UserError(f"--lora-dir {self.folder}: no such folder")

    def _folders(self) -> list[Path]:
        if self.folder is not None:
            return [self.folder.expanduser()]
        beside = Path(self.model).expanduser().parent
        return list(dict.fromkeys([Path(), *([beside] if Path(self.model).expanduser().exists() else [])]))

    def _find(self, use: LoraUse) -> Path | None:
        return find_lora(use, self._folders(), deep=self.folder is not None)

    def _where(self) -> str:
        return " and ".join(str(folder.resolve()) for folder in self._folders())

    def options(self, texts: Sequence[str]) -> None:
        """`--lora FILE[:SCALE[:START]]`; FILE is a path, or a name in `--lora-dir`. Raises UserError."""
        for text in texts:
            use = parse_option(text)
            path = Path(use.file).expanduser()
            if not path.exists():
                found = self._find(use)
                if found is None:
                    raise UserError(f"no LoRA {use.file}: neither that path nor that name in {self._where()} is there")
                path = found
            self.found.append((path, replace(use, file="")))

    def tags(self, prompt: str) -> str:
        """The prompt without those of its tags whose files are there; the others stay words, which is warned of."""
        taken = []
        for text, use in take_tags(prompt)[1]:
            path = self._find(use)
            if path is not None:
                self.found.append((path, use))
                taken.append(text)
        return without(prompt, taken)

    def picture(self, uses: Sequence[LoraUse], exact: bool) -> list[str]:
        """The LoRAs that a picture was made with; lines about those that aren't there. `exact`: that is an error."""
        missed = []
        for use in uses:
            path = self._find(use)
            if path is not None:
                self.found.append((path, use))
            elif exact:
                raise UserError(
                    f"the picture was made with {use.file or use.name} (sha256 {use.sha256[:10] or 'not known'}), "
                    f"which is not in {self._where()}: say where it is with --lora-dir, or give it with --lora FILE"
                )
            else:
                missed.append(f"LoRA {use.file or use.name} at strength {use.scale:g}: no such file in {self._where()}")
        return missed


def apply(
    found: Sequence[tuple[Path, LoraUse]], blocks: Sequence[str], model: Model, tell: bool = True
) -> list[Applied]:
    """The files on a model, told of on the way. blocks: `--lora-blocks`, one for all or one each. Raises UserError."""
    from dodgeburn.merge.addends import block_weights
    from dodgeburn.sampling.adapted import applied_file

    if blocks and not found:
        raise UserError("--lora-blocks has no effect without a LoRA: give one with --lora FILE:SCALE")
    if len(blocks) not in (0, 1, len(found)):
        raise UserError(f"{len(blocks)} --lora-blocks for {len(found)} LoRAs: give one for all, or one each")
    out = []
    for i, (path, use) in enumerate(found):
        if blocks:
            weights = block_weights(model.layout, [blocks[i if len(blocks) > 1 else 0]])
            use = replace(use, blocks={name: weight for name, weight in weights.items() if weight != 1})
        one = applied_file(path, use, model)
        card = one.adapter.origin.card if one.adapter.origin is not None else None
        unit = f" (1.0 = {card.unit})" if card is not None and card.unit else ""
        start = f", off above time step {one.start:g}" if one.start < ALWAYS else ""
        if tell:
            print(f"LoRA {one.adapter.name} at scale {use.scale:g}{unit}{start}")
        out.append(one)
    return out
