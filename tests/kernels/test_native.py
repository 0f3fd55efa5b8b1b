"""Properties of the native kernels: exact words, independence of the number of threads, the GIL, memory safety."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import random_table
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from trajectories import trajectory

import fastsde
from fastsde import VPSDE, StepTable, noise, ops, reference, solvers
from fastsde.models import MLP, ConcatTime
from fastsde.models.activations import ACTIVATIONS
from fastsde.objective import Objective

SDE = VPSDE()
OBJECTIVE = Objective(SDE, "v")
TABLE = solvers.build("ddpm", SDE, 6, prediction="eps", clip=2.0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _bits(keys: Tensor, step: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    bits: Tensor = ops.dispatch.kernel("normal", keys.device).bits(keys, step, stream, shape)
    return bits


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("stream", [0, 3, 15])
@pytest.mark.parametrize("step", [0, 1, 2**28 - 1])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 63), (63, 2), (16, 1000), (0, 3), (3, 0), (1, 2**16 + 17)])
def test_words_are_exactly_those_of_the_contract(n: int, size: int, step: int, stream: int) -> None:
    low, high = -(2**63), 2**63 - 1
    keys = torch.randint(low, high, (n, 2))
    keys[: n // 2, 1] = -1 - torch.arange(n // 2)  # offsets that wrap
    assert torch.equal(_bits(keys, step, stream, (size,)), noise.bits(keys, step, (size,), stream))


@pytest.mark.usefixtures("native")
def test_the_published_known_answer() -> None:
    # Random123, kat_vectors: philox4x32 10, with a counter and key of zeros.
    words = _bits(torch.zeros(1, 2, dtype=torch.int64), 0, 0, (4,))
    assert [f"{word:08x}" for word in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def _results(batch: int, size: int) -> list[Tensor]:
    """Returns the results of every operation except training, on inputs that depend only on the shape."""
    generator = torch.Generator().manual_seed(batch * size)
    x, f, z = torch.randn(3, batch, size, generator=generator)
    keys, t = noise.sample_keys(1, batch), torch.rand(batch, generator=generator)
    coefficients = ops.coefficients(OBJECTIVE, t)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = MLP(size, (20,)) if size <= 100 else None
    results = [
        ops.sample_keys(size, 20 * batch),
        ops.normal(keys, 3, (size,)),
        *ops.solver_step([x], f, TABLE, 1, keys=keys),
        *ops.solver_step([x, f, z], f, random_table(3, seed=1, clip=1.0), 1, keys=keys),
    ]
    results += [ops.training_times(OBJECTIVE, keys, 7, 3), coefficients]
    results += ops.perturb(x, keys, 4, coefficients, keep_noise=True)
    f.requires_grad_()
    loss = ops.dsm_loss(f, x, keys, 5, coefficients)
    results += [loss.detach(), *torch.autograd.grad(loss, f)]
    if model is not None:
        results += trajectory(model, TABLE, keys, every=2)
    return results


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (300, 2), (63, 100), (2, 10_007), (5000, 3)])
def test_results_do_not_depend_on_the_number_of_threads(batch: int, size: int) -> None:
    torch.set_num_threads(1)
    alone = _results(batch, size)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for ours, theirs in zip(_results(batch, size), alone, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("hidden", [(512, 512, 512), (701, 700), (300, 7, 1000)])
def test_few_samples_of_wide_layers_do_not_depend_on_how_many_threads_share_them(hidden: tuple[int, ...]) -> None:
    model, keys = MLP(3, hidden, "SiLU"), noise.sample_keys(1, 100)
    torch.set_num_threads(1)
    whole, states = trajectory(model, TABLE, keys, every=2)
    for count, batch in ((2, 1), (2, 3), (3, 7), (2, 15), (2, 16), (3, 17), (4, 40)):
        torch.set_num_threads(1)
        alone, _ = trajectory(model, TABLE, keys[:batch])
        torch.set_num_threads(count)
        few, kept = trajectory(model, TABLE, keys[:batch], every=2)
        assert torch.equal(few, alone)
        # Up to 16 samples are summed in another order: n terms in fp32 per row and layer, of a state of about 1.
        tolerance = len(TABLE) * 1000 * 2**-24 if batch <= 16 else 0
        torch.testing.assert_close(few, whole[:batch], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(kept, states[:, :batch], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13, 16])
def test_few_samples_of_wide_layers_are_those_of_the_reference(batch: int) -> None:
    for hidden in ((256, 200), (181, 182, 7, 300)):
        model = MLP(17, hidden, "GELU")
        keys, x_init = noise.sample_keys(1, batch), torch.randn(batch, 17)
        ours, _ = trajectory(model, TABLE, keys, x_init=x_init)
        with torch.no_grad():
            exact = reference.sample(
                copy.deepcopy(model).double(), (batch, 17), TABLE, keys, x_init=x_init, dtype=torch.float64
            )
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.usefixtures("native")
def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = MLP(3, (33, 20), "SiLU")
    keys = noise.sample_keys(1, 200)
    whole, _ = trajectory(model, TABLE, keys)
    for first, end in ((0, 1), (5, 70), (64, 128), (199, 200)):
        assert torch.equal(trajectory(model, TABLE, keys[first:end])[0], whole[first:end])


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize(("batch", "slots"), [(1, 2), (63, 1), (70, 8), (257, 3)])
def test_a_call_in_pieces_is_the_call(batch: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(slots)
    table = random_table(slots, 7, clip=0.8)
    model, keys = MLP(3, (16,), "SiLU"), noise.sample_keys(1, batch)
    x_init = torch.randn(batch, 3, generator=generator) if batch == 63 else None
    whole, states = trajectory(model, table, keys, x_init=x_init, every=2)
    kernel = ops.dispatch.kernel("mlp_sampler", keys.device)
    for piece in ((1, batch), (2, 16), (3, 50), (len(table), 64), (len(table) - 1, batch)):
        monkeypatch.setattr(kernel, "piece", lambda *given, piece=piece: piece)
        rows: list[int] = []
        pieces, kept = trajectory(model, table, keys, x_init=x_init, every=2, progress=rows.append)
        assert torch.equal(pieces, whole)
        assert torch.equal(kept, states)
        assert sum(rows) == len(table)
        assert max(rows) == piece[0]


@pytest.mark.usefixtures("native")
def test_pieces_are_short_and_as_few_as_that_allows() -> None:
    from fastsde.kernels.cpu.library import call_products
    from fastsde.kernels.cpu.mlp_sampler import piece

    most = call_products()
    for rows, batch, width, threads in product((1, 50, 999), (1, 17, 1000, 10**7), (10, 10**4, 6 * 10**6), (1, 2, 64)):
        rows_each, samples = piece(rows, batch, width, threads)
        assert 1 <= rows_each <= rows
        each = math.ceil(min(samples, batch) / threads / 16) * 16  # samples per thread
        assert each * rows_each * width <= most
        whole = math.ceil(batch / threads / 16) * 16 * rows * width
        assert ((rows_each, samples) == (rows, batch)) == (whole <= most)
        calls = math.ceil(rows / rows_each) * math.ceil(batch / samples)
        assert calls <= 2 * whole / most + 1


@pytest.mark.slow
def test_ctrl_c_ends_a_long_run() -> None:
    if not ops.has_native(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    code = """
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
import fastsde
from fastsde.models import MLP
sampler = fastsde.Sampler(MLP(2, (512, 512, 512)), (2,), backend="persistent")
sampler(1)
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    sampler(100_000)  # minutes
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(fastsde.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert float(run.stdout) < 5, run.stderr  # seconds


class _Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x)


