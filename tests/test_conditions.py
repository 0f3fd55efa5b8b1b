"""Labels and vectors as conditions: described, checked, and by name."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsde import noise
from fastsde.conditions import Condition, completed, describe, from_dicts, null_values, to_dicts
from fastsde.data import Dataset

X = torch.arange(8.0).reshape(4, 2)


def test_conditions_stand_for_labels_or_values() -> None:
    labels, vector = Condition(classes=3, names=("a", "b", "c")), Condition(shape=(2,), null=-1)
    assert (labels.null, vector.null, Condition().null) == (3, -1.0, 0.0)
    nulls = null_values({"y": labels, "v": vector}, 2)
    assert nulls["y"].tolist() == [3, 3]
    assert nulls["y"].dtype == torch.int64
    assert nulls["v"].tolist() == [[-1.0, -1.0]] * 2
    assert nulls["v"].dtype == torch.float32
    through = json.loads(json.dumps(to_dicts({"y": labels, "v": vector})))
    assert from_dicts(through) == {"y": labels, "v": vector}


def test_labels_have_names_and_numbers() -> None:
    animals = Condition(classes=3, names=("cat", "dog", "red fox"))
    assert [animals.label(name) for name in ("dog", "0", "2", "red fox")] == [1, 0, 2, 2]
    for wrong in ("3", "-1", "Dog", "", "²"):
        with pytest.raises(
            ValueError, match=re.escape(f"number from 0 to 2 or one of cat, dog, red fox, got {wrong!r}")
        ):
            animals.label(wrong)
    digits = Condition(classes=3, names=("1", "2", "10"))  # "1" must not be the second class
    assert [digits.label(name) for name in ("1", "2", "10")] == [0, 1, 2]
    with pytest.raises(ValueError, match="label must be one of 1, 2, 10, got '0'"):
        digits.label("0")
    with pytest.raises(ValueError, match="label must be a number from 0 to 1, got '2'"):
        Condition(classes=2).label("2")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"classes": -1}, ValueError, "classes must be at least 0, got -1"),
        ({"classes": 2.0}, TypeError, "classes must be an int, got float"),
        ({"shape": 3}, TypeError, "shape must be a sequence of ints, got int"),
        ({"classes": 2, "shape": (1,)}, ValueError, "shape must be () for labels, got (1,)"),
        ({"classes": 2, "null": 0.5}, TypeError, "null must be an int, got float"),
        ({"classes": 2, "null": -1}, ValueError, "null must be at least 0, got -1"),
        ({"null": float("nan")}, ValueError, "null must be finite, got nan"),
        ({"classes": 2, "names": ("a",)}, ValueError, "one name for each of the 2 classes, got 1"),
        ({"classes": 1, "names": (1,)}, TypeError, "names must be a str, got int"),
    ],
)
def test_wrong_conditions_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Condition(**given)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([0, 2, 1, 1]), Condition(classes=3)),
        (torch.tensor([0, 2, 1, 1], dtype=torch.int32), Condition(classes=3)),
        (torch.tensor([True, False, True, True]), Condition(classes=2)),
        (np.array([0, 1, 0, 0], np.uint8), Condition(classes=2)),
        (np.array([0, 1, 0, 0], ">i2"), Condition(classes=2)),
        (np.array([5, 1, 0, 0], np.uint16), Condition(classes=6)),
        (X[:, 0], Condition()),
        (X.double(), Condition(shape=(2,))),
        (np.asfortranarray(X.numpy()), Condition(shape=(2,))),
        (torch.ones(4, 2, 3, dtype=torch.bfloat16), Condition(shape=(2, 3))),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else "",
)
def test_a_data_set_describes_its_conditions(value: Any, expected: Condition) -> None:
    dataset = Dataset("own", X, conditions={"c": value})
    assert dataset.described == {"c": expected}
    kept = dataset.conditions["c"]
    assert kept.dtype == (torch.int64 if expected.classes else torch.float32)
    assert kept.tolist() == (value if isinstance(value, Tensor) else torch.from_numpy(value.astype("f4"))).tolist()
    head = dataset.head(2)
    assert torch.equal(head.conditions["c"], kept[:2])
    assert head.described == dataset.described  # not those of the classes seen
    assert describe(kept) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"conditions": [1]}, TypeError, "conditions must be a Mapping, got list"),
        ({"conditions": {"c": [1, 2, 3, 4]}}, TypeError, "conditions['c'] must be a tensor, got list"),
        ({"conditions": {"t": X}}, ValueError, "conditions['t'] would hide the t that model(x, t) is called with"),
        ({"conditions": {"c": X[:3]}}, ValueError, "one value for each of the 4 samples, got shape [3, 2]"),
        ({"conditions": {"c": torch.tensor(1)}}, ValueError, "one value for each of the 4 samples, got shape []"),
        ({"conditions": {"c": torch.ones(4, 1, dtype=torch.int64)}}, ValueError, "labels, integers [4], or floats"),
        ({"conditions": {"c": X.cfloat()}}, ValueError, "floats [4, ...], got torch.complex64 [4, 2]"),
        ({"conditions": {"c": torch.tensor([0, 1, -1, 2])}}, ValueError, "from 0 on, below 2^24, got -1 .. 2"),
        ({"conditions": {"c": torch.tensor([0, 1, 2**40, 2])}}, ValueError, "2^24, got 0 .. 1099511627776"),
        ({"conditions": {"c": X / 0}}, ValueError, "conditions['c'] (as fp32) must be finite, got 8 values of NaN"),
        ({"conditions": {"c": np.array(["a"] * 4)}}, TypeError, "conditions['c'] must hold real numbers"),
        ({"described": {"c": Condition()}}, ValueError, "described must be of conditions (none), got 'c'"),
        (
            {"conditions": {"c": torch.arange(4)}, "described": {"c": Condition(classes=3)}},
            ValueError,
            "described['c'] must fit the values of the condition",
        ),
        (
            {"conditions": {"c": X}, "described": {"c": Condition(classes=9)}},
            ValueError,
            "described['c'] must fit the values of the condition",
        ),
        ({"conditions": {"c": X}, "described": {"c": 3}}, TypeError, "described['c'] must be a Condition, got int"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_conditions_that_fit_no_data_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Dataset("own", X, **given)


def test_more_classes_than_seen_must_be_described() -> None:
    labels = {"c": torch.tensor([0, 0, 1, 0])}
    dataset = Dataset("own", X, conditions=labels, described={"c": Condition(classes=10, null=0)})
    assert dataset.described["c"] == Condition(classes=10, null=0)
    assert dataset.to("cpu").with_shape((2,)).described == dataset.described


def test_labels_are_drawn_as_frequent_as_in_the_data() -> None:
    dataset = Dataset("own", X, conditions={"y": torch.tensor([2, 0, 2, 2])}, described={"y": Condition(classes=4)})
    condition = dataset.described["y"]
    assert condition.shares == (0.25, 0.0, 0.75, 0.0)
    assert dataset.head(2).described["y"].shares == (0.5, 0.0, 0.5, 0.0)
    assert from_dicts(json.loads(json.dumps(to_dicts({"y": condition}))))["y"].shares == condition.shares
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1 - 2.0**-24])
    assert condition.draw(u).tolist() == [0, 0, 2, 2, 2]
    assert Condition(classes=4).draw(torch.tensor([0.0, 0.25, 0.5, 0.75])).tolist() == [0, 1, 2, 3]
    keys = noise.sample_keys(1, 4000)
    drawn = completed({"y": condition}, None, keys, has_null=False)["y"]
    assert torch.equal(drawn[7:9], completed({"y": condition}, None, keys[7:9], has_null=False)["y"])
    share = float((drawn == 0).double().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert set(drawn.tolist()) == {0, 2}


def test_what_is_not_given_is_drawn_or_none() -> None:
    known = {"y": Condition(classes=2), "v": Condition(shape=(2,))}
    keys = noise.sample_keys(1, 3)
    both = completed(known, None, keys, has_null=True)  # vectors cannot be drawn, and conditions are dropped together
    assert both["y"].tolist() == [2, 2, 2]
    assert both["v"].tolist() == [[0.0, 0.0]] * 3
    given = completed(known, {"y": torch.zeros(3, dtype=torch.int64)}, keys, has_null=True)
    assert (given["y"].tolist(), given["v"].tolist()) == ([0, 0, 0], [[0.0, 0.0]] * 3)
    with pytest.raises(ValueError, match=r"model_kwargs must be given, .* got none for v"):
        completed(known, {"y": torch.zeros(3, dtype=torch.int64)}, keys, has_null=False)


@pytest.mark.parametrize("shares", [(0.5,), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_wrong_shares_are_named(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares must"):
        Condition(classes=2, shares=shares)
