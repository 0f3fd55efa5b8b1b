"""Compares every backend that this machine has with the reference, on one network: ``fastsde verify``.

The truth is the reference in float64; a network that does not accept float64 runs in its own dtype, on a float64 state.
A backend's error in a dtype may be at most twice that of plain PyTorch in the same dtype, plus a small constant
(flash-attention's rule); an error is the RMS over all elements of the state after the first row, and again after the
last. Plain PyTorch is the reference, on a copy of the network that ``fastsde.yardstick`` calls; it never rounds times,
and so exposes a backend that does. The constant covers errors that plain PyTorch lacks: those of the normals, since it
uses the truth's, and a rounding where it happens to have none:

    4e-6 sqrt(prior_std^2 + sum of d^2) + 2^-24 sqrt(K) RMS(truth)    after K rows of the table

The normals of two backends may differ by 4e-6 (the noise contract). The initial state uses one normal with weight
prior_std and each row one with weight d, and their errors are independent. On the VP-SDE the state keeps its size of
about 1, and a small error keeps its size too: if all normals are off by the whole 4e-6, the end of a trajectory of the
shipped models moves by 3e-6 to 1.2e-5, and 999 rows of Euler-Maruyama are allowed 1.3e-5. The second term is one fp32
rounding of the state per row.

PyTorch may run fp32 products in TF32, and does so by default for convolutions on a GPU; `machine` reports the setting.
Whether cuDNN really does so depends on the shape, so the yardstick in float32 is then the larger error of two: that of
plain PyTorch, and that of plain PyTorch with the factors of its products rounded to TF32 (``fastsde.tf32``).
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__, engines, subject
from .adaptive import AdaptiveSolver
from .checkpoints import Checkpoint
from .files import atomic_path
from .guidance import Guidance
from .inverse import ClassifierGuidance
from .networks import NETWORKS
from .notices import first_line
from .reference import Model, NonFiniteError
from .sampler import Sampler
from .sde import Process
from .solvers import StepTable
from .subject import ModelLike, TableOptions
from .tf32 import with_rounded_products
from .validation import check_bool, check_device, check_int
from .vocabulary import BACKENDS, VERIFIED_DTYPES
from .yardstick import in_dtype, in_its_own_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DTYPES", "Difference", "Result", "default_n", "machine", "table", "verify", "write_json"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in VERIFIED_DTYPES}
"""The dtypes that are verified, by name."""
_REFERENCE = "reference"
_NORMAL_ERROR = 4e-6  # of the noise contract
_ROUNDOFF = 2.0**-24  # of fp32


@dataclass(frozen=True)
class Difference:
    """How far a state is from the truth.

    Args:
        largest: the largest difference.
        rms: the root mean square.
        allowed: the largest RMS that is allowed, or None without a limit.
    """

    largest: float
    rms: float
    allowed: float | None = None


@dataclass(frozen=True)
class Result:
    """The result of one backend in one dtype.

    Args:
        backend: its name.
        dtype: the dtype that the network ran in, such as "float32".
        compile: whether the network was compiled.
        verdict: "pass", "fail", "unavailable" (it cannot run here), or for the reference "truth" and "yardstick".
        first_step: the difference after one row; None if not finite.
        whole: the difference after all rows; None if not finite.
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
    sde: Process
    table: StepTable
    guidance: Guidance | None
    call: dict[str, Any]
    n: int
    progress: bool

    def truth(self) -> tuple[Tensor, Tensor]:
        """Returns the states of the reference in float64. A network that refuses float64 runs in its own dtype."""
        try:
            self._sampler(self.model, 1, dtype=torch.float64, backend=_REFERENCE)(self.n, **self.call)
        except NonFiniteError:
            raise
        except (RuntimeError, IndexError):
            return self.draw(_REFERENCE, torch.float64, model=in_its_own_dtype(self.model))
        return self.draw(_REFERENCE, torch.float64)

    def yardsticks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the states of plain PyTorch in a dtype, with the state in fp32; in TF32 also with rounded products."""
        model = in_dtype(self.model, dtype)
        yield self.draw(_REFERENCE, torch.float32, model=model)
        tf32 = with_rounded_products(model, self.device) if dtype == torch.float32 else None
        if tf32 is not None:
            yield self.draw(_REFERENCE, torch.float32, model=tf32)

    def _sampler(self, model: Model, rows: int, **options: Any) -> Sampler:
        """Returns a sampler for the first rows of the table."""
        guidance = None if self.guidance is None else self.guidance.head(rows)
        given: dict[str, Any] = {"sde": self.sde, "guidance": guidance, "device": self.device}
        return Sampler(model, self.shape, solver=self.table.head(rows), **given, **options)

    def draw(
        self, backend: str, dtype: torch.dtype, compile: bool = False, model: Model | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the states ``[n, *shape]`` after one row and after all rows, each from a sampler of its own.

        Not every backend can stop between rows, and a backend that keeps states may run differently.

        Args:
            model: the network to run instead of ``self.model``.
        """
        options: dict[str, Any] = {"dtype": dtype, "backend": backend, "compile": compile}
        model = self.model if model is None else model
        try:
            first, whole = (self._sampler(model, rows, **options) for rows in (1, len(self.table)))
        except ValueError as error:
            raise _UnavailableError(str(error)) from error
        if self.progress:
            tqdm.write(_label(backend, _name(dtype), compile), file=sys.stderr)
        with warnings.catch_warnings():
            # Otherwise the network would run uncompiled, but be listed as compiled.
            warnings.filterwarnings("error", "torch.compile failed", RuntimeWarning)
            try:
                return first(self.n, **self.call), whole(self.n, **self.call, progress=self.progress)
            except (engines.CaptureError, RuntimeWarning) as error:
                raise _UnavailableError(first_line(error)) from error


