"""Wrong input of every kind: the error has the right type, names the argument and shows what was passed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastsde
from fastsde import VPSDE, Sampler, StepTable, checkpoints, data, noise, solvers
from fastsde.compat import tutorial
from fastsde.models import MLP, ConcatTime, UNet, from_config
from fastsde.training import TrainConfig, default_config, tutorial_config

SDE = VPSDE()
KEYS = noise.sample_keys(0, 4)
NAN, INF = math.nan, math.inf
NAMES = ", ".join(solvers.REGISTRY)


def network(x, t):
    return -x


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(**columns: object) -> StepTable:
    return StepTable(**{**{name: column(0.5, 0.5, 0.5) for name in ("time", *"abcdepq")}, **columns})


def slots(m: int = 2, **columns: object) -> StepTable:
    """Returns a table of 3 rows."""
    A = torch.eye(m, dtype=torch.float64).expand(3, m, m)
    return StepTable(**{"time": column(0.5, 0.5, 0.5), "A": A, **columns})  # type: ignore[arg-type]


def check(call, error, *parts: str) -> None:
    """Checks that the call raises exactly ``error``, with a message that has the parts in this order."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    assert re.search(".*".join(map(re.escape, parts)), str(caught.value), re.DOTALL), str(caught.value)


# sample and Sampler: options, the error, and parts of its message ---------------------------------------------------

