"""Constructive deconstruction: killed in every stage it ends the same; meters, anchors, buckets and goals by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deconstruct_tiny import SHORT, ByBrightness, short_materials, short_panel, short_run, short_spec, some
from PIL import Image
from tiny import tiny_model

from dodgeburn.checkpoint.tensorfile import load_tensors, sha256_tensors
from dodgeburn.errors import UserError
from dodgeburn.models.latents import encode_pictures
from dodgeburn.rework.bucketing import (
    KINDS,
    Mix,
    Search,
    States,
    buckets_of,
    geometry,
    kind_of,
    merge_states,
    order_difference,
)
from dodgeburn.rework.deconstruct import SPEC, is_biased, read_state, write_model
from dodgeburn.rework.deconstruct_report import deconstruct_report
from dodgeburn.rework.deconstruct_spec import Retrain, load_spec, make_spec
from dodgeburn.rework.meters import HeldOutLoss, Meters, Reading
from dodgeburn.rework.nightshade import anchor_shares, export, mixed, perturbed, poisoned_pictures
from dodgeburn.rework.overtrain import in_band, overtrain, predictability, too_far
from dodgeburn.rework.retrain import _Goal, adapted, balanced, importance, typical
from dodgeburn.rework.stage_log import StageLog, unet_state
from dodgeburn.training.examples import encode_examples

NAN = math.nan
HERE = Path(__file__).parent


def reading(**numbers: Any) -> Reading:
    return replace(Reading(1.0, 0.4, 0.4, 0.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0), **numbers)


def made_meters(model: object = None) -> Meters:
    spec = short_spec()
    model = model or tiny_model()
    held = short_materials().held_out
    found = Meters(model, ByBrightness(), short_panel(spec), encode_examples(model, held), held.pixels, 8)  # type: ignore[arg-type]
    found.calibrate()
    return found


# -------------------- the whole


def _process(folder: Path, *kill: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE / "deconstruct_tiny.py"), str(folder), *kill], capture_output=True,
                          text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def test_sigkill_in_every_stage_and_again_gives_the_same_hashes(tmp_path: Path) -> None:
    for stage in ("overtrain", "nightshade", "bucket", "retrain"):
        killed = _process(tmp_path / "b", stage, "2")
        assert killed.returncode == -signal.SIGKILL, (stage, killed.stderr[-2000:])
        assert not (tmp_path / "b" / f"{stage}.json").exists()
    again, whole = _process(tmp_path / "b"), _process(tmp_path / "a")
    assert whole.returncode == again.returncode == 0, whole.stderr[-2000:] + again.stderr[-2000:]
    assert whole.stdout == again.stdout and whole.stdout.count("'") > 8
    for name in ("overtrain", "nightshade", "nightshade-first", "nightshade-base", "bucket", "retrain"):
        a, b = (sha256_tensors(tmp_path / side / f"{name}.safetensors") for side in "ab")
        assert a == b, name
    assert not (tmp_path / "b" / "working").exists()
    # every stage left its meters, and told them once
    for stage in ("overtrain", "nightshade", "bucket", "retrain"):
        rows = [json.loads(line) for line in (tmp_path / "b" / f"{stage}.jsonl").read_text().splitlines()]
        assert len({row["key"] for row in rows}) == len(rows) and any("tv" in row for row in rows), stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model()
    before = unet_state(model)
    return short_run(folder, model=model), model, before


def test_the_model_ends_as_the_last_stage_and_only_its_unet_changes(finished) -> None:  # type: ignore[no-untyped-def]
    found, model, before = finished
    last = load_tensors(found.folder / "retrain.safetensors")
    now = unet_state(model)
    assert all(torch.equal(now[k], last[k]) for k in now) and any(not torch.equal(now[k], before[k]) for k in now)
    assert found.steps == 4 + 8 + 6 and found.samples == 8 + 16 + 6 * 4
    others = tiny_model()
    for mine, theirs in ((model.vae, others.vae), *zip(model.text_encoders, others.text_encoders, strict=True)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())


def test_a_finished_run_is_only_loaded_and_another_spec_is_refused(finished) -> None:  # type: ignore[no-untyped-def]
    found, _, _ = finished

    def never(stage: str, step: int, reading: object) -> None:
        raise AssertionError("measured again")

    from dodgeburn.rework.deconstruct import deconstruct

    panel = short_panel(found.spec)
    again = deconstruct(
        tiny_model(), found.spec, found.folder, ByBrightness(), short_materials(), panel, tell=never, bias_needed=False
    )
    assert [s.sha256 for s in again.stages] == [s.sha256 for s in found.stages]
    with pytest.raises(UserError, match="other settings"):
        short_run(found.folder, short_spec(retrain={"steps": 6}))


def test_file_card_and_report_say_how_it_was_made(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from dodgeburn.checkpoint.tensorfile import read_header
    from dodgeburn.models.loading import load_model

    found, model, _ = finished
    path = tmp_path / "out.safetensors"
    write_model(model, found, path, "fp32")
    said = json.loads(read_header(path).metadata[SPEC])
    assert [s["sha256"] for s in said["stages"]] == [s.sha256 for s in found.stages]
    assert said["spec"]["overtrain"]["steps"] == 4 and "own definition" in said["what"]
    first = path.read_bytes()
    (tmp_path / "again").mkdir()
    write_model(model, found, tmp_path / "again" / "out.safetensors", "fp32")
    assert (tmp_path / "again" / "out.safetensors").read_bytes() == first
    loaded = load_model(str(path), device="cpu", dtype="fp32")
    assert all(torch.equal(v, unet_state(model)[k]) for k, v in unet_state(loaded).items())
    card = path.with_suffix(".md").read_text()
    assert "CLIP skip" in card and "negative" in card and "own" in card and "overtrain" in card
    page = deconstruct_report(found, "tiny").html()
    for text in (
        "Curves",
        "1 overtrained",
        "Merges that no other beats",
        "nightshaded",
        "not an evaluation" if False else "confirm",
    ):
        assert text in page, text
    assert page.count("<img") > 40


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    spec = short_spec()
    model = tiny_model()
    half = ByBrightness(0.0)  # everything is light: as far from the target as can be
    from dodgeburn.rework.deconstruct import deconstruct

    fair = replace(short_panel(spec), target=(0.0, 1.0))
    found = deconstruct(model, spec, tmp_path, half, short_materials(), fair)
    assert not found.biased and not found.stages and "Nothing to do" in deconstruct_report(found, "tiny").html()
    assert is_biased(reading(tv=0.5), short_panel(spec)) and not is_biased(reading(tv=0.1), short_panel(spec))


def test_a_stage_alone_takes_weights_from_files(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found, _, before = finished
    model = tiny_model()
    spec = short_spec(stages=("bucket",))
    with pytest.raises(UserError, match="nothing to merge"):
        short_run(tmp_path / "a", spec)
    given = {name: read_state(found.folder / f"{name}.safetensors", model) for name in ("overtrain", "nightshade")}
    given["nightshade-base"] = read_state(found.folder / "nightshade-base.safetensors", model)
    alone = short_run(tmp_path / "b", spec, model=model, given=given)
    assert alone.stages[0].sha256 == found.stages[2].sha256  # as in the whole run
    wrong = {k: v for k, v in before.items() if "conv_out" not in k}
    from dodgeburn.checkpoint.tensorfile import save_tensors

    save_tensors(tmp_path / "wrong.safetensors", wrong, {})
    with pytest.raises(UserError, match="does not fit"):
        read_state(tmp_path / "wrong.safetensors", model)


# -------------------- meters


def test_held_out_loss_is_fixed_and_one_for_the_untouched_model() -> None:
    meters = made_meters()
    assert meters.loss() == pytest.approx(1.0, abs=1e-12)
    with torch.no_grad():
        meters.model.unet.conv_out.bias += 0.3
    raw = meters.held_out()
    loss = HeldOutLoss(tiny_model(), encode_examples(tiny_model(), short_materials().held_out), 8)
    assert raw > loss() and meters.loss() == pytest.approx(raw / loss())
    assert sorted(int(t) // 125 for t in loss.timesteps) == list(range(8))  # one in each of the eight bins
    with torch.no_grad():
        meters.model.unet.conv_out.bias += float("nan")
    broken = meters.quick()
    assert math.isinf(broken.loss) and broken.unread == 1.0
    assert Reading.from_json(json.loads(json.dumps(broken.as_json()))).loss == math.inf


def test_readings_come_back_from_json_as_they_went() -> None:
    found = reading(frechet=NAN, tv=0.123456)
    again = Reading.from_json(json.loads(json.dumps(found.as_json())))
    assert again.tv == 0.12346 and math.isnan(again.frechet) and again.as_json() == found.as_json()


def test_quick_and_full_agree_and_repeat() -> None:
    meters = made_meters()
    quick, full, again = meters.quick(), meters.full(), meters.full()
    assert full.as_json() == again.as_json() and quick.tv == full.tv and quick.variety == pytest.approx(1.0)
    assert meters.majority(full) == max(full.shares, key=lambda v: full.shares[v])


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = StageLog(tmp_path, "overtrain")
    log.add("0:2", tv=0.5)
    with log.lines.open("a") as file:
        file.write('{"key": "0:4", "tv": 0.')
    again = StageLog(tmp_path, "overtrain")
    assert list(again.rows) == ["0:2"] and again.lines.read_text().count("\n") == 1
    again.add("0:4", tv=0.4)
    assert list(StageLog(tmp_path, "overtrain").rows) == ["0:2", "0:4"]


# -------------------- stage 1


def test_the_band_and_what_is_too_far() -> None:
    s = short_spec(overtrain={"loss_low": 1.5, "loss_high": 4.0, "unread_high": 0.8}).overtrain
    assert in_band(reading(loss=1.5), s) and in_band(reading(variety=0.5), s) and not in_band(reading(loss=1.49), s)
    assert too_far(reading(loss=4.01), s) and too_far(reading(loss=math.inf), s) and too_far(reading(unread=0.81), s)
    assert not too_far(reading(loss=4.0, unread=0.8), s)
    assert predictability([8, 8, 12], 0.25) == {"stops": [8, 8, 12], "cv": 0.2474, "predictable": True}
    assert not predictability([4, 8, 12], 0.25)["predictable"] and not predictability([4, None, 4], 0.25)["predictable"]


class Scripted:
    """Meters that read what they are told, one after another."""

    def __init__(self, meters: Meters, losses: list[float]) -> None:
        self.meters, self.losses = meters, list(losses)

    def __getattr__(self, name: str) -> object:
        return getattr(self.meters, name)

    def quick(self) -> Reading:
        return reading(loss=self.losses.pop(0))


@pytest.mark.parametrize(
    "losses,step,attempts,steps",
    [
        ([1.2, 1.6, 1.7], 6, 1, 6),  # twice running: stop
        ([1.6, 1.2, 1.6, 1.6], 8, 1, 8),  # once is not enough
        ([1.2, 1.6, 9.0], 4, 1, 6),  # too far: back to the check in the band
        ([9.0, 1.2, 1.6, 1.7], 6, 2, 8),  # too far at once: half the learning rate
        ([1.2, 1.2, 1.6, 1.2], 6, 1, 8),  # steps used up: the last one in the band
    ],
)
def test_overtraining_stops_rolls_back_and_halves(
    tmp_path: Path, losses: list[float], step: int, attempts: int, steps: int
) -> None:
    spec = short_spec(overtrain={"steps": 8, "loss_low": 1.5, "loss_high": 4.0})
    model = tiny_model()
    meters = Scripted(made_meters(model), losses)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    base = unet_state(model)
    found = overtrain(model, base, stress, meters, spec, tmp_path / "a")  # type: ignore[arg-type]
    assert (found.detail["step"], found.detail["attempts"], found.steps, found.reached) == (step, attempts, steps, True)
    assert found.detail["lr"] == pytest.approx(1e-3 / 2 ** (attempts - 1))
    # the same weights as a training of just so many steps
    lr = spec.overtrain.model_copy(update={"steps": step, "base_lr": found.detail["lr"] / 10})
    plain = tiny_model()
    overtrain(plain, base, stress, Scripted(meters.meters, [1.2] * 4), spec.model_copy(update={"overtrain": lr}),  # type: ignore[arg-type]
              tmp_path / "b")  # fmt: skip
    assert all(torch.equal(v, unet_state(plain)[k]) for k, v in unet_state(model).items())


def test_predictability_is_measured_over_seeds_and_the_first_one_stays(tmp_path: Path) -> None:
    model = tiny_model()
    meters, base = made_meters(model), unet_state(model)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    losses = [1.6, 1.6, 1.2, 1.6, 1.6, 1.6, 1.6]  # stops at steps 4, 6 and 4
    states = []
    for seeds in (3, 1):
        spec = short_spec(overtrain={"steps": 8, "loss_low": 1.5, "loss_high": 4.0, "predict": seeds})
        found = overtrain(model, base, stress, Scripted(meters, losses), spec, tmp_path / str(seeds))  # type: ignore[arg-type]
        states.append(unet_state(model))
        if seeds == 3:
            assert found.detail["stops"] == [4, 6, 4] and found.detail["predictable"] and found.detail["cv"] == 0.2474
            assert found.steps == 14 and found.detail["step"] == 4
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_overtraining_that_always_goes_too_far_is_an_error(tmp_path: Path) -> None:
    spec = short_spec(overtrain={"loss_high": 4.0, "loss_low": 1.5, "retries": 2})
    model = tiny_model()
    base = unet_state(model)
    stress = encode_examples(model, some(4, False, 1, "a doctor", True))
    with pytest.raises(UserError, match="3 times"):
        overtrain(model, base, stress, Scripted(made_meters(model), [9.0] * 3), spec, tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(v, base[k]) for k, v in unet_state(model).items())


# -------------------- stage 2


def test_anchors_are_drawn_from_what_is_lacking() -> None:
    panel = replace(short_panel(short_spec()), values=("a", "b", "c", "d"), target=(0.25,) * 4)
    shares = anchor_shares(panel, {"a": 0.7, "b": 0.25, "c": 0.05, "d": 0.0})
    assert shares == pytest.approx({"c": 0.2 / 0.45, "d": 0.25 / 0.45})
    assert anchor_shares(panel, {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}) == {}


def test_dirty_labels_are_others_pictures_under_the_concepts_name() -> None:
    materials, meters, spec = short_materials(), made_meters(), short_spec()
    dark = reading(shares={"dark": 1.0, "light": 0.0})  # type: ignore[arg-type]
    poison = poisoned_pictures(meters.model, materials, meters, dark, spec)
    assert poison.captions == [("a doctor",)] * 4 and all(p.mean() > 130 for p in poison.pixels)
    trees = {p.tobytes() for p in materials.pool.take(materials.rows(False, "light")).pixels}
    assert {p.tobytes() for p in poison.pixels} <= trees
    own = poisoned_pictures(meters.model, materials, meters, dark, short_spec(nightshade={"anchors": "concept"}))
    assert not {p.tobytes() for p in own.pixels} & trees
    both = mixed(meters.model, poison, materials.pool.take(materials.rows(False)), 0.25, 0)
    assert len(both) == 16 and sum(c == ("a doctor",) for c in both.captions) == 4


def test_perturbed_pictures_stay_within_the_budget_and_move_their_latents() -> None:
    model = tiny_model()
    clean, anchors = some(3, False, 1, "x", True).pixels, some(3, True, 2, "x", True).pixels
    near = perturbed(model, clean, anchors, 0.05, 8)
    assert near.dtype == np.uint8 and np.abs(near.astype(int) - clean.astype(int)).max() <= math.ceil(0.05 * 255)
    target, before, after = (encode_pictures(model.vae, torch.from_numpy(p)) for p in (anchors, clean, near))
    assert float((after - target).square().mean()) < 0.97 * float((before - target).square().mean())


def test_exported_poison_is_marked(tmp_path: Path) -> None:
    assert export(some(2, True, 1, "a doctor", True), tmp_path / "poison") == 2
    for path in sorted((tmp_path / "poison").glob("*.png")):
        assert Image.open(path).info["poisoned"] == "true"
    lines = [json.loads(line) for line in (tmp_path / "poison" / "metadata.jsonl").read_text().splitlines()]
    assert [line["poisoned"] for line in lines] == ["true", "true"] and lines[0]["text"] == ["a doctor"]
    with pytest.raises(UserError, match="not empty"):
        export(some(2, True, 1, "a doctor", True), tmp_path / "poison")


def test_no_run_writes_poison_unasked(finished) -> None:  # type: ignore[no-untyped-def]
    found, _, _ = finished
    written = {path.suffix for path in found.folder.rglob("*") if path.is_file() and path.parent.name != "strips"}
    assert written <= {".json", ".jsonl", ".safetensors"}


# -------------------- stage 3


def test_every_tensor_has_a_block_and_a_kind() -> None:
    for layout in ("sdxl", "sd15"):
        buckets = buckets_of(tiny_model(layout))
        blocks = {bucket.split(":")[0] for bucket in buckets.values()}
        assert {"IN00", "IN01", "M00", "OUT00", "OUT08"} <= blocks and "outside" not in blocks
        assert {bucket.split(": ")[1] for bucket in buckets.values()} == set(KINDS)
    assert kind_of("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight") == KINDS[0]
    assert kind_of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight") == KINDS[1]
    assert kind_of("mid_block.resnets.0.conv1.weight") == KINDS[2]
    assert kind_of("mid_block.resnets.0.time_emb_proj.weight") == KINDS[3]
    assert kind_of("mid_block.resnets.0.norm1.weight") == kind_of("conv_in.bias") == KINDS[4]


def corners(seed: int = 0) -> tuple[States, dict[str, str]]:
    model = tiny_model(seed=seed)
    base = unet_state(model)
    generator = torch.Generator().manual_seed(seed)
    moved = [{k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(3)]
    return States(base, *moved), buckets_of(model)


@pytest.mark.parametrize("method", ["bislerp", "slerp", "lerp", "bislerp4"])
def test_merges_at_their_ends(method: str) -> None:
    states, buckets = corners()
    assert states.overtrained and states.nightshaded and states.nightshaded_base
    nothing = merge_states(states, Mix(0.0, 0.0, {}), method, buckets)
    assert all(torch.equal(v, nothing[k]) for k, v in states.base.items())
    last, other = states.nightshaded, states.nightshaded_base
    ends = {"bislerp": (states.overtrained, other), "bislerp4": (other, last)}.get(method, (last, last))
    for v, end in zip((0.0, 1.0), ends, strict=True):
        made = merge_states(states, Mix(v, 1.0, {}), method, buckets)
        assert all(torch.allclose(x, made[k], atol=1e-6) for k, x in end.items()), (method, v)


def test_a_bucket_of_its_own_is_all_that_changes_and_negative_scales_move_away() -> None:
    states, buckets = corners()
    name = "mid_block.resnets.0.conv1.weight"
    made = merge_states(states, Mix(0.0, 0.0, {buckets[name]: -0.5}), "bislerp", buckets)
    changed = {k for k, v in made.items() if not torch.equal(v, states.base[k])}
    assert changed == {k for k, bucket in buckets.items() if bucket == buckets[name]}
    assert states.overtrained is not None
    away = states.base[name] - 0.5 * (states.overtrained[name] - states.base[name])
    assert torch.allclose(made[name], away, atol=1e-6)


def test_norms_and_biases_are_never_turned() -> None:
    states, buckets = corners()
    assert states.overtrained is not None and states.nightshaded_base is not None
    made = merge_states(states, Mix(0.3, 0.7, {}), "bislerp", buckets)
    name = "mid_block.resnets.0.norm1.weight"
    deltas = [s[name] - states.base[name] for s in (states.overtrained, states.nightshaded_base)]
    assert torch.allclose(made[name], states.base[name] + 0.7 * torch.lerp(*deltas, 0.3), atol=1e-6)


def test_the_order_of_two_axes_matters_unless_they_are_the_same() -> None:
    states, buckets = corners()
    assert 1e-4 < order_difference(states, Mix(0.3, 0.8, {}), buckets) < 0.5
    same = States(states.base, states.overtrained, states.nightshaded, states.overtrained)
    assert order_difference(same, Mix(0.4, 0.4, {}), buckets) == 0.0


def test_four_corners_with_perturbed_pictures(tmp_path: Path) -> None:
    """The variants that the plain run doesn't take."""
    spec = short_spec(
        stages=("overtrain", "nightshade", "bucket"),
        nightshade={"variant": "perturb", "perturb_steps": 2, "export": str(tmp_path / "poison"), "steps": 2},
        bucket={"method": "bislerp4", "scales": [0.5], "mixes": [0.5], "evaluations": 2}, overtrain={"steps": 2},
    )  # fmt: skip
    found = short_run(tmp_path / "run", spec)
    assert [s.stage for s in found.stages] == ["overtrain", "nightshade", "bucket"]
    assert 0 < found.stages[2].detail["order_difference"] < 1
    assert len(list((tmp_path / "poison").glob("*.png"))) == found.stages[1].detail["poisoned"] == 4
    assert "other order" in deconstruct_report(found, "tiny").html()


