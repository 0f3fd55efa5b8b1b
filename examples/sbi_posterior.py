"""A posterior of sbi by score matching, as it is and as a table. Needs sbi (pip install "fastsde[sbi]")."""

import sys
import time

import torch
from sbi.inference import NPSE
from sbi.utils import BoxUniform

from fastsde.compat.sbi import accelerate

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
torch.manual_seed(0)
prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
theta = prior.sample((2000,))
x = theta + 0.3 * torch.randn_like(theta)  # the posterior is N(x, 0.3^2), inside of the prior
inference = NPSE(prior, sde_type="vp", show_progress_bars=False)
inference.append_simulations(theta, x).train(max_num_epochs=epochs)
posterior = inference.build_posterior(sample_with="sde")

fast = accelerate(posterior)  # used as the posterior; with noise="torch" it makes sbi's own draws
options = {"x": torch.tensor([[0.5, -1.0]]), "steps": 100, "show_progress_bars": False}
fast.sample((1000,), **options)  # traced and checked in the first call
for name, each in (("sbi", posterior), ("as a table", fast)):
    torch.manual_seed(1)
    started = time.perf_counter()
    found = each.sample((1000,), **options)
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.2f} s, mean {found.mean(0).tolist()}, std {found.std(0).tolist()}")
print(fast.explain())
