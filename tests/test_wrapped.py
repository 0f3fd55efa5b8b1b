"""Wrapped networks are unwrapped, samplers can be pickled, and measuring has no side effects."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastsde
from fastsde import Sampler, notices
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import MLP, UNet


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return wrapped


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": compiled,
    "nested": lambda model: compiled(nn.DataParallel(model)),
}


# Wrapped networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_wrapped_networks_run_as_what_is_inside(wrap: Any, dtype: torch.dtype | None) -> None:
    for model, shape in ((MLP(), (2,)), (UNet(1, 8, (16, 16)), (1, 8, 8))):
        plain, wrapped = (Sampler(each, shape, steps=3, dtype=dtype) for each in (model, wrap(model)))
        assert wrapped.backend == plain.backend
        assert isinstance(wrapped._network._run, UNetInference) == isinstance(plain._network._run, UNetInference)
        if not isinstance(wrap(model), AveragedModel):  # it has a copy of the weights
            assert torch.equal(wrapped(4), plain(4))


def test_a_compiled_network_that_nothing_replaces_runs_compiled() -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x, t: x * model.weight[0, 0]  # type: ignore[method-assign]
    wrapped = compiled(model)
    assert Sampler(wrapped, (2,))._network._run is wrapped
    assert Sampler(nn.DataParallel(model), (2,))._network._run is model


def test_hooks_of_a_wrapper_are_kept() -> None:
    model = MLP()
    wrapped = AveragedModel(model)
    wrapped.register_forward_hook(lambda module, args, output: 2 * output)
    doubled = Sampler(wrapped, (2,), steps=3)
    torch.testing.assert_close(doubled(4), fastsde.sample(lambda x, t: 2 * model(x, t), (4, 2), steps=3))


# A bare Sequential, and what else is sampled from -------------------------------------------------------------------


def sequential(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), *more, nn.Linear(8, 2))


@pytest.mark.parametrize("layers", [(nn.SiLU(),), (nn.PReLU(),), (nn.LayerNorm(8),), ()], ids=str)
def test_a_sequential_is_called_with_x_and_t_as_one_wherever_it_goes(layers: tuple[nn.Module, ...]) -> None:
    net = sequential(*layers)
    by_hand = fastsde.sample(lambda x, t: net(torch.cat((x, t[:, None]), -1)), (5, 2), steps=6, backend="reference")
    for options in ({}, {"backend": "reference"}, {"callback": lambda row, time, x: None}, {"trajectory": 2}):
        x = fastsde.sample(net, (5, 2), steps=6, **options)
        torch.testing.assert_close(x[0] if "trajectory" in options else x, by_hand, rtol=1e-4, atol=1e-4)
    low = fastsde.sample(net, (5, 2), steps=6, dtype=torch.bfloat16)
    assert torch.equal(low, fastsde.sample(fastsde.models.ConcatTime(net), (5, 2), steps=6, dtype=torch.bfloat16))
    results = fastsde.verify.verify(net, (2,), n=8, steps=4)
    assert {r.verdict for r in results if r.backend == "eager"} == {"pass"}


def test_a_sequential_is_compiled_and_captured_as_such(graphs: Any) -> None:
    net = sequential(nn.PReLU())
    captured, eager = (fastsde.sample(net, (5, 2), steps=6, backend=backend) for backend in ("graph", "eager"))
    torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-4)


def test_a_compiled_sequential_is_called_as_one() -> None:
    net = sequential(nn.PReLU())
    expected = fastsde.sample(net, (5, 2), steps=3)
    with torch._dynamo.config.patch(disable=True):  # it need not be compiled to be called
        assert torch.equal(fastsde.sample(compiled(net), (5, 2), steps=3), expected)
    with pytest.raises(ValueError, match=r"on samples of shape \[2\], got \[3\]"):
        Sampler(nn.DataParallel(net), (3,))


def test_a_sequential_with_a_call_of_its_own_is_called_so() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            result: Tensor = super().forward(x) * t[:, None]
            return result

    net = Own(nn.Linear(2, 2))
    expected = fastsde.sample(lambda x, t: net[0](x) * t[:, None], (4, 2), steps=3)
    assert torch.equal(fastsde.sample(net, (4, 2), steps=3), expected)


def test_checkpoints_and_their_names_are_sampled_from() -> None:
    checkpoint = fastsde.checkpoints.load("swiss-roll")
    expected = fastsde.sample(checkpoint.model, (4, 2), steps=5, prediction=checkpoint.prediction)
    assert torch.equal(fastsde.sample(checkpoint, (4, 2), steps=5), expected)
    assert torch.equal(fastsde.sample("swiss-roll", (4, 2), steps=5), expected)
    assert torch.equal(Sampler("swiss-roll", steps=5)(4), expected)
    table = fastsde.solvers.build("euler_maruyama", checkpoint.sde, 5, prediction="eps")
    assert torch.equal(Sampler(checkpoint, solver=table)(4), expected)


# Pickling -----------------------------------------------------------------------------------------------------------


def draw(pickled: bytes) -> Tensor:
    torch.set_num_threads(1)
    x: Tensor = pickle.loads(pickled)(3, seed=4)
    return x


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (UNet(1, 8, (16, 16)), {}),
        (UNet(1, 8, (2, 3)), {"dtype": torch.bfloat16}),
        (MLP(8), {"max_batch": "auto"}),
        (MLP(8), {"backend": "eager", "solver": "dpm_solver_pp_2m", "prediction": "v"}),
        (nn.Sequential(nn.Linear(9, 8), nn.PReLU(), nn.Linear(8, 8)), {"compile": "auto"}),
    ],
    ids=["native", "copy", "persistent", "eager", "Sequential"],
)
def test_a_sampler_can_be_pickled_and_copied(model: nn.Module, options: dict[str, Any]) -> None:
    sampler = Sampler(model, getattr(model, "shape", (8,)), steps=4, **options)
    expected = sampler(3, seed=4)
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), copy.copy(sampler)):
        assert torch.equal(other(3, seed=4), expected)
        assert (other.backend, other.device, len(other.table)) == (sampler.backend, sampler.device, 4)
    copied = copy.deepcopy(sampler)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert torch.equal(copied(3, seed=4), expected)  # it has its own weights
    assert not torch.equal(sampler(3, seed=4), expected)


@pytest.mark.slow
def test_a_sampler_goes_to_a_spawned_process() -> None:
    pickled = pickle.dumps(Sampler(UNet(1, 8, (16, 16)), (1, 8, 8), steps=4))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(draw, pickled).result()
    threads = torch.get_num_threads()
    try:
        assert torch.equal(found, draw(pickled))
    finally:
        torch.set_num_threads(threads)


# Layers that depend on more than their input ------------------------------------------------------------------------


class Normalised(nn.Module):
    """A network that counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.linear(self.norm(x))
        return f


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets warnings that are shown only once."""
    monkeypatch.setattr(notices, "_told", {})


@pytest.mark.filterwarnings("ignore:the network has BatchNorm1d in training mode")
@pytest.mark.parametrize("options", [{"max_batch": "auto"}, {"compile": "auto"}, {}], ids=str)
@pytest.mark.parametrize("closure", [False, True], ids=["module", "function"])
def test_measuring_leaves_no_trace(told: None, options: dict[str, Any], closure: bool) -> None:
    model = Normalised()
    sampler = Sampler((lambda x, t: model(x, t)) if closure else model, (2,), steps=5, backend="eager", **options)
    state = torch.get_rng_state()
    sampler(40)
    batches = list(sampler._network.kept.batches.values())
    assert int(model.norm.num_batches_tracked) == 5 * -(-40 // (batches[0] if batches else 40))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:the network has BatchNorm1d in training mode")
def test_warming_up_a_capture_leaves_no_trace(told: None, graphs: Any) -> None:
    model, other = Normalised(), Normalised()
    other.load_state_dict(model.state_dict())
    x, expected = (fastsde.sample(m, (6, 2), steps=5, backend=b) for m, b in ((model, "graph"), (other, "eager")))
    torch.testing.assert_close(x, expected)
    assert int(model.norm.num_batches_tracked) == 5
    torch.testing.assert_close(model.norm.running_mean, other.norm.running_mean)


def test_random_layers_are_warned_of_once(told: None) -> None:
    model, normalised = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), Normalised()
    with pytest.warns(RuntimeWarning, match=r"the network has Dropout in training mode: the same seed gives different"):
        first = fastsde.sample(model, (4, 2), steps=3)
    assert not torch.equal(first, fastsde.sample(model, (4, 2), steps=3))
    with pytest.warns(RuntimeWarning, match=r"BatchNorm1d"):
        fastsde.sample(lambda x, t, net=normalised: net(x, t), (4, 2), steps=3)
    fastsde.sample(model.eval(), (4, 2), steps=3)
    fastsde.sample(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)), (4, 2), steps=3)


class Held:
    """A network that is not a module but holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.models = {"first": [model]}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.models["first"][0](x, t)
        return f

    def method(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


@pytest.mark.parametrize("hold", [Held, lambda m: Held(m).method, lambda m: lambda x, t, *, held=[m]: held[0](x, t)])
def test_layers_are_found_wherever_a_function_holds_them(told: None, hold: Any) -> None:
    model = Normalised()
    with pytest.warns(RuntimeWarning, match="BatchNorm1d in training mode") as caught:
        fastsde.sample(hold(model), (40, 2), steps=3, backend="eager", compile="auto")
    assert caught[0].filename == __file__  # the user's line
    assert int(model.norm.num_batches_tracked) == 3


@pytest.mark.filterwarnings("ignore:the network has BatchNorm1d in training mode")
def test_a_probe_that_runs_out_of_memory_leaves_no_trace() -> None:
    class Large(Normalised):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            f = super().forward(x, t)
            if len(x) > 16:
                raise torch.OutOfMemoryError("too much")
            return f

    model = Large()
    fastsde.sample(model, (40, 2), steps=2, backend="eager", max_batch="auto")
    assert int(model.norm.num_batches_tracked) == 2 * 3


@pytest.mark.parametrize("options", [{"max_batch": "auto"}, {"compile": "auto"}], ids=str)
def test_networks_made_in_inference_mode_are_measured(options: dict[str, Any]) -> None:
    with torch.inference_mode():
        model = Normalised().eval()
    assert torch.isfinite(fastsde.sample(model, (40, 2), steps=2, backend="eager", **options)).all()


def test_a_hook_may_give_what_the_network_lacks() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: float) -> Tensor:
            return -y * x

    model = Scaled()
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, {"y": 0.5}), with_kwargs=True)
    assert torch.equal(fastsde.sample(model, (4, 2), steps=3), fastsde.sample(lambda x, t: -0.5 * x, (4, 2), steps=3))


def test_a_checkpoint_of_a_network_of_ones_own_is_sampled_from() -> None:
    net = Normalised().eval()
    checkpoint = fastsde.checkpoints.Checkpoint(net, prediction="eps")
    expected = fastsde.sample(net, (4, 2), steps=3, prediction="eps")
    assert torch.equal(fastsde.sample(checkpoint, (4, 2), steps=3), expected)
    with pytest.raises(ValueError, match="sample_shape must be given with a checkpoint that does not know it"):
        Sampler(checkpoint)
    net.shape = "no shape of a sample"
    assert torch.equal(fastsde.sample(checkpoint, (4, 2), steps=3), expected)
    with pytest.raises(ValueError, match="prediction of the checkpoint is eps, got score"):
        Sampler(checkpoint, (2,), prediction="score")


def test_a_lazy_layer_does_not_tell_its_inputs() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.SiLU(), nn.LazyLinear(2))
    assert fastsde.sample(net, (4, 2), steps=3, device="cpu").shape == (4, 2)