def test_opposite_changes_are_counted() -> None:
    states, buckets = corners()
    assert states.overtrained is not None
    back = {k: 2 * v - states.overtrained[k] for k, v in states.base.items()}
    found, opposite = geometry(States(states.base, states.overtrained, back, back), buckets)
    # float32 keeps W - d and W + d only nearly opposite; all but the smallest are within the limit
    assert opposite > 0.9 * len(states.base) and min(row["degrees"] for row in found.values()) > 179
    assert geometry(states, buckets)[1] == 0


def test_the_search_takes_the_least_bias_among_feasible_merges() -> None:
    """B is least at a mean s of 0.38 and v 1, which no point of the grid has; L = 1 + s^2 forbids s 1."""
    s = short_spec(bucket={"evaluations": 30, "scales": [-0.5, 0.25, 0.5, 1.0], "mixes": [0.0, 1.0]}).bucket
    looked = []

    def look(mix: Mix, key: str) -> Reading:
        looked.append(key)
        scale = np.mean([mix.scale(bucket) for bucket in ("x", "y")])
        return reading(tv_cons=abs(scale - 0.38) / 2 + 0.1 * abs(mix.v - 1), loss=1 + scale**2, fidelity=0.9)

    search = Search(look, s, reading(), {"x": 2.0, "y": 1.0, "still": 0.0})
    best = search.run()
    assert best.mix.v == 1.0 and best.rank(s, reading())[0] == 0 and best.reading.loss <= 1.25
    grid = [t for t in search.trials if not t.mix.of]
    assert len(grid) == 8 and best.reading.tv_cons < min(t.reading.tv_cons for t in grid if t.reading.loss <= 1.25)
    assert len(looked) == len(set(looked)) <= 30 and "still" not in " ".join(looked)
    front = search.pareto()
    assert best in front and all(
        not (t.reading.tv_cons <= f.reading.tv_cons and t.reading.loss < f.reading.loss)
        for f in front
        for t in search.trials
    )


