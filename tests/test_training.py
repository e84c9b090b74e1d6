"""The training loop resumes exactly; the pocket's stages do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from dodgeburn.errors import UserError
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.model import build, component_configs, tokenizer
from dodgeburn.pocket.pictures import attributes_of, draw_pictures
from dodgeburn.training.loop import Average, Diverged, LoopSettings, learning_rate, train
from dodgeburn.training.noise_loss import loss_weights, spread_timesteps
from dodgeburn.training.pocket_text import (
    READ_SIZES,
    captions_of,
    contrast,
    encode_text,
    reading_loss,
    reading_targets,
    tokens_of,
)
from dodgeburn.training.pocket_unet import alphas_cumprod, face_weights, train_unet
from dodgeburn.training.pocket_vae import decode, encode, normalise


def quick(**changes: object) -> LoopSettings:
    base = {"steps": 8, "lr": 1e-2, "warmup": 2, "checkpoint_every": 4, "log_every": 2, "precision": "no"}
    return LoopSettings(**{**base, **changes})  # type: ignore[arg-type]


def fit(folder: Path, settings: LoopSettings, stop_at: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def losses(batch: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        noise = 0.1 * torch.randn(len(batch), 1, generator=generator)
        return {"mse": (net(batch) - batch.sum(1, keepdim=True) - noise).square().mean()}

    def stop(step: int, _: dict[str, float]) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    train("line", {"net": net}, lambda i, g: torch.randn(16, 3, generator=g), losses, folder, settings, stop)
    return net


def test_a_run_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", quick())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", quick(), stop_at=6)
    again = fit(tmp_path / "b", quick())
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert not again.training


def rows(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["mse"]) for row in map(json.loads, (folder / "line.jsonl").read_text().splitlines())]


def test_logs_and_means_of_an_interrupted_run_are_those_of_a_whole_one(tmp_path: Path) -> None:
    fit(tmp_path / "a", quick(steps=9, log_every=4, checkpoint_every=100))
    whole = rows(tmp_path / "a")
    assert [step for step, _ in whole] == [4, 8, 9]

    # Ctrl-C between two rows
    torch.manual_seed(0)
    net, calls = nn.Linear(3, 1), []

    def losses(batch: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(len(batch), 1, generator=generator)
        return {"mse": (net(batch) - batch.sum(1, keepdim=True) - noise).square().mean()}

    settings = quick(steps=9, log_every=4, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train("line", {"net": net}, lambda i, g: torch.randn(16, 3, generator=g), losses, tmp_path / "b", settings)
    fit(tmp_path / "b", settings)
    assert rows(tmp_path / "b") == whole

    # Killed: rows behind the last checkpoint are of steps that are made again, and one was cut off.
    fit(tmp_path / "c", quick(steps=9, log_every=2, checkpoint_every=4))
    whole = rows(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "d", quick(steps=9, log_every=2, checkpoint_every=4), stop_at=6)
    with (tmp_path / "d" / "line.jsonl").open("a") as log:
        log.write('{"step": 8, "mse": 5.0}\n{"step": 9, "ms')
    fit(tmp_path / "d", quick(steps=9, log_every=2, checkpoint_every=4))
    assert rows(tmp_path / "d") == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "foo"}, "precision is 'foo'"), ({"betas": (2, 3)}, "betas"), ({"ema": 5}, "ema is 5"),
        ({"constant": 1.5}, "constant is 1.5"), ({"final": -1}, "final is -1"), ({"steps": 0}, "below 1"),
        ({"ema": 1}, "below 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        quick(**changes)


def test_the_bar_is_short_where_it_goes_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, quick(steps=40, log_every=1))
    said = capsys.readouterr().err
    assert "40/40" in said and said.count("\r") <= 3  # beginning and end, not one a step


def test_two_batches_a_step_are_one_of_twice_the_size(tmp_path: Path) -> None:
    """Batches without noise of their own: the mean gradient of two halves is that of the whole."""
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))

    def trained(size: int, accumulate: int) -> nn.Linear:
        torch.manual_seed(0)
        net = nn.Linear(3, 1)

        def losses(batch: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
            error = (net(batch) - batch.sum(1, keepdim=True)).square().mean()
            return {"mse": error, "told": error.detach() * 100}

        def batch(index: int, generator: torch.Generator) -> torch.Tensor:
            return data[index * size % 64 : index * size % 64 + size]

        folder = tmp_path / str(accumulate)
        means = train("line", {"net": net}, batch, losses, folder, quick(accumulate=accumulate))
        assert means["told"] == pytest.approx(100 * means["mse"])  # logged as it is, without a pull of its own
        return net

    whole, halves = trained(16, 1), trained(8, 2)
    assert torch.allclose(whole.weight, halves.weight, atol=1e-6)


TWO = """
import atexit, os, sys, torch
from pathlib import Path
from torch import nn
from dodgeburn.training.loop import LoopSettings, train
# Called after what training registers: a group that is still there may abort the process while Python ends.
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(3))
torch.manual_seed(0)
net, used = nn.Linear(2, 1), nn.Linear(1, 1)  # the second has no gradient in one of the processes
def losses(batch, generator):
    index, x = batch
    error = (net(x) - x.sum(1, keepdim=True)).square().mean()
    return {"mse": error + (used(x[:, :1]).square().mean() if index % 2 else 0)}
