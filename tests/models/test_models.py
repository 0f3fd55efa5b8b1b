"""The shipped architectures: exactly the tutorial's by default, and general in size."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsde
from fastsde.models import MLP, UNet, from_config
from fastsde.models.activations import ACTIVATIONS


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.rand(shape[0], generator=generator)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet()


# U-Net --------------------------------------------------------------------------------------------------------------


def test_unet_has_the_tutorials_parameters(unet):
    assert count(unet) == 2_361_409
    assert all(parameter.dtype == torch.float32 for parameter in unet.parameters())
    assert unet.shape == (1, 28, 28)


def test_unet_layers_have_the_tutorials_sizes(unet):
    shapes: list[tuple[int, ...]] = []
    layers = [layer for layer in unet.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    hooks = [layer.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape[1:]))) for layer in layers]
    try:
        unet(*inputs(2, 1, 28, 28))
    finally:
        for hook in hooks:
            hook.remove()
    encoder = [(32, 28, 28), (64, 14, 14), (128, 7, 7), (256, 4, 4), (256, 2, 2)]
    decoder = [(256, 4, 4), (128, 7, 7), (64, 14, 14), (32, 28, 28)]
    assert shapes == [*encoder, *decoder, (32, 28, 28), (1, 28, 28)]


def straight_line_unet(weights: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The tutorial's U-Net written out: eleven layers one after the other."""
    w = iter(weights)

    def activate(y: Tensor) -> Tensor:
        return -F.softplus(-y)  # log sigmoid

    def conv(y: Tensor) -> Tensor:
        return F.conv2d(y, next(w), next(w), stride=1, padding=1)

    def up(y: Tensor, extra: int) -> Tensor:
        return F.conv_transpose2d(y, next(w), next(w), stride=2, padding=1, output_padding=extra)

    time = torch.ones(len(x), 1, 28, 28, dtype=x.dtype) * t.reshape(-1, 1, 1, 1)
    at_28 = activate(conv(torch.cat((x, time), 1)))
    at_14 = activate(conv(F.max_pool2d(at_28, 2, 2)))
    at_7 = activate(conv(F.max_pool2d(at_14, 2, 2)))
    # 7 to 4: an edge of minus infinity around, so that the windows are columns (edge, 0), (1, 2), (3, 4), (5, 6).
    edged = F.pad(at_7, (1, 1, 1, 1), value=-float("inf"))
    at_4 = activate(conv(F.max_pool2d(edged, 2, 2)))
    at_2 = activate(conv(F.max_pool2d(at_4, 2, 2)))
    y = activate(up(at_2, 1))
    y = activate(up(torch.cat((y, at_4), 1), 0))
    y = activate(up(torch.cat((y, at_7), 1), 1))
    y = activate(up(torch.cat((y, at_14), 1), 1))
    y = conv(activate(conv(torch.cat((y, at_28), 1))))
    assert next(w, None) is None
    return y


def test_unet_is_the_straight_line_one(unet):
    x, t = inputs(3, 1, 28, 28)
    # In float64, where rounding (some 2000 terms a sum, 11 layers) is far below any mistake.
    model = from_config(unet.config).double()
    model.load_state_dict(unet.state_dict())
    exact = straight_line_unet([p.detach().double() for p in unet.parameters()], x.double(), t.double())
    with torch.no_grad():
        torch.testing.assert_close(model(x.double(), t.double()), exact, atol=1e-12, rtol=1e-12)
        # fp32: every layer rounds sums of at most 4608 products, whose error grows like the root, 68 u, relative to
        # signals of size 1; there are 11 layers, none of which amplifies errors.
        torch.testing.assert_close(unet(x, t).double(), exact, atol=11 * 68 * 2.0**-24, rtol=0)
    assert exact.std() > 1e-2  # there is something to compare


