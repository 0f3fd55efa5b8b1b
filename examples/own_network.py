"""Your own network on images with labels: trained, resumed if it is killed and run again, sampled with guidance."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fastsde
from fastsde.training import TrainConfig, Trainer


class UNet(nn.Module):
    def __init__(self, width=32, classes=10):
        super().__init__()
        self.time, self.label = nn.Linear(64, width), nn.Embedding(classes + 1, width)  # the last one: no label
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, 1, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in (width, 2 * width, 2 * width, width))

    def forward(self, x, t, label):
        angles = t[:, None] * torch.logspace(0, 2.5, 32, device=t.device)
        e = self.time(torch.cat((angles.sin(), angles.cos()), 1)) + self.label(label)
        high = functional.silu(self.norms[0](self.first(x)) + e[:, :, None, None])
        low = functional.silu(self.norms[1](self.down(high)) + e.repeat(1, 2)[:, :, None, None])
        low = functional.silu(self.norms[2](self.deep(low)))
        return self.last(torch.cat((high, functional.silu(self.norms[3](self.up(low)))), 1))


torch.manual_seed(0)
digits = load_digits()
dataset = fastsde.data.Dataset("digits", digits.images[:, None] / 8 - 1, conditions={"label": digits.target})
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
options = {"prediction": "v", "weighting": "target", "condition_dropout": 0.1, "clip_norm": 1.0}
config = TrainConfig("digits", "", steps=steps, batch_size=64, checkpoint_every=100, **options)
checkpoint = Trainer(config, "runs/own", model=UNet(), dataset=dataset, resume=True).train()
sampler = fastsde.Sampler(checkpoint, solver="dpm_solver_pp_2m", steps=25, guidance=2.0)
x = sampler(100, model_kwargs={"label": torch.arange(100) % 10})
fastsde.plotting.save_image(fastsde.plotting.image_grid(x, (-1, 1), 10, scale=4), "own.png")
print(f"own.png: ten samples of each digit after {checkpoint.record['step']} steps")
