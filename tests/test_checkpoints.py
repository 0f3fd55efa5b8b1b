from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastsde import VPSDE, checkpoints
from fastsde.checkpoints import Checkpoint
from fastsde.files import atomic_path
from fastsde.models import MLP, UNet, from_config


@pytest.mark.parametrize("model", [MLP(3, (4, 5), "Tanh"), UNet(2, (9, 6), (3, 4, 5))], ids=["mlp", "unet"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, model: torch.nn.Module) -> None:
    saved = Checkpoint(model, VPSDE(0.2, 15.0), "v", "own", (0.0, 1.0), {"step": 3, "loss": 0.5})
    checkpoints.save(tmp_path / "a.safetensors", saved)
    loaded = checkpoints.load(tmp_path / "a.safetensors")
    assert loaded.describe() | {"value_range": None} == saved.describe() | {"value_range": None}
    assert loaded.value_range == (0.0, 1.0)
    assert loaded.shape == saved.shape
    for ours, theirs in zip(saved.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_rounds_once(tmp_path: Path) -> None:
    model = MLP(2, (4,))
    checkpoints.save(tmp_path / "a.safetensors", Checkpoint(model), torch.float16)
    weight = checkpoints.load(tmp_path / "a.safetensors").model.net[0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.net[0].weight.half().float())


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, AveragedModel, lambda model: nn.DataParallel(torch.compile(model))],
    ids=["torch.compile", "DataParallel", "AveragedModel", "nested"],
)
def test_of_a_wrapped_network_what_is_inside_is_saved(tmp_path: Path, wrap: Callable[..., nn.Module]) -> None:
    model = MLP(3, (4,))
    wrapped = wrap(model)
    checkpoint = Checkpoint(wrapped)
    assert checkpoint.model is wrapped
    assert checkpoint.shape == (3,)
    assert checkpoint.describe() == Checkpoint(model).describe()
    checkpoints.save(tmp_path / "a.safetensors", checkpoint)
    loaded = checkpoints.load(tmp_path / "a.safetensors").model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


class Derived(MLP):
    """A network that cannot be stored as an `MLP`."""


