"""The kernel for everything after a convolution, against float64, within the rounding of its operations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

kernel = pytest.importorskip("fastsde.kernels.bias_activation")


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 2.0**-24
# Rounding of the result to its dtype. The interpreter truncates to bf16, while hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """The arguments of the kernel."""

    dtype: torch.dtype = torch.float32
    pools: bool = False
    timed: bool = False
    before: int = 0  # channels of `out` before and after the ones that are written
    after: int = 0
    in_place: bool = False


CASES = {
    "fp32": Case(),
    "fp32 in place": Case(in_place=True),
    "fp32 to the front": Case(after=8),
    "fp32 to the back, pooled": Case(before=8, pools=True),
    "fp32 with time, pooled": Case(before=3, after=2, pools=True, timed=True),
    "fp32 with time": Case(timed=True),
    "bf16 in place": Case(torch.bfloat16, in_place=True),
    "bf16 with time to the back, pooled": Case(torch.bfloat16, before=5, pools=True, timed=True),
    "fp16 pooled": Case(torch.float16, pools=True),
}
SHAPES = [(1, 1, 1, 1), (63, 1, 1, 1), (2, 63, 3, 5), (3, 8, 7, 4), (5, 16, 1, 9), (2, 3, 6, 1), (2, 300, 2, 3)]


def _images(*shape: int, device: torch.device, dtype: torch.dtype, value: float = NAN) -> Tensor:
    filled = torch.full(shape, value, device=device, dtype=dtype)
    return torch.empty_like(filled, memory_format=torch.channels_last).copy_(filled)


def _inputs(case: Case, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    y = _images(*shape, device=device, dtype=case.dtype).copy_(4 * torch.randn(shape, generator=generator))
    inputs = {"y": y, "bias": torch.randn(channels, generator=generator).to(device, case.dtype)}
    if case.timed:
        inputs["t"] = torch.rand(batch, generator=generator).to(device, case.dtype)
        inputs["plane"] = torch.randn(height, width, channels, generator=generator).to(device)
    return inputs


def _truth(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the activation in float64, and the error allowed for the kernel before it rounds the result."""
    y, bias = inputs["y"].double(), inputs["bias"].double()[:, None, None]
    time = torch.zeros_like(y)
    if "t" in inputs:
        time = inputs["t"].double()[:, None, None, None] * inputs["plane"].double().permute(2, 0, 1)
    v = y + bias + time
    # The roundings of two sums and a product, which the log sigmoid does not amplify, and its own error.
    sums = 3 * EPS * (y.abs() + bias.abs() + time.abs())
    return F.logsigmoid(v), sums + 4e-7 + EPS * v.abs()


def _pool(a: Tensor) -> Tensor:
    height, width = a.shape[2:]
    return F.max_pool2d(a, 2, padding=(height % 2, width % 2))


