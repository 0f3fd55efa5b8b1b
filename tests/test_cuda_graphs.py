"""The tape that replaces CUDA graphs: what it refuses, that it replays what was recorded, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_graphs import TapeRecording
from launches import Launches, watching
from torch import Tensor

from fastsde.engines import CaptureError, capture


class Data:
    """The arguments of the operations below."""

    def __init__(self, device: str = "cpu") -> None:
        self.x = torch.arange(12.0, device=device).reshape(4, 3) + 1
        self.square = torch.eye(3, device=device) * 3
        self.counts = torch.tensor([1, 2, 0, 1], device=device)


WAITS: dict[str, Callable[[Data], Any]] = {
    "item": lambda d: d.x[0, 0].item(),
    "float": lambda d: float(d.x[0, 0]),
    "if": lambda d: 1 if d.x.sum() > 0 else 0,
    "index by an element": lambda d: d.x[d.counts[0]],
    "full of an element": lambda d: torch.full((2,), d.x[0, 0]),
    "is_nonzero": lambda d: torch.is_nonzero(d.x[0, 0]),
    "equal": lambda d: torch.equal(d.x, d.x.clone()),
    "allclose": lambda d: torch.allclose(d.x, d.x),
    "nonzero": lambda d: d.x.nonzero(),
    "argwhere": lambda d: torch.argwhere(d.x),
    "where": lambda d: torch.where(d.x > 2),
    "mask": lambda d: d.x[d.x > 2],
    "write to a mask": lambda d: d.x.index_put((d.x > 2,), d.x[:1, 0].expand(10)),
    "masked_select": lambda d: d.x.masked_select(d.x > 2),
    "unique": lambda d: d.x.unique(),
    "unique rows": lambda d: d.x.unique(dim=0),
    "unique_consecutive": lambda d: d.x.unique_consecutive(),
    "repeat_interleave": lambda d: d.x.repeat_interleave(d.counts, dim=0),
    "bincount": lambda d: torch.bincount(d.counts),
    "histc": lambda d: d.x.histc(5),
    "one_hot": lambda d: F.one_hot(d.counts),
    "normal": lambda d: torch.normal(d.x, d.x),
    "normal of a number": lambda d: torch.normal(0.0, d.x),
    "to_sparse": lambda d: d.x.to_sparse(),
    "tensor of a list": lambda d: torch.tensor([1.0, 2.0], device=d.x.device),
    "as_tensor": lambda d: torch.as_tensor([1, 2], device=d.x.device),
    "index by a list": lambda d: d.x[[0, 1]],
    "cpu": lambda d: d.x.cpu(),
    "to cpu": lambda d: d.x.to("cpu"),
    "to cpu by name": lambda d: d.x.to(device="cpu", dtype=torch.float64),
    "tolist": lambda d: d.x.tolist(),
}
# Without what NumPy cannot read from a GPU at all, and linear algebra, which depends on the library.
ON_THE_TAPE: dict[str, Callable[[Data], Any]] = {
    "numpy": lambda d: d.x.numpy(),
    "array": lambda d: np.asarray(d.x),
    "inv": lambda d: torch.linalg.inv(d.square),
    "cholesky": lambda d: torch.linalg.cholesky(d.square),
    "cholesky_ex": lambda d: torch.linalg.cholesky_ex(d.square, check_errors=True),
    "solve": lambda d: torch.linalg.solve(d.square, d.square),
    "lu_factor": lambda d: torch.linalg.lu_factor(d.square),
    "eigh": lambda d: torch.linalg.eigh(d.square),
    "eig": lambda d: torch.linalg.eig(d.square),
    "svd": lambda d: torch.linalg.svd(d.square),
    "pinv": lambda d: torch.linalg.pinv(d.square),
    "matrix_rank": lambda d: torch.linalg.matrix_rank(d.square),
    "matrix_exp": lambda d: torch.linalg.matrix_exp(d.square),
    "lstsq": lambda d: torch.linalg.lstsq(d.square, d.square),
}
DOES_NOT_WAIT: dict[str, Callable[[Data], Any]] = {
    "index": lambda d: d.x[d.counts],
    "write to an index": lambda d: d.x.index_put((d.counts,), d.x, accumulate=True),
    "a number to a mask": lambda d: d.x.clone().__setitem__(d.x > 2, 0.0),
    "masked_fill": lambda d: d.x.masked_fill(d.x > 2, 0.0),
    "where of three": lambda d: torch.where(d.x > 2, d.x, -d.x),
    "repeat_interleave of a known size": lambda d: d.x.repeat_interleave(d.counts, dim=0, output_size=4),
    "histc of known limits": lambda d: d.x.histc(5, 0, 12),
    "a number": lambda d: d.x * torch.tensor(2.0),
    "normal of numbers": lambda d: torch.normal(0.0, 1.0, (3,), device=d.x.device),
    "multinomial": lambda d: torch.multinomial(d.x, 1),  # which checks its argument on the device
    "multinomial, more than one": lambda d: torch.multinomial(d.x, 2),
    "multinomial, with replacement": lambda d: torch.multinomial(d.x, 2, replacement=True),
    "randperm": lambda d: torch.randperm(5, device=d.x.device),
    "inv_ex": lambda d: torch.linalg.inv_ex(d.square),
    "dtype": lambda d: d.x.to(torch.float64),
    "device": lambda d: d.x.to(d.x.device),
    "_assert_async": lambda d: torch._assert_async(d.x[0, 0]),
}


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> TapeRecording:
    monkeypatch.setattr(TapeRecording, "made", [])
    monkeypatch.setattr(TapeRecording, "recorded", [])
    made = TapeRecording(torch.device("cpu"))
    made.warm_up(lambda: None)
    return made


def recorded(made: capture.Recording, runs: dict[str, Callable[[Data], Any]], data: Data) -> list[str]:
    """Returns which of them can be recorded."""
    names = []
    for name, run in runs.items():
        made.warm_up(lambda run=run: run(data))  # type: ignore[misc]
        try:
            made.record(lambda run=run: run(data))  # type: ignore[misc]
            names.append(name)
        except CaptureError:
            continue
    return names


def test_what_waits_for_the_device_cannot_be_recorded(recording: TapeRecording) -> None:
    data = Data()
    assert recorded(recording, WAITS | ON_THE_TAPE, data) == []
    assert recorded(recording, DOES_NOT_WAIT, data) == list(DOES_NOT_WAIT)
    with pytest.raises(CaptureError, match=r"stream is capturing: aten\.equal\.default waits for the device"):
        recording.record(lambda: WAITS["equal"](data))


@pytest.mark.gpu
def test_cuda_waits_where_the_tape_says_so() -> None:
    made = capture.Recording(torch.device("cuda", torch.cuda.current_device()))
    assert recorded(made, WAITS, Data("cuda")) == []
    runs = {name: run for name, run in DOES_NOT_WAIT.items() if name != "inv_ex"}  # depending on the library
    assert recorded(made, runs, Data("cuda")) == list(runs)


def test_a_replay_reads_and_writes_the_memory_that_was_recorded(recording: TapeRecording) -> None:
    x, y, seen = torch.ones(3), torch.zeros(3), []

    def run() -> None:
        seen.append(None)
        y.add_(2 * x)

    replay = recording.record(run)
    assert torch.equal(y, torch.zeros(3))  # recording changes no memory
    x.fill_(3)
    replay()
    replay()
    assert torch.equal(y, torch.full((3,), 12.0))
    assert len(seen) == 1


def test_a_thread_records_only_what_it_has_warmed_up(recording: TapeRecording) -> None:
    with pytest.raises(AssertionError, match="warm_up must be called in a thread before it records"):
        TapeRecording(torch.device("cpu")).record(lambda d: None)


def test_launches_are_what_reads_or_writes_elements(recording: TapeRecording) -> None:
    x = torch.ones(2, 3)

    def run() -> Tensor:
        y = torch.empty_like(x).t()[0]
        y.copy_(x[:, 0])
        return torch.cat((y, x.reshape(6))).exp_().sum()

    names = ["copy_", "cat", "exp_", "sum"]
    with watching(Launches()) as launches:
        run()
    assert launches.names == names
    replay = recording.record(run)
    assert TapeRecording.recorded[-1] == names
    with watching(Launches()) as launches:
        replay()
    assert launches.names == ["replay"]
