"""The estimator: a trained network with its calibration and its rules for stopping, as one small file.

    estimator = Estimator.load("foresee.safetensors")
    estimator.check(model)
    seen = observer(step)                       # foresee/observe.py
    judged, state = estimator.judge(seen, prompts, state)

P(bad) is what the network says of "severity 3 or more" after Platt scaling whose slope and intercept vary with log SNR,
fitted on prompts that the weights were not trained on.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dodgeburn.checkpoint.tensorfile import TensorFile, load_tensors, save_tensors
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee.ahead import Ahead
from dodgeburn.foresee.feed import words_of
from dodgeburn.foresee.labels import BAD_FROM, TYPES
from dodgeburn.foresee.network import BEFORE, ExitHeads, Network, NetworkSettings, Outputs, at_least
from dodgeburn.foresee.observe import Seen, space_of
from dodgeburn.foresee.shards import MAP_TENSORS, Batch, Space
from dodgeburn.models.model import Model

KEY = "dodgeburn.foresee"
VERSION = 2
KNOTS = (-5.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.0)  # of log SNR, where the calibration is free
PACKAGED = Path(__file__).parents[1] / "pocket" / "weights" / "foresee.safetensors"


@dataclass
class Calibration:
    """logit P(bad) = slope(log SNR) x raw + intercept(log SNR), both linear between KNOTS."""

    slopes: Tensor = field(default_factory=lambda: torch.ones(len(KNOTS)))
    intercepts: Tensor = field(default_factory=lambda: torch.zeros(len(KNOTS)))

    def __call__(self, raw: Tensor, log_snr: Tensor) -> Tensor:
        """Calibrated log-odds of raw ones, alike in shape."""
        hats = _hats(log_snr)
        return raw * (hats @ self.slopes) + hats @ self.intercepts

    @staticmethod
    def fit(
        raw: Tensor, log_snr: Tensor, bad: Tensor, weight: Tensor | None = None, ridge: float = 2e-3
    ) -> Calibration:
        """The most likely one of flat tensors [n]; neighbouring knots are held together by `ridge`."""
        found = Calibration(torch.ones(len(KNOTS)).requires_grad_(), torch.zeros(len(KNOTS)).requires_grad_())
        optimizer = torch.optim.LBFGS([found.slopes, found.intercepts], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.binary_cross_entropy_with_logits(found(raw, log_snr), bad, weight)
            value = value + ridge * (found.slopes.diff().square().sum() + found.intercepts.diff().square().sum())
            value = value + 0.1 * ridge * (found.slopes - 1).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return Calibration(found.slopes.detach().clamp(min=0), found.intercepts.detach())


def _hats(log_snr: Tensor) -> Tensor:
    """Weights of the knots [..., knots] for linear interpolation; constant outside of them."""
    knots = torch.tensor(KNOTS, device=log_snr.device)
    x = log_snr.float().clamp(KNOTS[0], KNOTS[-1])
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(KNOTS) - 1)
    share = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    out = torch.zeros(*x.shape, len(KNOTS), device=x.device)
    return out.scatter(-1, right[..., None], share[..., None]).scatter(-1, right[..., None] - 1, 1 - share[..., None])


@dataclass
class Judged:
    """What is expected of n pictures from one moment, fp32 [n] on the CPU; of k moments, [n, k]."""

    bad: Tensor  # P(severity >= 3), calibrated
    severity: Tensor  # expected, 0..5
    rank: Tensor  # larger is worse, comparable within a prompt at one moment
    types: Tensor  # [..., types], probabilities
    exit: Tensor  # PALBERT's lambda: probability that the answer is ready now, given that it was not before
    hazard: Tensor  # probability that the picture is given up now, given that it was not before
    z: Tensor
    heatmap: Tensor | None = None  # [..., h, w], probability of a defect there, at the latents' resolution


@dataclass
class State:
    """What the estimator remembers of n pictures between moments."""

    indices: tuple[int, ...]
    z: Tensor | None = None  # [n, width]
    memory: Tensor | None = None  # [1, n, width]
    x0: Tensor | None = None  # [n, c, h, w]

    def at(self, indices: tuple[int, ...]) -> State:
        """Of these pictures only."""
        if indices == self.indices or self.z is None:
            return State(indices, self.z, self.memory, self.x0)
        rows = torch.tensor([self.indices.index(i) for i in indices], dtype=torch.int64)
        memory = None if self.memory is None else self.memory[:, rows]
        return State(indices, self.z[rows], memory, None if self.x0 is None else self.x0[rows])


class Estimator:
    """A network with what belongs to it. `record` says where it comes from (JSON)."""

    def __init__(
        self, network: Network, exits: ExitHeads | None = None, calibration: Calibration | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.network = network.eval()
        self.exits = (exits or ExitHeads(network.settings.width)).eval()
        self.calibration = calibration or Calibration()
        self.record: dict[str, Any] = dict(record or {})

    @property
    def space(self) -> Space:
        return self.network.space

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.network.settings.inputs

    @property
    def looks(self) -> int:
        """How many moments of a trajectory it was trained on: at so many it looks while pictures are made."""
        return int(self.record.get("looks", 8))

    @property
    def ahead(self) -> Ahead | None:
        """How it looks ahead; None if it doesn't."""
        return Ahead.of(self.record["ahead"]) if "ahead" in self.record else None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the shard's tensors that are needed."""
        maps = MAP_TENSORS[: len(self.space.maps)]
        found: dict[str, tuple[str, ...]] = {
            "x_t": ("x_t",), "x0": ("x0",), "change": ("x0",), "maps": maps,
            "features": ("cond", "delta"), "scalars": ("scalars",),
            "text": (),
        }  # fmt: skip
        return tuple(dict.fromkeys(("log_snr", *(name for group in self.inputs for name in found[group]))))

    @property
    def fed(self) -> tuple[str, ...]:
        """Names of the tensors that training needs (`Feed`): x0 of the moment before is one if `change` is an input."""
        return (*self.tensors, BEFORE) if "change" in self.inputs else self.tensors

    # ------------------------------------------------------------------------------------------------ judging

    @torch.no_grad()
    def judge(
        self, seen: Seen, prompts: Sequence[str], state: State | None = None
    ) -> tuple[Judged, State]:  # fmt: skip
        """Pictures at one step of sampling: `prompts` are those of `seen`'s pictures, `state` what the step before
        returned (None at the first)."""
        n = len(seen.x0)
        state = State(seen.indices) if state is None else state.at(seen.indices)
        tensors = {"log_snr": torch.full((n, 1), seen.log_snr)}
        tensors |= {name: getattr(seen, name)[:, None] for name in self.tensors if name != "log_snr"}
        if "change" in self.inputs:
            tensors[BEFORE] = (seen.x0 if state.x0 is None else state.x0)[:, None]
        if "text" in self.inputs:
            tensors["words"] = torch.stack([words_of(p, self.network.settings.words) for p in prompts])
        out = self.network(tensors, state.memory)
        judged = self._judged(out, tensors["log_snr"], state.z)
        now = State(seen.indices, out.z[:, -1], out.memory, seen.x0)
        return Judged(*(None if v is None else v[:, 0] for v in vars(judged).values())), now  # type: ignore[arg-type]

    @torch.no_grad()
    def judge_batch(self, batch: Batch) -> Judged:
        """Whole trajectories of a store, [b, k, ...]; rows that are not `there` mean nothing."""
        tensors = self.inputs_of(batch)
        return self._judged(self.network(tensors), tensors["log_snr"].float(), None)

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the network sees of whole trajectories."""
        tensors = dict(batch.tensors)
        if "change" in self.inputs:
            tensors[BEFORE] = torch.cat([tensors["x0"][:, :1], tensors["x0"][:, :-1]], 1)
        if "text" in self.inputs:
            tensors["words"] = torch.stack([words_of(r.prompt, self.network.settings.words) for r in batch.records])
        return tensors

    def _judged(self, out: Outputs, log_snr: Tensor, before: Tensor | None) -> Judged:
        levels = at_least(out.severity)
        leave, hazard = self.exits(out.z, log_snr, before)
        return Judged(
            self.calibration(raw_bad(out.severity), log_snr).sigmoid(), levels.sum(-1), out.rank, out.types.sigmoid(),
            leave.sigmoid(), hazard.sigmoid(), out.z, None if out.heatmap is None else out.heatmap.sigmoid(),
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------- files

    def check(self, model: Model) -> None:
        """UserError if it was trained on another kind of model; a DodgeburnWarning if on other weights."""
        space = space_of(model)
        if space != self.space:
            raise UserError(
                f"the estimator was trained on {_named(self.space)}, {model.name} is {_named(space)}: train one for it "
                "with `dodgeburn artifacts collect` and `train`"
            )
        known = self.record.get("model_sha256")
        if known and model.sha256 != known:
            warnings.warn(
                f"the estimator was trained on {self.record.get('model', 'another model')} ({known[:10]}), this is "
                f"{model.name} ({model.sha256[:10]}): it still ranks, but its probabilities may be off",
                DodgeburnWarning, stacklevel=2,
            )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write it, atomically, in fp16."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"exits.{k}": v for k, v in self.exits.state_dict().items()}
        # Means and scales of features go far beyond fp16's range on some models.
        tensors = {k: v if "_mean" in k or "_scale" in k else v.half() for k, v in tensors.items()}
        tensors |= {
            "calibration.slopes": self.calibration.slopes,
            "calibration.intercepts": self.calibration.intercepts,
        }
        about = {
            "version": VERSION, "settings": asdict(self.network.settings), "space": asdict(self.space),
            "types": list(TYPES), "bad_from": BAD_FROM, **self.record,
        }  # fmt: skip
        save_tensors(path, {k: v.contiguous() for k, v in tensors.items()}, {KEY: json.dumps(about, allow_nan=False)})

    @staticmethod
    def load(path: str | Path = PACKAGED) -> Estimator:
        """Read one. Raises UserError for a file that is no estimator, or one of another version."""
        with TensorFile(path) as file:
            text = file.header.metadata.get(KEY)
        if text is None:
            raise UserError(f"{path}: no estimator of artifacts (no {KEY} in its header): expected a file that "
                            "`dodgeburn artifacts train` wrote")  # fmt: skip
        try:
            about = json.loads(text)
            if about.pop("version") != VERSION:
                raise UserError(f"{path}: an estimator of another version: train it anew")
            about.pop("types"), about.pop("bad_from")
            given: dict[str, Any] = about.pop("settings")
            plain: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            settings = NetworkSettings(**plain)
            network = Network(Space.of(about.pop("space")), settings)
            exits = ExitHeads(settings.width)
            tensors = {k: v.float() for k, v in load_tensors(path).items()}
            for name, module in (("network.", network), ("exits.", exits)):
                module.load_state_dict({k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)})
            calibration = Calibration(tensors["calibration.slopes"], tensors["calibration.intercepts"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: the estimator in it cannot be read ({type(error).__name__})") from None
        return Estimator(network, exits, calibration, about)


def raw_bad(severity: Tensor) -> Tensor:
    """Log-odds of severity >= 3 from either head's logits."""
    p = at_least(severity)[..., math.ceil(BAD_FROM) - 1].clamp(1e-6, 1 - 1e-6)
    return torch.logit(p)


def _named(space: Space) -> str:
    return f"{space.model or 'a model'} with {space.features} features of {len(space.stages)} blocks"


def judge_all(estimator: Estimator, batches: Sequence[Batch]) -> tuple[list[dict[str, np.ndarray]], list[Any]]:
    """For each trajectory its figures by moment (bad, severity, rank, exit, hazard, log_snr, progress: float [k]), and
    the records in the same order."""
    rows, records = [], []
    for batch in batches:
        judged = estimator.judge_batch(batch)
        figures = {name: getattr(judged, name) for name in ("bad", "severity", "rank", "exit", "hazard")}
        figures |= {name: batch.tensors[name].float() for name in ("log_snr", "progress")}
        arrays = {name: value.numpy() for name, value in figures.items()}
        for i, record in enumerate(batch.records):
            n = int(batch.there[i].sum())
            rows.append({name: a[i, :n] for name, a in arrays.items()})
            records.append(record)
    return rows, records