_FUNCTIONS = {**ACTIVATIONS, **{name: getattr(torch, name) for name in ("erf", "abs", "cos")}}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", _FUNCTIONS)
def test_functions_are_exact_to_rounding_however_large_or_small_x_is(name: str) -> None:
    function = _FUNCTIONS[name] if name not in ACTIVATIONS else ACTIVATIONS[name].build()
    sizes = torch.tensor([0.0, 1e-38, 1e-6, 0.5, 3.9, 4.2, 5.9, 5.93, 6.0, 20.0, 87.0, 90.0, 8192.5, 1e8, 1e30])
    x = torch.cat((sizes, -sizes, torch.linspace(-8, 8, 4099))).reshape(-1, 1)
    one = torch.ones(1, dtype=torch.float64)
    table = StepTable(0.5 * one, a=0 * one, b=one)  # x' = f
    found = fastsde.sample(_Elementwise(function), x.shape, x_init=x, solver=table, backend="persistent").double()
    exact = function(x.double())
    # Roundings of some ten operations, of the result and of what it is the difference of.
    assert ((found - exact).abs() <= 8 * 2.0**-24 * (1 + exact.abs())).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("layer", "value"), [(0, torch.nan), (-1, torch.nan), (-1, torch.inf)])
def test_what_is_not_finite_in_a_network_is_reported(activation: str, layer: int, value: float) -> None:
    model = MLP(2, (16, 16), activation)
    with torch.no_grad():
        model.net[layer].bias[1] = value
    with pytest.raises(fastsde.NonFiniteError, match="row 0, at time 1"):
        fastsde.sample(model, (70, 2), steps=5, backend="persistent")


