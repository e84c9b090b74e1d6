"""Which block holds the keys that are in no U-Net block: no two merge tools agree, so the rules have names.

| rule | time_embed | label_emb | diffusion_model.out. | text encoders | VAE |
|---|---|---|---|---|---|
| dodgeburn | BASE | BASE | last OUT | BASE | VAE |
| mecha | BASE | BASE | last OUT | BASE | SD1.5 BASE, SDXL VAE |
| mbw | IN00 | IN00 | last OUT | BASE | BASE |
| supermerger | SD1.5 IN00, SDXL NOT_MERGED | NOT_MERGED | last OUT | BASE | BASE |
| comfyui | TIME_EMBED | LABEL_EMB | OUT | BASE | NOT_MERGED |

NOT_MERGED is a block whose share is 0 unless it is asked for; TIME_EMBED, LABEL_EMB and OUT are blocks of their own,
which follow base. The input convolution is `input_blocks.0`, IN00, in all of them.

Read from: sd-mecha 1.1.5 (model config sdxl-supermerger_blocks); bbc-mc/sdweb-merge-block-weighted-gui and the first
supermerger (@00e8917e), which know SD1.5 only, for mbw (label_emb is put beside time_embed); supermerger since it knows
SDXL (@b9229d75) and Chattiori-Model-Merger, which are alike there; ComfyUI's ModelMergeSDXL. supermerger's SDXL merges
also leave tensors to A whose names have neither "weight" nor "bias" (text_projection, positional_embedding), which are
NOT_MERGED too. Not imitated: that supermerger puts SD1.5's time_embed into OUT11, by an index of -2 into its list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outside = Literal["dodgeburn", "mecha", "mbw", "supermerger", "comfyui"]
NOT_MERGED = "NOT_MERGED"
FIRST, LAST = "first", "last"  # the U-Net's first IN and last OUT block
OWN = ("TIME_EMBED", "LABEL_EMB", "OUT", NOT_MERGED)  # blocks that only some rules have
KINDS = ("time_embed", "label_emb", "out", "text", "vae")


@dataclass(frozen=True)
class Rule:
    """Kind of key -> block, in KINDS' order, for SD1.5 and for SDXL; `weights_only`: in SDXL, tensors whose names have
    neither weight nor bias are not merged.
    """

    sd15: tuple[str, str, str, str, str]
    sdxl: tuple[str, str, str, str, str]
    weights_only: bool = False

    def of(self, layout: str) -> Mapping[str, str]:
        """Kind -> block of one layout ("sd15" or "sdxl")."""
        return dict(zip(KINDS, self.sdxl if layout == "sdxl" else self.sd15, strict=True))


def _same(*blocks: str) -> Rule:
    return Rule(blocks, blocks)  # type: ignore[arg-type]


RULES: dict[str, Rule] = {
    "dodgeburn": _same("BASE", "BASE", LAST, "BASE", "VAE"),
    "mecha": Rule(("BASE", "BASE", LAST, "BASE", "BASE"), ("BASE", "BASE", LAST, "BASE", "VAE")),
    "mbw": _same(FIRST, FIRST, LAST, "BASE", "BASE"),
    "supermerger": Rule(
        (FIRST, NOT_MERGED, LAST, "BASE", "BASE"), (NOT_MERGED, NOT_MERGED, LAST, "BASE", "BASE"), weights_only=True
    ),
    "comfyui": _same("TIME_EMBED", "LABEL_EMB", "OUT", "BASE", NOT_MERGED),
}
