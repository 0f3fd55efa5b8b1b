"""Digits along the probability flow: the label that makes each most likely, and the way from one to another."""

import sys

import torch

import fastsde
from fastsde.plotting import image_grid, save_image


def slerp(a, b, w):
    """Spherical interpolation, which keeps the length that latents have."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40  # calls of the network; log_prob takes 100 by default
mnist, labels = fastsde.checkpoints.load("mnist"), torch.tensor([3, 8, 4, 9])
options = {"solver": "dpm_solver_pp_2m", "steps": 25, "spacing": "log_snr", "t_end": mnist.sde.t_min}
x = fastsde.sample(mnist, (4, 1, 28, 28), model_kwargs={"label": labels}, seed=1, **options)  # or digits of your own

# log p(x | label) of each digit under each of the ten labels, in nats; with the same random probes under all of them.
keys = fastsde.noise.sample_keys(seed=0, n=len(x)).repeat_interleave(10, 0)
under = {"label": torch.arange(10).repeat(len(x))}
log_p = fastsde.log_prob(mnist, x.repeat_interleave(10, 0), keys=keys, model_kwargs=under, steps=steps, probes=4)
for label, row in zip(labels, log_p.reshape(-1, 10), strict=True):
    print(f"drawn as {label}, most likely a {row.argmax()}:", *(f"{each:.0f}" for each in row - row.max()))

# Encoded to noise without labels, since what is between two digits has none; and decoded from between.
z = fastsde.encode(mnist, x, steps=steps)
rows = [torch.stack([slerp(z[i], z[i + 1], w) for w in torch.linspace(0, 1, 10)]) for i in (0, 2)]
between = fastsde.decode(mnist, torch.cat(rows), steps=steps)
save_image(image_grid(between, mnist.value_range, 10, scale=3), "interpolation.png")
ends = between[[0, 9, 10, 19]]
print(f"interpolation.png; the ends come back within {(ends - x).square().mean().sqrt():.3f} (root mean square)")
