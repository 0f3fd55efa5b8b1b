"""The reference itself, against elementwise NumPy, independent formulas and autograd's numerical check."""

import itertools
import math

import numpy as np
import pytest
import torch
from tables import network, random_table, states_near
from torch import nn

from fastsde import VPSDE, NonFiniteError, StepTable, noise, reference, solvers
from fastsde.objective import Objective

FLOAT64 = torch.float64
SHAPES = [(3,), (2, 5), (1, 7), (2, 1, 3), (2, 3, 2, 5), (0, 4), (3, 0)]


def normals(*shape, seed=0, dtype=FLOAT64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def easy_table(rows=4, clip=None, seed=0, **changes):
    """Returns a table with every coefficient nonzero, except for columns given as a number; and its columns."""
    columns = {name: 0.5 + normals(rows, seed=seed + i).abs() for i, name in enumerate(("time", *"abcdepq"))}
    columns.update({name: torch.full((rows,), float(value), dtype=FLOAT64) for name, value in changes.items()})
    return StepTable(**columns, clip=clip), columns


# solver_step -----------------------------------------------------------------------------------------------------


def naive_step(x, f, row, clip, history, z, f_uncond=None, guidance=None):
    """Computes x' = a x + b f + e D + c H + d z and H' = D element by element, on NumPy arrays."""
    x_next, data = np.zeros_like(x), np.zeros_like(x)
    for i in np.ndindex(x.shape):
        out = f[i] if f_uncond is None else f_uncond[i] + guidance * (f[i] - f_uncond[i])
        d = row["p"] * x[i] + row["q"] * out
        if clip is not None:
            d = min(max(d, -clip), clip)
        x_next[i] = row["a"] * x[i] + row["b"] * out + row["e"] * d + row["c"] * history[i] + row["d"] * z[i]
        data[i] = d
    return x_next, data


def assert_is_the_equation(table, columns, row, shape, guidance=None):
    x, f, f_uncond, history, z = (normals(*shape, seed=seed) for seed in range(5))
    given = {} if guidance is None else {"f_uncond": f_uncond, "guidance": guidance}
    got = reference.solver_step((x, history)[: table.slots], f, table, row, z=z, **given)
    uncond = None if guidance is None else f_uncond.numpy()
    k = {name: column[row].item() for name, column in columns.items()}
    expected = naive_step(x.numpy(), f.numpy(), k, table.clip, history.numpy(), z.numpy(), uncond, guidance)
    for ours, theirs in zip(got, expected, strict=table.slots == 2):  # one slot has no H
        assert ours.shape == shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-14, atol=1e-14)  # sums of five terms of order 1 to 10


