"""Inspects the compiled code of the Triton kernels, without a GPU: ``python -m fastsde.benchmarks.sass``.

Each kernel is compiled for sm_80, sm_90 and sm_100 and disassembled. The table shows thread-instructions per element,
global accesses by width, and what should not occur: spills and local memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsde import VPSDE, StepTable, solvers
from fastsde.files import atomic_path
from fastsde.lowering import Program, lower
from fastsde.models import MLP

CAPABILITIES = (80, 90, 100)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_UNCOUNTED = ("NOP", "BRA", "EXIT")  # padding, jumps, and the end of the program


@dataclass(frozen=True)
class Case:
    """A variant of a kernel: the type of each run-time argument ("*fp32", "i64", ...) and each compile-time value.

    For a tuple argument the type is a tuple, with None for elements that are None.
    """

    name: str
    kernel: Any
    arguments: dict[str, str | tuple[str | None, ...]]
    constants: dict[str, Any]
    elements: int  # per program (for `mlp_sampler`: samples)
    num_warps: int
    num_stages: int = 3  # Triton's default


@dataclass(frozen=True)
class Report:
    """The result of compiling one variant for one capability. ``key`` is a digest of everything that it depends on
    besides Triton.
    """

    key: str
    name: str
    capability: int
    instructions: int
    instructions_per_element: float  # thread-instructions; loop bodies count once (`mlp_sampler`: per sample, row)
    registers: int
    shared_bytes: int
    stack_bytes: int  # used by spills
    local_accesses: int
    loop_instructions: int  # in the longest loop, which in `mlp_sampler` is the loop over rows
    loop_special: int  # special functions among these
    global_accesses: dict[str, int]
    matrix: dict[str, int]


# The kernels that are also compiled for small tiles.
SMALL = ("solver_step, counter, time and status", "perturb", "dsm_loss", "dsm_loss, backward")


def _cases(capability: int) -> Iterator[Case]:
    from fastsde.kernels import tile

    for few, batch in (("", 1000), (", few elements", 1)):
        constants, _ = tile.tiling(batch, 3072)
        yield from _tile_cases(few, constants)
    yield from _integer_cases()
    yield from _sum_cases()
    yield from _unet_cases()
    yield from _stem_cases()
    yield from _head_cases()
    yield from _mlp_cases(capability)


def _tile_cases(few: str, constants: dict[str, Any]) -> Iterator[Case]:
    """Yields each kernel on large tiles, and those of a captured sampling or training step on small tiles."""
    from fastsde.kernels import dsm_loss, normal, perturb

    num_warps, constants = constants["num_warps"], {k: v for k, v in constants.items() if k != "num_warps"}
    shared = {"batch": "i64", "size": "i64", "count": "i64", **constants, "FAST": True}
    elements = constants["S"] * constants["P"] * 4
    drawing = {"keys_ptr": "*i64", "out_ptr": "*fp32", "step": "i64", "STREAM": 0} | shared
    training = {"x_0_ptr": "*fp32", "index_ptr": None, "keys_ptr": "*i64", "table_ptr": "*fp32", "z_ptr": None}
    training |= {"step_ptr": None, "step": "i64", "scale": "fp32", "shift": "fp32"} | shared
    loss = {"f_ptr": "*fp32", "out_ptr": "*fp32"} | training
    noising = {"x_in_ptr": "*fp32", "tau_ptr": "*fp32", "kept_ptr": None} | training
    pixels = {"x_0_ptr": "*u8", "index_ptr": "*i64", "x_in_ptr": "*bf16"}
    for name, kernel, arguments in (
        *_step_cases(shared),
        ("normal", normal.normal_kernel, drawing),
        ("perturb", perturb.perturb_kernel, noising),
        ("perturb, uint8 by index, to bf16", perturb.perturb_kernel, noising | pixels),
        ("dsm_loss", dsm_loss.dsm_loss_kernel, loss | {"grad_ptr": None}),
        ("dsm_loss, backward", dsm_loss.dsm_loss_kernel, loss | {"grad_ptr": "*fp32"}),
    ):
        if not few or name in SMALL:
            yield _case(name + few, kernel, arguments, elements, num_warps)


def _step_cases(shared: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields steps of Euler-Maruyama and DDIM, and of a multistep method with everything that a step may have."""
    from fastsde.kernels.solver_step import solver_step_kernel

    step = dict.fromkeys(("f_uncond_ptr", "z_ptr", "counter_ptr", "time_ptr", "status_ptr", "input_ptr"))
    step |= {"f_ptr": "*fp32", "keys_ptr": "*i64", "table_ptr": "*fp32", "clip": None}
    step |= dict.fromkeys(("scale_ptr", "rates_ptr", "factor_ptr", "sizes_ptr"))
    step |= {"row": "i64", "rows": "i64"} | shared

    def of(table: StepTable, row: int | None = None) -> dict[str, Any]:
        terms = table.terms(row)
        known = {"M": terms.slots, "KINDS": terms.columns, "HAS_DATA": terms.has_data}
        known |= {"out_ptrs": ("*fp32",) * terms.slots}
        return known | {"slot_ptrs": tuple("*fp32" if read else None for read in terms.read)}

    one_slot = step | of(solvers.build("euler_maruyama", VPSDE(), 4))
    multistep = _multistep(stochastic=True)
    two_slots = step | of(multistep) | {"clip": "fp32"}
    two_slots |= dict.fromkeys(("f_uncond_ptr", "scale_ptr", "rates_ptr", "factor_ptr"), "*fp32")
    counted = {"counter_ptr": "*i64", "time_ptr": "*fp32", "status_ptr": "*i32"}
    yield "solver_step", solver_step_kernel, one_slot
    yield "solver_step, counter, time and status", solver_step_kernel, one_slot | counted
    yield "solver_step, no noise", solver_step_kernel, step | of(solvers.build("ddim", VPSDE(), 4)) | {"keys_ptr": None}
    yield "solver_step, bf16 network", solver_step_kernel, one_slot | {"f_ptr": "*bf16"}
    yield "solver_step, history, clip, guidance", solver_step_kernel, two_slots
    yield "solver_step, no history yet, clip", solver_step_kernel, step | of(multistep, 0) | {"clip": "fp32"}


