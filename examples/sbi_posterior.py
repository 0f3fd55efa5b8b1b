"""A posterior of sbi by score matching, as it is and as a table. Needs sbi (pip install "fastsde[sbi]")."""

import time

import torch
from sbi.inference import NPSE
from sbi.utils import BoxUniform

from fastsde.compat.sbi import accelerate

torch.manual_seed(0)
prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
theta = prior.sample((500,))
x = theta + 0.3 * torch.randn_like(theta)
inference = NPSE(prior, sde_type="vp", show_progress_bars=False)
inference.append_simulations(theta, x).train(max_num_epochs=30)  # a few seconds; a real one trains longer
posterior = inference.build_posterior(sample_with="sde")

fast = accelerate(posterior, noise="torch")  # used as the posterior; noise="torch" draws as it does
options = {"x": torch.tensor([[0.5, -1.0]]), "steps": 100, "show_progress_bars": False}
fast.sample((1000,), **options)  # traced and checked in the first call

torch.manual_seed(1)
start = time.perf_counter()
ours = fast.sample((1000,), **options)
middle = time.perf_counter()
torch.manual_seed(1)
theirs = posterior.sample((1000,), **options)
end = time.perf_counter()
print(f"sbi {end - middle:.3f} s, as a table {middle - start:.3f} s, difference {(ours - theirs).abs().max():.1e}")
print(f"mean {ours.mean(0).tolist()}")
print(fast.explain())
