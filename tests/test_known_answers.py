"""Solvers against other people's: diffusers' schedulers and k-diffusion's samplers, on one network and noise, in float64.

The answers below were printed by ``python tests/test_known_answers.py`` where diffusers 0.42.1 and k-diffusion
0.1.1.post1 are installed; it runs the same loops as the tests that need those packages. Each is the sum of the sample,
the sum of its absolute values, and its first and last element. diffusers works in float32 between betas and sigmas (and
some schedulers in their steps); here its modules see a torch and a numpy whose float32 is float64.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsde import VPSDE, StepTable, noise, reference, solvers

STEPS = 12
SDE = VPSDE()
Answer = tuple[float, float, float, float]

# One network, in discrete times as diffusers has them and in continuous ones.


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth nonlinear eps of x ``[B, 3]`` at t ``[B]`` in [0, 1000]."""
    level = t.reshape(-1, 1) / 1000
    return (1 - torch.exp(-10 * level)).sqrt() * (x + 0.4 * (1 - level) * torch.sin(2 * x + 3 * level))


def continuous_network(x: Tensor, t: Tensor) -> Tensor:
    return network(x, 1000 * t)


def x_init() -> Tensor:
    return torch.linspace(-1.7, 1.9, 15, dtype=torch.float64).reshape(5, 3)


def draws() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(5, 3, generator=generator, dtype=torch.float64)


def answer(x: Tensor) -> Answer:
    return float(x.sum()), float(x.abs().sum()), float(x.flatten()[0]), float(x.flatten()[-1])


