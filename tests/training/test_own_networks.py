"""Networks of every kind given to the trainer: trained, resumed, saved and sampled from, or refused by name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsde import Sampler, checkpoints, noise, sample
from fastsde.data import Dataset
from fastsde.distributed import Ranks
from fastsde.models import MLP
from fastsde.sde import EDM
from fastsde.training import TrainConfig, Trainer
from fastsde.training.captured import CapturedSteps
from fastsde.training.native_mlp import NativeSteps
from fastsde.training.steps import EagerSteps

pytestmark = pytest.mark.usefixtures("every_checkpoint")

LABELS = torch.arange(30) % 3
DATA = Dataset(
    "own",
    torch.randn(30, 2, generator=torch.Generator().manual_seed(0)),
    conditions={"label": LABELS, "place": LABELS[:, None].float()},
)
CONFIG = TrainConfig("own", "", steps=8, batch_size=6, checkpoint_every=3, log_every=4, ema_decay=0.9, seed=5)


class Net(nn.Module):
    """A network with whatever may be in one: layers that depend on the mode, ties, buffers, parts without use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.norm, self.drop, self.last = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("phase", torch.tensor([1.0 + 2.0j]))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.register_buffer("nothing", None)
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.shape = "not that of a sample"
        self.labels = nn.Embedding(4, 8)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if self.training:
            self.calls += 1
        h = self.norm(self.first(torch.cat((x, t[:, None].to(x.dtype)), 1)))
        h = h if label is None else h + self.labels(label)
        h = self.frozen(self.third(self.second(torch.relu(self.drop(h)))))
        return self.last(h) * self.scale.to(h.dtype) * self.phase.real.to(h.dtype)


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoints.read(folder / "checkpoint.safetensors")[0]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_run_of_any_network_is_a_function_of_its_config_and_resumes_to_the_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, condition_dropout=0.2)
    torch.manual_seed(9)
    trainer = Trainer(config, tmp_path / "whole", model=net(), dataset=DATA)
    before = torch.get_rng_state()
    trainer.train(progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.model.training
    assert trainer.model.calls == 8
    cut = Trainer(config, tmp_path / "cut", model=net(), dataset=DATA)
    save, saves = cut._save, []

    def save_then_die() -> None:
        save()
        saves.append(cut.step)
        if saves == [0, 3]:
            raise RuntimeError("killed")

    cut._save = save_then_die  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        cut.train(progress=False)
    torch.manual_seed(7)  # the generator of the dropout must not matter
    again = Trainer(config, tmp_path / "cut", model=net(2), dataset=DATA, resume=True)
    assert again.step == 3
    again.train(progress=False)
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    # The moving average has the statistics of the network, and does not update them itself.
    assert trainer.ema is not None
    assert not trainer.ema.training
    for ours, theirs in zip(trainer.ema.buffers(), trainer.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(trainer.ema.first.weight, trainer.model.first.weight)
    assert torch.equal(trainer.ema.frozen.weight, net().frozen.weight)
    assert trainer.model.third.weight is trainer.model.second.weight
    assert trainer.ema.third.weight is trainer.ema.second.weight


def test_a_checkpoint_of_any_network_is_sampled_from(tmp_path: Path) -> None:
    config = replace(CONFIG, condition_dropout=0.2, times="importance", accumulation=2)
    Trainer(config, tmp_path, model=net(), dataset=DATA).train(progress=False)
    with pytest.raises(ValueError, match=r"network of your own, .*Net: give the function that makes it, as --model"):
        checkpoints.load(tmp_path)
    loaded = checkpoints.load(tmp_path, model=Net)
    stored = tensors(tmp_path)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, stored[f"model.{name}"])
    assert (loaded.shape, loaded.has_null, list(loaded.conditions)) == ((2,), True, ["label"])  # it takes no "place"
    sampler = Sampler(loaded, steps=4)
    u = noise.uniform(noise.sample_keys(5, 4), 0, (1,), noise.STREAM_OTHER)[1:, 0]
    label = loaded.conditions["label"].draw(u)
    drawn = sampler(3, seed=5, first_sample=1)  # without a label it draws one
    torch.testing.assert_close(drawn, sampler(3, seed=5, first_sample=1, model_kwargs={"label": label}))
    none = sampler(3, model_kwargs={})
    torch.testing.assert_close(none, sampler(3, model_kwargs={"label": torch.tensor([3, 3, 3])}))
    guided = Sampler(loaded, steps=4, guidance=1.0)(3, model_kwargs={"label": torch.tensor([0, 1, 2])})
    plain = sampler(3, model_kwargs={"label": torch.tensor([0, 1, 2])})
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-4)
    for wrong, error in (([0, 1, 4], ValueError), ([-1, 0, 0], ValueError), ([0.5, 1.0, 2.0], TypeError)):
        with pytest.raises(error, match=r"model_kwargs\['label'\] must be .*labels from 0 to 2, or 3 for none"):
            sampler(3, model_kwargs={"label": torch.tensor(wrong)})
    with pytest.raises(ValueError, match=r"weights that do not fit the model, MLP: missing net.0.bias"):
        checkpoints.load(tmp_path, model=MLP)