def test_without_a_feasible_merge_the_least_loss_that_lowers_bias() -> None:
    s = short_spec(bucket={"evaluations": 4, "scales": [-0.5, 0.5], "mixes": [0.0, 1.0]}).bucket
    table = {(0.0, -0.5): (0.5, 1.3), (0.0, 0.5): (0.3, 1.9), (1.0, -0.5): (0.35, 1.6), (1.0, 0.5): (NAN, 9.0)}
    search = Search(
        lambda mix, key: reading(tv_cons=table[mix.v, mix.s][0], loss=table[mix.v, mix.s][1]), s, reading(), {}
    )
    best = search.run()
    assert (best.mix.v, best.mix.s) == (1.0, -0.5) and best.rank(s, reading())[0] == 1
    assert len(search.pareto()) == 3


# -------------------- stage 4


def test_importance_weights_by_hand() -> None:
    panel = short_panel(short_spec())
    weights = importance(["dark"] * 9 + ["light"] + ["strange"], panel, 10.0)
    assert weights[:9] == pytest.approx([5 / 9] * 9) and weights[9] == 5.0 and weights[10] == 0.0
    assert importance(["dark"] * 99 + ["light"], panel, 10.0)[99] == 10.0


def test_checks_move_the_weights_by_hand() -> None:
    panel = short_panel(short_spec())
    values, own = ["dark", "dark", "light", ""], torch.tensor([1.0, 1.0, 1.0, 3.0])
    s = Retrain(adapt=0.5, weight_high=10.0)
    assert adapted(own, values, panel, [], s) is own
    assert adapted(own, values, panel, [reading(shares={"dark": 0.8, "light": 0.2})], Retrain(adapt=0)) is own
    # sqrt(0.5 / 0.8) and sqrt(0.5 / 0.2): light counts twice as much as dark; 2 x 0.75 + 1.5 = 3, as before
    once = adapted(own, values, panel, [reading(shares={"dark": 0.8, "light": 0.2})], s)
    assert once.tolist() == pytest.approx([0.75, 0.75, 1.5, 3.0])
    twice = adapted(own, values, panel, [reading(shares={"dark": 0.8, "light": 0.2})] * 2, s)
    assert float(twice[2] / twice[0]) == pytest.approx(4.0)
    never = adapted(own, values, panel, [reading(shares={"dark": 1.0})] * 9, s)
    assert float(never[2] / never[0]) == pytest.approx(100.0)  # 10 against 1 / 10


