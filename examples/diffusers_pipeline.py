"""diffusers' own pipeline, run as a table: the same call, and the same images under the same generator.

The U-Net is small and its weights are random. In practice: ``pipeline = DDPMPipeline.from_pretrained(...)``.
"""

import time

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from fastsde.compat.diffusers import accelerate, sample, table

torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
unet = UNet2DModel(16, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=8, **blocks).eval()
pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
pipeline.set_progress_bar_config(disable=True)
call = {"batch_size": 4, "num_inference_steps": 50, "output_type": "np"}

fast = accelerate(pipeline, noise="torch")  # the pipeline's own draws
fast(**call)  # traced and checked in the first call
images = []
for name, run in (("diffusers", pipeline), ("as a table", fast)):
    started = time.perf_counter()
    images.append(run(generator=torch.Generator().manual_seed(1), **call).images)
    print(f"{name}: {time.perf_counter() - started:.3f} s")
print(f"largest difference: {abs(images[0] - images[1]).max():.1e}")
print(fast.traced.explain())

# The package's noise: image i is the same in any batch and on any device.
four, two = (accelerate(pipeline, seed=7)(**{**call, "batch_size": n}).images for n in (4, 2))
print(f"two of four images: difference {abs(four[:2] - two).max():.1e}")

# Without a pipeline: a scheduler as a table, and samples from a network and a scheduler.
print(table(DDIMScheduler(), 20, eta=0.5))
x = sample(unet, DPMSolverMultistepScheduler(), (4, 3, 16, 16), 20, seed=7)
print("samples", list(x.shape))
