"""The two functions of the well-known tutorial on score-based generative models, for its own unmodified networks.

Its swiss-roll network is an ``nn.Sequential`` called with ``cat((x, t), -1)``, x ``[B, 2]``; its MNIST network is a
module called as ``network(x [B, 784], t [B, 1])``. With torch's own generator both functions draw in the tutorial's
order and return its numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dynamo import untraced
from ..engines.inspection import device_of, dtype_of
from ..engines.network import Network
from ..models import ConcatTime
from ..models.mlp import is_sequential
from ..objective import Objective
from ..ops import coefficients, dsm_loss, perturb
from ..reference import Model
from ..sampler import sample
from ..sde import VPSDE
from ..solvers import euler_maruyama
from ..subject import TABLE_DEFAULTS
from ..validation import check_int, check_tensor

__all__ = ["adapt", "calc_loss", "generate_samples"]

T_MIN = 1e-4
TIME_POINTS = 1000
_MNIST_DIM = 28 * 28
_OBJECTIVE = Objective(VPSDE(), prediction="score", weighting="sigma2", t_min=T_MIN)
# The tutorial fixes these; use `fastsde.sample` for other values.
_FIXED = ("sde", "solver", "steps", *TABLE_DEFAULTS)
# With torch's generator these would be ignored, or would change the order of the draws.
_CONTRACT_ONLY = ("seed", "first_sample", "keys", "x_init", "max_batch")


def adapt(score_network: nn.Module | Model) -> Model:
    """Adapts the tutorial's network to this package's call: ``model(x, t)`` with x ``[B, d]`` and t ``[B]``.

    Args:
        score_network: an ``nn.Sequential`` of ``cat((x, t), -1)``, or a module called with t ``[B, 1]``.

    Raises:
        TypeError: for what cannot be called.
    """
    if not callable(score_network):
        raise TypeError(f"score_network must be callable, got {type(score_network).__name__}")
    return ConcatTime(score_network) if isinstance(score_network, nn.Sequential) else _TimeColumn(score_network)


class _TimeColumn(nn.Module):
    def __init__(self, score_network: Any) -> None:
        super().__init__()
        self.score_network = score_network
        self.training = getattr(score_network, "training", True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.score_network(x, t[:, None])
        return result


def _data_dim(score_network: nn.Module | Model) -> int:
    if isinstance(score_network, nn.Sequential):
        widths = [layer.out_features for layer in score_network.modules() if isinstance(layer, nn.Linear)]
        if widths:
            return widths[-1]
        raise ValueError("data_dim must be given for a Sequential without Linear layers")
    return _MNIST_DIM


@untraced
def generate_samples(
    score_network: nn.Module | Model,
    nsamples: int,
    *,
    noise: str = "contract",
    data_dim: int | None = None,
    **options: Any,
) -> Tensor:
    """Draws samples as the tutorial does: Euler-Maruyama over 1000 time points from 1 to 0.

    Args:
        score_network: the tutorial's network.
        nsamples: how many samples.
        noise: "contract" for this package's noise, a function of ``seed``; "torch" for torch's generator in the
            tutorial's order: ``randn((nsamples, d))``, then one ``randn_like(x)`` per step after the network's call.
        data_dim: d; by default the width of the last Linear of a Sequential, and 784 for any other network.
        options: more arguments of `fastsde.sample`, such as seed, backend or progress; seed, first_sample, keys, x_init
            and max_batch only with noise="contract".

    Returns:
        The samples ``[nsamples, d]``.

    Raises:
        ValueError, TypeError: as for `fastsde.sample`.
    """
    check_int("nsamples", nsamples, 0)
    for name in _FIXED:
        if name in options:
            raise ValueError(f"{name} is fixed by the tutorial, got {options[name]!r}: use fastsde.sample to set it")
    if noise not in ("contract", "torch"):
        raise ValueError(f"noise must be 'contract' or 'torch', got {noise!r}")
    shape = (nsamples, _data_dim(score_network) if data_dim is None else check_int("data_dim", data_dim, 1))
    model = adapt(score_network)
    if noise == "torch":
        for name in _CONTRACT_ONLY:
            if options.get(name) is not None:
                raise ValueError(f"{name} needs noise='contract': torch's generator draws the whole batch in its order")
        device = options.get("device") or device_of(score_network)
        options["x_init"] = torch.randn(shape, device=device, dtype=dtype_of(score_network))
        options["noise"] = lambda row, x: torch.randn_like(x)
    # The tutorial's own fp32 time points: fp32 and float64 ones differ in their last bit.
    table = euler_maruyama(VPSDE(), torch.linspace(1, 0, TIME_POINTS, dtype=torch.float32, device="cpu"))
    result: Tensor = sample(model, shape, solver=table, **options)
    return result


def calc_loss(score_network: nn.Module | Model, x: Tensor) -> Tensor:
    """Computes the tutorial's loss: denoising score matching, lambda = sigma^2, at one uniform time per sample.

    Draws ``rand((B, 1))`` for the times, then ``randn_like(x)``, from torch's generator.

    Args:
        score_network: the tutorial's network.
        x: data ``[B, d]``.

    Returns:
        The loss, a scalar with a graph to the network's weights.

    Raises:
        ValueError, TypeError: for an x that is not a floating-point tensor ``[B, d]`` with B at least 1, and for a
            network that does not return the shape of x.
    """
    check_tensor("x", x, floating=True)
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"x must have shape [B, d] with B and d at least 1, got {list(x.shape)}")
    model = Network(score_network if is_sequential(score_network) else adapt(score_network))
    t, z = _draw(x)
    table = coefficients(_OBJECTIVE, t) if x.dtype == torch.float32 else _OBJECTIVE.table(t, x.dtype)
    x_in, tau, _ = perturb(x, None, 0, table, z=z)
    return dsm_loss(model(x_in, tau), x, None, 0, table, z=z)


@untraced  # compiled code has a generator of its own
def _draw(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.rand((len(x), 1), dtype=x.dtype, device=x.device) * (1 - T_MIN) + T_MIN
    return t[:, 0], torch.randn_like(x)
