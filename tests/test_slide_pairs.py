"""Sliders from pictures: folders good and bad, targets by hand, resumed runs, counted samples, eyes on the pocket."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_model

from dodgeburn.errors import UserError
from dodgeburn.images.opening import fitted
from dodgeburn.models.latents import decode_pictures, encode_pictures
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.pocket.reader import Reader
from dodgeburn.pocket.world import render
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.edits import AdapterEdit
from dodgeburn.slide.pair_folder import read_pairs
from dodgeburn.slide.pairs import PairPoints, PairSpec, make_buckets, train_pairs


def picture(folder: Path, name: str, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    pixels = np.random.default_rng([seed, *name.encode()]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def two_folders(root: Path, names: tuple[str, ...] = ("a", "b"), size: tuple[int, int] = (32, 32)) -> Path:
    for name in names:
        for side in ("before", "after"):
            picture(root, f"{side}/{name}.png", size)
    return root


# -------------------- folders


def test_three_layouts_of_the_same_pictures(tmp_path: Path) -> None:
    low, high = (Image.open(picture(tmp_path, f"{i}.png")) for i in range(2))
    layouts = {
        "words": ("before/anna.png", "after/anna.png"),
        "scales": ("-1/anna.png", "1/anna.png"),
        "endings": ("anna_-1.png", "anna_+1.png"),
        "others": ("Low/anna.webp", "High/anna.png"),
    }
    for layout, names in layouts.items():
        for name, image in zip(names, (low, high), strict=True):
            path = tmp_path / layout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
        (tmp_path / layout / "notes.txt").write_text("captions may lie beside them")
        pairs = read_pairs(tmp_path / layout, 32 * 32, 2)
        assert [(p.name, p.magnitude) for p in pairs] == [("anna", 1.0)], layout
        assert np.array_equal(pairs[0].before, np.asarray(low)) and np.array_equal(pairs[0].after, np.asarray(high))


def test_several_magnitudes_make_a_pair_each(tmp_path: Path) -> None:
    for scale in ("-2", "-1", "1", "+2"):
        picture(tmp_path, f"{scale}/anna.png")
    assert [(p.name, p.magnitude) for p in read_pairs(tmp_path, 32 * 32, 2)] == [("anna", 1.0), ("anna", 2.0)]


def test_a_bad_folder_gets_a_list_of_all_that_is_wrong(tmp_path: Path) -> None:
    two_folders(tmp_path, ("fine",))
    picture(tmp_path, "before/alone.png")
    picture(tmp_path, "after/wide.png", (40, 32))
    picture(tmp_path, "before/wide.png")
    picture(tmp_path, "before/small.png", (8, 32))
    picture(tmp_path, "after/small.png", (8, 32))
    picture(tmp_path, "elsewhere/fine.png")
    picture(tmp_path, "before/twice.png")
    picture(tmp_path, "before/twice.jpg")
    picture(tmp_path, "after/twice.png")
    (tmp_path / "before/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    picture(tmp_path, "after/torn.png")
    (tmp_path / "after/film.mp4").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path, 32 * 32, 2)
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "before/alone.png has no counterpart at +1", "wide.png is 32x32, its counterpart 40x32", "small.png is 8x32",
        "elsewhere/ is named neither", "stand for the same picture", "before/torn.png cannot be read",
        "after/film.mp4 is no picture",
    ):  # fmt: skip
        assert part in said, part


def test_a_pair_of_the_same_picture_is_no_pair(tmp_path: Path) -> None:
    root = two_folders(tmp_path)
    (root / "after" / "a.png").write_bytes((root / "before" / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"before/a.png and its counterpart are the same picture$"):
        read_pairs(root, 64 * 64, 8)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for i in range(11):
        picture(tmp_path, f"before/{i}.png")
    (tmp_path / "after").mkdir()
    with pytest.raises(UserError, match=r"before/0.png has no counterpart at \+1; .*; and 3 more$"):
        read_pairs(tmp_path, 32 * 32, 2)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no pairs"),
        (["a.png", "b.png"], "doesn't end in its scale"),
        (["a_0.png"], "doesn't end in its scale"),
        (["a_-1.png", "b_+1.png"], "a_-1.png has no counterpart at +1"),
        (["a_-1.png", "a_+1.png", "before/a.png"], "expected one layout"),
        (["before/deep/a.png"], "lies too deep"),
    ],
)
def test_folders_without_pairs(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        picture(tmp_path, name)
    with pytest.raises(UserError, match="(?s)" + said.replace("+", r"\+")):
        read_pairs(tmp_path, 32 * 32, 2)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        read_pairs(tmp_path / "nowhere", 32 * 32, 2)


def test_turned_and_transparent_pictures(tmp_path: Path) -> None:
    for side, grey in (("before", 0), ("after", 128)):
        (tmp_path / side).mkdir()
        image = Image.new("RGBA", (48, 32), (255, 0, 0, grey))
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        image.save(tmp_path / side / "a.png", exif=exif)
    pair = read_pairs(tmp_path, 48 * 32, 2)[0]
    assert pair.before.shape == (48, 32, 3) and bool((pair.before == 255).all())


@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([2, 4, 8]), st.sampled_from([64, 512, 1024]))
@settings(max_examples=60, deadline=None)
def test_sizes_are_multiples_of_about_the_area(width: int, height: int, multiple: int, side: int) -> None:
    across, down = fitted(width, height, side * side, multiple)
    assert across % multiple == 0 and down % multiple == 0 and across > 0 and down > 0
    if max(width, height) <= 2 * min(width, height):
        assert abs(across * down / side**2 - 1) < 3 * multiple / side
        assert abs((across / down) / (width / height) - 1) < 3 * multiple / side


def test_latents_of_pictures_are_those_that_are_decoded() -> None:
    vae = load_model("pocket").vae
    drawn = np.stack([render(attributes_of(i, 5)) for i in range(2)])
    again = decode_pictures(vae, encode_pictures(vae, torch.from_numpy(drawn))).numpy()
    assert np.abs(again.astype(int) - drawn).mean() < 8


# -------------------- targets


def points_of(model: Model, root: Path, **more: Any) -> PairPoints:
    spec = PairSpec(name="x", points=6, **more)
    return PairPoints(model, make_buckets(model, read_pairs(root, model.native_size**2, model.vae_factor)), spec)


def test_both_pictures_get_the_same_noise_and_opposite_scales(tmp_path: Path) -> None:
    model = tiny_model()
    points = points_of(model, two_folders(tmp_path), objective="noise", prompt="a cup", unconditional=0.5)
    x, t, texts, scales, target = points.rows(0, list(range(40)))
    bucket, a = points.buckets[0], points.alpha_bar[t].view(-1, 1, 1, 1)
    rows = torch.arange(40) % 2
    clean = torch.cat([bucket.after[rows], bucket.before[rows]])
    assert torch.allclose(x, a.sqrt() * clean + (1 - a).sqrt() * target, atol=1e-5)
    assert torch.equal(target[:40], target[40:]) and torch.equal(t[:40], t[40:])
    assert torch.equal(scales, torch.cat([torch.ones(40), -torch.ones(40)]))
    assert texts[:40] == texts[40:] and set(texts) == {"", "a cup"}
    assert int(t.max()) <= 850 and len(set(t.tolist())) > 30
    assert torch.equal(points.rows(0, [3])[0], x[[3, 43]])  # point 3 whenever it is asked for


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_difference_is_what_the_frozen_model_says_of_the_pair(tmp_path: Path, predicts: str) -> None:
    model = tiny_model(prediction_type=predicts)
    points = points_of(model, two_folders(tmp_path), eta=1.0)
    x, t, texts, _, target = points.rows(0, [0, 1, 2])
    frozen = points.buckets[0].predictor.frozen(x, t, texts)
    a = points.alpha_bar[t].view(-1, 1, 1, 1)
    # noise from either kind of output, and noise from the target: at eta 1 that is the pair's mean for both
    noise = [o if predicts == "epsilon" else a.sqrt() * o + (1 - a).sqrt() * x for o in (frozen, target)]
    mean = (noise[0][:3] + noise[0][3:]) / 2
    assert torch.allclose(noise[1], mean.repeat(2, 1, 1, 1), atol=1e-4)
    double = points_of(model, tmp_path, eta=2.0).rows(0, [0, 1, 2])[4]  # at eta 2 each is to say what the other did
    assert torch.allclose(double[:3] - frozen[:3], 2 * (target[:3] - frozen[:3]), atol=1e-4)


# -------------------- training


def spec_of(**more: Any) -> PairSpec:
    return PairSpec(**{"name": "x", "steps": 8, "layers": "selfattn", "batch": 2, "points": 8, "rank": 2, **more})


@pytest.mark.parametrize("objective", ["difference", "noise"])
def test_samples_are_counted_and_the_loss_falls(tmp_path: Path, objective: str) -> None:
    model = tiny_model()
    calls: list[int] = []
    model.unet.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    losses: list[float] = []
    root = two_folders(tmp_path / "pictures", ("a",))
    steps = 40 if objective == "difference" else 4
    spec = spec_of(objective=objective, steps=steps, lr=0.03, unconditional=0)
    made = train_pairs(model, spec, root, tmp_path / "run", lambda step, means: losses.append(means["loss"]))
    assert made.forwards == sum(calls) == (16 if objective == "difference" else 0) + steps * 2 * 2
    assert made.pairs == 1
    if objective == "difference":
        assert losses[-1] < 0.8 * losses[0]
    assert any(bool(made.adapter.up(m).any()) for m in made.adapter.modules_changed)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    model, root = tiny_model(), two_folders(tmp_path / "pictures")
    whole = train_pairs(model, spec_of(), root, tmp_path / "whole").adapter

    def kill(step: int, means: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_pairs(model, spec_of(), root, tmp_path / "killed", kill)
    again = train_pairs(model, spec_of(), root, tmp_path / "killed").adapter
    for module in whole.modules_changed:
        assert torch.equal(whole.up(module), again.up(module)) and torch.equal(whole.down(module), again.down(module))
    picture(root, "after/a.png", seed=1)
    with pytest.raises(UserError, match="other settings"):
        train_pairs(model, spec_of(), root, tmp_path / "killed")


def test_pictures_of_several_shapes_train_together(tmp_path: Path) -> None:
    model, root = tiny_model(), two_folders(tmp_path / "pictures", ("a", "b"))
    for side in ("before", "after"):
        picture(root, f"{side}/wide.png", (64, 31))
    made = train_pairs(model, spec_of(), root, tmp_path / "run")
    assert made.pairs == 3


def test_eyes_grow_by_four_pairs_on_the_pocket(tmp_path: Path) -> None:
    for i in range(4):
        attributes = attributes_of(i, 77)
        for side, size in (("before", 0.1), ("after", 0.9)):
            (tmp_path / side).mkdir(exist_ok=True)
            Image.fromarray(render({**attributes, "eye_size": size})).save(tmp_path / side / f"{i}.png")
    model = load_model("pocket")
    spec = PairSpec(name="eyes", steps=24, batch=4, points=24, lr=4e-3)
    made = train_pairs(model, spec, tmp_path, tmp_path.parent / "run")
    assert made.forwards == 2 * 24 + 24 * 8
    edit = AdapterEdit(model, made.adapter, spec.start, GenerateSettings(steps=6))
    prompts, seeds = ["a person, black hair", "someone, wearing a cap", "a character, blue hair"] * 2, [1, 2, 3] * 2
    read = Reader.load().read(edit.pictures(prompts, seeds, [-2.0] * 3 + [2.0] * 3)).values
    moved = np.asarray(read["eye_size"])[3:] - np.asarray(read["eye_size"])[:3]
    others = [np.abs(np.asarray(read[k])[3:] - np.asarray(read[k])[:3]).mean() for k in ("age", "smile", "beard")]
    assert moved.mean() > 0.15 and moved.mean() > 2 * np.mean(others)