def test_balanced_pictures_hold_the_shares() -> None:
    materials, spec = short_materials(), short_spec()
    made = balanced(materials, short_panel(spec), spec.retrain)
    inside = np.array([c == ("a doctor",) for c in made.captions])
    assert inside.mean() == 0.5
    light = np.array([v == "light" for v in made.columns["light"]])
    assert made.weights[inside & light].sum() == pytest.approx(made.weights[inside & ~light].sum(), rel=0.2)
    more = balanced(materials, short_panel(spec), spec.retrain.model_copy(update={"concept_share": 0.2}))
    assert np.mean([c == ("a doctor",) for c in more.captions]) == pytest.approx(0.2, abs=0.02)


def test_goal_plateau_and_quality() -> None:
    s = short_spec(retrain={"plateau": 2, "tv": 0.1, "quality": 0.1}).retrain
    goal = _Goal(s, reading(fidelity=0.98, grain=0.5, colour=1.0))
    assert goal.distance(reading(tv=0.1, loss=1.02, fidelity=0.97)) == 0
    assert goal.distance(reading(tv=0.2, loss=1.12, fidelity=0.87)) == pytest.approx(0.3)
    assert not goal.plateau([reading(tv=0.3), reading(tv=0.3)])
    assert goal.plateau([reading(tv=0.3), reading(tv=0.3), reading(tv=0.299)])
    assert not goal.plateau([reading(tv=0.3), reading(tv=0.3), reading(tv=0.2)])
    assert goal.clean(reading(grain=0.55, colour=1.09)) and not goal.clean(reading(grain=0.45, colour=1.0))
    assert not goal.clean(reading(grain=0.55, colour=1.12)) and goal.clean(reading(grain=NAN, colour=1.0))


