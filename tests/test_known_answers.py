"""Solvers compared with diffusers' schedulers and k-diffusion's samplers, with the same network and noise.

The answers below were printed by ``python tests/test_known_answers.py`` with diffusers 0.42.1 and k-diffusion
0.1.1.post1 installed; it runs the same loops as the tests that need those packages. Each is the sum of the sample,
the sum of its absolute values, and its first and last element, in float64. diffusers works in float32 between betas and
sigmas (and some schedulers in their steps); here its modules see a torch and a numpy whose float32 is float64.
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

import pytest
import torch
from torch import Tensor

from fastsde import VPSDE, StepTable, noise, reference, solvers
from fastsde.sde import EDM

STEPS = 12
SDE = VPSDE()
Answer = tuple[float, float, float, float]

# One network, in discrete times as in diffusers and in continuous ones.


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth nonlinear prediction of eps from x ``[B, 3]`` at t ``[B]`` in [0, 1000]."""
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
    "DPM-Solver++ 3M, heun, to the end": (
        partial(solvers.dpm_solver_pp_3m, variant="heun", lower_order_final=False),
        "DPMSolverMultistep",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
    ),
    **{
        f"UniPC {order} {variant}{'' if final else ', to the end'}": (
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
        f"DEIS {order}{'' if final else ', to the end'}": (
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
    """Returns alpha, sigma and the times of "trailing" steps that end at clean data or at the scheduler's last step."""
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
    """Runs the loop of a diffusers pipeline."""
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
    """Returns t for a ratio sigma / alpha, from B(t) = log(1 + sigma^2)."""
    slope, integral = SDE.beta_max - SDE.beta_min, torch.log1p(sigma**2)
    return ((SDE.beta_min**2 + 2 * slope * integral).sqrt() - SDE.beta_min) / slope


def ours_continuous(name: str) -> Tensor:
    schedule = SDE.alpha(TIMES), SDE.sigma(TIMES), TIMES[:-1]
    options = CONTINUOUS[name][1]
    draw, x = draws(), x_init()
    if name.startswith("Heun"):
        names = {"s_tmin": "s_min", "s_tmax": "s_max"}
        table = solvers.edm_stochastic(SDE, TIMES, **{names.get(key, key): value for key, value in options.items()})
        first = draw()  # k-diffusion draws it for every interval
        scale = float(table.n[0, 0])
        if name.endswith("first"):
            start = sigmas()[0]
            gamma = options["s_churn"] / STEPS
            hat = start * (1 + gamma)
            added = options["s_noise"] * (hat**2 - start**2).sqrt() * first
            x = (x / SDE.alpha(1.0) + added) * SDE.alpha(table.time[0]) / scale
            # The scaled prior has the distribution of the prior plus the noise, so that its variance gives the scale.
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
    """Like `sampled`, with the noise of interval k + 1 in row 2 k + 1, if that row has noise."""
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
    "diffusers DDIM": (2.95758320045, 7.81024071326, -0.389713727793, 1.34397445002),
    "diffusers DPM-Solver++ 2M": (2.85948061934, 8.13694879617, -0.48622139754, 1.45223788041),
    "diffusers DPM-Solver++ 2M SDE": (0.424294119752, 3.98927817384, 0.233784445703, -0.506594894708),
    "diffusers DPM-Solver++ 3M": (2.81196479398, 8.1737082006, -0.493245286843, 1.46547940863),
    "diffusers DPM-Solver++ 3M, heun, to the end": (2.83144288855, 8.23082838837, -0.482961385152, 1.46052234026),
    "diffusers UniPC 1 bh1": (2.85293261388, 7.95653986861, -0.450855173116, 1.41351147848),
    "diffusers UniPC 1 bh1, to the end": (2.85293261388, 7.95653986861, -0.450855173116, 1.41351147848),
    "diffusers UniPC 1 bh2": (2.86164459333, 7.84792557241, -0.431594576443, 1.38882297633),
    "diffusers UniPC 1 bh2, to the end": (2.87867865732, 7.94644210865, -0.439133734701, 1.4007847369),
    "diffusers UniPC 2 bh1": (2.90077925372, 8.4701717709, -0.515014833519, 1.49418789444),
    "diffusers UniPC 2 bh1, to the end": (3.15254380086, 18.7321762848, -1.63167183449, 2.6157853624),
    "diffusers UniPC 2 bh2": (2.8610064927, 8.20603283303, -0.487619228383, 1.45764692113),
    "diffusers UniPC 2 bh2, to the end": (2.92943273175, 10.8510497332, -0.7808115082, 1.74900760063),
    "diffusers UniPC 3 bh1": (2.92643282269, 8.49314050224, -0.51019168427, 1.49362196724),
    "diffusers UniPC 3 bh1, to the end": (3.80224693377, 8.67495414975, 0.19371188055, 0.985321508168),
    "diffusers UniPC 3 bh2": (2.8844284608, 8.24835599232, -0.48668605936, 1.46294796435),
    "diffusers UniPC 3 bh2, to the end": (3.76427520049, 8.69937119104, 0.193540429783, 0.985184654261),
    "diffusers DEIS 2": (2.89435360559, 8.15128574438, -0.467048956176, 1.43483756762),
    "diffusers DEIS 2, to the end": (2.9298101166, 8.97485159401, -0.553850217674, 1.52087058279),
    "diffusers DEIS 3": (2.85639740212, 8.16276706382, -0.478068672572, 1.44949997976),
    "diffusers DEIS 3, to the end": (2.98819646779, 9.31484992572, -0.550880398348, 1.54370649062),
    "diffusers LMS 2": (2.90879584073, 8.31028264532, -0.473125977167, 1.43172286166),
    "diffusers LMS 3": (2.9113582852, 8.50094115406, -0.496297714478, 1.46011517814),
    "diffusers LMS 4": (2.9241588558, 8.59173015129, -0.504886815759, 1.47152298517),
    "diffusers Euler ancestral": (-0.0226010132905, 3.38993587738, 0.215905238224, -0.403944203562),
    "k-diffusion Heun": (2.83453914918, 8.23361315661, -0.502219371727, 1.46992949165),
    "k-diffusion Heun, churn": (0.0765241018483, 3.17743363227, -0.030879987346, -0.370577735124),
    "k-diffusion Heun, churn from the first": (-0.0630192415262, 3.27763998126, -1.02520560961e-05, -0.515151451021),
    "k-diffusion LMS": (2.89373254553, 8.56047254011, -0.506205528554, 1.46774989419),
    "k-diffusion Euler ancestral": (-0.0252706403387, 3.39012485843, 0.215393840449, -0.403729304111),
    "k-diffusion Euler ancestral, eta 0.5": (0.860121975004, 4.99641803196, -0.099309040373, -0.325125816846),
    "k-diffusion DPM-Solver++ 2M": (2.83322129353, 8.10202148752, -0.486052488535, 1.44779955607),
    "k-diffusion DPM-Solver++ 3M SDE": (0.939053662057, 4.57193908645, 0.248868467377, -0.693750216549),
    "k-diffusion DPM-Solver++ 3M, of the ODE": (2.80319720599, 8.19213822517, -0.483152582923, 1.45596933028),
}
# fmt: on


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", DISCRETE)
def test_sample_is_the_one_of_diffusers(name: str, prediction: str) -> None:
    assert answer(ours(name, prediction)) == pytest.approx(ANSWERS[f"diffusers {name}"], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sample_is_the_one_of_k_diffusion(name: str) -> None:
    assert answer(ours_continuous(name)) == pytest.approx(ANSWERS[f"k-diffusion {name}"], rel=1e-9, abs=1e-9)


def test_heun_on_the_process_of_edm_is_the_one_of_k_diffusion() -> None:
    # There alpha is 1 and t is sigma, so that Heun's method in t is the same as theirs.
    def model(x: Tensor, t: Tensor) -> Tensor:
        return continuous_network(x / (1 + t**2).sqrt()[:, None], time_of(t))

    table = solvers.heun(EDM(sigma_max=200.0), sigmas(), "eps", euler_final=True)
    x = sampled(model, table, x_init() / SDE.alpha(1.0), draws())
    assert answer(x) == pytest.approx(ANSWERS["k-diffusion Heun"], rel=1e-9, abs=1e-9)


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


def shown(x: Tensor) -> str:
    return f"({', '.join(f'{value:.12g}' for value in answer(x))})"


if __name__ == "__main__":
    for case, (_, *scheduler) in DISCRETE.items():
        print(f'    "diffusers {case}": {shown(diffusers_sample(*scheduler))},')
    for case, sampler in CONTINUOUS.items():
        print(f'    "k-diffusion {case}": {shown(k_diffusion_sample(*sampler))},')