def test_without_dropped_labels_there_is_nothing_to_guide_away_from(tmp_path: Path) -> None:
    checkpoint = Trainer(replace(CONFIG, steps=1), tmp_path, model=net(), dataset=DATA).train(progress=False)
    assert not checkpoint.has_null
    labels = {"label": torch.tensor([0, 1])}
    assert Sampler(checkpoint, steps=2)(2, model_kwargs=labels).shape == (2, 2)
    assert Sampler(checkpoint, steps=2)(2).isfinite().all()  # of labels that are drawn
    with pytest.raises(ValueError, match=r"model_kwargs must be given, as the network was trained without dropping"):
        Sampler(checkpoint, steps=2)(2, model_kwargs={})
    with pytest.raises(ValueError, match=r"uncond_kwargs must be given, as the network was trained without dropping"):
        Sampler(checkpoint, steps=2, guidance=2.0)(2, model_kwargs=labels)
    own = Sampler(checkpoint, steps=2, guidance=2.0)(2, model_kwargs=labels, uncond_kwargs={"label": labels["label"]})
    assert own.isfinite().all()


@pytest.mark.slow
def test_dropout_in_captured_steps_depends_on_the_step_alone(graphs: Any, tmp_path: Path) -> None:
    weights = []
    for first in (0, 6):
        model = net()
        model.norm = nn.LayerNorm(8)
        model.calls = None
        model.forward = lambda x, t, model=model: model.last(model.drop(model.first(torch.cat((x, t[:, None]), 1))))
        config = replace(CONFIG, steps=20)
        trainer = Trainer(config, tmp_path / str(first), model=model, dataset=DATA)
        steps = CapturedSteps(trainer.work())
        done = 0
        for count in ([1] * 3 + [5, 1]) if first == 0 else [1] * 9:
            steps.take(done, count)
            done += count
        weights.append(model.first.weight)
    assert torch.equal(*weights)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = MLP(2, (4,)), set[str]()

    def forward(self, x: Tensor, t: Tensor, **others: Tensor) -> Tensor:
        self.seen |= others.keys()
        return self.net(x, t)


class Named(Keywords):
    def forward(self, x: Tensor, t: Tensor, *, place: Tensor | None = None) -> Tensor:  # type: ignore[override]
        self.seen |= set() if place is None else {"place"}
        return self.net(x, t)


