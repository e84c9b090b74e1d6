"""Low-rank adapters on a model in memory: any number at once, with a scale of its own for every sample of a batch.

LoRA (Hu et al. 2021, arXiv 2106.09685): a layer's output h = W x becomes h + s * (alpha / rank) * up(down(x)). The
layers stay as they are; a forward hook adds the second term. Adapters on one layer are put side by side into one
`down` and one `up` (their ranks concatenated), so N sliders cost one small product more, not N. The scale s stands
between the two factors, a number for each sample and rank: a whole sweep over s is one batched call.

At scale 0 the term is a zero that is added: outputs are equal to those without an adapter, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from dodgeburn.checkpoint.slider_card import SliderCard
from dodgeburn.errors import UserError

LAYER_SETS: Mapping[str, str] = {
    "full": "all attention and all residual, down- and upsampling layers",
    "noxattn": "the same without cross-attention (Concept Sliders' default: layout and subject stay)",
    "xattn": "cross-attention only",
    "selfattn": "self-attention only",
    "xattn-strict": "queries, keys and values of cross-attention only",
}


@dataclass(frozen=True)
class Factors:
    """One layer's change: up @ down * alpha / rank."""

    down: Tensor  # [rank, in] or [rank, in, k, k]
    up: Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Origin:
    """The file that an adapter was read from."""

    file: str  # its name, without folder
    sha256: str  # of the whole file
    sha256_tensors: str  # of all bytes after the header: A1111's LoRA hash; for a pickle, of the whole file
    architecture: str | None = None  # "sd15", "sdxl", or None where the modules fit both
    card: SliderCard | None = None  # a slider's metadata


class Adapter(nn.Module):
    """Factors by module name (`unet.mid_block.attentions.0.…`, `text_encoder.…`), fp32, trainable."""

    def __init__(self, factors: Mapping[str, Factors], name: str = "adapter", origin: Origin | None = None) -> None:
        super().__init__()
        if not factors:
            raise UserError(f"{name} changes no layer")
        self.name = name
        self.origin = origin
        self.alphas = {module: f.alpha for module, f in factors.items()}
        self.downs = nn.ParameterDict({_flat(k): nn.Parameter(f.down.detach().float()) for k, f in factors.items()})
        self.ups = nn.ParameterDict({_flat(k): nn.Parameter(f.up.detach().float()) for k, f in factors.items()})

    @property
    def modules_changed(self) -> list[str]:
        """Names of the changed modules, in order."""
        return list(self.alphas)

    @property
    def changes_text(self) -> bool:
        """Whether any changed module is of a text encoder."""
        return any(module.startswith("text_encoder") for module in self.alphas)

    def down(self, module: str) -> nn.Parameter:
        """[rank, in] or [rank, in, k, k]"""
        return self.downs[_flat(module)]

    def up(self, module: str) -> nn.Parameter:
        """[out, rank] or [out, rank, 1, 1]"""
        return self.ups[_flat(module)]

    def factors(self) -> dict[str, Factors]:
        """Copies of the factors, detached."""
        return {
            m: Factors(self.down(m).detach().clone(), self.up(m).detach().clone(), a) for m, a in self.alphas.items()
        }

    def scaled(self, factor: float, name: str | None = None) -> Adapter:
        """A copy whose scale 1 is this one's scale `factor`, folded into alpha (and into up's sign if negative)."""
        if factor == 0:
            raise UserError(f"{self.name} times 0 changes nothing")
        sign = 1.0 if factor > 0 else -1.0
        made = {m: Factors(f.down, f.up * sign, f.alpha * abs(factor)) for m, f in self.factors().items()}
        return Adapter(made, name or self.name)


def _flat(module: str) -> str:
    return module.replace(".", "/")  # parameter names may hold no dot


# -------------------- which layers


def layers_of(unet: nn.Module, layer_set: str = "noxattn") -> list[str]:
    """Names of the Linear and Conv2d layers that a layer set covers, without `unet.`.

    Concept Sliders' rule (arXiv 2311.12092 and its code): children of attention, residual, down- and upsampling
    modules; feed-forward, projections in and out of a transformer, and the first and last convolution never.
    Raises UserError for a set that is not known.
    """
    if layer_set not in LAYER_SETS:
        raise UserError(f"unknown layer set {layer_set!r}: expected {', '.join(LAYER_SETS)}")
    out = []
    for name, module in unet.named_modules():
        if not isinstance(module, (Attention, ResnetBlock2D, Downsample2D, Upsample2D)):
            continue
        attention = name.rsplit(".", 1)[-1] if isinstance(module, Attention) else ""
        if not _covers(layer_set, attention):
            continue
        for child, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and (layer_set != "xattn-strict" or child in _QKV):
                out.append(f"{name}.{child}")
    return out


