"""Copies to the host that do not wait for later work."""

from __future__ import annotations

import pytest
import torch

from fastsde.engines.fetch import Fetch


def test_on_the_cpu_it_is_there_at_once() -> None:
    fetch = Fetch(torch.tensor(3.0))
    assert fetch.is_ready()
    assert fetch.wait().item() == 3.0


@pytest.mark.gpu
def test_it_waits_for_its_own_copy_alone_and_takes_the_value_of_its_time() -> None:
    value, large = torch.full((3,), 2.0, device="cuda"), torch.randn(8192, 8192, device="cuda")
    fetch = Fetch(value)
    value.fill_(5.0)
    for _ in range(50):
        large = (large @ large).clamp_(-1, 1)  # long enough to notice if something waits for it
    after = torch.cuda.Event()
    after.record()
    assert fetch.wait().tolist() == [2.0] * 3
    assert fetch.is_ready()
    assert not after.query()
    torch.cuda.synchronize()
