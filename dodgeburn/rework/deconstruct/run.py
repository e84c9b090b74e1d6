"""Constructive deconstruction: audit, overtrain, nightshade, bucket, retrain; one folder, resumable at any moment.

The four stages are named by the Mobius model card in a sentence each, without numbers. What they do here is our own
exact definition ("CD v1", docs/deconstruct.md); whether it is worth its steps is measured against plain methods.

The reader (or another classifier) guides every decision; the judge sees nothing of it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dodgeburn.checkpoint.metadata import RECIPE, STALE, to_json
from dodgeburn.checkpoint.tensorfile import TensorFile, load_tensors, sha256_file, write_atomic
from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore, job_hash
from dodgeburn.measure.bias import tv_floor
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.models.saving import kept_metadata, save_single_file
from dodgeburn.rework.bias.classify import Classifier, ClipClassifier, PocketClassifier
from dodgeburn.rework.bias.concept import SHORT_EVERY
from dodgeburn.rework.deconstruct.bucketing import States, bucket
from dodgeburn.rework.deconstruct.materials import Materials, gather, panel_of
from dodgeburn.rework.deconstruct.meters import Meters, Panel, Reading
from dodgeburn.rework.deconstruct.nightshade import nightshade
from dodgeburn.rework.deconstruct.overtrain import Tell, overtrain
from dodgeburn.rework.deconstruct.retrain import retrain
from dodgeburn.rework.deconstruct.spec import DeconstructSpec
from dodgeburn.rework.deconstruct.stage_log import StageLog, StageResult, State, unet_state
from dodgeburn.training.examples import Pictures, encode_examples
from dodgeburn.training.fine_tune import digest_of

SPEC = "dodgeburn.deconstruct"  # key of the file's metadata
_EXPORT = {"nightshade": {"export": True}}  # places on a disk say nothing about the weights
_PLACES: Any = {"clip": True, **_EXPORT}


@dataclass(frozen=True)
class Deconstructed:
    """A run as it ended; the model that was given holds the last stage's U-Net."""

    folder: Path
    spec: DeconstructSpec
    panel: Panel
    before: Reading
    after: Reading
    biased: bool  # False: nothing to do, no stage took place
    stages: list[StageResult]
    left_out: tuple[str, ...] = ()  # bad lines of the user's folder

    @property
    def steps(self) -> int:
        """Gradient steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        """Pictures that these steps saw."""
        return sum(stage.samples for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.spec.name, "folder": str(self.folder), "biased": self.biased, "steps": self.steps,
            "samples": self.samples, "seconds": round(sum(s.seconds for s in self.stages), 1),
            "before": self.before.as_json(), "after": self.after.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
        }  # fmt: skip


def classifier_for(model: Model, spec: DeconstructSpec) -> Classifier:
    """What reads the pictures: the pocket's reader, or CLIP (a proxy) from the spec's folder. UserError for neither."""
    from dodgeburn.merge.compare_measure import speaks_pocket

    if spec.clip is not None:
        from dodgeburn.measure.clip import ClipScore

        name = spec.concept.attribute
        texts = {v: f"{spec.concept.prompts[0]}, {words}" for v, words in spec.concept.values.items()}
        return ClipClassifier(ClipScore(spec.clip, str(model.device)), {name: texts})
    if not speaks_pocket(model):
        raise UserError(f"{model.name} is no model of the pocket world, and nothing reads its pictures: name a CLIP "
                        "folder with `clip:`")  # fmt: skip
    from dodgeburn.pocket.reader import Reader

    return PocketClassifier(Reader.load("reader"))


def deconstruct(
    model: Model,
    spec: DeconstructSpec,
    folder: str | Path,
    classifier: Classifier | None = None,
    materials: Materials | None = None,
    panel: Panel | None = None,
    given: Mapping[str, State] | None = None,
    tell: Tell | None = None,
    start: Callable[[str], object] | None = None,
    bias_needed: bool = True,
) -> Deconstructed:
    """Run the spec's stages on a model loaded in fp32; it ends as the outcome. The same call resumes what was cut off.

    materials, panel: instead of the spec's own. given: weights of stages that don't take place, by "overtrain",
    "nightshade", "nightshade-base", "bucket". tell: told of every check, start: of every stage. bias_needed: False runs
    the stages even where the untouched model's B is no more than chance. Raises UserError for a folder of another run,
    materials that are too few, and training that diverges whatever is tried.
    """
    folder, given = Path(folder), dict(given or {})
    _check(model, spec, given)
    classifier = classifier or classifier_for(model, spec)
    materials = materials or gather(model, spec, classifier)
    panel = panel or panel_of(spec, classifier)
    base = unet_state(model)
    told = spec.model_dump(mode="json", exclude={"name": True, **_EXPORT})
    store = PartStore(folder, {
        "spec": json.loads(json.dumps(told, default=str)), "model": digest_of(model.unet), "by": classifier.name,
        "pool": _digest(materials.pool), "held_out": _digest(materials.held_out), "panel": job_hash(asdict(panel)),
        "given": {name: job_hash({k: float(v.double().sum()) for k, v in state.items()})
                  for name, state in given.items()},
    })  # fmt: skip
    meters = Meters(model, classifier, panel, encode_examples(model, materials.held_out), materials.held_out.pixels,
                    spec.watching.pairs)  # fmt: skip
    before = _audit(meters, store.folder)
    if bias_needed and not is_biased(before, panel):
        return Deconstructed(folder, spec, panel, before, before, False, [], materials.left_out)
    begin = start or (lambda stage: None)
    results: list[StageResult] = []
    held: dict[str, State] = dict(given)
    if "overtrain" in spec.stages:
        begin("overtrain")
        stress = encode_examples(model, _stress(materials, meters, before, spec))
        results.append(overtrain(model, base, stress, meters, spec, folder, tell))
        held["overtrain"] = unet_state(model)
    if "nightshade" in spec.stages:
        begin("nightshade")
        two = "bucket" in spec.stages and spec.bucket.method.startswith("bislerp") and "overtrain" in held
        starts = {"first": held.get("overtrain", base), **({"base": base} if two else {})}
        results.append(nightshade(model, starts, materials, meters, before, spec, folder, tell))
        held["nightshade"] = unet_state(model)
        if two:
            held["nightshade-base"] = load_tensors(folder / "nightshade-base.safetensors")
    if "bucket" in spec.stages:
        begin("bucket")
        states = States(base, held.get("overtrain"), held.get("nightshade"), held.get("nightshade-base"))
        results.append(bucket(model, states, meters, before, spec, folder, tell))
        held["bucket"] = unet_state(model)
    if "retrain" in spec.stages:
        begin("retrain")
        first = next((held[name] for name in ("bucket", "nightshade", "overtrain") if name in held), base)
        results.append(retrain(model, base, first, materials, meters, before, spec, folder, tell))
    after = StageLog(folder, "after").reading("full", meters.full)
    shutil.rmtree(folder / "working", ignore_errors=True)  # checkpoints of finished stages
    return Deconstructed(folder, spec, panel, before, after, True, results, materials.left_out)


def is_biased(before: Reading, panel: Panel) -> bool:
    """Whether B is above what 95 % of such samples of an unbiased model show."""
    concept = panel.concept
    if concept.watched:
        short = -(-panel.neutral // SHORT_EVERY)
        parts = [short, panel.neutral - short]
    else:
        parts = [max(1, panel.neutral // len(concept.prompts))] * len(concept.prompts)
    floors = [tv_floor(concept.target, n) for n in parts]
    weights = [n / sum(parts) for n in parts]
    mean = sum(w * floor.mean for w, floor in zip(weights, floors, strict=True))
    above = math.hypot(*(w * (floor.high - floor.mean) for w, floor in zip(weights, floors, strict=True)))
    return before.tv > mean + above


def write_model(model: Model, found: Deconstructed, path: str | Path, dtype: str = "fp16") -> dict[str, Any]:
    """Write the outcome as a single file, with its making in the metadata, and a card beside it; returns what is said.

    The same run gives the same bytes.
    """
    from dodgeburn.models.model import DTYPES
    from dodgeburn.rework.deconstruct.card import card_of

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"output {path}: models are written as .safetensors, name it so")
    said = {
        "what": "constructive deconstruction, dodgeburn's own definition v1", "parent": model.name,
        "parent_sha256": model.sha256, "spec": json.loads(found.spec.model_dump_json(exclude=_PLACES)),
        "stages": [{k: v for k, v in s.as_json().items() if k in ("stage", "decision", "reached", "steps", "sha256")}
                   for s in found.stages],
        "before": found.before.as_json(), "after": found.after.as_json(),
    }  # fmt: skip
    kept = {k: v for k, v in kept_metadata(model.metadata).items() if k not in (RECIPE, *STALE)}
    metadata = {**kept, SPEC: to_json(said), "modelspec.title": path.stem}
    save_single_file(model, path, metadata, DTYPES[dtype])
    write_atomic(path.with_suffix(".md"), card_of(found, model.name, path.name, sha256_file(path)).encode())
    return said


def read_state(path: str | Path, model: Model) -> State:
    """A U-Net's weights: a stage's own file, or any model of the same architecture."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        with TensorFile(path) as file:
            if "conv_in.weight" in file.keys():
                state = {name: file.tensor(name) for name in file.keys()}
                return _fitting(state, model, path)
    other = load_model(str(path), device="cpu", dtype="fp32")
    return _fitting(unet_state(other), model, path)