_QKV = ("to_q", "to_k", "to_v")


def _covers(layer_set: str, attention: str) -> bool:
    """Whether a set covers an attention of this name (attn1: self, attn2: cross; "" is no attention)."""
    if layer_set == "full":
        return True
    if layer_set == "noxattn":
        return attention != "attn2"
    return attention == ("attn1" if layer_set == "selfattn" else "attn2")


def text_layers_of(encoder: nn.Module) -> list[str]:
    """Names of a CLIP text encoder's attention projections and feed-forward layers (kohya's choice)."""
    wanted = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in wanted]


def trained_layers(components: Mapping[str, nn.Module], layer_set: str, text_encoders: bool = False) -> list[str]:
    """Full names of the U-Net's layers that a set covers and, if asked for, of `text_layers_of` all text encoders."""
    found = [f"unet.{name}" for name in layers_of(components["unet"], layer_set)]
    for part, encoder in components.items():
        if text_encoders and part.startswith("text_encoder"):
            # files have `text_model.`, which transformers dropped from its module names in 5.6
            heads = ("text_model.", "text_projection")
            names = [name if name.startswith(heads) else f"text_model.{name}" for name in text_layers_of(encoder)]
            found += [f"{part}.{name}" for name in names]
    return found


def new_adapter(
    components: Mapping[str, nn.Module], layers: Iterable[str], rank: int = 4, alpha: float | None = None,
    seed: int = 0, name: str = "adapter",
) -> Adapter:  # fmt: skip
    """A fresh adapter that changes nothing yet: down drawn as PyTorch initialises a layer, up zero.

    components: modules by folder name (`unet`, `text_encoder`, …); layers: full names, `unet.…`. alpha: the rank by
    default, so scale 1 is the plain product. Raises UserError for a rank below 1 or beyond what the widest layer can
    hold, or a layer that is not there.
    """
    found = {layer: layer_at(components, layer) for layer in layers}
    widest = max((min(m.weight.shape[0], m.weight.shape[1:].numel()) for m in found.values()), default=rank)
    if not 1 <= rank <= widest:
        raise UserError(f"rank {rank}: expected 1 to {widest}, which changes the widest layer in every way there is")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, module in found.items():
        shape = module.weight.shape
        fan_in = shape[1:].numel()
        down = torch.empty(rank, *shape[1:]).uniform_(-1, 1, generator=generator) / fan_in**0.5
        up = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
        made[layer] = Factors(down, up, float(rank if alpha is None else alpha))
    return Adapter(made, name)


def layer_at(components: Mapping[str, nn.Module], name: str) -> Any:
    """The Linear or Conv2d of this full name; UserError if the model has none (an adapter of another model)."""
    part, _, path = name.partition(".")
    try:
        layer = components[part].get_submodule(path)
    except (KeyError, AttributeError):
        # transformers dropped `text_model.` from its module names in 5.6; files keep it
        try:
            layer = components[part].get_submodule(path.removeprefix("text_model."))
        except (KeyError, AttributeError):
            raise UserError(f"the model has no layer {name}: the adapter is for another architecture") from None
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise UserError(f"{name} is a {type(layer).__name__}: adapters change Linear and Conv2d layers only")
    return layer


# -------------------- attaching


class Attachment:
    """Adapters at work on a model. `scales` decides how strongly, sample by sample, and may change at any time."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)
        self.scales = torch.zeros(len(self.adapters), 1)

    def set(self, scales: Tensor | Sequence[float] | float) -> None:
        """A number for all; [adapters] for each; or [adapters, rows] for each row of the next calls' batches."""
        value = torch.as_tensor(scales, dtype=torch.float32)
        if value.ndim == 0:
            value = value.expand(len(self.adapters))
        if value.ndim == 1:
            value = value[:, None]
        if value.ndim != 2 or len(value) != len(self.adapters):
            raise ValueError(f"scales of shape {list(value.shape)} for {len(self.adapters)} adapters")
        self.scales = value

    @property
    def idle(self) -> bool:
        """All scales are 0: hooks do nothing at all."""
        return not bool(self.scales.any())


