"""Slider verbs from end to end on the pocket model, with sliders made by hand: the last convolution times 1 + scale/10
changes how much noise is taken away, so the picture's sharpness, and one latent channel of it changes brightness.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodgeburn.checkpoint.slider_card import SliderCard, card_lines
from dodgeburn.cli.lists import numbers, seeds_of
from dodgeburn.cli.main import main as dodgeburn
from dodgeburn.errors import UserError
from dodgeburn.images.png import read_png
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.models.loading import load_model
from dodgeburn.slide.slider_file import open_slider

QUICK = ("--steps", "4", "--prompts", "2", "--seeds", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder, model = tmp_path_factory.mktemp("sliders"), load_model("pocket", "cpu")
    weight = model.unet.conv_out.weight.detach()
    one_channel = torch.zeros(4, 4)
    one_channel[2, 2] = 0.15
    for name, up in (("sharpness", torch.eye(4) * 0.1), ("brightness", one_channel)):
        adapter = Adapter({"unet.conv_out": Factors(weight.clone(), up[:, :, None, None], 4.0)}, name)
        card = SliderCard(name=name, attribute=name, target="a person", method="by hand")
        save_adapter(adapter, folder / f"{name}.safetensors", "sdxl", dtype="fp32", card=card)
    return folder / "sharpness.safetensors", folder / "brightness.safetensors"


@pytest.fixture(scope="module")
def calibrated(files, tmp_path_factory) -> list[Path]:
    """The first is calibrated indeed; the second's card only says so."""
    folder = tmp_path_factory.mktemp("calibrated")
    args = ["slider", "calibrate", str(files[0]), "-o", str(folder / files[0].name), *QUICK, "--furthest", "1"]
    assert dodgeburn(args) == 0
    raw = load_adapter(files[1])
    card = raw.origin.card.model_copy(update={"unit": "a guess", "safe_range": (-1.0, 1.0)})
    save_adapter(raw, folder / files[1].name, "sdxl", dtype="fp32", card=card)
    return [folder / file.name for file in files]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_calibrate_turns_a_slider_round_and_writes_its_unit(files, calibrated) -> None:
    raw, made = load_adapter(files[0]), load_adapter(calibrated[0])
    card = made.origin.card
    assert card.attribute == "sharpness" and "one natural standard deviation of sharpness" in card.unit
    assert card.sigma > 0 and card.safe_range[0] < 0 < card.safe_range[1] and card.method == "by hand"
    # More of it is *less* sharp: 1.0 is a negative raw scale, folded into up's sign and alpha.
    assert torch.equal(made.up("unet.conv_out"), -raw.up("unet.conv_out"))
    at = {scale: move for scale, move in card.curve}
    assert at[1.0] > 0.5 and at[-1.0] < -0.5 and abs(at[1.0] - at[-1.0]) / 2 == pytest.approx(1, abs=0.25)