def _sum_cases() -> Iterator[Case]:
    """Yields the kernels that sum over the elements of a sample, as a graph runs them."""
    from fastsde.kernels import guidance_rescale, langevin_size, tile

    constants, _ = tile.whole_samples(1000, 3072)
    num_warps, elements = constants.pop("num_warps"), constants["S"] * constants["P"] * 4
    names = ("f_ptr", "f_uncond_ptr", "scale_ptr", "rates_ptr", "factor_ptr", "table_ptr", "langevin_ptr", "sizes_ptr")
    shared = {**dict.fromkeys(names, "*fp32"), "keys_ptr": "*i64", "counter_ptr": "*i64", "z_ptr": None, "phi": "fp32"}
    shared |= {**dict.fromkeys(("batch", "size", "row"), "i64"), **constants}
    terms = solvers.build("predictor_corrector", VPSDE(), 5).terms()
    known = {"slot_ptrs": (None,), "M": 1, "KINDS": terms.columns, "FAST": True}
    plain = {**dict.fromkeys(("f_uncond_ptr", "scale_ptr", "rates_ptr", "factor_ptr")), **known}
    for name, kernel, given in (
        ("guidance_rescale", guidance_rescale.rescale_kernel, shared),
        ("langevin_size", langevin_size.langevin_size_kernel, shared | plain),
    ):
        taken = {key: value for key, value in given.items() if key in kernel.arg_names}
        yield _case(name, kernel, taken, elements, num_warps)


def _multistep(stochastic: bool) -> StepTable:
    """Builds a table of two slots, with a clip."""
    points = torch.linspace(1, 0.1, 5, dtype=torch.float64)
    sde = VPSDE()
    return solvers.dpm_solver_pp_2m(sde.alpha(points), sde.sigma(points), points[:-1], stochastic=stochastic, clip=1.0)


