"""OpenVINO, on the network as PyTorch traces it, with the options for the lowest latency of a single call.

By default it would compute in bf16 where the CPU can, and it is several times slower in bf16 where the CPU cannot, so
that the precision is always given. Its threads sleep between calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastsde.engines.openvino import is_installed, library
from fastsde.extras import missing

from ..suite.case import UnavailableError

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def engine(
    network: nn.Module, example: tuple[Tensor, Tensor], precision: str
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that runs a network on arrays of the example's shapes."""
    require()
    openvino = library()
    shapes = [tuple(each.shape) for each in example]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trace: a size becomes a constant, which is right for one size
        model = openvino.convert_model(network, example_input=example, input=shapes)
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(state: np.ndarray, time: np.ndarray) -> np.ndarray:
        request.infer([state, time], share_inputs=True, share_outputs=True)
        found: np.ndarray = request.get_output_tensor(0).data
        return found

    return call


def require() -> None:
    """Raises UnavailableError if OpenVINO is not installed."""
    if not is_installed():
        raise UnavailableError(missing("openvino", extra="engines", what="this provider"))
