"""The tables of docs/benchmarks/networks.md: what is lowered, why something is not, and what could not be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import Tensor, nn

from fastsde.benchmarks.networks import __main__ as command
from fastsde.benchmarks.networks import papers, table
from fastsde.benchmarks.networks.case import Called, Case, check

ROOT = Path(__file__).parents[1]


class Small(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.last(self.first(x) * t[:, None])
        return f


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


def test_a_network_is_lowered_refused_with_the_module_or_has_failed() -> None:
    lowered = check(Case("lowered", lambda: Called(Small(nn.Tanh()), (3,))))
    assert (lowered.weights, lowered.refused, lowered.failed) == (12, None, None)
    assert lowered.kinds == ("linear", "multiply", "Tanh")
    refused = check(Case("refused", lambda: Called(Small(Sorted()), (3,))))
    assert refused.refused is not None
    assert refused.refused.startswith("Sorted (last): sort")
    failed = check(Case("failed", lambda: Called(Small(nn.Linear(4, 3)), (3,))))
    assert failed.failed is not None
    assert failed.failed.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    results = [lowered, refused, failed]
    assert table.summary(results) == "3 networks: 1 lowered, 1 not lowered, 1 failed."
    lines = table.section(table.Library("a library", results=results)).splitlines()
    assert lines[-3] == "| lowered | 12 | yes | 3 instructions: linear, multiply, Tanh |"
    assert lines[-2].startswith("| refused | 12 | no | Sorted (last): sort")
    assert lines[-1].startswith("| failed | 27 | no | failed: RuntimeError")


@pytest.mark.parametrize("word", ["tiny-diffusion", "torchcfm", "Fourier", "policy", "EDM", "self-attention"])
def test_networks_written_out_become_what_the_document_says(word: str) -> None:
    (case,) = (each for each in papers.cases() if word in each.name)
    result = check(case)
    assert result.failed is None
    assert (result.refused is not None) == (word == "self-attention")


def test_the_command_writes_between_marks_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zuko", "zuko.flows.continuous"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastsde.benchmarks.networks.zuko", raising=False)  # of another test
    monkeypatch.setattr(papers, "cases", lambda: [Case("a network", lambda: Called(Small(nn.Tanh()), (3,)))])
    out = tmp_path / "lowering.md"
    names = ["--library", "papers", "--library", "zuko"]
    for _ in range(2):  # the second changes nothing
        done = CliRunner().invoke(command.main, ["--out", str(out), *names])
        assert done.exit_code == 0, done.output
        assert "papers: 1 network: 1 lowered." in done.output
        text = out.read_text()
        assert text.startswith("# Networks that are lowered\n\n<!-- networks -->\n")
        assert text.count("| a network | 12 | yes |") == 1
        assert "### zuko\n\nLeft out, since it could not be imported" in text
    bad = Case("bad", lambda: Called(Small(nn.Linear(4, 3)), (3,)))
    monkeypatch.setattr(papers, "cases", lambda: [bad])
    done = CliRunner().invoke(command.main, names)
    assert done.exit_code == 1
    assert "failed: bad: RuntimeError" in done.output
    out.write_text("no marks")
    with pytest.raises(ValueError, match="the document has no lines"):
        table.MARKS.inserted(out.read_text(), "")


def test_the_document_has_the_networks_of_the_papers() -> None:
    text = (ROOT / "docs" / "benchmarks" / "networks.md").read_text()
    assert all(f"| {case.name} |" in text for case in papers.cases())
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5]
    assert len(rows) > 30
    assert not any("failed:" in row for row in rows)