def _integer_cases() -> Iterator[Case]:
    """Yields the kernels of keys, the data order, and times with their coefficients; elements are samples."""
    from fastsde.kernels import coefficients, data_order, sample_keys, tile, uniform

    arguments = {"out_ptr": "*i64", **dict.fromkeys(("seed", "first", "n"), "i64"), "BLOCK": sample_keys.BLOCK}
    yield _case("sample_keys", sample_keys.sample_keys_kernel, arguments, sample_keys.BLOCK, tile.WARPS)
    arguments = {"keys_ptr": "*i64", "step_ptr": "*i64", "out_ptr": "*i64", "BLOCK": data_order.BLOCK}
    arguments |= dict.fromkeys(("batch", "stride", "count", "step"), "i64")
    yield _case("data_order", data_order.data_order_kernel, arguments, data_order.BLOCK, tile.WARPS)
    arguments = {"keys_ptr": "*i64", "step_ptr": "*i64", "out_ptr": "*fp32", "STREAM": 2, "BLOCK": uniform.BLOCK}
    arguments |= dict.fromkeys(("batch", "stride", "step"), "i64")
    yield _case("uniform", uniform.uniform_kernel, arguments, uniform.BLOCK, tile.WARPS)
    arguments = {**dict.fromkeys(("times_ptr", "rows_ptr", "out_ptr"), "*fp32"), "SHIFT": 17, "COLUMNS": 6}
    arguments |= {**dict.fromkeys(("n", "segments", "first"), "i64"), "BLOCK": coefficients.BLOCK}
    yield _case("coefficients", coefficients.coefficients_kernel, arguments, coefficients.BLOCK, tile.WARPS)


def _case(name: str, kernel: Any, arguments: dict[str, Any], elements: int, num_warps: int) -> Case:
    types = {key: value for key, value in arguments.items() if isinstance(value, (str, tuple)) and key.islower()}
    values = {key: value for key, value in arguments.items() if key not in types}
    return Case(name, kernel, types, values, elements, num_warps)


# Type of the images, size of x (height and width), its channels and those of the result, the kind, and the precision.
UNET_LAYERS = {
    "pooled_convolution, bf16": ("*bf16", 7, 64, 128, "pooled", "narrow"),
    "pooled_convolution, fp32 as tf32x3": ("*fp32", 14, 32, 64, "pooled", "tf32x3"),
    "convolution, bf16, transposed": ("*bf16", 14, 128, 32, "transposed", "narrow"),
    "convolution, bf16, head": ("*bf16", 28, 64, 32, "head", "narrow"),
    "convolution, fp32 as tf32, head": ("*fp32", 28, 64, 32, "head", "tf32"),
    "convolution, fp32 as tf32x3, head": ("*fp32", 28, 64, 32, "head", "tf32x3"),
    "convolution, fp32 as tf32x3, transposed": ("*fp32", 14, 128, 32, "transposed", "tf32x3"),
}
# Layers that scale and shift, too.
UNET_LAYERS |= {f"{name}, film": layer for name, layer in UNET_LAYERS.items() if layer[0] == "*bf16"}
FILM = {True: {"film_ptr": "*fp32", "FILM": 2496}, False: {"film_ptr": None, "FILM": 0}}  # of the tutorial's widths
# The batch for which each tile is chosen.
UNET_BATCHES = {"few pixels": 1, "many pixels": 10_000}


def _unet_cases() -> Iterator[Case]:
    from fastsde.kernels import convolution, pooled_convolution

    for few_or_many, batch in UNET_BATCHES.items():
        for name, (images, size, channels, out, kind, precision) in UNET_LAYERS.items():
            pixels, itemsize = batch * size**2, 2 if images == "*bf16" else 4
            arguments: dict[str, Any] = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), images)
            arguments |= {"batch": "i32", "HEIGHT": size, "WIDTH": size, "IN": channels, "OUT": out}
            arguments |= {"OUT_CHANNELS": 2 * out, "FIRST": out if kind == "pooled" else 0, "FAST": True}
            arguments |= {"PRECISION": precision, **FILM["film" in name]}
            if kind == "pooled":
                kernel: Any = pooled_convolution.pooled_convolution_kernel
                constants = pooled_convolution.launch_config(pixels, out, channels, itemsize)
                arguments |= {"pooled_ptr": images}
            else:
                kernel, kinds, head = convolution.convolution_kernel, 2 if kind == "transposed" else 1, kind == "head"
                constants = convolution.launch_config(pixels, out, channels, itemsize, kinds, head)
                arguments |= {"out_ptr": None if head else images, "head_ptr": images if head else None}
                arguments |= {"products_ptr": "*fp32" if head else None, "HEAD": 9 if head else 0, "H": 16}
                arguments |= {"OUT_HEIGHT": kinds * size, "OUT_WIDTH": kinds * size, "TRANSPOSED": kinds == 2}
            arguments |= constants
            num_warps, num_stages = arguments.pop("num_warps"), arguments.pop("num_stages")
            elements = constants["PIXELS"] * constants["N"] * (2 if kind == "transposed" else 1)
            case = _case(f"{name}, {few_or_many}", kernel, arguments, elements, num_warps)
            yield replace(case, num_stages=num_stages)