def test_unet_of_two_levels_is_the_straight_line_one_on_a_half_odd_rectangle():
    torch.manual_seed(0)
    model = UNet(3, (7, 16), (4, 8)).double()
    x, t = inputs(2, 3, 7, 16)
    x, t = x.double(), t.double()
    w = [parameter.detach() for parameter in model.parameters()]
    top = F.logsigmoid(F.conv2d(torch.cat((x, t.reshape(2, 1, 1, 1).expand(2, 1, 7, 16)), 1), w[0], w[1], padding=1))
    # Only the odd side, 7, is rounded up, to 4.
    pooled = F.max_pool2d(F.pad(top, (0, 0, 1, 1), value=-float("inf")), 2, 2)
    assert pooled.shape == (2, 4, 4, 8)
    y = F.logsigmoid(F.conv2d(pooled, w[2], w[3], padding=1))
    y = F.logsigmoid(F.conv_transpose2d(y, w[4], w[5], stride=2, padding=1, output_padding=(0, 1)))
    y = F.logsigmoid(F.conv2d(torch.cat((y, top), 1), w[6], w[7], padding=1))
    torch.testing.assert_close(model(x, t), F.conv2d(y, w[8], w[9], padding=1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("moved", ["x", "t"])
def test_unet_depends_on_x_and_on_t(unet, moved):
    x, t = inputs(2, 1, 28, 28)
    with torch.no_grad():
        before = unet(x, t)
        after = unet(x + 1, t) if moved == "x" else unet(x, t + 1)
    assert not torch.allclose(before, after, atol=1e-4)


def test_unet_treats_samples_apart(unet):
    x, t = inputs(4, 1, 28, 28)
    with torch.no_grad():
        whole = unet(x, t)
        # 1e-5: a convolution may sum in another order for another batch size.
        torch.testing.assert_close(unet(x[2:3], t[2:3]), whole[2:3], atol=1e-5, rtol=0)
        assert unet(x[:0], t[:0]).shape == (0, 1, 28, 28)


def test_every_weight_of_the_unet_takes_part():
    torch.manual_seed(0)
    model = UNet(2, (7, 12), (3, 4, 5))
    model(*inputs(2, 2, 7, 12)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("channels", [(4, 8), (4, 6, 8), (2, 3, 4, 5, 6)], ids=len)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (7, 16), (17, 4), (28, 28)], ids=str)
@pytest.mark.parametrize("image_channels", [1, 3])
def test_unet_keeps_the_shape_of_any_image(image_channels, size, channels):
    torch.manual_seed(0)
    model = UNet(image_channels, size, channels)
    x, t = inputs(2, image_channels, *size)
    with torch.no_grad():
        result = model(x, t)
    assert result.shape == x.shape
    assert torch.isfinite(result).all()
    assert model.shape == (image_channels, *size)
    assert model.image_size == size


def test_one_number_is_a_square_image():
    assert UNet(1, 9, (2, 3)).config == UNet(1, (9, 9), (2, 3)).config
    assert UNet(1, 9, [2, 3]).channels == (2, 3)


@pytest.mark.parametrize("image_channels", [1, 3])
def test_unet_in_channels_last_is_so_from_its_first_convolution_to_its_gradients(image_channels, monkeypatch):
    torch.manual_seed(0)
    # PyTorch's returns a contiguous result on a CPU, and on a GPU the layout of its argument, as this one does.
    monkeypatch.setattr(F, "logsigmoid", lambda v: -F.softplus(-v))
    model, seen = UNet(image_channels, (7, 12), (3, 4, 5)), []
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for each in other.modules():
        each.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    x, t = torch.randn(2, image_channels, 7, 12), torch.rand(2)
    expected, found = model(x, t), other(x, t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(seen) == 2 * (3 + 2 + 2 + 1)  # convolutions, and the network itself
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen[:-2])
    for output in (expected, found):
        output.square().sum().backward()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours.grad.stride() == ours.stride()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_unet_of_two_levels_has_the_parameters_counted_by_hand():
    # 3x3 kernels and biases: encoder (3 + 1) -> 8 -> 16, up 16 -> 8, head (8 + 8) -> 8 -> 3.
    expected = (9 * 4 * 8 + 8) + (9 * 8 * 16 + 16) + (9 * 16 * 8 + 8) + (9 * 16 * 8 + 8) + (9 * 8 * 3 + 3)
    assert count(UNet(3, 16, (8, 16))) == expected


# MLP ----------------------------------------------------------------------------------------------------------------


def test_mlp_has_the_tutorials_layers():
    model = MLP()
    assert [(layer.in_features, layer.out_features) for layer in model.net if isinstance(layer, nn.Linear)] == [
        (3, 64),
        (64, 64),
        (64, 64),
        (64, 2),
    ]
    assert count(model) == (3 * 64 + 64) + 2 * (64 * 64 + 64) + (64 * 2 + 2) == 8706
    assert model.shape == (2,)


def test_mlp_is_the_plain_sequential():
    model = MLP()
    plain = nn.Sequential(
        nn.Linear(3, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 2),
    )
    plain.load_state_dict(model.net.state_dict())  # strict: the layout is the same, too
    x, t = inputs(9, 2)
    assert torch.equal(model(x, t), plain(torch.cat((x, t[:, None]), -1)))


@pytest.mark.parametrize("shape", [3, (3,), (2, 5), (3, 4, 4), ()], ids=str)
def test_mlp_takes_samples_of_any_shape(shape):
    sizes = (shape,) if isinstance(shape, int) else shape
    model = MLP(shape, (8,))
    x, t = inputs(6, *sizes)
    with torch.no_grad():
        result = model(x, t)
        flat = model.net(torch.cat((x.reshape(6, -1), t[:, None]), 1)).reshape(x.shape)
    assert result.shape == x.shape
    assert torch.equal(result, flat)
    assert model.shape == tuple(sizes)
    assert model(x[:0], t[:0]).shape == (0, *sizes)


def test_mlp_without_hidden_layers_is_linear():
    model = MLP(2, ())
    x, t = inputs(5, 2)
    expected = F.linear(torch.cat((x, t[:, None]), 1), model.net[0].weight, model.net[0].bias)
    assert torch.equal(model(x, t), expected)


FORMULAS = {
    "LogSigmoid": lambda y: -torch.log1p(torch.exp(-y)),
    "SiLU": lambda y: y / (1 + torch.exp(-y)),
    "ReLU": lambda y: torch.where(y > 0, y, 0),
    "Tanh": lambda y: (torch.exp(2 * y) - 1) / (torch.exp(2 * y) + 1),
    "GELU": lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)),
    "GELU_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
    "Softplus": lambda y: torch.log1p(torch.exp(y)),
    "LeakyReLU": lambda y: y.clamp(min=0) + 0.01 * y.clamp(max=0),
    "ELU": lambda y: y.clamp(min=0) + torch.exp(y.clamp(max=0)) - 1,
    "Sigmoid": lambda y: 1 / (1 + torch.exp(-y)),
    "Mish": lambda y: y * torch.tanh(torch.log1p(torch.exp(y))),
    "Sin": lambda y: torch.cos(y - torch.pi / 2),
    "Identity": lambda y: y,
}


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_the_activation_it_names(activation):
    torch.manual_seed(0)
    model = MLP(2, (8, 8), activation).double()
    x, t = inputs(20, 2)
    x, t = 3 * x.double(), t.double()
    y = torch.cat((x, t[:, None]), 1)
    for layer in model.net[:-1:2]:
        y = FORMULAS[activation](layer(y))
    # The formulas in float64 lose a few digits at most to cancellation (tanh), from values of size 10.
    torch.testing.assert_close(model(x, t), model.net[-1](y), atol=1e-12, rtol=1e-12)


