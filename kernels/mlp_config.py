"""How the kernel ``mlp_sampler`` is compiled and launched."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .mlp_packing import Packed
from .program_analysis import MIN_WIDTH, blocks_of

PRECISIONS = ("fp32", "tf32", "bf16")
_SLOT_0 = (1, *(0,) * 7)  # the kinds of n if slot 0 itself is the network's input
_RESIDENT_BYTES = 88 * 1024  # of shared memory, available on every GPU from sm_80 on


def is_resident(packed: Packed, precision: str) -> bool:
    """Returns whether the weights stay in shared memory from row to row."""
    copies = 2 if precision == "fp32" else 1  # the leading bits and the remainder
    return copies * packed.nbytes <= _RESIDENT_BYTES


def network_constants(packed: Packed, precision: str) -> dict[str, object]:
    """Returns the compile-time constants of a network."""
    return {
        "P": triton.next_power_of_2(triton.cdiv(packed.dim, 4)),
        "D": blocks_of(packed.dim)[1],
        "NAMES": packed.names,
        "CODE": packed.code,
        "RESULT": packed.result,
        "BLOCKS": packed.blocks,
        "ROW_WIDTH": packed.row_width,
        "GIVEN_WIDTH": packed.program.widths[1],
        "RESIDENT": is_resident(packed, precision),
        "PRECISION": precision,
    }


def table_constants(terms: Any) -> dict[str, object]:
    """Returns the compile-time constants of a table, from its `StepTable.trajectory_terms`."""
    return {
        "SLOTS": terms.slots,
        "KINDS": terms.columns,
        "HAS_INPUT": terms.n != _SLOT_0[: terms.slots],
        "HAS_DATA": terms.has_data,
        "HAS_NOISE": terms.has_noise,
    }


def launch_config(
    batch: int, packed: Packed, precision: str, processors: int, capability: int
) -> dict[str, int | bool]:
    """Returns the form and the height of the tiles that a batch is cut into, and their warps.

    Few samples are cut into transposed tiles of 8, for latency; many into tiles as high as the product of a warp group.
    In fp32, whose operands come in two parts, many dimensions and wide layers would spill a hundred registers in those:
    they use transposed tiles for any batch. So do networks that keep more than one value, as for a residual sum.

    Args:
        processors: how many multiprocessors the GPU has.
        capability: 10 times the compute capability.
    """
    few = batch <= 16 * processors
    blocks = packed.most_blocks
    narrow = blocks == 1 and packed.dim <= MIN_WIDTH
    if few and (precision == "fp32" or is_resident(packed, precision)):
        # A warp for each 16 units. Not four warps on sm_100 for narrow networks: those would use the tensor memory, and
        # the way there and back takes longer than so small a product.
        return {
            "M": 8,
            "TRANSPOSED": True,
            "num_warps": min(packed.widest // 16, 2 if narrow and capability >= 100 else 4),
        }
    if precision == "fp32" and not narrow:
        return {"M": 16 if blocks == 1 else 8, "TRANSPOSED": True, "num_warps": 4}
    if blocks > 2 and capability >= 100:  # Triton 3.6 compiles to an empty program if there is too little tensor memory
        return {"M": 16, "TRANSPOSED": True, "num_warps": 4}
    if not packed.is_chain and capability < 100:  # in other tiles registers spill
        if precision == "fp32":
            return {"M": 32 if is_resident(packed, precision) else 16, "TRANSPOSED": True, "num_warps": 4}
        if capability < 90 or blocks > 1:
            return {"M": 32, "TRANSPOSED": True, "num_warps": 4}
    if capability < 90 and precision == "fp32":  # in larger tiles more registers spill
        return {"M": 32, "TRANSPOSED": False, "num_warps": 2}
    # From sm_100 on the accumulator of a product is in tensor memory, so that more warps can share the rest of a tile.
    warps = 8 if packed.dim > MIN_WIDTH or capability >= 100 else 4
    return {"M": 64, "TRANSPOSED": False, "num_warps": warps}


def device_config(batch: int, packed: Packed, precision: str, device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return launch_config(batch, packed, precision, 1, 90)
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    return launch_config(batch, packed, precision, properties.multi_processor_count, capability)
