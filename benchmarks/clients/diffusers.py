"""diffusers: every scheduler with a step, run as its pipelines run it, and two whole pipelines."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import schedulers
from torch import Tensor, nn

from . import diffusers_loops as loops
from .case import SHAPE, Case, LearnedVariance, Loop, StandIn, fresh

TITLE, PACKAGES = "diffusers", ("diffusers",)

diffusers.utils.logging.set_verbosity_error()

Options = dict[str, Any]

V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KARRAS = {"use_karras_sigmas": True}
THRESHOLD = {"thresholding": True}
LEARNED = {"variance_type": "learned_range"}


def solver(order: int, algorithm: str) -> Options:
    return {"solver_order": order, "algorithm_type": algorithm} | ({} if "++" in algorithm else SIGMA_MIN)


def unipc(order: int, kind: str) -> Options:
    return {"solver_order": order, "solver_type": kind} | (SIGMA_MIN if kind == "bh1" else {})


# The scheduler, its options, and the options of its step.
CASES: list[tuple[str, Options, Options]] = [
    ("DDPM", {}, {}),
    ("DDPM", {"clip_sample": False}, {}),
    ("DDPM", V | ZERO_SNR | {"clip_sample": False}, {}),
    ("DDPM", THRESHOLD, {}),
    ("DDPM", X0 | {"variance_type": "fixed_large"}, {}),
    ("DDPM", LEARNED, {}),
    ("DDIM", {}, {}),
    ("DDIM", V | ZERO_SNR, {}),
    ("DDIM", THRESHOLD, {}),
    ("DDIM", {}, {"eta": 0.7}),
    ("DDIM", {}, {"eta": 0.7, "use_clipped_model_output": True}),
    ("DDIMInverse", {}, {}),
    ("DDIMParallel", {}, {}),
    ("DDPMParallel", {}, {}),
    ("CogVideoXDDIM", {}, {}),
    ("PNDM", {}, {}),
    ("PNDM", {"skip_prk_steps": True}, {}),
    ("PNDM", V, {}),
    ("LMSDiscrete", {}, {}),
    ("LMSDiscrete", V | KARRAS, {}),
    ("EulerDiscrete", {}, {}),
    ("EulerDiscrete", V | ZERO_SNR | {"use_karras_sigmas": False}, {}),
    ("EulerDiscrete", KARRAS, {"s_churn": 4.0}),
    ("EulerAncestralDiscrete", {}, {}),
    ("EulerAncestralDiscrete", V, {}),
    ("HeunDiscrete", {}, {}),
    ("HeunDiscrete", KARRAS | {"clip_sample": True}, {}),
    ("KDPM2Discrete", {}, {}),
    ("KDPM2Discrete", KARRAS, {}),
    ("KDPM2AncestralDiscrete", {}, {}),
    ("DPMSolverSDE", {}, {}),
    *(
        ("DPMSolverMultistep", solver(order, algorithm), {})
        for order in (1, 2, 3)
        for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        if (order, algorithm) != (3, "sde-dpmsolver")  # diffusers has none
    ),
    ("DPMSolverMultistep", {"solver_type": "heun"} | KARRAS, {}),
    ("DPMSolverMultistep", THRESHOLD, {}),
    ("DPMSolverMultistep", V | ZERO_SNR | {"euler_at_final": True}, {}),
    ("DPMSolverMultistep", FLOW, {}),
    ("DPMSolverMultistepInverse", {}, {}),
    ("CosineDPMSolverMultistep", {}, {}),
    *(("DPMSolverSinglestep", {"solver_order": order}, {}) for order in (1, 2, 3)),
    ("DPMSolverSinglestep", solver(2, "sde-dpmsolver++"), {}),
    ("DEISMultistep", {}, {}),
    ("DEISMultistep", {"solver_order": 3}, {}),
    *(("UniPCMultistep", unipc(order, kind), {}) for order in (1, 2, 3) for kind in ("bh1", "bh2")),
    ("UniPCMultistep", V | KARRAS, {}),
    ("UniPCMultistep", FLOW, {}),
    ("SASolver", {}, {}),
    ("SASolver", {"predictor_order": 3, "corrector_order": 4}, {}),
    ("TCD", {}, {}),
    ("TCD", {}, {"eta": 0.0}),
    ("LCM", {}, {}),
    ("LCM", V, {}),
    ("EDMEuler", {}, {}),
    ("EDMEuler", {}, {"s_churn": 4.0}),
    ("EDMDPMSolverMultistep", {}, {}),
    ("EDMDPMSolverMultistep", {"solver_order": 3}, {}),
    ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("FlowMatchEulerDiscrete", {}, {}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True, "shift": 3.0}, {}),
    ("FlowMatchHeunDiscrete", {}, {}),
    ("FlowMatchLCM", {}, {}),
    ("FlowMapEulerDiscrete", {}, {}),
    ("LTXEulerAncestralRF", {}, {}),
    ("IPNDM", {}, {}),
    ("CMStochasticIterative", {}, {}),
    ("UnCLIP", COSINE | {"variance_type": "fixed_small_log"}, {}),
    ("UnCLIP", COSINE | LEARNED, {}),
]


def scheduler_of(name: str, options: Options) -> Any:
    cls = getattr(diffusers, f"{name}Scheduler", None) or getattr(schedulers, f"{name}Scheduler")
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in (loops.LINEAR | options).items() if key in known})


def sampling(scheduler: Any, options: Options) -> loops.Run:
    """Returns the loop that most pipelines have."""

    def loop(net: loops.Network) -> Tensor:
        scheduler.set_timesteps(12)
        x = torch.randn(SHAPE) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(net(scaled, t), t, x, **options).prev_sample
        return x

    return loop


def pipeline(name: str, **options: Any) -> Case:
    """Returns the case of a whole pipeline with a small UNet of its own, from its arguments to its numpy array."""

    def make(dtype: torch.dtype) -> Loop:
        torch.manual_seed(0)
        unet: nn.Module = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
        )
        unet.eval().requires_grad_(False).to(dtype)
        pipe = getattr(diffusers, name)(unet=unet, scheduler=diffusers.DDPMScheduler())
        pipe.set_progress_bar_config(disable=True)

        def loop() -> Any:
            return pipe(batch_size=2, num_inference_steps=10, output_type="np", **options).images

        return Loop(loop, modules=(unet,), until_read=True)

    return Case(f"{name}, whole, up to numpy()", make)


def cases() -> list[Case]:
    def stepped(name: str, options: Options, step: Options) -> Case:
        network = LearnedVariance if options.get("variance_type") == "learned_range" else StandIn
        label = ", ".join(f"{key}={value}" for key, value in (options | step).items())
        return fresh(f"{name} {label}".rstrip(), lambda: sampling(scheduler_of(name, options), step), network)

    return [
        *(stepped(*one) for one in CASES),
        fresh("ScoreSdeVe step_pred", lambda: loops.score_ve(False)),
        fresh("ScoreSdeVe step_correct", lambda: loops.score_ve(True)),
        fresh("ScoreSdeVp", loops.score_vp),
        fresh("KarrasVe", loops.karras_ve),
        fresh("RePaint (mask per element)", loops.repaint),
        fresh("CogVideoXDPM", loops.cogvideox),
        fresh("ConsistencyDecoder", lambda: loops.two_steps("ConsistencyDecoderScheduler")),
        fresh("SCM", lambda: loops.two_steps("SCMScheduler")),
        fresh("DDPMWuerstchen", loops.wuerstchen),
        pipeline("DDPMPipeline"),
        pipeline("DDIMPipeline", eta=0.3),
    ]
