"""A predictor-corrector sampler of score_sde as a table, with this package's process; the network is exact."""

import time

import torch
from torch import nn

import fastsde
from fastsde.compat.score_sde import Discretized, get_pc_sampler

MEAN, STD = 0.5, 0.1
process = fastsde.VPSDE()


class Network(nn.Module):
    """Predicts the noise of images whose pixels are normal, from x and 999 t, as the repository's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (f(labels / 999)[:, None, None, None] for f in (process.alpha, process.sigma))
        return self.scale * sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)


network = Network()
for predictor, corrector in (("euler_maruyama", "none"), ("reverse_diffusion", "ald"), ("ancestral_sampling", "none")):
    sampler = get_pc_sampler(Discretized(process, 500), (64, 1, 8, 8), predictor, corrector, seed=0)
    sampler(network)  # traced and checked in the first call
    start = time.perf_counter()
    x, _ = sampler(network)
    seconds = time.perf_counter() - start
    print(f"{predictor}, {corrector}: {seconds:.3f} s, mean {x.mean():.3f} ({MEAN}), std {x.std():.3f} ({STD})")
print(sampler.loop.explain())
