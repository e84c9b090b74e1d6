"""Sliders put together: the sum of their changes, exactly, and compressed by what singular values say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dodgeburn.checkpoint.slider_card import SliderCard
from dodgeburn.checkpoint.tensorfile import load_tensors, read_header, sha256_file
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.adapters import Adapter, Factors
from dodgeburn.slide.compose import compose, concatenated, recompressed
from tests.adapters import change, random_adapter
from tests.tiny import tiny_model

pytestmark = pytest.mark.adapters


def one(down: list[list[float]], up: list[list[float]], alpha: float, name: str = "m") -> Adapter:
    return Adapter({name: Factors(torch.tensor(down), torch.tensor(up), alpha)}, "one")


def test_two_rank_one_changes_by_hand() -> None:
    a, b = one([[1.0, 2.0]], [[1.0], [0.0]], 1.0), one([[0.0, 1.0]], [[1.0], [1.0]], 0.5)
    made = concatenated([a, b], [2.0, -1.0])
    assert torch.equal(change(made, "m"), torch.tensor([[2.0, 3.5], [0.0, -0.5]], dtype=torch.float64))
    assert made.alphas == {"m": 2.0} and made.down("m").shape == (2, 2)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_a_composition_is_the_sum_of_its_parts(ranks: list[int], seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts, scales = [], []
    for rank in ranks:
        alpha = data.draw(st.floats(0.1, 8))
        scales.append(data.draw(st.floats(-5, 5).filter(lambda s: abs(s) > 1e-3)))
        factors = {
            name: Factors(torch.randn(rank, *shape[1:], generator=generator),
                          torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator), alpha)
            for name, shape in (("a", (6, 5)), ("b", (4, 3, 3, 3)))
            if name == "a" or data.draw(st.booleans())
        }  # fmt: skip
        parts.append(Adapter(factors))
    made = concatenated(parts, scales)
    assert len(set(made.alphas.values())) == 1
    for module in made.modules_changed:
        terms = [s * change(p, module) for p, s in zip(parts, scales, strict=True) if module in p.alphas]
        size = sum(term.abs().max() for term in terms)
        assert (change(made, module) - sum(terms)).abs().max() <= 2e-6 * size


def test_recompression_keeps_what_singular_values_say() -> None:
    """A matrix with singular values 3, 2, 1 compressed to rank 2 keeps 13/14 of its energy and is off by the last."""
    values = torch.tensor([3.0, 2.0, 1.0])
    out_basis = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))[0]
    in_basis = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))[0]
    adapter = Adapter({"m": Factors(in_basis.T.contiguous(), out_basis * values, 3.0)})
    made, kept = recompressed(adapter, 2)
    assert kept == pytest.approx(13 / 14, abs=1e-6) and made.down("m").shape == (2, 5)
    assert torch.linalg.matrix_norm(change(adapter, "m") - change(made, "m")).item() == pytest.approx(1.0, abs=1e-5)
    whole, kept = recompressed(adapter, 9)
    assert kept == 1.0 and torch.allclose(change(whole, "m"), change(adapter, "m"), atol=1e-6)


def test_a_change_twice_over_compresses_for_nothing() -> None:
    model = tiny_model()
    adapter = random_adapter(model, rank=2)
    double = concatenated([adapter, adapter], [1.0, 0.5])
    made, kept = recompressed(double, 2)
    assert kept == pytest.approx(1.0, abs=1e-9)
    for module in adapter.modules_changed:
        assert torch.allclose(change(made, module), 1.5 * change(adapter, module), atol=1e-6), module
        assert made.down(module).shape[1:] == adapter.down(module).shape[1:]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    model = tiny_model()
    out = {}
    for seed, (name, layer_set, start) in enumerate(
        (("smile", "noxattn", 700), ("age", "xattn", 700), ("zoom", "full", 500))
    ):
        card = SliderCard(name=name, start=start, base="tiny", base_sha256="ab" * 32)
        out[name] = tmp_path / f"{name}.safetensors"
        save_adapter(random_adapter(model, seed, layer_set, rank=seed + 1), out[name], "sdxl", card=card)
    return out


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.safetensors"
    assert main(["slider", "compose", f"{files['smile']}:1.5", f"{files['age']}:-1", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parents"] == [
        {"file": "smile.safetensors", "sha256": sha256_file(files["smile"]), "scale": 1.5, "name": "smile"},
        {"file": "age.safetensors", "sha256": sha256_file(files["age"]), "scale": -1.0, "name": "age"},
    ]
    made = load_adapter(out)
    assert made.origin is not None and made.origin.card is not None
    assert made.origin.card.start == 700 and made.origin.card.base == "tiny"
    parts = [(load_adapter(files["smile"]), 1.5), (load_adapter(files["age"]), -1.0)]
    assert set(made.modules_changed) == {m for part, _ in parts for m in part.modules_changed}
    for module in made.modules_changed:
        wanted = sum(s * change(p, module) for p, s in parts if module in p.alphas)
        assert torch.allclose(change(made, module), torch.as_tensor(wanted), atol=1e-7), module
    alphas = {float(t) for key, t in load_tensors(out).items() if key.endswith(".alpha")}
    assert alphas == {3.0} and read_header(out).metadata["ss_network_dim"] == "Dynamic"


def test_rank_prints_what_is_kept(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all.safetensors"
    with pytest.warns(DodgeburnWarning, match="start at different time steps .*zoom 500"):
        made = compose([(path, 1.0) for path in files.values()], out, rank=2)
    assert made.kept is not None and 0.3 < made.kept < 1 and made.card.start is None
    assert main(["slider", "compose", *map(str, files.values()), "-o", str(out), "--rank", "2"]) == 0
    printed = capsys.readouterr()
    assert f"{made.kept:.4%} of the change's energy kept" in printed.out and "different time steps" in printed.err


def test_what_cannot_be_composed(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "sd15.safetensors"
    save_adapter(random_adapter(tiny_model("sd15")), other, "sd15")
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="smile is for SDXL and sd15 is for Stable Diffusion 1.5"):
        compose([(files["smile"], 1.0), (other, 1.0)], out)
    with pytest.raises(UserError, match="age at scale 0 has no part"):
        compose([(files["smile"], 1.0), (files["age"], 0.0)], out)
    with pytest.raises(UserError, match="rank 0"):
        compose([(files["smile"], 1.0)], out, rank=0)
    with pytest.raises(UserError, match="smile"):
        compose([(files["smile"], 1.0)], files["smile"])
    with pytest.raises(UserError, match="different models"):
        concatenated([one([[1.0]], [[1.0]], 1), one([[1.0, 2.0]], [[1.0]], 1)], [1, 1])
    assert not out.exists()


def test_the_verbs_of_slider(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slider", "--help"]) == 0
    assert "compose" in capsys.readouterr().out
    assert main(["slider", "compse"]) == 2
    assert "did you mean compose?" in capsys.readouterr().err
    assert main(["slider", "compose"]) == 2 and main(["slider", "compose", "a.safetensors"]) == 2
