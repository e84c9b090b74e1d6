import json

import pytest

from dodgeburn.errors import UserError
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.attributes import CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.slide.splits import (
    CALIBRATION_ROWS,
    FIRST_EVALUATION_SEED,
    Split,
    calibration_prompts,
    calibration_rows,
    calibration_split,
    evaluation_split,
    open_prompts,
)
from dodgeburn.slide.train import QuickCalibration
from dodgeburn.training.pocket import gate_prompts


def test_open_prompts_leave_the_attribute_open() -> None:
    rows = ["a face, smiling", "a face, blue backdrop", "a face, blue backdrop", "a doctor", "a face, frowning deeply"]
    assert open_prompts(rows, ["smile"], 2) == ["a face, blue backdrop", "a doctor"]
    assert open_prompts(rows, ["background=red", "smile"], 1) == ["a doctor"]
    with pytest.raises(UserError, match="2 prompts leave smile open, 3 are asked for"):
        open_prompts(rows, ["smile"], 3)


def test_calibration_and_evaluation_share_nothing() -> None:
    targets = ["smile", "age", "hat=crown"]
    one, two = calibration_split(targets, 12, 6), evaluation_split(targets, 12, 6)
    assert len(one.prompts) == len(two.prompts) == 12 and len(one.seeds) == 6
    assert not set(one.prompts) & set(two.prompts) and not set(one.seeds) & set(two.seeds)
    for prompt in one.prompts + two.prompts:
        assert not {"smile", "age", "hat"} & set(parse(prompt))
    assert evaluation_split(targets, 3, 2) == two.first(3, 2)  # fewer are the first of more
    assert one.sha256 != two.sha256 and two.sha256 == Split(list(two.prompts), []).sha256
    with pytest.raises(UserError, match="at least 1"):
        evaluation_split(targets, 0, 2)


def test_every_graded_attribute_has_its_calibration_pictures() -> None:
    held_out = {row["prompt"] for row in gate_prompts()}
    n = QuickCalibration().pictures
    for target in CONTINUOUS:
        rows = calibration_rows(target, n, seed=3)
        assert rows == calibration_rows(target, n, seed=0)  # whatever the training
        prompts = [prompt for prompt, _ in rows]
        assert len(set(prompts)) == n and not held_out & set(prompts)
        assert not any(target in parse(prompt) for prompt in prompts)
        assert all(10_000 < seed < FIRST_EVALUATION_SEED for _, seed in rows)
    assert json.loads(CALIBRATION_ROWS.read_text())["model_sha256"] == load_model("pocket", device="cpu").sha256


def test_other_calibrations_take_pictures_as_they_come() -> None:
    for target, n in (("smile", 5), ("hat=crown", QuickCalibration().pictures)):
        rows = calibration_rows(target, n, seed=2)
        assert [prompt for prompt, _ in rows] == calibration_prompts(target, n)
        assert [seed for _, seed in rows] == [25_000 + i for i in range(n)]