def _assert_within(ours: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert ours.shape == expected.shape
    rounding = (ROUNDING if ours.is_cuda else TRUNCATION)[ours.dtype]
    bound = bound + rounding * (expected.abs() + bound) + (2.0**-25 if ours.dtype == torch.float16 else 0)
    excess = (ours.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond a bound of {bound.max():.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_bias_time_activation_and_pool_and_touches_nothing_else(
    device: torch.device, case: Case, shape: tuple[int, ...]
) -> None:
    batch, channels, height, width = shape
    inputs = _inputs(case, shape, device)
    expected, bound = _truth(inputs)
    if case.in_place:
        out, written = inputs["y"], inputs["y"]
    else:
        # Whole samples around the output, which an offset out of bounds would reach.
        around = (batch + 2, case.before + channels + case.after, height, width)
        whole = _images(*around, device=device, dtype=case.dtype)
        out, written = whole[1:-1], whole[1:-1, case.before : case.before + channels]
    pool_around = _images(batch + 2, channels, (height + 1) // 2, (width + 1) // 2, device=device, dtype=case.dtype)
    pooled = pool_around[1:-1] if case.pools else None
    kernel.bias_activation(**inputs, out=out, first=case.before, pooled=pooled)
    _assert_within(written, expected, bound)
    if pooled is not None:
        assert torch.equal(pooled, _pool(written))
        pooled.fill_(NAN)
    assert pool_around.isnan().all()
    if not case.in_place:
        written.fill_(NAN)
        assert whole.isnan().all()


def test_the_log_sigmoid_is_accurate_everywhere(device: torch.device) -> None:
    ends = [0.0, -0.0, 1e-30, -1e-30, 4.85, 4.86, 80.0, -80.0, 500.0, -500.0, 3e38, -3e38]
    v = torch.cat((torch.linspace(-30, 30, 3001), torch.linspace(-1e-3, 1e-3, 101), torch.tensor(ends))).to(device)
    ours = v.reshape(1, -1, 1, 1).clone()
    kernel.bias_activation(ours, torch.zeros_like(v), ours)
    exact = F.logsigmoid(v.double())
    error, u = (ours.double().flatten() - exact).abs(), torch.exp(-v.double().abs())
    assert (error <= 4e-7 + EPS * v.abs()).all()
    # Large v: the result is small, with the same relative accuracy.
    small = (u < 2.0**-7) & (v > 0)
    bound = (5e-7 + 2.0**-23.4 * v) * exact.abs() + 2.0**-126
    assert (error <= bound)[small].all()


def test_infinity_and_nan_pass_through(device: torch.device) -> None:
    inf = float("inf")
    v = torch.tensor([inf, -inf, NAN, 1.0], device=device)
    y = v.reshape(1, 1, 2, 2)
    out, pooled = torch.empty_like(y), torch.empty(1, 1, 1, 1, device=device)
    kernel.bias_activation(y, torch.zeros(1, device=device), out, pooled=pooled)
    torch.testing.assert_close(out.flatten(), F.logsigmoid(v), equal_nan=True)
    assert pooled.isnan().all()
    y[0, 0, 1] = -inf
    kernel.bias_activation(y, torch.zeros(1, device=device), out, pooled=pooled)
    assert pooled.item() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 1, 1, 1)], ids=str)
def test_nothing_becomes_nothing(device: torch.device, shape: tuple[int, ...]) -> None:
    y = torch.empty(shape, device=device)
    kernel.bias_activation(y, torch.zeros(shape[1], device=device), y)


@pytest.mark.parametrize("size", [(1, 1, 1), (28, 28, 32), (7, 5, 63), (2, 2, 256), (4, 4, 1000)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 1000, 10**6])
@pytest.mark.parametrize("side", [1, 2])
def test_programs_cover_a_batch_and_depend_on_the_image_alone(
    batch: int, size: tuple[int, int, int], side: int
) -> None:
    height, width, channels = size
    constants, (windows, blocks) = kernel.launch_config(batch, *size, side)
    assert constants == kernel.launch_config(1, *size, side)[0]
    count = batch * -(-height // side) * -(-width // side)
    assert (windows - 1) * constants["WINDOWS"] < count <= windows * constants["WINDOWS"]
    assert (blocks - 1) * constants["C"] < channels <= blocks * constants["C"]
    assert windows < 2**31
    assert blocks < 2**16


# The compiled code, on any machine ----------------------------------------------------------------------------------


def _count_variants() -> int:
    from test_variants import BATCHES, _compile_only

    _compile_only()
    kernel.bias_activation_kernel.device_caches.clear()
    for batch in BATCHES:
        y, pooled = (_images(batch, 8, size, size, device=torch.device("cpu"), dtype=torch.float32) for size in (5, 3))
        kernel.bias_activation(y, torch.empty(8), y, pooled=pooled, t=torch.empty(batch), plane=torch.empty(5, 5, 8))
    return len(kernel.bias_activation_kernel.device_caches[0][0])


@pytest.mark.slow
def test_a_network_compiles_once_for_all_batches(compiler_environment: dict[str, str]) -> None:
    command = [sys.executable, str(Path(__file__))]
    run = subprocess.run(command, env=compiler_environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "1\n"


if __name__ == "__main__":
    print(_count_variants())
