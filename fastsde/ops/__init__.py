"""The operations of `fastsde.reference`, with their arguments checked, run by the fastest code available.

For an fp32 state that is a Triton kernel on a CUDA GPU (or on the CPU while Triton's interpreter is on) and a native
kernel on the CPU. The reference runs everywhere else: without Triton or a compiler, in float64, and if a gradient is
needed that a kernel does not have. Each kernel is a ``torch.library`` operation, opaque to ``torch.compile``.
"""

from __future__ import annotations

from .dispatch import has_kernels, has_native, has_triton, is_plain, kernel, multiplies_bf16, native_state
from .mlp import launch_mlp_sampler, mlp_limits, pack_program, unknown_instruction
from .objective import coefficients, data_order, dsm_loss, perturb, step_coefficients, training_times
from .step import (
    Stepper,
    check_status,
    counted_step,
    device_table,
    langevin_size,
    new_status,
    normal,
    rescale_factor,
    sample_keys,
    solver_step,
    step_counter,
)

__all__ = [
    "Stepper",
    "check_status",
    "coefficients",
    "counted_step",
    "data_order",
    "device_table",
    "dsm_loss",
    "has_kernels",
    "has_native",
    "has_triton",
    "is_plain",
    "kernel",
    "langevin_size",
    "launch_mlp_sampler",
    "mlp_limits",
    "multiplies_bf16",
    "native_state",
    "new_status",
    "normal",
    "pack_program",
    "perturb",
    "rescale_factor",
    "sample_keys",
    "solver_step",
    "step_coefficients",
    "step_counter",
    "training_times",
    "unknown_instruction",
]
