"""The estimator's network: what is known of a moment of denoising in, how bad the finished picture will be out.

One moment of one trajectory is the noisy latents, the guess of the clean ones, how that has changed since the moment
before, maps of two U-Net blocks, pooled U-Net features, some scalars and the prompt's words; each is a group of inputs
that can be left out, so that an ablation is honest. Noise enters as log SNR (FiLM, arXiv 1709.07871), never as a step's
number, so that one network serves all schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dodgeburn.errors import UserError
from dodgeburn.foresee.labels import LEVELS, TYPES
from dodgeburn.foresee.shards import Space

INPUTS = ("x_t", "x0", "change", "maps", "features", "scalars", "text")
SPATIAL = ("x_t", "x0", "change", "maps")
LOG_SNR = (-6.0, 6.0)  # where the embedding's waves and the experts' windows lie; values outside are clamped
_WAVES = 8
BEFORE = "x0_before"
"""Name of the tensor with x0 at the moment before, in a trajectory's first moment x0 itself."""


@dataclass(frozen=True)
class NetworkSettings:
    """What the network sees and how large it is.

    inputs: of INPUTS. experts: 1 is one trunk conditioned on log SNR; more are trunks for stretches of log SNR, mixed
    where these overlap, together of about as many weights as the one. memory: a GRU over the moments seen so far.
    head: how severity 0..5 is said: "coral" (ordinal, arXiv 1901.07884) or "histogram".
    """

    inputs: tuple[str, ...] = ("x0", "change", "maps", "scalars")
    width: int = 48
    channels: tuple[int, int] = (24, 48)  # of the convolutions, at the latents' resolution and at half of it
    components: int = 16  # principal components of the U-Net features that are looked at
    experts: int = 1
    memory: bool = False
    head: Literal["coral", "histogram"] = "coral"
    heatmap: bool = True  # learn from masks where artifacts are, if there are masks and something with places is seen
    dropout: float = 0.3
    map_dropout: float = 0.3  # share of a map's channels that are hidden in training
    words: int = 256  # buckets that the prompt's words are hashed to

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown or not self.inputs or len(set(self.inputs)) != len(self.inputs):
            raise UserError(f"inputs are {', '.join(self.inputs) or 'none'}: expected some of {', '.join(INPUTS)}")
        if self.experts < 1 or self.width < 4:
            raise UserError(f"{self.experts} experts of width {self.width}: give at least 1 and 4")


@dataclass
class Outputs:
    """What the network says of b trajectories at k moments each."""

    z: Tensor  # [b, k, width], the state that the exit heads look at
    severity: Tensor  # [b, k, 5] logits of severity >= 1 .. 5 (coral), or [b, k, 6] of severity 0..5 (histogram)
    types: Tensor  # [b, k, types] logits
    rank: Tensor  # [b, k], larger is worse; only differences count
    heatmap: Tensor | None = None  # [b, k, h, w] logits, at the latents' resolution
    memory: Tensor | None = None  # [1, b, width], to be handed in with the next moments


def at_least(severity: Tensor) -> Tensor:
    """Probabilities of severity >= 1 .. 5 [..., 5] from either head's logits."""
    if severity.shape[-1] == LEVELS - 1:
        return severity.sigmoid()
    p = severity.softmax(-1)
    return p.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def noise_embedding(log_snr: Tensor) -> Tensor:
    """log SNR [...] as waves of 8 lengths [..., 17]."""
    low, high = LOG_SNR
    x = (log_snr.clamp(low - 2, high + 2) - low) / (high - low)
    angles = x[..., None] * (math.pi * 2.0 ** torch.arange(_WAVES, device=x.device) / 4)
    return torch.cat([x[..., None], angles.sin(), angles.cos()], -1)


