"""How a model is aligned with preferences, and beta in the conventions that are about."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dodgeburn.rework.dpo.losses import LOSSES, scaled_beta

DEFAULT_BETA = 5000.0  # at SD1.5's latents
LORA_LR, FULL_LR = 1e-4, 1e-5


class DpoSettings(BaseModel):
    """How to align. None: a default that depends on the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["sigmoid", "ipo", "hinge", "linear", "kto", "mapo", "sft"] = "sigmoid"
    beta: float | None = Field(default=None, gt=0)  # the paper's, for this model's latents; None: 5000 scaled to them
    safeguard: bool = False  # scale the loser's gradient so that the winner's error cannot rise to first order
    slack: float = Field(default=0.0, ge=0, lt=1)  # of the safeguard: above 0, the winner's error has to fall
    rank: int | None = Field(default=8, ge=1)  # of the LoRA; None: the whole U-Net
    alpha: float | None = Field(default=None, gt=0)  # None: the rank
    layers: str = "full"
    reference: Literal["auto", "off", "bank", "copy"] = "auto"  # auto: off for a LoRA, copy for the whole U-Net
    bank: int = Field(default=2048, ge=1)  # points of reference "bank"
    reference_decay: float = Field(default=0.0, ge=0, lt=1)  # above 0: the reference follows as a moving average
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=8, ge=1)  # pairs; two samples each
    accumulate: int = Field(default=1, ge=1)  # batches a step
    lr: float | None = Field(default=None, gt=0)
    warmup: int | None = Field(default=None, ge=0)  # steps; None: a tenth
    constant: float = Field(default=1.0, ge=0, le=1)  # share of the steps after which the rate falls to zero
    weight_decay: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)  # above 0: the averaged weights are what is kept
    guidance: float = Field(default=1.0, ge=0)  # other than 1: what is compared is the guided prediction, as it draws
    dropout: float = Field(default=0.1, ge=0, le=1)  # share of pairs with an empty caption
    flips: bool = False  # mirror half of the pairs, both pictures alike
    start: int = Field(default=1000, ge=1, le=1000)  # time steps below this one are trained
    end: int = Field(default=0, ge=0, le=999)  # and from this one on
    emphasis: float = Field(default=0.0, ge=0, le=4)  # errors count times sigma to this power (pair_points.py)
    checkpointing: bool = False  # work activations out twice instead of keeping them
    one_by_one: bool = False  # winners and losers pass one after the other: half of the activations, a forward more
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fit_together(self) -> DpoSettings:
        loss = LOSSES[self.loss]
        if self.safeguard and not loss.loser:
            raise ValueError(f"safeguard scales the loser's gradient, and loss {self.loss} has none")
        if self.slack and not self.safeguard:
            raise ValueError("slack is the safeguard's: without it it has no effect")
        if not loss.reference and (self.reference != "auto" or self.reference_decay):
            raise ValueError(f"loss {self.loss} has no reference: leave out what concerns it")
        if self.loss == "sft" and self.beta is not None:
            raise ValueError("loss sft has no beta")
        if self.one_by_one and not loss.loser:
            raise ValueError(f"one-by-one has no effect: loss {self.loss} asks for the winners alone")
        if self.rank is None and self.reference == "off":
            raise ValueError("the whole U-Net cannot be switched off: its reference is copy or bank")
        if self.rank is not None and self.reference == "copy" and self.reference_decay:
            raise ValueError("a copy of the U-Net cannot follow a LoRA: its reference is off, which can")
        if self.end >= self.start:
            raise ValueError(f"time steps from {self.end} to below {self.start}: there are none")
        if self.reference == "bank" and self.reference_decay:
            raise ValueError("a bank is worked out beforehand: its reference cannot follow")
        return self

    @property
    def kind_of_reference(self) -> str:
        """off, bank, copy or none"""
        if not LOSSES[self.loss].reference:
            return "none"
        if self.reference != "auto":
            return self.reference
        return "copy" if self.rank is None else "off"

    def beta_for(self, elements: int) -> float:
        """The paper's beta for latents of so many elements; MaPO's own weight; 0 where there is none."""
        if self.beta is not None:
            return self.beta
        own = LOSSES[self.loss].beta
        return scaled_beta(DEFAULT_BETA, elements) if own is None else own

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr if self.lr is not None else (FULL_LR if self.rank is None else LORA_LR)


def betas(beta: float, elements: int) -> dict[str, float]:
    """A beta in every convention: the paper's, diffusers' (without the half), per element, and at SD1.5's size."""
    return {
        "paper": beta, "diffusers": beta / 2, "per_element": beta / elements,
        "at_sd15": beta / elements * 4 * 64 * 64,
    }  # fmt: skip
