"""`fastsde.compat.diffusers` against diffusers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import assert_close, library, seeded
from torch import Tensor, nn

import fastsde
from fastsde import TraceError
from fastsde.compat.diffusers import accelerate, sample, table
from fastsde.tracing import Replay, Traced, record

# diffusers itself, with NumPy 2 and PyTorch 2.11.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

diffusers = library("diffusers")
diffusers.utils.logging.set_verbosity_error()

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
UNCLIP = {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SHAPE = (2, 3, 4, 4)
# fp32, and what networks with random weights make of a rounding in some 20 steps.
TOLERANCE = 1e-4


def scheduler_of(name: str, **options: Any) -> Any:
    cls = getattr(diffusers, f"{name}Scheduler")
    known = cls.__init__.__wrapped__.__code__.co_varnames
    return cls(**{key: value for key, value in (LINEAR | options).items() if key in known})


def unet(**options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            **options,
        )
    return net.eval().requires_grad_(False)


def text_unet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        **options,
    )
    return net.eval().requires_grad_(False)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(network: Callable[..., Tensor], scheduler: Any, x: Tensor, steps: int, **options: Any) -> Tensor:
    """Runs a scheduler as its pipelines do."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **options).prev_sample
    return x


def wavy(x: Tensor, t: Tensor) -> Tensor:
    t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x + 0.3 * x.roll(1, -1)) * (0.8 + 0.2 * torch.sin(t)) + 0.1 * torch.cos(0.01 * t)


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("DDPM", {}, {}),
        ("DDPM", {"clip_sample": False} | V | ZERO_SNR, {}),
        ("DDIM", {}, {}),
        ("DDIM", {"prediction_type": "sample"}, {"eta": 0.7}),
        ("DDIM", V, {"eta": 0.7, "use_clipped_model_output": True}),
        ("PNDM", {}, {}),
        ("PNDM", {"skip_prk_steps": True}, {}),
        ("LMSDiscrete", V | KARRAS, {}),
        ("EulerDiscrete", {}, {}),
        ("EulerDiscrete", V | ZERO_SNR, {}),
        ("EulerAncestralDiscrete", V, {}),
        ("HeunDiscrete", KARRAS | {"clip_sample": True}, {}),
        ("KDPM2Discrete", {}, {}),
        ("KDPM2AncestralDiscrete", {}, {}),
        ("DPMSolverMultistep", {}, {}),
        ("DPMSolverMultistep", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, {}),
        ("DPMSolverMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {}),
        ("DPMSolverSinglestep", {"solver_order": 3}, {}),
        ("DEISMultistep", {"solver_order": 3}, {}),
        ("UniPCMultistep", {}, {}),
        ("UniPCMultistep", {"solver_order": 3} | V | KARRAS, {}),
        ("TCD", {}, {}),
        ("LCM", V, {}),
        ("EDMEuler", {}, {}),
        ("EDMDPMSolverMultistep", {"solver_order": 3}, {}),
        ("IPNDM", {}, {}),
        ("CMStochasticIterative", {}, {}),
        ("UnCLIP", UNCLIP, {}),
    ],
)
def test_a_table_returns_the_schedulers_own_numbers(name: str, options: dict[str, Any], step: dict[str, Any]) -> None:
    scheduler = scheduler_of(name, **options)
    generator = torch.Generator().manual_seed(0)

    def loop(network: Callable[..., Tensor]) -> Tensor:
        return sampled(network, scheduler, torch.randn(SHAPE), 12, **step)

    traced = Traced(record(loop, wavy, network="network", double=True))
    zs = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in traced.program.draws]
    with Replay(zs, double=True):
        theirs = loop(wavy)

    def noise(row: int, x: Tensor) -> Tensor:  # the draws that a row uses: a loop may make more
        return sum((w * zs[node.label] for node, w in traced.tabulated.noises[row]), torch.zeros(SHAPE))

    before = repr(vars(scheduler))
    found = table(scheduler, 12, **step)
    assert repr(vars(scheduler)) == before
    run = {"backend": "reference", "dtype": torch.float64, "x_init": zs[0], "noise": noise}
    assert_close(fastsde.sample(wavy, SHAPE, solver=found, **run), theirs, tolerance=1e-9)


