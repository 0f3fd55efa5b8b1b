"""What the benchmarks share: proof before time, interleaved rounds, and the tutorial's loop as the baseline."""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastsde
from fastsde import solvers
from fastsde.files import atomic_path

from .quality import sliced_wasserstein

Run = Callable[[], Any]
Figures = dict[str, Any]
LOOP = "tutorial's loop"
_FEWEST = 3  # rounds of what is slow


# Time ---------------------------------------------------------------------------------------------------------------


def seconds(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds a call: on a GPU, of ``calls`` of them between two events, so that the launch of one hides in another."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(
    providers: dict[str, Run],
    device: torch.device,
    rounds: int,
    calls: int = 1,
    warm_ups: int = 2,
    enough: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each provider's seconds, over interleaved rounds after the warm-ups.

    Args:
        enough: seconds after which a provider takes part in no more rounds, once it has had three.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + warm_ups):
        for name, run in providers.items():
            if len(times[name]) >= _FEWEST and sum(times[name]) * calls > enough:
                continue
            taken = seconds(run, device, calls)
            if number >= warm_ups:
                times[name].append(taken)
    result = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        result[name] = {"median_s": statistics.median(values), "p20_s": deciles[1], "p80_s": deciles[7]}
        result[name]["rounds"] = len(values)
    return result


def matmul_rates(device: torch.device, rounds: int = 5) -> dict[str, float]:
    """FLOP/s of a large product of random matrices in each precision."""
    size = 8192 if device.type == "cuda" else 256
    full = torch.randn(size, size, device=device)
    half = full.bfloat16()
    rates = {}
    for precision, x in (("fp32", full), ("TF32", full), ("bf16", half)):
        with fp32_products(torch.backends.cuda.matmul, "tf32" if precision == "TF32" else "ieee"):
            timed = measure({precision: lambda x=x: x @ x}, device, rounds, calls=5)
        rates[precision] = 2 * size**3 / timed[precision]["median_s"]
    return rates


# Proof --------------------------------------------------------------------------------------------------------------


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


def check(name: str, error: float, bound: float) -> None:
    """Stops what is wrong before it gets a time."""
    if not error <= bound:
        raise click.ClickException(
            f"{name} is wrong, so it has no time: off by {error:.3g}, at most {bound:.3g} is due"
        )


def check_roll(name: str, x: Tensor, expected: Tensor, exact: bool = False, same_noise: bool = True) -> Figures:
    """Swiss-roll samples beside the reference's: number for number in full fp32, else by their distribution."""
    if exact:
        error, bound = float((x - expected).abs().max()), 1e-4
    else:
        error, bound = sliced_wasserstein(x.cpu(), expected.cpu()), 0.02 if same_noise else 0.1
    check(name, error, bound)
    return {"error": error, "allowed": bound}


def moments_apart(a: Tensor, b: Tensor) -> float:
    """How far apart the means and the variances of two batches are: about 1 where only chance separates them.

    The RMS over all elements of a sample, in standard errors; the larger of the two.
    """
    batches = a.double().flatten(1), b.double().flatten(1)
    means, variances = ([each.mean(0) for each in batches], [each.var(0) for each in batches])
    fourth = [(each - mean).pow(4).mean(0) for each, mean in zip(batches, means, strict=True)]
    chance_of_means = sum(v / len(x) for v, x in zip(variances, batches, strict=True))
    chance_of_variances = sum((m - v * v) / len(x) for m, v, x in zip(fourth, variances, batches, strict=True))
    ratios = (
        (values[0] - values[1]).square().mean() / torch.as_tensor(chance).mean()
        for values, chance in ((means, chance_of_means), (variances, chance_of_variances))
    )
    return max(float(ratio.sqrt()) for ratio in ratios)


