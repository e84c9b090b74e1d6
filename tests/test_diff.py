"""Two models compared: hand-computed changes, every odd key named, any form of model, bounded memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dodgeburn.checkpoint.side_by_side import SideBySide
from dodgeburn.checkpoint.sources import open_tensors
from dodgeburn.checkpoint.tensorfile import TensorFile, load_tensors, read_header, save_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.merge.diff import Change, diff
from dodgeburn.models.convert import convert
from dodgeburn.pocket.model import weights_path

U = "model.diffusion_model."
ONE, TWO = U + "input_blocks.0.0.weight", U + "middle_block.0.w.weight"
OUT, TIME = U + "output_blocks.0.0.w.weight", U + "time_embed.0.bias"
VAE = "first_stage_model.decoder.conv_out.bias"
Tensors = dict[str, torch.Tensor]


def tiny(**more: torch.Tensor) -> Tensors:
    """The least that is an SD1.5 checkpoint: one IN, M00, one OUT."""
    out = {
        ONE: torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        TWO: torch.tensor([1.0, 1.0]),
        OUT: torch.tensor([2.0]),
        TIME: torch.tensor([1.0, -1.0]),
        VAE: torch.tensor([0.0]),
    }
    return out | more


def write(path: Path, tensors: Tensors) -> Path:
    save_tensors(path, tensors, {})
    return path


def test_a_change_worked_out_by_hand(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", tiny())
    changed = {ONE: torch.tensor([[3.0, 4.0], [3.0, -4.0]]), OUT: torch.tensor([-2.0])}
    b = write(tmp_path / "b.safetensors", tiny(**changed))
    found = diff(a, b)
    change = found.blocks["IN00"]
    assert (change.tensors, change.changed, change.values, change.values_changed) == (1, 1, 4, 2)
    assert change.relative == 1.0  # |(0, 0, 3, -4)| / |(3, 4, 0, 0)|
    assert change.largest == 4.0 and change.cosine == pytest.approx(1 / math.sqrt(2))
    assert found.blocks["OUT00"].cosine == -1.0 and found.blocks["OUT00"].relative == 2.0
    assert found.blocks["M00"].relative == 0.0 and found.blocks["M00"].cosine == 1.0
    assert found.blocks["VAE"].cosine is None  # all zeros: no angle
    unet = found.components["unet"]
    assert (unet.tensors, unet.changed, unet.share_changed) == (4, 2, 0.5)
    assert unet.change == 25 + 16 and unet.a == 25 + 2 + 4 + 2
    assert list(found.blocks) == ["IN00", "M00", "OUT00", "BASE", "VAE"]
    assert found.most_changed(1)[0][0] == OUT and not found.equal
    assert found.layout is not None and found.layout.name == "sd15"


def test_a_change_from_zero_is_infinite_and_stays_valid_json(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", tiny())
    b = write(tmp_path / "b.safetensors", tiny(**{VAE: torch.tensor([1.0])}))
    found = diff(a, b)
    assert found.blocks["VAE"].relative == math.inf
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["blocks"]["VAE"]["relative_change"] is None


def test_integers_are_in_no_norm_of_many_tensors(tmp_path: Path) -> None:
    """77 position ids have a norm of 386, in which the change of weights would drown."""
    ids, norm = (f"cond_stage_model.transformer.text_model.{name}" for name in ("ids", "norm.bias"))
    a = tiny(**{ids: torch.arange(77), norm: torch.tensor([3.0, 4.0])})
    b = tiny(**{ids: torch.arange(77) + 1, norm: torch.tensor([3.0, 5.0])})
    found = diff(write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b))
    text = found.components["clip_l"]
    assert (text.tensors, text.changed, text.values, text.values_changed) == (2, 2, 79, 78)
    assert text.relative == pytest.approx(1 / 5) and text.cosine == pytest.approx(29 / (5 * 34**0.5))
    assert found.total.relative == pytest.approx((1 / (25 + 25 + 2 + 4 + 2)) ** 0.5)
    assert found.tensors[ids].relative > 0 and not found.equal


def test_equal_models_are_equal_whatever_their_types(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", tiny())
    b = write(tmp_path / "b.safetensors", {name: tensor.half() for name, tensor in tiny().items()})
    found = diff(a, b)
    assert found.equal and found.types == {("F32", "F16"): 5} and found.total.change == 0


def test_every_odd_key_is_named(tmp_path: Path) -> None:
    one = tiny(**{U + "extra.bias": torch.ones(1), "model_ema.decay": torch.ones(1)})
    two = tiny(**{
        ONE: torch.ones(3), TIME: torch.tensor([float("nan"), 1.0]), OUT: torch.tensor([2.0], dtype=torch.bfloat16),
        "new.weight": torch.ones(2), "model_ema.decay": torch.zeros(1),
    })  # fmt: skip
    found = diff(write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two))
    assert found.only_a == [U + "extra.bias"] and found.only_b == ["new.weight"]
    assert found.shapes == {ONE: ((2, 2), (3,))}
    assert found.not_finite == {TIME: "b.safetensors"}
    assert found.types == {("F32", "BF16"): 1}
    assert found.blocks["other"].changed == 1  # the EMA copy
    assert set(found.tensors) == {TWO, OUT, VAE, "model_ema.decay"}
    said = found.as_dict()
    assert said["shapes"] == {ONE: [[2, 2], [3]]} and said["types"] == {"F32 -> BF16": 1} and not said["equal"]


def test_integers_and_bytes_that_are_no_numbers(tmp_path: Path) -> None:
    """Position ids are compared as numbers; packed types by their bytes."""
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    a = write(tmp_path / "a.safetensors", tiny(**{ids: torch.arange(4)}))
    b = write(tmp_path / "b.safetensors", tiny(**{ids: torch.tensor([0, 1, 2, 5])}))
    assert diff(a, b).tensors[ids].largest == 2.0
    for path, byte in ((a, 1), (b, 2)):
        state = load_tensors(path) | {VAE: torch.tensor([byte], dtype=torch.uint8)}
        save_tensors(path, state, {})
        data = path.read_bytes().replace(b'"dtype":"U8"', b'"dtype":"F8_E8M0"', 1)
        pad = len(data) - len(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        path.write_bytes((size + pad).to_bytes(8, "little") + data[8:])
    assert diff(a, b).unread == {VAE: False} and diff(a, a).unread == {VAE: True}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-4, 1e3), tile=st.integers(1, 40))
def test_sums_do_not_depend_on_tiles_and_add_up(seed: int, scale: float, tile: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(33, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    whole, parts, back = Change(), Change(), Change()
    whole.add_tile(a.clone(), b.clone())
    back.add_tile(b.clone(), a.clone())
    for start in range(0, 33, tile):
        one = Change()
        one.add_tile(a[start : start + tile].clone(), b[start : start + tile].clone())
        parts.add(one)
    assert parts.relative == pytest.approx(whole.relative, rel=1e-12) and parts.values == 33
    assert parts.cosine == pytest.approx(whole.cosine, abs=1e-12) and parts.largest == whole.largest
    # The other way round: the same norm of the change, the same angle.
    assert back.change == pytest.approx(whole.change) and back.cosine == pytest.approx(whole.cosine, abs=1e-12)
    expected = torch.linalg.vector_norm(b - a) / torch.linalg.vector_norm(a)
    assert whole.relative == pytest.approx(float(expected), rel=1e-12)


def test_memory_is_bounded_by_the_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write(tmp_path / "a.safetensors", {"x": torch.arange(1000.0)})
    sizes = []
    read = TensorFile.read_into

    def spy(self: TensorFile, name: str, offset: int, buffer: memoryview) -> None:
        sizes.append(len(buffer))
        read(self, name, offset, buffer)

    monkeypatch.setattr(TensorFile, "read_into", spy)
    with open_tensors(a) as one, open_tensors(a) as two:
        tiles = [[t.clone() for t in tile] for tile in SideBySide((one, two), tile=64).tiles("x")]
    assert max(sizes) == 64 * 4 and len(tiles) == 16
    assert torch.equal(torch.cat([tile[1] for tile in tiles]), torch.arange(1000.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_every_type_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([1.5, -2.0, 0.25, 448.0]).to(dtype)
    with open_tensors(write(tmp_path / "a.safetensors", {"x": values})) as one:
        (tile,) = SideBySide((one,)).tiles("x")
    assert torch.equal(tile[0], values.to(torch.float64))


def test_a_folder_is_compared_under_single_file_names(tmp_path: Path) -> None:
    convert("pocket", tmp_path / "folder")
    found = diff(tmp_path / "folder", "pocket")
    assert found.equal and found.total.tensors == 725 and not found.types
    assert found.total.values == sum(info.numel for info in read_header(weights_path("pocket")).tensors.values())


def test_shards_and_pickles(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", tiny())
    torch.save({"state_dict": tiny(**{TWO: torch.tensor([1.0, 2.0])})}, tmp_path / "b.ckpt")
    names = list(tiny())
    weights = {}
    for i, part in enumerate((names[:2], names[2:])):
        file = f"c-{i}.safetensors"
        save_tensors(tmp_path / file, {name: tiny()[name] for name in part}, {})
        weights |= dict.fromkeys(part, file)
    (tmp_path / "c.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert diff(a, tmp_path / "b.ckpt").blocks["M00"].change == 1.0
    assert diff(a, tmp_path / "c.safetensors.index.json").equal and diff(a, tmp_path / "c.safetensors").equal


def test_files_of_another_kind_are_compared_by_component(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", {"decoder.x": torch.ones(2), "encoder.y": torch.ones(1)})
    b = write(tmp_path / "b.safetensors", {"decoder.x": torch.ones(2), "encoder.y": torch.zeros(1)})
    found = diff(a, b)
    assert not found.blocks and found.components["encoder"].changed == 1 and found.components["decoder"].changed == 0


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    sd15 = write(tmp_path / "sd15.safetensors", tiny())
    with pytest.raises(UserError, match="sd15.safetensors is Stable Diffusion 1.5 of 3 blocks, pocket is SDXL of 19"):
        diff(sd15, "pocket")
    lora = write(tmp_path / "l.safetensors", {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(1, 2),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(2, 1),
    })  # fmt: skip
    with pytest.raises(UserError, match="l.safetensors is an adapter.*dodgeburn bake"):
        diff(lora, lora)
    part = write(tmp_path / "vae.safetensors", {"decoder.x": torch.ones(2)})
    with pytest.raises(UserError, match="vae.safetensors cannot be compared with a whole checkpoint"):
        diff(sd15, part)
    other = write(tmp_path / "other.safetensors", {"x": torch.ones(2)})
    with pytest.raises(UserError, match="no tensor in common"):
        diff(part, other)
    with pytest.raises(UserError, match="pocket-stile does not exist"):
        diff("pocket-stile", "pocket")


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "pocket-style", "pocket-bold", "--json", "--top", "2"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("IN", "M00", "OUT"))] == [
        *(f"IN{i:02d}" for i in range(9)), "M00", *(f"OUT{i:02d}" for i in range(9))
    ]  # fmt: skip
    assert found["total"]["tensors"] == 725 and found["blocks"]["VAE"]["changed"] == 0 and not found["equal"]
    parts = [found["components"][name]["change_norm"] ** 2 for name in ("unet", "vae", "clip_l", "clip_g")]
    assert sum(parts) == pytest.approx(found["total"]["change_norm"] ** 2)
    assert sum(row["change_norm"] ** 2 for row in found["blocks"].values()) == pytest.approx(sum(parts))
    assert main(["diff", "pocket", "pocket"]) == 0
    assert "equal: all 725 tensors" in capsys.readouterr().out
    assert main(["diff", "pocket", "nothing-here"]) == 2
