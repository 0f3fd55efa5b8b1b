"""EDM's preconditioning of a network, compared with its paper and with the training objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import EDM, VPSDE, checkpoints
from fastsde.models import MLP, Preconditioned
from fastsde.objective import Objective
from fastsde.sde import Process


class Seen(nn.Module):
    """Keeps its arguments."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return torch.tanh(3 * x + t[:, None])


@pytest.mark.parametrize("sde", [VPSDE(), EDM()], ids=["vp", "edm"])
def test_it_is_the_denoiser_that_the_objective_trains(sde: Process) -> None:
    t = torch.tensor([1e-3, 0.05, 0.4, 1.0], dtype=torch.float64)
    x_0, z = torch.randn(2, 4, 3, dtype=torch.float64)
    x_t = sde.alpha(t)[:, None] * x_0 + sde.sigma(t)[:, None] * z
    network = Seen()
    denoised = Preconditioned(network, sde, 0.7)(x_t, t)
    k = [each[:, None] for each in Objective(sde, "x0", "target", "edm", 0.7).coefficients(t, torch.float64)]
    torch.testing.assert_close(network.x, k[1] * x_0 + k[2] * z)
    torch.testing.assert_close(network.t, k[0][:, 0])
    # The paper's weight times its squared error is the objective's loss.
    level = (sde.sigma(t) / sde.alpha(t))[:, None]
    residual = k[3] * torch.tanh(3 * network.x + network.t[:, None]) + k[4] * x_0 + k[5] * z
    weighted = (level**2 + 0.7**2) / (level * 0.7) ** 2 * (denoised - x_0) ** 2
    torch.testing.assert_close(residual**2, weighted, rtol=1e-7, atol=0)


def test_times_stay_in_fp32_for_a_network_in_bf16() -> None:
    network = Seen()
    denoised = Preconditioned(network, VPSDE(), 0.5)(torch.randn(4, 3).bfloat16(), torch.rand(4))
    assert (network.x.dtype, network.t.dtype, denoised.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_checkpoint_has_it(tmp_path: Path) -> None:
    model = Preconditioned(MLP(2, (8,)), VPSDE(), 0.25)
    checkpoints.save(tmp_path / "edm.safetensors", checkpoints.Checkpoint(model, prediction="x0"))
    loaded = checkpoints.load(tmp_path / "edm.safetensors")
    assert loaded.sigma_data == 0.25
    assert loaded.shape == (2,)
    assert isinstance(loaded.network, MLP)
    x, t = torch.randn(5, 2), torch.rand(5)
    assert torch.equal(loaded.model(x, t), model(x, t))
    samples = fastsde.sample(loaded, (3, 2), solver="ddim", steps=4, t_end=0.01)
    expected = fastsde.sample(model, (3, 2), solver="ddim", steps=4, t_end=0.01, prediction="x0", backend="reference")
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)
    plain = checkpoints.Checkpoint(model.network, prediction="x0")
    assert plain.sigma_data is None
