"""The fused posterior noising against float64, within the rounding of its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import VPSDE, noise, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SDE = VPSDE()
EPS = 2.0**-24
# Of the result, to its dtype. The interpreter truncates to bf16, where hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
NAN = float("nan")
SCALING = {"scale": 1 / 127.5, "shift": -1.0}


@dataclass(frozen=True)
class Case:
    """What the noising is called with."""

    pixels: bool = False
    gathers: bool = False
    scaled: bool = False
    t_given: bool = False
    z_given: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "fp32": Case(),
    "uint8 by index, scaled": Case(pixels=True, gathers=True, scaled=True),
    "uint8 to bf16": Case(pixels=True, scaled=True, dtype=torch.bfloat16),
    "fp32 by index to fp16": Case(gathers=True, dtype=torch.float16),
    "times given": Case(t_given=True),
    "noise given": Case(scaled=True, z_given=True),
    "all given": Case(pixels=True, gathers=True, t_given=True, z_given=True),
}
SHAPES = [
    *((1, ()), (3, (2,)), (300, (63,)), (3, (1, 28, 28)), (2, (5, 1001))),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((300, (1,)), (2, (2048,)), (3, (1000,)))),
]
# Where sigma = sqrt(-expm1(-B)) loses its digits if it is not written with care, and where alpha is least.
TIMES = (1e-5, 1e-4, 1.0)


def _inputs(case: Case, batch: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    rows = 7 if case.gathers else batch
    x_0 = torch.randint(256, (rows, *shape)).byte() if case.pixels else torch.randn(rows, *shape)
    inputs: dict[str, Any] = {"x_0": x_0, "keys": noise.sample_keys(int(torch.randint(2**62, ())), batch)}
    inputs |= {"index": torch.randint(rows, (batch,))} if case.gathers else {}
    inputs |= {"z": torch.randn(batch, *shape)} if case.z_given else {}
    inputs |= {"t": torch.cat([torch.tensor(TIMES), torch.rand(batch)])[:batch]} if case.t_given else {}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs | {"step": int(torch.randint(2**28, ()))} | (SCALING if case.scaled else {})


def _truth(inputs: dict[str, Any], t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t in float64 at the fp32 times ``t``, and how far the kernel may be from it."""
    scale, shift = inputs.get("scale", 1.0), inputs.get("shift", 0.0)
    x_0, t = inputs["x_0"].double(), t.double()
    x_0 = x_0[inputs["index"]] if "index" in inputs else x_0
    shape = (-1, *[1] * (x_0.ndim - 1))
    z = inputs.get("z")
    if drawn := z is None:
        z = noise.normal(inputs["keys"], inputs["step"], x_0.shape[1:], noise.STREAM_TRAINING_NOISE)
    z = z.double()
    given = {"index": inputs.get("index"), "scale": scale, "shift": shift, "z": z, "t": t}
    expected, _ = reference.perturb(inputs["x_0"].double(), None, 0, SDE, **given)
    # B is off by 5 roundings. exp(-B / 2) turns that into 5 B / 2, its argument in base 2 adds B and itself 4; loading
    # the data, the product and the sum 5. sqrt(-expm1(-B)) is off by 8 and the product and the sum by 2.
    alpha, sigma, integral = (each(t).reshape(shape) for each in (SDE.alpha, SDE.sigma, SDE.integral_beta))
    bound = EPS * ((3.5 * integral + 9) * alpha * (abs(scale) * x_0.abs() + abs(shift)) + 10 * sigma * z.abs())
    bound = bound + drawn * NORMAL_ERROR * sigma
    rounding = (ROUNDING if x_0.is_cuda else TRUNCATION)[dtype]
    return expected, bound + rounding * (expected.abs() + bound) + (2.0**-25 if dtype == torch.float16 else 0)


