"""The official loop's samples, time steps and faults, counted and by hand; and the gradient as a start."""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter, attached, new_adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.predict import Predictor, alphas_cumprod
from dodgeburn.slide.gradient_start import gradient_start, mean_gradients
from dodgeburn.slide.official import GRID, OfficialSettings, _Step, grid_time, train_official
from dodgeburn.slide.spec import SliderSpec

SPEC = SliderSpec(name="warm", target="cup", positive="cup hot", negative="cup ice", neutral="mug", preserve=("red",))


class Calls:
    """What a U-Net was asked: (rows, time step) of every call."""

    def __init__(self, model: Model) -> None:
        self.seen: list[tuple[int, int]] = []
        model.unet.register_forward_hook(self._saw)

    def _saw(self, module: nn.Module, arguments: tuple[Tensor, Tensor], output: object) -> None:
        self.seen.append((len(arguments[0]), int(arguments[1].flatten()[0])))


@pytest.mark.parametrize("repaired", [False, True])
def test_samples_and_time_steps_of_a_step(repaired: bool) -> None:
    model = tiny_model()
    calls = Calls(model)
    run = train_official(model, SPEC, OfficialSettings(repaired=repaired, steps=1))
    k = len(calls.seen) - 2
    made_at = 980 - 20 * k
    told = made_at if repaired else made_at + 19  # the mismatch
    frozen, student = (3, 1) if repaired else (6, 2)
    assert calls.seen == [*((2, 980 - 20 * i) for i in range(k)), (frozen, told), (student, told)]
    assert run.forwards == sum(rows for rows, _ in calls.seen) == 2 * k + frozen + student
    assert run.steps == 1 and bool(run.adapter.up(run.adapter.modules_changed[0]).any())


def test_as_is_the_weights_are_bf16_and_repaired_they_are_not() -> None:
    def exact(adapter: Adapter) -> bool:
        return all(torch.equal(p, p.bfloat16().float()) for p in adapter.parameters())

    of = [OfficialSettings(repaired=repaired, steps=2, layers="xattn") for repaired in (False, True)]
    runs = [train_official(tiny_model(), SPEC, settings) for settings in of]
    assert exact(runs[0].adapter) and not exact(runs[1].adapter)
    assert all(p.dtype == torch.float32 for run in runs for p in run.adapter.parameters())


def test_a_budget_is_kept_and_used() -> None:
    run = train_official(tiny_model(), SPEC, OfficialSettings(repaired=True, budget=110, layers="selfattn"))
    assert 110 - 102 < run.forwards <= 110
    again = train_official(tiny_model(), SPEC, OfficialSettings(repaired=True, budget=110, layers="selfattn"))
    assert again.losses == run.losses and again.forwards == run.forwards
    with pytest.raises(UserError, match="doesn't reach one step"):
        train_official(tiny_model(), SPEC, OfficialSettings(budget=3))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_partial_denoising_is_ddim(predicts: str) -> None:
    """Against diffusers' own scheduler on the same grid."""
    from diffusers import DDIMScheduler

    model = tiny_model(prediction_type=predicts)
    predictor = Predictor(model, 16, 16)
    adapter = new_adapter(model.components(), ["unet.conv_in"], 1)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = {**model.scheduler_config, "timestep_spacing": "leading", "steps_offset": 0}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(GRID)
    with attached(model.components(), [adapter]) as attachment:
        found = _Step(model, predictor, attachment, OfficialSettings(repaired=True)).denoised(x, "cup", "", 3)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps[:3]):
            assert int(t) == grid_time(i)
            said = predictor(x.expand(2, -1, -1, -1), t.expand(2), ["", "cup"])
            x = scheduler.step(said[:1] + 3 * (said[1:] - said[:1]), t, x).prev_sample
    assert torch.allclose(found, x, atol=1e-4)


