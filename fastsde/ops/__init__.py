"""The operations of `fastsde.reference`, with their arguments checked and sent to the fastest code that can run them.

That is a Triton kernel for an fp32 state on a CUDA GPU (or on the CPU while Triton's interpreter is on), and the
reference everywhere else: without Triton, in float64, and where a gradient is wanted that a kernel does not have.
`perturb` and `dsm_loss` are ``torch.library`` operations to ``torch.compile``, which takes them whole.
"""

from __future__ import annotations

from .dispatch import has_kernels
from .mlp import MAX_MLP_DIM, MAX_MLP_WIDTH, PRECISIONS, launch_mlp_sampler, mlp_sampler, pack_mlp
from .step import (
    check_status,
    counted_step,
    device_table,
    fused_step,
    new_status,
    normal,
    solver_step,
    step_counter,
)
from .training import dsm_loss, perturb

__all__ = [
    "MAX_MLP_DIM",
    "MAX_MLP_WIDTH",
    "PRECISIONS",
    "check_status",
    "counted_step",
    "device_table",
    "dsm_loss",
    "fused_step",
    "has_kernels",
    "launch_mlp_sampler",
    "mlp_sampler",
    "new_status",
    "normal",
    "pack_mlp",
    "perturb",
    "solver_step",
    "step_counter",
]
