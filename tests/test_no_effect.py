"""A setting that has no effect is said, never silently swallowed."""

import pytest

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.merge.run import dry_run
from dodgeburn.models.loading import _predicts_v
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
    assert _predicts_v(metadata, keys) is answer