def test_a_table_takes_the_options_of_set_timesteps() -> None:
    times = [900, 600, 250, 10]
    found = table(scheduler_of("DDPM"), set_timesteps={"timesteps": times})
    assert found.time.tolist() == times
    options = {"sigmas": np.linspace(1, 0.1, 5), "mu": 0.5}
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = table(shifted, set_timesteps=options)
    shifted.set_timesteps(**options)
    assert torch.equal(found.time.float(), shifted.timesteps)


def test_the_time_of_a_table_of_one_row() -> None:
    assert table(scheduler_of("DDIM", timestep_spacing="trailing"), 1).time.tolist() == [999.0]


@pytest.mark.parametrize("options", [{"thresholding": True}, {"variance_type": "learned_range"}])
def test_schedulers_that_are_no_table(options: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=r"scheduling_ddpm\.py"):
        table(scheduler_of("DDPM", **options), 5)


def test_schedulers_that_are_stepped_otherwise() -> None:
    with pytest.raises(ValueError, match=r"CogVideoXDPMScheduler is stepped with .*fastsde.trace"):
        table(diffusers.CogVideoXDPMScheduler(), 5)
    with pytest.raises(ValueError, match=r"must have set_timesteps and step, got ScoreSdeVeScheduler"):
        table(diffusers.ScoreSdeVeScheduler(), 5)
    with pytest.raises(ValueError, match=r"DDPMScheduler cannot be stepped with these arguments: .*cannot be larger"):
        table(scheduler_of("DDPM"), 5000)


# diffusers' own numbers -----------------------------------------------------------------------------------------------

