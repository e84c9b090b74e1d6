"""The pocket's gate: held-out prompts and seeds, pictures read by the judge, one number for each promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.images import sheet
from dodgeburn.measure.fidelity import graded_spearman, marginal_tv, named_accuracy, planted_shares
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.pictures import attributes_of, draw_pictures
from dodgeburn.pocket.reader import READERS, Reader, Readings
from dodgeburn.sampling.loop import Callback, GenerateSettings, generate
from dodgeburn.training.pocket import gate_prompts
from dodgeburn.training.pocket_readers import grade, junk_unreadable
from dodgeburn.training.pocket_vae import decode, encode, to_tensor

GATE_SETTINGS = GenerateSettings(steps=20, guidance=4.0, sampler="dpmpp_2m", spacing="trailing")
GRADING_LIST = 98  # picture list for grading readers and the VAE; never trained on
FINE = ("smile", "eye_size", "brow_angle")  # small parts of a face: their RMSE may be 0.07 instead of 0.05

# What the pocket promises: (name in the result, smallest or largest value, whether larger is better)
MODEL_GATE: tuple[tuple[str, float, bool], ...] = (
    ("categorical_accuracy", 0.97, True), ("categorical_worst", 0.92, True), ("spearman_mean", 0.9, True),
    ("spearman_worst", 0.8, True), ("unreadable", 0.03, False), ("marginal_tv_worst", 0.10, False),
    ("planted_worst", 0.85, True),
)  # fmt: skip
READER_GATE: tuple[tuple[str, float, bool], ...] = (
    ("categorical_accuracy", 0.99, True), ("finger_accuracy", 0.97, True), ("rmse_worst_large", 0.05, False),
    ("rmse_worst_fine", 0.07, False), ("junk_unreadable", 0.99, True), ("roundtrip_drop", 0.015, False),
    ("agreement", 0.98, True),
)  # fmt: skip


def held(result: dict[str, Any], gate: tuple[tuple[str, float, bool], ...]) -> dict[str, bool]:
    """Which promises a result keeps. What was not measured (agreement without a model, a rank correlation of too few
    pictures) is left out."""
    return {
        name: bool(result[name] >= bound if larger else result[name] <= bound)
        for name, bound, larger in gate
        if result.get(name) is not None and math.isfinite(result[name])
    }


def pictures_of(model: Model, rows: list[dict[str, Any]], settings: GenerateSettings, callback: Callback | None
                ) -> np.ndarray:  # fmt: skip
    """Pictures of prompt rows: uint8 [n, h, w, 3]."""
    made = generate(model, [r["prompt"] for r in rows], [r["seed"] for r in rows], settings, callback)
    return np.stack([np.asarray(g.image) for g in made])


def vae_error(vae: Any, pictures: np.ndarray, device: str = "cpu") -> float:
    """Mean squared error of round trips, of values in [-1, 1]."""
    back = decode(vae, encode(vae, pictures, device), device)
    return float(((to_tensor(back) - to_tensor(pictures)) ** 2).mean())


def measure(rows: list[dict[str, Any]], readings: Readings) -> dict[str, Any]:
    """The gate's figures from readings of pictures of prompt rows."""
    asked = [parse(r["prompt"]) for r in rows]
    accuracy, spearman = named_accuracy(asked, readings), graded_spearman(asked, readings)
    marginals, planted = marginal_tv(asked, readings), planted_shares(asked, readings)
    fingers = marginals.pop("fingers", (float("nan"), 0))
    named = sum(n for _, n in accuracy.values())
    hands = readings.values["fingers"][~readings.unreadable]
    hands = hands[hands > 0]
    return {
        "categorical_accuracy": sum(a * n for a, n in accuracy.values()) / named,
        "categorical_worst": min(a for a, _ in accuracy.values()),
        "spearman_mean": float(np.mean([r for r, _ in spearman.values()])),
        "spearman_worst": min(r for r, _ in spearman.values()),
        "unreadable": float(readings.unreadable.mean()),
        "marginal_tv_worst": max(v for v, _ in marginals.values()),
        "planted_worst": min(v for v, _ in planted.values()),
        "planted_shares": {k: v for k, (v, _) in planted.items()},
        "planted_pictures": {k: n for k, (_, n) in planted.items()},
        "wrong_hands": float(np.mean(hands != 5)) if len(hands) else None,
        "fingers_tv": fingers[0],
        "categorical": {k: a for k, (a, _) in accuracy.items()},
        "spearman": {k: r for k, (r, _) in spearman.items()},
        "marginal_tv": {k: v for k, (v, _) in marginals.items()},
        "pictures": len(rows),
    }


