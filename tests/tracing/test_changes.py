"""What changes between two calls of an accelerated loop is followed: each was once baked into a table in silence."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import TraceError

FP32 = 64 * 2**-22


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.labels = nn.Linear(3, 3), nn.Embedding(10, 3)
        self.register_buffer("scale", torch.tensor(0.5))
        self.norm = nn.BatchNorm1d(3)
        self.part = Part()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        x = x if y is None else x + (y if y.is_floating_point() else self.labels(y)).reshape(-1, 3)[:1].expand_as(x)
        return torch.tanh(self.norm(self.layer(x)) + t.reshape(-1, 1))


class Part(nn.Module):
    rows = 4


def loop(net: Any, n: int, y: Tensor | None = None, z: Tensor | None = None) -> Any:
    x = torch.randn(n, 3)
    for i in range(5):
        x = x - 0.1 * net(x, torch.full((n,), 1 - i / 5), y if i % 2 or z is None else z) + 0.05 * torch.randn_like(x)
    return x


def follows(ours: Callable[..., Any], theirs: Callable[..., Any], *calls: Any, change: Any = None) -> None:
    """Compares both, call by call, under the same seed; ``change`` runs between the calls."""
    for number, args in enumerate(calls):
        if number and change is not None:
            change()
        results = []
        for each in (ours, theirs):
            torch.manual_seed(number)
            result = each(*args)
            results.append([result] if isinstance(result, Tensor) else list(result))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FP32, check_stride=False)


def accelerated(function: Callable[..., Any], **options: Any) -> Any:
    return fastsde.accelerate(function, noise="torch", **options)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("n", "first", "second"),
    [
        (6, torch.full((6,), 3), torch.arange(6)),
        (1, torch.tensor([3]), torch.tensor([5])),
        (6, torch.tensor(3), torch.tensor(7)),
        (6, torch.tensor([3]), torch.tensor([7])),
        (6, torch.zeros(6, 3), torch.linspace(0, 1, 18).reshape(6, 3)),
        (6, torch.ones(7, 3), torch.linspace(0, 1, 21).reshape(7, 3)),
    ],
    ids=["uniform", "one sample", "0-dim", "one", "zeros", "context"],
)
def test_conditions_of_any_shape(n: int, first: Tensor, second: Tensor, check: bool) -> None:
    net = Net().eval()
    with torch.no_grad():
        follows(accelerated(loop, check=check), loop, (net, n, first), (net, n, second), (net, n, first))


def test_conditions_that_were_equal_or_the_same_in_the_first_call() -> None:
    net, y, z = Net().eval(), torch.arange(6), torch.arange(6).flip(0)
    with torch.no_grad():
        for first in ((y, y), (y, y.clone())):
            follows(accelerated(loop), loop, (net, 6, *first), (net, 6, y, z))


def test_arguments_and_constants_that_are_returned() -> None:
    def returns(net: Any, n: int, y: Tensor) -> Any:
        times = torch.linspace(1, 0, 3)
        return loop(net, n, y), y, times

    net, fast = Net().eval(), accelerated(returns)
    with torch.no_grad():
        follows(fast, returns, (net, 6, torch.arange(6)), (net, 6, torch.arange(6) + 1))
        fast(net, 6, torch.arange(6))[2].mul_(7)  # the caller's own
        follows(fast, returns, (net, 6, torch.arange(6)))


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy, list], ids=["tolist", "numpy", "list"])
def test_sigmas_that_are_read_on_the_host(read: Any) -> None:
    def by_sigmas(net: Any, sigmas: Tensor) -> Tensor:
        x = torch.randn(6, 3)
        for sigma in read(sigmas):
            x = x - float(sigma) * net(x, torch.full((6,), float(sigma)))
        return x

    net, sigmas = Net().eval(), torch.linspace(1, 0.2, 5)
    with torch.no_grad():
        follows(accelerated(by_sigmas), by_sigmas, (net, sigmas), (net, sigmas / 2))


class CFG:
    eta = 0.05


cfg = types.ModuleType("cfg")
cfg.eta = 0.05  # type: ignore[attr-defined]
ETA = 0.05


class Stepper:
    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x - ETA * f


STEPPER = Stepper()


def of_class(x: Tensor, f: Tensor) -> Tensor:
    return x - CFG.eta * f


def of_module(x: Tensor, f: Tensor) -> Tensor:
    return x - cfg.eta * f


def of_method(x: Tensor, f: Tensor) -> Tensor:
    return STEPPER.step(x, f)


@pytest.mark.parametrize(("step", "owner", "name"), [
    (of_class, CFG, "eta"), (of_module, cfg, "eta"), (of_method, None, "ETA"),
])  # fmt: skip
def test_attributes_of_classes_and_modules(step: Any, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_step(net: Any) -> Tensor:
        x = torch.randn(6, 3)
        for i in range(4):
            x = step(x, net(x, torch.full((6,), i / 4)))
        return x

    net = Net().eval()

    def change() -> None:
        if owner is None:
            monkeypatch.setitem(globals(), name, 0.2)
        else:
            monkeypatch.setattr(owner, name, 0.2)

    with torch.no_grad():
        follows(accelerated(by_step), by_step, (net,), (net,), change=change)


def reads_the_network(net: Any) -> Tensor:
    x = torch.randn(6, 3)
    for i in range(net.part.rows):
        x = x - 0.1 * net.scale * net(x, torch.full((6,), i / 4)) + 0.1 * net.layer.bias
    return x


@pytest.mark.parametrize("change", [
    lambda net: net.scale.add_(0.3),
    lambda net: net.layer.bias.add_(0.3),
    lambda net: setattr(net.part, "rows", 6),
    lambda net: net.norm.train(),
    lambda net: net.layer.register_forward_hook(lambda module, args, result: 2 * result),
    lambda net: net.register_forward_pre_hook(lambda module, args: (0.5 * args[0], args[1])),
], ids=["buffer", "parameter", "attribute", "mode", "hook inside", "hook"])  # fmt: skip
def test_what_the_loop_reads_of_the_network(change: Any) -> None:
    net = Net().eval()
    with torch.no_grad():
        statistics = net.norm.running_mean.clone()

        def changed() -> None:
            change(net)

        fast = accelerated(reads_the_network)
        follows(fast, reads_the_network, (net,))
        changed()
        net.norm.momentum = 0.0  # the loop's own call must not change what the next one sees
        follows(fast, reads_the_network, (net,))
        assert torch.equal(statistics, net.norm.running_mean)


def test_another_dtype_of_the_network() -> None:
    def in_its_dtype(net: Any) -> Tensor:
        x = torch.randn(6, 3, dtype=next(net.parameters()).dtype)
        for i in range(4):
            x = x - 0.1 * net(x, torch.full((6,), i / 4, dtype=x.dtype))
        return x

    net = Net().eval()
    with torch.no_grad():
        follows(accelerated(in_its_dtype), in_its_dtype, (net,), (net,), change=net.double)


# Generators and draws -------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(1)


def test_generators_that_the_loop_finds_or_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(net: Any) -> Tensor:
        x = torch.randn(6, 3, generator=GENERATOR)
        return x - net(x, torch.zeros(6))

    def made(net: Any) -> Tensor:
        generator = torch.Generator().manual_seed(42)
        x = torch.randn(6, 3, generator=generator)
        return x - net(x, torch.zeros(6)) + torch.randn(x.shape, generator=generator)

    net = Net().eval()
    with torch.no_grad():
        fast = accelerated(found)
        for seed in (1, 2, 1):
            results = []
            for each in (fast, found):
                monkeypatch.setitem(globals(), "GENERATOR", torch.Generator().manual_seed(seed))
                results.append(each(net))
            torch.testing.assert_close(*results, rtol=0, atol=FP32)
        follows(accelerated(made), made, (net,), (net,))

        def seeds(net: Any, generator: torch.Generator) -> Tensor:
            generator.manual_seed(7)
            x = torch.randn(6, 3, generator=generator)
            return x - net(x, torch.zeros(6))

        with pytest.raises(TraceError, match="seeds a generator"):
            accelerated(seeds)(net, torch.Generator())


def test_draws_into_memory_of_any_layout() -> None:
    def sliced(net: Any, n: int) -> Tensor:
        memory = torch.zeros(n, 6)
        memory[:, :3].normal_()
        return memory[:, :3] - net(memory[:, :3], torch.zeros(n))

    def transposed(net: Any, n: int) -> Tensor:
        x = torch.randn(n, 3)
        z = torch.randn_like(x.t().contiguous().t())
        return x - net(x, torch.zeros(n)) + z

    def into(net: Any, n: int) -> Tensor:
        memory = torch.empty(n, 3)
        x = torch.normal(0.0, 1.0, (n, 3), out=memory)
        return x - net(x, torch.zeros(n)) + memory

    net = Net().eval()
    with torch.no_grad():
        for each in (sliced, transposed, into):
            follows(accelerated(each), each, (net, 8), (net, 8))
            torch.manual_seed(0)
            after = [f(net, 8) is None or torch.get_rng_state() for f in (each,)]
            torch.manual_seed(0)
            accelerated(each, check=True)(net, 8)
            assert torch.equal(torch.get_rng_state(), after[0])


def test_draws_of_one_sample_each_that_are_used_twice() -> None:
    def twice(net: Any) -> Tensor:
        draws = [torch.randn(1, 3) for _ in range(4)]
        x = torch.cat(draws)
        return x - net(x, torch.zeros(4)) + draws[0]

    net = Net().eval()
    with torch.no_grad():
        follows(accelerated(twice), twice, (net,), (net,))


# Refused, or left as it was -------------------------------------------------------------------------------------------


class Result:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_what_would_be_wrong_is_refused() -> None:
    net = Net().eval()

    def in_place(net: Any, times: Tensor) -> Tensor:
        x = torch.randn(6, 3)
        for _ in range(3):
            x = x - net(x, times)
            times.sub_(0.1)
        return x

    def view(net: Any, memory: Tensor) -> Tensor:
        x = torch.randn(6, 3)
        for i in range(3):
            x = x - net(x, torch.zeros(6))
            memory[i] = x
        return x

    def rounded(net: Any) -> Tensor:
        x, memory = torch.randn(6, 3), torch.empty(6, 3, dtype=torch.int32)
        return x - net(x, torch.zeros(6)) + memory.copy_(10 * x)

    kept: list[Tensor] = []

    def keeps(net: Any) -> Tensor:
        x = torch.randn(6, 3)
        for _ in range(3):
            x = x - net(x, torch.zeros(6))
            kept.append(x)
        return x

    for function, args, words in (
        (in_place, (torch.ones(6),), "changes a tensor that it was given in place"),
        (view, (torch.zeros(2, 3, 6, 3)[0],), "writes the state into a tensor that it was given"),
        (rounded, (), "rounds it"),
        (keeps, (), "keeps its states"),
        (lambda net: Result(loop(net, 6)), (), "returns a Result that holds a state"),
        (lambda net: (x for x in [loop(net, 6)]), (), "is a generator"),
    ):
        with pytest.raises(TraceError, match=words), torch.no_grad():
            fastsde.accelerate(function)(net, *args)


def test_the_loop_leaves_nothing_behind() -> None:
    def evaluates(net: Any) -> Tensor:
        net.eval()
        return loop(net, 6)

    net = Net().train()
    before = [module.training for module in net.modules()], net.norm.num_batches_tracked.clone()
    traced = fastsde.trace(evaluates, net)
    assert [module.training for module in net.modules()] == before[0]
    assert torch.equal(net.norm.num_batches_tracked, before[1])
    with torch.no_grad():
        first = traced(net, seed=1)  # in evaluation mode, as in the loop
        assert torch.equal(traced(net, seed=1), first)


def test_autocast_inside_the_loop_and_accelerated_loops_inside_loops() -> None:
    def cast(net: Any) -> Tensor:
        x = torch.randn(6, 3)
        for i in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                f = net(x, torch.full((6,), i / 3))
            x = x - 0.1 * f.float()
        return x

    inner = fastsde.accelerate(loop)

    def outer(net: Any) -> Tensor:
        return 2 * inner(net, 6)

    net = Net().eval()
    with torch.no_grad():
        follows(accelerated(cast), cast, (net,), (net,))
        doubled = fastsde.accelerate(outer)
        torch.testing.assert_close(doubled(net), 2 * inner(net, 6), rtol=0, atol=FP32)


def test_networks_with_attributes_and_several_modules() -> None:
    class Denoiser:
        largest = 0.3

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x)

    def by_attribute(net: Any) -> Tensor:
        x = torch.randn(6, 3)
        return x - net.largest * net(x, torch.zeros(6))

    follows(accelerated(by_attribute, network="net"), by_attribute, (Denoiser(),), (Denoiser(),))

    unused, used = Net().eval(), Net().eval()

    def holds(n: int) -> Tensor:
        return loop(used, n)

    with torch.no_grad():
        follows(accelerated(holds, modules=[unused, used]), holds, (6,), (6,))


class Policy:
    def __init__(self) -> None:
        self.net = Net().eval()

    @torch.no_grad()
    def sample(self, n: int, scale: float = 1.0) -> Tensor:
        return scale * loop(self.net, n)


def test_the_network_of_a_method_is_found() -> None:
    policy = Policy()
    follows(accelerated(policy.sample), policy.sample, (6,), (6,))
    policy.other = Net()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="its object holds net, other: pass one of them in modules"):
        fastsde.accelerate(policy.sample)(6)


@pytest.mark.parametrize("rounded", [False, True])
def test_guidance_in_one_batch_of_a_network_in_bfloat16(rounded: bool) -> None:
    class Low(Net):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args).bfloat16()

    def in_bfloat16(net: Any, n: int) -> Tensor:
        x = torch.randn(n, 3)
        for i in range(6):
            f = net(torch.cat([x] * 2), torch.full((2 * n,), i / 6))
            f, f_uncond = (f if rounded else f.float()).chunk(2)
            x = x + 0.1 * (f_uncond + 4.0 * (f - 0.5 * f_uncond)).float()
        return x

    with torch.no_grad():
        net, fast = Low().eval(), accelerated(in_bfloat16)
        if rounded:  # the loop rounds more often than the table
            torch.manual_seed(0)
            theirs = in_bfloat16(net, 16)
            torch.manual_seed(0)
            torch.testing.assert_close(fast(net, 16), theirs, rtol=0, atol=6 * 0.1 * 8 * 2**-7)
        else:
            follows(fast, in_bfloat16, (net, 16), (net, 16))
