"""What `bias fix` keeps between runs: whole or not at all."""

import os

import pytest
import torch

from dodgeburn.rework.bias.fix_parts import BEST, FixParts


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_best_weights_that_are_damaged_are_no_weights(left: int, tmp_path) -> None:
    module = torch.nn.Linear(8, 8)
    parts = FixParts(tmp_path)
    parts.keep_best("balanced", module)
    found = parts.best("balanced")
    assert found is not None and all(torch.equal(found[k], v) for k, v in module.state_dict().items())
    assert parts.best("self") is None
    size = (tmp_path / BEST).stat().st_size
    os.truncate(tmp_path / BEST, left % size)
    assert parts.best("balanced") is None
