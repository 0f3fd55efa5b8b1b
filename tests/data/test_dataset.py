"""Data of every kind: used correctly, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from fastsde.data import Dataset

NUMBERS = torch.tensor([[0.5, -2.0], [0.25, 3.0], [8.0, 1.0]])
PIXELS = torch.arange(24, dtype=torch.uint8).reshape(2, 1, 3, 4) * 10


@pytest.mark.parametrize(
    "given",
    [
        NUMBERS,
        NUMBERS.double(),
        NUMBERS.half(),
        NUMBERS.bfloat16(),
        NUMBERS.T.contiguous().T,
        NUMBERS.clone().requires_grad_(),
        NUMBERS.numpy(),
        NUMBERS.double().numpy(),
        NUMBERS.half().numpy(),
        NUMBERS.numpy().astype(np.longdouble),
        NUMBERS.numpy().astype(">f4"),
        NUMBERS.flip(0).numpy()[::-1],
        np.asfortranarray(NUMBERS.numpy()),
        np.broadcast_to(NUMBERS.numpy(), (3, 2)),  # read-only
    ],
    ids=lambda given: f"{type(given).__name__}-{given.dtype}-{'x'.join(map(str, given.shape))}",
)
def test_numbers_of_any_kind_are_kept_in_fp32(given: torch.Tensor | np.ndarray) -> None:
    dataset = Dataset("own", given)
    assert dataset.x.dtype == torch.float32
    assert dataset.x.is_contiguous()
    assert not dataset.x.requires_grad
    assert torch.equal(dataset.x, NUMBERS)
    assert (len(dataset), dataset.shape, dataset.scale, dataset.shift) == (3, (2,), 1.0, 0.0)
    assert dataset.value_range is dataset.seen_range is None
    assert dataset.with_pixel_range((0, 1)) is dataset


@pytest.mark.parametrize("given", [PIXELS, PIXELS.numpy()], ids=["tensor", "array"])
def test_pixels_wait_for_a_range(given: torch.Tensor | np.ndarray) -> None:
    dataset = Dataset("own", given)
    assert torch.equal(dataset.x, PIXELS)
    assert (dataset.scale, dataset.shift, dataset.value_range, dataset.seen_range) == (None, None, (0.0, 255.0), None)
    mapped = dataset.with_pixel_range((-1, 1))
    assert (mapped.scale, mapped.shift, mapped.seen_range) == (2 / 255, -1.0, (-1.0, 1.0))
    assert mapped.with_pixel_range((0, 1)) is mapped
    own = Dataset("own", given, scale=np.float32(0.5))  # the user's own scale is kept
    assert (own.with_pixel_range((0, 1)).scale, own.shift, own.seen_range) == (0.5, 0.0, (0.0, 127.5))
    assert Dataset("own", given, scale=-1 / 255, shift=1.0).seen_range == (0.0, 1.0)
    levels = Dataset("own", given, value_range=(0, 15)).with_pixel_range((-1, 1))
    assert (levels.scale, levels.shift, levels.seen_range) == (2 / 15, -1.0, (-1.0, 1.0))


@pytest.mark.parametrize("given", [PIXELS > 100, (PIXELS > 100).numpy()], ids=["tensor", "array"])
def test_black_and_white_images_become_pixels(given: torch.Tensor | np.ndarray) -> None:
    dataset = Dataset("own", given).with_pixel_range((-1, 1))
    assert torch.equal(dataset.x, torch.where(PIXELS > 100, 255, 0).to(torch.uint8))
    assert dataset.seen_range == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, (0, 1)), (0.25, 0.5, (0, 1)), (-0.5, 0.5, (-1, 1)), (-1, 1, (-1, 1)), (-0.5, 2, (-0.5, 2)), (5, 5, None)],
)
def test_the_range_of_float_images_is_found(low: float, high: float, expected: tuple[float, float] | None) -> None:
    images = torch.linspace(low, high, 96).reshape(2, 3, 4, 4)
    assert Dataset("own", images).value_range == expected
    assert Dataset("own", images, value_range=(0, 9)).value_range == (0, 9)
    scaled = Dataset("own", images, scale=2, shift=-1).seen_range
    assert scaled == (None if expected is None else tuple(2 * value - 1 for value in expected))
    assert Dataset("own", images.repeat(1, 2, 1, 1)).value_range is None  # six channels are not an image


def test_images_come_in_the_layout_of_the_model() -> None:
    images = torch.rand(2, 3, 4, 5)
    last = Dataset("own", images.movedim(1, -1))
    assert last.value_range is None
    fitted = last.with_shape((3, 4, 5))
    assert torch.equal(fitted.x, images)
    assert fitted.x.is_contiguous()
    assert fitted.value_range == (0.0, 1.0)
    plain = Dataset("own", images[:, 0])
    assert torch.equal(plain.with_shape((1, 4, 5)).x, images[:, :1])
    assert torch.equal(Dataset("own", images[:, 0, ..., None]).with_shape([1, 4, 5]).x, images[:, :1])
    same = Dataset("own", torch.rand(2, 3, 3, 3))
    assert same.with_shape((3, 3, 3)) is same
    for dataset, shape in ((last, (3, 5, 4)), (plain, (4, 5, 1)), (plain, (20,)), (last, (1, 4, 5))):
        message = f"the model takes samples of shape {shape}, the data have {dataset.shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            dataset.with_shape(shape)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor or a NumPy array, got list"),
        ({"x": NUMBERS.long()}, TypeError, "got torch.int64: convert it to torch.uint8 if it holds pixels"),
        ({"x": NUMBERS.numpy().astype(np.uint16)}, TypeError, "got torch.uint16: convert it to torch.uint8"),
        ({"x": NUMBERS.cfloat()}, TypeError, "x must be uint8 (pixels), bool or floating-point, got torch.complex64"),
        ({"x": np.array(["a"])}, TypeError, "x must hold real numbers, got an array of <U1"),
        ({"x": np.array([None])}, TypeError, "x must hold real numbers, got an array of object"),
        ({"x": np.ones(3, complex)}, TypeError, "x must hold real numbers, got an array of complex128"),
        ({"x": NUMBERS[:0]}, ValueError, "at least one sample and one element, got [0, 2]"),
        ({"x": NUMBERS[:, :0].numpy()}, ValueError, "at least one sample and one element, got [3, 0]"),
        ({"x": np.array(1.0)}, ValueError, "x must be [N, *shape] with at least one sample and one element, got []"),
        ({"x": NUMBERS.to_sparse()}, ValueError, "x must be dense and hold data, got torch.sparse_coo on cpu"),
        ({"x": NUMBERS.to("meta")}, ValueError, "x must be dense and hold data, got torch.strided on meta"),
        ({"x": NUMBERS / 0}, ValueError, "x (as fp32) must be finite, got 6 values of NaN or infinity"),
        ({"x": np.array([np.nan, 1.0])}, ValueError, "x (as fp32) must be finite, got 1 values of NaN"),
        ({"x": NUMBERS.double() * 1e38}, ValueError, "x (as fp32) must be finite, got 1 values of NaN or infinity"),
        ({"name": None}, TypeError, "name must be a str, got NoneType"),
        ({"scale": 0}, ValueError, "scale must be finite and not 0, got 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and not 0, got nan"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"shift": float("inf")}, ValueError, "shift must be finite, got inf"),
        ({"shift": torch.zeros(())}, TypeError, "shift must be a number, got Tensor"),
        ({"scale": 1e38}, ValueError, "scale * x + shift must be finite in fp32, got up to 8e+38"),
        ({"value_range": (1, 0)}, ValueError, "value_range must be (low, high) with low < high"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_cannot_be_trained_on_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Dataset(**{"name": "own", "x": NUMBERS, **given})
