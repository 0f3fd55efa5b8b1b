from __future__ import annotations

import re

import pytest
import torch

from fastsde import VPSDE, noise, ops, reference, solvers
from fastsde.objective import Objective

SDE = VPSDE()
KEYS = noise.sample_keys(0, 3)
TABLE = solvers.euler_maruyama(SDE, torch.linspace(1, 0, 4))
MULTISTEP = solvers.build("dpm_solver_pp_2m", SDE, 4, clip=1.0)
X, F, X_0 = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.randn(3, 2, 5)
T = torch.rand(3) * 0.9 + 0.05
OBJECTIVE = Objective(SDE, "v", "target")
K, STEP = OBJECTIVE.table(T), torch.tensor([4])


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests only the checks; tests/kernels tests the kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops.dispatch, "has_native", lambda device: False)


def test_the_checked_operations_are_the_reference() -> None:
    for slots, table, given in (([X], TABLE, {"keys": KEYS}), ([X, F], MULTISTEP, {"f_uncond": X, "guidance": 2.0})):
        ours, theirs = (module.solver_step(slots, F, table, 1, **given) for module in (ops, reference))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    theirs = reference.perturb(X_0, KEYS, 4, K)
    for ours, expected in zip(ops.perturb(X_0, KEYS, 4, K, keep_noise=True), theirs, strict=True):
        assert torch.equal(ours, expected)
    assert ops.perturb(X_0, KEYS, 4, K).z is None
    assert ops.perturb(X_0, KEYS, 4, K, z=X).z is X
    assert torch.equal(ops.dsm_loss(F, X_0, KEYS, 4, K), reference.dsm_loss(F, X_0, KEYS, 4, K))
    assert torch.equal(ops.coefficients(OBJECTIVE, T), K)
    (t,) = ops.training_times(OBJECTIVE, KEYS, 4)
    assert torch.equal(OBJECTIVE.table(t), reference.training_draws(KEYS, 4, 7, (), OBJECTIVE).coefficients)


def test_a_half_precision_network_output_is_upcast() -> None:
    (ours,) = ops.solver_step([X], F.bfloat16(), TABLE, 0, keys=KEYS)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference.solver_step([X], F.bfloat16().float(), TABLE, 0, keys=KEYS)[0])


