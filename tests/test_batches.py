"""``max_batch="auto"`` finds the fastest batch that fits into memory, without changing a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import Sampler
from fastsde.engines import batches
from fastsde.models import MLP


def out_of_memory(batch: int) -> float:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("seconds", "n", "expected"),
    [
        (lambda b: 1.0, 1000, 1000),  # launch-bound: the larger, the better
        (lambda b: float(b), 1000, 16),  # nothing to gain: the least memory, in parts of 15.9
        (lambda b: 1 + b / 1000, 5, 5),
        (lambda b: max(1.0, b / 64), 1000, 63),  # device-bound from 64 on: 16 equal parts
        (lambda b: b * (1 if b <= 100 else 3), 1000, 16),  # a cache that overflows
        (lambda b: 1.0 if b <= 300 else out_of_memory(b), 1000, 250),
        (lambda b: 1.0 if b <= 5 else out_of_memory(b), 1000, 4),
        (lambda b: 1.0 if b <= 5 else out_of_memory(b), 10, 5),
        (lambda b: 1.0 if b == 1 else out_of_memory(b), 7, 1),
    ],
)
def test_the_fastest_batch_is_found_and_parts_are_equal(seconds: Any, n: int, expected: int) -> None:
    assert batches.fastest(seconds, n) == expected


def test_what_does_not_fit_at_all_is_an_error_and_another_error_is_one_too() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        batches.fastest(out_of_memory, 100)

    def broken(batch: int) -> float:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        batches.fastest(broken, 100)


def test_the_search_ends_where_a_larger_batch_is_clearly_worse() -> None:
    tried: list[int] = []

    def seconds(batch: int) -> float:
        tried.append(batch)
        return batch ** (0.5 if batch <= 64 else 2.0)

    batches.fastest(seconds, 10_000)
    assert tried == [16, 32, 64, 128]


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert batches.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert batches.is_out_of_memory(error.value)
    assert not batches.is_out_of_memory(RuntimeError("another"))


class Memory:
    """A network that runs out of memory above some batch size, but only after some calls."""

    def __init__(self, most: int, after: int) -> None:
        self.most, self.after, self.calls, self.batches = most, after, 0, set()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.most and self.calls > self.after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.add(len(x))
        return torch.sin(x) - x


@pytest.mark.parametrize("trajectory", [None, 2])
@pytest.mark.parametrize("after", [0, 60])
def test_memory_that_runs_out_halves_the_batch_and_changes_no_sample(after: int, trajectory: int | None) -> None:
    options: dict[str, Any] = {"steps": 6, "trajectory": trajectory, "seed": 3}
    expected = fastsde.sample(lambda x, t: torch.sin(x) - x, (100, 3), backend="eager", **options)
    model = Memory(20, after)
    found = fastsde.sample(model, (100, 3), max_batch="auto", backend="eager", **options)
    for ours, theirs in zip(found, expected, strict=True) if trajectory else [(found, expected)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_one_sample_that_does_not_fit_and_a_batch_that_was_asked_for_are_errors() -> None:
    for max_batch in ("auto", 50, None):
        with pytest.raises(torch.OutOfMemoryError):
            fastsde.sample(Memory(0, 0), (100, 3), steps=3, max_batch=max_batch)


def test_the_batch_is_measured_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    monkeypatch.setattr(batches, "fastest", lambda seconds, n: searches.append(n) or 40)
    model, seen = MLP(), []
    expected = fastsde.sample(model, (100, 2), steps=3, backend="eager")
    for _ in range(2):
        sampler = Sampler(model, (2,), steps=3, max_batch="auto", backend="eager")
        x = sampler(100, callback=lambda row, time, x: seen.append(len(x)))
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert searches == [100]
    assert seen == 2 * [40, 40, 40, 40, 40, 40, 20, 20, 20]
    sampler(50)
    assert searches == [100, 50]


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_small_counts(n: int) -> None:
    x = fastsde.sample(MLP(), (n, 2), steps=2, max_batch="auto")
    assert x.shape == (n, 2)


def test_conditions_and_guidance_are_tried_with_their_part() -> None:
    def model(x: Tensor, t: Tensor, c: Tensor, scale: float) -> Tensor:
        assert len(c) == len(x)
        return scale * c - x

    options: dict[str, Any] = {"steps": 3, "guidance": 2.0, "model_kwargs": {"c": torch.randn(40, 3), "scale": 0.5}}
    options["uncond_kwargs"] = {"c": torch.zeros(40, 3), "scale": 0.5}
    expected = fastsde.sample(model, (40, 3), **options)
    torch.testing.assert_close(fastsde.sample(model, (40, 3), max_batch="auto", **options), expected, rtol=0, atol=1e-6)


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="max_batch must be an int, 'auto' or None, got 'all'"):
        Sampler(MLP(), (2,), max_batch="all")
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        Sampler(MLP(), (2,), max_batch=0)