def sampled(model: Callable[..., Tensor], table: StepTable, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    keys = noise.sample_keys(0, len(x))
    return reference.sample(
        model, x.shape, table, keys, x_init=x, noise_function=lambda row, x: draw(), dtype=torch.float64
    )


# diffusers -----------------------------------------------------------------------------------------------------------

DISCRETE: dict[str, tuple[Callable[..., StepTable], str, dict[str, Any]]] = {
    "DDIM": (solvers.ddim, "DPMSolverMultistep", {"solver_order": 1}),
    "DPM-Solver++ 2M": (solvers.dpm_solver_pp_2m, "DPMSolverMultistep", {"solver_order": 2}),
    "DPM-Solver++ 2M SDE": (
        partial(solvers.dpm_solver_pp_2m, stochastic=True),
        "DPMSolverMultistep",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "DPM-Solver++ 3M": (solvers.dpm_solver_pp_3m, "DPMSolverMultistep", {"solver_order": 3}),
    "DPM-Solver++ 3M, heun, not lower at the end": (
        partial(solvers.dpm_solver_pp_3m, variant="heun", lower_order_final=False),
        "DPMSolverMultistep",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
    ),
    **{
        f"UniPC {order} {variant}{'' if final else ', not lower at the end'}": (
            partial(solvers.unipc, order=order, variant=variant, lower_order_final=final),
            "UniPCMultistep",
            {
                "solver_order": order,
                "solver_type": variant,
                "lower_order_final": final,
                "final_sigmas_type": "zero" if final and variant == "bh2" else "sigma_min",  # bh1 is NaN at zero
            },
        )
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for final in (True, False)
    },
    **{
        f"DEIS {order}{'' if final else ', not lower at the end'}": (
            partial(solvers.deis, order=order, lower_order_final=final),
            "DEISMultistep",
            {"solver_order": order, "lower_order_final": final},
        )
        for order in (2, 3)
        for final in (True, False)
    },
    **{
        f"LMS {order}": (partial(solvers.adams_bashforth, order=order), "LMSDiscrete", {"order": order})
        for order in (2, 3, 4)
    },
    "Euler ancestral": (solvers.euler_ancestral, "EulerAncestralDiscrete", {}),
}


def discrete_schedule(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and the times of "trailing" steps; at the end clean data, or what the scheduler ends with."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    time = torch.linspace(1000, 0, STEPS + 1, dtype=torch.float64)[:-1].round() - 1
    ends_noisy = name.startswith("DEIS") or (name.startswith("UniPC") and ("bh1" in name or name.endswith("end")))
    last = kept[:1] if ends_noisy else torch.ones(1, dtype=torch.float64)
    kept = torch.cat((kept[time.long()], last))
    return kept.sqrt(), (1 - kept).sqrt(), time


def ours(name: str, prediction: str = "eps") -> Tensor:
    alpha, sigma, time = discrete_schedule(name)
    table = DISCRETE[name][0](alpha, sigma, time, prediction)
    levels = dict(zip(time.tolist(), zip(alpha.tolist(), sigma.tolist(), strict=True), strict=False))

    def model(x: Tensor, t: Tensor) -> Tensor:
        (alpha, sigma), eps = levels[float(t[0])], network(x, t)
        x0 = (x - sigma * eps) / alpha
        return {"eps": eps, "score": -eps / sigma, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]

    return sampled(model, table, x_init(), draws())


class _Float64:
    """A module whose float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def in_float64(module: ModuleType) -> Iterator[None]:
    own = {name: vars(module)[name] for name in ("torch", "np")}
    vars(module).update({name: _Float64(value) for name, value in own.items()})
    try:
        yield
    finally:
        vars(module).update(own)


def diffusers_sample(scheduler_name: str, options: dict[str, Any]) -> Tensor:
    """The loop of a diffusers pipeline."""
    scheduler_class = getattr(importlib.import_module("diffusers"), f"{scheduler_name}Scheduler")
    options, step_options = dict(options), {}
    if "order" in options:
        step_options["order"] = options.pop("order")
    module, draw = sys.modules[scheduler_class.__module__], draws()
    with in_float64(module), contextlib.ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            own = module.randn_tensor
            module.randn_tensor = lambda *arguments, **named: draw()
            stack.callback(setattr, module, "randn_tensor", own)
        scheduler = scheduler_class(beta_schedule="linear", timestep_spacing="trailing", **options)
        scheduler.set_timesteps(STEPS)
        x = x_init()
        if scheduler_name in ("LMSDiscrete", "EulerAncestralDiscrete"):  # whose x is x / alpha
            x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()
        for t in scheduler.timesteps:
            f = network(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t), dtype=torch.float64))
            x = scheduler.step(f, t, x, **step_options).prev_sample
    return x


# k-diffusion ---------------------------------------------------------------------------------------------------------

TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007}
CONTINUOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "Heun": ("sample_heun", {}),
    "Heun, churn": ("sample_heun", CHURN),
    "Heun, churn from the first": ("sample_heun", {**CHURN, "s_tmax": math.inf}),
    "LMS": ("sample_lms", {}),
    "Euler ancestral": ("sample_euler_ancestral", {}),
    "Euler ancestral, eta 0.5": ("sample_euler_ancestral", {"eta": 0.5}),
    "DPM-Solver++ 2M": ("sample_dpmpp_2m", {}),
    "DPM-Solver++ 3M SDE": ("sample_dpmpp_3m_sde", {}),
    "DPM-Solver++ 3M, of the ODE": ("sample_dpmpp_3m_sde", {"eta": 0.0}),
}


def sigmas() -> Tensor:
    return SDE.sigma(TIMES) / SDE.alpha(TIMES)


def time_of(sigma: Tensor) -> Tensor:
    """t of sigma / alpha, of B(t) = log(1 + sigma^2)."""
    slope, integral = SDE.beta_max - SDE.beta_min, torch.log1p(sigma**2)
    return ((SDE.beta_min**2 + 2 * slope * integral).sqrt() - SDE.beta_min) / slope


def ours_continuous(name: str) -> Tensor:
    schedule = SDE.alpha(TIMES), SDE.sigma(TIMES), TIMES[:-1]
    options = CONTINUOUS[name][1]
    draw, x = draws(), x_init()
    if name.startswith("Heun"):
        names = {"s_tmin": "s_min", "s_tmax": "s_max"}
        table = solvers.edm_stochastic(SDE, TIMES, **{names.get(key, key): value for key, value in options.items()})
        first = draw()  # which k-diffusion draws for every interval
        scale = float(table.n[0, 0])
        if name.endswith("first"):
            start = sigmas()[0]
            gamma = options["s_churn"] / STEPS
            hat = start * (1 + gamma)
            added = options["s_noise"] * (hat**2 - start**2).sqrt() * first
            x = (x / SDE.alpha(1.0) + added) * SDE.alpha(table.time[0]) / scale
            # The scaled prior has the distribution of the prior and the noise: its variance tells the scale.
            variance = SDE.alpha(1.0) ** -2 + (options["s_noise"] ** 2) * (hat**2 - start**2)
            assert scale == pytest.approx(float(SDE.alpha(table.time[0]) * variance.sqrt()), rel=1e-12)
        else:
            assert scale == 1
        pending = [draw() for _ in range(STEPS - 1)]
        return sampled_by_interval(table, x, pending)
    if name.startswith("DPM-Solver++ 3M"):
        table = solvers.dpm_solver_pp_3m(
            *schedule, stochastic=name.endswith("SDE"), lower_order_final=False, variant="heun"
        )
    elif name == "DPM-Solver++ 2M":
        table = solvers.dpm_solver_pp_2m(*schedule, lower_order_final=False)
    elif name == "LMS":
        table = solvers.adams_bashforth(*schedule)
    else:
        table = solvers.euler_ancestral(*schedule, **options)
    return sampled(continuous_network, table, x, draw)


def sampled_by_interval(table: StepTable, x: Tensor, pending: list[Tensor]) -> Tensor:
    """As `sampled`, with the noise of interval k + 1 in row 2 k + 1, where that takes any."""
    return reference.sample(
        continuous_network,
        x.shape,
        table,
        noise.sample_keys(0, len(x)),
        x_init=x,
        noise_function=lambda row, x: pending[row // 2],
        dtype=torch.float64,
    )


def k_diffusion_sample(name: str, options: dict[str, Any]) -> Tensor:
    sampling = importlib.import_module("k_diffusion.sampling")
    draw = draws()

    def model(y: Tensor, sigma: Tensor) -> Tensor:
        alpha = (1 / (1 + sigma**2).sqrt()).reshape(-1, 1)
        return y - sigma.reshape(-1, 1) * continuous_network(alpha * y, time_of(sigma))

    options = dict(options)
    if name in ("sample_euler_ancestral", "sample_dpmpp_3m_sde"):
        options["noise_sampler"] = lambda sigma, after: draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: draw())
        return getattr(sampling, name)(model, x_init() / SDE.alpha(1.0), sigmas(), disable=True, **options)


# fmt: off
ANSWERS: dict[str, Answer] = {
    "diffusers DDIM": (2.9575832004490543, 7.810240713256739, -0.3897137277930341, 1.3439744500161777),
    "diffusers DPM-Solver++ 2M": (2.8594806193431994, 8.136948796174757, -0.4862213975401312, 1.4522378804098308),
    "diffusers DPM-Solver++ 2M SDE": (0.42429411975183057, 3.989278173840893, 0.23378444570256013, -0.5065948947080855),
    "diffusers DPM-Solver++ 3M": (2.8119647939810775, 8.173708200604576, -0.49324528684310864, 1.4654794086296048),
    "diffusers DPM-Solver++ 3M, heun, not lower at the end": (2.8314428885495433, 8.230828388374622, -0.4829613851518481, 1.4605223402602383),
    "diffusers UniPC 1 bh1": (2.8529326138780453, 7.956539868611837, -0.45085517311577183, 1.4135114784805964),
    "diffusers UniPC 1 bh1, not lower at the end": (2.8529326138780453, 7.956539868611837, -0.45085517311577183, 1.4135114784805964),
    "diffusers UniPC 1 bh2": (2.861644593330596, 7.847925572411234, -0.4315945764433273, 1.3888229763278293),
    "diffusers UniPC 1 bh2, not lower at the end": (2.8786786573227094, 7.946442108653331, -0.4391337347006718, 1.4007847368964552),
    "diffusers UniPC 2 bh1": (2.9007792537239476, 8.470171770895451, -0.5150148335193601, 1.4941878944384528),
    "diffusers UniPC 2 bh1, not lower at the end": (3.1525438008566726, 18.73217628479594, -1.6316718344890266, 2.615785362400916),
    "diffusers UniPC 2 bh2": (2.8610064926996315, 8.206032833032003, -0.4876192283829123, 1.457646921134438),
    "diffusers UniPC 2 bh2, not lower at the end": (2.92943273175217, 10.851049733151395, -0.780811508200282, 1.7490076006270034),
    "diffusers UniPC 3 bh1": (2.9264328226899696, 8.493140502237333, -0.5101916842701095, 1.4936219672396658),
    "diffusers UniPC 3 bh1, not lower at the end": (3.8022469337695943, 8.674954149747382, 0.1937118805496243, 0.9853215081679809),
    "diffusers UniPC 3 bh2": (2.8844284608033206, 8.248355992320324, -0.486686059360278, 1.4629479643508658),
    "diffusers UniPC 3 bh2, not lower at the end": (3.7642752004912072, 8.699371191044936, 0.19354042978276764, 0.9851846542606277),
    "diffusers DEIS 2": (2.894353605585323, 8.151285744380347, -0.4670489561763691, 1.4348375676248655),
    "diffusers DEIS 2, not lower at the end": (2.929810116598251, 8.974851594012156, -0.5538502176742391, 1.5208705827854834),
    "diffusers DEIS 3": (2.856397402123985, 8.162767063816522, -0.4780686725722919, 1.4494999797569008),
    "diffusers DEIS 3, not lower at the end": (2.9881964677876844, 9.314849925717821, -0.5508803983483547, 1.5437064906186466),
    "diffusers LMS 2": (2.9087958407323447, 8.310282645319566, -0.47312597716682836, 1.4317228616589828),
    "diffusers LMS 3": (2.9113582851966386, 8.500941154061753, -0.4962977144783807, 1.4601151781353563),
    "diffusers LMS 4": (2.9241588557984426, 8.59173015129251, -0.5048868157588857, 1.4715229851697829),
    "diffusers Euler ancestral": (-0.02260101329046542, 3.3899358773811255, 0.21590523822417157, -0.4039442035618918),
    "k-diffusion Heun": (2.83453914918032, 8.233613156610435, -0.5022193717267445, 1.4699294916513006),
    "k-diffusion Heun, churn": (0.07652410184829797, 3.177433632267577, -0.03087998734603887, -0.3705777351236986),
    "k-diffusion Heun, churn from the first": (-0.06301924152619182, 3.277639981261741, -1.0252056096130002e-05, -0.5151514510213644),
    "k-diffusion LMS": (2.893732545529205, 8.560472540112569, -0.5062055285540752, 1.4677498941861453),
    "k-diffusion Euler ancestral": (-0.025270640338696873, 3.390124858434305, 0.21539384044861337, -0.40372930411053487),
    "k-diffusion Euler ancestral, eta 0.5": (0.8601219750036311, 4.996418031963879, -0.09930904037297036, -0.32512581684646163),
    "k-diffusion DPM-Solver++ 2M": (2.833221293532409, 8.102021487522338, -0.4860524885354527, 1.4477995560738637),
    "k-diffusion DPM-Solver++ 3M SDE": (0.9390536620568903, 4.57193908645302, 0.24886846737679755, -0.693750216548789),
    "k-diffusion DPM-Solver++ 3M, of the ODE": (2.803197205990034, 8.19213822516529, -0.48315258292281804, 1.4559693302773185),
}
# fmt: on


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", DISCRETE)
def test_sample_is_the_one_of_diffusers(name: str, prediction: str) -> None:
    assert answer(ours(name, prediction)) == pytest.approx(ANSWERS[f"diffusers {name}"], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sample_is_the_one_of_k_diffusion(name: str) -> None:
    assert answer(ours_continuous(name)) == pytest.approx(ANSWERS[f"k-diffusion {name}"], rel=1e-9, abs=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("name", DISCRETE)
def test_diffusers_gives_the_known_answer(name: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed; its answers are stored above")
    x = diffusers_sample(*DISCRETE[name][1:])
    assert answer(x) == pytest.approx(ANSWERS[f"diffusers {name}"], rel=1e-9, abs=1e-9)
    torch.testing.assert_close(ours(name), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_k_diffusion_gives_the_known_answer(name: str) -> None:
    pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed; its answers are stored above")
    x = k_diffusion_sample(*CONTINUOUS[name])
    assert answer(x) == pytest.approx(ANSWERS[f"k-diffusion {name}"], rel=1e-9, abs=1e-9)
    torch.testing.assert_close(ours_continuous(name), x, rtol=1e-9, atol=1e-9)


if __name__ == "__main__":
    for case, (_, *scheduler) in DISCRETE.items():
        print(f'    "diffusers {case}": {answer(diffusers_sample(*scheduler))},')
    for case, sampler in CONTINUOUS.items():
        print(f'    "k-diffusion {case}": {answer(k_diffusion_sample(*sampler))},')
