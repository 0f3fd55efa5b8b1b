"""``fastsde likelihood``, ``fastsde encode`` and the latents that ``fastsde sample`` starts from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastsde
from fastsde import cli, data

DECODE = ["--solver", "dpm_solver_pp_2m", "--spacing", "log_snr", "--t-end", "0.0001"]


def test_likelihood_prints_the_mean_and_its_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "likelihood.npz"
    arguments = ["likelihood", "swiss-roll", "-n", "20", "--steps", "16", "--quiet", "--save", str(saved)]
    cli.main(arguments, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    found = np.load(saved)
    expected = fastsde.log_prob("swiss-roll", data.swiss_roll(20, seed=1).x, steps=16).numpy()
    np.testing.assert_allclose(found["log_prob"], expected)
    np.testing.assert_allclose(found["bits_per_dim"], -expected / np.log(2) / 2)
    error = expected.std(ddof=1) / np.sqrt(20)
    assert lines[0] == "swiss-roll on 20 samples of swiss-roll"
    assert lines[1] == f"log p:     {expected.mean():.4f} +- {error:.4f} nats"
    assert re.fullmatch(r"bits/dim:  -?\d+\.\d{4} \+- \d+\.\d{4}", lines[2])
    assert lines[3] == str(saved)


@pytest.mark.slow
def test_likelihood_of_images_counts_their_levels_and_takes_their_labels(tmp_path: Path) -> None:
    images = data.digits((-1.0, 1.0)).head(3)
    found = {}
    for name, label in {"own": [], "none": ["--label", "none"], "2": ["--label", "2"]}.items():
        saved = tmp_path / f"{name}.safetensors"
        arguments = ["likelihood", "mnist", "--data", "digits", "-n", "3", "--steps", "4", *label]
        cli.main([*arguments, "--quiet", "--save", str(saved)], standalone_mode=False)
        found[name] = load_file(saved)
    for name, given in (
        ("own", images.conditions["label"]),
        ("none", torch.full((3,), 10)),
        ("2", torch.full((3,), 2)),
    ):
        expected = fastsde.bits_per_dim("mnist", images.x, steps=4, model_kwargs={"label": given})
        torch.testing.assert_close(found[name]["bits_per_dim"], expected)
        y_bits = -found[name]["log_prob"] / np.log(2) / 784 + 7
        torch.testing.assert_close(y_bits, expected)


def test_latents_are_written_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents, back = tmp_path / "latents.safetensors", tmp_path / "back.npz"
    encode = ["encode", "swiss-roll", "-n", "9", "--steps", "50", "--quiet", "--save", str(latents)]
    cli.main(encode, standalone_mode=False)
    told = capsys.readouterr()
    assert told.out.strip() == str(latents)
    line = next(line for line in told.err.splitlines() if line.startswith("to decode: fastsde "))
    command = line.removeprefix("to decode: fastsde ").split()
    cli.main([*command, "--quiet", "--save", str(back)], standalone_mode=False)
    x = data.swiss_roll(9, seed=1).x
    torch.testing.assert_close(load_file(latents)["latents"], fastsde.encode("swiss-roll", x, steps=50))
    np.testing.assert_allclose(np.load(back)["samples"], x.numpy(), atol=2e-2)


@pytest.mark.slow
def test_latents_keep_their_labels(tmp_path: Path) -> None:
    latents, back = tmp_path / "latents.npz", tmp_path / "back.npz"
    arguments = ["encode", "mnist", "--data", "digits", "-n", "2", "--steps", "6", "--quiet", "--save", str(latents)]
    cli.main(arguments, standalone_mode=False)
    with np.load(latents) as arrays:
        assert arrays["label"].tolist() == [0, 1]
        z = torch.from_numpy(arrays["latents"])
    cli.main(
        ["sample", "mnist", "--latents", str(latents), "--steps", "6", *DECODE, "--quiet", "--save", str(back)],
        standalone_mode=False,
    )
    expected = fastsde.decode("mnist", z, steps=6, model_kwargs={"label": torch.tensor([0, 1])})
    np.testing.assert_allclose(np.load(back)["samples"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["likelihood", "nowhere"], 1, "there is no checkpoint nowhere"),
        (["likelihood", "swiss-roll", "--label", "2"], 1, "swiss-roll takes no labels: leave --label out"),
        (
            ["likelihood", "mnist", "--label", "12", "--data", "digits"],
            1,
            "label must be a number from 0 to 9, got '12'",
        ),
        (["likelihood", "swiss-roll", "--data", "digits"], 1, "the model takes samples of shape (2,)"),
        (["likelihood", "swiss-roll", "--data", "no.npy"], 1, "no.npy"),
        (["likelihood", "swiss-roll", "--trace", "exact", "--probes", "2"], 1, "probes are of trace='hutchinson'"),
        (["likelihood", "swiss-roll", "--tolerance", "0.1"], 2, "--tolerance is for --solver adaptive"),
        (
            ["likelihood", "swiss-roll", "--solver", "adaptive", "--steps", "9"],
            2,
            "--steps is not for --solver adaptive",
        ),
        (["likelihood", "swiss-roll", "--steps", "0"], 2, "0 is not in the range x>=1"),
        (["likelihood", "swiss-roll", "--save", "x.json"], 2, "must end in .safetensors or .npz"),
        (["likelihood", "mnist", "--data-root", "."], 1, "MNIST is not in"),
        (["encode", "swiss-roll"], 2, "Missing option '--save'"),
        (
            ["encode", "swiss-roll", "--solver", "ddpm", "--save", "z.npz"],
            1,
            "solver='ddpm' cannot run from data to noise",
        ),
        (["sample", "swiss-roll", "--latents", "no.npz", "--save", "x.npz"], 1, "there are no latents no.npz"),
    ],
)
def test_mistakes_end_with_a_message_and_an_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise RuntimeError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(code)):
        cli.main([*arguments, "--quiet"])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.npz"))


def test_latents_of_another_model_or_number_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "z.npz"
    for arrays, more, message in (
        ({"latents": np.zeros((4, 3), np.float32)}, [], "must hold latents of shape [n, 2], got [4, 3]"),
        ({"samples": np.zeros((4, 2), np.float32)}, [], "must hold latents of shape [n, 2], got none"),
        (
            {"latents": np.zeros((4, 2), np.int64)},
            [],
            "must hold floating-point latents, at least one, got 4 of torch.int",
        ),
        ({"latents": np.zeros((0, 2), np.float32)}, [], "must hold floating-point latents, at least one, got 0 of"),
        ({"latents": np.zeros((4, 2), np.float32)}, ["-n", "3"], "holds 4 latents: leave -n out, got 3"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(SystemExit, match="1"):
            cli.main(["sample", "swiss-roll", "--latents", str(path), *more, "--quiet", "--save", f"{tmp_path}/x.npz"])
        assert message in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match="1"):
        cli.main(["sample", "swiss-roll", "--latents", str(path), "--quiet", "--save", f"{tmp_path}/x.npz"])
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_latents_are_taken_back_by_the_flow_unless_a_solver_is_given(tmp_path: Path) -> None:
    path, back = tmp_path / "z.npz", tmp_path / "back.npz"
    z = torch.randn(4, 2)
    np.savez(path, latents=z)
    command = ["sample", "swiss-roll", "--latents", str(path), "--quiet", "--save", str(back)]
    for more, options in (([], {}), (["--solver", "heun", "--steps", "8"], {"solver": "heun", "steps": 8})):
        cli.main([*command, *more], standalone_mode=False)
        torch.testing.assert_close(
            torch.from_numpy(np.load(back)["samples"]), fastsde.decode("swiss-roll", z, **options)
        )


def test_a_missing_optional_library_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchode", None)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["likelihood", "swiss-roll", "--solver", "adaptive", "-n", "2", "--quiet"])
    error = capsys.readouterr().err
    assert "pip install 'fastsde[ode]'" in error
    assert "Traceback" not in error
