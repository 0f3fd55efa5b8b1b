"""Traces a loop, runs the trace, and compares it with the loop itself on the same noises."""

from __future__ import annotations

import math
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastsde.tracing import Replay, TraceError, record
from fastsde.tracing.brownian import linear_brownian
from fastsde.tracing.noises import Given
from fastsde.tracing.traced import Traced

from .case import Case

# What a correct trace may differ by: rounding, also of loops that keep a part of their work in fp32 or bf16.
TOLERANCE64, TOLERANCE32 = 1e-6, 2e-2


@dataclass
class Result:
    """What the check of one case found: the errors of the trace, or why there is none."""

    name: str
    slots: int | None = None
    not_a_table: str | None = None  # why the trace is no `StepTable`
    error64: float | None = None
    error32: float | None = None
    own32: float | None = None  # the loop's own in fp32, against the trace in float64
    refused: str | None = None
    replayed: bool = False  # whether the figures are of ``replay=True``, without which the loop is refused
    failed: str | None = None

    @property
    def is_wrong(self) -> bool:
        if self.error64 is None or self.error32 is None:
            return self.failed is not None
        return not (self.error64 <= TOLERANCE64 and self.error32 <= TOLERANCE32)


def relative_error(got: Any, expected: Any) -> float:
    """Returns the largest difference of any tensor, relative to the largest number in it."""
    errors = []
    for ours, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(theirs, (Tensor, np.ndarray)):
            a, b = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
            errors.append(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst(errors)


def worst(errors: list[float]) -> float:
    """Returns the largest; NaN is worse than any number."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def errors(case: Case, *, double: bool, replay: bool) -> tuple[Traced, float, float]:
    """Traces a case, in float64 or as it is.

    Returns:
        The traced loop, the largest relative error of its rows in PyTorch and of the engine that runs it against the
        loop itself in the same precision, and the loop's own error against these rows in float64.
    """
    dtype = torch.float64 if double else torch.float32
    made = case.make(dtype)
    with linear_brownian():
        program = record(
            made.call,
            *made.args,
            modules=made.modules,
            state=made.state,
            double=double,
            replay=replay,
            until_read=made.until_read,
            **made.kwargs,
        )
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(draw.shape, generator=generator, dtype=torch.float64) for draw in program.draws]
    loop = case.make(dtype)
    with linear_brownian(), Replay(noises, double=double):
        expected = loop()
    traced, ours, exact = Traced(program), case.make(dtype), case.make(torch.float64)
    with torch.no_grad():
        by_rows = program.run(ours.networks, noises, dtype=dtype, state=ours.initial)
        by_engine = traced.run(ours.networks, traced.batch, state=ours.initial, draws=Given(noises), dtype=dtype)
        reference = program.run(exact.networks, noises, dtype=torch.float64, state=exact.initial)
    error = worst([relative_error(by_rows, expected), relative_error(by_engine, expected)])
    return traced, error, relative_error(expected, reference)


def figures(case: Case, *, replay: bool = False) -> Result:
    _, error64, _ = errors(case, double=True, replay=replay)
    traced, error32, own32 = errors(case, double=False, replay=replay)
    return Result(case.name, traced.slots, traced.why_no_table, error64, error32, own32, replayed=replay)


def reason(error: TraceError) -> str:
    """Returns a refusal in one line: the operation, the reason and the line of the loop."""
    return f"{error.operation}: {error.reason} ({error.line})"


def failure(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]} ({last.filename.rpartition('/')[2]}:{last.lineno} in {last.name})"


def check(case: Case) -> Result:
    """Checks a case. A refused loop is tried again with ``replay=True``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return figures(case)
        except TraceError as error:
            refused = reason(error)
        except Exception as error:  # a crash is a result, too: the others must still run
            return Result(case.name, failed=failure(error))
        try:
            result = figures(case, replay=True)
        except TraceError:
            result = Result(case.name)
        except Exception as error:
            result = Result(case.name, failed=f"with replay=True, {failure(error)}")
        result.refused = refused
        return result
