"""Every backend that this machine has against the reference, on one network: ``fastsde verify``.

The truth is the reference in float64. A backend's error in a dtype may be at most twice that of plain PyTorch (backend
"reference") in the same dtype, plus a small constant (flash-attention's rule); an error is the RMS over all elements of
the state after the first row, and again after the last. The constant holds what plain PyTorch, whose normals are the
truth's, has no share in, and a rounding where it happens to have none:

    4e-6 sqrt(1 + sum of d^2) + 2^-24 sqrt(K) RMS(truth)    after K rows of the table

4e-6 is how far the normals of two backends may lie apart (the noise contract). The initial state takes one of weight
1, each row one of weight d, and their errors are independent. On this SDE the state keeps its size of about 1, and so
does a small error: all normals off by the whole 4e-6 move the end of a trajectory of the shipped models by 3e-6 to
1.2e-5, and 999 rows of Euler-Maruyama are allowed 1.3e-5. The second term is one fp32 rounding of the state a row.

PyTorch may run fp32 products in TF32, and convolutions on a GPU do by default. The reference in float32 has the same
setting as the backends beside it, so that it is their yardstick all the same; `machine` tells what it is.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__, checkpoints, engines
from .checkpoints import Checkpoint
from .files import atomic_path
from .reference import Model, NonFiniteError
from .sampler import Sampler
from .sde import VPSDE
from .solvers import StepTable
from .validation import check_bool, check_int
from .vocabulary import VERIFIED_DTYPES

__all__ = ["DTYPES", "Difference", "Result", "default_n", "machine", "table", "verify", "write_json"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in VERIFIED_DTYPES}
_REFERENCE = "reference"
_NORMAL_ERROR = 4e-6  # of the noise contract
_ROUNDOFF = 2.0**-24  # of fp32


@dataclass(frozen=True)
class Difference:
    """How far a state lies from the truth: the largest difference, the RMS, and the RMS that is allowed, if one is."""

    largest: float
    rms: float
    allowed: float | None = None


@dataclass(frozen=True)
class Result:
    """What became of one backend in one dtype.

    Args:
        dtype: what the network ran in, such as "float32".
        verdict: "pass", "fail", "unavailable" (it cannot run here), or for the reference "truth" and "yardstick".
        first_step, whole: the differences after one row and after all rows; None where that is not a finite number.
        reason: why it failed or cannot run.
    """

    backend: str
    dtype: str
    compile: bool
    verdict: str
    first_step: Difference | None = None
    whole: Difference | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return _label(self.backend, self.dtype, self.compile)


class _UnavailableError(Exception):
    """A backend cannot run here; the message says why."""


@dataclass(frozen=True)
class _Case:
    """What all backends run: a network, a table, and n samples of a seed."""

    model: Model
    shape: tuple[int, ...]
    device: torch.device
    table: StepTable
    n: int
    seed: int
    progress: bool

    def draw(self, backend: str, dtype: torch.dtype, compile: bool = False) -> tuple[Tensor, Tensor]:
        """The states ``[n, *shape]`` after one row and after all, each from a sampler of its own.

        Not every backend stops between rows, and one that keeps states need not run as it does without.
        """
        options: dict[str, Any] = {"dtype": dtype, "device": self.device, "backend": backend, "compile": compile}
        try:
            tables = self.table.head(1), self.table
            first, whole = (Sampler(self.model, self.shape, solver=table, **options) for table in tables)
        except ValueError as error:
            raise _UnavailableError(str(error)) from error
        if self.progress:
            tqdm.write(_label(backend, _name(dtype), compile), file=sys.stderr)
        with warnings.catch_warnings():
            # The network would go on without it, and stand in the table as compiled.
            warnings.filterwarnings("error", "torch.compile failed", RuntimeWarning)
            try:
                return first(self.n, seed=self.seed), whole(self.n, seed=self.seed, progress=self.progress)
            except (engines.CaptureError, RuntimeWarning) as error:
                raise _UnavailableError(_one_line(error)) from error


def default_n(shape: Sequence[int]) -> int:
    """How many samples of a shape are drawn by default: 4 images ``[C, H, W]``, or 256 of what is cheaper."""
    return 4 if len(shape) == 3 else 256


def verify(
    model: str | Path | Checkpoint | Model,
    sample_shape: Sequence[int] | None = None,
    *,
    sde: VPSDE | None = None,
    prediction: str | None = None,
    n: int | None = None,
    solver: str | StepTable = "euler_maruyama",
    steps: int = 999,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    compile: bool = False,
    progress: bool = False,
) -> list[Result]:
    """Runs every backend against the reference, by the rule that the module's docstring explains.

    Args:
        model: a shipped model by name, a checkpoint file, the folder of a training run, a `Checkpoint`, or a network.
        sample_shape, sde, prediction: of a network, as for `fastsde.Sampler`; a checkpoint has its own.
        n: how many samples; by default 4 images or 256 others.
        device: by default the network's own, and for what is loaded CUDA where there is one, else the CPU.
        dtypes: what networks run in, of float32, bfloat16 and float16; by default the first two, on a GPU all three.
        compile: run each backend a second time through ``torch.compile``.
        progress: show on stderr which backend runs, and how far it is.
        solver, steps, seed: as for `fastsde.Sampler`.

    Returns:
        First the truth; then for each dtype the reference and every other backend.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        NonFiniteError: where the reference in float64 has NaN or infinity.
    """
    given = {"sample_shape": sample_shape, "sde": sde, "prediction": prediction}
    model, given = _subject(model, device, {name: value for name, value in given.items() if value is not None})
    # It also checks the arguments: after it, a sampler's ValueError is that of a backend.
    options: dict[str, Any] = {**given, "device": device, "dtype": torch.float64, "backend": _REFERENCE}
    sampler = Sampler(model, solver=solver, steps=steps, **options)
    shape = sampler.sample_shape
    if not math.prod(shape):
        raise ValueError(f"sample_shape must have elements to compare, got {list(shape)}")
    n = check_int("n", default_n(shape) if n is None else n, 1)
    check_bool("compile", compile)
    dtypes = _checked_dtypes(dtypes, sampler.device)
    case = _Case(model, shape, sampler.device, sampler.table, n, seed, progress)
    truth = case.draw(_REFERENCE, torch.float64)
    results = [Result(_REFERENCE, "float64", False, "truth", Difference(0.0, 0.0), Difference(0.0, 0.0))]
    for dtype in dtypes:
        results += _in_dtype(case, truth, dtype, compile)
    return results


def _subject(model: Any, device: torch.device | str | None, given: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The network, and the arguments of a `Sampler` that belong to it."""
    if isinstance(model, (str, Path)):
        model = checkpoints.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, Checkpoint):
        if given:
            raise ValueError(f"{next(iter(given))} is part of the checkpoint: leave it out")
        return model.model, {"sample_shape": model.shape, "sde": model.sde, "prediction": model.prediction}
    if "sample_shape" not in given:
        raise ValueError("sample_shape must be given with a network of your own, got None")
    return model, given


