"""Data sets that are loaded item by item: items of every form, used correctly or refused by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsde.conditions import Condition
from fastsde.data import Dataset, StreamedDataset, in_memory
from fastsde.data.streamed import as_dataset

LABEL = {"label": Condition(classes=3)}
GREY = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("item", "shape", "dtype", "conditions"),
    [
        (torch.ones(2), (2,), torch.float32, {}),
        (np.ones(2), (2,), torch.float32, {}),
        (np.ones((2, 3), ">f8").T, (3, 2), torch.float32, {}),
        (torch.tensor(1.5), (), torch.float32, {}),
        (torch.ones(3, dtype=torch.bool), (3,), torch.uint8, {}),
        ((torch.ones(2),), (2,), torch.float32, {}),
        ([torch.ones(2), 2], (2,), torch.float32, {"label": 2}),
        ((torch.ones(2), np.int64(1)), (2,), torch.float32, {"label": 1}),
        ((torch.ones(2), torch.tensor(1, dtype=torch.int32)), (2,), torch.float32, {"label": 1}),
        ((torch.ones(2), True), (2,), torch.float32, {"label": 1}),
        ((torch.ones(2), {"a": [1.0, 2.0], "b": 0.5}), (2,), torch.float32, {"a": [1.0, 2.0], "b": 0.5}),
        ({"x": torch.ones(2), "a": np.array([1, 2], ">f4")}, (2,), torch.float32, {"a": [1.0, 2.0]}),
        (GREY, (1, 3, 4), torch.uint8, {}),
        ((GREY.convert("RGB"), 0), (3, 3, 4), torch.uint8, {"label": 0}),
        (GREY.convert("P"), (3, 3, 4), torch.uint8, {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (dict, str)) else "",
)
def test_items_of_any_form(item: Any, shape: Any, dtype: torch.dtype, conditions: dict[str, Any]) -> None:
    dataset = StreamedDataset("own", [item, item], described=LABEL)
    assert (len(dataset), dataset.shape, dataset.dtype) == (2, shape, dtype)
    x, given = dataset.item(1)
    assert (tuple(x.shape), x.dtype) == (shape, dtype)
    assert {name: value.tolist() for name, value in given.items()} == conditions
    assert all(value.dtype in (torch.int64, torch.float32) for value in given.values())
    loaded = in_memory([item, item], "own")
    assert (len(loaded), loaded.shape, loaded.dtype) == (2, shape, dtype)
    assert {name: value[1].tolist() for name, value in loaded.conditions.items()} == conditions


def test_pixels_shapes_and_classes_are_as_of_data_in_memory() -> None:
    class Folder(list[Any]):
        classes = ("cat", "dog")

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    streamed, loaded = (
        make("own", Folder([(pixels, 1)] * 3)) for make in (StreamedDataset, lambda n, s: in_memory(s, n))
    )
    for dataset in (streamed, loaded):
        assert dataset.described == {"label": Condition(classes=2, names=("cat", "dog"))}
        mapped = dataset.with_shape((3, 2, 4)).with_pixel_range((0, 1))
        assert (mapped.shape, mapped.scale, mapped.shift, mapped.seen_range) == ((3, 2, 4), 1 / 255, 0.0, (0.0, 1.0))
        assert mapped.with_pixel_range((-1, 1)) is mapped
        assert len(mapped.head(2)) == 2
        assert mapped.head(2).described == dataset.described
    assert torch.equal(streamed.with_shape((3, 2, 4)).item(0)[0], torch.from_numpy(pixels).movedim(-1, 0))
    floats = StreamedDataset("own", [torch.rand(4, 5, 3)]).with_shape((3, 4, 5))
    assert floats.seen_range == (0.0, 1.0)
    assert StreamedDataset("own", [torch.rand(2)]).seen_range is None
    with pytest.raises(ValueError, match=r"the model takes samples of shape \(3,\), the data have \(2, 4, 3\)"):
        streamed.with_shape((3,))


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([torch.ones(2, dtype=torch.int64)], TypeError, "item 0 must be uint8 (pixels), bool or floating-point"),
        ([1.5], TypeError, "item 0 must be a tensor or a NumPy array, got float"),
        (["a.png"], TypeError, "item 0 must be a tensor or a NumPy array, got str"),
        ([(torch.ones(2), 1, 2)], TypeError, "item 0 must be x, (x, label) or (x, conditions), got 3 values"),
        ([{"image": torch.ones(2)}], TypeError, "item 0 must have an 'x', got image"),
        ([(torch.ones(2), "cat")], TypeError, "item 0 must have a number or an array as label, got str"),
        ([(torch.ones(2), None)], TypeError, "item 0 must have a number or an array as label, got NoneType"),
        ([(torch.ones(2), 1j)], TypeError, "item 0 must have real numbers as label, got torch.complex64"),
        ([(torch.ones(2), 3)], ValueError, "item 0 of own has a wrong label: it must be a label from 0 to 2, got 3"),
        ([(torch.ones(2), -1)], ValueError, "it must be a label from 0 to 2, got -1"),
        ([(torch.ones(2), 1.5)], ValueError, "it must be a label, one integer, got torch.float32 []"),
        ([(torch.ones(2), [1])], ValueError, "it must be a label, one integer, got torch.int64 [1]"),
        ([(torch.ones(2), {"y": 1})], ValueError, "described must say how many classes the condition 'y' has"),
        ([{"x": torch.ones(2), "t": 0.5}], ValueError, "would hide the t that model(x, t) is given"),
        ([torch.ones(2) / 0], ValueError, "item 0 of own (as fp32) must be finite, got 2 values of NaN or infinity"),
        ([], ValueError, "source must have at least one item, got none"),
        (3, TypeError, "source must have a length and items, got int"),
    ],
    ids=lambda value: value[:48] if isinstance(value, str) else "",
)
def test_a_first_item_that_cannot_be_trained_on(items: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StreamedDataset("own", items, described=LABEL)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((torch.ones(3), 1), "item 1 of own: the model takes samples of shape (2,), the data have (3,)"),
        ((torch.ones(2, dtype=torch.uint8), 1), "item 1 of own must be torch.float32 like the first one"),
        ((torch.tensor([1.0, float("inf")]), 1), "item 1 of own (as fp32) must be finite, got 1 values"),
        (torch.ones(2), "item 1 of own must have the conditions ['label'], got []"),
        ((torch.ones(2), {"y": 1}), "item 1 of own must have the conditions ['label'], got ['y']"),
        ((torch.ones(2), 7), "item 1 of own has a wrong label: it must be a label from 0 to 2, got 7"),
        ((torch.ones(2), 1.0), "it must be a label, one integer, got torch.float32 []"),
    ],
    ids=lambda value: value[:48] if isinstance(value, str) else "",
)
def test_an_item_unlike_the_first_is_named(second: Any, message: str) -> None:
    dataset = StreamedDataset("own", [(torch.ones(2), 1), second], described=LABEL)
    with pytest.raises(ValueError, match=re.escape(message)):
        dataset.item(1)


def test_vectors_must_keep_their_shape_and_be_finite() -> None:
    items = [{"x": torch.ones(2), "c": [1.0, 2.0]}, {"x": torch.ones(2), "c": [1.0]}]
    items.append({"x": torch.ones(2), "c": [1.0, float("nan")]})
    dataset = StreamedDataset("own", items)
    for index, message in ((1, r"floating-point of shape \[2\], got torch.float32 \[1\]"), (2, "finite, got NaN")):
        with pytest.raises(ValueError, match=f"item {index} of own has a wrong c: it must be {message}"):
            dataset.item(index)


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.ones(2)


def test_what_is_a_data_set() -> None:
    plain, streamed = Dataset("a", torch.ones(3, 2)), StreamedDataset("b", [torch.ones(2)])
    assert as_dataset(plain) is plain
    assert as_dataset(streamed) is streamed
    assert as_dataset(np.ones((3, 2)), "c").name == "c"
    assert as_dataset([torch.ones(2)]).name == "list"
    tensors = torch.utils.data.TensorDataset(torch.ones(3, 2), torch.arange(3))
    assert in_memory(tensors).described == {"label": Condition(classes=3)}
    for wrong in (Endless(), {"x": torch.ones(3, 2)}, "points.npy", iter([1]), 3):
        for function in (as_dataset, in_memory):
            with pytest.raises(TypeError, match=r"dataset must be a fastsde.data.Dataset, an array .*, got"):
                function(wrong)


def test_all_items_in_memory_must_be_alike() -> None:
    for second in (torch.ones(3), (torch.ones(2), 1), torch.ones(2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"conditions of the first, x: torch.float32 \[2\], got .* in item 1"):
            in_memory([torch.ones(2), second])
    for second in (1.0, torch.ones(2)):  # a label that is no integer would make vectors of all
        with pytest.raises(ValueError, match=r"of the first, label: torch.int64 \[\], x: torch.float32 \[2\], got"):
            in_memory([(torch.ones(2), 0), (torch.ones(2), second)])
    with pytest.raises(ValueError, match="dataset must have at least one item, got none"):
        in_memory([])
