"""Own data and networks on the command line, from the file to the samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from fastsde import Guidance, Sampler, checkpoints, cli
from fastsde.data import Dataset, StreamedDataset
from fastsde.training import config_for, saved_config

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.labels = nn.Linear(3, 2), nn.Embedding(4, 2)

    def forward(self, x, t, label):
        return self.net(torch.cat((x, t[:, None]), 1)) + self.labels(label)

class Small(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
"""
QUICK = ["--steps", "2", "--batch-size", "4", "--log-every", "1", "--quiet", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_networks.py").write_text(NETWORK)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    points = np.random.default_rng(0).standard_normal((9, 2)).astype(np.float32)
    np.save("points.npy", points)
    np.savez("labelled.npz", x=points, label=np.arange(9) % 3)
    np.savez("named.npz", x=points, y=np.arange(9) % 3)
    np.save("ints.npy", np.arange(6).reshape(3, 2))
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (10, 8), (number * 50, 99, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path


def fastsde(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def worked(*arguments: str) -> str:
    result = fastsde(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("folder")
def test_a_network_by_name_is_trained_and_sampled_from_by_name() -> None:
    name, written = ["--model", "own_networks:Net"], "run/checkpoint.safetensors\n"
    train = ["train", "--data", "labelled.npz", "--dir", "run"]
    assert worked(*train, *name, *QUICK, "--clip-norm", "1", "--times", "importance", "--sample-every", "1") == written
    config = saved_config("run/checkpoint.safetensors")
    assert (config.model, config.data, config.condition_dropout) == ("own_networks:Net", "labelled.npz", 0.1)
    assert (config.clip_norm, config.times, config.sample_every) == (1.0, "importance", 1)
    assert sorted(path.name for path in Path("run/samples").iterdir()) == ["step-0000001.png", "step-0000002.png"]
    sys.modules.pop("own_networks")
    result = fastsde(*train, "--resume", "--quiet")
    assert "give the function that makes it, as --model own_networks:Net" in result.stderr
    assert "own_networks" not in sys.modules  # nothing that a file names is imported
    assert worked(*train, *name, "--resume", "--quiet") == written
    sample = ["sample", "run", *name, "-n", "4", "--steps", "3", "--quiet", "--device", "cpu"]
    assert worked(*sample, "--label", "2,0", "--guidance", "1.5", "--save", "x.npz", "--animate", "x.gif")
    loaded = checkpoints.load("run", model="own_networks:Net")
    expected = Sampler(loaded, steps=3, guidance=1.5)(4, model_kwargs={"label": torch.tensor([2, 0, 2, 0])})
    assert np.array_equal(np.load("x.npz")["samples"], expected.numpy())
    varies = ["--guidance", "3", "--guidance-interval", "0.5", "1", "--guidance-rescale", "0.7"]
    assert worked(*sample, "--label", "1", *varies, "--save", "y.npz")
    guidance = Guidance(3.0, interval=(0.5, 1.0), rescale=0.7)
    expected = Sampler(loaded, steps=3, guidance=guidance)(4, model_kwargs={"label": torch.ones(4, dtype=torch.int64)})
    assert np.array_equal(np.load("y.npz")["samples"], expected.numpy())
    lines = worked("info", "run", *name)
    assert lines.split()[:2] == ["model", "own_networks.Net"]
    assert "one of 3 classes, or none" in lines
    assert worked("export", "run", "net.safetensors", *name) == "net.safetensors\n"
    assert checkpoints.load("net.safetensors", model="own_networks:Net").factory == "own_networks:Net"
    for command in (["sample", "run"], ["info", "run"], ["export", "run", "y.safetensors"]):
        result = fastsde(*command)
        assert result.exit_code == 1
        assert "own_networks.Net: give the function that makes it, as --model own_networks:Net" in result.stderr


@pytest.mark.usefixtures("folder")
def test_a_run_may_be_logged_to_tensorboard() -> None:
    pytest.importorskip("tensorboard")
    worked("train", "--data", "points.npy", *QUICK, "--dir", "run", "--tensorboard")
    assert len(list(Path("run/tensorboard").iterdir())) == 1


@pytest.mark.usefixtures("folder")
def test_a_folder_of_images_is_trained_on_with_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [2, 3]}
    monkeypatch.setattr("fastsde.training.recipes._UNET", small)
    train = ["train", "--data", "photos", *QUICK, "--image-size", "6", "--flip", "--accumulation", "2"]
    assert worked(*train, "--weight-decay", "0.01") == "runs/photos/checkpoint.safetensors\n"
    loaded = checkpoints.load("runs/photos")
    assert (loaded.shape, loaded.value_range, loaded.has_null) == ((3, 6, 6), (-1.0, 1.0), True)
    assert loaded.conditions["label"].names == ("cat", "dog")
    sample = ["sample", "runs/photos", "-n", "3", "--steps", "2", "--quiet", "--device", "cpu"]
    sample += ["--save", "x.safetensors"]
    assert worked(*sample, "--label", "dog", "--guidance", "2", "--out", "x.png") == "x.safetensors\nx.png\n"
    for label, message in (("bird", "one of cat, dog, got 'bird'"), ("2", "a number from 0 to 1 or one of")):
        assert message in fastsde(*sample, "--label", label).stderr
    assert worked(*sample, "--guidance", "2") == "x.safetensors\n"  # towards labels that are drawn
    assert worked(*sample, "--label", "none") == "x.safetensors\n"
    wrong = fastsde("train", "--data", "photos", "--dir", "runs/photos", "--resume", "--no-flip", "--quiet")
    assert (wrong.exit_code, "has flip=True, got False" in wrong.stderr) == (1, True)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "ints.npy"], "ints.npy cannot be trained on: x must be uint8"),
        (["--data", "gone.npy"], "there is no file gone.npy"),
        (["--data", "gone"], "a file that ends in .npy, .npz, .safetensors, or a folder of images, got 'gone'"),
        (["--data", "named.npz"], "and 'condition', vectors), got y: rename them"),
        (["--data", "named.npz", "--model", "own_networks:Net"], "missing a required argument: 'label'"),
        (["--data", "labelled.npz", "--model", "own_networks:None"], "which cannot be imported"),
        (["--data", "labelled.npz", "--model", "own_networks"], "must be an architecture (a dict) or 'package.module"),
        (["--data", "points.npy", "--flip"], "flip must be False for samples of shape [2]"),
        (["--data", "points.npy", "--recipe", "tutorial"], "--recipe is for the data sets known by name"),
        (["--data", "points.npy", "--image-size", "3"], "image_size must be None for points.npy"),
        (["--data", "points.npy", "--workers", "-1"], "Invalid value for '--workers'"),
        (["--data", "points.npy", "--accumulation", "5"], "accumulation must be at most the batch_size, 4, got 5"),
        (["--data", "photos", "--image-size", "0"], "Invalid value for '--image-size'"),
        (["swiss-roll", "--data", "points.npy"], "--data is for your own data or the folder of MNIST"),
        ([], "give a DATASET, one of swiss-roll, digits, mnist, or your own --data"),
        (["--data", "points.npy", "--init", "swiss-roll"], "init must have the model of the run"),
    ],
    ids=lambda value: value[:32] if isinstance(value, str) else "",
)
def test_mistakes_in_training_are_one_line(arguments: list[str], message: str) -> None:
    result = fastsde("train", *arguments, *QUICK, "--dir", "run")
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert not isinstance(result.exception, (TypeError, AttributeError, KeyError))
    assert not Path("run").exists()


