"""Networks by the name of the function that makes them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsde.factories import make
from fastsde.models import MLP

NETWORKS = """
from torch import nn

class Nets:
    class Small(nn.Linear):
        def __init__(self, width=2):
            super().__init__(width, width)

def late():
    from helper_of_late import WIDTH  # imported only when the network is made
    return Nets.Small(WIDTH)

ready, number = nn.Linear(1, 1), 3.5

def needs(width): return nn.Linear(width, width)
def other(): return {"a": 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules, of which Python's path says nothing, as for an installed command."""
    (tmp_path / "networks_of_test.py").write_text(NETWORKS)
    (tmp_path / "helper_of_late.py").write_text("WIDTH = 7\n")
    (tmp_path / "broken_of_test.py").write_text("import no_such_module_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    for name in ("networks_of_test", "helper_of_late"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_network_and_what_makes_it(folder: Path) -> None:
    net, path = MLP(), list(sys.path)
    assert make(net) is net
    assert isinstance(make(MLP), MLP)
    assert make("networks_of_test:Nets.Small").weight.shape == (2, 2)
    assert make("networks_of_test:late").weight.shape == (7, 7)
    assert make("torch.nn:Identity") is not make("torch.nn:Identity")
    assert sys.path == path


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("networks_of_test", ValueError, "model must be 'package.module:function', got 'networks_of_test'"),
        (":make", ValueError, "model must be 'package.module:function', got ':make'"),
        (".networks_of_test:late", ValueError, "model must be 'package.module:function', got '.networks_of_test:late'"),
        ("no_such_module_here:make", ValueError, "cannot be imported: No module named 'no_such_module_here'"),
        ("broken_of_test:make", ValueError, "cannot be imported: No module named 'no_such_module_here'"),
        ("networks_of_test:Nets.Large", ValueError, "'networks_of_test:Nets.Large', which cannot be imported"),
        ("networks_of_test:number", ValueError, "function that makes a network, got float from 'networks_of_test:num"),
        # The weights of a checkpoint would be written to the network that everybody else imports.
        ("networks_of_test:ready", ValueError, "function that makes a network, got Linear from 'networks_of_test:rea"),
        ("networks_of_test:needs", ValueError, "without arguments, got 'networks_of_test:needs': missing a required"),
        ("networks_of_test:other", ValueError, "model must make an nn.Module, got dict from 'networks_of_test:other'"),
        (dict, TypeError, "model must make an nn.Module, got dict"),
        (nn.Linear, TypeError, "model must be callable without arguments, got <class"),
        (3, TypeError, "model must be a function that makes a network, got int from 3"),
        (torch.zeros(2), TypeError, "model must be a function that makes a network, got Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_network_is_named(folder: Path, model: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(model)  # type: ignore[arg-type]