def _assert_within(ours: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert ours.shape == expected.shape
    excess = (ours.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond a bound of {bound.max():.3g}"


def _assert_times(ours: Tensor, inputs: dict[str, Any], t_min: float = 1e-4) -> None:
    if "t" in inputs:
        assert torch.equal(ours, inputs["t"])
        return
    expected = reference.training_draws(inputs["keys"], inputs["step"], 1, (), t_min).t
    one_ulp = torch.nextafter(expected, torch.full_like(expected, 2.0)) - expected
    assert ((ours - expected).abs() <= one_ulp).all()


def _launch(inputs: dict[str, Any], **outputs: Tensor) -> None:
    given = {name: value for name, value in inputs.items() if name not in ("x_0", "keys", "step")}
    ops.dispatch.kernel("perturb", inputs["x_0"].device).perturb(
        inputs["x_0"], inputs["keys"], inputs["step"], SDE.beta_min, SDE.beta_max, **given, t_min=1e-4, **outputs
    )


@pytest.mark.usefixtures("tiles_as_on_a_gpu")
@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_noising_is_the_posterior_and_touches_nothing_else(
    device: torch.device, case: Case, batch: int, shape: tuple[int, ...]
) -> None:
    inputs = _inputs(case, batch, shape, device)
    n = batch * torch.Size(shape).numel()
    buffer = torch.full((n + 256,), NAN, device=device, dtype=case.dtype)
    times = torch.full((batch + 64,), NAN, device=device)
    out, t_out = buffer[64 : 64 + n].view(batch, *shape), times[:batch]
    _launch(inputs, out=out, t_out=t_out)
    _assert_times(t_out, inputs)
    _assert_within(out, *_truth(inputs, t_out, case.dtype))
    assert torch.cat([buffer[:64], buffer[64 + n :]]).isnan().all()
    assert times[batch:].isnan().all()


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    inputs = _inputs(CASES["fp32"], 5, (7,), device)
    results, step = [], inputs["step"]
    for given in ({}, {"step": 0, "counter": torch.tensor([step], device=device)}):
        results.append([torch.full((5, 7), NAN, device=device), torch.full((5,), NAN, device=device)])
        _launch(inputs | given, out=results[-1][0], t_out=results[-1][1])
    for by_number, by_tensor in zip(*results, strict=True):
        assert torch.equal(by_number, by_tensor)
        assert not by_number.isnan().any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_operation_takes_what_is_not_contiguous(device: torch.device, case: Case) -> None:
    inputs = _inputs(case, 4, (6, 5), device)
    strided = {
        name: torch.stack([value, value], dim=-1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    assert not any(value.is_contiguous() for value in strided.values() if isinstance(value, Tensor))
    x_t, t = ops.perturb(sde=SDE, dtype=case.dtype, t_min=0.25, **strided)
    assert x_t.dtype == case.dtype
    assert t.dtype == torch.float32
    _assert_times(t, inputs, t_min=0.25)
    _assert_within(x_t, *_truth(inputs, t, case.dtype))


@pytest.mark.parametrize("beta", [(0.0, 1e-3), (0.1, 20.0), (5, 5), (0, 60)], ids=str)
def test_schedules(device: torch.device, beta: tuple[float, float]) -> None:
    # Without data x_t is sigma, and without noise alpha.
    sde = VPSDE(*beta)
    t = torch.cat([torch.logspace(-7, 0, 200), torch.rand(100)]).to(device)
    zero, one = torch.zeros(len(t), 1, device=device), torch.ones(len(t), 1, device=device)
    sigma, _ = ops.perturb(zero, None, 0, sde, t=t, z=one)
    alpha, _ = ops.perturb(one, None, 0, sde, t=t, z=zero)
    exact = t.double()
    torch.testing.assert_close(sigma[:, 0].double(), sde.sigma(exact), rtol=10 * EPS, atol=0)
    bound = (3.5 * sde.integral_beta(exact) + 9) * EPS * sde.alpha(exact)
    assert ((alpha[:, 0].double() - sde.alpha(exact)).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("case", [CASES["fp32"], CASES["uint8 to bf16"]], ids=["fp32", "uint8 to bf16"])
def test_nothing_becomes_nothing(device: torch.device, case: Case, shape: tuple[int, ...]) -> None:
    # A batch of samples without elements still has its times.
    inputs = _inputs(case, shape[0], shape[1:], device)
    x_t, t = ops.perturb(sde=SDE, dtype=case.dtype, **inputs)
    assert x_t.shape == shape
    assert x_t.dtype == case.dtype
    assert t.shape == shape[:1]
    _assert_times(t, inputs)


@pytest.mark.parametrize("beta_max", [170.0, 180.0, 300.0, 5000.0])
def test_a_schedule_whose_power_underflows_ends_in_noise(device: torch.device, beta_max: float) -> None:
    sde, keys = VPSDE(0.1, beta_max), noise.sample_keys(0, 3, device=device)
    x_0, t = torch.ones(3, 5, device=device), torch.ones(3, device=device)
    x_t, _ = ops.perturb(x_0, keys, 0, sde, t=t)
    expected, _ = reference.perturb(x_0, keys, 0, sde, t=t)
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_a_row_that_the_data_have_not_is_nan_and_never_read(device: torch.device, bad: int) -> None:
    data, index = torch.randint(256, (7, 5)).byte().to(device), torch.tensor([3, bad, 0], device=device)
    out, t_out = torch.zeros(3, 5, device=device), torch.zeros(3, device=device)
    keys = noise.sample_keys(0, 3, device=device)
    perturb = ops.dispatch.kernel("perturb", device).perturb
    perturb(data, keys, 0, 0.1, 20.0, index=index, out=out, t_out=t_out)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