@pytest.mark.usefixtures("folder")
def test_mistakes_in_sampling_are_one_line() -> None:
    worked("train", "--data", "labelled.npz", *QUICK, "--dir", "run", "--condition-dropout", "0")
    sample = ["sample", "run", "-n", "2", "--steps", "2", "--quiet", "--save", "x.npz"]
    for arguments, message in (
        (["--label", "none"], "run needs a label: it was trained without dropping them"),
        (["--label", "7"], "label must be a number from 0 to 2, got '7'"),
        (["--label", "1", "--guidance", "2"], "--guidance needs a network trained with --condition-dropout"),
        (["--guidance-interval", "0.2", "0.8"], "--guidance-rescale need the weight of --guidance"),
        (["--label", "1", "--model", "own_networks:Net"], "model must be None for run/checkpoint.safetensors, which"),
    ):
        result = fastsde(*sample, *arguments)
        assert result.exit_code == 1, arguments
        assert message in result.stderr
    assert worked(*sample, "--label", "all") == "x.npz\n"
    assert worked(*sample) == "x.npz\n"
    result = fastsde("sample", "swiss-roll", "--label", "1", "-n", "2", "--save", "x.npz")
    assert "swiss-roll takes no labels: leave --label and --guidance out" in result.stderr


@pytest.mark.slow
def test_the_installed_command_finds_a_network_of_the_current_folder(folder: Path) -> None:
    # As an installed script, which does not have the current folder in Python's path; with workers and a stream.
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; from fastsde import cli; from fastsde.data import files;"
        "files._IN_MEMORY = 1; cli.main()"
    )
    train = ["train", "--data", "photos", *QUICK, "--image-size", "4", "--workers", "1", "--model", "picture_nets:make"]
    (folder / "picture_nets.py").write_text(
        "def make():\n    from fastsde.models import UNet\n    return UNet(3, 4, (2, 3), embedding=4, classes=2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *train], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len([json.loads(line) for line in (folder / "runs/photos/log.jsonl").read_text().splitlines()]) == 2
    # A network of this package is saved with its architecture, so that loading needs no name.
    assert checkpoints.load(folder / "runs/photos").shape == (3, 4, 4)


def test_the_recipe_for_own_data_has_the_network_that_fits() -> None:
    pixels = torch.zeros(5, 6, 7, 3, dtype=torch.uint8)
    labels = {"label": torch.arange(5) % 2}
    for x, shape in (
        (pixels, (3, 6, 7)),
        (pixels.movedim(-1, 1), (3, 6, 7)),
        (pixels[..., 0], (1, 6, 7)),
        (torch.zeros(5, 4, 6, 7), (4, 6, 7)),
    ):
        dataset = Dataset("own", x, conditions=labels)
        model = config_for(dataset, "own").model
        assert model["architecture"] == "UNet"  # type: ignore[index]
        assert (model["image_channels"], *model["image_size"], model["classes"]) == (*shape, 2)  # type: ignore[index]
        assert dataset.with_shape(shape).shape == shape
        streamed = StreamedDataset("own", [(each, 0) for each in x], described=dataset.described)
        assert config_for(streamed, "own").model == model
    for x, given in ((torch.zeros(5), {}), (torch.zeros(5, 6, 7), {"condition": torch.zeros(5, 2)})):
        dataset = Dataset("own", x, conditions=given)
        config = config_for(dataset, "own")
        assert config.model["architecture"] == "MLP"  # type: ignore[index]
        assert (tuple(config.model["shape"]), config.model["condition"]) == (dataset.shape, 2 if given else 0)  # type: ignore[index]
        assert config.condition_dropout == (0.1 if given else 0.0)
    for x, given, message in (
        (pixels, {"condition": torch.zeros(5, 2)}, "a UNet takes 'label', integers.*, got condition"),
        (torch.zeros(5, 2), {"label": torch.zeros(5)}, "an MLP takes 'label', integers, and .*, got label"),
        (torch.zeros(5, 2), {"condition": torch.zeros(5, 2, 2)}, ".*got condition"),
    ):
        with pytest.raises(ValueError, match=message):
            config_for(Dataset("own", x, conditions=given), "own")
        assert config_for(Dataset("own", x, conditions=given), "own", "a:b").model == "a:b"
