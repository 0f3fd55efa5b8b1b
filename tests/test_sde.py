"""The VP-SDE: closed forms against numerical integration, densities against PyTorch's and autograd."""

import math

import numpy as np
import pytest
import torch

from fastsde import VPSDE, noise
from fastsde.sde import match_dims

SDES = [VPSDE(), VPSDE(0.0, 20.0), VPSDE(0.5, 3.0), VPSDE(2.0, 2.0)]
TIMES = [1e-5, 1e-3, 0.1, 0.5, 1.0]


def integrate(rate, start, end, steps=2000):
    """Returns the solution of y' = rate(t, y), y(0) = start, at ``end``, by the classical Runge-Kutta method."""
    y, h = start, end / steps
    for k in range(steps):
        t = k * h
        k1 = rate(t, y)
        k2 = rate(t + h / 2, y + h / 2 * k1)
        k3 = rate(t + h / 2, y + h / 2 * k2)
        k4 = rate(t + h, y + h * k3)
        y += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("t", TIMES)
def test_alpha_and_sigma_solve_the_moment_equations(sde, t):
    # dm = -1/2 beta m dt and dV = beta (1 - V) dt. The error of Runge-Kutta is (beta h)^4 = (20 / 2000)^4 = 1e-8 over
    # 120, and less where the solution decays: 1e-9 absolute, and relative for the small sigma^2.
    def beta(s):
        return sde.beta_min + s * (sde.beta_max - sde.beta_min)

    assert float(sde.alpha(t)) == pytest.approx(integrate(lambda s, m: -0.5 * beta(s) * m, 1.0, t), rel=1e-9)
    assert float(sde.sigma(t)) ** 2 == pytest.approx(integrate(lambda s, v: beta(s) * (1 - v), 0.0, t), rel=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("t", TIMES)
def test_integral_beta_is_the_integral_of_beta(sde, t):
    # Gauss-Legendre with two nodes is exact for a linear function, so only rounding is left.
    nodes, weights = np.polynomial.legendre.leggauss(2)
    integral = sum(w * float(sde.beta(t * (x + 1) / 2)) for x, w in zip(nodes, weights, strict=True)) * t / 2
    assert float(sde.integral_beta(t)) == pytest.approx(integral, rel=1e-14)


def test_end_points_are_exact():
    sde = VPSDE()
    assert (float(sde.beta(0.0)), float(sde.beta(1.0))) == (0.1, 20.0)
    assert (float(sde.alpha(0.0)), float(sde.sigma(0.0))) == (1.0, 0.0)
    assert float(sde.alpha(1.0)) == pytest.approx(math.exp(-10.05 / 2), rel=1e-15)  # B(1) = (0.1 + 20) / 2


@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3])
def test_sigma_keeps_its_digits_near_zero_in_fp32(t):
    t32 = torch.tensor(t, dtype=torch.float32)
    exact_t = float(t32)
    b = 0.1 * exact_t + 9.95 * exact_t**2
    exact = math.sqrt(b * (1 - b / 2 + b**2 / 6 - b**3 / 24))  # the series of 1 - exp(-b), good to b^4 / 120 < 1e-15
    # B: two rounded constants and three operations, 5/2 ulp; expm1: 1 ulp; the root halves that and rounds: < 2.5 ulp.
    assert float(VPSDE().sigma(t32)) == pytest.approx(exact, rel=2.5 * 2**-23)


def test_naive_variance_would_fail_the_test_above():
    # The 4.7 % of DESIGN section 2: in fp32 1 - alpha^2 is a multiple of 2^-24, here 16 for 16.8 of them.
    naive = float(1 - VPSDE().alpha(torch.tensor(1e-5)) ** 2)
    assert naive / float(VPSDE().sigma(1e-5)) ** 2 == pytest.approx(1 - 0.047, abs=5e-4)


@pytest.mark.parametrize("name", ["beta", "integral_beta", "alpha", "sigma", "diffusion"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_time_keep_shape_and_dtype(name, shape, dtype):
    t = torch.linspace(0.1, 0.9, math.prod(shape), dtype=dtype).reshape(shape)
    value = getattr(VPSDE(), name)(t)
    assert (value.shape, value.dtype) == (t.shape, dtype)
    rtol = 1e-14 if dtype == torch.float64 else 16 * 2**-24  # B is up to 8, which multiplies its rounding in exp(-B/2)
    scalars = [float(getattr(VPSDE(), name)(float(one))) for one in t.flatten()]
    np.testing.assert_allclose(value.flatten().numpy(), scalars, rtol=rtol)


def test_a_float_time_is_computed_in_float64():
    assert VPSDE().sigma(0.3).dtype == torch.float64
    assert VPSDE().beta(1).dtype == torch.float64


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_drift_and_diffusion_match_the_marginals_they_generate(sde):
    # d mean / dt = drift(mean) and d sigma^2 / dt = -beta sigma^2 + diffusion^2, with autograd's derivative in t.
    t = torch.tensor([0.05, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    x_0 = torch.tensor([1.5, -2.0, 0.7], dtype=torch.float64)
    mean, sigma = sde.marginal_prob(x_0, t)
    (mean_rate,) = torch.autograd.grad(mean.sum(), t, retain_graph=True)
    (variance_rate,) = torch.autograd.grad(sigma.square().sum(), t)
    torch.testing.assert_close(mean_rate, sde.drift(mean, t).detach(), rtol=1e-12, atol=1e-14)
    expected = (-sde.beta(t) * sigma**2 + sde.diffusion(t) ** 2).detach()
    torch.testing.assert_close(variance_rate, expected, rtol=1e-12, atol=1e-13)  # near t = 1 the two terms cancel


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 3), (0, 3), (4, 0)], ids=str)
def test_drift_takes_a_time_for_each_sample_or_for_all(shape):
    sde, x = VPSDE(), torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    t = torch.linspace(0.2, 0.8, len(x))
    drift = sde.drift(x, t)
    assert (drift.shape, drift.dtype) == (x.shape, torch.float32)
    for i in range(len(x)):
        torch.testing.assert_close(drift[i], sde.drift(x[i], float(t[i])), rtol=4 * 2**-24, atol=0)
    expected = -0.5 * (0.1 + 19.9 * 0.25) * x
    torch.testing.assert_close(sde.drift(x, 0.25), expected, rtol=2 * 2**-24, atol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 4, 2), (0, 2), (3, 0)], ids=str)