class Case:
    """The providers of one subject: each is made, runs and proves itself, and those that did are timed together."""

    def __init__(self, device: torch.device, **about: Any) -> None:
        self._device, self._runs = device, dict[str, Run]()
        self.record: Figures = {**about, "providers": {}, "limits": [], "targets": []}

    def add(self, name: str, make: Callable[[], Run], prove: Callable[[Run, Any], Figures]) -> None:
        """Adds a provider, or why it has no time.

        Args:
            make: returns what is to be timed.
            prove: called with that and its first result; raises by `check` where it is wrong.
        """
        click.echo(f"{self.record['subject']}: {name}", err=True)
        figures: Figures = {}
        try:
            run, result = self._first_call(make, figures)
            figures["parity"] = prove(run, result)
            self._runs[name] = run
        except UnavailableError as error:
            figures = {"unavailable": str(error)}
        except click.ClickException as error:
            figures["wrong"] = error.message
        except Exception as error:  # whatever it is, the others are still to be seen
            figures["failed"] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        self.record["providers"][name] = figures

    def _first_call(self, make: Callable[[], Run], figures: Figures) -> tuple[Run, Any]:
        """Makes and calls it, in seconds and memory.

        The time has what kernels take to compile that nothing before has used, ``torch.compile``, and the capture.
        """
        cuda = self._device.type == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        before, started = torch.cuda.memory_allocated(self._device) if cuda else 0, time.perf_counter()
        with warnings.catch_warnings():
            # The network would go on without it, and stand in the table as compiled.
            warnings.filterwarnings("error", "torch.compile failed", RuntimeWarning)
            run = make()
            result = run()
        if cuda:
            torch.cuda.synchronize(self._device)
            figures["peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
            figures["peak_bytes_of_its_own"] = figures["peak_bytes"] - before
        figures["first_call_s"] = time.perf_counter() - started
        return run, result

    def add_again(self, name: str) -> None:
        """Times a provider twice, so that the noise of the measurement shows."""
        if name in self._runs:
            self._runs[f"{name}, again"] = self._runs[name]
            self.record["providers"][f"{name}, again"] = {}

    def leave_out(self, name: str, reason: str) -> None:
        """Lists a provider without a time."""
        self.record["providers"][name] = {"unavailable": reason}

    def time(self, rounds: int, per: int = 1, enough: float = math.inf) -> None:
        """Times all that have proved themselves, in seconds for each of the ``per`` things that a run does."""
        timed = measure(self._runs, self._device, rounds, warm_ups=1, enough=enough)
        for name, times in timed.items():
            figures = {key: value if key == "rounds" else value / per for key, value in times.items()}
            self.record["providers"][name] |= figures
        for figures in self.record["providers"].values():
            if "first_call_s" in figures and "median_s" in figures:
                figures["first_call_extra_s"] = figures["first_call_s"] - per * figures["median_s"]
        self._runs.clear()  # and with them their memory

    def fastest(self, *names: str) -> float | None:
        """The least median of those of the providers that have one."""
        found = (self.record["providers"].get(name, {}).get("median_s") for name in names)
        return min((median for median in found if median is not None), default=None)

    def limit(self, what: str, seconds: float | None = None) -> None:
        """A physical limit, with its arithmetic in words."""
        self.record["limits"].append({"what": what, "seconds": seconds})

    def at_most(self, what: str, value: float | None, bound: float) -> None:
        """A target in seconds."""
        share = None if value is None else bound / value
        self._target(f"{what}: at most {bound:g} s", value, bound, share)

    def at_least(self, what: str, slow: float | None, fast: float | None, bound: float) -> None:
        """A target as the ratio of two times."""
        value = None if slow is None or fast is None else slow / fast
        self._target(f"{what}: at least {bound:g} times", value, bound, None if value is None else value / bound)

    def _target(self, what: str, value: float | None, bound: float, share: float | None) -> None:
        met = None if share is None else share >= 1
        self.record["targets"].append(
            {"what": what, "value": value, "bound": bound, "share_of_target": share, "met": met}
        )


# The baseline -------------------------------------------------------------------------------------------------------


class Score(nn.Module):
    """A shipped network as the tutorial's, which predicts the score: r x + s f, by factors known for each row.

    The tutorial's network needs no such factors, so they must cost next to nothing: one or two operations a row, where
    alpha and sigma of t would take a dozen.
    """

    def __init__(self, model: Callable[..., Tensor], sde: fastsde.VPSDE, prediction: str, rows: int) -> None:
        super().__init__()
        self.model, self._rows, self._calls = model, rows, 0
        r, s = solvers.score_form(sde, torch.linspace(1, 0, rows + 1, dtype=torch.float64)[:-1], prediction)
        self._factors = list(zip(r.tolist(), s.tolist(), strict=True))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        r, s = self._factors[self._calls % self._rows]
        self._calls += 1
        f = self.model(x, t)
        return f * s if r == 0 else torch.add(x, f, alpha=s / r).mul_(r)


def tutorial_loop(net: nn.Module, shape: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """The tutorial's sampling loop, for a network that predicts the score of x and t."""
    with torch.no_grad():
        times = torch.linspace(1, 0, rows + 1, device=device)
        x = torch.randn(*shape, device=device)
        for here, there in pairwise(times):
            step = here - there
            beta = 0.1 + (20 - 0.1) * here
            score = net(x, here.expand(len(x)))
            x = x - (-0.5 * beta * x - beta * score) * step + (beta * step).sqrt() * torch.randn_like(x)
    return x


# The machine --------------------------------------------------------------------------------------------------------


@contextmanager
def fp32_products(kind: Any, precision: str) -> Iterator[None]:
    """Computes fp32 products of a kind, such as ``torch.backends.cuda.matmul``, in "ieee" or "tf32"."""
    before, kind.fp32_precision = kind.fp32_precision, precision
    try:
        yield
    finally:
        kind.fp32_precision = before


def settings(device: torch.device) -> Figures:
    """Device, versions and commit."""
    import triton

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastsde": fastsde.__version__,
        "commit": git.stdout.strip() or None,
    }


def write_json(path: Path, result: Figures) -> None:
    """Writes the figures, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
