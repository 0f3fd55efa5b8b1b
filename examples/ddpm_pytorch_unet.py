"""A diffusion of denoising-diffusion-pytorch, as it is and as a table.

Needs denoising-diffusion-pytorch (pip install "fastsde[denoising-diffusion-pytorch]"). The U-Net is untrained.
"""

import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

from fastsde.compat.denoising_diffusion_pytorch import accelerate

torch.manual_seed(0)
unet = Unet(dim=8, dim_mults=(1, 2), channels=1)
diffusion = GaussianDiffusion(unet, image_size=16, timesteps=200, sampling_timesteps=50)
fast = accelerate(diffusion, noise="torch")  # used as the diffusion; noise="torch" draws as it does
fast.sample(batch_size=4)  # traced and checked in the first call

torch.manual_seed(1)
start = time.perf_counter()
ours = fast.sample(batch_size=4)
middle = time.perf_counter()
torch.manual_seed(1)
theirs = diffusion.sample(batch_size=4)
end = time.perf_counter()
print(f"\nitself {end - middle:.2f} s, as a table {middle - start:.2f} s (the U-Net is nearly all of both)")
print(f"the same seed of PyTorch: difference {(ours - theirs).abs().max():.1e}")
print(fast.sample.explain())
