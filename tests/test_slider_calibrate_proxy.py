"""`slider calibrate` of any model: by CLIP, and by a user's own function; both are proxies, and the file says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import change

from dodgeburn.checkpoint.slider_card import SliderCard
from dodgeburn.cli.main import main
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.models.loading import load_model

SCORER = """
import numpy as np
def rough(pictures, prompts):
    assert set(prompts) == {''}
    return np.abs(np.diff(pictures.astype(float), axis=2)).mean((1, 2, 3))
"""
QUICK = ["--steps", "4", "--seeds", "2", "--spread-seeds", "6", "--step", "1", "--furthest", "1", "--json"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A slider of the pocket that changes evenly how much noise is taken away, and a scorer."""
    weight = load_model("pocket", "cpu").unet.conv_out.weight.detach()
    adapter = Adapter({"unet.conv_out": Factors(weight.clone(), 0.1 * torch.eye(4)[:, :, None, None], 4.0)}, "noise")
    card = SliderCard(name="crisp", positive="crisp", negative="dull", target="a person")
    save_adapter(adapter, tmp_path / "raw.safetensors", "sdxl", dtype="fp32", card=card)
    save_adapter(adapter, tmp_path / "bare.safetensors", "sdxl", dtype="fp32")
    (tmp_path / "own.py").write_text(SCORER)
    return tmp_path


def calibrate(place: Path, *more: str, name: str = "raw", out: str = "unit", model: str = "pocket") -> int:
    file, written = str(place / f"{name}.safetensors"), str(place / f"{out}.safetensors")
    return main(["slider", "calibrate", file, "--model", model, "-o", written, *QUICK, *more])


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_by_ones_own_function(place: Path, capsys) -> None:
    own = ["--score", f"{place / 'own.py'}:rough"]
    assert calibrate(place, *own) == 0
    found = last(capsys)
    assert found["by"] == "proxy: own.py:rough" and found["prompts"] == 1 and found["sigma"] > 0
    card = load_adapter(place / "unit.safetensors").origin.card
    assert card.unit == "one natural standard deviation of rough, by proxy: own.py:rough"
    assert card.attribute == "" and card.positive == "crisp" and card.sigma == pytest.approx(found["sigma"])
    # The factor is in the file. (How it is found: tests/test_calibrate.py, on edits that answer evenly.)
    raw, made = (load_adapter(place / f"{name}.safetensors") for name in ("raw", "unit"))
    module = raw.modules_changed[0]
    assert torch.allclose(change(made, module), found["factor"] * change(raw, module), rtol=1e-4)
    at = dict(found["curve"])
    assert abs(at[1.0] - at[-1.0]) / 2 == pytest.approx(1, abs=0.25)
    assert main(["inspect", str(place / "unit.safetensors")]) == 0
    assert "by proxy: own.py:rough" in capsys.readouterr().out


def test_by_clip(place: Path, capsys, monkeypatch) -> None:
    asked = set()

    class Clip:
        def __init__(self, folder, device):
            self.name = "CLIP stand-in"

        def scores(self, pictures, text):
            asked.add(text)
            return np.abs(np.diff(pictures.astype(float), axis=2)).mean((1, 2, 3)) * (
                1 if text in ("crisp", "light") else -1
            )

    monkeypatch.setattr("dodgeburn.measure.clip.ClipScore", Clip)
    assert calibrate(place, "--clip", "any") == 0
    found = last(capsys)
    assert asked == {"crisp", "dull"} and found["by"] == "proxy: CLIP stand-in"
    assert found["attribute"] == "'crisp' against 'dull'"
    asked.clear()
    said = ["--positive", "light", "--negative", "dark", "--prompt", "a doctor", "a gardener"]
    assert calibrate(place, "--clip", "any", *said, name="bare", out="bare-unit") == 0
    found = last(capsys)
    assert asked == {"light", "dark"} and found["prompts"] == 2
    raw, made = load_adapter(place / "bare.safetensors"), load_adapter(place / "bare-unit.safetensors")
    name = raw.modules_changed[0]
    assert torch.equal(made.down(name), raw.down(name)) and made.origin.card.sigma == pytest.approx(found["sigma"])
    for name, more, said in (("bare", [], "--prompt TEXT"), ("bare", ["--prompt", "x"], "--positive TEXT"),
                             ("raw", ["--positive", ""], None)):  # fmt: skip
        code = calibrate(place, "--clip", "any", *more, name=name, out="third")
        assert code == (0 if said is None else 2) and (said is None or said in capsys.readouterr().err)


def test_what_contradicts_itself(place: Path, model_file: Path, capsys) -> None:
    own = f"{place / 'own.py'}:rough"
    for more, said in (
        (["--clip", "x", "--score", own], "one measure"), (["--positive", "a"], "no effect without --clip"),
        (["--prompt", "a"], "no effect without --clip or --score"),
        (["--score", own, "--attribute", "smile"], "--attribute"),
        (["--clip", str(place)], "no CLIP model's folder"), (["--score", "none.py:f"], "no such file"),
    ):  # fmt: skip
        assert calibrate(place, *more) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(err) == 1 and said in err[0], err
    assert calibrate(place, model=str(model_file)) == 2
    assert "no model of the pocket world" in capsys.readouterr().err and not (place / "unit.safetensors").exists()
    (place / "still.py").write_text("import numpy as np\ndef same(p, t): return np.zeros(len(p))\n")
    assert calibrate(place, "--score", f"{place / 'still.py'}:same") == 2
    assert "the same in all" in capsys.readouterr().err
    assert np.all([not p.name.startswith("unit") for p in place.iterdir()])
