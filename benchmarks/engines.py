"""The engines beside what people use instead: ``python -m fastsde.benchmarks.engines --out FILE``, on a GPU.

Whole trajectories of the shipped networks, and training steps by the tutorial's recipe. Every provider first proves, in
the same run, that it computes the right thing; what does not, or cannot run, is listed with the reason and has no time.
The others are timed in interleaved rounds, the tutorial's loop twice, and held against the targets of the project.

"TF32" is PyTorch's default for fp32 convolutions on a GPU, "fp32" full precision, "bf16" a network in bf16 and a state
in fp32. The networks run by ``torch.compile`` have ``mode="max-autotune"`` with CUDA graphs, but convolutions from
ATEN alone: Inductor's own templates gave wrong 3x3 results in PyTorch 2.11.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastsde
from fastsde import checkpoints, data, noise, solvers
from fastsde.compat.tutorial import calc_loss
from fastsde.distributed import Ranks
from fastsde.engines.training import CapturedSteps, EagerSteps, NativeSteps, Work, can_capture, can_run_natively
from fastsde.reference import load_batch
from fastsde.training import TrainConfig, Trainer, tutorial_config

from .measure import (
    LOOP,
    Case,
    Figures,
    Run,
    Score,
    UnavailableError,
    check,
    check_roll,
    fp32_products,
    matmul_rates,
    moments_apart,
    settings,
    tutorial_loop,
)
from .run import run_subjects

SEED = 1
SPENT = "left out, since no target needs it and the time is spent: see --minutes"
UNET_FLOP = 111.4e6  # an image: 93.2e6 without what the convolutions multiply with padding
IMAGE_STEP_FLOP = 3 * UNET_FLOP  # an image, of training


@dataclass(frozen=True)
class Sizes:
    """How much is run, and for how long."""

    quick: bool
    rounds: int
    ends: float  # when what no target needs is to be left out, on the clock of time.monotonic
    rates: dict[str, float]  # FLOP/s of matrix products

    @property
    def rows(self) -> int:
        return 4 if self.quick else 999

    def has_time(self, reserve: float) -> bool:
        """Whether more may be compiled where the rest of the run takes ``reserve`` seconds."""
        return self.quick or time.monotonic() + reserve < self.ends


# Sampling: what runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A shipped network and a batch, and the ways to run its trajectory."""

    checkpoint: checkpoints.Checkpoint
    n: int
    rows: int
    device: torch.device
    kind: Any  # the fp32 products that the network consists of

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.checkpoint.shape)

    @property
    def options(self) -> dict[str, Any]:
        return {"prediction": self.checkpoint.prediction, "sde": self.checkpoint.sde, "steps": self.rows}

    def within(self, precision: str) -> AbstractContextManager[None]:
        return fp32_products(self.kind, "tf32" if precision == "TF32" else "ieee")

    def sampler(self, backend: str, precision: str, compile: bool = False, anew: bool = False) -> Run:
        """fastsde: a sampler, or ``anew`` by `fastsde.sample`, which makes one in each call."""
        model = copy.deepcopy(self.checkpoint.model)  # of its own, since of a network few captures are kept
        options = {**self.options, "backend": backend, "dtype": _dtype(precision), "compile": compile}
        try:
            sampler = fastsde.Sampler(model, self.checkpoint.shape, **options)
        except ValueError as error:
            raise UnavailableError(str(error)) from error

        def run() -> Tensor:
            with self.within(precision):
                if anew:
                    return fastsde.sample(model, self.shape, seed=SEED, **options)
                return sampler(self.n, seed=SEED)

        return run

    def reference(self, n: int, precision: str, **options: Any) -> Tensor:
        """Plain PyTorch, with this package's noise."""
        options = {"dtype": _dtype(precision), **self.options, **options}
        with self.within(precision):
            shape = (n, *self.checkpoint.shape)
            x: Tensor = fastsde.sample(self.checkpoint.model, shape, backend="reference", **options)
        return x

    def loop(self, precision: str, network: Callable[..., Tensor] | None = None) -> Run:
        """The tutorial's loop, on the network as it is or another form of it."""
        model = self.checkpoint.model if network is None else network
        score = Score(model, self.checkpoint.sde, self.checkpoint.prediction, self.rows)

        def run() -> Tensor:
            with self.within(precision):
                return tutorial_loop(score, self.shape, self.rows, self.device)

        return run

    def compiled_loop(self, precision: str) -> Run:
        """The tutorial's loop on a network that ``torch.compile`` has made as fast as it can."""
        if self.device.type != "cuda":
            raise UnavailableError("torch.compile makes CUDA graphs on a GPU alone")
        dtype = _dtype(precision) or torch.float32
        layers = copy.deepcopy(self.checkpoint.model).to(dtype=dtype, memory_format=torch.channels_last)

        def network(x: Tensor, t: Tensor) -> Tensor:
            f: Tensor = layers(x.to(dtype, memory_format=torch.channels_last), t.to(dtype))
            return f.float()

        options = {**torch._inductor.list_mode_options("max-autotune"), "max_autotune_conv_backends": "ATEN"}
        compiled = torch.compile(network, dynamic=False, options=options)
        with self.within(precision):
            _prove_network(compiled, network, self)
        return self.loop(precision, compiled)


