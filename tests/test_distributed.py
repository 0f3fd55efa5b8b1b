"""Sampling and training on several ranks. Ranks run this file too: ``torchrun tests/test_distributed.py JOB``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsde
from fastsde import Guidance, NonFiniteError, Sampler, checkpoints, cli, distributed, noise, reference
from fastsde.data import swiss_roll
from fastsde.models import MLP
from fastsde.objective import Objective

RANKS = (1, 2, 3)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LAST = 2**64 - 20  # global indices wrap after twenty samples
STEPS, BATCH, LR = 5, 10, 1e-3  # three ranks get 4, 3 and 3 of the batch
TRAIN = ("train", "swiss-roll", "--batch-size", "10", "--log-every", "5", "--checkpoint-every", "10")
RUN, RESUMED = "runs/swiss-roll", "runs/resumed"


def environment(**values: str) -> dict[str, str]:
    """Returns a user's environment: no number of threads, and no variables of another group."""
    group = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group} | values


@contextlib.contextmanager
def started(command: list[object], cwd: Path, **values: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that is ended with the test, as are its children."""
    process = subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=environment(**values), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def torchrun(ranks: int, *arguments: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, ranks, *arguments]
    with started(command, cwd) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def errors(stderr: str) -> list[str]:
    """Returns the lines of this package among those of torchrun."""
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Three, two and one ranks that ran `work`, and their folders."""
    runs: dict[int, tuple[Path, subprocess.CompletedProcess[str]]] = {}
    for ranks in reversed(RANKS):
        folder = tmp_path_factory.mktemp(f"work-{ranks}")
        if ranks == 2:  # go on with the run that three have started
            shutil.copytree(runs[3][0] / RUN, folder / RESUMED)
        result = torchrun(ranks, Path(__file__).resolve(), "work", cwd=folder)
        assert result.returncode == 0, result.stderr
        runs[ranks] = (folder, result)
    return runs


def of_all(worked, name: str) -> list[Path]:
    """Returns the paths of a file of one, two and three ranks."""
    return [worked[ranks][0] / name for ranks in RANKS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.npz", "x.png", "x.gif"])
def test_the_files_of_the_roll_do_not_depend_on_the_number_of_ranks(worked, name: str) -> None:
    one, *others = [path.read_bytes() for path in of_all(worked, name)]
    assert all(other == one for other in others)


@pytest.mark.slow
def test_the_samples_are_those_of_a_plain_call(worked) -> None:
    model = checkpoints.load("swiss-roll")
    expected = fastsde.sample(model.model, (50, 2), prediction=model.prediction, steps=4, first_sample=LAST)
    drawn = np.load(worked[3][0] / "x.npz")["samples"]
    # The same except for the rounding of matrix products, which depends on their size and grows a little in early rows.
    np.testing.assert_allclose(drawn, expected.numpy(), rtol=0, atol=1e-5)
    first = fastsde.sample(model.model, (1, 2), prediction=model.prediction, steps=4, first_sample=0)
    np.testing.assert_allclose(drawn[20:21], first.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_first_rank_alone_prints_writes_and_shows_progress(worked) -> None:
    for ranks, (folder, result) in worked.items():
        checkpoint = "checkpoint.safetensors"
        trained = [f"{RUN}/{checkpoint}", *([f"{RESUMED}/{checkpoint}"] if ranks == 2 else [])]
        files = ["x.npz", "x.png", "x.gif", "digits.safetensors", "digits.png"]
        assert result.stdout.splitlines() == [*files[:3], *trained, *files[3:]]
        files += ["conditions.safetensors", "weights.safetensors", "runs"]
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
        mine = -(-13 // ranks)  # thirteen parts of four samples
        sampling, training = result.stderr.split(f"{RUN}: 20 steps of batch 10")
        assert f"{4 * mine}/{4 * mine}" in sampling
        assert sampling.count("100%") == 1
        assert training.startswith(f" on {ranks} processes, " if ranks > 1 else ", ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits.safetensors", "digits.png", "conditions.safetensors"])
def test_what_ranks_draw_does_not_depend_on_their_number(worked, name: str) -> None:
    # Five digits are two parts, so that the third rank has none.
    one, *others = [path.read_bytes() for path in of_all(worked, name)]
    assert all(other == one for other in others)


@pytest.mark.slow
def test_conditions_are_dealt_with_their_samples(worked) -> None:
    drawn = load_file(worked[3][0] / "conditions.safetensors")
    sampler = Sampler(conditioned, (2,), steps=4, guidance=GUIDANCE)
    options = {"model_kwargs": {"c": CONDITIONS, "w": 0.5}, "uncond_kwargs": {"c": 0 * CONDITIONS, "w": 0.5}}
    expected, way = sampler(len(CONDITIONS), seed=3, trajectory=2, **options)
    # Elementwise arithmetic, whose rounding does not depend on the batch.
    assert torch.equal(drawn["x"], expected)
    assert torch.equal(drawn["states"], way)


@pytest.mark.slow
def test_outside_of_a_group_one_process_draws_the_same(worked) -> None:
    x, states = distributed.sample(
        Sampler(conditioned, (2,), steps=4, guidance=GUIDANCE), len(CONDITIONS), seed=3, trajectory=2, part=2,
        model_kwargs={"c": CONDITIONS, "w": 0.5}, uncond_kwargs={"c": 0 * CONDITIONS, "w": 0.5},
    )  # fmt: skip
    saved = load_file(worked[2][0] / "conditions.safetensors")
    assert torch.equal(x, saved["x"])
    assert torch.equal(states, saved["states"])


@pytest.mark.parametrize(
    ("n", "max_batch", "part", "calls"),
    [
        (9, None, None, [4, 4, 1]),
        (200, None, None, [9] * 22 + [2]),
        (9, 2, None, [2, 2, 2, 2, 1]),
        (9, "auto", None, [4, 4, 1]),
        (9, 2, 5, [5, 4]),
        (0, None, None, []),
    ],
)
def test_the_parts(n: int, max_batch: int | str | None, part: int | None, calls: list[int]) -> None:
    seen: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return -x

    sampler = Sampler(model, (2,), steps=1, max_batch=max_batch, backend="eager")  # type: ignore[arg-type]
    assert distributed.sample(sampler, n, part=part).shape == (n, 2)
    assert seen == calls
    assert sampler.max_batch == max_batch


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be at least 0, got -1"),
        ({"n": 3, "part": 0}, ValueError, "part must be at least 1, got 0"),
        ({"n": 3, "first_sample": 2**64}, ValueError, r"first_sample must be in \[0, 2\^64\)"),
        ({"n": 3, "seed": -1}, ValueError, r"seed must be in \[0, 2\^64\)"),
        ({"n": 3, "trajectory": 0}, ValueError, "trajectory must be at least 1"),
        ({"n": 3, "model_kwargs": {"c": torch.zeros(2)}}, ValueError, "must have the batch of 3 first"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distributed.sample(Sampler(lambda x, t: -x, (2,), steps=1), **arguments)  # type: ignore[arg-type]


def test_the_sampler_must_be_one() -> None:
    with pytest.raises(TypeError, match="sampler must be a Sampler, got function"):
        distributed.sample(conditioned, 3)  # type: ignore[arg-type]


def test_alone_the_error_of_a_network_is_left_as_it_is() -> None:
    with pytest.raises(NonFiniteError, match=r"^the network returned NaN or infinity in row 0"):
        distributed.sample(Sampler(lambda x, t: x / 0, (2,), steps=1), 3)


# Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mistake_is_told_once_and_fails_the_job(tmp_path: Path) -> None:
    result = torchrun(2, "-m", "fastsde", "sample", "swiss-roll", "--clip", 1, "--max-batch", 2, cwd=tmp_path)
    assert result.returncode == 1
    assert len(errors(result.stderr)) == 1
    assert "clip bounds a predicted x_0" in errors(result.stderr)[0]
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_whose_samples_break_fails_the_job_with_its_error(tmp_path: Path) -> None:
    result = torchrun(2, Path(__file__).resolve(), "break", cwd=tmp_path, timeout=60)
    assert result.returncode == 1
    told = "rank 1, which draws samples 4 to 7: the network returned NaN or infinity in row 1, at time 0.75"
    assert errors(result.stderr) == [f"Error: {told}"]
    assert f"NonFiniteError: {told}" in result.stderr.split("Root Cause")[1]  # torchrun's own summary


@pytest.mark.slow
def test_a_rank_that_is_killed_fails_the_job(tmp_path: Path) -> None:
    result = torchrun(2, Path(__file__).resolve(), "kill", cwd=tmp_path, timeout=60)
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_without_torchrun_a_dead_rank_is_seen_by_the_first(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).resolve(), "exit"]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        started(command, tmp_path, RANK="1", LOCAL_RANK="1", **group) as second,
        started(command, tmp_path, RANK="0", LOCAL_RANK="0", **group) as first,
    ):
        _, stderr = first.communicate(timeout=60)
        assert second.wait(timeout=60) == 3
        assert first.returncode == 1, stderr
        assert len(errors(stderr)) == 1
        assert errors(stderr)[0].startswith("Error: a rank ended before its samples arrived (")


# The group ----------------------------------------------------------------------------------------------------------


def test_without_the_environment_of_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")  # as other launchers set it too
    assert not distributed.launched()
    with distributed.process_group() as here:
        assert here is None
    assert distributed.ranks() is None
    assert distributed.mean_over_ranks(2.5) == 2.5
    done: list[int] = []
    distributed.job(done.append)(1)
    assert done == [1]


def test_one_rank_computes_with_one_thread_as_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with fastsde.torchrun._steady_threads():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with fastsde.torchrun._steady_threads():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretends to the choice of a device that there are four GPUs; returns the list of devices that were set."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(fastsde.torchrun, "check_device", torch.device)
    return chosen


@pytest.mark.parametrize(
    ("here", "asked", "expected"),
    [
        (None, None, "cuda"),
        (None, "cuda:1", "cuda:1"),
        (distributed.Ranks(5, 8, 1, 4), None, "cuda:1"),
        (distributed.Ranks(5, 8, 1, 4), "cuda", "cuda:1"),
        (distributed.Ranks(5, 8, 1, 4), "cpu", "cpu"),
        (distributed.Ranks(1, 2, 0, 1), "cuda:3", "cuda:3"),  # two machines
    ],
)
def test_the_device_of_a_rank(
    four_gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    here: distributed.Ranks | None,
    asked: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(fastsde.torchrun, "ranks", lambda: here)
    assert distributed.device(asked) == torch.device(expected)
    assert four_gpus == ([] if here is None or expected == "cpu" else [torch.device(expected)])


def test_a_rank_that_is_shown_one_gpu_takes_it_unless_it_is_everybodys(
    four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(fastsde.torchrun, "ranks", lambda: distributed.Ranks(5, 8, 1, 4))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.device() == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun shows the same to all ranks
    with pytest.raises(ValueError, match="rank 5 has no GPU of its own, 4 ranks share a machine with 1"):
        distributed.device()


@pytest.mark.parametrize(
    ("here", "asked", "message"),
    [
        (distributed.Ranks(1, 2, 1, 2), "cuda:1", "device 'cuda:1' would be shared by the 2 ranks of this machine"),
        (distributed.Ranks(4, 5, 4, 5), None, "rank 4 has no GPU of its own, 5 ranks share a machine with 4"),
    ],
)
def test_devices_that_ranks_cannot_have(
    four_gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    here: distributed.Ranks,
    asked: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(fastsde.torchrun, "ranks", lambda: here)
    with pytest.raises(ValueError, match=message):
        distributed.device(asked)


# Data-parallel training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "world"), [(10, 1), (10, 2), (10, 3), (3, 3), (64, 7)])
def test_shards_are_balanced_and_cover_the_batch(batch_size: int, world: int) -> None:
    shards = [distributed.shard(batch_size, rank, world) for rank in range(world)]
    assert [i for one in shards for i in range(batch_size)[one]] == list(range(batch_size))
    lengths = [one.stop - one.start for one in shards]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    weights = [distributed.loss_weight(batch_size, rank, world) for rank in range(world)]
    assert weights == [length * world / batch_size for length in lengths]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 3), "batch_size must be at least the number of ranks, 3, got 2"),
        ((4, 3, 3), r"rank must be in \[0, 3\), got 3"),
        ((4, 0, 0), "world must be at least 1, got 0"),
    ],
)
def test_shards_that_cannot_be(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.shard(*arguments)


@pytest.mark.slow
def test_ranks_train_the_weights_that_one_trains(worked) -> None:
    # In float64. Adam moves a weight by lr m / (sqrt(v) + 1e-8), so that an error of the gradient is multiplied by at
    # most lr / 1e-8 a step, where the gradient is tiny. Sums of some hundred terms of order one in another order differ
    # by some 100 * 1.1e-16, and 5 * 1e-3 / 1e-8 * 1.1e-14 = 6e-9.
    one, *others = [load_file(path) for path in of_all(worked, "weights.safetensors")]
    names = [name.removeprefix("weighted.") for name in one if name.startswith("weighted.")]

    def distance(ours: dict[str, Tensor], kind: str) -> float:
        return max(float((ours[f"{kind}.{name}"] - one[f"weighted.{name}"]).abs().max()) for name in names)

    assert max(distance(other, "weighted") for other in others) <= 1e-8
    # Far from the start, and from the result of uneven shards without their weights.
    assert distance(one, "start") > 1e-3
    assert distance(others[1], "plain") > 1e-5


def logged(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.slow
def test_the_command_line_trains_the_same_run_on_any_number_of_ranks(worked) -> None:
    # Gradients are summed in another order, and Adam turns this rounding into at most a share of lr per step.
    one, *others = [logged(path / "log.jsonl") for path in of_all(worked, RUN)]
    weights, *of_others = [checkpoints.load(path).model.state_dict() for path in of_all(worked, RUN)]
    for other, theirs in zip(others, of_others, strict=True):
        assert [step for step, _ in one] == [step for step, _ in other] == [5, 10, 15, 20]
        assert [loss for _, loss in other] == pytest.approx([loss for _, loss in one], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=20 * 1e-3 * 1e-2)
    # Two ranks continue a run that three have started.
    assert [step for step, _ in logged(worked[2][0] / RESUMED / "log.jsonl")] == [5, 10, 15, 20, 25, 30]


@pytest.mark.slow
def test_a_run_that_diverges_tells_so_once(tmp_path: Path) -> None:
    result = torchrun(2, "-m", "fastsde", *TRAIN, "--steps", 20, "--lr", 1e30, "--quiet", cwd=tmp_path)
    assert result.returncode != 0
    assert len(errors(result.stderr)) == 1
    assert "try a lower lr" in errors(result.stderr)[0]


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_trains_fails_the_job(tmp_path: Path) -> None:
    command = [*TORCHRUN, 2, "-m", "fastsde", *TRAIN, "--steps", 1_000_000]
    with started(command, tmp_path) as process:
        log, end = tmp_path / RUN / "log.jsonl", time.monotonic() + 60
        while not log.exists() and time.monotonic() < end:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Signal 9 (SIGKILL)" in stderr
    assert checkpoints.load(tmp_path / RUN).record["step"] % 10 == 0


@pytest.mark.slow
def test_logged_losses_are_those_of_the_whole_batch(worked) -> None:
    one, *others = [load_file(path)["losses"] for path in of_all(worked, "weights.safetensors")]
    assert len(one) == STEPS
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-10, atol=0)  # losses of order one, for weights that close


# What ranks run -----------------------------------------------------------------------------------------------------

CONDITIONS = torch.arange(7.0)
GUIDANCE = Guidance(CONDITIONS / 2, interval=(0.2, 0.8))  # a scale for each sample


def conditioned(x: Tensor, t: Tensor, c: Tensor, w: float) -> Tensor:
    return w * c[:, None] - x


def train(weighted: bool) -> tuple[nn.Module, list[float]]:
    """Takes a few steps of `fastsde.reference.train_step` on this rank's shard, with DistributedDataParallel."""
    here, objective = distributed.ranks(), Objective(prediction="eps")
    assert here is not None
    data = swiss_roll(100).x.double()
    model = initial_model()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    keys = noise.sample_keys(0, BATCH)[distributed.shard(BATCH, here.rank, here.world)]
    weight = distributed.loss_weight(BATCH, here.rank, here.world) if weighted else 1.0
    losses = []
    for step in range(STEPS):
        index, k, z = reference.training_draws(keys, step, len(data), (2,), objective)
        k, z = k.double(), z.double()
        x_in, tau, _ = reference.perturb(data, None, step, k, index=index, z=z)
        loss = weight * reference.dsm_loss(parallel(x_in, tau), data, None, step, k, index=index, z=z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(distributed.mean_over_ranks(loss.item()))
    return model, losses


def initial_model() -> nn.Module:
    torch.manual_seed(0)
    return MLP(2, (16, 16)).double()


def command(*arguments: str) -> None:
    cli.main(arguments, standalone_mode=False)


def work() -> None:
    """Runs everything that does not fail, in a group for each command and one for the rest: starting takes seconds."""
    roll = ["sample", "swiss-roll", "-n", "50", "--steps", "4", "--first-sample", str(LAST)]
    command(*roll, "--out", "x.png", "--save", "x.npz", "--animate", "x.gif")
    command(*TRAIN, "--steps", "20", "--lr-schedule", "constant")
    if Path(RESUMED).exists():
        command(*TRAIN, "--steps", "30", "--resume", "--dir", RESUMED)
    with distributed.process_group() as here:
        assert here is not None
        assert torch.get_num_threads() == 1
        digits = ["sample", "mnist", "-n", "5", "--steps", "2", "--solver", "dpm_solver_pp_2m", "--quiet"]
        command(*digits, "--save", "digits.safetensors", "--out", "digits.png")
        drawn = distributed.sample(
            Sampler(conditioned, (2,), steps=4, guidance=GUIDANCE), len(CONDITIONS), seed=3, trajectory=2, part=2,
            model_kwargs={"c": CONDITIONS, "w": 0.5}, uncond_kwargs={"c": 0 * CONDITIONS, "w": 0.5},
        )  # fmt: skip
        own = torch.Generator().manual_seed(here.rank)  # of which rank 0's is taken
        seeded = distributed.sample(
            Sampler(conditioned, (2,), steps=4), 4, seed=own, model_kwargs={"c": CONDITIONS[:4], "w": 0.5}
        )
        break_together(here)
        trained = {"weighted": train(True), "plain": train(False), "start": (initial_model(), [])}
        assert (drawn is None) == (here.rank != 0)
        if drawn is not None:
            save_file({"x": drawn[0], "states": drawn[1], "seeded": seeded}, "conditions.safetensors")
            weights = {f"{name}.{k}": v for name, (model, _) in trained.items() for k, v in model.state_dict().items()}
            save_file({**weights, "losses": torch.tensor(trained["weighted"][1])}, "weights.safetensors")
    assert distributed.ranks() is None
    with distributed.process_group():  # leftovers of the first group in torchrun's store do no harm
        assert distributed.mean_over_ranks(here.rank) == (here.world - 1) / 2


def break_together(here: distributed.Ranks) -> None:
    """Raises an error of the last rank on all ranks, which then continue together."""

    def infinite(x: Tensor, t: Tensor) -> Tensor:
        return x / 0 if here.rank == here.world - 1 else -x

    def mistaken(x: Tensor, t: Tensor) -> Tensor:
        if here.rank == here.world - 1:
            raise KeyError("conditions")
        return -x

    of_rank = rf"^rank {here.world - 1}, which draws samples \d+ to 23: " if here.world > 1 else "^"
    with pytest.raises(NonFiniteError, match=of_rank + "the network returned NaN or infinity in row 0"):
        distributed.sample(Sampler(infinite, (2,), steps=2), 24)
    own = here.rank == here.world - 1
    with pytest.raises(KeyError if own else RuntimeError, match="conditions" if own else of_rank + "'conditions'$"):
        distributed.sample(Sampler(mistaken, (2,), steps=2), 24)


@distributed.job
def fail(how: str) -> None:
    """Makes rank 1 fail in its second row, while rank 0 waits for its samples."""
    here = distributed.ranks()
    assert here is not None

    def model(x: Tensor, t: Tensor) -> Tensor:
        if here.rank == 0 or t[0] > 0.8:
            return -x
        time.sleep(0.5)  # until rank 0 waits
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        return x / 0

    distributed.sample(Sampler(model, (2,), solver="ddim", prediction="eps", steps=4), 8)
    print("done")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work()
    else:
        fail(sys.argv[1])