def test_marginal_prob_broadcasts_over_the_sample(shape):
    sde, x_0 = VPSDE(), torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    t = torch.linspace(0.1, 1.0, len(x_0))
    mean, sigma = sde.marginal_prob(x_0, t)
    assert mean.shape == x_0.shape
    assert sigma.shape == (len(x_0),) + (1,) * (len(shape) - 1)
    for i in range(len(x_0)):
        torch.testing.assert_close(mean[i], sde.alpha(t[i]) * x_0[i], rtol=0, atol=0)
        assert float(sigma[i].flatten()[0]) == float(sde.sigma(t[i]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginal_prob_has_the_dtype_of_the_data(dtype):
    mean, sigma = VPSDE().marginal_prob(torch.ones(2, 3, dtype=dtype), 0.5)
    assert mean.dtype == sigma.dtype == dtype
    assert float(sigma) == pytest.approx(math.sqrt(-math.expm1(-(0.05 + 9.95 * 0.25))), rel=2**-23)


def test_match_dims_appends_axes():
    x = torch.zeros(2, 3, 4)
    assert match_dims(torch.zeros(2), x).shape == (2, 1, 1)
    assert match_dims(torch.zeros(()), x).shape == (1, 1, 1)
    assert match_dims(torch.zeros(2, 3), x).shape == (2, 3, 1)


def test_score_of_the_marginal_is_minus_z_over_sigma():
    generator = torch.Generator().manual_seed(0)
    x_0, z = (torch.randn(5, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.05, 1.0, 5, dtype=torch.float64)
    mean, sigma = VPSDE().marginal_prob(x_0, t)
    x_t = (mean + sigma * z).requires_grad_()
    log_p = torch.distributions.Normal(mean, sigma).log_prob(x_t).sum()
    (score,) = torch.autograd.grad(log_p, x_t)
    torch.testing.assert_close(score, -z / sigma, rtol=1e-12, atol=1e-12)  # x_t - mean loses |mean| eps / sigma


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 2, 2), (0, 4)], ids=str)
def test_prior_sampling_is_step_zero_of_the_noise_contract(shape):
    drawn = VPSDE().prior_sampling(shape, seed=3)
    assert drawn.shape == shape
    assert torch.equal(drawn, noise.normal(noise.sample_keys(3, shape[0]), 0, shape[1:]))
    assert not drawn.numel() or not torch.equal(drawn, VPSDE().prior_sampling(shape, seed=4))


def test_prior_sampling_takes_keys():
    keys = noise.sample_keys(9, 2, first_sample=5)
    drawn = VPSDE().prior_sampling((2, 3), keys=keys, seed=1)
    assert torch.equal(drawn, VPSDE().prior_sampling((7, 3), seed=9)[5:])


@pytest.mark.parametrize("shape", [(4, 1), (4, 7), (2, 3, 2, 2), (0, 3), (2, 0)], ids=str)
def test_prior_logp_is_that_of_torch_distributions(shape):
    x = torch.linspace(-3, 3, math.prod(shape), dtype=torch.float64).reshape(shape)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    log_p = VPSDE().prior_logp(x)
    assert log_p.shape == shape[:1]
    torch.testing.assert_close(log_p, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta_min": "0.1"}, TypeError, "beta_min must be a number, got str"),
        ({"beta_max": None}, TypeError, "beta_max must be a number, got NoneType"),
        ({"beta_max": True}, TypeError, "beta_max must be a number, got bool"),
        ({"beta_min": torch.tensor(0.1)}, TypeError, "beta_min must be a number, got Tensor"),
        ({"beta_min": math.nan}, ValueError, "beta_min must be finite, got nan"),
        ({"beta_max": math.inf}, ValueError, "beta_max must be finite, got inf"),
        ({"beta_min": -0.1}, ValueError, "expected 0 <= beta_min <= beta_max"),
        ({"beta_min": 30.0}, ValueError, "got beta_min=30.0 and beta_max=20.0"),
        ({"beta_min": 0.0, "beta_max": 0.0}, ValueError, "beta_max > 0"),
    ],
)
def test_bad_rates_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        VPSDE(**arguments)


def test_an_sde_is_a_value():
    assert VPSDE() == VPSDE(0.1, 20.0)
    assert VPSDE() != VPSDE(0.1, 19.0)
    assert len({VPSDE(), VPSDE(0.1, 20.0)}) == 1
    with pytest.raises(AttributeError):
        VPSDE().beta_min = 1.0