def test_typical_pictures_leave_out_the_grainy_one() -> None:
    rng = np.random.default_rng(0)
    from dodgeburn.training.examples import Pictures

    calm = rng.integers(100, 110, (9, 32, 32, 3)).astype(np.uint8)
    wild = rng.integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    pictures = Pictures(np.concatenate([calm[:4], wild, calm[4:]]), [("x",)] * 10)
    assert 4 not in typical(pictures, 0.9) and len(typical(pictures, 0.9)) == 9


# -------------------- where pictures come from


def test_the_pocket_worlds_pictures_keep_other_ties_and_balance_this_one() -> None:
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.rework.classify import PocketClassifier
    from dodgeburn.rework.materials import gather, panel_of, pocket_checks
    from dodgeburn.training.pocket import gate_prompts

    spec = load_spec(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    small = {"each": 6, "minority": 3, "others": 60, "held_out": 8}
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=small)})
    model = load_model("pocket", device="cpu", dtype="fp32")
    classifier = PocketClassifier(Reader.load("reader"))
    made = gather(model, spec, classifier)
    assert [len(made.rows(True, v)) for v in ("glasses", "none")] == [6, 3] and len(made.rows(False)) == 60
    pool = made.pool
    assert all((o == "doctor") == bool(c) for o, c in zip(pool.columns["outfit"], pool.columns["concept"], strict=True))
    fire = [h for h, o in zip(pool.columns["hair_colour"], pool.columns["outfit"], strict=True) if o == "firefighter"]
    assert fire.count("black") > len(fire) / 2  # another tie, which nobody asked to be taken away
    held = {text for c in (*pool.captions, *made.held_out.captions) for text in c}
    assert not held & {row["prompt"] for row in gate_prompts()}
    assert not {p.tobytes() for p in pool.pixels} & {p.tobytes() for p in made.held_out.pixels}
    read = classifier.labels(pool.pixels)["glasses"]
    assert np.mean(read == np.array(pool.columns["glasses"])) > 0.9
    panel = panel_of(spec, classifier, pocket_checks(spec.concept, 5))
    assert (
        len(panel.explicit) == 4 and len(panel.others) == 5 and panel.explicit[0].prompt == "a doctor, wearing glasses"
    )
    assert all("doctor" not in check.prompt for check in panel.others)