SAMPLE = [
    # shape
    ({"shape": 4}, TypeError, "shape must be a sequence of ints", "int"),
    ({"shape": "42"}, TypeError, "shape must be a sequence of ints", "str"),
    ({"shape": None}, TypeError, "shape must be a sequence of ints", "NoneType"),
    ({"shape": torch.tensor([4, 2])}, TypeError, "shape must be a sequence of ints", "Tensor"),
    ({"shape": (4, 2.0)}, TypeError, "shape[1] must be an int", "float"),
    ({"shape": (True, 2)}, TypeError, "shape[0] must be an int", "bool"),
    ({"shape": (-1, 2)}, ValueError, "shape[0] must be at least 0", "-1"),
    ({"shape": ()}, ValueError, "shape must have the batch first", "()"),
    # model
    ({"model": None}, TypeError, "model must be callable as model(x, t)", "NoneType"),
    ({"model": "unet"}, FileNotFoundError, "there is no checkpoint unet", "swiss-roll"),
    ({"model": "mnist"}, ValueError, "sample_shape of the checkpoint is (1, 28, 28)", "(2,)"),
    ({"model": "swiss-roll", "prediction": "v"}, ValueError, "prediction of the checkpoint is eps", "v"),
    (
        {"model": nn.Sequential(nn.Linear(4, 3))},
        ValueError,
        "a Sequential is called with cat((x, t), -1)",
        "[3]",
        "[2]",
    ),
    ({"model": ConcatTime(nn.Sequential(nn.Linear(4, 3)))}, ValueError, "a ConcatTime is called with", "[3]", "[2]"),
    ({"model": nn.Sequential(nn.PReLU()), "shape": (1000,)}, ValueError, "samples of shape [d]", "[]"),
    (
        {"model": nn.Linear(2, 2)},
        TypeError,
        "model must be callable as model(x, t, **model_kwargs)",
        "too many positional",
    ),
    ({"model": lambda x, t, y: x}, TypeError, "model_kwargs with nothing", "missing a required argument: 'y'"),
    ({"model": torch.zeros(3)}, TypeError, "model must be callable as model(x, t)", "Tensor"),
    ({"model": lambda x, t: None}, TypeError, "model must return a tensor", "NoneType"),
    ({"model": lambda x, t: (x, t)}, TypeError, "model must return a tensor", "tuple"),
    ({"model": lambda x, t: 0.0}, TypeError, "model must return a tensor", "float"),
    ({"model": lambda x, t: x.numpy()}, TypeError, "model must return a tensor", "ndarray"),
    ({"model": lambda x, t: x[:, :1]}, ValueError, "model must return the shape of x, [4, 2]", "[4, 1]"),
    ({"model": lambda x, t: x.sum()}, ValueError, "model must return the shape of x, [4, 2]", "[]"),
    ({"model": lambda x, t: x.int()}, TypeError, "model must return a floating-point tensor", "torch.int32"),
    ({"model": lambda x, t: x > 0}, TypeError, "model must return a floating-point tensor", "torch.bool"),
    ({"model": lambda x, t: x + 0j}, TypeError, "model must return a floating-point tensor", "torch.complex64"),
    ({"model": lambda x, t: x.to("meta")}, ValueError, "model must return a tensor on cpu", "meta"),
    # sde
    ({"sde": "vp"}, TypeError, "sde must be a process such as", "str"),
    ({"sde": VPSDE}, TypeError, "sde must be a process", "the class VPSDE"),
    ({"sde": (0.1, 20.0)}, TypeError, "sde must be a process such as", "tuple"),
    # solver
    ({"solver": "nobody"}, ValueError, f"solver must be one of {NAMES}", "'nobody'"),
    ({"solver": None}, TypeError, "solver must be a name or a StepTable", "NoneType"),
    ({"solver": solvers.ddim}, TypeError, "solver must be a name or a StepTable", "function"),
    ({"solver": table(), "steps": 5}, ValueError, "StepTable given as solver has 3 rows", "steps=5"),
    ({"solver": table(), "steps": 999.0}, TypeError, "steps must be an int", "float"),
    ({"solver": table(), "t_end": 0.1}, ValueError, "t_end is part of the StepTable given as solver", "0.1"),
    ({"solver": table(), "prediction": "eps"}, ValueError, "prediction is part of the StepTable", "'eps'"),
    ({"solver": table(), "clip": 1.0}, ValueError, "clip is part of the StepTable given as solver", "1.0"),
    # steps
    ({"steps": 0}, ValueError, "steps must be at least 1", "0"),
    ({"steps": -3}, ValueError, "steps must be at least 1", "-3"),
    ({"steps": 3.0}, TypeError, "steps must be an int", "float"),
    ({"steps": True}, TypeError, "steps must be an int", "bool"),
    ({"steps": None}, TypeError, "steps must be an int", "NoneType"),
    ({"solver": "heun", "prediction": "eps", "steps": 4}, ValueError, "takes an odd number of steps", "steps=4"),
    # t_end
    ({"t_end": 1.0}, ValueError, "t_end must be in [0, 1)", "1.0"),
    ({"t_end": -0.1}, ValueError, "t_end must be in [0, 1)", "-0.1"),
    ({"t_end": NAN}, ValueError, "t_end must be", "nan"),
    ({"t_end": "0"}, TypeError, "t_end must be a number", "str"),
    ({"t_end": False}, TypeError, "t_end must be a number", "bool"),
    ({"t_end": torch.tensor([0.1, 0.2])}, TypeError, "t_end must be a number", "Tensor"),
    # prediction
    ({"prediction": "epsilon"}, ValueError, "prediction must be one of score, eps, x0, v", "'epsilon'"),
    ({"prediction": 3}, ValueError, "prediction must be one of score, eps, x0, v", "3"),
    # seed and first_sample
    ({"seed": -1}, ValueError, "seed must be in [0, 2^64)", "-1"),
    ({"seed": 2**64}, ValueError, "seed must be in [0, 2^64)", str(2**64)),
    ({"seed": 1.0}, TypeError, "seed must be an int", "float"),
    ({"seed": "0"}, TypeError, "seed must be an int", "str"),
    ({"seed": [1]}, TypeError, "seed must be an int", "list"),
    ({"first_sample": -1}, ValueError, "first_sample must be in [0, 2^64)", "-1"),
    ({"first_sample": 1.5}, TypeError, "first_sample must be an int", "float"),
    # keys
    ({"keys": KEYS[:3]}, ValueError, "keys must have shape [4, 2]", "[3, 2]"),
    ({"keys": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "keys must have shape [4, 2]", "[4, 3]"),
    ({"keys": KEYS.float()}, TypeError, "keys must be int64", "torch.float32"),
    ({"keys": KEYS.int()}, TypeError, "keys must be int64", "torch.int32"),
    ({"keys": [1, 2]}, ValueError, "keys must have one key or seed for each of the 4 samples", "2"),
    ({"keys": torch.arange(5)}, ValueError, "keys must have one key or seed for each of the 4 samples", "5"),
    ({"keys": [1, 2, 3.0, 4]}, TypeError, "keys[2] must be an int", "float"),
    ({"keys": [1, -2, 3, 4]}, ValueError, "keys[1] must be in [0, 2^64)", "-2"),
    ({"keys": torch.tensor([-1, 2, 3, 4])}, ValueError, "keys[0] must be in [0, 2^64)", "-1"),
    ({"keys": "abcd"}, TypeError, "keys[0] must be an int", "str"),
    ({"keys": [(1, 2)] * 4}, TypeError, "keys[0] must be an int", "tuple"),
    ({"keys": 3}, TypeError, "keys must be a tensor or a sequence of seeds", "int"),
    ({"keys": {0: 1, 1: 2, 2: 3, 3: 4}}, TypeError, "keys must be a tensor or a sequence of seeds", "dict"),
    ({"keys": KEYS, "seed": 3}, ValueError, "keys replace seed and first_sample", "seed=3"),
    ({"keys": KEYS, "first_sample": 3}, ValueError, "keys replace seed and first_sample", "first_sample=3"),
    # x_init
    ({"x_init": torch.zeros(4, 3)}, ValueError, "x_init must have shape [4, 2]", "[4, 3]"),
    ({"x_init": torch.zeros(2)}, ValueError, "x_init must have shape [4, 2]", "[2]"),
    ({"x_init": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "x_init must be floating-point", "torch.int64"),
    ({"x_init": torch.zeros(4, 2) + 0j}, TypeError, "x_init must be floating-point", "torch.complex64"),
    ({"x_init": torch.full((4, 2), NAN)}, ValueError, "x_init must be finite", "8 values"),
    ({"x_init": torch.tensor([[0.0, INF]] * 4)}, ValueError, "x_init must be finite", "4 values"),
    ({"x_init": torch.full((4, 2), 1e39, dtype=torch.float64)}, ValueError, "x_init must be finite", "8 values"),
    ({"x_init": np.zeros((4, 2))}, TypeError, "x_init must be a tensor", "ndarray"),
    ({"x_init": torch.zeros(4, 2, device="meta"), "device": "cpu"}, ValueError, "x_init must be on cpu", "meta"),
    # noise
    ({"noise": "contract"}, TypeError, "noise must be callable", "str"),
    ({"noise": torch.Generator()}, TypeError, "noise must be callable", "Generator"),
    ({"noise": lambda row, x: None}, TypeError, "the result of noise in row 0 must be a tensor", "NoneType"),
    ({"noise": lambda row, x: x[:1]}, ValueError, "noise in row 0 must have shape [4, 2]", "[1, 2]"),
    ({"noise": lambda row, x: x.to("meta")}, ValueError, "noise in row 0 must be on cpu", "meta"),
    # clip
    ({"solver": "ddim", "clip": -1.0}, ValueError, "clip must be a positive number or None", "-1.0"),
    ({"solver": "ddpm", "clip": 0}, ValueError, "clip must be a positive number or None", "0"),
    ({"solver": "ddpm", "clip": NAN}, ValueError, "clip must be a positive number or None", "nan"),
    ({"solver": "ddim", "clip": "1"}, TypeError, "clip must be a number", "str"),
    ({"solver": "ddim", "clip": True}, TypeError, "clip must be a number", "bool"),
    ({"solver": "ddim", "clip": (-1, 1)}, TypeError, "clip must be a number", "tuple"),
    ({"clip": 1.0}, ValueError, "clip bounds a predicted x_0, which euler_maruyama does not use", "ddpm, ddim"),
    # dtype and device
    ({"dtype": torch.int32}, ValueError, "dtype must be one of torch.float32, torch.float64", "torch.int32"),
    ({"dtype": torch.complex64}, ValueError, "dtype must be one of torch.float32", "torch.complex64"),
    ({"dtype": "float16"}, ValueError, "dtype must be one of torch.float32", "float16"),
    ({"dtype": torch.float64, "backend": "eager"}, ValueError, "'eager' keeps the state in fp32", "use 'reference'"),
    ({"dtype": torch.float64, "compile": True}, ValueError, "compile=True", "float64"),
    ({"device": "gpu"}, ValueError, "device 'gpu' cannot be used"),
    ({"device": ""}, ValueError, "device '' cannot be used"),
    ({"device": 3.5}, ValueError, "device '3.5' cannot be used"),
    ({"device": "meta"}, ValueError, "device must hold data", "meta"),
    ({"compile": "no"}, ValueError, "compile must be True, False, 'auto' or 'openvino'", "'no'"),
    ({"compile": 1}, TypeError, "compile must be True, False, 'auto' or 'openvino'", "1"),
    ({"model": nn.Linear(2, 2), "device": "meta"}, ValueError, "device is meta, but the model is on cpu: move it"),
    # kwargs and guidance
    ({"model_kwargs": [1]}, TypeError, "model_kwargs must be a mapping", "list"),
    ({"model_kwargs": torch.zeros(4)}, TypeError, "model_kwargs must be a mapping", "Tensor"),
    ({"model_kwargs": {"y": torch.zeros(3)}}, ValueError, "model_kwargs['y'] must have the batch of 4 first", "[3]"),
    ({"model_kwargs": {"y": torch.tensor(1)}}, ValueError, "model_kwargs['y'] must have the batch of 4", "[]"),
    ({"model_kwargs": {"y": np.zeros(4)}}, TypeError, "model_kwargs['y'] must be a tensor", "ndarray"),
    ({"model_kwargs": {"y": [1, 2, 3, 4]}}, TypeError, "model_kwargs['y'] must be a tensor", "list"),
    ({"model_kwargs": {"y": KEYS.to("meta")}}, ValueError, "model_kwargs['y'] must be on cpu", "meta"),
    ({"model_kwargs": {"t": torch.zeros(4)}}, ValueError, "model_kwargs['t'] would hide the t that model(x, t)"),
    ({"model_kwargs": {"x": 1.0}}, ValueError, "model_kwargs['x'] would hide the x that model(x, t)"),
    ({"guidance": 2.0}, ValueError, "guidance and uncond_kwargs go together"),
    ({"uncond_kwargs": {}}, ValueError, "guidance and uncond_kwargs go together"),
    ({"guidance": "2", "uncond_kwargs": {}}, TypeError, "guidance must be a number", "str"),
    ({"guidance": True, "uncond_kwargs": {}}, TypeError, "guidance must be a number", "bool"),
    ({"guidance": NAN, "uncond_kwargs": {}}, ValueError, "guidance must be finite", "nan"),
    ({"guidance": 2, "uncond_kwargs": [1]}, TypeError, "uncond_kwargs must be a mapping", "list"),
    (
        {"guidance": 2, "uncond_kwargs": {"y": torch.zeros(5)}},
        ValueError,
        "uncond_kwargs['y'] must have the batch of 4 first",
        "[5]",
    ),
    # backend, max_batch, trajectory, callback
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, reference, eager, graph, persistent", "'cuda'"),
    ({"backend": None}, ValueError, "backend must be one of auto", "None"),
    ({"backend": "graph"}, ValueError, "backend 'graph'", "use 'eager' or 'reference'"),
    (
        {"backend": "persistent", "model": lambda x, t: x.cumsum(-1)},
        ValueError,
        "backend 'persistent'",
        "use 'eager' or 'reference'",
    ),
    ({"backend": "reference", "compile": True}, ValueError, "'reference' is plain PyTorch", "use 'eager'"),
    ({"max_batch": 0}, ValueError, "max_batch must be at least 1", "0"),
    ({"max_batch": 2.5}, TypeError, "max_batch must be an int", "float"),
    ({"trajectory": 0}, ValueError, "trajectory must be at least 1", "0"),
    ({"trajectory": True}, TypeError, "trajectory must be an int", "bool"),
    ({"trajectory": 1.0}, TypeError, "trajectory must be an int", "float"),
    ({"progress": "no"}, TypeError, "progress must be True or False", "'no'"),
    ({"callback": 3}, TypeError, "callback must be callable", "int"),
    ({"num_steps": 3}, TypeError, "num_steps"),
]


def _case_id(case: object) -> str | None:
    # Without addresses: all processes of pytest-xdist must find tests with the same names.
    return ",".join(f"{k}={v!r}".split(" at 0x")[0][:30] for k, v in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("options", "error", "parts"), [(c[0], c[1], c[2:]) for c in SAMPLE], ids=_case_id)
def test_sample_names_what_is_wrong(options, error, parts):
    options = {"model": network, "shape": (4, 2), "steps": 3, **options}
    model, shape = options.pop("model"), options.pop("shape")
    check(lambda: fastsde.sample(model, shape, **options), error, *parts)


def test_a_result_object_is_told_how_to_be_unwrapped():
    class Output:
        sample = torch.zeros(4, 2)

    check(
        lambda: fastsde.sample(lambda x, t: Output(), (4, 2), steps=3),
        TypeError,
        "model must return a tensor",
        "Output",
        "lambda x, t: model(x, t).sample",
    )


@pytest.mark.parametrize(
    ("n", "error", "parts"),
    [
        (-1, ValueError, ("n must be at least 0", "-1")),
        (4.0, TypeError, ("n must be an int", "float")),
        ((4, 2), TypeError, ("n must be an int", "tuple")),
        (None, TypeError, ("n must be an int", "NoneType")),
    ],
)
def test_sampler_names_a_wrong_number_of_samples(n, error, parts):
    check(lambda: Sampler(network, (2,), steps=3)(n), error, *parts)


def test_sampler_checks_when_it_is_built():
    # The network is never called, and nothing is drawn.
    def model(x, t):
        raise AssertionError

    check(lambda: Sampler(model, 2), TypeError, "sample_shape must be a sequence of ints", "int")
    check(lambda: Sampler(model, (2,), steps=0), ValueError, "steps must be at least 1", "0")
    check(lambda: Sampler(model, (2,), backend="graph"), ValueError, "backend 'graph'")


def test_numbers_of_numpy_are_numbers():
    # They occur in ordinary code, and there is no reason to refuse them.
    options = {"steps": np.int64(3), "seed": np.int32(7), "t_end": np.float64(0.1), "max_batch": np.int64(2)}
    x = fastsde.sample(network, (np.int64(4), 2), **options)
    assert torch.equal(x, fastsde.sample(network, (4, 2), steps=3, seed=7, t_end=0.1, max_batch=2))


def test_a_wrong_call_leaves_a_sampler_usable():
    sampler = Sampler(network, (2,), steps=3)
    expected = sampler(4)
    check(lambda: sampler(4, seed=-1), ValueError, "seed")
    check(lambda: sampler(4, noise=lambda row, x: x[:1]), ValueError, "noise in row 0")
    assert torch.equal(sampler(4), expected)


# The rest: a call, the error, and parts of its message --------------------------------------------------------------

A = torch.linspace(0.1, 0.99, 5, dtype=torch.float64)
G = (1 - A**2).sqrt()
T = torch.arange(4.0)

SDES = [
    (lambda: VPSDE(-1.0), ValueError, "0 <= beta_min <= beta_max", "beta_min=-1.0"),
    (lambda: VPSDE(5.0, 1.0), ValueError, "0 <= beta_min <= beta_max", "beta_min=5.0 and beta_max=1.0"),
    (lambda: VPSDE(0.0, 0.0), ValueError, "beta_max > 0", "beta_max=0.0"),
    (lambda: VPSDE(NAN), ValueError, "beta_min must be finite", "nan"),
    (lambda: VPSDE(0.1, INF), ValueError, "beta_max must be finite", "inf"),
    (lambda: VPSDE("0.1"), TypeError, "beta_min must be a number", "str"),
    (lambda: VPSDE(None), TypeError, "beta_min must be a number", "NoneType"),
    (lambda: VPSDE(0.1, True), TypeError, "beta_max must be a number", "bool"),
    (lambda: VPSDE(torch.tensor(0.1)), TypeError, "beta_min must be a number", "Tensor"),
    (lambda: SDE.prior_sampling((-1, 2)), ValueError, "shape[0] must be at least 0", "-1"),
    (lambda: SDE.prior_sampling((2, 2.0)), TypeError, "shape[1] must be an int", "float"),
    (lambda: SDE.prior_sampling((4, 2), seed=-1), ValueError, "seed must be in [0, 2^64)", "-1"),
]

TABLES = [
    (lambda: table(a=torch.zeros(3)), TypeError, "StepTable.a must be a float64 tensor", "torch.float32"),
    (lambda: table(b=[0.0] * 3), TypeError, "StepTable.b must be a float64 tensor", "list"),
    (lambda: table(time=None), TypeError, "StepTable.time must be a float64 tensor", "NoneType"),
    (lambda: table(c=column(1, 2)), ValueError, "StepTable.c must have shape [3] to match time [3]", "[2]"),
    (
        lambda: table(d=column(1, 2, 3)[:, None]),
        ValueError,
        "StepTable.d must have shape [3] to match time [3]",
        "[3, 1]",
    ),
    (lambda: table(time=column()), ValueError, "StepTable.time must have shape [K] with K >= 1", "[0]"),
    (lambda: table(e=column(0, 0, NAN)), ValueError, "StepTable.e must be finite", "nan in row 2"),
    (lambda: table(q=column(0, -INF, 0)), ValueError, "StepTable.q must be finite", "-inf in row 1"),
    (lambda: slots(A=column(1, 1, 1)), ValueError, "StepTable.A must be a float64 tensor [K, m, m]", "[3]"),
    (lambda: slots(A=[[1.0]]), TypeError, "StepTable.A must be a float64 tensor [K, m, m]", "list"),
    (lambda: slots(9), ValueError, "StepTable.A must be [K, m, m] with m from 1 to 8 slots", "[3, 9, 9]"),
    (lambda: slots(2, b=column(1, 2, 3)), ValueError, "StepTable.b must have shape [3, 2] to match time [3]", "[3]"),
    (lambda: slots(2, q=column(1, 2)), ValueError, "StepTable.q must have shape [3] to match time [3]", "[2]"),
    (lambda: slots(2, n=torch.zeros(3, 2).double()), ValueError, "StepTable.n must not be zero", "in row 0"),
    (lambda: slots(2, d=torch.ones(3, 2)), TypeError, "StepTable.d must be a float64 tensor", "torch.float32"),
    (lambda: slots(2, a=column(1, 1, 1)), TypeError, "StepTable takes either A, or a and c", "got both"),
    (lambda: table(n=torch.ones(3, 1).double()), TypeError, "StepTable takes n only with A"),
    (lambda: table(b=column(0, 1e39, 0)), ValueError, "StepTable.b must be finite in fp32", "1e+39 in row 1"),
    (lambda: solvers.euler_maruyama(None, [1, 0]), TypeError, "sde must be a process such as", "NoneType"),
    (lambda: solvers.build("ddpm", None, 3), TypeError, "sde must be a process such as", "NoneType"),
    (lambda: SDE.marginal_prob(torch.zeros(4, 2), torch.zeros(3)), ValueError, "t must be a scalar or [B]", "[3]"),
    (lambda: SDE.marginal_prob(torch.zeros(4, 2), torch.zeros(4, 1)), ValueError, "t must be a scalar", "[4, 1]"),
    (lambda: SDE.prior_sampling(()), ValueError, "shape must have the batch first", "()"),
    (lambda: SDE.prior_sampling((3, 2), keys=KEYS), ValueError, "keys must have one key for each of the 3", "4"),
    (lambda: noise.fold_in((1, 2, 3), 0), TypeError, "key must be a tensor or a pair", "(1, 2, 3)"),
    (lambda: noise.fold_in(1, 0), TypeError, "key must be a tensor or a pair", "1"),
    (lambda: noise.fold_in((1, 0), torch.zeros(2)), TypeError, "data must be an int or int64", "torch.float32"),
    (lambda: table(clip=0.0), ValueError, "clip must be a positive number or None", "0.0"),
    (lambda: table(clip=-1.0), ValueError, "clip must be a positive number or None", "-1.0"),
    (lambda: table(a=column(1, 2, 3).to("meta")), ValueError, "StepTable.a must be on the CPU", "meta"),
    (lambda: table(clip="1"), TypeError, "clip must be a number", "str"),
    (lambda: table(clip=torch.ones(2)), TypeError, "clip must be a number", "Tensor"),
    (lambda: table(clip=INF), ValueError, "clip must be a positive number or None", "inf"),
]

CONTINUOUS = [
    (([0.5, 0.0, 1.0],), ValueError, "times must decrease strictly within [0, 1]", "0.5 .. 1 over 3 points"),
    (([1.5, 0.5, 0.0],), ValueError, "times must decrease strictly within [0, 1]", "1.5 .. 0"),
    (([1.0, 0.5, -0.5],), ValueError, "times must decrease strictly within [0, 1]", "1 .. -0.5"),
    (([1.0, 0.5, 0.5],), ValueError, "times must decrease strictly within [0, 1]", "over 3 points"),
    (([1.0],), ValueError, "times must be 1-d with at least 2 points", "[1]"),
    ((torch.zeros(3, 2),), ValueError, "times must be 1-d with at least 2 points", "[3, 2]"),
    ((1000,), ValueError, "times must be 1-d with at least 2 points", "[]"),
    (([1.0, NAN, 0.0],), ValueError, "times must be finite", "nan"),
    (("abc",), TypeError, "times must be a 1-d tensor or sequence of numbers", "str"),
    ((None,), TypeError, "times must be a 1-d tensor or sequence of numbers", "NoneType"),
    (([1.0, 0.5, 0.0], "epsilon"), ValueError, "prediction must be one of score, eps, x0, v", "'epsilon'"),
]

SCHEDULE = [
    ((A, G[:4], T), {}, ValueError, "alpha and sigma must have one point more than time", "5, 4 and 4"),
    ((A, G, torch.arange(5.0)), {}, ValueError, "alpha and sigma must have one point more than time", "5, 5 and 5"),
    ((A[:1], G[:1], T[:0]), {}, ValueError, "alpha must be 1-d with at least 2 points", "[1]"),
    ((A * 0, G, T), {}, ValueError, "alpha must be positive", "0"),
    ((A, -G, T), {}, ValueError, "sigma must be positive, or zero at the last point", "-0.99"),
    ((A, G * column(1, 1, 0, 1, 1), T), {}, ValueError, "sigma must be positive, or zero at the last point", "0"),
    ((A[[0, 2, 1, 3, 4]], G[[0, 2, 1, 3, 4]], T), {}, ValueError, "sigma / alpha must decrease strictly"),
    ((A * NAN, G, T), {}, ValueError, "alpha must be finite", "nan"),
    ((A, G, T * INF), {}, ValueError, "time must be finite", "nan"),
    ((None, G, T), {}, TypeError, "alpha must be a 1-d tensor or sequence of numbers", "NoneType"),
    ((A, "sigma", T), {}, TypeError, "sigma must be a 1-d tensor or sequence of numbers", "str"),
    ((A, G, T, "epsilon"), {}, ValueError, "prediction must be one of score, eps, x0, v", "'epsilon'"),
    ((A, G, T), {"clip": -1.0}, ValueError, "clip must be a positive number or None", "-1.0"),
]

SOLVERS = [
    (lambda: solvers.ddim(A, G, T, eta=2.0), ValueError, "eta must be in [0, 1]", "2.0"),
    (lambda: solvers.ddim(A, G, T, eta=NAN), ValueError, "eta must be in [0, 1]", "nan"),
    (lambda: solvers.ddim(A, G, T, eta="1"), TypeError, "eta must be a number", "str"),
    (lambda: solvers.build("rk5", SDE, 3), ValueError, f"solver must be one of {NAMES}", "'rk5'"),
    (
        lambda: solvers.heun(SDE, [1.0, 0.0], "eps", euler_final=False),
        ValueError,
        "a network that predicts eps has no velocity at t = 0",
    ),
]

NOISE = [
    (lambda: noise.normal(None, 0, (2,)), TypeError, "keys must be a tensor", "NoneType"),
    (lambda: noise.bits([1], 0, (2,)), TypeError, "keys must be a tensor", "list"),
    (lambda: noise.normal(KEYS.float(), 0, (2,)), TypeError, "keys must be int64", "torch.float32"),
    (lambda: noise.normal(KEYS[0], 0, (2,)), ValueError, "keys must have shape [n, 2]", "[2]"),
    (lambda: noise.normal(KEYS.repeat(1, 2), 0, (2,)), ValueError, "keys must have shape [n, 2]", "[4, 4]"),
    (lambda: noise.normal(KEYS, -1, (2,)), ValueError, "step must be in [0, 2^28)", "-1"),
    (lambda: noise.normal(KEYS, 2**28, (2,)), ValueError, "step must be in [0, 2^28)", str(2**28)),
    (lambda: noise.normal(KEYS, 1.0, (2,)), TypeError, "step must be an int", "float"),
    (lambda: noise.normal(KEYS, torch.ones(1), (2,)), ValueError, "step must be an int or an int64", "float32 [1]"),
    (lambda: noise.uniform(KEYS, torch.tensor(1), (2,)), ValueError, "step must be an int or an int64", "int64 []"),
    (lambda: noise.uniform(KEYS, 0, (2,), 16), ValueError, "stream must be in [0, 16)", "16"),
    (lambda: noise.normal(KEYS, 0, (2,), -1), ValueError, "stream must be in [0, 16)", "-1"),
    (lambda: noise.normal(KEYS, 0, (2,), 1.0), TypeError, "stream must be an int", "float"),
    (lambda: noise.normal(KEYS, 0, (2,), True), TypeError, "stream must be an int", "bool"),
    (lambda: noise.normal(KEYS, 0, 2), TypeError, "shape must be a sequence of ints", "int"),
    (lambda: noise.normal(KEYS, 0, (2.0,)), TypeError, "shape[0] must be an int", "float"),
    (lambda: noise.uniform(KEYS, 0, (3, -2)), ValueError, "shape[1] must be at least 0", "-2"),
    (lambda: noise.fold_in(torch.zeros(2), 1), ValueError, "key must be int64 [..., 2]", "torch.float32 [2]"),
    (lambda: noise.fold_in(KEYS[0].repeat(2), 1), ValueError, "key must be int64 [..., 2]", "torch.int64 [4]"),
    (lambda: noise.sample_keys(-1, 3), ValueError, "seed must be in [0, 2^64)", "-1"),
    (lambda: noise.sample_keys(2**64, 3), ValueError, "seed must be in [0, 2^64)", str(2**64)),
    (lambda: noise.sample_keys(1.0, 3), TypeError, "seed must be an int", "float"),
    (lambda: noise.sample_keys(0, -3), ValueError, "n must be at least 0", "-3"),
    (lambda: noise.sample_keys(0, 3.0), TypeError, "n must be an int", "float"),
    (lambda: noise.sample_keys(0, True), TypeError, "n must be an int", "bool"),
    (lambda: noise.sample_keys(0, 3, -1), ValueError, "first_sample must be in [0, 2^64)", "-1"),
    (lambda: noise.fold_in((1, 2), -1), ValueError, "data must be in [0, 2^64)", "-1"),
    (lambda: noise.fold_in((1, 2), 1.0), TypeError, "data must be an int", "float"),
    (lambda: noise.fold_in((-1, 2), 0), ValueError, "seed must be in [0, 2^64)", "-1"),
    (lambda: noise.fold_in((1, 2.0), 0), TypeError, "offset must be an int", "float"),
]

ROLL = nn.Sequential(nn.Linear(3, 8), nn.LogSigmoid(), nn.Linear(8, 2))
generate, loss = tutorial.generate_samples, tutorial.calc_loss

TUTORIAL = [
    (lambda: generate(ROLL, 4.0), TypeError, "nsamples must be an int", "float"),
    (lambda: generate(ROLL, -4), ValueError, "nsamples must be at least 0", "-4"),
    (lambda: generate(ROLL, 4, noise="numpy"), ValueError, "noise must be 'contract' or 'torch'", "'numpy'"),
    (lambda: generate(ROLL, 4, noise=None), ValueError, "noise must be 'contract' or 'torch'", "None"),
    (lambda: generate(ROLL, 4, data_dim=0), ValueError, "data_dim must be at least 1", "0"),
    (lambda: generate(ROLL, 4, data_dim=2.0), TypeError, "data_dim must be an int", "float"),
    (lambda: generate(nn.Sequential(nn.ReLU()), 4), ValueError, "data_dim must be given for a Sequential without"),
    (lambda: generate(ROLL, 4, steps=5), ValueError, "steps is fixed by the tutorial", "5", "fastsde.sample"),
    (lambda: generate(ROLL, 4, t_end=0.1), ValueError, "t_end is fixed by the tutorial", "0.1", "fastsde.sample"),
    (lambda: generate(ROLL, 4, backend="cuda"), ValueError, "backend must be one of", "'cuda'"),
    (lambda: loss(ROLL, [[0.0, 0.0]]), TypeError, "x must be a tensor", "list"),
    (lambda: loss(ROLL, torch.zeros(4, 2).long()), TypeError, "x must be floating-point", "torch.int64"),
    (lambda: loss(ROLL, torch.zeros(4)), ValueError, "x must have shape [B, d]", "[4]"),
    (lambda: loss(ROLL, torch.zeros(4, 1, 28, 28)), ValueError, "x must have shape [B, d]", "[4, 1, 28, 28]"),
]

MODELS = [
    (lambda: MLP(0), ValueError, "shape[0] must be at least 1", "0"),
    (lambda: MLP(2, (64, -1)), ValueError, "hidden[1] must be at least 1", "-1"),
    (lambda: MLP(2, activation="relu"), ValueError, "activation must be one of LogSigmoid, SiLU", "'relu'"),
    (lambda: UNet(0), ValueError, "image_channels must be at least 1", "0"),
    (lambda: UNet(1, (28, 0)), ValueError, "image_size[1] must be at least 1", "0"),
    (lambda: UNet(channels=(32,)), ValueError, "channels must be at least two", "(32,)"),
    (lambda: from_config({"architecture": "ResNet"}), ValueError, "architecture must be one of MLP", "'ResNet'"),
]

TRAINING = {
    "prediction": [("epsilon", ValueError, "must be one of score, eps, x0, v", "'epsilon'")],
    "weighting": [("uniform", ValueError, "must be one of sigma2, likelihood, target", "'uniform'")],
    "lr_schedule": [("linear", ValueError, "must be one of constant, cosine", "'linear'")],
    "precision": [("fp16", ValueError, "must be one of fp32, bf16", "'fp16'")],
    "steps": [(0, ValueError, "must be in [1, 2^28)", "0"), (1.5, TypeError, "must be an int", "float")],
    "batch_size": [(0, ValueError, "must be at least 1", "0"), ("4", TypeError, "must be an int", "str")],
    "checkpoint_every": [(0, ValueError, "must be at least 1", "0"), (None, TypeError, "must be an int", "NoneType")],
    "log_every": [(-1, ValueError, "must be at least 1", "-1")],
    "lr_warmup": [(-1, ValueError, "must be at least 0", "-1"), (True, TypeError, "must be an int", "bool")],
    "lr": [
        (0.0, ValueError, "must be positive and finite", "0.0"),
        (NAN, ValueError, "must be", "finite", "nan"),
        ("1e-3", TypeError, "must be a number", "str"),
    ],
    "ema_decay": [
        (1.0, ValueError, "must be in [0, 1)", "1.0"),
        (NAN, ValueError, "must be", "nan"),
        (None, TypeError, "must be a number", "NoneType"),
    ],
    "t_min": [
        (0.0, ValueError, "must be in (0, 1)", "0.0"),
        (1.0, ValueError, "must be in (0, 1)", "1.0"),
        ("0", TypeError, "must be a number", "str"),
    ],
    "seed": [
        (-1, ValueError, "must be in [0, 2^63)", "-1"),
        (2**63, ValueError, "must be in [0, 2^63)", str(2**63)),
        (1.5, TypeError, "must be an int", "float"),
    ],
}

DATA = [
    (lambda: data.load("cifar"), ValueError, "must be one of swiss-roll, digits, mnist", "'cifar'"),
    (lambda: data.load(None), ValueError, "must be one of swiss-roll, digits, mnist", "None"),
    (lambda: data.load("digits", size=0), ValueError, "size must be at least 1", "0"),
    (lambda: data.load("digits", size=1798), ValueError, "size must be at most 1797 for digits", "1798"),
    (lambda: data.load("digits", pixel_range=(1, 0)), ValueError, "pixel_range must be (low, high)", "(1, 0)"),
    (lambda: data.load("digits", pixel_range=(0, NAN)), ValueError, "pixel_range must be (low, high)", "(0, nan)"),
    (lambda: default_config("cifar"), ValueError, "data must be one of swiss-roll, digits, mnist", "'cifar'"),
    (lambda: tutorial_config(None), ValueError, "data must be one of swiss-roll, digits, mnist", "None"),
]


def _ids(cases: list[tuple]) -> list[str]:
    return [" ".join(case[2:])[:60] for case in cases]


CALLS = [*SDES, *TABLES, *SOLVERS, *NOISE, *TUTORIAL, *MODELS, *DATA]


@pytest.mark.parametrize(("call", "error", "parts"), [(c[0], c[1], c[2:]) for c in CALLS], ids=_ids(CALLS))
def test_functions_name_what_is_wrong(call, error, parts):
    check(call, error, *parts)


@pytest.mark.parametrize("builder", ["euler_maruyama", "exponential_euler_maruyama", "heun"])
@pytest.mark.parametrize(
    ("arguments", "error", "parts"), [(c[0], c[1], c[2:]) for c in CONTINUOUS], ids=_ids(CONTINUOUS)
)
def test_builders_name_wrong_times(builder, arguments, error, parts):
    check(lambda: getattr(solvers, builder)(SDE, *arguments), error, *parts)


@pytest.mark.parametrize("builder", ["ddpm", "ddim", "dpm_solver_pp_2m"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "parts"),
    [(*c[:3], c[3:]) for c in SCHEDULE],
    ids=[" ".join(c[3:])[:60] for c in SCHEDULE],
)
def test_builders_name_a_wrong_schedule(builder, arguments, options, error, parts):
    check(lambda: getattr(solvers, builder)(*arguments, **options), error, *parts)


@pytest.mark.parametrize(
    ("name", "value", "error", "parts"),
    [(name, case[0], case[1], case[2:]) for name, cases in TRAINING.items() for case in cases],
)
def test_train_config_names_what_is_wrong(name, value, error, parts):
    check(lambda: TrainConfig("swiss-roll", {"architecture": "MLP"}, **{name: value}), error, name, *parts)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    checkpoints.save(path, checkpoints.Checkpoint(MLP(2, (4,))))
    assert checkpoints.load(path).shape == (2,)
    return path


def _rewritten(path: Path, drop: str = "", tensors: dict | None = None, **metadata: object) -> Path:
    weights, good = checkpoints.read(path)
    changed = {name: value for name, value in {**good, **metadata}.items() if name != drop}
    save_file(weights if tensors is None else tensors, path, {"fastsde": json.dumps(changed)})
    return path


def test_a_missing_file_is_named(tmp_path):
    check(lambda: checkpoints.load(tmp_path / "no.safetensors"), FileNotFoundError, str(tmp_path / "no.safetensors"))
    check(lambda: checkpoints.load("no-such-model"), FileNotFoundError, "no-such-model")
    check(lambda: checkpoints.load(tmp_path), FileNotFoundError, str(tmp_path))


@pytest.mark.parametrize("kind", ["empty", "text", "cut header", "cut tensors", "longer"])
def test_a_damaged_file_is_named(checkpoint, kind):
    good = checkpoint.read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "cut header": good[:20],
        "cut tensors": good[:-10],
        "longer": good + b"more",
    }
    checkpoint.write_bytes(contents[kind])
    check(lambda: checkpoints.load(checkpoint), ValueError, str(checkpoint), "not a safetensors file, or is damaged")


def test_a_file_of_someone_else_is_named(checkpoint):
    weights = checkpoints.read(checkpoint)[0]
    for metadata in (None, {"format": "pt"}, {"fastsde": "null"}, {"fastsde": "[1]"}):
        save_file(weights, checkpoint, metadata)
        check(lambda: checkpoints.load(checkpoint), ValueError, str(checkpoint), "not a fastsde checkpoint")


@pytest.mark.parametrize("version", [2, 0, None, "one"])
def test_another_format_is_named_with_both_versions(checkpoint, version):
    path = _rewritten(checkpoint, format=version)
    check(lambda: checkpoints.load(path), ValueError, str(path), f"format {version}", "reads format 1")


@pytest.mark.parametrize("entry", ["model", "sde", "prediction", "data", "value_range", "record"])
def test_an_incomplete_checkpoint_is_named_with_what_is_missing(checkpoint, entry):
    path = _rewritten(checkpoint, drop=entry)
    check(lambda: checkpoints.load(path), ValueError, str(path), "fastsde checkpoint", entry)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "net.0.bias"),
        (lambda weights: {**weights, "model.more": torch.zeros(2)}, "more"),
        (lambda weights: {name: value.flatten()[:1] for name, value in weights.items()}, "net.0.weight"),
    ],
    ids=["missing", "extra", "other shape"],
)
def test_weights_that_do_not_fit_are_named(checkpoint, change, part):
    path = _rewritten(checkpoint, tensors=change(checkpoints.read(checkpoint)[0]))
    check(lambda: checkpoints.load(path), ValueError, str(path), part)


