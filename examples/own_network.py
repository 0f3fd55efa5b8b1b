"""Your own network on images with labels: trained, resumed if it is killed and run again, sampled with guidance."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate, silu

import fastsde
from fastsde.training import TrainConfig, Trainer


class UNet(nn.Module):
    def __init__(self, width=32, classes=10):
        super().__init__()
        self.time, self.label = nn.Linear(64, width), nn.Embedding(classes + 1, width)  # the last one: no label
        self.first, self.last = nn.Conv2d(1, width, 3, 1, 1), nn.Conv2d(3 * width, 1, 3, 1, 1)
        self.down, self.deep = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in (width, 2 * width, 2 * width))

    def forward(self, x, t, label):
        angles = t[:, None] * torch.logspace(0, 2.5, 32, device=t.device)
        e = self.time(torch.cat((angles.sin(), angles.cos()), 1)) + self.label(label)
        high = silu(self.norms[0](self.first(x)) + e[:, :, None, None])
        low = silu(self.norms[1](self.down(high)) + e.repeat(1, 2)[:, :, None, None])
        return self.last(torch.cat((high, interpolate(silu(self.norms[2](self.deep(low))), scale_factor=2)), 1))


torch.manual_seed(0)
digits, steps = load_digits(), int(sys.argv[1]) if len(sys.argv) > 1 else 3000
data = fastsde.data.Dataset("digits", digits.images[:, None] / 8 - 1, conditions={"label": digits.target})
options = {"prediction": "v", "weighting": "target", "condition_dropout": 0.1, "clip_norm": 1.0}
config = TrainConfig("digits", "", steps=steps, batch_size=64, checkpoint_every=100, **options)
checkpoint = Trainer(config, "runs/own", model=UNet(), dataset=data, resume=True).train()
x = fastsde.Sampler(checkpoint, solver="dpm_solver_pp_2m", steps=25, guidance=2.0)(
    100, model_kwargs={"label": torch.arange(100) % 10}
)
fastsde.plotting.save_image(fastsde.plotting.image_grid(x, (-1, 1), 10, scale=4), "own.png")
print(f"own.png: ten samples of each digit after {checkpoint.record['step']} steps")