def evaluate_model(
    model: Model, n: int | None = None, settings: GenerateSettings = GATE_SETTINGS, callback: Callback | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """The model's gate on the first n held-out prompts (all 1 024 by default), and the pictures."""
    rows = gate_prompts()[:n]
    pictures = pictures_of(model, rows, settings, callback)
    result = measure(rows, Reader.load("judge").read(pictures))
    size = pictures.shape[1]
    drawings = draw_pictures([attributes_of(i, GRADING_LIST) for i in range(500)], size)
    result["vae_mse"] = vae_error(model.vae, drawings, str(model.device))
    result["settings"] = settings.model_dump()
    result["held"] = held(result, MODEL_GATE)
    return result, pictures


def evaluate_readers(
    model: Model | None, n: int = 3000, generated: int = 256, callback: Callback | None = None
) -> dict[str, Any]:
    """Grade both readers on n fresh drawings, on their VAE round trips and on junk; compare them on generated pictures.

    The figures at the top level are the worse reader's. Without a model, round trips and agreement are left out.
    """
    attributes = [attributes_of(i, GRADING_LIST) for i in range(n)]
    drawings = draw_pictures(attributes, 64)
    trips = pictures = None
    if model is not None:
        size = model.native_size
        large = drawings if size == 64 else draw_pictures(attributes, size)
        trips = decode(model.vae, encode(model.vae, large, str(model.device)), str(model.device))
        pictures = pictures_of(model, gate_prompts()[:generated], GATE_SETTINGS, callback)
    out: dict[str, Any] = {}
    for name in READERS:
        reader = Reader.load(name)
        row = grade(reader.read(drawings), attributes)
        row["junk"] = junk_unreadable(reader, drawings[:800], GRADING_LIST)
        row["junk_unreadable"] = min(row["junk"].values())
        row["rmse_worst_fine"] = max(row["rmse"][k] for k in FINE)
        row["rmse_worst_large"] = max(v for k, v in row["rmse"].items() if k not in FINE)
        if trips is not None:
            trip = grade(reader.read(trips), attributes)
            row["roundtrip"] = trip
            drops = [row[k] - trip[k] for k in ("categorical_accuracy", "finger_accuracy")]
            row["roundtrip_drop"] = max(*drops, trip["rmse_worst"] - row["rmse_worst"])
        out[name] = row
    both = [out[name] for name in READERS]
    top: dict[str, Any] = {k: min(r[k] for r in both) for k in
                           ("categorical_accuracy", "finger_accuracy", "junk_unreadable")}  # fmt: skip
    larger = ["rmse_worst", "rmse_worst_large", "rmse_worst_fine", *(["roundtrip_drop"] if trips is not None else [])]
    top |= {k: max(r[k] for r in both) for k in larger}
    if pictures is not None:
        top |= agreement(*(Reader.load(name).read(pictures) for name in READERS))
    return {**top, "drawings": n, "held": held(top, READER_GATE), **out}


def agreement(a: Readings, b: Readings) -> dict[str, Any]:
    """How often two readers name the same categorical value in pictures that both can read, over all attributes;
    and the root mean square difference of their continuous readings."""
    both = ~a.unreadable & ~b.unreadable
    same = {k: float(np.mean(a.values[k][both] == b.values[k][both])) for k in CATEGORICAL}
    apart = {k: float(np.sqrt(np.mean((a.values[k][both] - b.values[k][both]) ** 2))) for k in CONTINUOUS}
    return {
        "agreement": float(np.mean(list(same.values()))), "agreement_by_attribute": same,
        "agreement_fingers": float(np.mean(a.values["fingers"][both] == b.values["fingers"][both])),
        "continuous_rms_difference": apart, "readable_by_both": float(both.mean()),
    }  # fmt: skip


def sheet_of(pictures: np.ndarray, columns: int = 8) -> Image.Image:
    """The first columns x columns pictures in one image, at 128 pixels each, with their prompts and seeds."""
    asked = gate_prompts()
    shown = [Image.fromarray(p) for p in pictures[: columns * columns]]
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    said = [f"{one['prompt']}, seed {one['seed']}" for one in asked[: len(shown)]]
    captions = [said[i : i + columns] for i in range(0, len(said), columns)]
    return sheet.contact_sheet(rows, cell=128, font_size=11, captions=captions)
