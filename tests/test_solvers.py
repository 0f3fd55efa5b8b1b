"""Solver tables: published values, textbook loops, Gaussian recursions and orders of convergence."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastsde import VPSDE, StepTable, noise, reference, solvers
from fastsde.solvers import PREDICTIONS, REGISTRY, SOLVERS

FLOAT64 = torch.float64
# Every solver with each set of options in the registry, under names such as "ddim eta=0.6".
VARIANTS = {
    " ".join((name, *(f"{key}={value}" for key, value in variant.options.items()))): (kind, variant)
    for name, kind in REGISTRY.items()
    for variant in kind.variants
}
AFFINE = [name for name, (kind, _) in VARIANTS.items() if kind.is_affine]
DPM_SDE, DDIM_ETA = "dpm_solver_pp_2m stochastic=True", "ddim eta=0.6"


def grid(sde, times):
    """Returns alpha and sigma at ``times``, and the times of the rows."""
    return sde.alpha(times), sde.sigma(times), times[:-1]


def make_table(name, sde, times, prediction="score", **options):
    """Returns the table of a variant at any times."""
    kind, variant = VARIANTS[name]
    arguments = grid(sde, times) if kind.is_on_schedule else (sde, times)
    return kind.builder(*arguments, prediction, **{**variant.options, **options})


def linspace(steps, end=0.0, start=1.0):
    return torch.linspace(start, end, steps + 1, dtype=FLOAT64)


def gaussian_score(sde, mean, std):
    """Returns the exact score of N(mean, std^2) data: -(x - alpha mean) / V with V = alpha^2 std^2 + sigma^2."""

    def model(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        shape = (-1,) + (1,) * (x.ndim - 1)
        return -(x - (alpha * mean).reshape(shape)) / (alpha**2 * std**2 + sigma**2).reshape(shape)

    return model


def consistent_model(sde, prediction):
    """Returns a smooth nonlinear eps network, converted to a prediction."""

    def model(x, t):
        alpha, sigma = (value.reshape(-1, 1) for value in (sde.alpha(t), sde.sigma(t)))
        eps = torch.tanh(x) * sigma + 0.3 * torch.sin(2 * x + t.reshape(-1, 1)) * sigma
        x0 = (x - sigma * eps) / alpha
        return {
            "eps": eps,
            "score": -eps / sigma,
            "x0": x0,
            "v": alpha * eps - sigma * x0,
            "flow": eps - x0,
        }[prediction]

    return model


def two_slots(table):
    """Returns the columns of the form x' = a x + b f + e D + c H + d z, by name."""
    first = {name: getattr(table, name)[:, 0] for name in ("p", "b", "e", "d")}
    keep = table.A[:, 0]
    return {
        "time": table.time,
        "q": table.q,
        **first,
        "a": keep[:, 0],
        "c": keep[:, 1] if table.slots == 2 else 0 * table.q,
    }


def trajectory(model, table, x_init, noises=None):
    """Returns the states after every row, in float64: ``[K, B, ...]``; ``noises`` are ``[K, B, ...]``."""
    states = []
    reference.sample(
        model,
        x_init.shape,
        table,
        noise.sample_keys(0, len(x_init)),
        x_init=x_init,
        noise_function=(lambda row, x: noises[row]) if noises is not None else None,
        dtype=FLOAT64,
        after_row=lambda row, time, x: states.append(x),
    )
    return torch.stack(states)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


# Published values ------------------------------------------------------------------------------------------------


def dummy_model(x, t):
    """The dummy model of diffusers' scheduler tests, on raw integer times."""
    return x * (t / (t + 1))[:, None, None, None]


def dummy_sample(table):
    x_init = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    generator = torch.Generator().manual_seed(0)
    return reference.sample(
        dummy_model,
        (4, 3, 8, 8),
        table,
        noise.sample_keys(0, 4),
        x_init=x_init,
        noise_function=lambda row, x: torch.randn(x.shape, generator=generator),
    )