class Tied(nn.Module):
    """A network of the user's own, with tied weights, a buffer and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.norm(self.first(x))) * t[:, None]
        return y


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel], ids=["bare", "compiled", "dp"])
@pytest.mark.parametrize("kind", [Tied, Derived])
def test_a_network_of_the_users_own_is_loaded_into_what_makes_it(
    tmp_path: Path, kind: Callable[[], nn.Module], wrap: Callable[..., nn.Module]
) -> None:
    model, path = kind(), tmp_path / "a.safetensors"
    model.eval()(torch.randn(4, 2), torch.rand(4))
    checkpoints.save(path, Checkpoint(wrap(model), sample_shape=(2,), prediction="v", factory="networks:make"))
    with pytest.raises(
        ValueError, match=rf"weights of a network of your own, .*{kind.__name__}.*--model networks:make"
    ):
        checkpoints.load(path)
    torch.manual_seed(7)
    loaded = checkpoints.load(path, model=kind)
    assert loaded.shape == (2,)
    assert loaded.prediction == "v"
    assert loaded.factory == "networks:make"
    assert type(loaded.model) is kind
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
        assert loaded.model.state_dict()[name].dtype == value.dtype
    with pytest.raises(
        ValueError, match=r"has weights that do not fit the model, a Linear: missing bias, weight; unexpected"
    ):
        checkpoints.load(path, model=nn.Linear(3, 3))
    larger = kind()
    larger.register_parameter("more", nn.Parameter(torch.zeros(1)))
    before = {name: value.clone() for name, value in larger.state_dict().items()}
    with pytest.raises(ValueError, match="missing more"):
        checkpoints.load(path, model=larger)
    assert all(torch.equal(value, before[name]) for name, value in larger.state_dict().items())  # unchanged


def test_a_network_that_a_checkpoint_describes_is_not_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be None for .*, which knows its architecture, got"):
        checkpoints.load("swiss-roll", model=MLP())


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    other = MLP(2, (4,))
    other.net[2] = nn.Linear(4, 2, bias=False)
    with pytest.raises(ValueError, match=r"model must have the weights of its architecture .*differ: net\.2\.bias"):
        checkpoints.save(path, Checkpoint(other))
    with pytest.raises(TypeError, match=r"checkpoint must be a Checkpoint, got MLP"):
        checkpoints.save(path, MLP())
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, got torch\.int8"):
        checkpoints.save(path, Checkpoint(MLP()), torch.int8)
    with pytest.raises(ValueError, match=r"sample_shape must be given with a network that has no attribute shape"):
        _ = Checkpoint(nn.Identity()).shape
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_are_loaded_in_fp32_on_any_default_dtype(dtype: torch.dtype) -> None:
    expected = checkpoints.load("swiss-roll").model.state_dict()
    config = MLP().config
    torch.manual_seed(3)
    fresh = from_config(config).state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        loaded = checkpoints.load("swiss-roll").model.state_dict()
        torch.manual_seed(3)
        again = from_config(config).state_dict()
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in ((loaded, expected), (again, fresh)):
        assert all(value.dtype == torch.float32 for value in ours.values())
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_shipped_models_load_are_small_and_say_how_they_were_trained() -> None:
    assets = Path(checkpoints.__file__).parent / "assets"
    for name, file in checkpoints.SHIPPED.items():
        assert (assets / file).stat().st_size <= 5_000_000
        checkpoint = checkpoints.load(name)
        assert checkpoint.data == name
        assert checkpoint.record["step"] == checkpoint.record["config"]["steps"]
        assert 0 < checkpoint.record["loss"] < 1
        assert f"fastsde train {name}" in (assets / "README.md").read_text()


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\0" * 100], ids=["empty", "text", "ff", "zeros"])
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a safetensors file"):
        checkpoints.load(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_file_of_torch_save_is_told_from_a_damaged_one(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "roll.pt"
    torch.save(MLP().state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"roll\.pt was written by torch\.save, and is not read.*fastsde\.sample"):
        checkpoints.load(path)
    np.savez(tmp_path / "roll.npz", samples=np.zeros(3))  # another zip file
    with pytest.raises(ValueError, match=r"roll\.npz is not a safetensors file"):
        checkpoints.load(tmp_path / "roll.npz")


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    checkpoints.save(path, Checkpoint(MLP()))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a safetensors file, or is damaged"):
        checkpoints.load(path)


def test_other_safetensors_and_later_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"not a fastsde checkpoint.*torch\.load_file.*checkpoints\.save"):
        checkpoints.load(path)
    checkpoints.write(path, {}, Checkpoint(MLP()).describe() | {"format": 99})
    with pytest.raises(ValueError, match="format 99, this version reads format 1"):
        checkpoints.load(path)


def test_a_missing_file_names_the_shipped_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing.*swiss-roll, mnist"):
        checkpoints.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"architecture": "ResNet"}}, "architecture must be one of MLP, UNet, got 'ResNet'"),
        ({"model": {"architecture": ["MLP"]}}, "architecture must be one of MLP, UNet"),
        ({"model": {"architecture": "MLP", "hidden": [7]}}, "size mismatch"),
        ({"model": {"architecture": "MLP", "shape": "2"}}, "shape must be a sequence of ints, got str"),
        ({"model": {"architecture": "MLP", "shape": [2.0]}}, r"shape\[0\] must be an int, got float"),
        ({"model": {"architecture": "MLP", "depth": 3}}, "depth"),
        ({"model": [1]}, "model must be a dict, got list"),
        ({"sde": {"beta_min": 5.0, "beta_max": 1.0}}, "beta_min=5.0"),
        ({"sde": {"beta_min": "0.1"}}, "beta_min must be a number, got str"),
        ({"sde": {"beta": 1.0}}, "beta"),
        ({"sde": None}, "sde must be a dict, got NoneType"),
        ({"prediction": "noise"}, "prediction 'noise'"),
        ({"prediction": ["v"]}, "prediction must be a str, got list"),
        ({"data": 3}, "data must be a str, got int"),
        ({"record": "none"}, "record must be a dict, got str"),
        ({"value_range": 1.0}, "value_range must be .*got float"),
        ({"value_range": [1]}, r"value_range must be \(low, high\).*got \[1\]"),
        ({"value_range": [1, 0]}, r"value_range must be \(low, high\).*got \[1, 0\]"),
        ({"value_range": [0, "1"]}, r"value_range\[1\] must be a number, got str"),
    ],
    ids=repr,
)
def test_metadata_that_do_not_fit_are_an_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = MLP()
    path = tmp_path / "odd.safetensors"
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    checkpoints.write(path, weights, Checkpoint(model).describe() | change)
    with pytest.raises(ValueError, match=rf"odd\.safetensors .*{message}"):
        checkpoints.load(path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", 3.5])
def test_a_device_that_cannot_be_used_is_named(device: object) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        checkpoints.load("swiss-roll", device)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new, but not wh")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_obeys_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_path(tmp_path / "folder" / "a.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "folder" / "a.txt").stat().st_mode == plain.stat().st_mode
