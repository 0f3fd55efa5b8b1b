"""Sampling loops as users write them that no table can follow.

Only the decorators belong to the tests. A line that the refusal may name ends in the comment ``here``.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from cases import MLP, Mixing, refuses
from tqdm import tqdm


@refuses("max|bool|decision|decides")
@torch.no_grad()
def decides_by_the_maximum(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        if x.max() > 1:  # here
            x = x / 2
    return x


@refuses("norm")
@torch.no_grad()
def normalised(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        x = x / x.norm(dim=-1, keepdim=True)  # here
    return x


@refuses("norm", Mixing)
@torch.no_grad()
def langevin_by_norms(score, snr=0.16):
    x = torch.randn(2, 1, 4, 4)
    for t in torch.linspace(1, 0.2, 4):
        grad, noise = score(x, t), torch.randn_like(x)
        grad_norm = torch.norm(grad.reshape(grad.shape[0], -1), dim=-1).mean()  # here
        noise_norm = torch.norm(noise.reshape(noise.shape[0], -1), dim=-1).mean()  # here
        step = (snr * noise_norm / grad_norm) ** 2 * 2
        x = x + step * grad + torch.sqrt(step * 2) * noise
    return x


def _threshold(x0):
    s = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(min=1)  # here
    s = s.view(-1, 1, 1, 1)
    return x0.clamp(-s, s) / s  # here


@refuses("quantile|abs", Mixing)
@torch.no_grad()
def dynamic_thresholding(net):
    x = torch.randn(2, 1, 4, 4)
    for i in reversed(range(6)):
        x0 = _threshold(2 * x - net(x, i))
        x = 0.5 * x + 0.5 * x0
    return x


@refuses("float|mean|item|host|read")
@torch.no_grad()
def float_of_the_mean(model):
    x, scale = torch.randn(3, 2), 1.0
    for i in range(6):
        x = x + 0.2 * scale * model(x, i / 6)
        scale = 1 / (1 + abs(float(x.mean())))  # here
    return x


@refuses("item|host|read")
@torch.no_grad()
def logs_an_item(model):
    x, log = torch.randn(3, 2), []
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        log.append(x[0, 0].item())  # here
    return x, log


@refuses("print|format|repr|str|host|read")
@torch.no_grad()
def prints_the_state(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        print(i, x)  # here
    return x


@refuses("print|format|repr|str|host|read")
@torch.no_grad()
def formats_a_value(model):
    x = torch.randn(3, 2)
    bar = tqdm(range(6), disable=True)
    for i in bar:
        x = x + 0.2 * model(x, i / 6)
        bar.set_description(f"x = {x[0, 0]:.3f}")  # here
    return x


@refuses("numpy|host|read")
@torch.no_grad()
def keeps_numpy_states(model):
    x, states = torch.randn(3, 2), []
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        states.append(x.cpu().numpy())  # here
    return np.stack(states)


@refuses("tolist|host|read")
@torch.no_grad()
def keeps_lists(model):
    x, states = torch.randn(3, 2), []
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        states.append(x.tolist())  # here
    return states


@refuses("rand|uniform")
@torch.no_grad()
def uniform_noise(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6) + 0.1 * (torch.rand(3, 2) - 0.5)  # here
    return x


@refuses("bernoulli|dropout|rand")
@torch.no_grad()
def dropped_out(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * F.dropout(model(x, i / 6), 0.1)  # here
    return x


@refuses("numpy")
@torch.no_grad()
def numpy_noise(model):
    x = torch.randn(3, 2)
    for i in range(6):
        z = torch.from_numpy(np.random.randn(3, 2)).float()  # noqa: NPY002  here
        x = x + 0.2 * model(x, i / 6) + 0.1 * z  # here
    return x


@refuses("random")
@torch.no_grad()
def decides_by_random(model):
    x = torch.randn(3, 2)
    for i in range(6):
        if random.random() < 0.5:  # here
            continue
        x = x + 0.2 * model(x, i / 6)  # here
    return x


@refuses("seed")
@torch.no_grad()
def seeds_itself(model):
    torch.manual_seed(0)  # here
    x = torch.randn(3, 2)  # here
    for i in range(6):
        x = x + 0.2 * model(x, i / 6) + 0.1 * torch.randn(3, 2)
    return x


@refuses("abs|max|bool|decision|decides")
@torch.no_grad()
def adaptive_steps(model, tolerance=0.05):
    x, t, h = torch.randn(3, 2), 1.0, 0.2
    while t > 1e-3:
        f = model(x, t)
        second = model(x + h * f, t - h)
        error = h / 2 * (second - f).abs().max()  # here
        if error < tolerance:  # here
            x, t = x + h / 2 * (f + second), t - h
        h = min(t, h * min(2.0, 0.9 * tolerance / float(error)))  # here
    return x


@refuses("grad")
def classifier_guidance(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x.detach().requires_grad_()  # here
        f = model(x, i / 6)  # here
        (gradient,) = torch.autograd.grad(f.square().sum(), x)  # here
        x = x + 0.2 * f - 0.1 * gradient
    return x.detach()


@refuses("exp", lambda: MLP(out=4))
@torch.no_grad()
def learned_variance(model):
    x = torch.randn(3, 2)
    for i in range(6):
        mean, log_variance = model(x, i / 6).chunk(2, dim=-1)
        x = x + 0.2 * mean + torch.exp(0.5 * log_variance) * torch.randn_like(x)  # here
    return x


@refuses("mul|pow|square|product")
@torch.no_grad()
def squares_the_state(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6) - 0.01 * x * x  # here
    return x


@refuses("div")
@torch.no_grad()
def divides_by_the_output(model):
    x = torch.randn(3, 2)
    for i in range(6):
        f = model(x, i / 6)
        x = 0.9 * x + 0.01 * x / (f + 10)  # here
    return x


@refuses("mul|product")
@torch.no_grad()
def gated_by_the_output(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x.addcmul_(x, model(x, i / 6), value=0.1)  # here
    return x


@refuses("round|int|uint8|copy|to", Mixing)
@torch.no_grad()
def eight_bit_pixels(net):
    x = torch.randn(2, 1, 4, 4)
    for i in range(6):
        x = x + 0.2 * net(x, i / 6)
        x = ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).float() / 127.5 - 1  # here
    return x


@refuses("sort")
@torch.no_grad()
def sorts_the_state(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = (x + 0.2 * model(x, i / 6)).sort(dim=0).values  # here
    return x


@refuses("gt|index|mask|choice|where|bool|comparison|>")
@torch.no_grad()
def masks_by_value(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x, i / 6)
        x[x > 1] = 1.0  # here
    return x