def dummy_schedule(steps):
    """Returns alpha and sigma of the usual 1000 discrete betas, at integer ``steps``."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=FLOAT64), 0)[steps]
    return kept.sqrt(), (1 - kept).sqrt()


def with_clean_end(values, last):
    return torch.cat([values, torch.tensor([last], dtype=FLOAT64)])


def test_ddpm_published_value():
    steps = torch.arange(999, -1, -1)
    alpha, sigma = dummy_schedule(steps)
    table = solvers.ddpm(with_clean_end(alpha, 1), with_clean_end(sigma, 0), steps, "eps", clip=1.0)
    assert table.d[-1] == 0  # no noise is drawn for t = 0
    assert (table.d[:-1] > 0).all()
    sample = dummy_sample(table)
    assert float(sample.abs().sum()) == pytest.approx(258.9606, abs=1e-2)
    assert float(sample.abs().mean()) == pytest.approx(0.3372, abs=1e-3)


def test_ddim_published_value():
    steps = torch.arange(900, -1, -100)
    alpha, sigma = dummy_schedule(steps)
    table = solvers.ddim(with_clean_end(alpha, 1), with_clean_end(sigma, 0), steps, "eps", eta=0.0, clip=1.0)
    sample = dummy_sample(table)
    assert float(sample.abs().sum()) == pytest.approx(172.0067, abs=1e-2)
    assert float(sample.abs().mean()) == pytest.approx(0.2240, abs=1e-3)


def test_dpm_solver_pp_2m_published_value():
    steps = torch.from_numpy(np.linspace(0, 999, 11).round()[::-1].astype(np.int64).copy())[:-1]
    alpha, sigma = dummy_schedule(torch.cat([steps, torch.tensor([0])]))
    table = solvers.dpm_solver_pp_2m(alpha, sigma, steps, "eps", lower_order_final=False)
    assert float(dummy_sample(table).abs().mean()) == pytest.approx(0.3301, abs=1e-3)


def test_euler_maruyama_published_moments():
    # N(1, 1) data: V = 1 at every t, so the score is -(x - alpha), and a row maps the mean and variance affinely.
    sde = VPSDE()
    table = solvers.euler_maruyama(sde, linspace(999))
    mean, variance = 0.0, 1.0
    for k in range(len(table)):
        row = {name: float(column[k]) for name, column in two_slots(table).items()}
        mean = (row["a"] - row["b"]) * mean + row["b"] * float(sde.alpha(row["time"]))
        variance = (row["a"] - row["b"]) ** 2 * variance + row["d"] ** 2
    assert mean == pytest.approx(1.000632, abs=5e-7)  # six published decimals
    assert math.sqrt(variance) == pytest.approx(1.000700, abs=5e-7)


def flow_solution(sde, mean, std, end, x_init):
    """Solves the probability flow of N(mean, std^2) data: x - alpha mean scales with the marginal's deviation."""

    def spread(t):
        return math.sqrt(float(sde.alpha(t)) ** 2 * std**2 + float(sde.sigma(t)) ** 2)

    return sde.alpha(end) * mean + spread(end) / spread(1.0) * (x_init - sde.alpha(1.0) * mean)


def test_probability_flow_published_values():
    sde, end, x_init = VPSDE(), 1e-3, torch.tensor([-1.0, 1.0], dtype=FLOAT64)
    exact = flow_solution(sde, 1.0, 0.1, end, x_init)
    assert exact.tolist() == pytest.approx([0.8987393879, 1.0998291861], rel=0, abs=5e-11)  # ten published decimals
    # Heun's error is C h^2 + D h^3 + ..: halving h quarters it, up to a remainder below 1 % for h = 1/2000.
    model = gaussian_score(sde, 1.0, 0.1)
    column = [trajectory(model, solvers.heun(sde, linspace(n, end)), x_init)[-1] for n in (250, 500, 1000, 2000)]
    ratio = (column[2] - exact) / (column[3] - exact)
    assert ratio.tolist() == pytest.approx([4, 4], rel=0.01)
    # After extrapolation of h^2, h^3 and h^4, the remainder is within the last correction, which is 1e-10.
    for power in (2, 3, 4):
        before = column[-1]
        column = [(2**power * fine - coarse) / (2**power - 1) for coarse, fine in pairwise(column)]
    correction = float((column[-1] - before).abs().max())
    assert correction < 1.2e-10
    torch.testing.assert_close(column[-1], exact, rtol=0, atol=correction)


# Textbook loops --------------------------------------------------------------------------------------------------
# Each is written as in its paper, on NumPy arrays, with a network that predicts eps.


def textbook_euler_maruyama(sde, times, eps, x, z):
    for k, (t, after) in enumerate(pairwise(times)):
        h, beta, sigma = t - after, float(sde.beta(t)), float(sde.sigma(t))
        reverse_drift = -0.5 * beta * x - beta * (-eps(x, t) / sigma)
        x = x - reverse_drift * h + math.sqrt(beta) * math.sqrt(h) * z[k]
    return x


