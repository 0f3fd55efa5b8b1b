"""ONNX Runtime, on the network that PyTorch exports to ONNX.

Its threads would go on spinning after each call, and slow down whatever runs next.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..suite.case import imported


def engine(
    network: nn.Module, example: tuple[Tensor, Tensor], precision: str
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that runs a network on arrays of the example's shapes, in fp32."""
    runtime = imported("onnxruntime", "engines")
    for package in ("onnx", "onnxscript"):  # which the export needs
        imported(package, "engines")
    with torch.no_grad():
        program = torch.onnx.export(network, example, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x, t = (each.name for each in session.get_inputs())

    def call(state: np.ndarray, time: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {x: state, t: time})[0]
        return found

    return call