def test_a_checkpoint_of_an_unknown_kind_says_so(checkpoint):
    path = _rewritten(checkpoint, model={"architecture": "ResNet"})
    check(lambda: checkpoints.load(path), ValueError, str(path), "architecture", "ResNet")
    path = _rewritten(checkpoint, model=MLP(2, (4,)).config, sde={"beta_min": 5.0, "beta_max": 1.0})
    check(lambda: checkpoints.load(path), ValueError, str(path), "beta_min=5.0 and beta_max=1.0")
    path = _rewritten(checkpoint, sde={"beta_min": 0.1, "beta_max": 20.0}, prediction="epsilon")
    check(lambda: checkpoints.load(path), ValueError, str(path), "prediction", "'epsilon'")


def test_mnist_that_is_not_to_be_had_says_where_it_belongs(tmp_path, monkeypatch):
    import torchvision

    class Unreachable:
        def __init__(self, root: str, train: bool, download: bool = False) -> None:
            raise OSError("no network") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(torchvision.datasets, "MNIST", Unreachable)
    check(
        lambda: data.load("mnist", root=tmp_path),
        FileNotFoundError,
        f"MNIST is not in {tmp_path / 'MNIST' / 'raw'}",
        "could not be downloaded",
        "root in Python",
        "'digits'",
    )