@pytest.mark.usefixtures("native", "threads")
def test_other_threads_run_meanwhile() -> None:
    torch.set_num_threads(1)
    model, done, count = MLP(), threading.Event(), 0

    def run() -> None:
        fastsde.sample(model, (2000, 2), backend="persistent")
        done.set()

    fastsde.sample(model, (1, 2), backend="persistent")
    thread = threading.Thread(target=run)
    thread.start()
    while not done.is_set():
        count += 1
        done.wait(0.001)
    thread.join()
    assert count > 5


@pytest.mark.usefixtures("native")
def test_two_samplers_at_once() -> None:
    model = MLP()
    expected = fastsde.sample(model, (500, 2), steps=50, backend="persistent")
    found: list[Tensor] = []

    def run() -> None:
        found.append(fastsde.sample(model, (500, 2), steps=50, backend="persistent"))

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.usefixtures("native")
def test_torch_library_knows_step_and_draw() -> None:
    keys, x = noise.sample_keys(0, 3), torch.randn(3, 5)
    table = ops.device_table(TABLE, x.device)
    torch.library.opcheck(torch.ops.fastsde.normal.default, (keys, 3, 0, [5]))
    step = ([x], x.bfloat16(), table, 2, TABLE.kinds(2), None, keys, None, None, 0.0, 0.0, 1.0, 1.0)
    torch.library.opcheck(torch.ops.fastsde.solver_step.default, step)


@pytest.mark.usefixtures("native")
def test_torch_compile_takes_each_operation_whole() -> None:
    keys, x = noise.sample_keys(0, 3), torch.randn(3, 2)

    def run(x: Tensor, keys: Tensor) -> Tensor:
        start = ops.normal(keys, 0, (2,)) + x
        (after,) = ops.solver_step([start], start, TABLE, 0, keys=keys)
        return after * 2

    expected = run(x, keys)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, keys), expected)
    torch._dynamo.reset()


# Arguments that must not reach a kernel -----------------------------------------------------------------------------


