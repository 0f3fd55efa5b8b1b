"""What surrounds measurements and classifier guidance in a call: batches, gradients, other options, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import DPS, VPSDE, ClassifierGuidance, NonFiniteError, PiGDM, Sampler, ops
from fastsde.models import MLP, UNet

Y = torch.tensor([0.3, -0.2])


def pairs(x: Tensor) -> Tensor:
    return x[:, :2] + x[:, 1:3]


def towards_zero(x: Tensor, t: Tensor) -> Tensor:
    return -x.square().sum(dim=1)


def every(y: Tensor = Y) -> list[dict[str, Any]]:
    """The arguments of each correction, and of known values together with one."""
    mask, known = torch.tensor([True, False, False]), torch.tensor([0.4, 0.0, 0.0])
    return [
        {"measurement": DPS(pairs, y, 0.1)},
        {"measurement": PiGDM(pairs, y, 0.1)},
        {"measurement": PiGDM(pairs, y, 0.1), "mask": mask, "known": known},
    ]


def assert_near(x: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(x / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kernels", "plain PyTorch"])
def test_backends_agree(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    if plain:
        monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    torch.manual_seed(0)
    model = MLP(3)
    for call in every():
        options = {"steps": 6, "t_end": 0.05, "prediction": "v", "guidance": ClassifierGuidance(towards_zero)}
        eager = Sampler(model, (3,), **options)
        x = eager(4, seed=1, **call)
        assert eager.last_backend == "eager"
        assert_near(x, Sampler(model, (3,), backend="reference", **options)(4, seed=1, **call))
        exact = Sampler(model, (3,), backend="reference", dtype=torch.float64, **options)(4, seed=1, **call)
        assert_near(x.double(), exact)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model, y = MLP(3), torch.randn(7, 2)
    for call, last in zip(every(y), every(y[5:]), strict=True):
        whole = Sampler(model, (3,), steps=6, prediction="v")(7, **call)
        assert_near(Sampler(model, (3,), steps=6, prediction="v", max_batch=3)(7, **call), whole)
        assert_near(Sampler(model, (3,), steps=6, prediction="v")(2, first_sample=5, **last), whole[5:])
    automatic = Sampler(model, (3,), steps=6, prediction="v", max_batch="auto", compile="auto")
    assert_near(automatic(7, **call), whole)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1,), (63,), (1000,), (1, 3, 5), ()])
def test_shapes(shape: tuple[int, ...]) -> None:
    y = torch.zeros(shape)
    for measurement in (DPS(torch.tanh, y), PiGDM(torch.tanh, y, noise_std=0.5)):
        for n in (0, 1, 3):
            x = Sampler(lambda x, t: -x, shape, steps=2)(n, measurement=measurement)
            assert x.shape == (n, *shape)


def test_a_system_without_a_solution_is_told() -> None:
    tight = PiGDM(lambda x: x * torch.logspace(0, -3, 63), torch.ones(63), iterations=3)
    with pytest.warns(RuntimeWarning, match="did not solve its linear system in 3 iterations"):
        Sampler(lambda x, t: -x, (63,), steps=2)(1, measurement=tight)


@pytest.mark.slow
def test_images_of_the_native_network_have_gradients() -> None:
    """A U-Net's inference form has none, so its own modules run."""
    torch.manual_seed(0)
    model = UNet(1, 8, (4, 8)).eval()
    sampler = Sampler(model, (1, 8, 8), steps=3, prediction="v")
    measurement = PiGDM(lambda x: nn.functional.avg_pool2d(x, 4), torch.zeros(1, 2, 2))
    x = sampler(2, measurement=measurement)
    plain = Sampler(lambda x, t: model(x, t), (1, 8, 8), steps=3, prediction="v", device="cpu")
    assert_near(x, plain(2, measurement=measurement))
    with torch.no_grad():
        model.head.bias.add_(1) if hasattr(model.head, "bias") else next(model.parameters()).add_(0.1)
    assert_near(sampler(2, measurement=measurement), plain(2, measurement=measurement))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calls_in_inference_mode() -> None:
    torch.manual_seed(0)
    sampler = Sampler(MLP(3), (3,), steps=3)
    call = every()[1]
    x = sampler(2, **call)
    with torch.inference_mode():
        assert torch.equal(sampler(2, **call), x)
    labelled = Sampler(Labelled(), (3,), steps=3)
    x = labelled(2, model_kwargs={"label": torch.tensor([1, 2])}, **call)
    with torch.inference_mode():  # labels that autograd would refuse to keep
        assert torch.equal(labelled(2, model_kwargs={"label": torch.tensor([1, 2])}, **call), x)


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.label = MLP(3), nn.Embedding(3, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.inner(x, t) + self.label(label)


def test_corrections_see_the_guided_output() -> None:
    torch.manual_seed(0)
    model, label, null = Labelled(), torch.tensor([0, 1, 1]), torch.full((3,), 2)
    for call in every():
        options = {"steps": 4, "prediction": "v"}
        x = Sampler(model, (3,), guidance=2.0, **options)(
            3, model_kwargs={"label": label}, uncond_kwargs={"label": null}, **call
        )
        guided = Sampler(lambda x, t: 2 * model(x, t, label) - model(x, t, null), (3,), device="cpu", **options)
        assert_near(x, guided(3, **call))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_has_gradients() -> None:
    torch.manual_seed(0)
    model = MLP(3)
    sampler = Sampler(model, (3,), steps=4, prediction="v", compile=True)
    plain = Sampler(model, (3,), steps=4, prediction="v")
    for call in every()[:2]:
        assert_near(sampler(5, **call), plain(5, **call))
    assert sampler._network.differentiable().is_compiled
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert_near(sampler(5, **call), plain(5, **call))


# Bad input ----------------------------------------------------------------------------------------------------------


def bad(call: dict[str, Any], **options: Any) -> Any:
    return lambda: Sampler(options.pop("model", lambda x, t: -x), (3,), steps=3, **options)(4, **call)


@torch.no_grad()
def without_gradient(x: Tensor, t: Tensor) -> Tensor:
    return -x


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: DPS(3, Y), TypeError, "operator must be callable, got int"),  # type: ignore[arg-type]
        (lambda: DPS(pairs, [0.0]), TypeError, "y must be a tensor, got list"),  # type: ignore[arg-type]
        (lambda: PiGDM(pairs, Y.long()), TypeError, "y must be floating-point, got torch.int64"),
        (bad({"measurement": PiGDM(pairs, Y / 0)}), ValueError, "y must be finite"),
        (lambda: DPS(pairs, Y, -1.0), ValueError, "scale must be at least 0 and finite, got -1.0"),
        (lambda: PiGDM(pairs, Y, -1.0), ValueError, "noise_std must be at least 0 and finite, got -1.0"),
        (lambda: PiGDM(pairs, Y, data_std=0), ValueError, "data_std must be positive and finite, got 0"),
        (lambda: PiGDM(pairs, Y, iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: ClassifierGuidance(None), TypeError, "log_prob must be callable, got NoneType"),  # type: ignore[arg-type]
        (lambda: ClassifierGuidance(towards_zero, "1"), TypeError, "scale must be a number, got str"),  # type: ignore[arg-type]
        (bad({"measurement": pairs}), TypeError, "measurement must be a fastsde.DPS or fastsde.PiGDM, got function"),
        (bad({"measurement": DPS(pairs, Y[:1])}), ValueError, r"y must have shape \[2\] or \[4, 2\], .*, got \[1\]"),
        (bad({"measurement": DPS(pairs, Y.to("meta"))}), ValueError, "y .*must be on cpu, got meta"),
        (bad({"measurement": DPS(lambda x: 1, Y)}), TypeError, "the result of operator must be a tensor, got int"),
        (bad({"measurement": DPS(lambda x: pairs(x).detach(), Y)}), ValueError, "operator must be differentiable"),
        (bad({"measurement": PiGDM(lambda x: pairs(x).round(), Y)}), ValueError, "must be twice differentiable"),
        (bad({"measurement": DPS(lambda x: x.sum(), Y)}), ValueError, r"operator must return the batch first, .* \[\]"),
        (bad({"measurement": DPS(pairs, Y)}, model=without_gradient), ValueError, "needs the network's gradient"),
        (bad({"measurement": DPS(pairs, Y)}, backend="persistent", model=MLP(3)), ValueError, "not support meas"),
        (bad({}, guidance=ClassifierGuidance(towards_zero), backend="graph"), ValueError, "backend 'graph'"),
        (bad({"measurement": DPS(pairs, Y)}, resamples=2, jump=1), ValueError, "resamples goes with mask or PiGDM"),
        (bad({}, guidance=ClassifierGuidance(lambda x, t: x)), ValueError, r"log_prob must have shape \[4\]"),
        (bad({}, guidance=ClassifierGuidance(lambda x, t: t)), ValueError, "log_prob must be differentiable"),
        (
            bad({"measurement": DPS(lambda x: (pairs(x) - 100).sqrt(), Y)}),
            NonFiniteError,
            "the gradient of measurement became NaN or infinity in row 0, at time 1",
        ),
        (
            bad({"measurement": PiGDM(lambda x: (pairs(x) - 100).sqrt(), Y)}),
            NonFiniteError,
            "the gradient of measurement became NaN or infinity in row 0, at time 1",
        ),
        (
            bad({"measurement": PiGDM(pairs, Y)}, model=lambda x, t: x / 0),
            NonFiniteError,
            "the network returned NaN or infinity in row 0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_a_table_of_ones_own_has_no_levels() -> None:
    table = fastsde.solvers.build("ddim", VPSDE(), 3, prediction="eps")
    message = "needs the process and the prediction of each row, which only a solver given by its name tells"
    with pytest.raises(ValueError, match=f"measurement {message}"):
        Sampler(lambda x, t: -x, (3,), solver=table)(2, measurement=DPS(pairs, Y))
    with pytest.raises(ValueError, match=f"classifier guidance {message}"):
        Sampler(lambda x, t: -x, (3,), solver=table, guidance=ClassifierGuidance(towards_zero))(2)