def _checked_dtypes(dtypes: Sequence[torch.dtype] | None, device: torch.device) -> list[torch.dtype]:
    known = list(DTYPES.values())
    if dtypes is None:
        return known if device.type == "cuda" else known[:2]  # CPUs emulate float16
    if not isinstance(dtypes, Sequence) or not dtypes:
        raise TypeError(f"dtypes must be a sequence of one dtype or more, got {dtypes!r}")
    for i, dtype in enumerate(dtypes):
        if dtype not in known:
            raise ValueError(f"dtypes[{i}] must be one of {', '.join(map(str, known))}, got {dtype}")
    return list(dict.fromkeys(dtypes))


def _in_dtype(case: _Case, truth: tuple[Tensor, Tensor], dtype: torch.dtype, compile: bool) -> Iterator[Result]:
    """The reference, then every other backend beside it."""
    yardstick = _check(case, truth, None, _REFERENCE, dtype)
    yield yardstick
    for backend in engines.BACKENDS:
        for compiled in (False, True) if compile else (False,):
            if backend not in ("auto", _REFERENCE):
                yield _check(case, truth, yardstick, backend, dtype, compiled)


def _check(
    case: _Case,
    truth: tuple[Tensor, Tensor],
    yardstick: Result | None,
    backend: str,
    dtype: torch.dtype,
    compile: bool = False,
) -> Result:
    about = backend, _name(dtype), compile
    if yardstick is not None and yardstick.verdict != "yardstick":
        return Result(*about, "unavailable", reason=f"there is no yardstick: {yardstick.reason}")
    try:
        states = case.draw(backend, dtype, compile)
    except _UnavailableError as error:
        return Result(*about, "unavailable", reason=str(error))
    except NonFiniteError as error:
        return Result(*about, "fail", reason=str(error))
    except Exception as error:  # whatever it is, the other backends are still to be seen
        # What stops plain PyTorch is a network that does not know the dtype.
        return Result(*about, "unavailable" if yardstick is None else "fail", reason=_one_line(error))
    limits = (None, None) if yardstick is None else (yardstick.first_step, yardstick.whole)
    first = _difference(states[0], truth[0], limits[0], case.table.head(1))
    whole = _difference(states[1], truth[1], limits[1], case.table)
    reason = _excess(first, "1 step") or _excess(whole, "all steps")
    verdict = "fail" if reason else "yardstick" if yardstick is None else "pass"
    return Result(*about, verdict, first, whole, reason)


