"""Half of a digit completed, and a digit drawn from 7 x 7 measured pixels: RePaint, DPS and Pi-GDM."""

import sys

import torch
from torch.nn import functional

import fastsde

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
digit = fastsde.sample("mnist", (1, 1, 28, 28), model_kwargs={"label": torch.tensor([5])}, steps=steps, denoise=True)

# Known pixels: put in after each row, with the noise of its time; each part of the way is gone three times.
mask = torch.zeros(28, 28, dtype=torch.bool)
mask[:, :14] = True
inpaint = fastsde.Sampler("mnist", steps=steps, denoise=True, resamples=3)
completed = inpaint(9, mask=mask, known=digit[0])


# A measurement by any differentiable operator: each row steps towards it.
def operator(x):
    return functional.avg_pool2d(x, 4)


sampler = fastsde.Sampler("mnist", solver="ddpm", steps=steps, denoise=True)
by_dps = sampler(9, measurement=fastsde.DPS(operator, operator(digit), scale=1.0))
by_pigdm = sampler(9, measurement=fastsde.PiGDM(operator, operator(digit), noise_std=0.05))

measured = functional.interpolate(operator(digit), scale_factor=4)
rows = (digit * mask, completed, measured, by_dps, measured, by_pigdm)
fastsde.plotting.save_image(fastsde.plotting.image_grid(torch.cat(rows), columns=10, scale=3), "inpainted.png")
for name, x in (("DPS", by_dps), ("Pi-GDM", by_pigdm)):
    misfit = (operator(x) - operator(digit)).square().mean().sqrt()
    print(f"{name}: 49 measured pixels are met up to {misfit:.3f}")
