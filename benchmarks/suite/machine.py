"""The ceilings of a machine, measured in each run, and the least time in which it can do a given amount of work."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

import fastsde
from fastsde.openmp import wait_policy
from fastsde.verify import machine

from .measure import Figures, fp32_products, seconds

SPECIAL_FLOP = 12  # on a CPU, which has no unit for exp and log: each needs at least 6 fused multiply-adds
_RIVALS = (
    *("diffusers", "torchsde", "k-diffusion", "sbi", "azula"),
    *("jax", "onnxruntime", "openvino", "pytest-benchmark"),
)


@dataclass(frozen=True)
class Work:
    """The minimum work of a run, however it is implemented.

    Args:
        bytes: memory traffic, of data that no cache holds and that is read or written once.
        flop: floating-point operations of matrix products and convolutions, or of an elementwise formula.
        specials: number of exponentials, logarithms, roots, sines and cosines.
        launches: number of GPU kernels that depend on one another.
        clocks: clock cycles of a chain of dependent operations within one GPU kernel.
    """

    bytes: float = 0
    flop: float = 0
    specials: float = 0
    launches: float = 0
    clocks: float = 0

    def __mul__(self, times: float) -> Work:
        return Work(**{name: value * times for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device.

    Args:
        kind: "cpu" or "cuda".
        bytes: bytes per second of a copy that no cache holds, reads plus writes.
        flop: FLOP per second, by precision.
        specials: special functions per second.
        launch: seconds from one kernel of a CUDA graph to the next that depends on it; 0 on a CPU.
        clock: the highest clock rate of a GPU, in Hz; infinite on a CPU.
    """

    kind: str
    bytes: float
    flop: dict[str, float]
    specials: float
    launch: float = 0.0
    clock: float = math.inf

    def limit(self, work: Work, precision: str) -> Figures:
        """Returns the least time that any program can take on this device, and what limits it.

        The units of a GPU work in parallel, so that the slowest one counts. On a CPU special functions count as
        arithmetic.
        """
        flop = self.flop.get(precision, self.flop["fp32"])
        parts = {
            "memory": work.bytes / self.bytes,
            "arithmetic": work.flop / flop,
            "special functions": work.specials / self.specials,
            "launches": work.launches * self.launch,
            "latency": work.clocks / self.clock,
        }
        if self.kind == "cpu":
            parts["arithmetic"] += parts.pop("special functions")
        by = max(parts, key=lambda part: parts[part])
        return {"limit_s": parts[by], "limited_by": by}

    def describe(self) -> Figures:
        return {name: value for name, value in asdict(self).items() if value != math.inf}


def ceilings(device: torch.device, rounds: int = 7) -> Ceilings:
    """Measures a device, which takes some seconds."""
    bandwidth, flop = _copy_bandwidth(device, rounds), _products(device, rounds)
    if device.type != "cuda":
        return Ceilings(device.type, bandwidth, flop, flop["fp32"] / SPECIAL_FLOP)
    clock = _gpu_clock()
    # 16 units per multiprocessor, as in compute capability 8 and 9; others may have more. Twice as many, since half of
    # the functions may be polynomials on other units, as three of four logarithms of `mlp_sampler` are.
    specials = 2 * 16 * torch.cuda.get_device_properties(device).multi_processor_count * clock
    return Ceilings(device.type, bandwidth, flop, specials, _launch(device), clock)


def _best(run: Callable[[], object], device: torch.device, rounds: int, calls: int = 5) -> float:
    """Returns the seconds of the fastest round, so that other work on the machine does not lower a ceiling."""
    for _ in range(2):
        run()
    return min(seconds(run, device, calls) for _ in range(rounds))


def _copy_bandwidth(device: torch.device, rounds: int) -> float:
    elements = 1 << (28 if device.type == "cuda" else 25)  # 1 GiB, and 128 MiB
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    return 8 * elements / _best(lambda: target.copy_(source), device, rounds)


def _products(device: torch.device, rounds: int) -> dict[str, float]:
    """Returns the FLOP/s that PyTorch reaches in each precision, in matrix products or convolutions of random numbers.

    Neither is always faster: on some CPUs the convolution reaches 2.5 times the product's rate in fp32. Three products
    in TF32 can replace one in fp32 (kernels/mlp_sampler.py).
    """
    cuda = device.type == "cuda"
    size, images, channels, width = (8192, 256, 256, 28) if cuda else (1024, 8, 256, 14)
    matrix = torch.randn(size, size, device=device)
    x = torch.randn(images, channels, width, width, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    product_flop, convolution_flop = 2 * size**3, 2 * 9 * channels**2 * images * width**2
    rates = {}
    for precision in ("fp32", "TF32", "bf16") if cuda else ("fp32", "bf16"):
        a, b, w = (each.bfloat16() if precision == "bf16" else each for each in (matrix, x, weight))
        kind = "tf32" if precision == "TF32" else "ieee"
        with torch.inference_mode(), fp32_products(torch.backends.cuda.matmul, kind):
            product = product_flop / _best(lambda a=a: a @ a, device, rounds)  # type: ignore[misc]
        with torch.inference_mode(), fp32_products(torch.backends.cudnn, kind):
            taken = _best(lambda b=b, w=w: F.conv2d(b, w, padding=1), device, rounds)  # type: ignore[misc]
        rates[precision] = max(product, convolution_flop / taken)
    rates["fp32"] = max(rates["fp32"], rates.get("TF32", 0) / 3)
    return rates


def _gpu_clock() -> float:
    """Returns the highest clock rate that the driver reports, in Hz, or infinity if it reports none."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return math.inf


def _launch(device: torch.device, kernels: int = 500) -> float:
    x = torch.zeros(32, device=device)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    return _best(graph.replay, device, rounds=7) / kernels


def settings(device: torch.device) -> Figures:
    """Returns the device, the versions of the software, and the commit."""
    return {
        **machine(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "threads_wait": wait_policy(),
        "instructions": cpu_instructions(),
        "commit": _commit(),
        **{name: _version(name) for name in ("triton", *_RIVALS)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of the checkout that contains fastsde, or None for an installed package."""
    checkout = Path(fastsde.__file__).parents[1]
    if shutil.which("git") is None or not (checkout / "pyproject.toml").is_file():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=checkout).stdout.strip() or None


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _cpu_name() -> str:
    named = re.search(r"^model name\s*:\s*(.*)$", _cpu_info(), re.MULTILINE)
    return named[1] if named else "CPU"


def cpu_instructions() -> list[str]:
    """Returns the instruction-set extensions of this CPU that matter for the kernels."""
    info = _cpu_info()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in info]