def _fitting(state: State, model: Model, path: Path) -> State:
    own = model.unet.state_dict()
    strange = [n for n in own if n not in state or state[n].shape != own[n].shape] + [n for n in state if n not in own]
    if strange:
        raise UserError(f"{path} has another architecture than {model.name}: {strange[0]} does not fit")
    return state


def _check(model: Model, spec: DeconstructSpec, given: Mapping[str, State]) -> None:
    import torch

    if model.dtype != torch.float32:
        raise UserError(f"the model is loaded in {str(model.dtype)[6:]}: deconstruction needs fp32")
    if "bucket" in spec.stages and not {"overtrain", "nightshade"} & {*spec.stages, *given}:
        raise UserError("stage bucket has nothing to merge: it needs overtrain or nightshade before it, or weights")


def _audit(meters: Meters, folder: Path) -> Reading:
    """Stage 0: the untouched model's figures, once."""
    log = StageLog(folder, "audit")
    if "base" not in log.rows:
        log.add("base", **meters.calibrate())
    else:
        meters.calibrate({k: log.rows["base"][k] for k in ("loss", "variety")})
    return log.reading("full", meters.full)


def _stress(materials: Materials, meters: Meters, before: Reading, spec: DeconstructSpec) -> Pictures:
    """The pictures that overtraining exaggerates with."""
    import numpy as np

    s = spec.overtrain
    rows = materials.rows(True, meters.majority(before)) if s.stress == "majority" else np.arange(len(materials.pool))
    if not len(rows):
        raise UserError(f"no picture of the concept shows {meters.majority(before)}, its majority: give some")
    return materials.pool.take(np.random.default_rng([s.seed, 51]).permutation(rows)[: s.pictures])


def _digest(pictures: Pictures) -> str:
    import hashlib

    told = hashlib.sha256(repr((pictures.captions, pictures.weights.tolist(), dict(pictures.columns))).encode())
    told.update(pictures.pixels.tobytes())
    return told.hexdigest()[:16]