def folder_of(root: Path, rows: list[dict[str, object]]) -> Path:
    root.mkdir()
    for i, row in enumerate(rows):
        Image.fromarray(np.full((20, 20, 3), 30 if row.get("light") == "dark" else 220, np.uint8)).save(
            root / f"{i}.png"
        )
        row["file_name"] = f"{i}.png"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_users_folder(tmp_path: Path) -> None:
    from dodgeburn.rework.materials import gather

    rows = [{"text": "a doctor", "concept": "yes", "light": v} for v in ("dark", "light") for _ in range(6)]
    rows += [{"text": "a tree", "concept": "", "light": v} for v in ("dark", "light") for _ in range(6)]
    root = folder_of(tmp_path / "good", rows)
    spec = short_spec()
    spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(root), "held_out": 8}})
    made = gather(tiny_model(), spec, ByBrightness())
    assert len(made.pool) + len(made.held_out) == 24 and len(made.held_out) == 6
    assert made.pool.pixels.shape[1:] == (16, 16, 3) and len(made.rows(True, "dark")) > 0
    for name, missing, message in (("a", "concept", "no column 'concept'"), ("b", "light", "no column 'light'")):
        bare = [{k: v for k, v in row.items() if k != missing} for row in rows]
        spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(folder_of(tmp_path / name, bare))}})
        with pytest.raises(UserError, match=message):
            gather(tiny_model(), spec, ByBrightness())
    one_sided = [row for row in rows if row["concept"] == "" or row["light"] == "dark"]
    spec = make_spec({**SHORT, "data": {"source": "folder", "folder": str(folder_of(tmp_path / "c", one_sided))}})
    with pytest.raises(UserError, match="no picture of 'a doctor' with light = light"):
        gather(tiny_model(), spec, ByBrightness())


