"""Alignment: references that agree, runs that resume to the same bytes, what a step does, bad settings."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpo_runs import picture, points_of, quick, run, some_pairs
from tiny import tiny_model

from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.models.adapters import attached, layers_of, new_adapter
from dodgeburn.rework.dpo.file import save_aligned
from dodgeburn.rework.dpo.losses import LOSSES
from dodgeburn.rework.dpo.pairs import Preference, checked
from dodgeburn.rework.dpo.reference import Copy, Follower, Off, make_bank
from dodgeburn.rework.dpo.settings import DpoSettings, betas
from dodgeburn.rework.dpo.train import Aligned, _Watch, align

# -------------------- references


def test_a_switched_off_adapter_is_a_second_unet() -> None:
    """Also in the middle of training, when the adapter is far from zero."""
    model = tiny_model()
    points = points_of(model)
    rows = points.rows(0, range(3))
    copied = Copy(points, model).errors(rows, 0)
    components = model.components()
    adapter = new_adapter(components, [f"unet.{n}" for n in layers_of(model.unet, "full")], 2)
    for module in adapter.modules_changed:
        torch.nn.init.normal_(adapter.up(module))
    with attached(components, [adapter], trains=True) as attachment:
        attachment.set(1.0)
        off = Off(points, attachment, adapter, None)
        found = off.errors(rows, 0)
        assert torch.equal(found, copied) and not found.requires_grad
        assert float(attachment.scales) == 1.0  # on again
        on = points.buckets[0].predictor(rows.x, rows.timesteps, rows.texts)
    assert not torch.allclose(points.residuals(rows, on).square().mean(dim=(1, 2, 3)), copied, rtol=0.01)


def test_a_bank_holds_the_reference_s_errors_and_is_read_again(tmp_path: Path) -> None:
    model = tiny_model()
    points = points_of(model)
    bank = make_bank(points, 7, tmp_path, "dpo", "some settings", batch=3)
    rows = points.rows(0, [5, 2, 2])
    assert torch.allclose(bank.errors(rows, 0), Copy(points, model).errors(rows, 0), rtol=1e-5)
    assert all(0 <= i < 7 for i in bank.draw(0, 50, torch.Generator()))
    torch.nn.init.zeros_(model.unet.conv_out.weight)  # the model has moved since
    again = make_bank(points, 7, tmp_path, "dpo", "some settings")
    assert torch.equal(again.kept[0], bank.kept[0])
    other = make_bank(points, 7, tmp_path, "dpo", "other settings")
    assert not torch.allclose(other.kept[0], bank.kept[0])


def test_a_follower_moves_once_a_step() -> None:
    leader = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(leader.weight, 1.0)
    follower = Follower(leader, 0.75)

    def moved() -> float:
        return float(next(follower.net.parameters()))

    torch.nn.init.constant_(leader.weight, 5.0)
    follower.follow(leader, 0)
    assert moved() == 1.0  # before the first step there is nothing to follow
    follower.follow(leader, 1)
    follower.follow(leader, 1)  # the step was cut off and begun again
    assert moved() == 2.0
    follower.follow(leader, 2)
    assert moved() == 2.75 and not next(follower.net.parameters()).requires_grad


@pytest.mark.parametrize("rank", [2, None])
def test_references_agree_in_training(tmp_path: Path, rank: int | None) -> None:
    """A bank of the one point that is drawn, against the live reference: the first step's figures are equal."""
    kinds = ["bank", "copy", "off"] if rank else ["bank", "copy"]
    first = {}
    for kind in kinds:
        settings = quick(rank=rank, reference=kind, steps=1, bank=1, batch=1, lr=1e-3)
        first[kind] = run(tmp_path / kind, settings).history[0]
    assert all(first[kind] == first["bank"] for kind in kinds)
    assert first["bank"]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # nothing has moved yet