def test_the_loss_has_a_gradient() -> None:
    f = F.clone().requires_grad_()
    ops.dsm_loss(f, X_0, KEYS, 4, K).backward()
    assert f.grad is not None
    assert f.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.solver_step(X, F, TABLE, 0), TypeError, "slots must be a list or tuple of tensors, got Tensor"),
        (lambda: ops.solver_step([1.0], F, TABLE, 0), TypeError, r"slots\[0\] must be a tensor, got float"),
        (lambda: ops.solver_step([], F, TABLE, 0), ValueError, "slots must be the 1 slots of the table, got 0"),
        (
            lambda: ops.solver_step([X] * 3, F, MULTISTEP, 0),
            ValueError,
            "slots must be the 2 slots of the table, got 3",
        ),
        (
            lambda: ops.solver_step([X.half()], F, TABLE, 0, keys=KEYS),
            ValueError,
            r"slots\[0\] must be float32 or float64 \[B, \*shape\], got torch.float16 \[3, 2, 5\]",
        ),
        (
            lambda: ops.solver_step([X, F[:2]], F, MULTISTEP, 0),
            ValueError,
            r"slots\[1\] must have shape \[3, 2, 5\], got \[2, 2, 5\]",
        ),
        (
            lambda: ops.solver_step([X], F[:2], TABLE, 0, keys=KEYS),
            ValueError,
            r"f must have shape \[3, 2, 5\], got \[2, 2, 5\]",
        ),
        (
            lambda: ops.solver_step([X], F.long(), TABLE, 0, keys=KEYS),
            TypeError,
            "f must be floating-point, got torch.int64",
        ),
        (lambda: ops.solver_step([X], None, TABLE, 0, keys=KEYS), TypeError, "f must be a tensor, got NoneType"),
        (lambda: ops.solver_step([X], F, "ddim", 0, keys=KEYS), TypeError, "table must be a StepTable, got str"),
        (lambda: ops.solver_step([X], F, TABLE, 3, keys=KEYS), ValueError, r"row must be in \[0, 3\), got 3"),
        (lambda: ops.solver_step([X], F, TABLE, 0), ValueError, "z or keys must be given for row 0"),
        (
            lambda: ops.solver_step([X], F, TABLE, 0, keys=KEYS[:2]),
            ValueError,
            r"keys must have shape \[3, 2\], got \[2, 2\]",
        ),
        (lambda: ops.solver_step([X], F, TABLE, 0, keys=KEYS.float()), TypeError, "keys must be int64"),
        (lambda: ops.solver_step([X], F, TABLE, 0, z=X[0]), ValueError, r"z must have shape"),
        (lambda: ops.solver_step([X], F, TABLE, 0, z=X, guidance=1.0), ValueError, "f_uncond and guidance go together"),
        (lambda: ops.perturb(X_0.int(), KEYS, 0, K), ValueError, "x_0 must be uint8 or floating-point"),
        (lambda: ops.perturb(X_0, None, 0, K), ValueError, "keys must be given unless z is"),
        (lambda: ops.perturb(X_0, KEYS, -1, K), ValueError, "step must be in"),
        (lambda: ops.perturb(X_0, KEYS, 0, 0.1), TypeError, "coefficients must be a tensor, got float"),
        (lambda: ops.perturb(X_0, KEYS, 0, K[:2]), ValueError, r"coefficients must have shape \[3, 6\], got \[2, 6\]"),
        (lambda: ops.perturb(X_0, KEYS, 0, K.long()), TypeError, "coefficients must be floating-point"),
        (lambda: ops.perturb(X_0, KEYS, 0, K, index=torch.tensor([0.0])), ValueError, "index must be int64"),
        (
            lambda: ops.perturb(X_0, KEYS, 0, K, index=torch.tensor([0, 1, 3])),
            ValueError,
            r"index must be in \[0, 3\)",
        ),
        (lambda: ops.perturb(X_0, KEYS, 0, K, scale=float("inf")), ValueError, "scale must be finite, got inf"),
        (lambda: ops.perturb(X_0, KEYS, 0, K, keep_noise=1), TypeError, "keep_noise must be True or False, got 1"),
        (lambda: ops.perturb(X_0, KEYS, 0, K, z=X[0]), ValueError, r"z must have shape \[3, 2, 5\], got \[2, 5\]"),
        (lambda: ops.perturb(X_0, KEYS, 0, K, counter=STEP), ValueError, "counter must be None where no kernel runs"),
        (lambda: ops.dsm_loss(F, X_0, KEYS, 0, K[:, :5]), ValueError, r"coefficients must have shape \[3, 6\]"),
        (lambda: ops.dsm_loss(F[:, 0], X_0, KEYS, 0, K), ValueError, r"f must have shape \[3, 2, 5\]"),
        (lambda: ops.coefficients(SDE, T), TypeError, "objective must be a Objective, got VPSDE"),
        (lambda: ops.coefficients(OBJECTIVE, 0.5), TypeError, "t must be a tensor, got float"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("device", "interpret", "triton", "expected"),
    [
        ("cpu", None, True, False),
        ("cpu", "0", True, False),
        ("cpu", "1", True, True),
        ("cpu", "true", True, True),
        ("cpu", "1", False, False),
        ("meta", "1", True, False),
    ],
)
def test_triton_runs_on_the_cpu_in_the_interpreter_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, interpret: str | None, triton: bool, expected: bool
) -> None:
    monkeypatch.setattr(ops.dispatch, "_HAS_TRITON", triton)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert ops.has_triton(torch.device(device)) is expected


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1a2b3c", "2.10.0rc1", False),
        ("3.7.0", "2.5.0", True),
        ("3.10.0", "2.5.0", True),
    ],
)
def test_an_interpreter_that_numpy_breaks_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, runs: bool
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if runs:
        assert ops.dispatch.interpreter_problem() is None
        return
    message = (
        rf"Triton {re.escape(triton)} .* NumPy {re.escape(numpy)}: install 'numpy<2\.4', or a PyTorch with Triton 3\.7"
    )
    with pytest.raises(RuntimeError, match=message):
        ops.normal(KEYS, 1, (2,))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert ops.normal(KEYS, 1, (2,)).shape == (3, 2)