def test_the_target_is_the_shifted_neutral_prediction() -> None:
    """At the start the slider does nothing, so the loss is |eps(target) - eps(neutral) - s eta (eps+ - eps-)|^2."""
    model = tiny_model()
    predictor = Predictor(model, 16, 16)
    adapter = new_adapter(model.components(), ["unet.conv_in"], 1)
    with attached(model.components(), [adapter], trains=True) as attachment:
        step = _Step(model, predictor, attachment, OfficialSettings())
        loss = step.loss(SPEC, "red", 2, torch.Generator().manual_seed(1))
        x = step.denoised(
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "cup, red", "cup ice, red", 2
        )
    t = torch.tensor([999 - 40])
    said = [predictor(x, t, [f"{p}, red"]) for p in ("cup", "mug", "cup hot", "cup ice")]
    by_hand = (said[0] - said[1] - 4 * (said[2] - said[3])).square().mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)


# -------------------- gradient start


def quadratic() -> tuple[dict[str, nn.Module], Tensor]:
    """A linear layer and a convolution, and the change of the linear one that the loss wants."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 4, bias=False), "b": nn.Conv2d(2, 3, 3), "c": nn.Linear(2, 2)})
    for p in model.parameters():
        p.requires_grad_(False)
    return {"unet": model}, torch.randn(4, 5)


def test_the_start_is_the_leading_part_of_the_mean_gradient() -> None:
    components, wanted = quadratic()
    layer = components["unet"]["a"]  # type: ignore[index]
    wish = (layer.weight + wanted).detach()

    def loss(i: int) -> Tensor:  # gradients -2 wanted * (i + 1): the mean over two is -3 wanted
        return (layer.weight - wish).square().sum() * (i + 1)

    gradient = mean_gradients(components, ["unet.a"], loss, 2)["unet.a"]
    assert torch.allclose(gradient, -3 * wanted, atol=1e-5)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    made = gradient_start(components, ["unet.a", "unet.c"], loss, 2, rank=2, step=0.1, alpha=1.0)
    assert made.modules_changed == ["unet.a"]  # the other gets no gradient
    change = made.alphas["unet.a"] / 2 * made.up("unet.a") @ made.down("unet.a")
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    assert torch.allclose(change / change.norm(), best / best.norm(), atol=1e-4)  # downhill
    assert float((change.norm() / layer.weight.norm()).detach()) == pytest.approx(0.1, rel=1e-4)
    still = gradient_start(components, ["unet.a"], loss, 1, rank=2)
    assert not bool(still.up("unet.a").any()) and still.alphas["unet.a"] == 2
    assert torch.allclose(still.down("unet.a").norm(dim=1), torch.full((2,), (1 / 3) ** 0.5))


def test_convolutions_and_wrong_settings() -> None:
    components, _ = quadratic()
    layer = components["unet"]["b"]  # type: ignore[index]
    x = torch.randn(1, 2, 6, 6)

    def loss(i: int) -> Tensor:
        return layer(x).square().mean()

    made = gradient_start(components, ["unet.b"], loss, 1, rank=2, step=0.05)
    assert made.down("unet.b").shape == (2, 2, 3, 3) and made.up("unet.b").shape == (3, 2, 1, 1)
    before = float(loss(0).detach())
    with attached(components, [made]) as attachment:
        attachment.set(1.0)
        assert float(loss(0).detach()) < before
    for wrong in ({"rank": 0}, {"step": -1.0}, {"count": 0}):
        with pytest.raises(UserError):
            gradient_start(components, ["unet.b"], loss, **{"count": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="doesn't depend"):
        gradient_start(components, ["unet.b"], lambda i: x.sum().requires_grad_(), 1)
    with pytest.raises(UserError, match="no layer"):
        gradient_start(components, ["unet.z"], loss, 1)


def test_time_steps_of_the_grid_are_those_of_the_noise() -> None:
    assert [grid_time(k) for k in (0, 1, 49, 50)] == [980, 960, 0, 0]
    assert len(alphas_cumprod(tiny_model())) == 1000
