"""Your own process and your own training loop: the package supplies the coefficients of the loss, and the sampler."""

from dataclasses import dataclass

import torch

import fastsde
from fastsde.objective import Objective
from fastsde.sde import Process, as_time


@dataclass(frozen=True)
class Trigonometric(Process):
    name = "trigonometric"  # x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * as_time(t))

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * as_time(t))

    def alpha_dot(self, t):
        return -torch.pi / 2 * self.sigma(t)

    def sigma_dot(self, t):
        return torch.pi / 2 * self.alpha(t)


torch.manual_seed(0)
data, network = fastsde.data.swiss_roll(10_000).x, fastsde.models.MLP()  # or any network(x, t) of your own
objective = Objective(Trigonometric(), prediction="v", weighting="target")
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(1000):
    x, z = data[torch.randint(len(data), (512,))], torch.randn(512, 2)
    tau, u_x, u_z, w_f, w_x, w_z = objective.table(objective.draw(torch.rand(512))).T[:, :, None]
    (w_f * network(u_x * x + u_z * z, tau[:, 0]) + w_x * x + w_z * z).square().mean().backward()
    optimizer.step(), optimizer.zero_grad()
x = fastsde.sample(network, (10_000, 2), sde=objective.sde, prediction="v", solver="heun", steps=49)
fastsde.plotting.scatter(x, data).save("own_process.png")
print(f"own_process.png: std {x.std(0).tolist()}, that of the data {data.std(0).tolist()}")