# Type of the images, their channels, size and the channels of the result.
UNET_STEMS = {
    "stem_convolution, bf16": ("*bf16", 1, 28, 32),
    "stem_convolution, fp32": ("*fp32", 1, 28, 32),
    "stem_convolution, bf16, film": ("*bf16", 1, 28, 32),
}


def _stem_cases() -> Iterator[Case]:
    from fastsde.kernels import stem_convolution as kernel

    for name, (images, channels, size, out) in UNET_STEMS.items():
        constants, _ = kernel.launch_config(64, size, size, out)
        pointers = ("x_ptr", "weight_ptr", "bias_ptr", "t_ptr", "out_ptr", "pooled_ptr")
        arguments: dict[str, Any] = {**dict.fromkeys(pointers, images), "plane_ptr": "*fp32", "batch": "i32"}
        arguments |= {"HEIGHT": size, "WIDTH": size, "IN": channels, "CHANNELS": out, "OUT_CHANNELS": 2 * out}
        arguments |= {"FIRST": out, "PRECISION": "narrow" if images == "*bf16" else "tf32x3", "FAST": True}
        arguments |= {**constants, **FILM["film" in name]}
        elements = 4 * constants["WINDOWS"] * constants["C"]
        yield _case(name, kernel.stem_convolution_kernel, arguments, elements, kernel.WARPS)


# Type of the images, and their channels.
UNET_HEADS = {
    "head_convolution, bf16": ("*bf16", 1),
    "head_convolution, fp32": ("*fp32", 1),
    "head_convolution, bf16, colour": ("*bf16", 3),
}


def _head_cases() -> Iterator[Case]:
    from fastsde.kernels import head_convolution as kernel

    for name, (images, out) in UNET_HEADS.items():
        arguments: dict[str, Any] = {"products_ptr": "*fp32", "bias_ptr": images, "out_ptr": images, "batch": "i32"}
        arguments |= {"HEIGHT": 28, "WIDTH": 28, "OUT": out, "ELEMENTS": kernel._ELEMENTS}
        yield _case(name, kernel.head_convolution_kernel, arguments, kernel._ELEMENTS, kernel.WARPS)


