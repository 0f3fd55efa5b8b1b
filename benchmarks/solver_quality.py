"""How good samples are over the number of network calls: ``python -m fastsde.benchmarks.solver_quality``.

The shipped swiss-roll model is judged by the mean sliced 1-Wasserstein distance of samples to fresh data, the shipped
MNIST model by the Frechet distance of a CNN's features of 500 digits, with labels, to those of the test digits, and by
the share that the CNN reads as asked (`quality.py`). All runs of a model have the same seed, so that they differ by
the solver, the spacing of the times and the number of calls alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from fastsde.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import fastsde
from fastsde import checkpoints, data
from fastsde.files import atomic_path
from fastsde.solvers.named import find

from .plots import save
from .quality import frechet_distance, judge_digits, sliced_wasserstein, train_classifier
from .suite.machine import settings
from .suite.table import row

WITH_NOISE = ("euler_maruyama", "ddpm")
WITHOUT_NOISE = ("ddim", "heun", "dpm_solver_pp_2m", "unipc", "deis")
SHOWN = (*WITH_NOISE, *WITHOUT_NOISE)  # in the figure and the table
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the solver and its options
    **{solver: (solver, {}) for solver in (*SHOWN, "predictor_corrector", "rk4")},
    "dpm_solver_pp_2m, stochastic": ("dpm_solver_pp_2m", {"stochastic": True}),
    "edm_stochastic, s_churn 8": ("edm_stochastic", {"s_churn": 8.0}),
}
POINTS, DIGITS, JUDGE_EPOCHS = 10_000, 500, 10
CALLS = (5, 8, 10, 15, 20, 30, 50, 100, 200)
PLANS: dict[str, tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...]] = {  # spacing, cases, calls
    "swiss-roll": (
        ("uniform", tuple(CASES), CALLS),
        ("quadratic", tuple(CASES), CALLS),
        ("log_snr", tuple(CASES), CALLS),
        ("karras", WITHOUT_NOISE, CALLS),
        ("uniform", (*WITH_NOISE, "ddim"), (500, 999)),
    ),
    "mnist": (  # 2,500 calls, each 0.15 to 0.3 s on two idle cores
        ("uniform", SHOWN, CALLS[:7]),
        ("quadratic", SHOWN, CALLS[:7]),
        ("uniform", WITH_NOISE, (100, 200)),
    ),
}

Judge = Callable[..., dict[str, float]]  # of a solver and its options
Run = tuple[str, str, int]  # a case, a spacing, a number of calls


def calls_of(case: str, calls: int) -> int:
    """Returns ``calls``, or one less for a solver whose last interval must be a shorter one."""
    solver, options = CASES[case]
    rows = find(solver).rows_of(options)
    return calls - 1 if rows > 1 and calls % rows == 0 else calls


def judge_points() -> tuple[Judge, dict[str, Any]]:
    """Returns what measures the swiss roll, and the distance of two sets of fresh data."""
    checkpoint = checkpoints.load("swiss-roll")
    fresh, other = (data.swiss_roll(POINTS, seed=1_000_001 + i).x for i in range(2))  # those of quality.py

    def judge(**options: Any) -> dict[str, float]:
        return {"distance": sliced_wasserstein(fastsde.sample(checkpoint, (POINTS, 2), **options), fresh)}

    return judge, {"n": POINTS, "data_to_data": sliced_wasserstein(fresh, other)}


def judge_of_digits(root: str) -> tuple[Judge, dict[str, Any]]:
    """Returns what measures digits, and the figures of 500 test digits in place of samples."""
    checkpoint = checkpoints.load("mnist")
    classifier, accuracy, test = train_classifier(root, JUDGE_EPOCHS)
    labels = torch.arange(DIGITS) % 10

    def judge(**options: Any) -> dict[str, float]:
        sampler = fastsde.Sampler(checkpoint, max_batch=100, **options)
        rated = judge_digits(classifier, test, sampler(DIGITS, model_kwargs={"label": labels}).clamp(-1, 1), labels)
        return {"frechet_distance": rated["frechet_distance"], "read_as_asked": rated["read_as_asked"]}

    with torch.no_grad():
        features = classifier.body(test)
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:DIGITS]
    floor = frechet_distance(features[chosen], features)
    return judge, {"n": DIGITS, "accuracy": accuracy, "frechet_distance_of_test_digits": floor}


def planned(subject: str) -> Iterator[Run]:
    """Yields the runs of a subject."""
    for spacing, cases, counts in PLANS[subject]:
        yield from ((case, spacing, calls_of(case, calls)) for case in cases for calls in counts)


def measure(subject: str, root: str, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """Adds to ``result`` every run of a subject that it does not have, and keeps it after each.

    All figures of a subject are of one commit: if runs are missing, those of another commit are measured again.
    """
    if not _missing(result, subject):
        return
    machine = settings(torch.device("cpu"))
    if result.get(subject, {}).get("machine", machine)["commit"] != machine["commit"]:
        del result[subject]
    judge, about = judge_points() if subject == "swiss-roll" else judge_of_digits(root)
    figures: dict[str, Any] = result.setdefault(subject, {})
    figures |= {**about, "machine": machine}
    for case, spacing, calls in _missing(result, subject):
        done = figures.setdefault("runs", {}).setdefault(case, {}).setdefault(spacing, {})
        solver, options = CASES[case]
        found = judge(solver=solver, solver_options=options, spacing=spacing, steps=calls)
        for name, value in found.items():
            done.setdefault(name, {})[str(calls)] = round(value, 4)
        click.echo(f"{subject:11}{case:30}{spacing:10}{calls:4}  {found}")
        keep()


def _missing(result: dict[str, Any], subject: str) -> list[Run]:
    return [
        (case, spacing, calls)
        for case, spacing, calls in planned(subject)
        if calls not in points(result, subject, case, spacing)
    ]


# The figure and the table -------------------------------------------------------------------------------------------

PANELS = {  # the name of the figure and of its value for real data, the spacing of the lines, the title
    "swiss-roll": ("distance", "data_to_data", "quadratic", "swiss roll"),
    "mnist": ("frechet_distance", "frechet_distance_of_test_digits", "uniform", "MNIST"),
}
COLUMNS = (5, 10, 20)


def points(result: dict[str, Any], subject: str, case: str, spacing: str) -> dict[int, float]:
    """Returns the figures of a case by the number of calls, in order; none if it was not measured."""
    runs = result.get(subject, {}).get("runs", {}).get(case, {}).get(spacing, {})
    found = runs.get(PANELS[subject][0], {})
    return {int(calls): value for calls, value in sorted(found.items(), key=lambda item: int(item[0]))}


def draw(result: dict[str, Any]) -> Figure:
    """Draws the figures of each solver over its calls, a panel for each model."""
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 4.1), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, subject in zip(panels, PANELS, strict=True):
            _panel(axes, result, subject)
        labels = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _panel(axes: Any, result: dict[str, Any], subject: str) -> None:
    """Draws the figures of a model: solid lines in the spacing of its panel, and dashed ones in quadratic spacing."""
    name, floor, spacing, title = PANELS[subject]
    for index, case in enumerate(SHOWN):
        style = {"marker": "osD^vPX"[index], "ms": 3.5, "lw": 1.2, "color": f"C{index}"}
        if found := points(result, subject, case, spacing):
            axes.plot(found.keys(), found.values(), label=case, **style)
        if spacing != "quadratic" and (found := points(result, subject, case, "quadratic")):
            axes.plot(found.keys(), found.values(), ls="--", **style)
    if subject in result:
        axes.axhline(result[subject][floor], color="black", lw=0.8, ls=":", label="fresh data")
    dashed = "" if spacing == "quadratic" else " (dashed: quadratic)"
    axes.set(xscale="log", yscale="log", xlabel="network calls per sample")
    axes.set_title(f"{title}, {spacing} spacing{dashed}")
    axes.set_ylabel(f"{name.replace('_', ' ').replace('frechet', 'Fréchet')} to the data")
    ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def table(result: dict[str, Any]) -> list[str]:
    """Returns the Markdown table of docs/guides/solvers.md."""
    heads = [f"{PANELS[subject][3]}, {calls}" for subject in PANELS for calls in COLUMNS]
    lines = [row(["solver", *heads]), row(["---", *["--:"] * len(heads)])]
    for case in SHOWN:
        cells = [f"`{case}`"]
        for subject, digits in (("swiss-roll", 3), ("mnist", 1)):
            found = points(result, subject, case, PANELS[subject][2])
            figures = [found.get(calls_of(case, calls)) for calls in COLUMNS]
            cells += ["" if figure is None else f"{figure:.{digits}f}" for figure in figures]
        lines.append(row(cells))
    return lines


@click.command()
@click.option("--subject", "subjects", type=click.Choice(tuple(PLANS)), multiple=True, help="[default: both]")
@click.option("--data", "root", help="The folder of MNIST.  [default: data]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The figures, as JSON; a run goes on here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures into this PNG, and print their table.")
@click.option("--plot-only", is_flag=True, help="Measure nothing.")
def main(subjects: tuple[str, ...], root: str | None, out: Path, plot: Path | None, plot_only: bool) -> None:
    """Judge solvers over the number of network calls."""
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}

    def keep() -> None:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")

    if not plot_only:
        for subject in subjects or PLANS:
            measure(subject, root or data.DEFAULT_ROOT, result, keep)
    if plot is not None:
        save(draw(result), plot, [result])
        click.echo("\n".join(table(result)))


if __name__ == "__main__":
    main()
