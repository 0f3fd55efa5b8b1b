"""The networks inside PyTorch's wrappers."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastsde.models import MLP
from fastsde.models.unwrap import unwrap

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compiled DistributedDataParallel": lambda model: torch.compile(DistributedDataParallel(model)),
    "all": lambda model: nn.DataParallel(torch.compile(DistributedDataParallel(torch.compile(model)))),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group with only this process, which DistributedDataParallel needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_network_itself_comes_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = MLP(2, (4,))
    wrapped = wrap(model)
    wrapped.register_forward_hook(lambda *args: None)
    assert wrapped is not model
    assert unwrap(wrapped) is model


def test_an_average_gives_its_own_weights() -> None:
    model = MLP(2, (4,))
    average = AveragedModel(torch.compile(model), avg_fn=lambda mean, new, n: 0 * mean + 1)
    average.update_parameters(model), average.update_parameters(model)
    inside = unwrap(average)
    assert type(inside) is MLP
    assert all((each == 1).all() for each in inside.parameters())


def test_other_modules_come_back_as_they_are() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = self._orig_mod = MLP(2, (4,))

    for model in (Own(), MLP(), nn.Sequential(MLP())):
        assert unwrap(model) is model


def test_it_does_not_import_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it raises an error
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", None)
    fresh = runpy.run_path(sys.modules[unwrap.__module__].__file__ or "")["unwrap"]
    model = MLP()
    assert fresh(nn.DataParallel(model)) is model