def _difference(x: Tensor, truth: Tensor, yardstick: Difference | None, table: StepTable) -> Difference | None:
    error = x.double() - truth
    if not torch.isfinite(error).all():
        return None
    noise = _NORMAL_ERROR * math.sqrt(1 + float(table.d.square().sum()))
    constant = noise + _ROUNDOFF * math.sqrt(len(table)) * _rms(truth)
    allowed = None if yardstick is None else 2 * yardstick.rms + constant
    return Difference(float(error.abs().max()), _rms(error), allowed)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _excess(difference: Difference | None, when: str) -> str | None:
    if difference is None:
        return f"NaN or infinity after {when}"
    rms, allowed = difference.rms, difference.allowed
    return None if allowed is None or rms <= allowed else f"RMS {rms:.1e} after {when}, {allowed:.1e} is allowed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _label(backend: str, dtype: str, compile: bool) -> str:
    return f"{backend} in {dtype}{', compiled' if compile else ''}"


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# What is shown ------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> list[str]:
    """The lines of a table of what ran, and below it why something failed or cannot run here."""
    compiles = any(result.compile for result in results)
    width = max(len(result.backend) for result in results) + 2

    def line(backend: str, dtype: str, compiled: str, first: str, whole: str, verdict: str) -> str:
        return f"{backend:<{width}}{dtype:<8}{f'  {compiled:<7}' * compiles}{first}   {whole}   {verdict}".rstrip()

    titles = "".join(f"{title:>9}" for title in ("largest", "RMS", "allowed"))
    lines = [
        line("", "", "", f"{'after 1 step':>27}", f"{'after all steps':>27}", ""),
        line("backend", "dtype", "compile", titles, titles, "verdict"),
    ]
    for result in results:
        if result.verdict != "unavailable":
            numbers = _numbers(result.first_step), _numbers(result.whole)
            lines.append(
                line(result.backend, result.dtype, "yes" if result.compile else "no", *numbers, result.verdict)
            )
    below = _reasons(results)
    return [*lines, "", *below] if below else lines


def _reasons(results: Sequence[Result]) -> list[str]:
    """One line for each reason of a backend, with the dtypes that it holds for where that is not all of them."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.reason is not None:
            key = result.backend, "fails" if result.verdict == "fail" else "cannot run here", result.reason
            cases.setdefault(key, []).append(result.dtype + ", compiled" * result.compile)
    lines = []
    for (backend, what, reason), dtypes in cases.items():
        everywhere = len(dtypes) == sum(result.backend == backend for result in results)
        where = "" if everywhere else f" in {'; '.join(dtypes)}"
        lines.append(f"{backend} {what}{where}: {reason}")
    return lines


def _numbers(difference: Difference | None) -> str:
    values = (None,) * 3 if difference is None else (difference.largest, difference.rms, difference.allowed)
    return "".join(f"{'-':>9}" if value is None else f"{value:>9.1e}" for value in values)


def machine(device: torch.device) -> dict[str, str]:
    """Device and versions, and what PyTorch makes of fp32 products there: "ieee", or "ieee, tf32 in convolutions"."""
    cuda = device.type == "cuda"
    # The newer switches, which also tell what the older ones were set to.
    convolutions: Any = torch.backends.cudnn if cuda else torch.backends.mkldnn
    matrices: Any = torch.backends.cuda if cuda else torch.backends.mkldnn
    switches = matrices.matmul.fp32_precision, convolutions.conv.fp32_precision
    matmul, conv = ("ieee" if switch == "none" else switch for switch in switches)
    return {
        "device": f"{device} ({torch.cuda.get_device_name(device) if cuda else platform.machine()})",
        "fastsde": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fp32_products": matmul if matmul == conv else f"{matmul}, {conv} in convolutions",
    }


def write_json(path: str | Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Writes ``about`` and the results, whole or not at all."""
    document = {**about, "results": [asdict(result) for result in results]}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