DPM = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def dummy(x: Tensor, t: Tensor) -> Tensor:
    return x * (t / (t + 1)).to(x.dtype).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "steps", "total", "mean"),
    [
        ("DDPM", {}, 1000, 258.9606, 0.3372),
        pytest.param("DDPM", V, 1000, 202.0296, 0.2631, marks=pytest.mark.slow),
        ("DDIM", {}, 10, 172.0067, 0.223967),
        ("DDIM", V, 10, 52.5302, 0.0684),
        ("DDIM", {"beta_start": 0.01, "set_alpha_to_one": True}, 10, 149.8295, 0.1951),
        ("DDIM", {"beta_start": 0.01, "set_alpha_to_one": False}, 10, 149.0784, 0.1941),
        ("DDIMInverse", {}, 10, 671.6816, 0.8746),
        ("DDIMInverse", V, 10, 1394.2185, 1.8154),
        ("PNDM", {}, 10, 198.1318, 0.2580),
        ("PNDM", V, 10, 67.3986, 0.0878),
        ("DPMSolverMultistep", DPM, 10, None, 0.3301),
        ("DPMSolverMultistep", DPM | V, 10, None, 0.2251),
        ("DPMSolverSinglestep", DPM, 10, None, 0.2791),
        ("DPMSolverSinglestep", DPM | V, 10, None, 0.1453),
        ("DPMSolverSinglestep", DPM | KARRAS, 10, None, 0.2248),
        ("DPMSolverSinglestep", DPM | V | KARRAS, 10, None, 0.0649),
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"}, 10, None, 0.2464),
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"} | V, 10, None, 0.1014),
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"} | KARRAS, 10, None, 0.2925),
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"} | V | KARRAS, 10, None, 0.1966),
        ("DEISMultistep", {}, 10, None, 0.23916),
        ("DEISMultistep", V, 10, None, 0.091),
        ("EDMEuler", {"num_train_timesteps": 256}, 10, 34.1855, 0.044),
        ("LCM", LATENT, 1, 18.7097, 0.0244),
        ("LCM", LATENT, 10, 197.7616, 0.2580),
        pytest.param("UnCLIP", UNCLIP, 1000, 252.2682, 0.3284, marks=pytest.mark.slow),
        ("CMStochasticIterative", {"num_train_timesteps": 201}, 1, 192.7614, 0.2510),
    ],
)
def test_the_numbers_of_diffusers_tests(
    name: str, options: dict[str, Any], steps: int, total: float | None, mean: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    found = fastsde.sample(
        dummy,
        X.shape,
        solver=table(scheduler_of(name, **options), steps),
        x_init=X,
        noise=lambda row, x: torch.randn(x.shape, generator=generator),
        backend="reference",
    ).abs()
    assert total is None or abs(float(found.sum()) - total) < 1e-2
    assert abs(float(found.mean()) - mean) < 1e-3


def loop_of_tests(model: Callable[..., Tensor], scheduler: Any, x: Tensor, generator: Any) -> Tensor:
    """Steps from the scaled input, as some of diffusers' tests do."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(10)
    options = {} if generator is None else {"generator": generator}
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(x, t), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(
    ("name", "options", "has_generator", "total", "mean"),
    [
        ("EulerDiscrete", {}, True, 10.0807, 0.0131),
        ("EulerDiscrete", KARRAS, True, 124.52299499511719, 0.16213932633399963),
        ("EulerAncestralDiscrete", {}, True, 152.3192, 0.1983),
        ("EulerAncestralDiscrete", V, True, 108.4439, 0.1412),
        ("HeunDiscrete", {}, False, 0.1233, 0.0002),
        ("LMSDiscrete", {}, False, 1006.388, 1.31),
        ("KDPM2Discrete", {}, False, 20.4125, 0.0266),
        ("SASolver", {}, True, 337.394287109375, 0.43931546807289124),
    ],
)
def test_the_numbers_of_diffusers_tests_that_step_from_the_scaled_input(
    name: str, options: dict[str, Any], has_generator: bool, total: float, mean: float
) -> None:
    scheduler = scheduler_of(name, num_train_timesteps=1100, **options)
    fast = fastsde.accelerate(loop_of_tests, network="model", state="x", noise="torch")
    generator = torch.Generator().manual_seed(0) if has_generator else None
    found = fast(dummy, scheduler, X, generator).abs()
    assert abs(float(found.sum()) - total) < max(1e-2, 1e-5 * total)
    assert abs(float(found.mean()) - mean) < max(1e-3, 1e-5 * mean)


# Networks -------------------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """Remembers the dtypes of the times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.dtypes.add(t.dtype)
        return (torch.tanh(self.weight * x) * (1 + t.reshape(-1, 1) / 1000),)


def test_sample_gives_integer_times_and_takes_tuples() -> None:
    network = Recorded()
    first = sample(network, scheduler_of("DDIM"), (6, 5), 10, seed=3)
    assert network.dtypes == {torch.int64}
    assert first.shape == (6, 5)
    assert torch.equal(first[2:4], sample(network, scheduler_of("DDIM"), (2, 5), 10, seed=3, first_sample=2))
    exact = sample(network, scheduler_of("DDIM"), (6, 5), 10, seed=3, dtype=torch.float64, backend="reference")
    assert exact.dtype == torch.float64
    assert_close(first.double(), exact)


@pytest.mark.parametrize("guided", [False, True])
def test_sample_with_labels_and_guidance(guided: bool) -> None:
    network, labels, none = unet(num_class_embeds=5), torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long)
    keys = fastsde.noise.sample_keys(4, 3)
    x = fastsde.noise.normal(keys, 0, (3, 8, 8))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        f = network(x, t, class_labels=labels).sample
        if not guided:
            return f
        uncond = network(x, t, class_labels=none).sample
        return uncond + 1.5 * (f - uncond)

    scheduler = scheduler_of("DPMSolverMultistep")
    guidance = {"guidance_scale": 1.5, "uncond_kwargs": {"class_labels": none}} if guided else {}
    with torch.no_grad():
        theirs = sampled(predict, scheduler, x, 10)
    found = sample(network, scheduler, (3, 3, 8, 8), 10, model_kwargs={"class_labels": labels}, seed=4, **guidance)
    assert_close(found, theirs, tolerance=TOLERANCE)


