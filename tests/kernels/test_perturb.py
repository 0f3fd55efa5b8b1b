"""The fused noising against float64, within the rounding of its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from coefficient_tables import PATTERNS, table_of
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import noise, ops, reference
from fastsde.objective import Coefficients

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 2.0**-24
# Rounding of the result to its dtype. The interpreter truncates to bf16, while hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
NAN = float("nan")
SCALING = {"scale": 1 / 127.5, "shift": -1.0}


@dataclass(frozen=True)
class Case:
    """The arguments of the noising."""

    pixels: bool = False
    gathers: bool = False
    scaled: bool = False
    z_given: bool = False
    dtype: torch.dtype = torch.float32
    pattern: str = "all"


CASES = {
    "fp32": Case(),
    "uint8 by index, scaled": Case(pixels=True, gathers=True, scaled=True, pattern="zeros by sample"),
    "uint8 to bf16": Case(pixels=True, scaled=True, dtype=torch.bfloat16),
    "fp32 by index to fp16": Case(gathers=True, dtype=torch.float16),
    "noise given": Case(scaled=True, z_given=True, pattern="zeros by sample"),
    "all given": Case(pixels=True, gathers=True, z_given=True),
}
SHAPES = [
    *((1, ()), (3, (2,)), (300, (63,)), (3, (1, 28, 28)), (2, (5, 1001))),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((300, (1,)), (2, (2048,)), (3, (1000,)))),
]


def _inputs(case: Case, batch: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    rows = 7 if case.gathers else batch
    x_0 = torch.randint(256, (rows, *shape)).byte() if case.pixels else torch.randn(rows, *shape)
    inputs: dict[str, Any] = {"x_0": x_0, "keys": noise.sample_keys(int(torch.randint(2**62, ())), batch)}
    inputs |= {"coefficients": table_of(case.pattern, batch)}
    inputs |= {"index": torch.randint(rows, (batch,))} if case.gathers else {}
    inputs |= {"z": torch.randn(batch, *shape)} if case.z_given else {}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs | {"step": int(torch.randint(2**28, ()))} | (SCALING if case.scaled else {})


def _truth(inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x_in in float64, and the error allowed for the kernel."""
    x_0 = inputs["x_0"].double()
    drawn = "z" not in inputs
    given = {name: value for name, value in inputs.items() if name not in ("x_0", "keys", "step", "coefficients")}
    z = noise.normal(inputs["keys"], inputs["step"], x_0.shape[1:], 1) if drawn else inputs["z"]
    table = inputs["coefficients"].double()
    expected = reference.perturb(x_0, None, 0, table, **given | {"z": z.double()}).x_in
    k = Coefficients(*(each.reshape(-1, *[1] * (x_0.ndim - 1)) for each in table.unbind(-1)))
    data = reference.load_batch(x_0.abs(), inputs.get("index"), abs(inputs.get("scale", 1.0)), 0.0)
    # Loading the data, the product and the sum take 5 roundings, those of the noise 2.
    bound = EPS * (5 * k.u_x.abs() * (data + abs(inputs.get("shift", 0.0))) + 2 * k.u_z.abs() * z.abs())
    bound = bound + drawn * NORMAL_ERROR * k.u_z.abs()
    rounding = (ROUNDING if x_0.is_cuda else TRUNCATION)[dtype]
    return expected, bound + rounding * (expected.abs() + bound) + (2.0**-25 if dtype == torch.float16 else 0)


