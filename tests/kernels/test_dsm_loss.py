"""The fused loss and its gradient against float64, within the rounding of their operations; and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import VPSDE, noise, ops, reference
from fastsde.reference import WEIGHTINGS
from fastsde.solvers import PREDICTIONS

SDE = VPSDE()
EPS = 2.0**-24
ADDITIONS = 64  # at most so many in a row, in the two stages of the sum
# Of the gradient, to its dtype. The interpreter truncates to bf16, where hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
SCALING = {"scale": 1 / 127.5, "shift": -1.0}
OBJECTIVES = list(product(PREDICTIONS, WEIGHTINGS))


@dataclass(frozen=True)
class Case:
    """What the loss is called with."""

    pixels: bool = False
    gathers: bool = False
    scaled: bool = False
    z_given: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "fp32": Case(),
    "uint8 by index, scaled": Case(pixels=True, gathers=True, scaled=True),
    "scaled, bf16 network": Case(scaled=True, dtype=torch.bfloat16),
    "by index, fp16 network": Case(gathers=True, dtype=torch.float16),
    "noise given": Case(pixels=True, z_given=True),
}
SHAPES = [(1, ()), (300, (1,)), (3, (2,)), (300, (63,)), (2, (2048,)), (3, (1, 28, 28)), (2, (5, 1001))]
IMAGES = (3, (1, 28, 28))


def _every_shape_of_every_case() -> Iterator[Any]:
    """On CUDA, which compiles two kernels for each, all shapes in fp32 and images in the other cases."""
    for name, case in CASES.items():
        for shape in SHAPES:
            marks = [] if name == "fp32" or shape == IMAGES else [pytest.mark.not_on_cuda]
            yield pytest.param(case, *shape, marks=marks, id=f"{name}-{shape}")


@pytest.fixture
def kernels(device: torch.device, poisoned: None) -> torch.device:
    return device


def _inputs(case: Case, batch: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    rows = 7 if case.gathers else batch
    x_0 = torch.randint(256, (rows, *shape)).byte() if case.pixels else torch.randn(rows, *shape)
    t_min = 0.05 if case.dtype == torch.float16 else 1e-4  # below, a likelihood-weighted gradient overflows fp16
    f, t = torch.randn(batch, *shape).to(case.dtype), torch.rand(batch).clamp(min=t_min)
    keys = noise.sample_keys(int(torch.randint(2**62, ())), batch)
    inputs: dict[str, Any] = {"f": f, "x_0": x_0, "t": t, "keys": keys}
    inputs |= {"index": torch.randint(rows, (batch,))} if case.gathers else {}
    inputs |= {"z": torch.randn(batch, *shape)} if case.z_given else {}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs | {"step": int(torch.randint(2**28, ()))} | (SCALING if case.scaled else {})


class Truth(NamedTuple):
    """Loss and gradient in float64, and how far the kernels may be from each."""

    loss: Tensor
    grad: Tensor
    loss_bound: Tensor
    grad_bound: Tensor


def _truth(inputs: dict[str, Any], prediction: str, weighting: str, grad_output: float = 1.0) -> Truth:
    objective = {"prediction": prediction, "weighting": weighting}
    f, x_0, t = (inputs[name].double() for name in ("f", "x_0", "t"))
    given = inputs | {"f": f.requires_grad_(), "x_0": x_0, "t": t}
    if drawn := "z" not in inputs:
        given["z"] = noise.normal(inputs["keys"], inputs["step"], f.shape[1:], noise.STREAM_TRAINING_NOISE).to(f.device)
    given["z"] = given["z"].double()
    loss = reference.dsm_loss(sde=SDE, **objective, **given)
    (grad,) = torch.autograd.grad(loss * grad_output, f)

    def column(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (f.ndim - 1))

    alpha, sigma, beta, integral = (column(each(t)) for each in (SDE.alpha, SDE.sigma, SDE.beta, SDE.integral_beta))
    one = torch.ones_like(alpha)
    scale, shift = inputs.get("scale", 1.0), inputs.get("shift", 0.0)
    data = abs(scale) * (x_0[inputs["index"]] if "index" in inputs else x_0).abs() + abs(shift)
    z, f = given["z"].abs(), f.detach()
    # The target's terms, its derivative by z, and the weight that the residual is multiplied by.
    target, by_z, factor = {
        "score": (z / sigma, 1 / sigma, sigma),
        "eps": (z, one, one),
        "x0": (data, 0 * one, alpha / sigma),
        "v": (alpha * z + sigma * data, alpha, alpha),
    }[prediction]
    factor = {"sigma2": factor, "likelihood": factor * beta.sqrt() / sigma, "target": one}[weighting]
    # alpha is off by 3.5 B + 4 roundings and sigma by 8 (test_perturb), and each enters twice at most; the root of beta
    # by 3; and there are at most 13 more operations.
    roundings = (7 * integral + 40) * EPS
    error = factor * (roundings * (f.abs() + target) + drawn * NORMAL_ERROR * by_z)
    # The residual r, of the reference's own gradient 2 g factor r / n.
    share = 2 * abs(grad_output) / f.numel() * factor
    residual = grad.abs() / share
    loss_bound = (2 * residual * error + error.square()).mean() + (ADDITIONS + 3) * EPS * loss.detach()
    grad_bound = share * (error + roundings * residual)
    dtype = inputs["f"].dtype
    rounding = (ROUNDING if f.is_cuda else TRUNCATION)[dtype]
    return Truth(loss.detach(), grad, loss_bound, grad_bound + rounding * (grad.abs() + grad_bound) + SUBNORMAL[dtype])


def _loss_and_gradient(inputs: dict[str, Any], grad_output: float = 1.0, **objective: str) -> tuple[Tensor, Tensor]:
    inputs = inputs | {"f": inputs["f"].detach().requires_grad_()}
    loss = ops.dsm_loss(sde=SDE, **inputs, **objective)
    (grad,) = torch.autograd.grad(loss, inputs["f"], torch.tensor(grad_output, device=loss.device))
    return loss.detach(), grad


def _assert_within(inputs: dict[str, Any], prediction: str, weighting: str, grad_output: float = 1.0) -> None:
    objective = {"prediction": prediction, "weighting": weighting}
    loss, grad = _loss_and_gradient(inputs, grad_output, **objective)
    truth = _truth(inputs, prediction, weighting, grad_output)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert (loss.double() - truth.loss).abs() <= truth.loss_bound, (loss, truth.loss, truth.loss_bound)
    assert grad.dtype == inputs["f"].dtype
    assert grad.shape == inputs["f"].shape
    excess = (grad.double() - truth.grad).abs() - truth.grad_bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond {truth.grad_bound.max():.3g}"


@pytest.mark.parametrize(("prediction", "weighting"), OBJECTIVES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_objective(kernels: torch.device, case: Case, prediction: str, weighting: str) -> None:
    _assert_within(_inputs(case, 5, (3, 7), kernels), prediction, weighting, grad_output=float(torch.randn(())))


@pytest.mark.parametrize(("case", "batch", "shape"), list(_every_shape_of_every_case()))
def test_every_shape(kernels: torch.device, case: Case, batch: int, shape: tuple[int, ...]) -> None:
    _assert_within(_inputs(case, batch, shape, kernels), "v", "sigma2")


@pytest.mark.parametrize("t", [1e-7, 1e-5, 1e-4, 1.0])
@pytest.mark.parametrize(("prediction", "weighting"), OBJECTIVES)
def test_the_ends_of_time(kernels: torch.device, prediction: str, weighting: str, t: float) -> None:
    inputs = _inputs(CASES["fp32"], 3, (3, 7), kernels)
    _assert_within(inputs | {"t": torch.full_like(inputs["t"], t)}, prediction, weighting)


@pytest.mark.parametrize(("prediction", "weighting"), [("score", "likelihood"), ("v", "target")])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_operation_takes_what_is_not_contiguous(
    kernels: torch.device, case: Case, prediction: str, weighting: str
) -> None:
    inputs = _inputs(case, 4, (6, 5), kernels)
    strided = {
        name: torch.stack([value, value], dim=-1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    objective = {"prediction": prediction, "weighting": weighting}
    for dense, spread in zip(
        _loss_and_gradient(inputs, **objective), _loss_and_gradient(strided, **objective), strict=True
    ):
        assert torch.equal(dense, spread)


def test_equal_inputs_give_equal_bits(kernels: torch.device) -> None:
    inputs = _inputs(CASES["scaled, bf16 network"], 300, (65,), kernels)
    for once, again in zip(_loss_and_gradient(inputs), _loss_and_gradient(inputs), strict=True):
        assert torch.equal(once, again)


def test_the_second_stage_adds_chunks(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("fastsde.kernels.dsm_loss")
    monkeypatch.setattr(kernel, "_CHUNK", 4)  # instead of more than 1024 tiles
    for batch in (96, 128, 129, 300):  # of 32 samples a tile: 3 partial sums, 4, 5 and 10
        _assert_within(_inputs(CASES["fp32"], batch, (63,), triton_device), "eps", "sigma2")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_second_stage_adds_many_chunks(kernels: torch.device) -> None:
    _assert_within(_inputs(CASES["fp32"], 3000, (3, 32, 32), kernels), "eps", "sigma2")


def test_a_batch_without_elements_has_the_mean_of_nothing(device: torch.device) -> None:
    inputs = _inputs(CASES["fp32"], 0, (5,), device)
    assert ops.dsm_loss(sde=SDE, **inputs).isnan()


@pytest.mark.parametrize(("prediction", "weighting"), OBJECTIVES)
def test_the_gradient_of_the_reference_is_its_derivative(prediction: str, weighting: str) -> None:
    inputs = _inputs(Case(z_given=True), 2, (3,), torch.device("cpu"))
    f, x_0, t, z = (inputs[name].double() for name in ("f", "x_0", "t", "z"))

    def loss(f: Tensor) -> Tensor:
        return reference.dsm_loss(f, x_0, t, None, 0, SDE, z=z, prediction=prediction, weighting=weighting)

    assert torch.autograd.gradcheck(loss, f.requires_grad_())


@pytest.mark.parametrize("unknown", ["prediction", "weighting"])
def test_what_the_kernel_does_not_know_is_an_error(device: torch.device, unknown: str) -> None:
    x, t = torch.zeros(2, 3, device=device), torch.ones(2, device=device)
    given = {"keys": noise.sample_keys(3, 2, device=device), "out": torch.empty((), device=device), unknown: "flow"}
    run = ops.dispatch.kernel("dsm_loss", device).dsm_loss
    with pytest.raises(Exception, match=unknown):
        run(x, x, t, step=0, beta_min=SDE.beta_min, beta_max=SDE.beta_max, **given)


# torch.library and torch.compile ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", [CASES["noise given"], CASES["by index, fp16 network"]], ids=["z", "index"])
def test_torch_library_knows_the_loss(device: torch.device, case: Case) -> None:
    inputs = _inputs(case, 3, (5,), device)
    tensors = [inputs[name] for name in ("x_0", "t", "keys")] + [inputs.get("index"), inputs.get("z")]
    counter = torch.tensor([4], device=device) if case.gathers else None
    numbers = (SDE.beta_min, SDE.beta_max, 1.0, 0.0)
    arguments = (inputs["f"].requires_grad_(), *tensors, counter, 3, *numbers, "v", "likelihood")
    torch.library.opcheck(torch.ops.fastsde.dsm_loss.default, arguments)


@pytest.mark.parametrize("case", [CASES["noise given"], CASES["uint8 by index, scaled"]], ids=["z", "index"])
def test_torch_library_knows_the_noising(device: torch.device, case: Case) -> None:
    inputs = _inputs(case, 3, (5,), device)
    x_0, keys = inputs["x_0"], inputs["keys"]
    given = (inputs.get("index"), None if case.gathers else inputs["t"], inputs.get("z"))
    given += (torch.tensor([4], device=device) if case.gathers else None,)
    numbers = (SDE.beta_min, SDE.beta_max, 0.5, 0.25, 1e-4)
    torch.library.opcheck(torch.ops.fastsde.perturb.default, (x_0, keys, *given, 3, *numbers, torch.bfloat16))


def _training_loss(weight: Tensor, x_0: Tensor, keys: Tensor, index: Tensor | None) -> Tensor:
    x_t, t = ops.perturb(x_0, keys, 3, SDE, index=index, **SCALING)
    f = torch.nn.functional.linear(x_t, weight) + t[:, None]
    return ops.dsm_loss(f, x_0, t, keys, 3, SDE, index=index, prediction="v", **SCALING)


def _assert_compiles(device: torch.device, gathers: bool) -> None:
    # Without its code generator on the CPU, where a compiler of C++ takes longer than all these tests.
    compiled = torch.compile(
        _training_loss, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    inputs = _inputs(Case(pixels=True, gathers=gathers), 6, (5,), device)
    index = inputs.get("index")
    results = []
    for function in (_training_loss, compiled):
        weight = torch.eye(5, device=device).requires_grad_()
        loss = function(weight, inputs["x_0"], inputs["keys"], index)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "by index"])
def test_a_compiled_training_step_has_no_graph_break(device: torch.device, gathers: bool) -> None:
    _assert_compiles(device, gathers)


@pytest.mark.slow
@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "by index"])
def test_the_reference_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch, gathers: bool) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops.dispatch, "has_native", lambda device: False)
    assert not ops.has_kernels(torch.device("cpu"))
    _assert_compiles(torch.device("cpu"), gathers)
