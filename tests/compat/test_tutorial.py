"""`fastsde.compat.tutorial` against the tutorial's own loops, reproduced here with the same operations in order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import data
from fastsde.compat.tutorial import adapt, calc_loss, generate_samples

BACKENDS = ("reference", "eager")


# The tutorial -------------------------------------------------------------------------------------------------------


def beta(t: Tensor) -> Tensor:
    return 0.1 + (20 - 0.1) * t


def tutorial_samples(score: object, x: Tensor, time_points: Tensor | None = None) -> Tensor:
    """Its Euler-Maruyama loop from a draw of the prior: 1000 fp32 times, one randn_like after each network call."""
    time_points = torch.linspace(1, 0, 1000) if time_points is None else time_points
    with torch.no_grad():
        for i in range(len(time_points) - 1):
            t, dt = time_points[i], time_points[i + 1] - time_points[i]
            slope = -0.5 * beta(t) * x - beta(t) * score(x, t.expand(len(x), 1))
            x = x + slope * dt + beta(t).sqrt() * torch.randn_like(x) * dt.abs().sqrt()
            assert x.abs().max() < 20  # the comparison is meaningful only for states of size 1
    return x


def tutorial_loss(score: object, x: Tensor) -> Tensor:
    """Its loss: draws a time in [1e-4, 1] per sample, then the noise, then computes the score of the Gaussian."""
    t = torch.rand((len(x), 1), dtype=x.dtype) * (1 - 1e-4) + 1e-4
    int_beta = (0.1 + 0.5 * (20 - 0.1) * t) * t
    mu, var = x * torch.exp(-0.5 * int_beta), -torch.expm1(-int_beta)
    x_t = torch.randn_like(x) * var.sqrt() + mu
    grad_log_p = -(x_t - mu) / var
    return torch.mean(var * (score(x_t, t) - grad_log_p) ** 2)


def concatenated(network: nn.Module) -> object:
    """How the swiss-roll notebook calls its Sequential."""
    return lambda x, t: network(torch.cat((x, t), -1))


class ConvNet(nn.Module):
    """Called like the MNIST notebook's network, x [B, 784] and t [B, 1]; small, and pulling to the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x), 1)
        image = x.reshape(-1, 1, 28, 28)
        plane = t[..., None, None].expand(-1, 1, 28, 28)
        signal = nn.functional.logsigmoid(self.first(torch.cat((image, plane), 1)))
        return self.last(signal).reshape(x.shape) - x


# Networks as in use -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roll() -> Tensor:
    return data.swiss_roll().x