def default_n(shape: Sequence[int]) -> int:
    """Returns how many samples of a shape are drawn by default: 4 images ``[C, H, W]``, or 256 cheaper samples."""
    return 4 if len(shape) == 3 else 256


def verify(
    model: ModelLike,
    sample_shape: Sequence[int] | None = None,
    *,
    sde: Process | None = None,
    prediction: str | None = None,
    n: int | None = None,
    solver: str | StepTable = "euler_maruyama",
    steps: int = 999,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance: float | Tensor | Guidance | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    compile: bool = False,
    progress: bool = False,
    **table_options: Unpack[TableOptions],
) -> list[Result]:
    """Compares every backend with the reference, by the rule in the module's docstring.

    Args:
        model: a shipped model by name, a checkpoint file, the folder of a training run, a `Checkpoint`, or a network;
            or an untrained network, "residual", "film" or "ddpm-unet", by default with conditions if it takes some.
        sample_shape: of a network, as for `fastsde.Sampler`; a checkpoint has its own.
        sde: the process of a network, by default ``VPSDE()``.
        prediction: what a network predicts, by default "score".
        n: how many samples; by default 4 images or 256 others, or as many as there are conditions.
        solver: a name of `fastsde.solvers.SOLVERS` or a `StepTable`.
        steps: the calls of the network.
        model_kwargs: further arguments of the network, as for `fastsde.sample`.
        guidance: as for `fastsde.Sampler`, but for classifier guidance.
        uncond_kwargs: those of the unconditional call, as for `fastsde.sample`.
        seed: of the samples, in [0, 2^64).
        device: by default the network's own; for a model that is loaded, CUDA if available, else the CPU.
        dtypes: the network's dtypes, of float32, bfloat16 and float16; by default the first two, on a GPU all three.
        compile: run each backend a second time through ``torch.compile``.
        progress: show on stderr which backend runs, and its progress.
        table_options: t_end, spacing, rho, clip, eta, solver_options and denoise, as for `fastsde.Sampler`.

    Returns:
        First the truth; then for each dtype the reference and every other backend.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
        NonFiniteError: if the reference in float64 has NaN or infinity.
    """
    if isinstance(model, str) and model in NETWORKS:
        model, n, model_kwargs = _named(model, n, model_kwargs, device)
    model, shape, sde, prediction, _ = subject.resolve(model, sample_shape, sde, prediction, device)
    if isinstance(solver, AdaptiveSolver):
        raise TypeError(f"solver must be a name or a StepTable, whose rows are compared, got {type(solver).__name__}")
    if isinstance(guidance, ClassifierGuidance):
        raise TypeError("guidance must be a weight or a Guidance, got ClassifierGuidance")
    # This also checks the arguments: after it, a ValueError of a sampler means that its backend cannot run.
    table: dict[str, Any] = {"sde": sde, "prediction": prediction, "solver": solver, "steps": steps}
    if isinstance(solver, StepTable):
        table["prediction"] = None
    options: dict[str, Any] = {**table, **table_options, "guidance": guidance}
    sampler = Sampler(model, shape, device=device, dtype=torch.float64, backend=_REFERENCE, **options)
    shape = sampler.sample_shape
    if not math.prod(shape):
        raise ValueError(f"sample_shape must have elements to compare, got {list(shape)}")
    conditions = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs}
    n = check_int("n", _usual_n(shape, conditions) if n is None else n, 1)
    check_bool("compile", compile)
    dtypes = _checked_dtypes(dtypes, sampler.device)
    call = {"seed": seed, **conditions}
    case = _Case(model, shape, sampler.device, sde, sampler.table, sampler.guidance, call, n, progress)
    truth = case.truth()
    results = [Result(_REFERENCE, "float64", False, "truth", Difference(0.0, 0.0), Difference(0.0, 0.0))]
    for dtype in dtypes:
        results += _in_dtype(case, truth, dtype, compile)
    return results