class _Residual(nn.Module):
    """Norm, scaled and shifted by the noise level, and a convolution; added to what came in."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.film = nn.Linear(1 + 2 * _WAVES, 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        scale, shift = self.film(noise)[:, :, None, None].chunk(2, 1)
        out: Tensor = x + self.dropout(self.conv(F.silu(self.norm(x) * (1 + scale) + shift)))
        return out


class _Picture(nn.Module):
    """Everything that has places, [n, c, h, w] of any size, to a vector [n, width] and a map of where something is
    wrong, [n, h, w] logits.

    A small U-shape: one level down to see what belongs together (there the further block's map joins), and back. The
    vector holds means and maxima of both levels and how much is marked on the map, since an artifact's severity goes
    with its extent.
    """

    def __init__(
        self, latents: int, maps: tuple[int, ...], channels: tuple[int, int], width: int, dropout: float
    ) -> None:
        super().__init__()
        near, far = channels
        # Bare latents have to be looked at with their neighbours; of a map, the U-Net has done so already.
        self.first = nn.Conv2d(latents, near, 3, padding=1) if latents else None
        self.nearer = nn.Conv2d(maps[0], near, 1) if maps else None
        self.further = nn.Conv2d(maps[1], far, 1) if len(maps) > 1 else None
        self.upper = _Residual(near, dropout)
        self.down = nn.Conv2d(near, far, 3, stride=2, padding=1)
        self.lower = nn.ModuleList([_Residual(far, dropout) for _ in range(2)])
        self.join = nn.Conv2d(near + far, near, 1)
        self.heat = nn.Conv2d(near, 1, 1)
        self.out = nn.Linear(2 * far + 2 * near + 3, width)

    def forward(self, latents: Tensor | None, maps: list[Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        seen = [layer(x) for layer, x in ((self.first, latents), (self.nearer, maps[0] if maps else None))
                if layer is not None and x is not None]  # fmt: skip
        near = self.upper(seen[0] if len(seen) == 1 else seen[0] + seen[1], noise)
        far = self.down(F.silu(near))
        if self.further is not None and len(maps) > 1:
            far = far + F.interpolate(self.further(maps[1]), size=far.shape[-2:])
        for block in self.lower:
            far = block(far, noise)
        joined = F.silu(self.join(torch.cat([near, F.interpolate(far, size=near.shape[-2:])], 1)))
        heat = self.heat(joined)[:, 0].float()
        marked, far = heat.sigmoid().flatten(1), F.silu(far)
        extent = torch.stack([marked.mean(1), marked.amax(1), (marked.mean(1) + 1e-3).log()], 1)
        found = [far.mean((2, 3)), far.amax((2, 3)), joined.mean((2, 3)), joined.amax((2, 3)), extent]
        return self.out(torch.cat(found, 1)), heat


class _Trunk(nn.Module):
    """Two layers, each scaled and shifted by the noise level."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.films = nn.ModuleList([nn.Linear(1 + 2 * _WAVES, 2 * width) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        for layer, norm, film in zip((self.first, self.second), self.norms, self.films, strict=True):
            scale, shift = film(noise).chunk(2, -1)
            x = self.dropout(F.silu(norm(layer(x)) * (1 + scale) + shift))
        return x


class Network(nn.Module):
    """`network(tensors)` -> Outputs; tensors are named as in a shard, [b, k, ...], and `words` [b, words]."""

    def __init__(self, space: Space, settings: NetworkSettings) -> None:
        super().__init__()
        self.space, self.settings = space, settings
        width, inputs = settings.width, settings.inputs
        if "maps" in inputs and not space.maps:
            raise UserError("these trajectories have no maps of the U-Net's blocks: collect them again, or leave maps "
                            "out of the inputs")  # fmt: skip
        self.spatial = tuple(name for name in SPATIAL if name in inputs)
        self.picture: _Picture | None = None
        if self.spatial:
            maps = tuple(wide for _, wide in space.maps) if "maps" in inputs else ()
            latents = space.latent * len([name for name in self.spatial if name != "maps"])
            self.picture = _Picture(latents, maps, settings.channels, width, settings.dropout / 2)
        components = min(settings.components, 2 * space.features)
        flat = {"features": components, "scalars": len(space.scalars), "text": settings.words}
        self.flats = nn.ModuleDict({name: nn.Linear(flat[name], width) for name in inputs if name in flat})
        for name, wide in (("features", 2 * space.features), ("scalars", len(space.scalars))):
            if name in inputs:
                self.register_buffer(f"{name}_mean", torch.zeros(wide))
                self.register_buffer(f"{name}_scale", torch.ones(wide))
        if "features" in inputs:
            self.register_buffer("components", torch.eye(2 * space.features)[:, :components].contiguous())
        self.hidden = nn.Dropout2d(settings.map_dropout)
        self.noise_in = nn.Dropout(settings.dropout / 2)
        groups = width * (len(self.flats) + (self.picture is not None))
        each = expert_width(settings, groups)
        self.trunks = nn.ModuleList(_Trunk(groups, each, settings.dropout) for _ in range(settings.experts))
        self.state = nn.Linear(each, width) if each != width else nn.Identity()
        self.memory = nn.GRU(width, width, batch_first=True) if settings.memory else None
        levels = LEVELS - 1
        if settings.head == "coral":  # one direction, five ordered cuts
            self.severity = nn.Linear(width, 1, bias=False)
            self.cuts = nn.Parameter(torch.linspace(1, -1, levels))
        else:
            self.severity = nn.Linear(width, LEVELS)
        self.types = nn.Linear(width, len(TYPES))
        self.rank = nn.Linear(width, 1)

    def forward(self, tensors: dict[str, Tensor], memory: Tensor | None = None) -> Outputs:
        """See Outputs. `memory` is that of the moments before, for a network that has one."""
        log_snr = tensors["log_snr"].float()
        b, k = log_snr.shape
        noise = noise_embedding(log_snr).reshape(b * k, -1)
        parts, heat = [], None
        if self.picture is not None:
            vector, seen = self.look(tensors, noise)
            parts, heat = [F.silu(vector)], seen.unflatten(0, (b, k))
        for name, layer in self.flats.items():
            parts.append(F.silu(layer(self.noise_in(self._flat(name, tensors, k)))))
        x = torch.cat(parts, 1)
        if len(self.trunks) == 1:
            z = self.trunks[0](x, noise)
        else:
            gates = expert_gates(log_snr.reshape(-1), len(self.trunks))
            z = torch.stack([trunk(x, noise) for trunk in self.trunks], 1).mul(gates[:, :, None]).sum(1)
        z = self.state(z).view(b, k, -1)
        if self.memory is not None:
            remembered, memory = self.memory(z, memory)
            z = z + remembered
        severity = self.severity(z)
        if self.settings.head == "coral":
            severity = severity + self.cuts.sort(descending=True).values
        return Outputs(z, severity, self.types(z), self.rank(z)[..., 0], heat, memory)

    def look(self, tensors: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """What is seen at places: vector [b * k, width] and map [b * k, h, w]; `noise` [b * k, 17]."""
        assert self.picture is not None
        planes = [self._plane(name, tensors).flatten(0, 1) for name in self.spatial if name != "maps"]
        maps: list[Tensor] = []
        if "maps" in self.spatial:
            maps = [self.hidden(tensors[name].float().flatten(0, 1)) for name in ("near", "far") if name in tensors]
            size = (maps[0].shape[-2], maps[0].shape[-1])
            # Large latents are averaged to the map's resolution.
            planes = [p if p.shape[-2:] == maps[0].shape[-2:] else F.adaptive_avg_pool2d(p, size) for p in planes]
        found: tuple[Tensor, Tensor] = self.picture(torch.cat(planes, 1) if planes else None, maps, noise)
        return found

    def _plane(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        if name == "change":  # where the U-Net is undecided, its guess moves
            return tensors["x0"].float() - tensors[BEFORE].float()
        return tensors[name].float()

    def _flat(self, name: str, tensors: dict[str, Tensor], k: int) -> Tensor:
        if name == "text":
            return tensors["words"].float()[:, None].expand(-1, k, -1).flatten(0, 1)
        if name == "features":
            x = torch.cat([tensors["cond"].float(), tensors["delta"].float()], -1)
        else:
            x = tensors["scalars"].float()
        mean, scale = getattr(self, f"{name}_mean"), getattr(self, f"{name}_scale")
        # Features far from anything seen in training (another guidance, say) must not swamp the rest.
        x = ((x - mean) / scale).clamp(-8, 8).flatten(0, 1)
        return x @ self.components if name == "features" else x

    @property
    def weights(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.parameters())


def expert_width(settings: NetworkSettings, inputs: int) -> int:
    """Width of each expert, so that all of them have about as many weights as one trunk of `settings.width`."""
    if settings.experts == 1:
        return settings.width

    def size(width: int) -> int:
        return inputs * width + width * width + 2 * (1 + 2 * _WAVES) * 2 * width

    whole = size(settings.width)
    fits = (w for w in range(4, settings.width + 1) if settings.experts * size(w) + w * settings.width <= whole)
    return max(fits, default=4)


def expert_gates(log_snr: Tensor, experts: int) -> Tensor:
    """Shares [n, experts] by log SNR [n]: triangular windows over LOG_SNR that add up to 1 (eDiff-I, arXiv 2211.01324,
    has experts by stage; overlapping windows leave no jump between them)."""
    low, high = LOG_SNR
    x = (log_snr.clamp(low, high) - low) / (high - low) * (experts - 1)
    return (1 - (x[:, None] - torch.arange(experts, device=x.device)).abs()).clamp(min=0)


class ExitHeads(nn.Module):
    """PALBERT's exit head (arXiv 2204.03276: a three-layer tanh perceptron on this state and the one before) and a
    discrete hazard, on frozen states z [b, k, width] -> logits of lambda and of the hazard, [b, k] each."""

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * width + 1 + 2 * _WAVES, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
            nn.Linear(hidden, 2),
        )  # fmt: skip
        nn.init.constant_(self.layers[-1].bias, -2.0)  # type: ignore[arg-type]

    def forward(self, z: Tensor, log_snr: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`before`: the state [b, width] of the moment before the first; None at the beginning."""
        first = torch.zeros_like(z[:, :1]) if before is None else before[:, None]
        previous = torch.cat([first, z[:, :-1]], 1)
        out = self.layers(torch.cat([z, previous, noise_embedding(log_snr.float())], -1))
        return out[..., 0], out[..., 1]