@pytest.fixture(scope="module")
def mlp(roll: Tensor) -> nn.Sequential:
    """The swiss-roll network, briefly trained with `calc_loss`; with an untrained one the states would grow."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 64),
        nn.LogSigmoid(),
        nn.Linear(64, 2),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(400):
        loss = calc_loss(network, roll[torch.randint(len(roll), (256,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])  # it learns with the loss under test
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def convnet() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().requires_grad_(False)


# calc_loss ----------------------------------------------------------------------------------------------------------


def _loss_and_gradient(loss_function, network, x, seed=0):
    network = copy.deepcopy(network).to(x.dtype).requires_grad_()
    torch.manual_seed(seed)
    loss = loss_function(network, x)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()]), torch.get_rng_state()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [64, 256, 1000])
def test_loss_and_gradient_are_the_swiss_roll_notebooks(mlp, roll, batch, seed):
    ours = _loss_and_gradient(calc_loss, mlp, roll[:batch], seed)
    theirs = _loss_and_gradient(lambda network, x: tutorial_loss(concatenated(network), x), mlp, roll[:batch], seed)
    # x_t - mu cancels: it recovers the noise to u |x| / sigma, with u = 6e-8. The mean of 1 / sigma over the times
    # is about 2 and errors of single samples average, so the loss is off by a few u, and so is the gradient, which
    # is relative to its own, smaller, size.
    assert abs(ours[0] - theirs[0]) <= 1e-6 * max(1, theirs[0])
    assert (ours[1] - theirs[1]).norm() <= 5e-6 * theirs[1].norm()
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("batch", [1, 5, 256])
def test_loss_and_gradient_are_the_same_function_in_float64(mlp, roll, batch):
    # Here the cancellation leaves u |x| / sigma <= 1e-16 * 4 / 3e-3 = 1.4e-13 of a sample, so that any mistake shows.
    x = roll[:batch].double()
    ours = _loss_and_gradient(calc_loss, mlp, x)
    theirs = _loss_and_gradient(lambda network, x: tutorial_loss(concatenated(network), x), mlp, x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    assert (ours[1] - theirs[1]).norm() <= 1e-12 * theirs[1].norm()
    assert ours[0].dtype == torch.float64


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_the_mnist_notebooks(convnet, seed):
    x = torch.rand((16, 784), generator=torch.Generator().manual_seed(seed))
    ours = _loss_and_gradient(calc_loss, convnet, x, seed)
    theirs = _loss_and_gradient(tutorial_loss, convnet, x, seed)
    # As above. The loss is above 1 for this untrained network, and compared relative to it.
    assert abs(ours[0] - theirs[0]) <= 1e-6 * max(1, theirs[0])
    assert (ours[1] - theirs[1]).norm() <= 5e-6 * theirs[1].norm()
    assert torch.equal(ours[2], theirs[2])


def test_loss_has_no_gradient_to_the_data(mlp, roll):
    x = roll[:8].clone()
    network = copy.deepcopy(mlp).requires_grad_()
    loss = calc_loss(network, x)
    assert loss.shape == ()
    assert loss.requires_grad
    assert torch.equal(x, roll[:8])
    with torch.no_grad():
        assert not calc_loss(network, x).requires_grad


# generate_samples ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("n", "seed"), [(1, 0), (64, 1)])
def test_samples_are_the_swiss_roll_notebooks(mlp, n, seed):
    torch.manual_seed(seed)
    theirs = tutorial_samples(concatenated(mlp), torch.randn((n, 2)))
    state = torch.get_rng_state()
    for backend in BACKENDS:
        torch.manual_seed(seed)
        ours = generate_samples(mlp, n, noise="torch", backend=backend)
        # Each row rounds states of size 1 to 3 a few times by u = 6e-8, and towards t = 0 the rows contract, so that
        # only the last tens of rows count: some 1e-6, and 1e-5 with the steepest parts of the learned score.
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_samples_are_the_swiss_roll_notebooks_in_float64(mlp):
    # The same grid of fp32 times, everything else in float64: the tolerance above is due to rounding only.
    network = copy.deepcopy(mlp).double()
    torch.manual_seed(0)
    start = torch.randn((3, 2), dtype=torch.float64)
    theirs = tutorial_samples(concatenated(network), start, torch.linspace(1, 0, 1000).double())
    torch.manual_seed(0)
    ours = generate_samples(network, 3, noise="torch")
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_samples_are_the_mnist_notebooks(convnet):
    torch.manual_seed(3)
    theirs = tutorial_samples(convnet, torch.randn((2, 784)))
    state = torch.get_rng_state()
    for backend in BACKENDS:
        torch.manual_seed(3)
        ours = generate_samples(convnet, 2, noise="torch", backend=backend)
        assert ours.shape == (2, 784)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # as for the swiss roll
        assert torch.equal(torch.get_rng_state(), state)


def test_contract_noise_is_the_default_and_a_function_of_the_seed_alone(mlp):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate_samples(mlp, 6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(generate_samples(mlp, 6, noise="contract", seed=0), first)
    assert not torch.allclose(generate_samples(mlp, 6, seed=5), first, atol=1e-2)
    # Another backend: rounding, as above.
    torch.testing.assert_close(generate_samples(mlp, 6, backend="reference"), first, atol=1e-5, rtol=0)


def test_options_reach_the_sampler(mlp):
    rows: list[int] = []
    x, states = generate_samples(mlp, 3, trajectory=333, callback=lambda row, time, x: rows.append(row), max_batch=3)
    assert states.shape == (4, 3, 2)
    assert torch.equal(states[-1], x)
    assert rows == list(range(999))


@pytest.mark.parametrize("option", ["seed", "first_sample", "keys", "x_init", "max_batch"])
def test_options_that_torchs_generator_would_ignore_are_refused(mlp, option):
    value = {"keys": [1, 2, 3], "x_init": torch.zeros(3, 2)}.get(option, 2)
    with pytest.raises(ValueError, match=f"{option} needs noise='contract'"):
        generate_samples(mlp, 3, noise="torch", **{option: value})
    assert generate_samples(mlp, 3, **{option: value}).shape == (3, 2)


@pytest.mark.parametrize(
    ("network", "x", "error", "message"),
    [
        (nn.Sequential(nn.Linear(3, 1)), torch.zeros(4, 2), ValueError, r"model must return the shape of x, \[4, 2\]"),
        (None, torch.zeros(4, 2), TypeError, "score_network must be callable, got NoneType"),
        (nn.Sequential(nn.Linear(3, 2)), torch.zeros(0, 2), ValueError, r"x must have shape \[B, d\] with B"),
        (nn.Sequential(nn.Linear(3, 2)), torch.zeros(4), ValueError, r"x must have shape \[B, d\]"),
        (lambda x, t: (x, t), torch.zeros(4, 2), TypeError, "model must return a tensor, got tuple"),
    ],
)
def test_calc_loss_names_what_is_wrong(network, x, error, message):
    with pytest.raises(error, match=message):
        calc_loss(network, x)


def test_no_samples_are_of_the_networks_width(mlp, convnet):
    wide = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Sequential(nn.Linear(8, 5), nn.Identity()))
    assert generate_samples(mlp, 0).shape == (0, 2)
    assert generate_samples(wide, 0).shape == (0, 5)
    assert generate_samples(convnet, 0).shape == (0, 784)
    assert generate_samples(lambda x, t: -x, 0).shape == (0, 784)
    assert generate_samples(convnet, 0, data_dim=7).shape == (0, 7)
    assert generate_samples(nn.Sequential(nn.Tanh()), 0, data_dim=3).shape == (0, 3)


# adapt --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapted_networks_are_sampled_from_with_any_solver(mlp, convnet, backend):
    for network, width, call in ((mlp, 2, concatenated(mlp)), (convnet, 784, convnet)):
        options = {"solver": "ddim", "steps": 5, "backend": backend}
        adapted = fastsde.sample(adapt(network), (3, width), **options)
        assert torch.equal(adapted, fastsde.sample(lambda x, t, f=call: f(x, t[:, None]), (3, width), **options))


def test_adapt_keeps_the_network_itself(mlp):
    network = copy.deepcopy(mlp).eval()
    adapted = adapt(network)
    assert [id(p) for p in adapted.parameters()] == [id(p) for p in network.parameters()]
    assert not adapted.training
    assert not network.training
    assert adapt(network.train()).training
    x, t = torch.ones(4, 2), torch.full((4,), 0.5)
    before = adapted(x, t)
    assert torch.equal(before, network(torch.cat((x, t[:, None]), -1)))
    with torch.no_grad():
        network[-1].bias.add_(1)
    torch.testing.assert_close(adapted(x, t), before + 1)


def test_an_adapted_network_is_run_in_its_own_dtype(mlp):
    double = fastsde.sample(adapt(copy.deepcopy(mlp).double()), (3, 2), steps=20)
    assert double.dtype == torch.float64
    # 20 rows of the learned score in fp32 against float64: the same rounding as above, in fewer and longer steps.
    torch.testing.assert_close(fastsde.sample(adapt(mlp), (3, 2), steps=20), double.float(), atol=1e-5, rtol=0)