def textbook_exponential_euler_maruyama(sde, times, eps, x, z):
    for k, (t, after) in enumerate(pairwise(times)):
        growth = float(sde.alpha(after) / sde.alpha(t))  # e^(I/2)
        score = -eps(x, t) / float(sde.sigma(t))
        x = growth * x + 2 * (growth - 1) * score + math.sqrt(growth**2 - 1) * z[k]
    return x


def textbook_heun(sde, times, eps, x, z):
    def slope(x, t):
        return 0.5 * float(sde.beta(t)) * (x - eps(x, t) / float(sde.sigma(t)))

    for t, after in pairwise(times):
        h = t - after
        first = slope(x, t)
        x = x + h / 2 * (first + slope(x + h * first, after))
    return x


def textbook_ddpm(sde, times, eps, x, z):
    """Ho et al. 2020, eq. 6 and 7, with the discrete beta of each step."""
    for k, (t, after) in enumerate(pairwise(times)):
        kept, kept_after = float(sde.alpha(t)) ** 2, float(sde.alpha(after)) ** 2
        beta = 1 - kept / kept_after
        x0 = (x - math.sqrt(1 - kept) * eps(x, t)) / math.sqrt(kept)
        mean = (math.sqrt(kept_after) * beta * x0 + math.sqrt(1 - beta) * (1 - kept_after) * x) / (1 - kept)
        x = mean + math.sqrt((1 - kept_after) / (1 - kept) * beta) * z[k]
    return x


