"""The registry of activations: from a name to a module, and back."""

from __future__ import annotations

import pytest
from torch import nn

from fastsde.models.activations import ACTIVATIONS, name_of


class _Subclass(nn.SiLU):
    pass


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_module_has_the_name_that_it_is_built_by(name: str) -> None:
    assert name_of(ACTIVATIONS[name].build()) == name


def test_options_count_where_they_change_the_function() -> None:
    assert name_of(nn.ReLU(inplace=True)) == "ReLU"
    assert name_of(nn.GELU("tanh")) == "GELU_tanh"
    assert name_of(nn.Softplus(1, 30)) == "Softplus"
    for module in (
        nn.Softplus(2.0),
        nn.Softplus(1.0, 10.0),
        _Subclass(),
        nn.ELU(2.0),
        nn.LeakyReLU(0.2),
        nn.Linear(2, 2),
    ):
        assert name_of(module) is None