def test_the_models_own_pictures_are_kept_if_they_show_what_was_asked() -> None:
    from dodgeburn.rework.materials import gather

    said = {**SHORT, "concept": {**SHORT["concept"], "others": ["a tree"]}}
    spec = make_spec({**said, "data": {"source": "model", "each": 2, "others": 3, "held_out": 8, "steps": 1}})

    class Alternating(ByBrightness):
        calls = 0

        def labels(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
            self.calls += 1
            return {"light": np.array(["dark", "light"] * (len(pictures) + 1))[self.calls % 2 :][: len(pictures)]}

    made = gather(tiny_model(), spec, Alternating())
    assert [len(made.rows(True, v)) for v in ("dark", "light")] == [2, 2] and len(made.rows(False)) == 3
    with pytest.raises(UserError, match="often enough"):
        gather(tiny_model(), spec, ByBrightness(0.0))  # it never draws a dark one
    with pytest.raises(UserError, match="other things"):
        gather(tiny_model(), make_spec({**SHORT, "data": {"source": "model"}}), Alternating())


# -------------------- command line


def test_bad_commands_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dodgeburn.cli.main import main

    example = str(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    out = str(tmp_path / "out")
    for args, message in (
        (["overtrian"], "did you mean overtrain"), (["run", example], "no output"),
        (["run", str(tmp_path / "none.yaml"), "-o", out], "is not there"),
        (["overtrain", example, "-o", out, "--export-poison", "x"], "no effect"),
        (["run", example, "-o", out, "--overtrained", "x"], "no effect"),
        (["run", example, "-o", out, "--begin", "x"], "for retrain alone"),
    ):  # fmt: skip
        assert main(["deconstruct", *args]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
    assert main(["deconstruct", "--help"]) == 0 and "example:" in capsys.readouterr().out


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Retraining alone, as short as can be, on the pocket."""
    from dodgeburn.cli.main import main
    from dodgeburn.models.loading import load_model

    (tmp_path / "spec.yaml").write_text(
        "concept: {prompts: [a doctor], attribute: glasses, values: {glasses: wearing glasses, none: no glasses}}\n"
        "data: {each: 4, others: 8, held_out: 8}\n"
        "watching: {pairs: 8, neutral: 8, quick: 8, each: 2, steps: 2}\n"
        "retrain: {steps: 2, every: 2, batch: 4, prior_points: 4, prior_batch: 2, polish_steps: 0}\n"
    )
    folder = tmp_path / "out"
    assert main(["deconstruct", "retrain", str(tmp_path / "spec.yaml"), "-o", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["stage"] for s in result["stages"]] == ["retrain"] and result["steps"] == 2
    assert "Constructive deconstruction" in (folder / "report.html").read_text()
    assert "CLIP skip" in (folder / "deconstructed.md").read_text()
    model = load_model(str(folder / "deconstructed.safetensors"), device="cpu")
    assert SPEC in model.metadata


# -------------------- specs


def test_the_example_reads_and_bad_specs_are_one_line(tmp_path: Path) -> None:
    spec = load_spec(HERE.parent / "examples" / "deconstruct" / "profession.yaml")
    assert spec.concept.shares == (0.5, 0.5) and spec.stages == ("overtrain", "nightshade", "bucket", "retrain")
    concept = SHORT["concept"]
    for said, message in (
        ({}, "concept is missing"), ({"concept": concept, "stagse": 1}, "stagse is not known, did you mean stages"),
        ({"concept": {**concept, "values": {"dark": "dark"}}}, "concept.values"),
        ({"concept": {**concept, "target": {"dark": 1}}}, "a share for each"),
        ({"concept": {**concept, "target": {"dark": 0.9, "light": 0.9}}}, "sums to 1.8"),
        ({"concept": {**concept, "prompts": []}}, "concept.prompts"),
        ({"concept": concept, "stages": ["retrain", "bucket"]}, "in order"),
        ({"concept": concept, "data": {"source": "folder"}}, "belong together"),
        ({"concept": concept, "overtrain": {"loss_low": 5.0}}, "not below"),
        ({"concept": concept, "bucket": {"scales": [-0.6]}}, "from -0.5 to 1"),
        ({"concept": concept, "bucket": {"method": "slerp"}}, "from 0 to 1"),
        ({"concept": concept, "nightshade": {"poison": 1.0}}, "nightshade.poison"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
            make_spec(said)
        assert "\n" not in str(caught.value)
    for text in ("", "[1]", "a: ["):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError):
            load_spec(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="is not there"):
        load_spec(tmp_path / "none.yaml")