# Configs ------------------------------------------------------------------------------------------------------------

MODELS = {
    "mlp": lambda: MLP(),
    "mlp image": lambda: MLP((1, 4, 4), (16, 8), "SiLU"),
    "mlp linear": lambda: MLP(3, ()),
    "mlp numbers": lambda: MLP((), (4,)),
    "unet": lambda: UNet(),
    "unet rectangle": lambda: UNet(3, (9, 14), (4, 6, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_describes_its_model(name):
    model = MODELS[name]()
    config = json.loads(json.dumps(model.config))  # as stored in a checkpoint
    assert config == model.config
    twin = from_config(config)
    assert type(twin) is type(model)
    assert twin.config == model.config
    assert twin.shape == model.shape
    twin.load_state_dict(model.state_dict())
    x, t = inputs(2, *model.shape)
    with torch.no_grad():
        assert torch.equal(twin(x, t), model(x, t))


def test_from_config_leaves_the_config_alone():
    config = {"architecture": "MLP", "shape": [2], "hidden": [4], "activation": "Tanh"}
    before = json.dumps(config)
    from_config(config)
    assert json.dumps(config) == before


def test_from_config_takes_the_defaults_of_the_architecture():
    assert from_config({"architecture": "MLP"}).config == MLP().config


@pytest.mark.parametrize("name", MODELS)
def test_models_are_sampled_from_as_they_are(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    x = fastsde.sample(model, (2, *model.shape), steps=2)
    assert x.shape == (2, *model.shape)
    assert torch.isfinite(x).all()


# Wrong arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MLP(0), ValueError, r"shape\[0\] must be at least 1, got 0"),
        (lambda: MLP((2, -1)), ValueError, r"shape\[1\] must be at least 1, got -1"),
        (lambda: MLP(2, (64, 0)), ValueError, r"hidden\[1\] must be at least 1, got 0"),
        (lambda: MLP(2, activation="logsigmoid"), ValueError, "activation must be one of LogSigmoid.*'logsigmoid'"),
        (lambda: MLP(2, activation=None), ValueError, "activation must be one of LogSigmoid.*got None"),
        (lambda: UNet(0), ValueError, "image_channels must be at least 1, got 0"),
        (lambda: UNet(1, 0), ValueError, r"image_size\[0\] must be at least 1, got 0"),
        (lambda: UNet(1, (28, -2)), ValueError, r"image_size\[1\] must be at least 1, got -2"),
        (lambda: UNet(channels=(8,)), ValueError, r"channels must be at least two.*got \(8,\)"),
        (lambda: UNet(channels=(8, 0)), ValueError, r"channels\[1\] must be at least 1, got 0"),
        (lambda: MLP("2"), TypeError, "shape must be a sequence of ints, got str"),
        (lambda: MLP(None), TypeError, "shape must be a sequence of ints, got NoneType"),
        (lambda: MLP(2.0), TypeError, "shape must be a sequence of ints, got float"),
        (lambda: MLP(True), TypeError, r"shape\[0\] must be an int, got bool"),
        (lambda: MLP(2, 64), TypeError, "hidden must be a sequence of ints, got int"),
        (lambda: MLP(2, (64, 8.0)), TypeError, r"hidden\[1\] must be an int, got float"),
        (lambda: MLP(2, ("64",)), TypeError, r"hidden\[0\] must be an int, got str"),
        (lambda: MLP(2, (True,)), TypeError, r"hidden\[0\] must be an int, got bool"),
        (lambda: MLP(2, activation=["SiLU"]), ValueError, r"activation must be one of LogSigmoid.*got \['SiLU'\]"),
        (lambda: UNet("1"), TypeError, "image_channels must be an int, got str"),
        (lambda: UNet(1.0), TypeError, "image_channels must be an int, got float"),
        (lambda: UNet(True), TypeError, "image_channels must be an int, got bool"),
        (lambda: UNet(-1), ValueError, "image_channels must be at least 1, got -1"),
        (lambda: UNet(1, 28.0), TypeError, "image_size must be a sequence of ints, got float"),
        (lambda: UNet(1, "28"), TypeError, "image_size must be a sequence of ints, got str"),
        (lambda: UNet(1, (28, None)), TypeError, r"image_size\[1\] must be an int, got NoneType"),
        (lambda: UNet(1, (28, 28, 3)), ValueError, r"image_size must be .*\(height, width\), got \(28, 28, 3\)"),
        (lambda: UNet(channels=32), TypeError, "channels must be a sequence of ints, got int"),
        (lambda: UNet(channels="32"), TypeError, "channels must be a sequence of ints, got str"),
        (lambda: UNet(channels=(8, 16.0)), TypeError, r"channels\[1\] must be an int, got float"),
        (lambda: UNet(channels=(True, 8)), TypeError, r"channels\[0\] must be an int, got bool"),
        (lambda: from_config(None), TypeError, "config must be a Mapping, got NoneType"),
        (lambda: from_config("MLP"), TypeError, "config must be a Mapping, got str"),
        (lambda: from_config({"architecture": ["MLP"]}), ValueError, r"architecture must be .*got \['MLP'\]"),
        (lambda: from_config({}), ValueError, "architecture must be one of MLP, UNet, got None"),
        (lambda: from_config({"architecture": "mlp"}), ValueError, "architecture must be one of MLP, UNet, got 'mlp'"),
        (lambda: from_config({"architecture": "MLP", "width": 3}), TypeError, "'width'"),
    ],
)
def test_wrong_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
