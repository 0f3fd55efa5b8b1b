"""Every error and warning that docs/guides/troubleshooting.md quotes is what the package really says.

Most of them are provoked. The others, which need a GPU, several processes or another CPU, are found in the source.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from code_blocks import blocks
from torch import Tensor, nn

import fastsde
from fastsde import checkpoints, ops
from fastsde.data import Dataset
from fastsde.engines import openvino
from fastsde.training import TrainConfig, Trainer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guides/troubleshooting.md"
QUOTED = [" ".join(block.code.split()) for block in blocks(PAGE) if block.language == "text"]
CONFIG = TrainConfig("mine", "", steps=2, batch_size=8)


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.linear(x) + self.embedding(label)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x)


def sample(model=lambda x, t: -x, **options):
    return fastsde.sample(model, (4, 2), **{"steps": 5, **options})


def dataset(**conditions: Tensor) -> Dataset:
    return Dataset("mine", torch.randn(64, 2), conditions=conditions)


def trainer(folder: Path | str = "run", **options) -> Trainer:
    return Trainer(CONFIG, folder, **{"model": Network(), "dataset": dataset(), "device": "cpu", **options})


def loop(change: Callable[[Tensor], Tensor], calls: bool = True) -> Callable[[nn.Module], Tensor]:
    def run(network):
        x = torch.randn(4, 2)
        for i in range(3):
            x = change(x + 0.1 * network(x, torch.full((4,), i / 3))) if calls else change(x)
        return x

    return run


def forgetful():
    count = []
    return lambda x: x * (count.append(None) or len(count))


# The first words of a quoted text, and what leads to it -------------------------------------------------------------


def _trained(**options) -> Trainer:
    trainer().train(progress=False)
    return trainer(**options)


def _of_torch() -> object:
    torch.save(Network().state_dict(), "weights.pt")
    return checkpoints.load("weights.pt")


def _without(name: str, call: Callable[[], object]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        patch.setattr(openvino, "is_installed", lambda: False)
        return call()


def _dropped() -> object:
    config = replace(CONFIG, condition_dropout=0.9)
    labels = dataset(label=torch.arange(64) % 10)
    return Trainer(config, "run", model=Labelled(), dataset=labels, device="cpu").train(progress=False)


def _diverged() -> object:
    config = replace(CONFIG, lr=1e30, steps=2000)
    return Trainer(config, "run", model=Network(), dataset=dataset(), device="cpu").train(progress=False)


def _without_bf16() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "multiplies_bf16", lambda: False)
        return fastsde.Sampler(Network(), (2,), dtype=torch.bfloat16, device="cpu")


LABELS = {"label": torch.full((4,), 1)}
SNIPPETS: dict[str, Callable[[], object]] = {
    "ValueError: model must return the shape": lambda: sample(lambda x, t: torch.cat((x, x), 1)),
    "TypeError: model must be callable as model(x, t, **model_kwargs)": lambda: sample(
        Labelled(), model_kwargs={"labels": LABELS["label"]}
    ),
    "IndexError: the network failed at time": lambda: sample(Labelled(), model_kwargs={"label": torch.full((4,), 10)}),
    "NonFiniteError: the network returned": lambda: sample(lambda x, t: x / 0),
    "ValueError: heun to t = 0": lambda: sample(solver="heun", prediction="eps", steps=4),
    "ValueError: clip bounds": lambda: sample(clip=1.0),
    "ValueError: RectifiedFlow()": lambda: sample(sde=fastsde.RectifiedFlow(), prediction="flow"),
    "ValueError: guidance and uncond_kwargs": lambda: sample(Labelled(), guidance=2.0, model_kwargs=LABELS),
    "RuntimeWarning: the network has": lambda: sample(nn.Sequential(nn.Linear(3, 2), nn.Dropout())),
    "ValueError: backend 'persistent': ...": lambda: fastsde.Sampler("mnist", backend="persistent", device="cpu"),
    "ValueError: backend 'persistent' runs": lambda: sample(
        Network(), backend="persistent", callback=lambda row, time, x: None
    ),
    "ValueError: backend 'graph'": lambda: fastsde.Sampler("swiss-roll", backend="graph", device="cpu"),
    "RuntimeWarning: this CPU": _without_bf16,
    "TraceError: ...: the loop decides": lambda: fastsde.accelerate(loop(lambda x: x * x[0, 0].item()))(Network()),
    "TraceError: ...: a norm": lambda: fastsde.accelerate(loop(lambda x: x / x.norm()))(Network()),
    "TraceError: ...: a random number": lambda: fastsde.accelerate(loop(lambda x: x + torch.rand(4, 2)))(Network()),
    "TraceError: network call": lambda: fastsde.accelerate(loop(lambda x: x, calls=False))(Network()),
    "ValueError: network must name": lambda: fastsde.accelerate(lambda n: torch.randn(n, 2))(4),
    "MismatchError: check": lambda: fastsde.accelerate(loop(forgetful()))(Network()),
    "FileExistsError: ... already holds": _trained,
    "ValueError: the run in": lambda: (
        _trained(resume=True)
        and Trainer(replace(CONFIG, lr=1.0), "run", model=Network(), dataset=dataset(), resume=True, device="cpu")
    ),
    "NonFiniteError: the loss became": _diverged,
    "IndexError: the network failed with label": _dropped,
    "ValueError: ... was written by torch.save": _of_torch,
    "ValueError: ... holds the weights": lambda: _trained(resume=True) and checkpoints.load("run"),
    "ValueError: ... has weights": lambda: _trained(resume=True) and checkpoints.load("run", model=Labelled),
    "FileNotFoundError: there is no": lambda: sample("roll"),
    "MissingExtraError: torchode": lambda: _without(
        "torchode", lambda: fastsde.sample("swiss-roll", (4, 2), solver=fastsde.solvers.AdaptiveODE())
    ),
    "MissingExtraError: openvino": lambda: _without("openvino", lambda: sample(Network(), compile="openvino")),
}


def literals() -> Iterator[str]:
    """Yields a pattern for each long string of the package, with anything in place of what is formatted."""
    for folder in ("fastsde", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                if len("".join(fixed)) > 30:
                    yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in parts)


@pytest.mark.slow
def test_each_text_is_provoked_or_in_the_source() -> None:
    for start in SNIPPETS:
        assert sum(text.startswith(start) for text in QUOTED) == 1, start
    others = [text.partition(": ")[2] for text in QUOTED if not text.startswith(tuple(SNIPPETS))]
    assert len(SNIPPETS) >= 20
    assert len(others) < len(SNIPPETS) / 2
    patterns = list(literals())
    assert [text for text in others if not any(re.fullmatch(pattern, text) for pattern in patterns)] == []


@pytest.mark.slow
@pytest.mark.parametrize("start", SNIPPETS)
def test_a_text_is_what_the_package_says(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = (text for text in QUOTED if text.startswith(start))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            SNIPPETS[start]()
            said = [f"{each.category.__name__}: {each.message}" for each in told]
        except Exception as error:
            said = [f"{type(error).__name__}: {error}"]
    pattern = re.escape(text).replace(re.escape("..."), ".+")
    assert any(re.fullmatch(pattern, each, re.DOTALL) for each in said), f"{said} is not {text}"