def _dtype(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision == "bf16" else None


@torch.no_grad()
def _prove_network(compiled: Callable[..., Tensor], plain: Callable[..., Tensor], subject: Subject) -> None:
    """One call beside float64, at most twice as far off as plain PyTorch: a loop shows gross errors alone."""
    x, t = torch.randn(subject.shape, device=subject.device), torch.rand(1, device=subject.device).expand(subject.n)
    truth = copy.deepcopy(subject.checkpoint.model).double()(x.double(), t.double())
    own = float((plain(x, t) - truth).square().mean().sqrt())
    for _ in range(3):  # the first calls warm up and capture
        error = float((compiled(x, t) - truth).square().mean().sqrt())
    check("the compiled network", error, 2 * own + 1e-6)


# Sampling: what it is checked against -------------------------------------------------------------------------------


class Proof:
    """Digits beside the reference's.

    With the same noise, samples spread over the batch come as near to those in float64 as the rule of
    `fastsde.verify` asks, in the median: one trajectory in some is chaotic, and its samples say nothing. With any
    noise, the pixels have the means and the variances of the reference's.
    """

    def __init__(self, subject: Subject, many: int) -> None:
        self._subject, self._many = subject, many
        self._index = torch.linspace(0, subject.n - 1, min(subject.n, 20)).long().to(subject.device)
        self._keys = noise.sample_keys(SEED, subject.n, device=subject.device)[self._index]
        self._truth = subject.reference(len(self._keys), "fp32", keys=self._keys, dtype=torch.float64)
        self._expected = subject.reference(max(many, subject.n), "TF32", seed=SEED)
        table = solvers.build("euler_maruyama", subject.checkpoint.sde, subject.rows)
        noises = 4e-6 * math.sqrt(1 + float(table.d.square().sum()))
        self._constant = noises + 2.0**-24 * math.sqrt(len(table)) * float(self._truth.square().mean().sqrt())
        self._own = cache(self._error_of_reference)

    def _error(self, x: Tensor) -> float:
        return float((x - self._truth).square().flatten(1).mean(1).sqrt().median())

    def _error_of_reference(self, precision: str) -> float:
        return self._error(self._subject.reference(len(self._keys), precision, keys=self._keys))

    def same_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        error, allowed = self._error(x[self._index]), 2 * self._own(precision) + self._constant
        check("a trajectory", error, allowed)
        return {"error": error, "allowed": allowed, **self._distribution(x)}

    def other_noise(self, run: Run, x: Tensor) -> Figures:
        more = (run() for _ in range(-(-self._many // len(x)) - 1))
        return self._distribution(torch.cat((x, *more)))

    def _distribution(self, x: Tensor) -> Figures:
        apart = moments_apart(x, self._expected)
        check("the distribution of the pixels", apart, 2.0)
        return {"moments_apart": apart}


# Sampling: the subjects ---------------------------------------------------------------------------------------------


def digits(name: str, n: int, reserve: float, needed: Sequence[str], device: torch.device, sizes: Sizes) -> Case:
    """``n`` digits by the U-Net.

    Args:
        reserve: seconds that the run takes after what is compiled here without a target's need.
        needed: the precisions in which it is compiled in any case.
    """
    subject = Subject(checkpoints.load("mnist", device), n, sizes.rows, device, torch.backends.cudnn.conv)
    case = Case(device, subject=name, n=n, rows=sizes.rows)
    proof = Proof(subject, many=8 if sizes.quick else 100)
    for precision in ("TF32", "fp32", "bf16"):
        for backend in ("eager", "graph"):
            make = partial(subject.sampler, backend, precision)
            case.add(f"fastsde {backend}, {precision}", make, partial(proof.same_noise, precision))
    make = partial(subject.sampler, "graph", "TF32", anew=True)
    case.add("fastsde.sample() anew, graph, TF32", make, partial(proof.same_noise, "TF32"))
    for precision in ("TF32", "fp32"):
        case.add(f"{LOOP}, {precision}", partial(subject.loop, precision), proof.other_noise)
    case.add_again(f"{LOOP}, TF32")
    _add_compiled(case, subject, proof, needed, lambda: sizes.has_time(reserve))
    case.time(sizes.rounds, enough=4)
    for precision, rate in sizes.rates.items():
        seconds = UNET_FLOP * n * sizes.rows / rate
        case.limit(f"111.4 MFLOP x {n} x {sizes.rows} at {rate / 1e12:.3g} TFLOP/s of {precision} products", seconds)
    case.limit("11 kernels or more a row, of 2.5 us or more each", 11 * sizes.rows * 2.5e-6)
    if not sizes.quick:
        _digits_targets(case, n)
    return case


def _add_compiled(
    case: Case, subject: Subject, proof: Proof, needed: Sequence[str], has_time: Callable[[], bool]
) -> None:
    """What ``torch.compile`` makes, which may take a minute each: first the precisions that are needed."""
    for precision in sorted(("TF32", "bf16", "fp32"), key=lambda each: each not in needed):
        providers: dict[str, tuple[Callable[[], Run], Callable[[Run, Any], Figures]]] = {
            f"fastsde graph compiled, {precision}": (
                partial(subject.sampler, "graph", precision, compile=True),
                partial(proof.same_noise, precision),
            )
        }
        if precision != "fp32":  # whose code, and so perhaps its CUDA graph, would be that of TF32
            make = partial(subject.compiled_loop, precision)
            providers[f"torch.compile in the loop, {precision}"] = make, proof.other_noise
        for name, (make, prove) in providers.items():
            if precision in needed or has_time():
                case.add(name, make, prove)
            else:
                case.leave_out(name, SPENT)


def _digits_targets(case: Case, n: int) -> None:
    loop = case.fastest(f"{LOOP}, TF32", f"{LOOP}, TF32, again")
    for precision in ("TF32", "bf16") if n == 20 else ("bf16",):
        ours = case.fastest(f"fastsde graph, {precision}", f"fastsde graph compiled, {precision}")
        case.at_most(f"graph in {precision}", ours, 0.045 if n == 20 else 0.42)
        case.at_least(f"graph in {precision}, {LOOP} in TF32", loop, ours, 8 if n == 20 else 5)
        if n != 20:
            compiled = case.fastest(f"torch.compile in the loop, {precision}")
            case.at_least(f"graph in {precision}, torch.compile in {precision}", compiled, ours, 1.3)


def roll(name: str, n: int, device: torch.device, sizes: Sizes) -> Case:
    """``n`` points of the swiss roll by the MLP. There is no target: the persistent engine has its own benchmark."""
    rows = 100 if sizes.quick else sizes.rows  # with fewer the distribution is not that of the roll
    subject = Subject(checkpoints.load("swiss-roll", device), n, rows, device, torch.backends.cuda.matmul)
    case = Case(device, subject=name, n=n, rows=rows)
    expected = subject.reference(n, "fp32", seed=SEED)

    def prove(exact: bool, same_noise: bool, run: Run, x: Tensor) -> Figures:
        return check_roll("a trajectory", x, expected, exact, same_noise)

    ways = [("eager", "fp32"), *((backend, p) for backend in ("graph", "persistent") for p in ("fp32", "bf16"))]
    for backend, precision in (*ways, ("persistent", "TF32")):
        make = partial(subject.sampler, backend, precision)
        case.add(f"fastsde {backend}, {precision}", make, partial(prove, precision == "fp32", True))
    for backend in ("graph", "persistent"):
        make = partial(subject.sampler, backend, "fp32", anew=True)
        case.add(f"fastsde.sample() anew, {backend}, fp32", make, partial(prove, True, True))
    if sizes.has_time(60):
        make = partial(subject.sampler, "graph", "fp32", compile=True)
        case.add("fastsde graph compiled, fp32", make, partial(prove, True, True))
    else:
        case.leave_out("fastsde graph compiled, fp32", SPENT)
    case.add(f"{LOOP}, fp32", partial(subject.loop, "fp32"), partial(prove, False, False))
    case.add_again(f"{LOOP}, fp32")
    case.time(sizes.rounds, enough=4)
    case.limit("persistent: the latency of about 940 clocks a row at 1.98 GHz", 940 / 1.98e9 * rows)
    return case


# Training -----------------------------------------------------------------------------------------------------------


def tutorial_loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The tutorial's loss of data ``[B, d]``, in its operations; the network takes x and t ``[B, 1]``."""
    t = torch.rand((len(x), 1), device=x.device) * (1 - 1e-4) + 1e-4
    integral = (0.1 + 0.5 * (20 - 0.1) * t) * t
    mean, variance = x * torch.exp(-0.5 * integral), -torch.expm1(-integral)
    x_t = torch.randn_like(x) * variance**0.5 + mean
    target = -(x_t - mean) / variance
    return (variance * (network(x_t, t) - target) ** 2).mean()


class Training:
    """A recipe and its data, and the ways to take its steps."""

    def __init__(self, config: TrainConfig, dataset: data.Dataset, device: torch.device, steps: int) -> None:
        self.config, self.dataset, self.device, self.steps = config, dataset.to(device), device, steps

    def _work(self, config: TrainConfig) -> Work:
        with tempfile.TemporaryDirectory() as folder:  # which it writes to while it trains, and it does not
            trainer = Trainer(config, Path(folder) / "run", device=self.device, dataset=self.dataset)
        return Work(config, trainer.model, trainer.ema, trainer.optimizer, trainer.dataset, self.device)

    def _network(self, model: nn.Module) -> Callable[..., Tensor]:
        """The model as the tutorial calls it."""
        shape = self.dataset.shape

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                f: Tensor = model(x.reshape(-1, *shape), t[:, 0])
            return f.reshape(x.shape)

        return network

    def loop(self) -> Run:
        """The tutorial's loop; the data lie on the device, so that no loader is timed."""
        model = self._work(self.config).model
        x_0 = load_batch(self.dataset.x, None, self.dataset.scale, self.dataset.shift).flatten(1)
        network, optimizer = self._network(model), torch.optim.Adam(model.parameters(), lr=self.config.lr)
        _prove_loss(network, x_0[: self.config.batch_size])

        size = self.config.batch_size

        def batches() -> Iterable[Tensor]:
            while True:
                yield from torch.randperm(len(x_0), device=self.device)[: len(x_0) // size * size].split(size)

        drawn = iter(batches())

        def run() -> Tensor:
            for _ in range(self.steps):
                loss = tutorial_loss(network, x_0[next(drawn)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return loss.detach()

        return run

    def eager(self) -> Run:
        return self._run(EagerSteps(self._work(self.config), Ranks()))

    def native(self) -> Run:
        work = self._work(self.config)
        if not can_run_natively(self.config, work.model, self.dataset, self.device, Ranks()):
            raise UnavailableError(f"native steps need an MLP in fp32 on the CPU and a compiler, got {self.device}")
        return self._run(NativeSteps(work))

    def captured(self, compile: bool = False) -> Run:
        self._check_capture()
        return self._run(CapturedSteps(self._work(replace(self.config, compile=compile))))

    def _check_capture(self) -> None:
        if not can_capture(self.config, self.dataset, self.device, Ranks()):
            raise UnavailableError(f"captured steps need Triton and a CUDA GPU, got device {self.device}")

    def _run(self, taker: Any) -> Run:
        first = 0

        def run() -> Tensor:
            nonlocal first
            for count in taker.chunks(self.steps):
                losses: Tensor = taker.take(first, count)
                first += count
            return losses

        return run

    def prove_native(self, run: Run, losses: Tensor) -> Figures:
        """As `prove_captured`."""
        return self._prove(NativeSteps, self.config, run, losses)

    def prove_captured(self, compile: bool, run: Run, losses: Tensor) -> Figures:
        """After some steps the weights are those of eager ones, by the tolerance of tests/test_captured_training.py."""
        return self._prove(CapturedSteps, replace(self.config, compile=compile), run, losses)

    def _prove(self, kind: Callable[[Work], Any], config: TrainConfig, run: Run, losses: Tensor) -> Figures:
        share = 0.2 if self.config.precision == "bf16" else 1e-3 if len(self.dataset.shape) == 1 else 1e-2
        count = 33 if len(self.dataset.shape) == 1 else 8
        weights = []
        with fp32_products(torch.backends.cudnn.conv, "ieee"):  # rounding in TF32 is no small share of Adam's step
            ways = ((kind, config), (partial(EagerSteps, here=Ranks()), self.config))
            for make, each in ways:
                work = self._work(each)
                taker, first = make(work), 0
                for length in taker.chunks(count):
                    taker.take(first, length)
                    first += length
                weights.append(torch.cat([weight.detach().flatten() for weight in work.model.parameters()]))
        error, allowed = float((weights[0] - weights[1]).abs().max()), count * self.config.lr * share
        check("training", error, allowed)
        return {"error": error, "allowed": allowed, **prove_finite(run, losses)}


def prove_finite(run: Run, losses: Tensor) -> Figures:
    """Steps that are the reference's own, or whose loss has been checked, have come to a loss."""
    loss = float(losses.float().mean())
    check("training", 0.0 if math.isfinite(loss) else math.inf, 0.0)
    return {"loss": loss}


def _prove_loss(network: Callable[..., Tensor], x: Tensor) -> None:
    """The loss is number for number that of `fastsde.compat.tutorial`, which is the reference's."""
    losses = []
    for function in (tutorial_loss, calc_loss):
        torch.manual_seed(SEED)
        losses.append(float(function(network, x).detach()))
    check("the tutorial's loss", abs(losses[0] / losses[1] - 1), 1e-3)


def training(name: str, device: torch.device, sizes: Sizes) -> Case:
    """Steps of the tutorial's recipe: its swiss roll, or its U-Net on scikit-learn's digits, which need no download."""
    points = name == "train-swiss-roll"
    config = tutorial_config("swiss-roll" if points else "mnist")
    dataset = data.swiss_roll(100_000) if points else data.digits(config.pixel_range)
    steps = 500 if points else 100
    if sizes.quick:
        config, steps = config if points else replace(config, batch_size=4), 3
    case = Case(device, subject=name, batch_size=config.batch_size, steps=config.steps, timed_steps=steps)
    runs = {"fp32" if points else "TF32": config}
    if not points:
        runs["bf16"] = replace(config, precision="bf16")
    for precision, each in runs.items():
        ways = Training(each, dataset, device, steps)
        case.add(f"{LOOP}, {precision}", ways.loop, prove_finite)
        case.add(f"fastsde eager, {precision}", ways.eager, prove_finite)
        case.add(f"fastsde captured, {precision}", ways.captured, partial(ways.prove_captured, False))
        if sizes.has_time(90 if points else 40):
            make = partial(ways.captured, compile=True)
            case.add(f"fastsde captured compiled, {precision}", make, partial(ways.prove_captured, True))
        else:
            case.leave_out(f"fastsde captured compiled, {precision}", SPENT)
    case.add_again(f"{LOOP}, {next(iter(runs))}")
    case.time(sizes.rounds, per=steps, enough=4)
    for figures in case.record["providers"].values():
        if "median_s" in figures:
            figures["whole_run_s"] = figures["median_s"] * config.steps
    _training_limits(case, sizes, points, config.batch_size)
    if not sizes.quick:
        _training_targets(case, list(runs))
    return case


def _training_limits(case: Case, sizes: Sizes, points: bool, batch: int) -> None:
    if points:
        case.limit("13.1 MFLOP, which take one SM of an H200 7 to 8 us", 7e-6)
        return
    for precision in ("TF32", "bf16"):
        rate = sizes.rates[precision]
        what = f"3 x 111.4 MFLOP x {batch} at {rate / 1e12:.3g} TFLOP/s of {precision} products"
        case.limit(what, IMAGE_STEP_FLOP * batch / rate)
    case.limit("45 kernels, of 2.5 us or more each", 45 * 2.5e-6)


def _training_targets(case: Case, precisions: Sequence[str]) -> None:
    loop = case.fastest(f"{LOOP}, {precisions[0]}", f"{LOOP}, {precisions[0]}, again")
    for precision in precisions:
        ours = case.fastest(f"fastsde captured, {precision}", f"fastsde captured compiled, {precision}")
        what = f"all {case.record['steps']:,} steps, captured in {precision}, {LOOP} in {precisions[0]}"
        case.at_least(what, loop, ours, 10 if precisions == ["fp32"] else 6)


# The run ------------------------------------------------------------------------------------------------------------


def _subjects(quick: bool) -> dict[str, Callable[[torch.device, Sizes], Case]]:
    """In order. Where the time is short, what needs no target is left out of the first."""
    return {
        "mnist-1000": partial(digits, "mnist-1000", 8 if quick else 1000, 300, ("bf16",)),
        "mnist-20": partial(digits, "mnist-20", 4 if quick else 20, 190, ()),
        "swiss-roll": partial(roll, "swiss-roll", 1000),
        "train-swiss-roll": partial(training, "train-swiss-roll"),
        "train-mnist": partial(training, "train-mnist"),
    }


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--rounds", default=10, show_default=True, help="At most; of what is slow, three.")
@click.option("--subject", "chosen", multiple=True, type=click.Choice(tuple(_subjects(False))), help="Only these.")
@click.option("--minutes", default=8.0, show_default=True, help="What no target needs is left out to keep to them.")
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works, on a CPU too.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(device: str, rounds: int, chosen: tuple[str, ...], minutes: float, quick: bool, out: Path | None) -> None:
    """Time sampling and training by every engine beside the tutorial's loops and torch.compile, on a GPU."""
    place, ends = torch.device(device), time.monotonic() + 60 * minutes
    if place.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(f"there is no device {device}")
    if place.type != "cuda" and not quick:
        raise click.ClickException("without a GPU it would take hours: give --quick")
    torch.manual_seed(SEED)
    rates = matmul_rates(place)
    result: Figures = {**settings(place), "quick": quick, "matmul_flop_per_s": rates, "subjects": []}
    sizes = Sizes(quick, rounds, ends, rates)
    subjects = {name: partial(subject, place, sizes) for name, subject in _subjects(quick).items()}
    run_subjects({name: subjects[name] for name in subjects if not chosen or name in chosen}, place, result, out)


if __name__ == "__main__":
    main()