def test_sample_with_added_conditions() -> None:
    network = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )

    def conditions() -> dict[str, Any]:
        added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.full((2, 6), 8.0)}
        return {"encoder_hidden_states": torch.randn(2, 5, 16), "added_cond_kwargs": added}

    cond, uncond = conditions(), conditions()
    scheduler, keys = scheduler_of("EulerDiscrete"), fastsde.noise.sample_keys(0, 2)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without = network(x, t, **uncond).sample
        return without + 3.0 * (network(x, t, **cond).sample - without)

    found = sample(
        network, scheduler, (2, 4, 8, 8), 6, model_kwargs=cond, uncond_kwargs=uncond, guidance_scale=3.0, max_batch=1
    )
    with torch.no_grad():
        theirs = sampled(predict, scheduler, fastsde.noise.normal(keys, 0, (4, 8, 8)), 6)
    assert_close(found, theirs, tolerance=TOLERANCE)


def test_sample_refuses() -> None:
    network, scheduler = Recorded(), scheduler_of("DDIM")
    with pytest.raises(ValueError, match="must be given together"):
        sample(network, scheduler, (2, 5), 5, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"uncond_kwargs must replace model_kwargs \[\], got \['y'\]"):
        sample(network, scheduler, (2, 5), 5, guidance_scale=2.0, uncond_kwargs={"y": X})
    with pytest.raises(TypeError, match="'steps' is no option"):
        sample(network, scheduler, (2, 5), 5, steps=5)


# Pipelines ------------------------------------------------------------------------------------------------------------


def array(images: Any) -> Tensor:
    if isinstance(images, list):
        return torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255
    return torch.as_tensor(images)


@pytest.mark.parametrize(
    ("name", "options"), [("DDPM", {}), pytest.param("DDIM", {}, marks=pytest.mark.slow), ("DDIM", {"eta": 0.5})]
)
def test_a_pipeline_returns_its_own_images(name: str, options: dict[str, Any]) -> None:
    pipeline = quiet(getattr(diffusers, f"{name}Pipeline")(unet=unet(), scheduler=scheduler_of("DDPM")))
    fast = accelerate(pipeline, noise="torch")
    for kind, returns, tolerance in [("np", True, TOLERANCE), ("pt", False, TOLERANCE), ("pil", True, 1.1 / 255)]:
        call = {"batch_size": 3, "num_inference_steps": 10, "output_type": kind, "return_dict": returns, **options}
        theirs, ours = seeded(pipeline, **call), seeded(fast, **call)
        assert type(ours) is type(theirs)
        assert type(ours[0]) is type(theirs[0])
        assert_close(array(ours[0]), array(theirs[0]), tolerance=tolerance)
    assert fast.traced is not None
    assert fast.traced.table is not None
    assert len(fast.traced.table) == 10


def test_generators_of_a_pipeline() -> None:
    pipeline = quiet(diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler_of("DDPM")))
    fast = accelerate(pipeline, noise="torch")
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(2):  # each goes on where it was
        found = fast(generator=ours, **call).images
        assert_close(array(found), array(pipeline(generator=theirs, **call).images), tolerance=TOLERANCE)
    several = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    found = fast(generator=several[0], **call).images
    assert_close(array(found), array(pipeline(generator=several[1], **call).images), tolerance=TOLERANCE)
    with pytest.raises(ValueError, match="generator needs noise='torch'"):
        accelerate(pipeline)(generator=ours, **call)


def test_the_contract_in_a_pipeline() -> None:
    fast = accelerate(quiet(diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler_of("DDPM"))), seed=5)
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    first = fast(**call).images
    assert np.array_equal(first, fast(**call).images)
    other = fast.with_options(seed=6)
    assert not np.allclose(first, other(**call).images)
    assert other.traced is fast.traced
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert np.array_equal(first, again(**call).images)


def test_changes_of_a_pipeline_are_noticed() -> None:
    pipeline = quiet(diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler_of("DDPM")))
    fast = accelerate(pipeline, noise="torch")
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}

    def compare() -> Any:
        before = copy.copy(vars(pipeline.scheduler))
        ours = seeded(fast, **call).images
        assert vars(pipeline.scheduler) == before
        assert_close(array(ours), array(seeded(pipeline, **call).images), tolerance=TOLERANCE)
        return fast.traced

    pipeline(**call)  # sets the scheduler's times
    first = compare()
    assert compare() is first
    fast.scheduler = scheduler_of("DDPM", beta_schedule="squaredcos_cap_v2")
    second = compare()
    pipeline.scheduler.register_to_config(clip_sample_range=0.5)
    third = compare()
    pipeline.unet.conv_in.weight.mul_(1.5)
    compare()
    fast.unet = unet(add_attention=False)
    compare()
    assert len({id(each) for each in (first, second, third)}) == 3