@pytest.mark.parametrize("c", [None, 0], ids=["two slots", "one slot"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("guidance", [None, 0.0, 2.5])
def test_the_easy_form_is_its_equation_element_by_element(c, clip, guidance):
    table, columns = easy_table(clip=clip, **({} if c is None else {"c": c}))
    assert table.slots == (2 if c is None else 1)
    for shape in SHAPES:
        assert_is_the_equation(table, columns, 2, shape, guidance)


def test_the_easy_form_with_zero_coefficients():
    for zeros in itertools.combinations("abcdepq", 3):
        table, columns = easy_table(clip=1.5, **dict.fromkeys(zeros, 0))
        assert_is_the_equation(table, columns, 1, (2, 3))


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_random_tables_are_the_equation_of_slots(slots):
    table, keys = random_table(slots, 7, clip=1.5), noise.sample_keys(slots, 3)
    states = []
    x = reference.sample(
        network, (3, 2, 5), table, keys, dtype=FLOAT64, after_row=lambda row, time, x: states.append(x.clone())
    )
    for ours, (value, _) in zip(states, states_near(table, keys, (2, 5))[1:], strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, states[-1])


def test_solver_step_leaves_its_inputs_alone():
    inputs = [normals(2, 3, seed=seed) for seed in range(5)]
    copies = [one.clone() for one in inputs]
    x, f, f_uncond, history, z = inputs
    reference.solver_step((x, history), f, easy_table(clip=0.5)[0], 0, z=z, f_uncond=f_uncond, guidance=2.0)
    for one, copy in zip(inputs, copies, strict=True):
        assert torch.equal(one, copy)


def test_new_slots_are_old_ones_or_memory_of_their_own():
    # s0' = s0, s1' = s0, s2' = f, s3' = D = f, s4' = z
    zero, one = torch.zeros(1, 5, dtype=FLOAT64), torch.eye(5, dtype=FLOAT64)[:, None]
    A = torch.stack([one[0, 0], one[0, 0], *zero.expand(3, 5)])[None]
    table = StepTable(time=one[0, :, 0], A=A, b=one[2], e=one[3], d=one[4], q=one[0, :, 0])
    slots, f, z = [normals(2, seed=seed) for seed in range(5)], normals(2, seed=5), normals(2, seed=6)
    new = reference.solver_step(slots, f, table, 0, z=z)
    assert new[0] is slots[0]
    for ours, theirs in zip(new, (slots[0], slots[0], f, f, z), strict=True):
        assert torch.equal(ours, theirs)
    assert len({each.data_ptr() for each in (*new, f, z)}) == 7


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("row", [0, 3])
def test_solver_step_draws_the_noise_of_its_row_from_the_keys(row, dtype):
    (table, _), keys = easy_table(c=0), noise.sample_keys(5, 3)
    x, f = normals(3, 2, 3, dtype=dtype), normals(3, 2, 3, seed=1, dtype=dtype)
    z = noise.normal(keys, row + 1, (2, 3)).to(dtype)
    (got,) = reference.solver_step((x,), f, table, row, keys=keys)
    assert got.dtype == dtype
    assert torch.equal(got, reference.solver_step((x,), f, table, row, z=z)[0])


def test_solver_step_without_noise_needs_no_keys_and_with_noise_does():
    x = normals(2, 3)
    reference.solver_step((x,), x, easy_table(c=0, d=0)[0], 0)
    with pytest.raises(TypeError, match="keys must be given to draw noise, got None"):
        reference.solver_step((x,), x, easy_table(c=0)[0], 0)


# sample ----------------------------------------------------------------------------------------------------------


def affine_model(x, t, shift=0.0):
    return -x * t.reshape(-1, *(1,) * (x.ndim - 1)) + shift


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 1, 4), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_sample_is_a_loop_of_network_and_step(shape, dtype):
    (table, _), keys = easy_table(rows=5, clip=2.0, d=0.5), noise.sample_keys(1, shape[0])
    x, history = noise.normal(keys, 0, shape[1:]).to(dtype), torch.zeros(shape, dtype=dtype)
    for row in range(5):
        f = affine_model(x, torch.full(shape[:1], float(table.time[row]), dtype=dtype))
        z = noise.normal(keys, row + 1, shape[1:]).to(dtype)
        x, history = reference.solver_step((x, history), f, table, row, z=z)
    got = reference.sample(affine_model, shape, table, keys, dtype=dtype)
    assert (got.shape, got.dtype) == (shape, dtype)
    assert torch.equal(got, x)


def test_sample_calls_the_network_with_the_state_and_the_time_of_each_sample():
    calls = []

    def model(x, t, label):
        calls.append((tuple(x.shape), x.dtype, t.tolist(), t.dtype, label))
        return x

    table = solvers.build("ddim", VPSDE(), 3)
    reference.sample(model, (2, 4), table, noise.sample_keys(0, 2), model_kwargs={"label": "cat"})
    assert calls == [
        ((2, 4), torch.float32, [pytest.approx(time, rel=2**-24)] * 2, torch.float32, "cat")
        for time in (1, 2 / 3, 1 / 3)
    ]


def test_sample_starts_from_x_init_and_leaves_it_alone():
    table, x_init = solvers.build("ddim", VPSDE(), 4), normals(2, 3)
    copy = x_init.clone()
    a, b = (reference.sample(affine_model, (2, 3), table, noise.sample_keys(s, 2), x_init=x_init) for s in (0, 1))
    assert torch.equal(a, b)  # no noise in this solver: keys no longer matter
    assert torch.equal(x_init, copy)


def test_sample_asks_for_noise_only_in_rows_that_have_any():
    rows = []
    _, columns = easy_table(rows=4)
    table = StepTable(**columns | {"d": torch.tensor([1.0, 0, 1, 0], dtype=FLOAT64)})

    def noise_function(row, x):
        rows.append((row, tuple(x.shape)))
        return torch.ones_like(x)

    reference.sample(affine_model, (2, 3), table, noise.sample_keys(0, 2), noise_function=noise_function)
    assert rows == [(0, (2, 3)), (2, (2, 3))]


def test_noise_function_replaces_the_contract():
    table, keys = solvers.build("euler_maruyama", VPSDE(), 6), noise.sample_keys(3, 2)
    own = reference.sample(affine_model, (2, 3), table, keys)
    given = reference.sample(
        affine_model, (2, 3), table, keys, noise_function=lambda row, x: noise.normal(keys, row + 1, (3,))
    )
    silent = reference.sample(affine_model, (2, 3), table, keys, noise_function=lambda row, x: torch.zeros_like(x))
    assert torch.equal(own, given)
    assert not torch.equal(own, silent)


def test_after_row_sees_every_state():
    seen = []
    table = solvers.build("euler_maruyama", VPSDE(), 3)
    keys = noise.sample_keys(0, 2)
    final = reference.sample(affine_model, (2, 3), table, keys, after_row=lambda *state: seen.append(state))
    assert [(row, time) for row, time, _ in seen] == list(enumerate(table.time.tolist()))
    assert torch.equal(seen[-1][2], final)


def test_a_sample_does_not_depend_on_its_batch():
    table = solvers.build("euler_maruyama", VPSDE(), 10)
    together = reference.sample(affine_model, (5, 3), table, noise.sample_keys(7, 5))
    apart = [reference.sample(affine_model, (1, 3), table, noise.sample_keys(7, 1, i)) for i in range(5)]
    # No reduction crosses samples, so only vectorised and scalar instructions differ, by 1 ulp per row.
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=10 * 2**-24 * float(together.abs().max()))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_mixes_the_two_outputs(guidance):
    # For f = -t x + shift the mix is the same network with shift w 0.3 + (1 - w) (-0.1).
    table, keys = solvers.build("euler_maruyama", VPSDE(), 8), noise.sample_keys(0, 2)
    mixed = reference.sample(
        affine_model,
        (2, 3),
        table,
        keys,
        dtype=FLOAT64,
        model_kwargs={"shift": 0.3},
        uncond_kwargs={"shift": -0.1},
        guidance=guidance,
    )
    kwargs = {"shift": 0.3 * guidance - 0.1 * (1 - guidance)}
    expected = reference.sample(affine_model, (2, 3), table, keys, dtype=FLOAT64, model_kwargs=kwargs)
    torch.testing.assert_close(mixed, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_network_that_is_not_finite_is_reported_with_row_and_time(value):
    def model(x, t):
        f = torch.zeros_like(x)
        f[1, 2] = value if float(t[0]) < 0.6 else 0.0
        return f

    table = solvers.build("euler_maruyama", VPSDE(), 4)  # times 1, 0.75, 0.5, 0.25
    with pytest.raises(NonFiniteError, match=r"the network returned NaN or infinity in row 2, at time 0\.5"):
        reference.sample(model, (2, 3), table, noise.sample_keys(0, 2))


def test_an_unconditional_output_that_is_not_finite_is_reported():
    def model(x, t, bad=False):
        return torch.full_like(x, math.nan if bad and float(t[0]) < 0.9 else 0.0)

    table = solvers.build("euler_maruyama", VPSDE(), 4)
    with pytest.raises(NonFiniteError, match=r"the network returned NaN or infinity in row 1, at time 0\.75"):
        reference.sample(model, (2, 3), table, noise.sample_keys(0, 2), guidance=2.0, uncond_kwargs={"bad": True})


# perturb ---------------------------------------------------------------------------------------------------------


def coefficients(batch, seed=9):
    """Returns six arbitrary numbers per sample, which no objective has."""
    return normals(batch, 6, seed=seed)


def naive_terms(k, x, columns):
    """Returns the sum of coefficients times arrays, element by element, on NumPy arrays."""
    out = np.zeros(x[0].shape)
    for i in np.ndindex(out.shape):
        out[i] = sum(float(k[i[0], column]) * each[i] for column, each in zip(columns, x, strict=True))
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perturb_is_its_equation(shape):
    x_0, z, k = normals(*shape), normals(*shape, seed=1), coefficients(shape[0])
    noised = reference.perturb(x_0, None, 0, k, z=z)
    assert torch.equal(noised.tau, k[:, 0])
    assert noised.z is z
    expected = naive_terms(k, (x_0.numpy(), z.numpy()), (1, 2))
    np.testing.assert_allclose(noised.x_in.numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perturb_draws_noise_from_its_stream(shape):
    keys, x_0, k = noise.sample_keys(4, shape[0]), normals(*shape, dtype=torch.float32), coefficients(shape[0]).float()
    noised = reference.perturb(x_0, keys, 17, k)
    z = noise.normal(keys, 17, shape[1:], stream=1)
    assert torch.equal(noised.z, z)
    assert noised.x_in.dtype == torch.float32
    assert torch.equal(noised.x_in, reference.perturb(x_0, None, 0, k, z=z).x_in)
    with pytest.raises(TypeError, match="keys must be given"):
        reference.perturb(x_0, None, 2, k)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (2 / 255, -1.0), (1.0, 0.5), (3.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, FLOAT64])
def test_perturb_scales_and_shifts_the_data(dtype, scale, shift):
    # Every byte value, so that wrapping or saturation would be noticed.
    x_0, z, k = torch.arange(256).reshape(4, 64).to(dtype), normals(4, 64), coefficients(4)
    x_in = reference.perturb(x_0, None, 0, k, scale=scale, shift=shift, z=z.to(torch.float32)).x_in
    assert x_in.dtype == (FLOAT64 if dtype == FLOAT64 else torch.float32)
    data = scale * x_0.double() + shift
    expected = naive_terms(k, (data.numpy(), z.float().double().numpy()), (1, 2))
    tolerance = 6 * 2**-24 * float(k.abs().max()) * (float(data.abs().max()) + float(z.abs().max()))
    np.testing.assert_allclose(x_in.double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_perturb_gathers_rows_by_index(dtype):
    data, index = torch.arange(60).reshape(10, 3, 2).to(dtype), torch.tensor([9, 0, 9, 4])
    keys, k = noise.sample_keys(0, 4), coefficients(4).float()
    got = reference.perturb(data, keys, 1, k, index=index, scale=0.1, shift=-1.0)
    expected = reference.perturb(data[[9, 0, 9, 4]], keys, 1, k, scale=0.1, shift=-1.0)
    assert torch.equal(got.x_in, expected.x_in)
    assert got.x_in.shape == (4, 3, 2)
    # Rows 0 and 2 have the same data, but different draws.
    assert not torch.equal(got.x_in[0], got.x_in[2])


# dsm_loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape)], ids=str)
def test_dsm_loss_is_its_equation(shape):
    f, x_0, z, k = *(normals(*shape, seed=seed) for seed in range(3)), coefficients(shape[0])
    loss = reference.dsm_loss(f, x_0, None, 0, k, z=z)
    assert loss.shape == ()
    residual = naive_terms(k, (f.numpy(), x_0.numpy(), z.numpy()), (3, 4, 5))
    assert float(loss) == pytest.approx(np.square(residual).mean(), rel=1e-13)


def test_dsm_loss_of_the_default_is_the_tutorials():
    # mean((sigma s + z)^2), with uniform times, the loss of the design's section 2.
    objective, keys, x_0 = Objective(), noise.sample_keys(0, 6), normals(6, 2, dtype=torch.float32)
    k = reference.training_draws(keys, 3, 1, (2,), objective).coefficients
    x_in, t, z = reference.perturb(x_0, keys, 3, k)
    sigma = objective.sde.sigma(t.double())[:, None]
    expected = ((sigma * -x_in + z) ** 2).double().mean()
    assert float(reference.dsm_loss(-x_in, x_0, keys, 3, k)) == pytest.approx(float(expected), rel=8 * 2**-23)


def test_what_has_no_coefficient_does_not_matter():
    f, x_0, z = (normals(4, 3, seed=seed) for seed in range(3))
    k = coefficients(4)
    k[0, 3] = k[1, [1, 4]] = k[2, [2, 5]] = 0
    f[0], x_0[1], z[2] = math.nan, math.inf, -math.inf
    assert reference.perturb(x_0, None, 0, k, z=z).x_in.isfinite().all()
    f.requires_grad_()
    loss = reference.dsm_loss(f, x_0, None, 0, k, z=z)
    assert loss.isfinite()
    loss.backward()
    assert f.grad.isfinite().all()
    assert (f.grad[0] == 0).all()


def test_dsm_loss_gradient():
    f, x_0, z = (normals(3, 2, seed=seed) for seed in range(3))

    def loss(f, x_0):
        return reference.dsm_loss(f, x_0, None, 0, coefficients(3), z=z)

    assert torch.autograd.gradcheck(loss, (f.requires_grad_(), x_0.requires_grad_()))


def test_dsm_loss_draws_the_noise_of_perturb():
    keys, k = noise.sample_keys(2, 4), Objective(prediction="eps").table(torch.tensor([0.01, 0.3, 0.6, 1.0]))
    data, index = torch.arange(30).reshape(6, 5).to(torch.uint8), torch.tensor([5, 0, 0, 2])
    options = {"index": index, "scale": 1 / 15, "shift": -1.0}
    z = reference.perturb(data, keys, 8, k, **options).z
    assert float(reference.dsm_loss(z, data, keys, 8, k, **options)) == 0
    assert float(reference.dsm_loss(z, data, keys, 9, k, **options)) > 0.1
    with pytest.raises(TypeError, match="keys must be given"):
        reference.dsm_loss(z, data[index], None, 8, k)


# training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3), (0,)], ids=str)
def test_training_draws_come_from_their_streams(shape):
    keys, objective = noise.sample_keys(1, 50), Objective(t_min=0.1)
    rows, k, z = reference.training_draws(keys, 6, 7, shape, objective)
    assert torch.equal(z, noise.normal(keys, 6, shape, stream=1))
    assert rows.tolist() == [math.floor(7 * float(u)) for u in noise.uniform(keys, 6, (), stream=3)]
    assert set(rows.tolist()) == set(range(7))
    assert torch.equal(k, objective.table(0.1 + (1 - 0.1) * noise.uniform(keys, 6, (), stream=2)))


def test_training_draws_of_several_steps_equal_those_of_each():
    keys, objective = noise.sample_keys(1, 5), Objective()
    ahead = reference.training_draws(keys, torch.tensor([3, 4, 9]), 100, (2,), objective)
    for i, step in enumerate((3, 4, 9)):
        for many, one in zip(ahead, reference.training_draws(keys, step, 100, (2,), objective), strict=True):
            assert torch.equal(many[i], one)


class TinyScore(nn.Module):
    """A network with a few weights, the same for every instance."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(0.5 * normals(*weight.shape, seed=i))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], dim=1))


def train(steps=5, draws=None, batch=16, objective=Objective(), **options):  # noqa: B008 (immutable)
    """Returns the weights and losses of a short training run with Adam."""
    model, keys, data = TinyScore(), noise.sample_keys(3, batch), normals(40, 2, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        given = None if draws is None else reference.Draws(*(draw[step] for draw in draws))
        losses.append(reference.train_step(model, optimizer, data, keys, step, objective, draws=given, **options))
    assert not any(loss.requires_grad for loss in losses)
    return [weight.detach().clone() for weight in model.parameters()], torch.stack(losses)


def test_training_is_deterministic():
    options = {"objective": Objective(prediction="v", weighting="target", t_min=0.01), "scale": 0.5, "shift": 0.1}
    weights, losses = train(**options)
    weights_again, losses_again = train(**options)
    assert torch.equal(losses, losses_again)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    assert not torch.equal(weights[0], next(TinyScore().parameters()))


def test_draws_made_ahead_equal_draws_made_inside():
    objective = Objective(t_min=0.01)
    ahead = reference.training_draws(noise.sample_keys(3, 16), torch.arange(5), 40, (2,), objective)
    weights, losses = train(objective=objective)
    weights_ahead, losses_ahead = train(draws=ahead)
    assert torch.equal(losses, losses_ahead)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_ahead, strict=True))


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(prediction="x0", weighting="target")], ids=["score", "x0"]
)
def test_train_step_is_perturb_loss_and_one_step_of_the_optimizer(objective):
    keys, data, lr = noise.sample_keys(5, 8), normals(20, 2).mul(50).to(torch.uint8), 1e-3
    model, copy = TinyScore(), TinyScore()
    scaling = {"scale": 0.02, "shift": -1.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    got = reference.train_step(model, optimizer, data, keys, 4, objective, **scaling)

    index, k, _ = reference.training_draws(keys, 4, 20, (2,), objective)
    x_in, tau, _ = reference.perturb(data, keys, 4, k, index=index, **scaling)
    loss = reference.dsm_loss(copy(x_in, tau), data, keys, 4, k, index=index, **scaling)
    loss.backward()
    assert torch.equal(got, loss.detach())
    for trained, weight in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(trained.detach(), weight.detach().add(weight.grad, alpha=-lr))


def test_training_lowers_the_loss():
    # The eps loss of the zero network is 1; two hundred steps on N(0, 1) data must get well below the start.
    _, losses = train(steps=200, objective=Objective(prediction="eps"), batch=64)
    assert float(losses[-20:].mean()) < 0.7 * float(losses[:20].mean())


def test_autocast_runs_the_network_alone_in_bf16():
    seen = []

    class Spy(TinyScore):
        def forward(self, x, t):
            f = super().forward(x, t)
            seen.append((x.dtype, f.dtype))
            return f

    model = Spy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, keys = normals(20, 2, dtype=torch.float32), noise.sample_keys(0, 8)
    loss = reference.train_step(model, optimizer, data, keys, 0, Objective(), autocast=torch.bfloat16)
    assert seen == [(torch.float32, torch.bfloat16)]
    assert loss.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_train_step_wants_keys_or_draws():
    model = TinyScore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="keys must be given"):
        reference.train_step(model, optimizer, normals(20, 2, dtype=torch.float32), None, 0, Objective())


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_ema_update_moves_each_weight(decay):
    model, ema = TinyScore(), TinyScore()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    before = [weight.detach().clone() for weight in ema.parameters()]
    reference.ema_update(ema, model, decay)
    for old, new, target in zip(before, ema.parameters(), model.parameters(), strict=True):
        # A lerp of numbers below 4 that differ by 1: two roundings of 2^-23.
        torch.testing.assert_close(new.detach(), decay * old + (1 - decay) * target.detach(), rtol=0, atol=2 * 2**-22)
    assert all(weight.requires_grad for weight in ema.parameters())
