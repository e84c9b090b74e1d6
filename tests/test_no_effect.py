"""A setting that has no effect is said, never silently swallowed."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import CONV_IN, single_file

from dodgeburn.checkpoint.tensorfile import save_tensors
from dodgeburn.checkpoint.unet_kind import predicts_v
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.run import dry_run
from dodgeburn.models.loading import configs_of_file
from dodgeburn.sampling.loop import GenerateSettings, generate
from tests.tiny import tiny_model


def test_negative_prompt_without_guidance_is_said() -> None:
    settings = GenerateSettings(steps=1, guidance=1.0, negative="watermark")
    with pytest.warns(DodgeburnWarning, match="no effect at guidance 1"):
        generate(tiny_model("sdxl"), ["a"], [0], settings)


def test_merge_settings_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="kept from A and given a share"):
        dry_run("pocket-style", "pocket-bold", None, blocks={"VAE": 0.5}, keep=["vae"])
    with pytest.raises(UserError, match="has no effect"):
        dry_run("pocket-style", "pocket-bold", None, xl_presets="cut")


@pytest.mark.parametrize(
    ("metadata", "keys", "answer"),
    [
        ({"modelspec.prediction_type": "v"}, [], True),
        ({}, ["v_pred", "x"], True),
        ({"modelspec.prediction_type": "epsilon"}, ["x"], False),
        ({}, [], False),
    ],
)
def test_files_that_predict_velocity_say_so(metadata: dict[str, str], keys: list[str], answer: bool) -> None:
    assert predicts_v(metadata, keys) is answer


def test_the_markers_of_velocity_and_pure_noise_are_read() -> None:
    """As NoobAI's SDXL files have them, and ComfyUI reads them."""
    shapes = {key: tuple(tensor.shape) for key, tensor in single_file("sdxl").items()}
    plain = configs_of_file({}, shapes, Path("a.safetensors"))["scheduler"]
    marked = configs_of_file({}, shapes | {"v_pred": (0,), "ztsnr": (0,)}, Path("a.safetensors"))["scheduler"]
    assert plain["prediction_type"] == "epsilon" and not plain.get("rescale_betas_zero_snr")
    assert marked["prediction_type"] == "v_prediction" and marked["rescale_betas_zero_snr"] is True


def test_inspect_says_what_a_file_tells_of_its_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = single_file("sdxl") | {"v_pred": torch.tensor([])}
    tensors[CONV_IN] = torch.zeros(8, 9, 3, 3)
    save_tensors(tmp_path / "a.safetensors", tensors, {})
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "an inpainting model: its U-Net takes 9 channels\n" in said and "the U-Net predicts v_prediction\n" in said
    assert main(["inspect", "pocket"]) == 0
    assert "U-Net takes" not in (plain := capsys.readouterr().out) and "predicts" not in plain