class _Hook:
    """Adds the change of one layer. Ranks of all adapters on it stand side by side."""

    def __init__(self, attachment: Attachment, layer: Any, users: list[tuple[int, str, float]], trains: bool) -> None:
        self.attachment, self.users, self.trains = attachment, users, trains
        self.inputs = tuple(layer.weight.shape[1:])
        self._kept: tuple[Tensor, Tensor] | None = None
        adapters = attachment.adapters
        ranks = [adapters[i].down(module).shape[0] for i, module, _ in users]
        self.owner = torch.tensor([i for (i, _, _), rank in zip(users, ranks, strict=True) for _ in range(rank)])
        self.factor = torch.tensor(
            [
                adapters[i].alphas[module] / rank * strength
                for (i, module, strength), rank in zip(users, ranks, strict=True)
                for _ in range(rank)
            ],
            dtype=torch.float32,
        )

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Down [ranks, in (, k, k)], as the layer's weight has it, and up [out, ranks]; files have a 1x1 convolution as
        a matrix too, and the other way round.
        """
        if self._kept is not None and self._kept[0].dtype == like.dtype and self._kept[0].device == like.device:
            return self._kept
        adapters = self.attachment.adapters
        downs = [adapters[i].down(m).reshape(-1, *self.inputs) for i, m, _ in self.users]
        ups = [adapters[i].up(m).flatten(1) for i, m, _ in self.users]
        one = len(downs) == 1
        down = (downs[0] if one else torch.cat(downs)).to(like.device, like.dtype)
        up = (ups[0] if one else torch.cat(ups, 1)).to(like.device, like.dtype)
        if not self.trains:
            self._kept = down, up
        return down, up

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.attachment.idle and not (self.trains and torch.is_grad_enabled()):
            return output
        x = inputs[0]
        down, up = self._factors(x)
        scale = (self.attachment.scales[self.owner] * self.factor[:, None]).T.to(x.device, x.dtype)  # [rows, ranks]
        # Product and sum in one call: for so few ranks a sum by itself would take as long as the product.
        if isinstance(layer, nn.Conv2d):
            z = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            z = (z * scale[:, :, None, None]).flatten(2)
            return torch.baddbmm(output.flatten(2), up.expand(len(z), -1, -1), z).view(output.shape)
        z = F.linear(x, down)
        z = (z * scale.view(len(scale), *[1] * (x.ndim - 2), -1)).flatten(0, -2)
        return torch.addmm(output.flatten(0, -2), z, up.T).view(output.shape)


@contextmanager
def attached(
    components: Mapping[str, nn.Module],
    adapters: Sequence[Adapter],
    strengths: Sequence[Mapping[str, float]] | None = None,
    trains: bool = False,
) -> Iterator[Attachment]:
    """Within the context the model's layers are changed by the adapters, by `Attachment.set`'s scales (0 at first).

    components: modules by folder name. strengths: for each adapter, factors by module name (block weights); modules
    not named have 1. trains: the factors change or need gradients, so none are kept. Raises UserError for a layer
    that the model hasn't or whose shape another architecture's adapter doesn't fit.
    """
    attachment = Attachment(adapters)
    users: dict[str, list[tuple[int, str, float]]] = {}
    layers: dict[str, Any] = {}
    for i, adapter in enumerate(adapters):
        given = strengths[i] if strengths is not None else {}
        for module in adapter.modules_changed:
            layer = layer_at(components, module)
            _check(adapter, module, layer)
            users.setdefault(module, []).append((i, module, float(given.get(module, 1.0))))
            layers[module] = layer
    handles = []
    try:
        for module, layer in layers.items():
            hook = _Hook(attachment, layer, users[module], trains)
            handles.append(layer.register_forward_hook(hook))
        yield attachment
    finally:
        for handle in handles:
            handle.remove()


def _check(adapter: Adapter, module: str, layer: Any) -> None:
    down, up, weight = adapter.down(module), adapter.up(module), layer.weight
    if down.shape[1:].numel() != weight.shape[1:].numel() or up.shape[0] != weight.shape[0]:
        raise UserError(
            f"{adapter.name} changes {module} from {down.shape[1:].numel()} to {up.shape[0]} values, the model's layer "
            f"goes from {weight.shape[1:].numel()} to {weight.shape[0]}: the adapter is for another architecture"
        )
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise UserError(f"{module} is a grouped convolution: no adapter can be attached to it")
