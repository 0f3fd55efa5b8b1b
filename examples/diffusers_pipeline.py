"""diffusers' own pipeline, run as a table: the same call, and the same images under the same seed.

The U-Net is small and its weights are random. In practice: ``pipeline = DDPMPipeline.from_pretrained(...)``.
"""

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from fastsde.compat.diffusers import accelerate, sample, table

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16,
    layers_per_block=1,
    block_out_channels=(16, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
pipeline = DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler())
pipeline.set_progress_bar_config(disable=True)
call = {"batch_size": 4, "num_inference_steps": 20, "output_type": "np"}

fast = accelerate(pipeline, noise="torch")  # the pipeline's own draws
theirs = pipeline(generator=torch.Generator().manual_seed(1), **call).images
ours = fast(generator=torch.Generator().manual_seed(1), **call).images
print(f"largest difference: {abs(ours - theirs).max():.1e}")
print("\n".join(fast.traced.explain().splitlines()[:9]))

fast = accelerate(pipeline, seed=7)  # the package's noise: sample i is the same in any batch and on any device
print(fast(batch_size=2, num_inference_steps=20).images)

# Without a pipeline: a scheduler as a table, and samples from a network and a scheduler.
print(table(DDIMScheduler(), 20, eta=0.5))
print(sample(unet, DDIMScheduler(), (4, 3, 16, 16), 20, seed=7).shape)
