"""The fused loss and its gradient against float64, within the rounding of their operations; and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from coefficient_tables import PATTERNS, table_of
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import noise, ops, reference
from fastsde.objective import Coefficients, Objective

EPS = 2.0**-24
ADDITIONS = 64  # the most additions in sequence, in the two stages of the sum
# Rounding of the gradient to its dtype. The interpreter truncates to bf16, while hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
SCALING = {"scale": 1 / 127.5, "shift": -1.0}
OBJECTIVE = Objective(prediction="v")


@dataclass(frozen=True)
class Case:
    """The arguments of the loss."""

    pixels: bool = False
    gathers: bool = False
    scaled: bool = False
    z_given: bool = False
    dtype: torch.dtype = torch.float32
    pattern: str = "all"


CASES = {
    "fp32": Case(),
    "uint8 by index, scaled": Case(pixels=True, gathers=True, scaled=True, pattern="zeros by sample"),
    "scaled, bf16 network": Case(scaled=True, dtype=torch.bfloat16, pattern="score"),
    "by index, fp16 network": Case(gathers=True, dtype=torch.float16),
    "noise given": Case(pixels=True, z_given=True, pattern="zeros by sample"),
}
SHAPES = [(1, ()), (300, (1,)), (3, (2,)), (300, (63,)), (2, (2048,)), (3, (1, 28, 28)), (2, (5, 1001))]
IMAGES = (3, (1, 28, 28))


def _every_shape_of_every_case() -> Iterator[Any]:
    """Yields all cases and shapes; CUDA, which compiles two kernels for each, runs only fp32 and images."""
    for name, case in CASES.items():
        for shape in SHAPES:
            marks = [] if name == "fp32" or shape == IMAGES else [pytest.mark.not_on_cuda, pytest.mark.slow]
            yield pytest.param(case, *shape, marks=marks, id=f"{name}-{shape}")


@pytest.fixture
def kernels(device: torch.device, poisoned: None) -> torch.device:
    return device


def _inputs(case: Case, batch: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    rows = 7 if case.gathers else batch
    x_0 = torch.randint(256, (rows, *shape)).byte() if case.pixels else torch.randn(rows, *shape)
    keys = noise.sample_keys(int(torch.randint(2**62, ())), batch)
    inputs: dict[str, Any] = {"f": torch.randn(batch, *shape).to(case.dtype), "x_0": x_0, "keys": keys}
    inputs |= {"coefficients": table_of(case.pattern, batch)}
    inputs |= {"index": torch.randint(rows, (batch,))} if case.gathers else {}
    inputs |= {"z": torch.randn(batch, *shape)} if case.z_given else {}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs | {"step": int(torch.randint(2**28, ()))} | (SCALING if case.scaled else {})


class Truth(NamedTuple):
    """Loss and gradient in float64, and the error allowed for each."""

    loss: Tensor
    grad: Tensor
    loss_bound: Tensor
    grad_bound: Tensor


def _truth(inputs: dict[str, Any], grad_output: float = 1.0) -> Truth:
    f, x_0, table = (inputs[name].double() for name in ("f", "x_0", "coefficients"))
    given = inputs | {"f": f.requires_grad_(), "x_0": x_0, "coefficients": table}
    if drawn := "z" not in inputs:
        given["z"] = noise.normal(inputs["keys"], inputs["step"], f.shape[1:], noise.STREAM_TRAINING_NOISE).to(f.device)
    given["z"] = given["z"].double()
    loss = reference.dsm_loss(**given)
    (grad,) = torch.autograd.grad(loss * grad_output, f)
    k = Coefficients(*(each.abs().reshape(-1, *[1] * (f.ndim - 1)) for each in table.unbind(-1)))
    scale, shift = abs(inputs.get("scale", 1.0)), abs(inputs.get("shift", 0.0))
    data = reference.load_batch(x_0.abs(), inputs.get("index"), scale, 0.0) + shift
    # Three products (with the data, 2 more roundings) and two sums; then the factors of the gradient.
    terms = k.w_f * f.detach().abs() + k.w_x * data + k.w_z * given["z"].abs()
    error = 6 * EPS * terms + drawn * NORMAL_ERROR * k.w_z
    share = 2 * abs(grad_output) / f.numel() * k.w_f
    residual = (
        reference._term(table[:, 3], f.detach())
        + reference._term(
            table[:, 4],
            reference.load_batch(x_0, inputs.get("index"), inputs.get("scale", 1.0), inputs.get("shift", 0.0)),
        )
        + reference._term(table[:, 5], given["z"])
    )
    loss_bound = (2 * residual.abs() * error + error.square()).mean() + (ADDITIONS + 3) * EPS * loss.detach()
    grad_bound = share * (error + 6 * EPS * residual.abs())
    dtype = inputs["f"].dtype
    rounding = (ROUNDING if f.is_cuda else TRUNCATION)[dtype]
    return Truth(loss.detach(), grad, loss_bound, grad_bound + rounding * (grad.abs() + grad_bound) + SUBNORMAL[dtype])


def _loss_and_gradient(inputs: dict[str, Any], grad_output: float = 1.0) -> tuple[Tensor, Tensor]:
    inputs = inputs | {"f": inputs["f"].detach().requires_grad_()}
    loss = ops.dsm_loss(**inputs)
    (grad,) = torch.autograd.grad(loss, inputs["f"], torch.tensor(grad_output, device=loss.device))
    return loss.detach(), grad


def _assert_within(inputs: dict[str, Any], grad_output: float = 1.0) -> None:
    loss, grad = _loss_and_gradient(inputs, grad_output)
    truth = _truth(inputs, grad_output)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert (loss.double() - truth.loss).abs() <= truth.loss_bound, (loss, truth.loss, truth.loss_bound)
    assert torch.equal(ops.dsm_loss(**inputs), loss)  # without a gradient
    assert grad.dtype == inputs["f"].dtype
    assert grad.shape == inputs["f"].shape
    excess = (grad.double() - truth.grad).abs() - truth.grad_bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond {truth.grad_bound.max():.3g}"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_of_coefficients(kernels: torch.device, pattern: str) -> None:
    for case in (Case(pattern=pattern), Case(pattern=pattern, z_given=True, scaled=True)):
        _assert_within(_inputs(case, 5, (3, 7), kernels), grad_output=float(torch.randn(())))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "batch", "shape"), list(_every_shape_of_every_case()))
def test_every_shape(kernels: torch.device, case: Case, batch: int, shape: tuple[int, ...]) -> None:
    _assert_within(_inputs(case, batch, shape, kernels))


def test_what_has_no_coefficient_does_not_matter(kernels: torch.device) -> None:
    inputs = _inputs(Case(z_given=True), 4, (9,), kernels)
    for sample, (column, name) in enumerate(((3, "f"), (4, "x_0"), (5, "z"))):
        inputs["coefficients"][sample, column] = 0
        inputs[name][sample] = torch.nan
    loss, grad = _loss_and_gradient(inputs)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[0] == 0).all()
    torch.testing.assert_close(loss, reference.dsm_loss(**inputs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_operation_takes_what_is_not_contiguous(kernels: torch.device, case: Case) -> None:
    inputs = _inputs(case, 4, (6, 5), kernels)
    strided = {
        name: torch.stack([value, value], dim=-1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    for dense, spread in zip(_loss_and_gradient(inputs), _loss_and_gradient(strided), strict=True):
        assert torch.equal(dense, spread)


def test_a_second_derivative_is_an_error(kernels: torch.device) -> None:
    inputs = _inputs(CASES["fp32"], 4, (9,), kernels)
    f = inputs["f"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.dsm_loss(**inputs | {"f": f * 2}), f, create_graph=True)
    with pytest.raises(RuntimeError, match=r"only a first derivative|no autograd formula|not implemented"):
        torch.autograd.grad(grad.square().sum(), f)


@pytest.mark.slow
def test_equal_inputs_give_equal_bits(kernels: torch.device) -> None:
    inputs = _inputs(CASES["scaled, bf16 network"], 300, (65,), kernels)
    for once, again in zip(_loss_and_gradient(inputs), _loss_and_gradient(inputs), strict=True):
        assert torch.equal(once, again)


@pytest.mark.slow
def test_the_second_stage_adds_chunks(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("fastsde.kernels.dsm_loss")
    monkeypatch.setattr(kernel, "_CHUNK", 4)  # instead of more than 1024 tiles
    for batch in (96, 128, 129, 300):  # 32 samples per tile: 3, 4, 5 and 10 partial sums
        _assert_within(_inputs(CASES["fp32"], batch, (63,), triton_device))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_second_stage_adds_many_chunks(kernels: torch.device) -> None:
    _assert_within(_inputs(CASES["fp32"], 3000, (3, 32, 32), kernels))


def test_a_batch_without_elements_has_the_mean_of_nothing(device: torch.device) -> None:
    inputs = _inputs(CASES["fp32"], 0, (5,), device)
    assert ops.dsm_loss(**inputs).isnan()


# torch.library and torch.compile ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", [CASES["noise given"], CASES["by index, fp16 network"]], ids=["z", "index"])
def test_torch_library_knows_the_loss(device: torch.device, case: Case) -> None:
    inputs = _inputs(case, 3, (5,), device)
    names = ("x_0", "coefficients", "keys", "index", "z")
    counter = torch.tensor([4], device=device) if case.gathers else None
    arguments = (inputs["f"].requires_grad_(), *(inputs.get(name) for name in names), counter, 3, 1.0, 0.0)
    torch.library.opcheck(torch.ops.fastsde.dsm_loss.default, arguments)


@pytest.mark.parametrize("case", [CASES["noise given"], CASES["uint8 by index, scaled"]], ids=["z", "index"])
def test_torch_library_knows_the_noising(device: torch.device, case: Case) -> None:
    inputs = _inputs(case, 3, (5,), device)
    names = ("x_0", "keys", "coefficients", "index", "z")
    counter = torch.tensor([4], device=device) if case.gathers else None
    numbers = (3, 0.5, 0.25, torch.bfloat16, case.gathers)
    torch.library.opcheck(torch.ops.fastsde.perturb.default, (*(inputs.get(name) for name in names), counter, *numbers))


def _training_loss(weight: Tensor, x_0: Tensor, keys: Tensor, index: Tensor | None) -> Tensor:
    table = ops.coefficients(OBJECTIVE, ops.training_times(OBJECTIVE, keys, 3)[0])
    x_in, tau, z = ops.perturb(x_0, keys, 3, table, index=index, keep_noise=index is None, **SCALING)
    f = torch.nn.functional.linear(x_in, weight) + tau[:, None]
    return ops.dsm_loss(f, x_0, keys, 3, table, index=index, z=z, **SCALING)


def _assert_compiles(device: torch.device, gathers: bool) -> None:
    # Without code generation on the CPU, where the C++ compiler takes longer than all these tests.
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


@pytest.mark.slow
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
