"""The operations of `fastsde.reference`, with their arguments checked and sent to the fastest code that can run them.

For an fp32 state that is a Triton kernel on a CUDA GPU (or on the CPU while Triton's interpreter is on) and a native
one on the CPU; it is the reference everywhere else: without Triton or a compiler, in float64, and where a gradient is
wanted that a kernel does not have. Each is a ``torch.library`` operation, which ``torch.compile`` takes whole.
"""

from __future__ import annotations

from .dispatch import has_kernels, has_native, has_triton, is_plain, multiplies_bf16, native_state
from .mlp import PRECISIONS, launch_mlp_sampler, mlp_limits, mlp_sampler, pack_mlp, unknown_activation
from .step import (
    Stepper,
    check_status,
    counted_step,
    device_table,
    new_status,
    normal,
    sample_keys,
    solver_step,
    step_counter,
)
from .training import data_order, dsm_loss, perturb

__all__ = [
    "PRECISIONS",
    "Stepper",
    "check_status",
    "counted_step",
    "data_order",
    "device_table",
    "dsm_loss",
    "has_kernels",
    "has_native",
    "has_triton",
    "is_plain",
    "launch_mlp_sampler",
    "mlp_limits",
    "mlp_sampler",
    "multiplies_bf16",
    "native_state",
    "new_status",
    "normal",
    "pack_mlp",
    "perturb",
    "sample_keys",
    "solver_step",
    "step_counter",
    "unknown_activation",
]
