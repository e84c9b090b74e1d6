"""Where defects are expected, drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dodgeburn.cli.main import main
from dodgeburn.foresee.estimator import PACKAGED
from dodgeburn.foresee.maps import SHOWN, TINT, Place, overlay, sheet


def test_a_map_tints_its_places_alone() -> None:
    picture = np.full((16, 16, 3), (10, 20, 60), np.uint8)
    heat = np.zeros((4, 4))
    heat[:, 3] = 1
    found = overlay(picture, heat)
    assert (found[:, :6] == 30).all() and np.allclose(found[:, -1], TINT, atol=1)


def test_a_row_has_the_moments_nearest_to_those_shown() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    heat = np.stack([np.full((4, 4), k / 4) for k in range(5)])
    place = Place("a", picture, heat, np.array([0.1, 0.3, 0.45, 0.8, 1.0]), np.linspace(0, 1, 5))
    found = np.asarray(sheet([place, place]))
    assert len(SHOWN) == 3
    shades = [int(v) for v in np.unique(found[(found[..., 1] == 0) & (found[..., 0] > found[..., 2])][:, 0])]
    assert {64, 128, 255} <= {min((64, 128, 255), key=lambda s: abs(s - v)) for v in shades}


def test_the_command_draws_the_worst_of_the_pocket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["artifacts", "collect", str(tmp_path / "tr"), "--trajectories", "4", "--seeds-per-prompt", "1",
                 "--generators", "disturbed", "--steps", "4", "4", "--look-ahead", "0"]) == 0  # fmt: skip
    out = tmp_path / "maps.png"
    assert main(["artifacts", "score", str(tmp_path / "tr"), "--maps", str(out), "--worst", "2"]) == 0
    with Image.open(out) as image:
        assert image.size[0] > 4 * 192 and image.size[1] > 2 * 192
        assert str(PACKAGED) not in image.info["dodgeburn"] and "disturbed" in image.info["dodgeburn"]
    assert main(["artifacts", "score", str(tmp_path / "tr"), "--maps", "maps.jpg"]) == 2
    assert "ends in .png" in capsys.readouterr().err
