"""Networks that take labels and vectors: what stands for none, and wrong values by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsde.models import MLP, UNet, from_config
from fastsde.models.labels import LabelEmbedding

X, T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.rand(3)
LABEL, VECTOR = torch.tensor([0, 2, 1]), torch.tensor([[1.0], [2.0], [3.0]])


@pytest.fixture(scope="module")
def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(2, (8, 8), "SiLU", classes=3, condition=1)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(1, 4, (4, 8), embedding=8, classes=3)
    for level in model.modulation.levels:  # which start at zero
        torch.nn.init.normal_(level.weight)
    return model


def test_the_last_label_is_none(mlp: MLP, unet: UNet) -> None:
    none = torch.full((3,), 3)
    for model, x in ((mlp, X), (unet, torch.randn(3, 1, 4, 4))):
        assert torch.equal(model(x, T), model(x, T, none))
        assert not torch.allclose(model(x, T), model(x, T, LABEL))
        for dtype in (torch.int32, torch.uint8, torch.int16):
            assert torch.equal(model(x, T, LABEL.to(dtype)), model(x, T, LABEL))
        one = model(x[1:2], T[1:2], LABEL[1:2])
        torch.testing.assert_close(one, model(x, T, LABEL)[1:2])


def test_a_vector_of_zeros_is_none(mlp: MLP) -> None:
    assert torch.equal(mlp(X, T, LABEL), mlp(X, T, LABEL, torch.zeros(3, 1)))
    assert not torch.allclose(mlp(X, T, LABEL), mlp(X, T, LABEL, VECTOR))
    assert torch.equal(mlp(X, T, LABEL, VECTOR.double()), mlp(X, T, LABEL, VECTOR))


def test_what_conditions_add_is_added_to_the_first_layer(mlp: MLP) -> None:
    h = mlp.net[0](torch.cat((X, T[:, None]), 1)) + mlp.labels.weight[LABEL] + VECTOR * mlp.vectors.weight[:, 0]
    torch.testing.assert_close(mlp(X, T, LABEL, VECTOR), mlp.net[1:](h))


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (torch.tensor([0, 1, 4]), IndexError, "out of range"),
        (torch.tensor([0, -1, 1]), IndexError, "out of range"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "label must be integers, got torch.float32"),
        (LABEL[:, None], ValueError, r"label must have shape \[B\], got \[3, 1\]"),
    ],
)
def test_wrong_labels_are_named(mlp: MLP, label: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mlp(X, T, label)


def test_conditions_without_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="label must be None for a MLP that was built without it, got a value"):
        MLP()(X, T, LABEL)
    with pytest.raises(TypeError, match="condition must be None for a MLP that was built without it, got a value"):
        MLP(classes=3)(X, T, condition=VECTOR)
    with pytest.raises(TypeError, match="label must be None for a UNet"):
        UNet(1, 4, (4, 8), embedding=8)(torch.zeros(3, 1, 4, 4), T, LABEL)
    with pytest.raises(ValueError, match="hidden must have a layer for classes or condition to be added to"):
        MLP(2, (), classes=3)
    with pytest.raises(ValueError, match="embedding must be positive for a network with classes, got 0"):
        UNet(classes=3)
    for wrong, error in ((-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="classes must be"):
            MLP(classes=wrong)


def test_the_config_has_only_what_is_used(mlp: MLP, unet: UNet) -> None:
    assert (mlp.config["classes"], mlp.config["condition"]) == (3, 1)
    assert not MLP().config.keys() & {"classes", "condition"}  # as in checkpoints from before
    for model in (mlp, unet):
        made = from_config(model.config)
        made.load_state_dict(model.state_dict())
        assert made.config == model.config


def test_the_row_of_no_label_is_trained_only_with_dropped_labels() -> None:
    embedding = LabelEmbedding(3, 4)
    embedding(LABEL).sum().backward()
    assert embedding.weight.grad.sum(1).tolist() == [4, 4, 4, 0]
    embedding.zero_grad()
    embedding(None, T).sum().backward()
    assert embedding.weight.grad.sum(1).tolist() == [0, 0, 0, 12]