def textbook_ddim(sde, times, eps, x, z, eta=0.0):
    """Song, Meng & Ermon 2021, eq. 12 and 16."""
    for k, (t, after) in enumerate(pairwise(times)):
        kept, kept_after = float(sde.alpha(t)) ** 2, float(sde.alpha(after)) ** 2
        noise_std = eta * math.sqrt((1 - kept_after) / (1 - kept)) * math.sqrt(1 - kept / kept_after)
        predicted = eps(x, t)
        x0 = (x - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
        x = math.sqrt(kept_after) * x0 + math.sqrt(1 - kept_after - noise_std**2) * predicted + noise_std * z[k]
    return x


def textbook_dpm_solver_pp_2m(sde, times, eps, x, z, stochastic=False):
    """Lu et al. 2022: algorithm 2, and SDE-DPM-Solver++(2M) of appendix B; the last step is of first order."""
    lam = [math.log(float(sde.alpha(t) / sde.sigma(t))) for t in times]
    data_before = None
    for k, (t, after) in enumerate(pairwise(times)):
        data = (x - float(sde.sigma(t)) * eps(x, t)) / float(sde.alpha(t))
        mixed, h = data, lam[k + 1] - lam[k]
        if k > 0 and k < len(times) - 2:
            r = (lam[k] - lam[k - 1]) / h
            mixed = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * data_before
        ratio, alpha, sigma = float(sde.sigma(after) / sde.sigma(t)), float(sde.alpha(after)), float(sde.sigma(after))
        if stochastic:
            x = ratio * math.exp(-h) * x + alpha * (1 - math.exp(-2 * h)) * mixed
            x = x + sigma * math.sqrt(1 - math.exp(-2 * h)) * z[k]
        else:
            x = ratio * x - alpha * (math.exp(-h) - 1) * mixed
        data_before = data
    return x


TEXTBOOK = {
    "euler_maruyama": textbook_euler_maruyama,
    "exponential_euler_maruyama": textbook_exponential_euler_maruyama,
    "heun": textbook_heun,
    "ddpm": textbook_ddpm,
    "ddim": textbook_ddim,
    DDIM_ETA: lambda *arguments: textbook_ddim(*arguments, eta=0.6),
    "dpm_solver_pp_2m": textbook_dpm_solver_pp_2m,
    DPM_SDE: lambda *arguments: textbook_dpm_solver_pp_2m(*arguments, stochastic=True),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_solver_equals_its_textbook_loop_for_every_prediction(name, prediction):
    # Also checks that all predictions of one network give the same trajectory. Times are uneven, so that swapped
    # neighbouring coefficients are noticed.
    sde, rows = VPSDE(), 25
    times = 1 - 0.95 * torch.linspace(0, 1, rows + 1, dtype=FLOAT64) ** 1.5
    x_init, z = normals(6, 3), normals(rows, 6, 3, seed=1)
    table = make_table(name, sde, times, prediction)
    got = trajectory(consistent_model(sde, prediction), table, x_init, z)[-1]

    def eps(x, t):
        return consistent_model(sde, "eps")(torch.from_numpy(x), torch.full((len(x),), t, dtype=FLOAT64)).numpy()

    expected = TEXTBOOK[name](sde, times.tolist(), eps, x_init.numpy(), z.numpy())
    # 25 rows of some ten roundings of 1.1e-16 each, relative to the largest state.
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=3e-14 * np.abs(expected).max())


@pytest.mark.parametrize("clip", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp_2m", DPM_SDE, DDIM_ETA])
def test_clip_bounds_the_predicted_data_and_nothing_else(name, prediction, clip):
    sde, times = VPSDE(), linspace(12, 0.05)
    x, z, history = normals(50), normals(50, seed=1), normals(50, seed=2)
    f = consistent_model(sde, prediction)(3 * x[:, None], torch.full((50,), float(times[4]), dtype=FLOAT64))[:, 0]
    clipped, unclipped = (make_table(name, sde, times, prediction, clip=bound) for bound in (clip, None))
    slots = (3 * x, history)[: unclipped.slots]
    got = reference.solver_step(slots, f, clipped, 4, z=z)[0]
    free = reference.solver_step(slots, f, unclipped, 4, z=z)[0]
    row = clipped.row(4)
    free_data = row.p[0] * slots[0] + row.q * f
    data = free_data.clamp(-clip, clip)
    assert float(free_data.abs().max()) > clip  # otherwise the test would not show anything
    # x' changes by e times the change of D by the clamp, so DDIM's direction keeps the unclipped eps.
    torch.testing.assert_close(got, free + row.e[0] * (data - free_data), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp_2m", DPM_SDE])
def test_a_clipped_sample_at_t_zero_lies_within_the_bound(name):
    # With sigma = 0 after the last row x' is D itself.
    sde = VPSDE()
    samples = [
        trajectory(
            lambda x, t: 5 * x, make_table(name, sde, linspace(8), "x0", clip=clip), normals(9, 2), normals(8, 9, 2)
        )
        for clip in (0.75, None)
    ]
    assert float(samples[0][-1].abs().max()) == 0.75
    assert float(samples[1][-1].abs().max()) > 0.75


# The shapes of the tables ----------------------------------------------------------------------------------------


def test_euler_maruyama_table_is_the_formula_of_the_design():
    sde, times = VPSDE(0.3, 7.0), linspace(10)
    table = solvers.euler_maruyama(sde, times)
    rate = (0.3 + 6.7 * times[:-1]) / 10
    assert torch.equal(table.time, times[:-1])
    assert table.slots == 1
    torch.testing.assert_close(table.A[:, 0, 0], 1 + rate / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.b[:, 0], rate, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.d[:, 0], rate.sqrt(), rtol=1e-14, atol=0)
    assert not table.e.any()
    assert (table.d > 0).all()  # noise in every row, including the last one: the tutorial's sampler


def test_exponential_euler_maruyama_is_exact_for_a_constant_score():
    # One row from 0.9 to 0.4 against the Runge-Kutta solution of x' = beta (x / 2 + s) and V' = beta (V + 1) in
    # reverse time; its error (beta h)^4 / 120 is below 1e-12 at 5000 steps.
    sde, score, steps = VPSDE(), 0.7, 5000
    table = solvers.exponential_euler_maruyama(sde, [0.9, 0.4])
    y, h = np.array([1.3, 0.0]), 0.5 / steps

    def rate(elapsed, y):
        return float(sde.beta(0.9 - elapsed)) * np.array([y[0] / 2 + score, y[1] + 1])

    for k in range(steps):
        k1 = rate(k * h, y)
        k2 = rate((k + 0.5) * h, y + h / 2 * k1)
        k3 = rate((k + 0.5) * h, y + h / 2 * k2)
        k4 = rate((k + 1) * h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    row = table.row(0)
    assert row.A[0][0] * 1.3 + row.b[0] * score == pytest.approx(y[0], rel=1e-11)
    assert row.d[0] ** 2 == pytest.approx(y[1], rel=1e-11)


def one_row_tables(sde, times, prediction):
    """Returns SDE-DPM-Solver++ of first order: one-row tables of 2M, joined."""
    rows = [
        solvers.dpm_solver_pp_2m(*grid(sde, times[k : k + 2]), prediction, stochastic=True)
        for k in range(len(times) - 1)
    ]
    return torch.cat([row.packed for row in rows])


@pytest.mark.parametrize("end", [0.0, 0.05])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_first_order_sde_dpm_solver_pp_is_ddpm_is_ddim_at_eta_one(prediction, end):
    sde, times = VPSDE(), linspace(40, end)
    ddpm, ddim = solvers.ddpm(*grid(sde, times), prediction), solvers.ddim(*grid(sde, times), prediction, eta=1.0)
    first_order = one_row_tables(sde, times, prediction)
    # Variances are differences that keep at least a tenth of their terms, and log(alpha / sigma) is up to 5 with
    # steps from 0.25: at most some hundred roundings of 1.1e-16.
    torch.testing.assert_close(ddim.packed, ddpm.packed, rtol=2e-14, atol=0)
    torch.testing.assert_close(first_order, ddpm.packed, rtol=2e-14, atol=0)


def test_only_the_first_and_last_row_of_dpm_solver_pp_2m_are_of_first_order():
    sde, times = VPSDE(), linspace(6, 0.05)
    for final in (True, False):
        table = solvers.dpm_solver_pp_2m(*grid(sde, times), lower_order_final=final)
        assert (two_slots(table)["c"] != 0).tolist() == [False, True, True, True, True, not final]
    # At sigma = 0 log(alpha / sigma) is infinite, and the last row is always of first order.
    assert two_slots(solvers.dpm_solver_pp_2m(*grid(sde, linspace(6)), lower_order_final=False))["c"][-1] == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_solvers_draw_noise_where_their_variants_say_so(name):
    assert bool(make_table(name, VPSDE(), linspace(5, 0.1)).d.any()) == VARIANTS[name][1].noise


def test_without_clip_the_data_term_is_folded_away():
    for name in ("ddpm", "ddim", "dpm_solver_pp_2m", DPM_SDE):
        assert not make_table(name, VPSDE(), linspace(5)).e[:, 0].any()
        assert make_table(name, VPSDE(), linspace(5), clip=1.0).e[:, 0].all()


# Gaussian recursions ---------------------------------------------------------------------------------------------


def gaussian_recursion(table, sde, mean, std, start=(0.0, 1.0)):
    """Returns mean and variance of x after each row, in closed form, for N(mean, std^2) data and the exact score.

    Since f is affine in x, a row maps the slots affinely, and their mean [m] and covariance [m, m] follow.
    """
    q, n, p, b, e, d, A = (getattr(table, name).numpy() for name in ("q", "n", "p", "b", "e", "d", "A"))
    alpha, sigma = (value(table.time).numpy() for value in (sde.alpha, sde.sigma))
    v = alpha**2 * std**2 + sigma**2
    f_s, f_1 = -n / v[:, None], alpha * mean / v
    data_s, data_1 = p + q[:, None] * f_s, q * f_1
    matrices = A + b[:, :, None] * f_s[:, None] + e[:, :, None] * data_s[:, None]
    shifts = b * f_1[:, None] + e * data_1[:, None]
    m, cov, out = np.zeros(table.slots), np.zeros((table.slots, table.slots)), []
    m[0], cov[0, 0] = start
    for matrix, shift, noise_column in zip(matrices, shifts, d, strict=True):
        m = matrix @ m + shift
        cov = matrix @ cov @ matrix.T + np.outer(noise_column, noise_column)
        out.append((m[0], cov[0, 0]))
    return np.array(out)


@pytest.mark.parametrize("end", [0.0, 0.02])
@pytest.mark.parametrize("name", AFFINE)
def test_sampled_gaussian_moments_follow_the_closed_recursion_row_by_row(name, end):
    # The trajectory is affine in its sources x(1) and z_k. Sample 0 has none and is the mean; in sample j only the j-th
    # source is 1, and the difference from sample 0 is its weight: the variance is exact.
    sde, mean, std = VPSDE(), 1.0, 0.4
    times = linspace(30, end)
    table = make_table(name, sde, times)
    rows = len(table)
    x_init, noises = torch.zeros(rows + 2, dtype=FLOAT64), torch.zeros(rows, rows + 2, dtype=FLOAT64)
    x_init[1] = 1
    noises[range(rows), range(2, rows + 2)] = 1
    states = trajectory(gaussian_score(sde, mean, std), table, x_init, noises)
    expected = gaussian_recursion(table, sde, mean, std)
    np.testing.assert_allclose(states[:, 0].numpy(), expected[:, 0], rtol=1e-9, atol=1e-9)
    variance = (states[:, 1:] - states[:, :1]).square().sum(1)
    np.testing.assert_allclose(variance.numpy(), expected[:, 1], rtol=1e-9, atol=1e-9)


# Orders of convergence -------------------------------------------------------------------------------------------


def observed_orders(errors):
    """Returns log2 of the ratios of successive errors, whose step is halved each time."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def check_order(errors, order):
    """Checks that both slopes are near the order, the second twice as near: the next term is h times smaller."""
    coarse, fine = (abs(observed - order) for observed in observed_orders(errors))
    assert coarse < 0.15
    assert fine < coarse / 1.6


@pytest.mark.parametrize("name", AFFINE)
def test_order_of_convergence(name):
    # Started from the marginal at t = 1, mean and variance differ from the marginal's at the end by the solver's error.
    # The steps grow from almost zero, so that the lower order of a multistep method's first rows does not matter.
    sde, mean, std, end = VPSDE(), 1.0, 0.5, 0.2
    kind, variant = VARIANTS[name]
    options = {"lower_order_final": False} if "lower_order_final" in kind.options else {}

    def marginal(t):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        return alpha * mean, alpha**2 * std**2 + sigma**2

    errors = []
    for steps in (320, 640, 1280):
        intervals = steps // kind.rows_per_interval
        times = 1 - (1 - end) * torch.linspace(0, 1, intervals + 1, dtype=FLOAT64) ** 2
        table = make_table(name, sde, times, **options)
        moments = gaussian_recursion(table, sde, mean, std, marginal(1.0))[-1]
        errors.append(np.abs(moments - marginal(end)))
    check_order([variance for _, variance in errors], variant.order)
    # Solvers of a schedule treat the linear part exactly; on the marginal the mean score is 0 and the mean D is the
    # data's: their mean is exact, up to 1280 rows of a few roundings.
    means = [mean for mean, _ in errors]
    is_exact = max(means) < 1280 * 8 * 2**-53
    assert is_exact or not kind.is_on_schedule
    if not is_exact:
        check_order(means, variant.order)


def test_euler_maruyama_strong_order_is_one():
    # N(1, 1) data: in reverse time dx = (-beta / 2 x + beta alpha) ds + sqrt(beta) dW, linear with additive noise. Its
    # solution is x(end) = g(0) x + int g (beta alpha ds + sqrt(beta) dW) with g(s) = exp(-1/2 int_s beta), whose
    # stochastic integral is the midpoint sum over 4096 fine increments, 8 times finer than the finest tested step.
    sde, end, paths, fine = VPSDE(), 0.02, 500, 4096
    h = (1 - end) / fine
    dw = math.sqrt(h) * normals(fine, paths)
    x_init = normals(paths, seed=1)
    middle = 1 - (torch.arange(fine, dtype=FLOAT64) + 0.5) * h
    decay = torch.exp(-0.5 * (sde.integral_beta(middle) - sde.integral_beta(end)))
    exact = torch.exp(-0.5 * (sde.integral_beta(1.0) - sde.integral_beta(end))) * x_init
    exact = exact + (decay * sde.beta(middle) * sde.alpha(middle)).sum() * h
    exact = exact + (decay * sde.diffusion(middle)) @ dw

    errors = []
    for steps in (128, 256, 512):
        increments = dw.reshape(steps, fine // steps, paths).sum(1)
        z = increments / math.sqrt((1 - end) / steps)
        x = trajectory(gaussian_score(sde, 1.0, 1.0), solvers.euler_maruyama(sde, linspace(steps, end)), x_init, z)[-1]
        errors.append(float((x - exact).square().mean().sqrt()))
    # A root mean square over 500 paths is accurate to 1 / sqrt(1000) = 3 %, and successive ones are correlated: 0.1.
    assert observed_orders(errors) == pytest.approx([1, 1], abs=0.1)


# build -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_end", [0.0, 0.3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name, kind in REGISTRY.items() if kind.rows_per_interval == 1])
def test_build_is_the_named_solver_on_equidistant_times(name, prediction, t_end):
    sde = VPSDE(0.2, 15.0)
    built = solvers.build(name, sde, 7, t_end=t_end, prediction=prediction)
    expected = make_table(name, sde, linspace(7, t_end), prediction)
    assert len(built) == 7
    assert float(built.time[0]) == 1.0
    assert torch.equal(built.packed, expected.packed)


@pytest.mark.parametrize("name", SOLVERS)
def test_build_of_a_single_step(name):
    table = solvers.build(name, VPSDE(), 1, t_end=0.1)
    assert len(table) == 1
    assert float(table.time[0]) == 1.0
    assert not table.A[0, 0, 1:].any()  # there is no history


def test_build_heun_takes_two_rows_an_interval():
    table = solvers.build("heun", VPSDE(), 4, t_end=0.2)
    assert table.time.tolist() == pytest.approx([1.0, 0.6, 0.6, 0.2], abs=1e-15)
    assert two_slots(table)["c"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_build_heun_with_an_odd_row_ends_in_an_euler_step(prediction):
    sde = VPSDE()
    table = solvers.build("heun", sde, 5, prediction=prediction)
    assert table.time.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3], abs=1e-15)
    assert two_slots(table)["c"].tolist() == [0, 1, 0, 1, 0]
    x, f = normals(4), normals(4, seed=1)
    alpha, sigma = sde.alpha(table.time[4]), sde.sigma(table.time[4])
    score = {
        "score": f,
        "eps": -f / sigma,
        "x0": -(x - alpha * f) / sigma**2,
        "v": -(sigma * x + alpha * f) / sigma,
        "flow": -(x + alpha * f) / (alpha + sigma) / sigma,
    }[prediction]
    expected = x + (1 / 3) * sde.beta(table.time[4]) / 2 * (x + score)
    got = reference.solver_step((x, 0 * x), f, table, 4)[0]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_heun_needs_no_score_at_t_zero(prediction):
    with pytest.raises(ValueError, match=r"takes an odd number of steps.*got steps=4, take 3 or 5"):
        solvers.build("heun", VPSDE(), 4, prediction=prediction)
    assert len(solvers.build("heun", VPSDE(), 4, prediction=prediction, t_end=0.01)) == 4
    assert len(solvers.heun(VPSDE(), linspace(2), prediction)) == 3
    with pytest.raises(ValueError, match=f"predicts {prediction} has no velocity at t = 0"):
        solvers.heun(VPSDE(), linspace(2), prediction, euler_final=False)


def test_heun_corrects_down_to_t_zero_for_a_score():
    assert len(solvers.heun(VPSDE(), linspace(2))) == 4
    assert len(solvers.heun(VPSDE(), linspace(2), euler_final=True)) == 3


@pytest.mark.parametrize("name", [name for name, kind in REGISTRY.items() if "clip" in kind.options])
def test_build_passes_the_clip_on(name):
    assert solvers.build(name, VPSDE(), 3, clip=0.5).clip == 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_build_takes_an_sde_whose_noise_starts_at_zero(name):
    # beta(0) = 0, and no row divides by it.
    assert len(solvers.build(name, VPSDE(0.0, 20.0), 5)) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "nobody"}, ValueError, "solver must be one of .*euler_maruyama, .*, got 'nobody'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"t_end": 1.0}, ValueError, r"t_end must be in \[0, 1\), got 1.0"),
        ({"t_end": -0.1}, ValueError, "t_end must be in"),
        ({"t_end": math.nan}, ValueError, "t_end must be in"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of score, eps, x0, v, flow, got 'noise'"),
        (
            {"clip": 1.0},
            ValueError,
            "clip bounds a predicted x_0, which euler_maruyama does not use; pick .*ddpm, .* got 1.0",
        ),
        ({"solver": "ddpm", "clip": 0.0}, ValueError, "clip must be a positive number or None, got 0.0"),
        ({"solver": "ddpm", "clip": math.nan}, ValueError, "clip must be a positive number"),
    ],
)
def test_build_names_bad_arguments(arguments, error, message):
    good = {"solver": "euler_maruyama", "sde": VPSDE(), "steps": 3}
    with pytest.raises(error, match=message):
        solvers.build(**{**good, **arguments})


# StepTable and its builders: errors ------------------------------------------------------------------------------


COLUMNS = ("time", "a", "b", "c", "d", "e", "p", "q")


def columns(k=3, **changes):
    return {**{name: torch.ones(k, dtype=FLOAT64) for name in COLUMNS}, **changes}


def test_step_table_tells_its_rows():
    table = StepTable(**columns(p=torch.tensor([1.0, 2.0, 3.0], dtype=FLOAT64), c=torch.full((3,), 4.0).double()))
    assert (len(table), table.slots, table.clip) == (3, 2, None)
    row = table.row(1)
    assert (row.time, row.q, row.n, row.p) == (1, 1, (1, 0), (2, 0))
    assert (row.b, row.e, row.d, row.A) == ((1, 0), (1, 1), (1, 0), ((1, 4), (0, 0)))


@pytest.mark.parametrize("name", COLUMNS)
def test_step_table_wants_float64_tensors(name):
    with pytest.raises(TypeError, match=f"StepTable.{name} must be a float64 tensor, got torch.float32"):
        StepTable(**columns(**{name: torch.ones(3)}))
    with pytest.raises(TypeError, match=f"StepTable.{name} must be a float64 tensor, got list"):
        StepTable(**columns(**{name: [1.0, 1.0, 1.0]}))


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "time"])
@pytest.mark.parametrize("shape", [(2,), (3, 1), ()], ids=str)
def test_step_table_wants_columns_of_one_length(name, shape):
    with pytest.raises(ValueError, match=f"StepTable.{name} must have shape"):
        StepTable(**columns(**{name: torch.ones(shape, dtype=FLOAT64)}))


def test_step_table_wants_a_row():
    with pytest.raises(ValueError, match=r"StepTable.time must have shape .* K >= 1"):
        StepTable(**columns(0))


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_table_wants_finite_coefficients(name, value):
    with pytest.raises(ValueError, match=rf"StepTable.{name} must be finite in fp32, got {value} in row 1"):
        StepTable(**columns(**{name: torch.tensor([1.0, value, 1.0], dtype=FLOAT64)}))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_step_table_wants_a_positive_clip(clip):
    with pytest.raises(ValueError, match="clip must be a positive number or None"):
        StepTable(**columns(), clip=clip)


@pytest.mark.parametrize("name", [name for name, kind in REGISTRY.items() if not kind.is_on_schedule])
@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ([1.0], ValueError, "times must be 1-d with at least 2 points"),
        ([[1.0, 0.0]], ValueError, "times must be 1-d with at least 2 points"),
        ([0.5, 0.0, 1.0], ValueError, r"times must decrease strictly within \[0, 1\], got 0.5 .. 1 over 3 points"),
        ([1.0, 0.5, 0.5], ValueError, "times must decrease strictly"),
        ([1.1, 0.5], ValueError, "times must decrease strictly within"),
        ([0.5, -0.1], ValueError, "times must decrease strictly within"),
        ([1.0, math.nan], ValueError, "times must be finite, got nan"),
        ("now", TypeError, "times must be a 1-d tensor or sequence of numbers, got str"),
        (None, TypeError, "times must be a 1-d tensor or sequence of numbers, got NoneType"),
    ],
)
def test_continuous_solvers_name_bad_times(name, times, error, message):
    with pytest.raises(error, match=message):
        getattr(solvers, name)(VPSDE(), times)


@pytest.mark.parametrize("name", [name for name, kind in REGISTRY.items() if kind.is_on_schedule])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": [9.0]}, "alpha and sigma must have one point more than time, got 3, 3 and 1"),
        ({"alpha": [0.3, 0.9]}, "alpha and sigma must have one point more than time, got 2, 3 and 2"),
        ({"alpha": [0.3, 0.0, 0.9]}, "alpha must be positive, or zero at the first point, got 0"),
        ({"alpha": [-0.1, 0.8, 0.9]}, "alpha must be positive, or zero at the first point, got -0.1"),
        ({"alpha": [0.0, 0.0, 0.9], "prediction": "v"}, "alpha must be positive, or zero at the first point, got 0"),
        (
            {"alpha": [0.0, 0.8, 0.9]},
            "prediction='eps' does not determine x_0 where alpha is 0: .* prediction='v', 'x0' or 'flow'",
        ),
        ({"alpha": [1e-40, 0.8, 0.9], "prediction": "score"}, "prediction='score' does not determine .*is 1e-40"),
        ({"sigma": [0.9, 0.0, 0.1]}, "sigma must be positive, or zero at the last point, got 0"),
        ({"sigma": [0.9, 0.5, -0.1]}, "sigma must be positive, or zero at the last point, got -0.1"),
        ({"sigma": [0.9, 0.5, 0.7]}, "sigma / alpha must decrease strictly"),
        ({"alpha": [0.9, 0.5, 0.1]}, "sigma / alpha must decrease strictly"),
        ({"sigma": [0.9, math.nan, 0.1]}, "sigma must be finite, got nan"),
        ({"alpha": [0.9]}, "alpha must be 1-d with at least 2 points"),
        ({"prediction": "x_0"}, "prediction must be one of score, eps, x0, v, flow, got 'x_0'"),
    ],
)
def test_schedule_solvers_name_bad_schedules(name, changes, message):
    good = {"alpha": [0.3, 0.8, 0.9], "sigma": [0.9, 0.5, 0.1], "time": [9.0, 4.0]}
    with pytest.raises(ValueError, match=message):
        getattr(solvers, name)(**{**good, **changes})


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_names_a_bad_eta(eta):
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        solvers.ddim(*grid(VPSDE(), linspace(3)), eta=eta)