def test_attributes_are_the_pipelines_own() -> None:
    pipeline = diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler_of("DDPM"))
    fast = accelerate(pipeline)
    fast.set_progress_bar_config(disable=True)
    assert pipeline._progress_bar_config == {"disable": True}
    assert fast.unet is pipeline.unet
    assert fast.device == pipeline.device
    assert fast.to(torch.float64) is fast
    assert pipeline.dtype == torch.float64
    assert repr(fast) == "accelerate(DDPMPipeline)"
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast.nothing


def autoencoder() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()


@pytest.mark.parametrize(("channels", "guidance"), [(8, 1.0), (4, 4.0)])
def test_a_dit_pipeline_returns_its_own_images(channels: int, guidance: float) -> None:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=channels,
    )
    pipeline = diffusers.DiTPipeline(
        transformer=transformer.eval().requires_grad_(False), vae=autoencoder(), scheduler=scheduler_of("DDIM")
    )
    fast = accelerate(quiet(pipeline), noise="torch")
    for labels in ([1, 5], [7, 7]):
        for returns in (True, False):
            call = {
                "class_labels": labels,
                "guidance_scale": guidance,
                "num_inference_steps": 5,
                "output_type": "np",
                "return_dict": returns,
            }
            theirs, ours = seeded(pipeline, **call), seeded(fast, **call)
            assert type(ours) is type(theirs)
            assert_close(array(ours[0]), array(theirs[0]), tolerance=TOLERANCE)
    images = seeded(fast, class_labels=[1], num_inference_steps=5).images
    assert images[0].size == (8, 8)


def test_a_class_conditional_pipeline() -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    pipeline = quiet(diffusers.ConsistencyModelPipeline(unet=unet(num_class_embeds=5), scheduler=scheduler))
    fast = accelerate(pipeline, noise="torch")
    for labels in ([1, 2], [3, 4]):
        call = {"batch_size": 2, "class_labels": labels, "num_inference_steps": 4, "output_type": "np"}
        assert_close(array(seeded(fast, **call).images), array(seeded(pipeline, **call).images), tolerance=TOLERANCE)


def latent_pipeline() -> Any:
    return quiet(
        diffusers.StableDiffusionPipeline(
            unet=text_unet(),
            vae=autoencoder(),
            scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def test_a_latent_pipeline_gives_latents() -> None:
    pytest.importorskip("transformers", reason="StableDiffusionPipeline needs transformers")
    pipeline = latent_pipeline()
    fast = accelerate(pipeline, noise="torch")
    for _ in range(2):  # other prompts
        call = {
            "prompt_embeds": torch.randn(2, 5, 16),
            "negative_prompt_embeds": torch.randn(2, 5, 16),
            "num_inference_steps": 5,
            "height": 8,
            "width": 8,
        }
        theirs, ours = (seeded(each, **call, output_type="latent") for each in (pipeline, fast))
        assert type(ours) is type(theirs)
        assert ours.nsfw_content_detected is theirs.nsfw_content_detected
        assert_close(ours.images, theirs.images, tolerance=TOLERANCE)
    with pytest.raises(TraceError, match="only latents come out of a table, not 'pil'"):
        fast(**call)


def test_what_is_no_pipeline_is_refused() -> None:
    pipeline = diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler_of("DDPM"))
    with pytest.raises(TypeError, match="must have a unet or a transformer, got Linear"):
        accelerate(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="modules is found in the pipeline"):
        accelerate(pipeline, modules=[pipeline.unet])
    with pytest.raises(ValueError, match="noise must be"):
        accelerate(pipeline, noise="own")
    pipeline.scheduler = scheduler_of("DDPM", thresholding=True)
    with pytest.raises(TraceError, match=r"scheduling_ddpm\.py"):
        accelerate(pipeline)(num_inference_steps=3)