def _assert_within(ours: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert ours.shape == expected.shape
    excess = (ours.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond a bound of {bound.max():.3g}"


def _launch(inputs: dict[str, Any], **outputs: Tensor) -> None:
    given = {name: value for name, value in inputs.items() if name not in ("x_0", "keys", "step", "coefficients")}
    ops.dispatch.kernel("perturb", inputs["x_0"].device).perturb(
        inputs["x_0"], inputs["keys"], inputs["step"], inputs["coefficients"], **given, **outputs
    )


@pytest.mark.slow
@pytest.mark.usefixtures("tiles_as_on_a_gpu")
@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_noising_is_right_and_touches_nothing_else(
    device: torch.device, case: Case, batch: int, shape: tuple[int, ...]
) -> None:
    inputs = _inputs(case, batch, shape, device)
    n = batch * torch.Size(shape).numel()
    buffer = torch.full((n + 256,), NAN, device=device, dtype=case.dtype)
    taus = torch.full((batch + 64,), NAN, device=device)
    out, tau = buffer[64 : 64 + n].view(batch, *shape), taus[:batch]
    _launch(inputs, out=out, tau=tau)
    assert torch.equal(tau, inputs["coefficients"][:, 0])
    _assert_within(out, *_truth(inputs, case.dtype))
    assert torch.cat([buffer[:64], buffer[64 + n :]]).isnan().all()
    assert taus[batch:].isnan().all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_of_coefficients(device: torch.device, pattern: str) -> None:
    inputs = _inputs(Case(pattern=pattern), 9, (7,), device)
    noised = ops.perturb(**inputs)
    _assert_within(noised.x_in, *_truth(inputs, torch.float32))


@pytest.mark.parametrize("pixels", [False, True])
def test_the_noise_that_is_kept_is_that_which_is_drawn(device: torch.device, pixels: bool) -> None:
    inputs = _inputs(Case(pixels=pixels), 9, (7, 3), device)
    dropped, kept = (ops.perturb(**inputs, keep_noise=keeps) for keeps in (False, True))
    assert dropped.z is None
    assert torch.equal(dropped.x_in, kept.x_in)
    expected = noise.normal(inputs["keys"], inputs["step"], (7, 3), noise.STREAM_TRAINING_NOISE)
    torch.testing.assert_close(kept.z, expected, rtol=0, atol=NORMAL_ERROR)
    again = ops.perturb(**inputs, z=kept.z, keep_noise=True)
    assert again.z is kept.z
    assert torch.equal(again.x_in, kept.x_in)


def test_what_has_no_coefficient_does_not_matter(device: torch.device) -> None:
    inputs = _inputs(Case(z_given=True), 4, (9,), device)
    inputs["coefficients"][0, 1] = inputs["coefficients"][1, 2] = 0
    inputs["x_0"][0], inputs["z"][1] = NAN, torch.inf
    x_in = ops.perturb(**inputs).x_in
    assert x_in.isfinite().all()
    torch.testing.assert_close(x_in, reference.perturb(**inputs).x_in)


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    inputs = _inputs(CASES["fp32"], 5, (7,), device)
    results, step = [], inputs["step"]
    for given in ({}, {"step": 0, "counter": torch.tensor([step], device=device)}):
        results.append([torch.full((5, 7), NAN, device=device), torch.full((5,), NAN, device=device)])
        _launch(inputs | given, out=results[-1][0], tau=results[-1][1])
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
    x_in, tau, _ = ops.perturb(dtype=case.dtype, **strided)
    assert x_in.dtype == case.dtype
    assert tau.dtype == torch.float32
    _assert_within(x_in, *_truth(inputs, case.dtype))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("case", [CASES["fp32"], CASES["uint8 to bf16"]], ids=["fp32", "uint8 to bf16"])
def test_nothing_becomes_nothing(device: torch.device, case: Case, shape: tuple[int, ...]) -> None:
    # Samples without elements still have their times.
    inputs = _inputs(case, shape[0], shape[1:], device)
    x_in, tau, _ = ops.perturb(dtype=case.dtype, **inputs)
    assert x_in.shape == shape
    assert x_in.dtype == case.dtype
    assert torch.equal(tau, inputs["coefficients"][:, 0])


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_a_row_that_the_data_have_not_is_nan_and_never_read(device: torch.device, bad: int) -> None:
    data, index = torch.randint(256, (7, 5)).byte().to(device), torch.tensor([3, bad, 0], device=device)
    out, tau = torch.zeros(3, 5, device=device), torch.zeros(3, device=device)
    keys = noise.sample_keys(0, 3, device=device)
    perturb = ops.dispatch.kernel("perturb", device).perturb
    perturb(data, keys, 0, table_of("all", 3).to(device), index=index, out=out, tau=tau)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