class _Residual(nn.Module):
    """tiny-diffusion's network: sinusoidal embeddings of t and of both coordinates, and three residual blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * width, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.frequencies = torch.exp(-torch.linspace(0, math.log(10_000), width // 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = torch.cat((25 * x, t[:, None]), -1)[:, :, None] * self.frequencies
        h = functional.gelu(self.first(torch.cat((angles.sin(), angles.cos()), -1).flatten(1)))
        for layer in self.layers:
            h = h + functional.gelu(layer(h))
        return self.last(h)  # type: ignore[no-any-return]


class _Film(nn.Module):
    """Two blocks with LayerNorm, a scale and a shift from the time and from a condition, and a residual sum."""

    def __init__(self, dim: int = 2, width: int = 64) -> None:
        super().__init__()
        self.first, self.last, self.condition = nn.Linear(dim, width), nn.Linear(width, dim), nn.Linear(8, width)
        self.films = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        h, e = self.first(x), functional.silu(self.condition(c) + t[:, None])
        for film, norm, layer in zip(self.films, self.norms, self.layers, strict=True):
            scale, shift = film(e).chunk(2, -1)
            h = h + layer(functional.silu(norm(h) * (1 + scale) + shift))
        return self.last(h)  # type: ignore[no-any-return]


def _program(network: nn.Module, dim: int, conditions: Sequence[Tensor] = ()) -> Program:
    return lower(network.eval(), (dim,), torch.linspace(1, 0.01, 5), conditions).program


def _networks() -> dict[str, Program]:
    """Returns networks as programs: those of the swiss roll and of 64 elements, a wide one, and others than MLPs."""
    return {
        "2, width 64": _program(MLP(2, (64,) * 3, "LogSigmoid"), 2),
        "64, width 64": _program(MLP(64, (64,) * 3, "LogSigmoid"), 64),
        "2, width 256": _program(MLP(2, (256,) * 3, "LogSigmoid"), 2),
        "2, residual": _program(_Residual(), 2),
        "2, FiLM": _program(_Film(), 2, (torch.ones(5, 8),)),
        "2, FiLM of a condition": _program(_Film(), 2, (torch.randn(5, 8),)),
    }


def _mlp_cases(capability: int) -> Iterator[Case]:
    """Yields networks for few and for many samples, and the swiss roll's also with a table of two slots."""
    from fastsde.kernels import mlp_sampler
    from fastsde.kernels.tile import PROCESSORS

    pointers = ("table_ptr", "rows_ptr", "given_ptr", "constants_ptr", "out_ptr")
    arguments = {**dict.fromkeys(pointers, "*fp32"), "keys_ptr": "*i64"}
    arguments |= {"x_init_ptr": None, "states_ptr": None, "FAST": True}
    arguments |= dict.fromkeys(("batch", "dim", "rows", "every", "stride"), "i64")
    one_slot, two_slots = solvers.build("euler_maruyama", VPSDE(), 4), _multistep(stochastic=False)
    few, many = 1000, 1_000_000
    programs = _networks()
    for of, precision, batches, table in (
        *(("2, width 64", precision, (few, many), one_slot) for precision in mlp_sampler.PRECISIONS),
        *(("2, width 64", precision, (few, many), two_slots) for precision in mlp_sampler.PRECISIONS),
        ("64, width 64", "fp32", (few, many), one_slot),
        ("2, width 256", "bf16", (many,), one_slot),
        *(("2, residual", precision, (few, many), one_slot) for precision in mlp_sampler.PRECISIONS),
        *(("2, FiLM", precision, (few, many), one_slot) for precision in ("fp32", "bf16")),
        ("2, FiLM of a condition", "bf16", (few, many), one_slot),
    ):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        packed = mlp_sampler.Packed(programs[of], torch.device("cpu"), dtype)
        for batch in batches:
            config = mlp_sampler.launch_config(batch, packed, precision, PROCESSORS, capability)
            warps, height = config.pop("num_warps"), config["M"]
            known = {"weights_ptr": "*bf16" if precision == "bf16" else "*fp32", "clip": table.clip and "fp32"}
            known |= mlp_sampler.network_constants(packed, precision) | config
            known |= mlp_sampler.table_constants(table.trajectory_terms)
            name = f"mlp_sampler, {precision}, {'few' if batch == few else 'many'} samples of {of}"
            name += "" if table is one_slot else ", two slots"
            yield _case(name, mlp_sampler.mlp_sampler_kernel, arguments | known, height, warps)