def _linears(*shapes: tuple[int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in shapes:
        layers += [nn.Linear(i, o), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.usefixtures("native")
def test_layers_that_do_not_fit_are_no_program() -> None:
    for shapes in (((3, 64), (1, 64), (1, 2)), ((3, 8), (16, 2))):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # of PyTorch
            fastsde.sample(ConcatTime(_linears(*shapes)), (4, 2), steps=2)
    net = _linears((3, 8), (8, 2))
    net[0].bias = nn.Parameter(torch.ones(1))  # which PyTorch broadcasts
    ours, theirs = (fastsde.sample(ConcatTime(net), (4, 2), steps=2, backend=b) for b in ("persistent", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))  # its small values cancel


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_are_cast_where_fp32_is_asked_for(dtype: torch.dtype) -> None:
    model, options = MLP(2, (8,)).to(dtype), {"steps": 3, "dtype": torch.float32}
    expected = fastsde.sample(model, (4, 2), backend="eager", **options)
    found = fastsde.sample(model, (4, 2), backend="persistent", **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("native")
def test_draws_are_checked() -> None:
    keys = noise.sample_keys(0, 3)
    for bad in (keys[:, 0], torch.cat([keys, keys], 1)):
        with pytest.raises(ValueError, match="keys must have shape"):
            ops.normal(bad, 0, (2,))
    for step in (-1, 2**28):
        with pytest.raises(ValueError, match="step must be"):
            ops.normal(keys, step, (2,))
    unsigned = keys.view(torch.uint64)
    given = (1, OBJECTIVE.table(torch.rand(3)))
    signed, unsigned = (ops.perturb(torch.ones(3, 2), each, *given) for each in (keys, unsigned))
    assert torch.equal(signed.x_in, unsigned.x_in)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # by PyTorch's own
@pytest.mark.usefixtures("native")
def test_forward_derivatives_are_those_of_the_reference() -> None:
    x, keys, coefficients = torch.randn(3, 2), noise.sample_keys(0, 3), OBJECTIVE.table(torch.rand(3))
    for run in (
        lambda x: ops.solver_step([x], x, TABLE, 0, keys=keys)[0],
        lambda x: ops.perturb(x, keys, 1, coefficients).x_in,
        lambda x: ops.dsm_loss(x, torch.ones(3, 2), keys, 1, coefficients),
    ):
        derivative = torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]
        step = 1e-2
        difference = (run(x + step) - run(x - step)) / (2 * step)
        torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("native")
def test_a_tensor_of_another_dtype_is_refused_before_it_is_read() -> None:
    kernel = ops.dispatch.kernel("normal", torch.device("cpu"))
    keys = noise.sample_keys(0, 3)
    for out in (torch.empty(3, 2, dtype=torch.float64), torch.empty(2, 3).T):
        with pytest.raises(TypeError, match="takes tensors that are contiguous"):
            kernel.normal(keys, 0, 0, out)


def _halve(x: Tensor) -> None:
    x.data = x.data.half()


def _cut(x: Tensor) -> None:
    x.data = x.data[:1]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("change", [_halve, _cut])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_state_whose_memory_is_changed_is_refused_before_it_is_read(
    change: Callable[[Tensor], None], slots: int
) -> None:
    mixed = torch.full((4, slots), 0.5, dtype=torch.float64)  # the network's input has its own memory
    A = torch.eye(slots, dtype=torch.float64).expand(4, slots, slots)
    table = StepTable(torch.ones(4, dtype=torch.float64), A=A, b=mixed, n=mixed if slots > 1 else None)

    def network(x: Tensor, t: Tensor) -> Tensor:
        change(x)
        return torch.zeros_like(x)

    def draw(model: Callable[[Tensor, Tensor], Tensor], callback: Any = None) -> Tensor:
        return fastsde.sample(model, (300, 2), solver=table, backend="eager", callback=callback)

    changed = r"must have 600 elements.*the network or a callback has changed its x in place"
    if slots > 1 and change is _halve:
        draw(network)  # whose x is nobody else's
    else:
        with pytest.raises((TypeError, ValueError), match=rf"{changed}|shape of x, \[300, 2\], got \[1, 2\]"):
            draw(network)
    with pytest.raises(TypeError, match=f"slot 0 {changed}"):
        draw(lambda x, t: torch.zeros_like(x), lambda row, t, x: change(x))


@pytest.mark.usefixtures("native")
def test_tensors_without_memory_are_refused() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return TwoTensor(x, x)

    with pytest.raises(TypeError, match="plain tensors with memory of their own, got a TwoTensor without"):
        fastsde.sample(network, (3, 2), steps=2, backend="eager")
    model = MLP(2, hidden=(4,))
    sampler = fastsde.Sampler(model, (2,), steps=2, backend="persistent")
    sampler(1)
    model.net[0].weight.untyped_storage().resize_(0)  # as FSDP does between calls
    with pytest.raises(RuntimeError, match="setStorage"):  # of PyTorch
        sampler(1)


@pytest.mark.usefixtures("native")
def test_an_output_that_is_marked_as_negated_is_read_as_such() -> None:
    def conjugate(x: Tensor, t: Tensor) -> Tensor:
        f = torch.complex(x, x).conj().imag  # contiguous, like every tensor with one element
        assert f.is_neg()
        return f

    ours, expected = (fastsde.sample(conjugate, (1, 1), steps=3, backend=name) for name in ("eager", "reference"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_memory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    if ops.has_native(torch.device("cpu")) is False:
        pytest.skip("no C++ compiler")
    code = """
import resource, torch
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import UNet
model = UNetInference(UNet(1, 512, (16, 16)))
x, t = torch.randn(24, 1, 512, 512), torch.rand(24)
model(x[:1], t[:1])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
try:
    model(x, t)
except torch.OutOfMemoryError as error:
    print(error)
small = torch.full((1,), 1e-40)
print(bool((small * 1.0 != 0).all()))  # nothing flushes subnormals now
"""
    environment = os.environ | {"PYTHONPATH": str(Path(fastsde.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    expected = "the native kernel unet cannot allocate its working memory\nTrue\n"
    assert run.stdout == expected, run.stderr


# Runs every kernel on odd sizes, with tensors that end at the end of their memory.
_EVERYTHING = """
import torch
import fastsde
from fastsde import noise, ops, solvers
from native_steps import native_steps
from networks import Film, Images, Residual
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import MLP, UNet
from fastsde.models.activations import ACTIVATIONS
from fastsde.engines.unet_gradients import FixedUNet, NativeUNet
from tables import random_table
from trajectories import trajectory

torch.set_num_threads(2)
from fastsde.objective import Objective
from fastsde.sde import VPSDE

objective, table = Objective(prediction="v"), solvers.build("ddpm", VPSDE(), 3, prediction="eps", clip=1.0)
tables = [random_table(slots, 3, clip=1.0) for slots in (1, 2, 3, 5, 8)]
langevin = solvers.build("predictor_corrector", VPSDE(), 3)
for batch, size in ((1, 1), (63, 1), (1000, 3), (3, 63), (1, 1000), (1, 2**16 + 17), (0, 5), (3, 0), (17, 31), (5, 33)):
    keys, x = noise.sample_keys(0, batch), torch.randn(batch, size)
    pixels, index = torch.zeros(7, size, dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64) + 6
    ops.normal(keys, 1, (size,))
    ops.dispatch.kernel("normal", x.device).bits(keys, 1, 0, (size,))
    for row in range(3):
        ops.solver_step([x], x, table, row, keys=keys, f_uncond=x, guidance=2.0, rescale=0.5)
        ops.solver_step([x], x, langevin, row, keys=keys, f_uncond=x, guidance=x[:, :1].sum(1), rescale=0.5)
        for each in tables:
            ops.solver_step([x.clone() for _ in range(each.slots)], x.half(), each, row, z=x)
    coefficients = ops.coefficients(objective, ops.training_times(objective, keys, 2, 3)[1])
    ops.perturb(x, keys, 2, coefficients)
    z = ops.perturb(pixels, keys, 2, coefficients, index=index, dtype=torch.bfloat16, keep_noise=True).z
    f = x.clone().requires_grad_()
    for given in (None, z):
        ops.dsm_loss(f, pixels, keys, 2, coefficients, index=index, z=given).backward()
    with torch.no_grad():
        ops.dsm_loss(f, pixels, keys, 2, coefficients, index=index, scale=0.5)
mlps = [(1, (), 1), (2, (5,), 63), (3, (64, 64), 65), (17, (1, 33), 130), (70, (20,), 1), (3, (700, 701), 5)]
for dim, hidden, batch in mlps:
    for activation in ACTIVATIONS:
        model, keys = MLP(dim, hidden, activation), noise.sample_keys(0, batch)
        trajectory(model, table, keys, x_init=torch.randn(batch, dim), every=2)
        trajectory(model, tables[2], keys)
        drawn = (keys, ops.step_coefficients(objective, keys, 0, 3))
        native_steps(model, (dim,), torch.randn(9, dim), *drawn, rates=torch.full((3, 2), 1e-3))
for network, shape in ((Residual(), (2,)), (Film(), (3,)), (Images(), (2, 3, 2))):
    for batch in (1, 63):
        x, keys = torch.randn(batch, *shape), noise.sample_keys(0, batch)
        fastsde.sample(network, x.shape, steps=3, backend="persistent", x_init=x)
        if not isinstance(network, Images):
            table = ops.step_coefficients(objective, keys, 0, 3)
            native_steps(network, shape, torch.randn(9, *shape), keys, table, rates=torch.full((3, 2), 1e-3))
for options, batch in (((1, 28, (32, 64, 128)), 3), ((3, (9, 14), (16, 80)), 13), ((1, 1, (16, 16), 4), 37)):
    model = UNet(*options)
    for dtype in (torch.float32, torch.bfloat16):
        UNetInference(model, dtype)(torch.randn(batch, *model.shape).to(dtype), torch.rand(batch).to(dtype))
        for needs_x, fast in ((False, NativeUNet(model)), (True, NativeUNet(model)), (True, FixedUNet(model))):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                x = torch.randn(batch, *model.shape).requires_grad_(needs_x)
                fast(x, torch.rand(batch)).sum().backward()
print("all ran")
"""


@pytest.mark.slow
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path: Path) -> None:
    from fastsde.kernels.cpu import build

    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(each).is_absolute() for each in libraries):
        pytest.skip(f"{compiler[0]} has no sanitizers of GCC's names")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "FASTSDE_CXXFLAGS": flags,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(fastsde.__file__).parents[1], Path(__file__).parents[1]))),
    }
    run = subprocess.run([sys.executable, "-c", _EVERYTHING], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "all ran"
