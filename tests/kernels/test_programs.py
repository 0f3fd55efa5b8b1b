"""Programs of networks on `mlp_sampler`'s Triton kernel: all instructions, widths, operands, cuts and precisions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import CONDITIONED, LOWERED, Film, N, tame
from program_cases import ROUNDING, Maker, check
from torch import nn

import fastsde
from fastsde import Guidance, Sampler
from fastsde.lowering import Instruction, Part

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of what the interpreter computes of padding
]
UNARY = {
    "affine": (1.5, -0.25),
    "clamp": (-0.5, 0.75),
    "LeakyReLU": (0.2,),
    "ELU": (0.7,),
    **dict.fromkeys(("abs", "cos", "erf", "exp", "Identity", "LogSigmoid", "SiLU", "ReLU", "Tanh", "Sigmoid"), ()),
    **dict.fromkeys(("GELU", "GELU_tanh", "Softplus", "Mish", "Sin"), ()),
}
POSITIVE = ("sqrt", "rsqrt", "reciprocal")  # of operands away from zero
BINARY = ("add", "subtract", "multiply", "divide")
WIDTHS = [1, 33, pytest.param(65, marks=pytest.mark.slow)]


def _away_from_zero(make: Maker, a: Part) -> Part:
    return make.whole(make.add("exp", make.whole(make.add("Tanh", a))))


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [*UNARY, *POSITIVE])
def test_functions(triton_device: torch.device, kind: str, width: int) -> None:
    make = Maker(3)
    value = make.linear(0, width, is_row=True)
    if kind in POSITIVE:
        value = _away_from_zero(make, make.whole(value)).value
    elif kind == "exp":  # of an exponential's exponential nothing would be left to compare
        value = make.add("Tanh", make.whole(value))
    value = make.add(kind, make.whole(value), parameters=UNARY.get(kind, ()))
    check(make.finished(value, 5), 5, triton_device)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("second", ["value", "constant", "row", "given", "repeated", "repeated input"])
@pytest.mark.parametrize("kind", BINARY)
def test_combinations(triton_device: torch.device, kind: str, second: str, width: int) -> None:
    make = Maker(3, width)
    first = make.linear(0, width, is_row=True)
    if second in ("constant", "row"):
        b: Any = make.vector(width, second == "row")
        if kind == "divide":
            b = _away_from_zero(make, make.whole(make.add("fill", None, b)))
    else:
        of = {"given": make.whole(1), "repeated": Part(first, width // 2, width, 0)}
        b = Part(0, 2, width, 0) if second == "repeated input" else of.get(second, make.whole(make.linear(0, width)))
        if kind == "divide":
            b = _away_from_zero(make, b)
    check(make.finished(make.add(kind, make.whole(first), b), 5), 5, triton_device)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "groups"), [(1, 1), (17, 1), (33, 3), (65, 1), (65, 5), (64, 8)])
@pytest.mark.parametrize("kind", ["mean", "layer_norm", "rms_norm"])
def test_groups(triton_device: torch.device, kind: str, width: int, groups: int) -> None:
    make = Maker(5)
    value = make.add("clamp", make.whole(make.linear(0, width)), parameters=(-3.0, 3.0))
    value = make.add("exp", make.whole(value))  # of the padding too, which must not count
    value = make.add(kind, make.whole(value), width=groups if kind == "mean" else width, **_norm(kind, groups))
    if kind == "mean":  # an instruction's width is that of what it reads
        k = make.instructions[-1]
        make.instructions[-1] = Instruction(kind, k.out, width, k.a, groups=groups)
    check(make.finished(value, 9), 9, triton_device)


def _norm(kind: str, groups: int) -> dict[str, Any]:
    return {"groups": groups, "parameters": () if kind == "mean" else (1e-3,)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("n", [1, 63, 130])
@pytest.mark.parametrize("width", WIDTHS)
def test_batches_and_precisions(triton_device: torch.device, n: int, width: int, precision: str) -> None:
    make = Maker(2)
    value = make.linear(0, width, is_row=True)
    other = make.add("LogSigmoid", make.whole(value))
    other = make.add("add", make.whole(make.linear(other, width)), make.whole(value))
    check(make.finished(make.add("Softplus", make.whole(other)), n), n, triton_device, precision)


# Parts ----------------------------------------------------------------------------------------------------------------


def _chunks(make: Maker) -> int:
    value = make.linear(0, 48)
    return make.add("multiply", Part(value, 0, 24), Part(value, 24, 24))


def _ragged_parts(make: Maker) -> int:
    value = make.linear(0, 70)
    first = make.add("Tanh", Part(value, 3, 33))
    return make.add("add", Part(first, 1, 20), Part(value, 41, 20))


def _products_of_parts(make: Maker) -> int:
    value = make.add("SiLU", make.whole(make.linear(0, 65)))
    out = make.add("linear", Part(value, 7, 40), Part(1, 5, 30), 30)
    make.add("linear", Part(0, 1, 2), make.whole(out), 30, out=out)
    return make.add("linear", Part(out, 4, 9, 0), Part(out, 11, 17), 17)


def _written_in_parts(make: Maker) -> int:
    out = make.new(19)
    make.add("Identity", Part(0, 2, 3), out=out, first=0)
    make.add("exp", Part(1, 3, 6), out=out, first=3)
    make.add("fill", None, make.vector(8, True), out=out, first=9)
    make.add("Identity", Part(0, 1, 2, 0), out=out, first=17)
    return make.add("Softplus", make.whole(out))


def _other_order(make: Maker) -> int:
    value, out = make.linear(0, 20), make.new(20)
    for at in range(20):
        make.add("Identity", Part(value if at % 3 else 0, at % 5, 1), out=out, first=at)
    return make.add("multiply", make.whole(out), make.whole(value))


def _columns(make: Maker) -> int:
    mean = make.add("Tanh", Part(0, 4, 1))
    value = make.add("multiply", Part(mean, 0, 33, 0), make.vector(33, True))
    value = make.add("add", make.whole(value), make.vector(33, False))
    return make.add("linear", make.whole(mean), make.whole(value), 33)


def _padding_that_is_infinite(make: Maker) -> int:
    value = make.add("exp", make.whole(make.add("Tanh", make.whole(make.linear(0, 20)))))
    value = make.add("reciprocal", make.whole(make.add("sqrt", make.whole(value))))
    value = make.add("divide", make.whole(make.linear(value, 17)), Part(value, 3, 17))
    return make.add("rms_norm", make.whole(value), parameters=(1e-5,))


PARTS: dict[str, Callable[[Maker], int]] = {
    each.__name__: each
    for each in (_chunks, _ragged_parts, _products_of_parts, _written_in_parts, _other_order, _columns)
} | {"_padding_that_is_infinite": _padding_that_is_infinite}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [5, 65])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_values(triton_device: torch.device, name: str, n: int, precision: str) -> None:
    make = Maker(5, 40)
    check(make.finished(PARTS[name](make), n), n, triton_device, precision)


@pytest.mark.not_on_cuda
@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_random_programs(triton_device: torch.device, count: int) -> None:
    for _ in range(count):
        seed = random.SystemRandom().randrange(2**32)
        torch.manual_seed(seed)
        choose = random.Random(seed)
        n, make = choose.choice((1, 9, 70)), Maker(choose.choice((1, 4, 19)), choose.choice((3, 20)))
        for _ in range(choose.randint(1, 12)):
            _random_instruction(choose, make)
        try:
            check(make.finished(len(make.widths) - 1, n), n, triton_device)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def _random_instruction(choose: random.Random, make: Maker) -> None:
    def part(width: int) -> Part:
        value = choose.choice([v for v, w in enumerate(make.widths) if w >= width])
        if choose.random() < 0.15:
            return Part(value, choose.randrange(make.widths[value]), width, 0)
        return Part(value, choose.randint(0, make.widths[value] - width), width)

    width = choose.choice([w for w in (1, 3, 16, 17, 40, 65) if w <= max(make.widths)])
    a, kind = part(width), choose.choice(("linear", "linear", "unary", "unary", "binary", "norm", "pieces"))
    if kind == "linear":
        after = choose.choice((1, 5, 24, 64, 70))
        b = (
            make.vector(after, choose.random() < 0.5)
            if choose.random() < 0.8 or max(make.widths) < after
            else part(after)
        )
        make.add("linear", a, b, after)
    elif kind == "unary":
        name = choose.choice([each for each in UNARY if each != "exp"])
        make.add(name, a, parameters=UNARY[name])
    elif kind == "binary":
        make.add(choose.choice(BINARY[:3]), a, choose.choice((part(width), make.vector(width, True))))
    elif kind == "norm":
        make.add(choose.choice(("layer_norm", "rms_norm")), Part(a.value, 0, make.widths[a.value]), parameters=(0.1,))
    else:
        out, at = make.new(width), 0
        while at < width:
            size = choose.randint(1, min(width - at, max(make.widths)))
            make.add(choose.choice(("Identity", "Tanh")), _of(choose, make, size), out=out, first=at)
            at += size


def _of(choose: random.Random, make: Maker, size: int) -> Part:
    value = choose.choice([v for v, w in enumerate(make.widths[:-1]) if w >= size] or [0])
    if make.widths[value] < size:
        return Part(0, 0, size, 0)
    return Part(value, choose.randint(0, make.widths[value] - size), size)


# Networks -------------------------------------------------------------------------------------------------------------


def _assert_as_reference(network: Any, shape: tuple[int, ...], n: int, device: torch.device, **options: Any) -> None:
    options = {"steps": 4, "solver": "ddim", "prediction": "eps", "seed": 3, **options}
    theirs = fastsde.sample(network, (n, *shape), backend="reference", **options)
    moved = network.to(device) if isinstance(network, nn.Module) else network
    if device.type == "cuda" and "model_kwargs" in options:
        moved_kwargs = {name: each.to(device) for name, each in options["model_kwargs"].items()}
        options["model_kwargs"] = moved_kwargs
        if "uncond_kwargs" in options:
            options["uncond_kwargs"] = {name: torch.zeros_like(each) for name, each in moved_kwargs.items()}
    ours = fastsde.sample(moved, (n, *shape), backend="persistent", device=device, **options).cpu()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (63, 130))])
@pytest.mark.parametrize("name", LOWERED)
def test_networks_sample_as_the_reference(triton_device: torch.device, name: str, n: int) -> None:
    torch.manual_seed(0)
    make, shape = LOWERED[name]
    network = make()
    if name == "functions":  # its samples diverge
        functions, network = network, lambda x, t: 0.05 * functions(x, t)
    elif isinstance(network, nn.Module):
        network = tame(network.eval())
    _assert_as_reference(network, shape, n, triton_device)


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("kind", CONDITIONED)
def test_conditions_and_guidance(triton_device: torch.device, kind: str, guidance: float | None) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"model_kwargs": CONDITIONED[kind]}
    if guidance is not None:
        zeros = {name: torch.zeros_like(each) for name, each in CONDITIONED[kind].items()}
        options |= {"guidance": guidance, "uncond_kwargs": zeros}
    _assert_as_reference(tame(Film().eval()), (3,), N, triton_device, **options)


@pytest.mark.slow
def test_guidance_by_sample_and_row(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    conditions = {name: each.to(triton_device) for name, each in next(iter(CONDITIONED.values())).items()}
    given: dict[str, Any] = {"model_kwargs": conditions, "steps": 5, "seed": 1}
    given["uncond_kwargs"] = {name: 0 * each for name, each in conditions.items()}
    network, scale = tame(Film().eval()).to(triton_device), torch.linspace(-1, 3, N, device=triton_device)
    guidance = Guidance(scale, schedule=lambda t: 1 + t, interval=(0.3, 0.9))
    ours, theirs = (
        fastsde.sample(network, (N, 3), backend=backend, guidance=guidance, **given)
        for backend in ("persistent", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5 * max(1.0, float(theirs.abs().max())))


def test_weights_may_change_between_calls(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    network = tame(Film().eval()).to(triton_device)
    sampler = Sampler(network, (3,), steps=3, backend="persistent")
    before = sampler(5, seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    after = sampler(5, seed=1)
    assert not torch.equal(before, after)
    theirs = fastsde.sample(network, (5, 3), steps=3, seed=1, backend="reference")
    torch.testing.assert_close(after, theirs, rtol=0, atol=3e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("copies", [False, True])
def test_a_network_in_bf16_keeps_its_state_in_fp32(triton_device: torch.device, copies: bool) -> None:
    torch.manual_seed(0)
    network = tame(Film(3, 64).eval()).to(triton_device)
    if not copies:
        network = network.bfloat16()
    options: dict[str, Any] = {"steps": 3, "seed": 1, "dtype": torch.bfloat16 if copies else None}
    ours = fastsde.sample(network, (9, 3), backend="persistent", **options).cpu()
    theirs = fastsde.sample(network.float(), (9, 3), backend="reference", steps=3, seed=1).cpu()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-6 * float(theirs.abs().max()))
