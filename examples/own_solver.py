"""Your own solver: a function that returns a table, which the fused kernels run like their own."""

import torch

import fastsde
from fastsde import StepTable
from fastsde.solvers.times import spaced


def extrapolated(sde, times, prediction):
    """DDIM with a data prediction that is extrapolated linearly in log-SNR from the last two rows."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    step = (alpha / sigma).log().diff()
    ratio = sigma[1:] / sigma[:-1]
    weight = alpha[1:] - alpha[:-1] * ratio  # x' = ratio x + weight D is exact where D is constant
    slope = torch.zeros_like(step)
    slope[1:] = step[1:] / (2 * step[:-1])  # times D - H: half a step ahead; there is no H before the first row
    p, q = 1 / alpha[:-1], {"eps": -sigma, "score": sigma**2}[prediction][:-1] / alpha[:-1]  # D = p x + q f
    return StepTable(time=times[:-1], a=ratio, e=weight * (1 + slope), c=-weight * slope, p=p, q=q)


shipped, t_end = fastsde.checkpoints.load("swiss-roll"), 1e-3
sde, prediction = shipped.sde, shipped.prediction


def draw(solver, steps):
    if solver == "extrapolated":
        solver = extrapolated(sde, spaced("log_snr", sde, steps, 1.0, t_end), prediction)
        return fastsde.sample(shipped, (2000, 2), solver=solver)
    return fastsde.sample(shipped, (2000, 2), solver=solver, steps=steps, t_end=t_end, spacing="log_snr")


exact = draw("rk4", 1000)
for steps in (10, 20, 40, 80):
    errors = {name: (draw(name, steps) - exact).square().mean().sqrt() for name in ("ddim", "heun", "extrapolated")}
    print(f"{steps} steps:", ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
print(fastsde.Sampler(shipped, solver=extrapolated(sde, spaced("log_snr", sde, 10, 1.0, t_end), prediction)))
