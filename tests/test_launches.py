"""How many launches each engine needs: docs/benchmarks/launches.md (tests/launches.py defines a launch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cuda_graphs import TapeRecording
from launches import Launches, watching

from fastsde import Sampler, StepTable
from fastsde.models import MLP, UNet
from fastsde.training import TrainConfig, Trainer, default_config
from fastsde.training.captured import CapturedSteps
from fastsde.training.steps import EagerSteps

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks" / "launches.md"
# For the tutorial's two networks, with noise in each row. A change that adds a launch must show up here.
EXPECTED = {
    "row of the MLP, reference": 238,
    "row of the MLP, eager": 10,
    "row of the MLP, graph": 9,
    "row of the U-Net, reference": 260,
    "row of the U-Net, eager": 13,
    "row of the U-Net, graph": 12,
    "call around its rows, MLP, reference": 384,
    "call around its rows, MLP, eager": 4,
    "call around its rows, MLP, graph": 11,
    "call around its rows, U-Net, reference": 384,
    "call around its rows, U-Net, eager": 23,
    "call around its rows, U-Net, graph": 30,
    "call of all rows, MLP, persistent": 12,
    "step of the MLP, no average, reference": 53,
    "step of the MLP, no average, captured": 30,
    "step of the MLP, reference": 54,
    "step of the MLP, captured": 33,
    "step of the MLP, bf16, reference": 73,
    "step of the MLP, bf16, captured": 36,
    "step of the U-Net, reference": 94,
    "step of the U-Net, captured": 70,
    "step of the U-Net, bf16, reference": 141,
    "step of the U-Net, bf16, captured": 73,
    "steps around their replay, captured": 8,
}
IMAGES = {"image_channels": 1, "image_size": [28, 28], "channels": [2] * 5}  # as many layers as the tutorial's
NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "MLP": (MLP, (2,)),
    "U-Net": (lambda: UNet(**{**IMAGES, "image_size": [16, 16]}), (1, 16, 16)),  # type: ignore[arg-type]
}
ROWS = 2


pytestmark = pytest.mark.parametrize("graphs", ["tape"], indirect=True)


@pytest.fixture(autouse=True)
def as_on_a_gpu(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsde.training.trainer.prefers_channels_last", lambda model, device: True)


def launches_of(run: Callable[[], object], table: StepTable | None = None) -> Counter[str]:
    host = [] if table is None else [getattr(table, name) for name in ("time", "n", "p", "q", "A", "b", "e", "d")]
    with watching(Launches(host)) as launches:
        run()
    return Counter(launches.names)


def check(found: dict[str, Counter[str]]) -> None:
    """Compares with `EXPECTED`, and shows differences as rows of the table with their launches."""
    counts = {name: launches.total() for name, launches in found.items()}
    different = [name for name, count in counts.items() if EXPECTED.get(name) != count]
    lines = [f'    "{name}": {counts[name]},  # {dict(found[name])}' for name in different]
    assert not different, "\n".join(["not as in EXPECTED:", *lines])


# Sampling -----------------------------------------------------------------------------------------------------------


def calls(network: str, backend: str) -> tuple[Counter[str], Counter[str]]:
    """Returns the launches of a repeated call with ``ROWS`` rows, and of one with one more row."""
    make, shape = NETWORKS[network]
    model, found = make(), []
    for rows in (ROWS, ROWS + 1):
        sampler = Sampler(model, shape, steps=rows, backend=backend)
        sampler(2)
        found.append(launches_of(lambda sampler=sampler: sampler(2), sampler.table))  # type: ignore[misc]
    return found[0], found[1]


@pytest.mark.usefixtures("large_convolution_tiles")
@pytest.mark.parametrize(
    ("backend", "network"),
    [
        *(("reference", network) for network in NETWORKS),
        ("eager", "MLP"),
        pytest.param("eager", "U-Net", marks=pytest.mark.slow),  # two calls of it in the interpreter
    ],
)
def test_a_row_and_what_is_around_all_rows(backend: str, network: str) -> None:
    short, long = calls(network, backend)
    row = long - short
    around = short - Counter({name: ROWS * count for name, count in row.items()})
    if backend == "eager":  # it reads the status after each row on a CPU, but only at the end on a GPU
        row["_local_scalar_dense"] -= 1
    check({f"row of the {network}, {backend}": row, f"call around its rows, {network}, {backend}": around})


@pytest.mark.usefixtures("large_convolution_tiles")
@pytest.mark.parametrize("network", ["MLP", pytest.param("U-Net", marks=pytest.mark.slow)])
def test_a_captured_row_and_what_is_around_its_replays(network: str) -> None:
    short, long = calls(network, "graph")
    graphs = [Counter(names) for names in TapeRecording.recorded]
    assert [graph.total() for graph in graphs] == [graphs[0].total() // ROWS * rows for rows in (ROWS, ROWS + 1)]
    assert short == long
    assert short["replay"] == 1
    row, around = graphs[1] - graphs[0], short - Counter(["replay"])
    check({f"row of the {network}, graph": row, f"call around its rows, {network}, graph": around})


def test_a_whole_trajectory_in_one_launch() -> None:
    short, long = calls("MLP", "persistent")
    assert short == long
    assert short["mlp_sampler_kernel"] == 1
    check({"call of all rows, MLP, persistent": short})


# Training -----------------------------------------------------------------------------------------------------------

POINTS = replace(default_config("swiss-roll"), data_size=20, batch_size=16, steps=100)
DIGITS = replace(
    default_config("digits"), data_size=4, batch_size=2, steps=100, model={"architecture": "UNet", **IMAGES}
)
RECIPES: dict[str, TrainConfig] = {
    "MLP, no average": replace(POINTS, ema_decay=0.0),
    "MLP": POINTS,
    "MLP, bf16": replace(POINTS, precision="bf16"),
    "U-Net": DIGITS,
    "U-Net, bf16": replace(DIGITS, precision="bf16"),
}
SLOW = ("MLP, no average", "MLP, bf16", "U-Net", "U-Net, bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RECIPES]
)
def test_a_training_step(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]
    trainer = Trainer(config, tmp_path / "run")
    work = trainer.work()
    eager = EagerSteps(work, trainer._here)
    eager.take(0, 1)  # it draws for many steps
    reference = launches_of(lambda: eager.take(1, 1)) - Counter(["stack"])
    captured = CapturedSteps(work)
    for first in range(3):
        captured.take(first, 1)
    for count in (2, 3):
        captured.take(3, count)
    graphs = [Counter(names) for names in TapeRecording.recorded]
    step = graphs[1] - graphs[0]
    of_all = graphs[0] - step - step
    assert graphs[0].total() == 2 * step.total() + of_all.total()
    around = launches_of(lambda: captured.take(3, 2))
    assert around["replay"] == 1
    check(
        {
            f"step of the {recipe}, reference": reference,
            f"step of the {recipe}, captured": step,
            "steps around their replay, captured": around - Counter(["replay"]) + of_all,
        }
    )


def test_the_table_in_the_docs_is_this_one() -> None:
    lines = [line.strip("| ").split("|") for line in DOCS.read_text().splitlines() if line.startswith("| ")][2:]
    assert {name.strip(): int(now) for name, _, now in lines} == EXPECTED