class Odd(Keywords):
    def forward(self, label: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(label, place)  # x and t under odd names


class PositionalOnly(Keywords):
    def forward(self, x: Tensor, t: Tensor, /, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
        self.seen |= set() if label is None else {"label"}
        return self.net(x, t)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [(Keywords, {"label", "place"}), (Named, {"place"}), (Odd, set()), (PositionalOnly, {"label"})],
)
def test_a_network_gets_the_conditions_that_it_has_arguments_for(kind: Any, seen: set[str], tmp_path: Path) -> None:
    trainer = Trainer(replace(CONFIG, steps=1), tmp_path, model=kind(), dataset=DATA)
    trainer.train(progress=False)
    assert trainer.model.seen == set(trainer.conditions) == seen


class PositionalLabel(Keywords):
    def forward(self, x: Tensor, t: Tensor, label: Tensor, /) -> Tensor:  # type: ignore[override]
        return x


class NeedsOther(Keywords):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return x


class Broadcasts(Keywords):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(x, t)[:, :1]


class Structured(Keywords):
    def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
        return (self.net(x, t),)


class FewLabels(Net):
    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(3, 8)  # none for "no label"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (PositionalLabel, ValueError, r"model must be callable as model\(x, t, \*\*conditions\), got PositionalLabel"),
        (NeedsOther, ValueError, r"model\(x, t, label=...\) fails|missing a required argument: 'y'"),
        (lambda: nn.Identity(), ValueError, "must have parameters to train, got a Identity without any"),
        (lambda: MLP().double(), ValueError, r"parameters in fp32, got net.0.weight in torch.float64"),
        (lambda: MLP().requires_grad_(False), ValueError, "must have parameters to train, got a MLP without any"),
        (lambda: MLP(2, classes=7), ValueError, "the model takes a 'label' of 7, the data have one of 3 classes"),
        (lambda: MLP(2, condition=1), ValueError, "the data must have the condition 'condition' that the model takes"),
        (lambda: MLP(3), ValueError, r"the model takes samples of shape \(3,\), the data have \(2,\)"),
        (Broadcasts, ValueError, r"model must return the shape of x, \[6, 2\], got \[6, 1\]"),
        (Structured, TypeError, "model must return a tensor, got tuple"),
        (FewLabels, IndexError, r"failed with label \d .. 3 .with condition_dropout, one more label stands for none"),
        (lambda: None, ValueError, "model must be given to the Trainer, or named in the config, got neither"),
        (lambda: MLP, TypeError, "model must be a Module, got type"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if isinstance(value, type) else "",
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Trainer(replace(CONFIG, condition_dropout=0.9), tmp_path, model=model(), dataset=DATA).train(progress=False)


def test_a_sequential_is_trained_on_points_and_times(tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))

    network = made()
    before = [each.clone() for each in network.parameters()]
    data = Dataset("mine", torch.randn(64, 2))
    config = TrainConfig("mine", "", steps=2, batch_size=8, ema_decay=0.0)
    checkpoint = Trainer(config, tmp_path, model=network, dataset=data).train(progress=False)
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    loaded = checkpoints.load(tmp_path, model=made)
    x = sample(network.eval(), (3, 2), prediction=checkpoint.prediction, steps=4)
    assert torch.equal(sample(checkpoint, (3, 2), steps=4), x)
    assert torch.equal(sample(loaded, (3, 2), steps=4), x)


def test_lazy_layers_must_have_been_called_once(tmp_path: Path) -> None:
    model = Keywords()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch: lazy modules are a new feature
        model.net = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"got net.0.weight of a lazy layer: call it once before"):
        Trainer(CONFIG, tmp_path, model=model, dataset=DATA)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    wrapped = [nn.DataParallel(MLP()), torch.compile(MLP(), backend="eager")]
    for number, model in enumerate(wrapped):
        trainer = Trainer(replace(CONFIG, steps=1), tmp_path / str(number), model=model, dataset=DATA)
        assert type(trainer.model) is MLP
        trainer.train(progress=False)
        assert checkpoints.load(tmp_path / str(number)).architecture == MLP().config
    Trainer(replace(CONFIG, steps=1), tmp_path / "own", model=nn.DataParallel(net()), dataset=DATA).train(False)
    loaded = checkpoints.load(tmp_path / "own", model=lambda: nn.DataParallel(Net()))
    assert isinstance(loaded.model, Net)


def test_a_run_goes_on_with_its_own_network_only(tmp_path: Path) -> None:
    Trainer(replace(CONFIG, steps=2), tmp_path, model=net(), dataset=DATA).train(progress=False)
    smaller, other = net(), net()
    smaller.first = nn.Linear(3, 1)  # it would fit by broadcasting
    other.unused = nn.Identity()
    for model, message in ((smaller, "first.bias, first.weight differ"), (other, "unused.bias, unused.weight differ")):
        with pytest.raises(ValueError, match=f"model must be that of the run, got another one: .*{message}"):
            Trainer(replace(CONFIG, steps=2), tmp_path, model=model, dataset=DATA, resume=True)
    other = net()
    other.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"or of another network than this one: it lacks .*weights.more.weight"):
        Trainer(replace(CONFIG, steps=2), tmp_path, model=other, dataset=DATA, resume=True)
    more = Dataset("own", DATA.x, conditions={"label": torch.arange(30) % 4})
    with pytest.raises(ValueError, match=r"must have the conditions of the run in .*classes=3.* got .*classes=4"):
        Trainer(replace(CONFIG, steps=2), tmp_path, model=net(), dataset=more, resume=True)


