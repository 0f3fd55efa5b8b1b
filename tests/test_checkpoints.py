from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsde import VPSDE, checkpoints
from fastsde.checkpoints import Checkpoint
from fastsde.files import atomic_path
from fastsde.models import MLP, UNet


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


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    checkpoints.save(path, Checkpoint(MLP()))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a safetensors file, or is damaged"):
        checkpoints.load(path)


def test_other_safetensors_and_later_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of fastsde"):
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
        ({"prediction": "flow"}, "prediction 'flow'"),
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