# -------------------- training


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "linear", "reference_decay": 0.9}, {"rank": None, "reference": "bank", "bank": 6},
        {"rank": None, "loss": "linear", "reference_decay": 0.9}, {"accumulate": 2, "flips": True, "ema": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = quick(**changes)

    def stop(step: int, means: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    files = []
    for name in ("whole", "killed"):
        model, folder = tiny_model(), tmp_path / name
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                run(folder, settings, model, callback=stop)
            model = tiny_model()
        aligned = run(folder, settings, model)
        save_aligned(model, some_pairs(), aligned, folder / "out.safetensors")
        files.append((folder / "out.safetensors").read_bytes())
        assert [row["step"] for row in aligned.history] == [2, 4]
    assert files[0] == files[1]


def test_a_lora_trains_the_same_against_itself_switched_off_and_against_a_second_unet(tmp_path: Path) -> None:
    a, b = (run(tmp_path / kind, quick(reference=kind)) for kind in ("off", "copy"))
    assert a.history == b.history and a.adapter is not None and b.adapter is not None
    for module, factors in a.adapter.factors().items():
        assert torch.equal(factors.up, b.adapter.factors()[module].up)


def test_a_run_that_is_done_is_done(tmp_path: Path) -> None:
    first, again = run(tmp_path, quick()), run(tmp_path, quick())
    assert first.history == again.history and first.forwards == again.forwards == 4 * 2 * 2 * 2
    assert first.adapter is not None and again.adapter is not None
    for module, factors in first.adapter.factors().items():
        assert torch.equal(factors.up, again.adapter.factors()[module].up)
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path, quick(lr=1e-3))


@pytest.mark.parametrize(("loss", "rank"), [*((loss, 2) for loss in LOSSES), ("sigmoid", None)])
def test_every_loss_learns_which_pictures_win(tmp_path: Path, loss: str, rank: int | None) -> None:
    """On a few pairs again and again: the model comes to explain winners better, against losers, than it did."""
    model = tiny_model("sd15")
    points = points_of(model)
    rows = points.rows(0, range(20))

    def difference() -> float:
        with torch.no_grad():
            said = points.buckets[0].predictor(rows.x, rows.timesteps, rows.texts)
        winner, loser = points.residuals(rows, said).square().mean(dim=(1, 2, 3)).chunk(2)
        return float((winner - loser).mean())

    before = difference()
    beta = {"beta": 100.0} if loss not in ("mapo", "sft") else {}
    settings = quick(loss=loss, rank=rank, batch=4, steps=5, dropout=0.0, lr=1e-2, warmup=0, **beta)
    aligned = run(tmp_path, settings, model)
    if rank is None:
        after = difference()
    else:
        assert aligned.adapter is not None and difference() == before  # the model itself is left alone
        with attached(model.components(), [aligned.adapter]) as attachment:
            attachment.set(1.0)
            after = difference()
    if loss == "sft":
        assert aligned.history[-1]["winner"] < aligned.history[0]["winner"]
    else:
        assert after < before


def test_plain_fine_tuning_asks_for_the_winners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the samples; what comes out is what came out where losers passed as well, and no loser changes a byte."""

    def tuned(name: str, losers: int = 1) -> tuple[Aligned, int]:
        model, seen = tiny_model(), []
        model.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        pairs = checked(Preference(f"a {i}", picture(2 * i), picture(2 * i + losers)) for i in range(5))
        return align(model, pairs, quick(loss="sft"), tmp_path / name, log_every=2), sum(seen)

    (alone, samples), (other, _) = tuned("alone"), tuned("other", 101)
    monkeypatch.setitem(LOSSES, "sft", replace(LOSSES["sft"], loser=True))  # type: ignore[arg-type]
    both, twice = tuned("both")
    assert (samples, twice) == (alone.forwards, both.forwards) == (4 * 2, 2 * 4 * 2)
    assert set(alone.last) == {"step", "loss", "winner"} < set(both.last)
    weights = [made.adapter.state_dict() for made in (alone, other, both) if made.adapter is not None]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    moved = max(float(w.abs().max()) for name, w in weights[0].items() if "up" in name)
    apart = max(float((w - weights[2][name]).abs().max()) for name, w in weights[0].items())
    assert apart < 1e-4 * moved  # a product of fewer rows may round otherwise


def test_weights_count(tmp_path: Path) -> None:
    """Twice the weight is twice the loss; AdamW's step is the same, so the gradient clipping is what would differ."""
    single = align(tiny_model(), some_pairs(), quick(steps=1), tmp_path / "1")
    double = align(tiny_model(), some_pairs(weight=2.0), quick(steps=1), tmp_path / "2")
    assert double.last["loss"] == pytest.approx(2 * single.last["loss"], rel=1e-6)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saved = (run(tmp_path / str(on), quick(checkpointing=on)).history for on in (False, True))
    assert plain[-1] == pytest.approx(saved[-1], rel=1e-4)


@pytest.mark.parametrize("reference", ["off", "bank", "copy"])
def test_one_by_one_with_released_encoders_changes_nothing(tmp_path: Path, reference: str) -> None:
    plain = align(tiny_model(), some_pairs(), quick(reference=reference), tmp_path / "plain")
    model, settings = tiny_model(), quick(reference=reference, one_by_one=True, checkpointing=True)
    thrifty = align(model, some_pairs(), settings, tmp_path / "thrifty", release=True)
    assert all(p.is_meta for module in (model.vae, *model.text_encoders) for p in module.parameters())
    assert thrifty.last == pytest.approx(plain.last, rel=1e-4, abs=1e-5)  # margins are small differences of fp32 errors


def told(settings: DpoSettings, *winner: float) -> list[str]:
    watch = _Watch(settings, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        for i, value in enumerate(winner):
            watch(10 * (i + 1), {"winner": value})
    return [str(warning.message) for warning in caught]


def test_the_alarm_says_what_to_do_once() -> None:
    (said,) = told(quick(), 0.01, 0.09, 0.11, 0.5)
    assert said.startswith("at step 30 the winners' error stands 11% above the reference's")
    assert "a lower --lr or a higher --beta or --safeguard" in said
    (said,) = told(quick(loss="sft"), 0.2, 0.21, 0.23)  # errors themselves
    assert "15% above where it began" in said and "--beta" not in said and "--safeguard" not in said
    assert "--safeguard" not in told(quick(safeguard=True), 0.2)[0]
    assert told(quick(), -0.5, 0.0) == [] and told(quick(loss="mapo"), 0.2, 0.1) == []


def test_alarms_are_counted_and_training_goes_on(tmp_path: Path) -> None:
    aligned = run(tmp_path, quick(rank=None, loss="linear", lr=0.02, steps=6, warmup=0), tiny_model("sd15"))
    risen = [row["winner"] > 0.1 for row in aligned.history]
    assert len(risen) == 3 and aligned.alarms == sum(risen) > 0


def test_safeguard_keeps_the_winners_error_lower(tmp_path: Path) -> None:
    """A long run that widens the margin by making both worse, and the same with the safeguard."""
    settings = {"loss": "linear", "beta": 1000.0, "layers": "full", "steps": 8, "warmup": 0, "lr": 0.1, "dropout": 0.0}
    plain = run(tmp_path / "plain", quick(**settings), tiny_model("sd15")).last
    safe = run(tmp_path / "safe", quick(**settings, safeguard=True), tiny_model("sd15")).last
    assert safe["winner"] < plain["winner"] and 0 < safe["passed"] <= 1


# -------------------- settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "sft", "safeguard": True}, "loss sft has none"), ({"slack": 0.1}, "slack is the safeguard's"),
        ({"loss": "mapo", "reference": "bank"}, "has no reference"), ({"loss": "sft", "beta": 1.0}, "has no beta"),
        ({"loss": "mapo", "reference_decay": 0.9}, "has no reference"),
        ({"rank": None, "reference": "off"}, "cannot be switched off"),
        ({"reference": "copy", "reference_decay": 0.9}, "cannot follow"),
        ({"reference": "bank", "reference_decay": 0.9}, "cannot follow"), ({"beta": 0.0}, "greater than 0"),
        ({"loss": "sft", "one_by_one": True}, "winners alone"),
        ({"rank": 0}, "greater than or equal to 1"), ({"steps": 0}, "greater than"), ({"loss": "none"}, "sigmoid"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quick(**changes)


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.unet.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="dpo: the loss is no longer finite at step 1: train with a smaller lr"):
        run(tmp_path, quick(), model)


def test_models_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts sample"):
        run(tmp_path, quick(), tiny_model(prediction_type="sample"))
    half = tiny_model()
    half.dtype = torch.float16
    with pytest.raises(UserError, match="load the model with dtype fp32"):
        run(tmp_path, quick(rank=None), half)
    with pytest.raises(UserError, match="unknown layer set"):
        run(tmp_path, quick(layers="everything"))


def test_beta_in_every_convention() -> None:
    assert DpoSettings().beta_for(16384) == 5000 and DpoSettings(beta=7.0).beta_for(16384) == 7.0
    assert DpoSettings(loss="mapo").beta_for(1024) == 0.1 and DpoSettings(loss="sft").beta_for(1024) == 0
    assert betas(312.5, 1024) == {"paper": 312.5, "diffusers": 156.25, "per_element": 312.5 / 1024, "at_sd15": 5000}
