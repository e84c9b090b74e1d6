import pytest

from dodgeburn.errors import UserError
from dodgeburn.pocket.captions import parse
from dodgeburn.slide.splits import Split, calibration_split, evaluation_split, open_prompts


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