def batch(index, generator):
    return index, torch.randn(4, 2, generator=torch.Generator().manual_seed(index))
settings = LoopSettings(steps=4, lr=0.1, warmup=1, log_every=2, checkpoint_every=2, precision="no",
                        accumulate=int(sys.argv[2]))
means = train("two", {"net": net, "used": used}, batch, losses, Path(sys.argv[1]), settings)
if os.environ.get("RANK", "0") == "0":
    torch.save({**net.state_dict(), **{"used": used.weight, "mse": torch.tensor(means["mse"])}}, sys.argv[1] + ".pt")
"""


def test_two_processes_do_what_one_does_with_twice_the_batches(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    subprocess.run([sys.executable, script, one, "2"], check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(script), two, "1"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    a, b = torch.load(one + ".pt"), torch.load(two + ".pt")
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-6), key
    assert len((tmp_path / "two/two.jsonl").read_text().splitlines()) == 2  # one process writes


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, quick())
    with pytest.raises(UserError, match="other settings"):
        fit(tmp_path, quick(lr=1e-3))


@pytest.mark.parametrize("damaged", [b"PK\x03\x04 cut off", b"garbage"])
def test_a_damaged_checkpoint_is_named(damaged: bytes, tmp_path: Path) -> None:
    fit(tmp_path, quick())
    (tmp_path / "line.checkpoint.pt").write_bytes(damaged)
    with pytest.raises(UserError, match=f"line.checkpoint.pt cannot be read: take {tmp_path} away"):
        fit(tmp_path, quick())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(Diverged, match="no longer finite at step 1: train with a smaller lr than"):
        train("bad", {"net": net}, lambda i, g: None, lambda b, g: {"x": net.weight.sum() * float("nan")}, tmp_path,
              quick())  # fmt: skip


@pytest.mark.parametrize(("limit", "file"), [(20, "line.jsonl"), (2000, "line.checkpoint.pt")])
def test_a_disk_that_is_full_is_named(
    tmp_path: Path, limit: int, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"{file} cannot be written: "):
            fit(tmp_path, quick())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.pt"))


def test_the_log_has_one_row_for_each_interval(tmp_path: Path) -> None:
    fit(tmp_path, quick())
    rows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 4, 6, 8] and all(r["mse"] > 0 for r in rows)


def test_learning_rate_by_hand() -> None:
    s = LoopSettings(steps=100, warmup=10, constant=0.5, final=0.0)
    assert [learning_rate(i, s) for i in (0, 9, 10, 49, 50, 75, 100)] == [0.1, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]


def test_average_ramps_to_its_decay() -> None:
    p = nn.Parameter(torch.zeros(1))
    average = Average([p], 0.9)
    p.data.fill_(1.0)
    average.update([p], 0)  # decay (1 + 0) / (10 + 0) = 0.1
    assert torch.allclose(average.shadow[0], torch.tensor([0.9]))


def test_noise_schedule_is_diffusers() -> None:
    config = component_configs()["scheduler"]
    keep = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    oracle = DDPMScheduler(**{k: config[k] for k in keep}).alphas_cumprod
    assert torch.allclose(alphas_cumprod(config), oracle, atol=1e-5)


def test_loss_weights_by_hand() -> None:
    # alpha_bar 1/16: SNR 1/15 is below gamma, weight 1 / (1/2); 0.9: SNR 9, weight 5/9 / 0.9^(1/4)
    assert torch.allclose(loss_weights(torch.tensor([1 / 16, 0.9])), torch.tensor([2.0, 5 / 9 / 0.9**0.25]))
    assert torch.allclose(loss_weights(torch.tensor([1 / 16]), noise_power=0.5), torch.tensor([4.0]))


def test_face_weights_by_hand() -> None:
    w = face_weights(3.0)[0, 0]
    assert w.mean() == pytest.approx(1) and w[8, 8] == pytest.approx(3 * float(w[0, 0]))
    assert int((w > 1).sum()) == 72 and torch.equal(face_weights(1.0), torch.ones(1, 1, 16, 16))


def test_timesteps_are_uniform_and_spread_in_every_batch() -> None:
    batches = [spread_timesteps(1000, 64, torch.Generator().manual_seed(k)) for k in range(400)]
    t = torch.stack(batches).double()
    assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 2 and len(t.unique()) > 950
    assert all(((b[1:] - b[:-1]) - 1000 / 64).abs().max() <= 1 for b in t)


def test_contrast_is_small_for_matching_rows_only() -> None:
    x = torch.eye(6)
    scale = torch.tensor(3.0)
    assert contrast(x, x, scale) < 0.01 < 2 < contrast(x, x.roll(1, 0), scale)


def test_captions_are_repeatable_partly_empty_and_never_held_out() -> None:
    attributes = [attributes_of(i, 1) for i in range(40)]
    index = torch.arange(40)
    first, wishes = captions_of(attributes, index, torch.Generator().manual_seed(1), 0.3, frozenset())
    assert (first, wishes) == captions_of(attributes, index, torch.Generator().manual_seed(1), 0.3, frozenset())
    assert wishes == [parse(t) for t in first]
    assert 2 < sum(t == "" for t in first) < 25
    never = frozenset(t for t in first if t)
    second, _ = captions_of(attributes, index, torch.Generator().manual_seed(1), 0.3, never)
    assert not never & set(second)


def test_reading_targets_by_hand() -> None:
    asked = [{"smile": (0.2, 0.4), "hat": "cap"}, {"smile": (0.6, 1.0)}]
    blocks = dict(zip((*CONTINUOUS, *CATEGORICAL), reading_targets(asked).split(READ_SIZES, 1), strict=True))
    assert blocks["smile"].tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0]]  # "smiling" covers two levels
    assert blocks["hat"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert blocks["age"][:, -1].tolist() == [1, 1]


def test_reading_loss_is_small_for_the_right_reading_only() -> None:
    targets = reading_targets([{"hat": "cap"}, {"hat": "crown", "age": (0.0, 0.2)}])
    right = reading_loss(20 * targets, targets)
    assert right < 1e-4 < 0.5 < reading_loss(20 * targets.flip(0), targets)


@pytest.mark.parametrize("size", [64, 128])
def test_normalising_the_vae_changes_the_latents_and_not_the_pictures(size: int) -> None:
    torch.manual_seed(0)
    vae = build(component_configs(size))["vae"]
    pictures = draw_pictures([attributes_of(i, 1) for i in range(8)], size)
    before = decode(vae, encode(vae, pictures, "cpu"), "cpu")
    normalise(vae, pictures, "cpu")
    z = encode(vae, pictures, "cpu")
    assert z.shape == (8, 4, 16, 16)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert np.abs(decode(vae, z, "cpu").astype(int) - before).max() <= 1


@pytest.mark.parametrize("train_text", [True, False])
def test_the_unet_stage_trains_unet_and_text_when_asked(tmp_path: Path, train_text: bool) -> None:
    torch.manual_seed(0)
    configs = component_configs()
    configs["unet"] |= {"block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 2], "norm_num_groups": 8}
    modules = build(configs)
    before = {k: next(m.parameters()).clone() for k, m in modules.items()}
    attributes = [attributes_of(i, 1) for i in range(6)]
    train_unet("unet", modules, tokenizer(), configs["scheduler"], torch.randn(6, 4, 16, 16), attributes, 64, tmp_path,
               quick(steps=2, checkpoint_every=2), batch=2, train_text=train_text)  # fmt: skip
    for name, was in before.items():
        changed = not torch.equal(was, next(modules[name].parameters()))
        assert changed == (name == "unet" or (train_text and name != "vae")), name
    states, pooled = encode_text(modules["text_encoder"], modules["text_encoder_2"], tokens_of(tokenizer(), ["a", ""]))
    assert states.shape == (2, 77, configs["unet"]["cross_attention_dim"]) and pooled.shape == (2, 128)
