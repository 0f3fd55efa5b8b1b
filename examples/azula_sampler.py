"""A sampler of azula, as it is and as a table. Needs azula (pip install "fastsde[azula]")."""

import time

import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VPSchedule
from azula.sample import DDIMSampler
from torch import nn

from fastsde.compat.azula import accelerate


class Backbone(nn.Module):
    """Any network of x and a time; an untrained one here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], -1))


torch.manual_seed(0)
sampler = DDIMSampler(KarrasDenoiser(Backbone(), VPSchedule()), steps=64, silent=True)
fast = accelerate(sampler)  # used as the sampler
x = fast.init((1000, 2))
fast(x)  # traced and checked in the first call
start = time.perf_counter()
ours = fast(x)
middle = time.perf_counter()
theirs = sampler(x)
end = time.perf_counter()
print(f"azula {end - middle:.3f} s, as a table {middle - start:.3f} s, difference {(ours - theirs).abs().max():.1e}")
print("the same seed, the same samples:", torch.equal(fast.sample((1000, 2)), fast.sample((1000, 2))))
print(fast.explain())
