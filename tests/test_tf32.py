"""Which products PyTorch may run in TF32, and networks whose products are rounded to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsde import tf32, verify
from fastsde.benchmarks.suite.measure import fp32_products

CUDA = torch.device("cuda")
BACKENDS: Any = torch.backends


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    with fp32_products(BACKENDS.cudnn, "ieee"), fp32_products(BACKENDS.cuda.matmul, "ieee"):
        yield


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("kind", "convolutions"), [(BACKENDS.cudnn, True), (BACKENDS.cuda.matmul, False)], ids=["convolutions", "matrices"]
)
def test_the_older_switches_are_followed(kind: Any, convolutions: bool, precision: str) -> None:
    with fp32_products(kind, precision):
        assert tf32.may_multiply(convolutions, CUDA) == (precision == "tf32")
        assert not tf32.may_multiply(not convolutions, CUDA)
        assert not tf32.may_multiply(convolutions, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("switch", [BACKENDS.cudnn.conv, BACKENDS.cudnn, BACKENDS], ids=["conv", "cudnn", "all"])
def test_the_newer_switches_are_followed(switch: Any, precision: str) -> None:
    before, switch.fp32_precision = switch.fp32_precision, precision
    try:
        assert tf32.may_multiply(True, CUDA) == (precision == "tf32")
    finally:
        switch.fp32_precision = before


def test_numbers_are_rounded_to_the_nearest_of_11_bits() -> None:
    x = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    y = tf32.rounded(x)
    assert not (y.view(torch.int32) & 0x1FFF).any()
    assert ((x - y).abs() <= 2.0**-11 * x.abs()).all()
    assert (((x - y) / x).mean().abs()) < 1e-5  # truncation would give 2^-11.5
    assert torch.equal(tf32.rounded(y), y)
    assert tf32.rounded(torch.tensor([0.0, -0.0, 1.0])).tolist() == [0.0, 0.0, 1.0]
    assert tf32.rounded(torch.tensor(float("nan"))).isnan()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(self.conv(x)) + t[:, None, None, None]  # type: ignore[no-any-return]


def test_only_the_products_that_may_be_in_tf32_are_rounded() -> None:
    torch.manual_seed(0)
    net, x, t = _Net(), torch.randn(3, 2, 4, 4), torch.rand(3)
    conv, linear = net.conv, net.linear

    def expected(rounds_conv: bool, rounds_linear: bool) -> Tensor:
        def same(tensor: Tensor) -> Tensor:
            return tensor

        r, s = (tf32.rounded if rounds else same for rounds in (rounds_conv, rounds_linear))
        y = F.conv2d(r(x), r(conv.weight), conv.bias, padding=1)
        return F.linear(s(y), s(linear.weight), linear.bias) + t[:, None, None, None]

    assert tf32.with_rounded_products(net, CUDA) is None
    for convolutions, matrices in ((True, False), (False, True), (True, True)):
        with (
            fp32_products(BACKENDS.cudnn, "tf32" if convolutions else "ieee"),
            fp32_products(BACKENDS.cuda.matmul, "tf32" if matrices else "ieee"),
        ):
            model = tf32.with_rounded_products(net, CUDA)
            assert tf32.with_rounded_products(net, torch.device("cpu")) is None
        assert model is not None
        assert torch.equal(model(x, t), expected(convolutions, matrices))
        assert not torch.equal(model(x, t), net(x, t))


def test_the_yardstick_of_verify_is_the_larger_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def yardstick() -> verify.Result:
        results = verify.verify("swiss-roll", n=16, steps=9, dtypes=[torch.float32])
        return next(each for each in results if each.verdict == "yardstick")

    exact = yardstick()
    monkeypatch.setattr("fastsde.tf32.may_multiply", lambda convolutions, device: not convolutions)
    rounded = yardstick()
    assert exact.whole is not None
    assert rounded.whole is not None
    assert rounded.whole.rms > 30 * exact.whole.rms
