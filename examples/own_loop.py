"""The tutorial's loop (swiss roll, 999 steps of Euler-Maruyama) as it is, and run as a table."""

import time

import torch
from torch import nn

import fastsde
from fastsde.compat.tutorial import calc_loss


def generate_samples(score_network, nsamples):
    x = torch.randn((nsamples, 2))
    times = torch.linspace(1, 0, 1000)
    for i in range(len(times) - 1):
        t, dt = times[i], times[i + 1] - times[i]
        beta = 0.1 + (20 - 0.1) * t
        score = score_network(torch.cat((x, t.expand(nsamples, 1)), -1)).detach()
        drift = -0.5 * beta * x - beta * score
        x = x + drift * dt + beta**0.5 * torch.randn_like(x) * torch.abs(dt) ** 0.5
    return x


torch.manual_seed(0)
data = fastsde.data.swiss_roll(4000).x
score_network = nn.Sequential(nn.Linear(3, 64), nn.LogSigmoid(), nn.Linear(64, 64), nn.LogSigmoid(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(score_network.parameters(), lr=3e-3)
for _ in range(400):  # the tutorial trains longer
    optimizer.zero_grad()
    calc_loss(score_network, data[torch.randint(len(data), (256,))]).backward()
    optimizer.step()

fast = fastsde.accelerate(generate_samples)
fast(score_network, 1000)  # the first call traces the loop, and checks the table against it
for name, loop in (("loop", generate_samples), ("table", fast), ("its own draws", fast.with_options(noise="torch"))):
    torch.manual_seed(1)
    started = time.perf_counter()
    x = loop(score_network, 1000)
    print(f"{name:>13}: {time.perf_counter() - started:.3f} s, std {x.std(0).tolist()}, first sample {x[0].tolist()}")
print(fast.explain())