def test_a_run_from_the_weights_of_another_stays_in_its_mode(tmp_path: Path) -> None:
    Trainer(replace(CONFIG, steps=2), tmp_path / "first", model=net(), dataset=DATA).train(progress=False)
    model = net(3)
    trainer = Trainer(replace(CONFIG, init=str(tmp_path / "first")), tmp_path / "next", model=model, dataset=DATA)
    assert trainer.model is model
    assert model.training
    assert torch.equal(model.first.weight, tensors(tmp_path / "first")["model.first.weight"])
    assert trainer.earlier_steps == 2
    with pytest.raises(ValueError, match="weights that do not fit the model, a Keywords: missing net"):
        Trainer(replace(CONFIG, init=str(tmp_path / "first")), tmp_path / "other", model=Keywords(), dataset=DATA)


def test_one_network_in_two_trainers_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = net().eval()
    for name in ("a", "b"):
        trainer = Trainer(replace(CONFIG, steps=3), tmp_path / name, model=model, dataset=DATA)
        before = model.first.weight.detach().clone()
        trainer.train(progress=False)
        assert not torch.equal(model.first.weight, before)
    assert not model.training
    assert model.calls == 0
    assert torch.equal(tensors(tmp_path / "b")["weights.first.weight"], model.first.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"sde": EDM(), "prediction": "x0", "preconditioning": "edm", "weighting": "target", "times": "lognormal"},
        {"prediction": "flow", "weighting": "likelihood", "times": "importance", "precision": "bf16"},
    ],
    ids=["edm", "flow"],
)
def test_any_objective_with_conditions(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, condition_dropout=0.3, clip_norm=1.0, weight_decay=0.1, **options)
    Trainer(config, tmp_path, model=net(), dataset=DATA).train(progress=False)
    loaded = checkpoints.load(tmp_path, model=net)
    sampler = Sampler(loaded, solver="heun", steps=5, guidance=1.5)
    assert sampler(4, model_kwargs={"label": torch.tensor([0, 1, 2, 3])}).isfinite().all()
    checkpoints.save(tmp_path / "exported.safetensors", loaded, torch.float16)
    again = checkpoints.load(tmp_path / "exported.safetensors", model=net)
    assert (again.conditions, again.has_null, again.shape) == (loaded.conditions, True, (2,))


@pytest.mark.slow
def test_a_parameter_without_use_is_no_hindrance_in_bf16(graphs: Any, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(torch.cat((x, t[:, None].to(x.dtype)), 1))

    config = replace(CONFIG, precision="bf16", weight_decay=0.5)
    model, data = Plain(), Dataset("own", DATA.x)
    before = model.unused.weight.detach().clone()
    trainer = Trainer(config, tmp_path, model=model, dataset=data)
    steps = CapturedSteps(trainer.work())
    for step in range(5):
        steps.take(step, 1)
    assert torch.equal(model.unused.weight, before)  # as with PyTorch's optimizer, no decay either


def test_hooks_on_gradients_are_not_taken_natively(tmp_path: Path) -> None:
    trainer = Trainer(replace(CONFIG, steps=2), tmp_path, model=MLP(2, (8,)), dataset=Dataset("own", DATA.x))
    first = trainer.model.net[0]
    before = first.weight.detach().clone()
    first.weight.register_hook(torch.zeros_like)
    assert isinstance(trainer._steps(trainer.work()), EagerSteps)
    trainer.train(progress=False)
    assert torch.equal(first.weight, before)
    assert not torch.equal(first.bias, torch.zeros_like(first.bias))


def test_random_layers_are_not_taken_natively(tmp_path: Path) -> None:
    class Dropped(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(rate), nn.SiLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(torch.cat((x, t[:, None]), 1))

    trainer = Trainer(CONFIG, tmp_path, model=Dropped(0.5), dataset=Dataset("own", DATA.x))
    assert isinstance(trainer._steps(trainer.work()), EagerSteps)
    trainer.model.eval()
    assert isinstance(trainer._steps(trainer.work()), (NativeSteps, EagerSteps))
    assert EagerSteps(trainer.work(), Ranks()).take(0, 1).isfinite().all()