def test_evaluate_certify_and_inspect(calibrated, tmp_path, capsys) -> None:
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(calibrated[0].read_bytes())
    assert dodgeburn(["slider", "evaluate", str(copy), *QUICK, "--scales", "5", "--certify", "--json"]) == 0
    found = last_json(capsys)
    for name in ("monotone", "spearman", "selectivity", "calibration_error", "range_sigma", "symmetry", "parse_loss"):
        assert isinstance(found[name], float), name
    assert found["selectivity_unmixed"] is None and found["pairs_kept"] is None and found["triples_kept"] is None
    assert found["spearman"] > 0.5 and found["range_sigma"] > 0.5  # a slider by hand, but a slider
    assert "sharpness" not in found["leakage"] and "glasses" in found["leakage"]
    assert found["intervals"]["monotone"][0] <= found["monotone"] <= found["intervals"]["monotone"][1]
    card = load_adapter(copy).origin.card
    assert card.certificate.reader == "judge" and card.certificate.n == 4
    assert card.certificate.monotone == found["monotone"] and card.safe_range is not None
    assert dodgeburn(["inspect", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "certificate (judge, 4 sweeps, 2 seeds)" in said and all(line in said for line in card_lines(card))


def test_a_repair_of_hands_is_counted_certified_and_inspected(files, tmp_path, capsys) -> None:
    copy = tmp_path / "fix.safetensors"
    raw = load_adapter(files[0])
    card = SliderCard(name="fix", attribute="fingers", target="a person, waving")
    save_adapter(raw, copy, "sdxl", dtype="fp32", card=card)
    assert dodgeburn(["slider", "evaluate", str(copy), *QUICK, "--scales", "0,2", "--certify", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.strip().splitlines()[-1])
    assert "waving hands with five fingers: " in said and "certified: " in said
    assert [scale for scale, _ in found["curve"]] == [0, 1, 2] and found["prompts"] == found["seeds"] == 2
    for name in ("five_fingers_before", "five_fingers_after"):
        assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1]
    assert found["off_class_effect"] > 0  # held-out prompts without a hand
    certified = load_adapter(copy).origin.card.certificate
    assert certified.five_fingers_after == found["five_fingers_after"] and certified.n == 4
    assert dodgeburn(["inspect", str(copy)]) == 0
    assert f"five fingers before {found['five_fingers_before']:.1%}" in capsys.readouterr().out
    assert dodgeburn(["slider", "evaluate", str(copy), str(files[0]), *QUICK]) == 2
    assert "fix.safetensors repairs fingers" in capsys.readouterr().err


def test_a_sliders_effect_off_its_class(files, tmp_path, capsys) -> None:
    doctors, others = tmp_path / "doctors.safetensors", tmp_path / "others.txt"
    card = SliderCard(name="sharp doctors", attribute="sharpness", target="a doctor")
    save_adapter(load_adapter(files[0]), doctors, "sdxl", dtype="fp32", card=card)
    args = [*QUICK, "--scales", "3", "--json"]
    assert dodgeburn(["slider", "evaluate", str(doctors), *args]) == 0
    found = last_json(capsys)
    # Made by hand, it looks at no prompt: it does the same to everybody.
    assert found["off_class_effect"] == pytest.approx(1, abs=0.5) and len(found["intervals"]["off_class_effect"]) == 2
    assert dodgeburn(["slider", "evaluate", str(files[0]), *args]) == 0
    assert last_json(capsys)["off_class_effect"] is None  # every picture shows a person
    others.write_text("a gardener\na firefighter\n")
    assert dodgeburn(["slider", "evaluate", str(files[0]), *args, "--off-class", str(others)]) == 0
    assert last_json(capsys)["off_class_effect"] > 0


def test_evaluate_several(calibrated, capsys) -> None:
    args = ["slider", "evaluate", *map(str, calibrated), *QUICK, "--scales", "3", "--compose-prompts", "2", "--json"]
    assert dodgeburn(args) == 0
    found = last_json(capsys)
    assert 0 <= found["pairs_kept"] <= 1 and found["triples_kept"] is None
    assert [row["attribute"] for row in found["sliders"]] == ["sharpness", "brightness"]
    assert found["spearman"] == pytest.approx(np.mean([row["spearman"] for row in found["sliders"]]), abs=1e-3)
    matrix = found["leakage_matrix"]
    assert matrix.keys() == {"sharpness", "brightness"} and matrix["sharpness"].keys() == matrix.keys()
    assert "selectivity_unmixed" in found and list(found["pairs_kept_by_combination"]) == ["sharpness + brightness"]


def test_unmix_writes_combinations(calibrated, tmp_path, capsys) -> None:
    out = tmp_path / "unmixed"
    args = ["slider", "unmix", *map(str, calibrated), "-o", str(out), *QUICK, "--no-calibrate", "--ridge", "0"]
    assert dodgeburn([*args, "--scale", "0.5", "--json"]) == 0
    found = last_json(capsys)
    weights, matrix = np.array(found["weights"]), np.array(found["matrix"])
    assert matrix.shape == (2, 2) and (np.diag(matrix) > 0.1).all()
    model = load_model("pocket", "cpu")
    parents = [open_slider(path, model) for path in calibrated]
    for k, path in enumerate(found["written"]):
        made = open_slider(path, model)
        assert made.card.method == "unmixed" and made.card.attribute == parents[k].card.attribute
        assert made.card.safe_range is None and not made.card.curve and not made.calibrated
        assert [p.scale for p in made.card.parents] == pytest.approx([w for w in weights[k] if w], abs=1e-4)
        wanted = sum(w * change(parent.adapter) for w, parent in zip(weights[k], parents, strict=True))
        assert torch.allclose(change(made.adapter), wanted, atol=1e-4)


def change(adapter: Adapter) -> torch.Tensor:
    found = adapter.factors()["unet.conv_out"]
    return found.up.flatten(1) @ found.down.flatten(1) * found.alpha / found.rank


def test_sweep_draws_strips_grids_compositions_and_animations(calibrated, tmp_path, capsys) -> None:
    one, two = map(str, calibrated)
    strip, gif = tmp_path / "strip.png", tmp_path / "strip.gif"
    args = ["slider", "sweep", one, "--steps", "4", "--scales=-0.5,0,0.5", "--seeds", "0-1", "--prompt", "a doctor"]
    assert dodgeburn([*args, "-o", str(strip), "--animate", str(gif), "--json"]) == 0
    said = last_json(capsys)
    own = read_png(strip).own
    assert own["cells"][1][2] == {"prompt": "a doctor", "seed": 1, "scales": [0.5]} and own["steps"] == 4
    assert own["values"] == said["values"] and 0 <= own["values"][0][0]["sharpness"] <= 1
    assert own["values"][0][0]["sharpness"] < own["values"][0][2]["sharpness"]
    with Image.open(gif) as image:
        assert image.n_frames == 4
    grid = tmp_path / "grid.webp"
    assert dodgeburn(["slider", "sweep", one, two, "--grid", "--steps", "2", "--scales", "0,1", "-o", str(grid)]) == 0
    assert [[c["scales"] for c in row] for row in read_png(grid).own["cells"]] == [[[0, 0], [1, 0]], [[0, 1], [1, 1]]]
    both = tmp_path / "both.png"
    args = ["slider", "sweep", f"{one}:0.5", f"{two}:-1", "--progressive", "--steps", "2", "-o", str(both)]
    assert dodgeburn(args) == 0
    assert [c["scales"] for c in read_png(both).own["cells"][0]] == [[0, 0], [0.5, 0], [0.5, -1]]


@pytest.mark.parametrize("args, said", [
    (["sweep"], "no slider"),
    (["sweep", "FILE"], "no output file"),
    (["sweep", "FILE", "-o", "x.bmp"], "ends in .png"),
    (["sweep", "FILE", "-o", "x.png", "--scales", "a,b"], "expected numbers"),
    (["sweep", "FILE", "-o", "x.png", "--seeds", "1-"], "whole numbers"),
    (["sweep", "FILE", "-o", "x.png", "--grid", "--progressive"], "choose one"),
    (["sweep", "FILE:2", "-o", "x.png"], "--progressive only"),
    (["evaluate"], "no slider"),
    (["evaluate", "FILE", "FILE"], "named twice"),
    (["evaluate", "FILE", "--scales", "4"], "odd number"),
    (["evaluate", "FILE", "--prompts", "0"], "at least 1"),
    (["evaluate", "FILE", "--attribute", "grin"], "no attribute 'grin'"),
    (["evaluate", "FILE", "--prompts", "2000"], "take fewer"),
    (["evaluate", "FILE", "--attribute", "fingers", "--scales", "5"], "a repair has no range"),
    (["evaluate", "FILE", "--off-class", "none.txt"], "cannot be read"),
    (["calibrate", "FILE", "--attribute", "fingers", "-o", "OUT.safetensors"], "right or wrong"),
    (["evaluate", "OUT.pt", "--certify"], "only these hold a card"),
    (["evaluate", "FILE", "--lpips"], "without --clip"),
    (["evaluate", "FILE", "--clip", "OUT"], "no CLIP model's folder"),
    (["evaluate", "FILE", "--clip", "OUT", "--certify"], "no certificate"),
    (["calibrate", "FILE"], "-o OUT.safetensors"),
    (["calibrate", "FILE", "-o", "FILE"], "input"),
    (["sweep", "FILE", "-o", "x.png", "--cell", "0"], "--cell 0"),
    (["evaluate", "FILE", *"--prompts 1 --seeds 1 --scales 3 --steps 1".split()], "take more prompts or seeds"),
    (["unmix", "FILE", "-o", "OUT"], "at least two"),
    (["unmix", "FILE", "FILE", "-o", "OUT"], "same name"),
    (["sweeep"], "did you mean sweep"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(files, tmp_path, capsys, monkeypatch, args, said) -> None:
    monkeypatch.chdir(tmp_path)
    before = files[0].read_bytes()
    args = [a.replace("FILE", str(files[0])).replace("OUT", str(tmp_path / "out")) for a in args]
    assert dodgeburn(["slider", *args]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1 and said in err[0], err
    assert files[0].read_bytes() == before and not list(tmp_path.glob("*.png")) and not (tmp_path / "out").exists()


def test_another_worlds_model_is_not_read(files, tmp_path, capsys) -> None:
    from tiny import tiny_model, tiny_tokenizer

    from dodgeburn.models.saving import save_single_file

    save_single_file(tiny_model(), tmp_path / "tiny.safetensors")
    tiny_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    args = ["slider", "evaluate", str(files[0]), "--model", str(tmp_path / "tiny.safetensors")]
    assert dodgeburn([*args, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "no model of the pocket world" in capsys.readouterr().err


def test_proxies_for_any_model(files, tmp_path, capsys, monkeypatch) -> None:
    class Clip:
        def __init__(self, folder, device):
            self.name = "CLIP stand-in"

        def scores(self, pictures, text):
            assert text == "crisp"
            return pictures.mean((1, 2, 3), dtype=float)

    monkeypatch.setattr("dodgeburn.measure.clip.ClipScore", Clip)
    raw, named = load_adapter(files[0]), tmp_path / "named.safetensors"
    save_adapter(raw, named, "sdxl", card=SliderCard(name="crisp", positive="crisp", target="a person"))
    args = ["slider", "evaluate", str(named), "--clip", str(tmp_path), "--steps", "2", "--seeds", "2", "--scales", "3"]
    assert dodgeburn([*args, "--json"]) == 0
    found = last_json(capsys)["proxies"][0]
    assert found["by"] == "proxy: CLIP stand-in" and found["prompts"] == 1 and found["seeds"] == 2
    assert [at["scale"] for at in found["scales"]] == [-2, 0, 2] and found["scales"][1]["clip_change"] == 0
    assert found["scales"][0]["clip_change"] != 0 and found["off_class_effect"] is None
    (tmp_path / "others.txt").write_text("a wall\n")
    assert dodgeburn([*args, "--off-class", str(tmp_path / "others.txt"), "--json"]) == 0
    assert last_json(capsys)["proxies"][0]["off_class_effect"] > 0
    assert dodgeburn(["slider", "evaluate", str(files[0]), "--clip", str(tmp_path)]) == 2
    assert "positive prompt" in capsys.readouterr().err


def test_numbers_and_seeds() -> None:
    assert numbers("-2..2/5", "scales") == [-2, -1, 0, 1, 2] and numbers("1, 2,", "scales") == [1, 2]
    assert seeds_of("3-5") == [3, 4, 5] and seeds_of("7") == [7] and seeds_of("1,4") == [1, 4]
    for wrong in ("", "..", "1..2/1", "1..2/x", "1..2/inf", "1..2/99999999999", "nan", "1e9", "1,x"):
        with pytest.raises(UserError, match="scales"):
            numbers(wrong, "scales")
    for wrong in ("5-1", "0-99999999999999999999999", "x"):
        with pytest.raises(UserError, match="seeds"):
            seeds_of(wrong)
