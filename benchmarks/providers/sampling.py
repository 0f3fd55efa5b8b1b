"""What people use instead of fastsde to sample, side by side."""

from __future__ import annotations

from functools import partial

from ..suite.case import LEAN, LOOP, Provider
from ..suite.machine import cpu_instructions
from ..tasks.trajectory import Proof, Trajectory
from . import compiled, diffusers, lean, torchsde, tutorial


def precisions(task: Trajectory) -> tuple[str, ...]:
    """Those that the network is run in, first PyTorch's default: TF32 for convolutions on a GPU."""
    if task.device.type == "cuda":
        return ("TF32", "fp32", "bf16") if task.has_images else ("fp32", "bf16")
    has_bf16 = task.has_images and any(name.endswith("bf16") for name in cpu_instructions())
    return ("fp32", "bf16") if has_bf16 else ("fp32",)


def baseline(task: Trajectory) -> str:
    return f"{LOOP}, {precisions(task)[0]}"


def others(task: Trajectory, proof: Proof) -> list[Provider]:
    """The tutorial's loop and whatever else takes the same steps of the SDE; its noise is its own."""
    default, *rest = precisions(task)
    same = [
        (LOOP, tutorial.sampling),
        (LEAN, lean.sampling),
        ("diffusers ScoreSdeVp", diffusers.score_sde_vp),
        ("diffusers DDPM", diffusers.ddpm),
        ("torchsde sdeint", torchsde.sdeint),
    ]
    found = [
        Provider(f"{name}, {default}", partial(make, task, default), proof.other_noise, default) for name, make in same
    ]
    if "fp32" in rest:
        found.append(Provider(f"{LOOP}, fp32", partial(tutorial.sampling, task, "fp32"), proof.other_noise, "fp32"))
    return found + compilations(task, proof)


def compilations(task: Trajectory, proof: Proof) -> list[Provider]:
    """By ``torch.compile``. In full fp32 on a GPU its code, and so perhaps its CUDA graph, would be that of TF32."""
    chosen = [each for each in precisions(task) if each != "fp32" or task.device.type == "cpu" or not task.has_images]
    return [
        Provider(
            f"torch.compile, {precision}",
            partial(compiled.sampling, task, precision),
            proof.other_noise,
            precision,
            compiles=True,
        )
        for precision in chosen
    ]