def _key(case: Case, capability: int) -> str:
    """Returns a digest of a case: the source of its kernel and of what that calls, and how it is compiled."""
    options = capability, case.num_warps, case.num_stages, case.elements
    known = case.kernel.cache_key, sorted(map(repr, _specialization(case).items())), options
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def compile_case(case: Case, capability: int) -> Report:
    """Compiles and disassembles one variant. Needs neither a GPU nor a driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, **_specialization(case))
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    sass = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(_disassemble(compiled.asm["cubin"]))]
    found = Counter(op for _, op, _ in sass)
    loop = _longest_loop(sass)
    counted = sum(n for op, n in found.items() if op.split(".")[0] not in _UNCOUNTED)

    def chosen(*prefixes: str) -> dict[str, int]:
        return {op: n for op, n in sorted(found.items()) if op.split(".")[0] in prefixes}

    registers, stack = _resources(compiled.asm["cubin"])
    return Report(
        key=_key(case, capability),
        name=case.name,
        capability=capability,
        instructions=counted,
        instructions_per_element=round(counted * case.num_warps * 32 / case.elements, 1),
        registers=registers,
        shared_bytes=int(compiled.metadata.shared),
        stack_bytes=stack,
        local_accesses=sum(chosen("LDL", "STL").values()),
        loop_instructions=len(loop),
        loop_special=sum(op.startswith("MUFU") for op in loop),
        global_accesses=chosen("LDG", "LDGSTS", "STG"),
        matrix={op: n for op, n in sorted(found.items()) if "MMA" in op and "HFMA" not in op},
    )


def _specialization(case: Case) -> dict[str, Any]:
    """Returns the signature of a case, its constants, and the alignment of all pointers, by path of the argument."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(case.constants)
    aligned = {}
    for i, name in enumerate(case.kernel.arg_names):
        given = case.arguments.get(name, "constexpr")
        if isinstance(given, tuple):
            signature[name] = tuple("constexpr" if each is None else each for each in given)
            constants |= {(i, j): None for j, each in enumerate(given) if each is None}
            paths = {(i, j): each or "" for j, each in enumerate(given)}
        else:
            signature[name], paths = given, {(i,): given}
        aligned |= {path: [["tt.divisibility", 16]] for path, each in paths.items() if each.startswith("*")}
    return {"signature": signature, "constexprs": constants, "attrs": aligned}


def _longest_loop(sass: Sequence[tuple[int, str, str]]) -> list[str]:
    """Returns the instructions from the target of a backward jump to the jump, for the longest such loop."""
    longest: list[str] = []
    for at, op, rest in sass:
        target = _TARGET.search(rest) if op.startswith("BRA") else None
        first = at if target is None else int(target[1], 16)
        if first < at:
            longest = max(longest, [name for place, name, _ in sass if first <= place <= at], key=len)
    return longest


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_on(cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _disassemble(cubin: bytes) -> str:
    return _run_on(cubin, "-sass")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns the registers per thread, and the bytes of stack, which hold spills."""
    usage = _run_on(cubin, "-res-usage")
    registers, stack = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {usage}")
    return int(registers[1]), int(stack[1])


def survey(kept: Path | None = None) -> dict[str, Any]:
    """Compiles every case for every capability.

    Args:
        kept: the folder of earlier results. What this Triton has compiled before, of the same sources, is taken from
            there, except the first case of each kernel for sm_90.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: it replaces the compiler")
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for path in () if kept is None else kept.glob("sass-triton-*.json"):
        result = json.loads(path.read_text())
        if result["triton"] == triton.__version__:
            known |= {(report["name"], report["key"]): report for report in result["kernels"]}
    reports, seen = list[dict[str, Any]](), set[Any]()
    for capability in CAPABILITIES:
        for case in _cases(capability):
            is_first = capability == 90 and case.kernel not in seen
            seen |= {case.kernel} if capability == 90 else set()
            report = None if is_first else known.get((case.name, _key(case, capability)))
            reports.append(asdict(compile_case(case, capability)) if report is None else report)
    return {"triton": triton.__version__, "kernels": reports}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the counts as JSON.")
@click.option("--kept", type=click.Path(path_type=Path), help="Folder of kept counts: compile only changes.")
def main(out: Path | None, kept: Path | None) -> None:
    """Compile the kernels for sm_80, sm_90 and sm_100 and print instruction counts, registers and memory accesses."""
    result = survey(kept)
    print(f"Triton {result['triton']}")
    print(
        f"{'kernel':50} {'sm':>4} {'instr':>6} {'/elem':>6} {'regs':>5} {'shared':>7} {'stack':>5} {'local':>5}  access"
    )
    for r in result["kernels"]:
        accesses = ", ".join(f"{n} {op}" for op, n in {**r["global_accesses"], **r["matrix"]}.items())
        print(
            f"{r['name']:50} {r['capability']:>4} {r['instructions']:>6} {r['instructions_per_element']:>6} "
            f"{r['registers']:>5} {r['shared_bytes']:>7} {r['stack_bytes']:>5} {r['local_accesses']:>5}  {accesses}"
        )
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