def _named(
    name: str, n: int | None, model_kwargs: Mapping[str, Any] | None, device: torch.device | str | None
) -> tuple[Checkpoint, int | None, Mapping[str, Any]]:
    """Returns a network of `fastsde.networks`, the number of samples, and conditions: its own if none are given."""
    named, device = NETWORKS[name], check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model_kwargs is None:
        n = default_n(named.shape) if n is None else check_int("n", n, 1)
        model_kwargs = named.conditions(n, device)
    return named.load(device), n, model_kwargs


def _usual_n(shape: Sequence[int], conditions: Mapping[str, Any]) -> int:
    """Returns `default_n`, or the batch of the first condition that is a tensor."""
    for kwargs in conditions.values():
        for value in (kwargs or {}).values():
            if isinstance(value, Tensor) and value.ndim:
                return len(value)
    return default_n(shape)


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
    """Yields the result of the reference, then those of all other backends."""
    yardstick = _check(case, truth, None, _REFERENCE, dtype)
    yield yardstick
    for backend in BACKENDS:
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
        drawn = list(case.yardsticks(dtype)) if yardstick is None else [case.draw(backend, dtype, compile)]
    except _UnavailableError as error:
        return Result(*about, "unavailable", reason=str(error))
    except NonFiniteError as error:
        return Result(*about, "fail", reason=str(error))
    except Exception as error:  # the other backends are still to be checked
        # If plain PyTorch fails, the network does not support the dtype.
        return Result(*about, "unavailable" if yardstick is None else "fail", reason=first_line(error))
    limits = (None, None) if yardstick is None else (yardstick.first_step, yardstick.whole)
    first = _largest(_difference(each, truth[0], limits[0], case.sde, case.table.head(1)) for each, _ in drawn)
    whole = _largest(_difference(each, truth[1], limits[1], case.sde, case.table) for _, each in drawn)
    reason = _excess(first, "1 step") or _excess(whole, "all steps")
    verdict = "fail" if reason else "yardstick" if yardstick is None else "pass"
    return Result(*about, verdict, first, whole, reason)


def _difference(
    x: Tensor, truth: Tensor, yardstick: Difference | None, sde: Process, table: StepTable
) -> Difference | None:
    error = x.double() - truth
    if not torch.isfinite(error).all():
        return None
    noise = _NORMAL_ERROR * math.sqrt(sde.prior_std**2 + float(table.d.abs().sum(dim=1).square().sum()))
    constant = noise + _ROUNDOFF * math.sqrt(len(table)) * _rms(truth)
    allowed = None if yardstick is None else 2 * yardstick.rms + constant
    return Difference(float(error.abs().max()), _rms(error), allowed)


def _largest(differences: Iterable[Difference | None]) -> Difference | None:
    """Returns the one with the largest RMS, or None if one is None."""
    found = list(differences)
    return max((each for each in found if each is not None), key=lambda each: each.rms) if all(found) else None


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


# Output -------------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> list[str]:
    """Returns the lines of a table of what ran, and below it why something failed or cannot run here.

    Args:
        results: those of `verify`.
    """
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
    """Returns one line for each reason of a backend, with the dtypes that it applies to if those are not all."""
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
    """Returns device, versions, and how PyTorch runs fp32 products: "ieee", or "ieee, tf32 in convolutions"."""
    cuda = device.type == "cuda"
    # The newer switches, which also reflect the older ones.
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
    """Writes results as JSON, atomically.

    Args:
        path: the file.
        results: those of `verify`.
        about: what else the file says, such as `machine`.
    """
    document = {**about, "results": [asdict(result) for result in results]}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
