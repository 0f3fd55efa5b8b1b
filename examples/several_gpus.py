"""Training and sampling on all GPUs: torchrun --nproc-per-node 4 several_gpus.py; without torchrun, on one device."""

import sys
import time

import fastsde
from fastsde import distributed
from fastsde.training import TrainConfig, Trainer

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
with distributed.process_group() as here:
    rank, world = (here.rank, here.world) if here else (0, 1)
    network = fastsde.models.MLP(hidden=(128, 128, 128), activation="SiLU")  # or your own
    config = TrainConfig("swiss-roll", "", prediction="eps", steps=steps, batch_size=512, lr=3e-3)
    trainer = Trainer(config, "runs/several", model=network, resume=True, device=distributed.device())
    checkpoint = trainer.train()  # each process takes its part of every batch

    sampler = fastsde.Sampler(checkpoint, solver="ddpm", steps=100, device=distributed.device())
    started = time.perf_counter()
    x = distributed.sample(sampler, 20_000, seed=7)  # on the first process; whatever their number
    if rank == 0:
        seconds = time.perf_counter() - started
        print(f"{world} processes, loss {checkpoint.record['loss']:.3f}, {seconds:.2f} s for {len(x):,} samples")
        print("sample 12,345:", *x[12_345].tolist())
        fastsde.plotting.scatter(x).save("several.png")
