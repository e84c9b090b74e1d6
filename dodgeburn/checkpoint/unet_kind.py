"""What a checkpoint says of its U-Net besides blocks and widths: how many channels it takes, and what it predicts."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from dodgeburn.checkpoint.header import Header
from dodgeburn.checkpoint.metadata import configs_of
from dodgeburn.checkpoint.unet_keys import UNET

CONV_IN = f"{UNET}input_blocks.0.0.weight"
_KINDS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}
_V = "v_prediction"


def input_channels(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Input channels of the U-Net (4 for text to image), by its first convolution; None if it is not there."""
    shape = shapes.get(CONV_IN, ())
    return shape[1] if len(shape) == 4 else None


def kind_of(channels: int) -> str:
    """What a U-Net of so many input channels is, as in "an inpainting model"."""
    return _KINDS.get(channels, "no text-to-image model")


def predicts_v(metadata: Mapping[str, str], keys: Container[str]) -> bool:
    """Whether a file says that its U-Net predicts velocity: by ModelSpec, or by the marker tensor in use for SDXL."""
    return metadata.get("modelspec.prediction_type", "").lower() in ("v", _V) or "v_pred" in keys


def has_zero_snr(keys: Container[str]) -> bool:
    """Whether a file says that its noise schedule ends in pure noise: by the marker tensor in use for SDXL."""
    return "ztsnr" in keys


def prediction_type(header: Header) -> str:
    """ "v_prediction" or another type that the file says its U-Net predicts; "epsilon" where it says nothing."""
    if predicts_v(header.metadata, header.tensors):
        return _V
    configs = configs_of(header.metadata) or {}
    return str(configs.get("scheduler", {}).get("prediction_type", "epsilon"))
