"""From one digit to another: both are encoded to noise, and the points between their latents decoded."""

import torch

import fastsde
from fastsde.plotting import image_grid, save_image

STEPS = 40


def slerp(a, b, w):
    """Spherical interpolation, which keeps the length that latents have."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


checkpoint = fastsde.checkpoints.load("mnist")
pairs = torch.tensor([3, 8, 4, 9])
options = {"solver": "dpm_solver_pp_2m", "steps": 25, "spacing": "log_snr", "model_kwargs": {"label": pairs}}
x = fastsde.sample(checkpoint, (4, 1, 28, 28), t_end=checkpoint.sde.t_min, seed=1, **options)  # or digits of your own
z = fastsde.encode(checkpoint, x, steps=STEPS)  # without labels: what is between two digits has none
rows = [torch.stack([slerp(z[i], z[i + 1], w) for w in torch.linspace(0, 1, 10)]) for i in (0, 2)]
between = fastsde.decode(checkpoint, torch.cat(rows), steps=STEPS)
save_image(image_grid(between, checkpoint.value_range, 10, scale=3), "interpolation.png")
ends = between[[0, 9, 10, 19]]
print(f"interpolation.png; the ends come back within {(ends - x).square().mean().sqrt():.3f} (root mean square)")
