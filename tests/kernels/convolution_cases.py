"""What the tests of the U-Net's convolution kernels share: guarded arguments, and errors that are allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 2.0**-24
NAN = float("nan")
# An addition to an fp32 sum: tensor cores truncate, and align terms to the largest.
_ADDITION = {"cpu": EPS, "cuda": 2 * EPS}
# Relative error of an fp32 product. In tf32 both factors are cut to 10 bits. In tf32x3 a factor is a rounded part and
# the rounded rest, at most 2^-11 of it and wrong by 2^-22; the product of the rests, also 2^-22, is left out.
PRODUCT = {"tf32x3": 3 * 2.0**-22, "tf32": 2.0**-9 + 2.0**-20}
# Rounding of the result to its dtype. The interpreter truncates to bf16, while hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
_TF32 = 2.0**-11  # rounding of the results for products in tf32
TILES = {"few": 1, "many": 10**6}  # pixels for which a tile is chosen


@dataclass(frozen=True)
class Case:
    """A convolution and its place in the output."""

    shape: tuple[int, int, int, int]  # of x
    out: int
    dtype: torch.dtype = torch.float32
    fp32: str = "tf32x3"  # precision of fp32 products
    size: tuple[int, int] | None = None  # of the result, if the convolution is transposed
    before: int = 0  # channels of the output before and after the ones that are written
    after: int = 0
    film: bool = False  # whether there are scales and shifts

    def __str__(self) -> str:
        kind = f"{self.out} of {self.size}" if self.size else str(self.out)
        return f"{self.shape} to {kind}, {self.dtype}, {self.precision}{', film' if self.film else ''}"

    @property
    def precision(self) -> str:
        return self.fp32 if self.dtype == torch.float32 else "narrow"

    def output(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `guarded` images, and the channels of them that are to be written."""
        channels = self.before + self.out + self.after
        size = self.size or self.shape[2:]
        whole, out = guarded(self.shape[0], channels, *size, device=device, dtype=self.dtype)
        return whole, out, out[:, self.before : self.before + self.out]

    def pooled(self, device: torch.device) -> tuple[Tensor, Tensor]:
        batch, _, height, width = self.shape
        size = (batch, self.out, (height + 1) // 2, (width + 1) // 2)
        return guarded(*size, device=device, dtype=self.dtype)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Returns arguments with NaN around them, and sums that are spread over the bend of the log sigmoid."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(self.out, self.shape[1], 3, 3, generator=generator) * (4 / (9 * self.shape[1]) ** 0.5)
        x = torch.randn(self.shape, generator=generator)
        film = torch.randn(self.shape[0], 2 * self.out, generator=generator)
        return {
            "x": images(self.factor(x), device, self.dtype),
            "weight": images(self.factor(weights), device, self.dtype).permute(0, 2, 3, 1),
            "bias": vector(torch.randn(self.out, generator=generator), device, self.dtype),
            **({"film": rows(film, device)} if self.film else {}),
        }

    def factor(self, values: Tensor) -> Tensor:
        """Rounds fp32 as factors in this precision must be."""
        return (values.view(torch.int32) & ~0x1FFF).view(torch.float32) if self.precision == "tf32" else values

    def convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.size is None:
            return F.conv2d(x, weight.permute(0, 3, 1, 2), padding=1)
        padding = tuple(size - (2 * of - 1) for size, of in zip(self.size, self.shape[2:], strict=True))
        return F.conv_transpose2d(x, weight.permute(3, 0, 1, 2), stride=2, padding=1, output_padding=padding)

    def truth(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the argument of the log sigmoid in float64, and the error allowed for it."""
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        bias = bias[:, None, None]
        v, size = self.convolution(x, weight) + bias, self.convolution(x.abs(), weight.abs())
        error = sum_error(9 * self.shape[1], inputs["x"], self.precision) * size + EPS * (size + bias.abs())
        return modulated(v, error, inputs.get("film"))


def sum_error(terms: int, x: Tensor, precision: str) -> float:
    """Returns the error of a sum of products of x, relative to the sum of their absolute values."""
    # fp16 and bf16 products are exact; the interpreter rounds each fp32 product once, whatever the precision.
    product = (PRODUCT[precision] if x.is_cuda else EPS) if x.dtype == torch.float32 else 0.0
    return product + _ADDITION[x.device.type] * terms


def guarded(*shape: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns images of NaN, channels last, with whole samples around them, and the part between these samples.

    An offset out of bounds reaches the samples around, at least if it is not out by more than a sample.
    """
    whole = torch.empty((shape[0] + 2, *shape[1:]), device=device, dtype=dtype, memory_format=torch.channels_last)
    whole.fill_(NAN)
    return whole, whole[1:-1]


def images(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns values as `guarded` images."""
    return guarded(*values.shape, device=device, dtype=dtype)[1].copy_(values)


def vector(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns values between 16 NaNs."""
    return torch.full((len(values) + 32,), NAN, device=device, dtype=dtype)[16:-16].copy_(values)


def rows(values: Tensor, device: torch.device) -> Tensor:
    """Returns a matrix as some of the columns and rows of a wider one of NaN, which may begin at any address."""
    count, width = values.shape
    return torch.full((count + 2, width + 12), NAN, device=device)[1:-1, 4 + width % 4 : -8 + width % 4].copy_(values)


def modulated(v: Tensor, error: Tensor, film: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns images, exact to the given error, scaled and shifted if there is a film, and the error then allowed."""
    if film is None:
        return v, error
    scale, shift = film.double()[:, :, None, None].chunk(2, dim=1)
    result, size = (1 + scale) * v + shift, (1 + scale).abs() * (v.abs() + error)
    return result, (1 + scale).abs() * error + EPS * (2 * size + result.abs())


def pool(a: Tensor) -> Tensor:
    height, width = a.shape[2:]
    return F.max_pool2d(a, 2, padding=(height % 2, width % 2))


def rounded(expected: Tensor, error: Tensor, like: Tensor, precision: str = "narrow") -> Tensor:
    """Returns the error of a result after it is rounded, to a dtype or for tf32."""
    rounding = _TF32 if precision == "tf32" else (ROUNDING if like.is_cuda else _TRUNCATION)[like.dtype]
    return error + rounding * (expected.abs() + error) + (2.0**-25 if like.dtype == torch.float16 else 0)


def activation(v: Tensor, error: Tensor, like: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Returns the log sigmoid of v, which does not amplify errors, and the error of it in the dtype of ``like``."""
    a = F.logsigmoid(v)
    return a, rounded(a, error + 4e-7 + EPS * v.abs(), like, precision)  # the log sigmoid's own error


def assert_within(ours: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert ours.shape == expected.shape
    excess = (ours.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond a bound of {bound.max():.3g}"


def assert_rounded(ours: Tensor, precision: str) -> None:
    """Results for products in TF32 have 11 significant bits."""
    assert precision != "tf32" or not (ours.contiguous().view(torch.int32) & 0x1FFF).any()


def assert_fits(tile: dict[str, int], weights: int, itemsize: int) -> None:
    """The stages of a pipeline fit into the shared memory of sm_86, the smallest from sm_80 on."""
    stage = (tile["PIXELS"] + weights * tile["N"]) * tile["K"] * itemsize
    assert tile["num_stages"] * stage <= 99 * 1024, tile


def use_tile(kernel: Any, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a kernel take the tile for few or many pixels, whatever the batch."""
    choose = kernel.launch_config
    monkeypatch.setattr(kernel, "launch_config", lambda pixels, *rest: choose(TILES[tile], *rest))


class Recorder:
    """Stands for a kernel: keeps the grid and the arguments of a launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *_: Any, **constants: Any) -> None:
        self.constants = constants
        self.tile = {name: constants[name] for name in ("PIXELS", "N", "K", "num_warps", "num_stages")}


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)
