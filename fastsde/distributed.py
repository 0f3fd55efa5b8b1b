"""Several GPUs and machines under ``torchrun``: sampling sharded by index, and what data-parallel training needs.

    torchrun --nproc-per-node 4 -m fastsde sample mnist -n 10000 --save digits.npz

A sample is a function of its global index, so that the ranks need not talk while they draw. The network's rounding may
depend on how many samples it is called with: the work is cut into parts whose size does not depend on how many ranks
there are, and so neither does a bit of the result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .reference import NonFiniteError
from .sampler import Sampler
from .torchrun import Ranks, device, job, launched, process_group, ranks
from .validation import check_instance, check_int, check_kwargs

__all__ = [
    "Ranks",
    "any_rank",
    "device",
    "job",
    "launched",
    "loss_weight",
    "mean_over_ranks",
    "process_group",
    "ranks",
    "sample",
    "shard",
]

# How long rank 0 waits for the samples of the slowest rank. Work may take any time, and a rank that dies is seen at
# once, by its closed connection and by torchrun, which ends the others: no limit that work could run into is wanted.
_WORK = timedelta(days=365)
_PARTS, _SMALLEST_PART = 24, 4


# Sampling -----------------------------------------------------------------------------------------------------------


def sample(
    sampler: Sampler,
    n: int,
    *,
    seed: int = 0,
    first_sample: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    trajectory: int | None = None,
    progress: bool = False,
    part: int | None = None,
) -> Any:
    """Draws ``n`` samples on all ranks together; every rank must call it, with the same arguments.

    Outside of a group it draws the same samples alone, to the bit where device and number of threads are the same.

    Args:
        sampler: this rank's, on its own device.
        model_kwargs, uncond_kwargs: as for `fastsde.sample`, with all ``n`` of the batch on every rank.
        progress: show rank 0's work as a bar on stderr.
        part: how many samples a rank runs at once. By default the sampler's ``max_batch`` where that is a number, else
            a 24th of ``n`` but at least 4, so that more than 24 ranks want a smaller one. Another may round otherwise.
        seed, first_sample, trajectory: as for `fastsde.sample`.

    Returns:
        On rank 0 the samples ``[n, *shape]`` on the CPU, with ``trajectory`` a pair of them and the states ``[steps //
        trajectory + 1, n, *shape]``; None on the other ranks.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        NonFiniteError: on every rank, where samples, which the message names, became NaN or infinity.
        RuntimeError: where another rank has had an error, or has ended.
    """
    check_instance("sampler", sampler, Sampler)
    check_int("n", n, 0)
    check_int("first_sample", first_sample, 0, 2**64)
    usual = sampler.max_batch if isinstance(sampler.max_batch, int) else max(_SMALLEST_PART, -(-n // _PARTS))
    own = copy.copy(sampler)  # it splits a rank's run of samples into the parts
    own.max_batch = size = usual if part is None else check_int("part", part, 1)
    here = ranks() or Ranks()
    bounds = [min(n, size * _first(-(-n // size), rank, here.world)) for rank in range(here.world + 1)]
    mine = slice(bounds[here.rank], bounds[here.rank + 1])
    conditions = {
        name: _rows(check_kwargs(name, given, n, sampler.device), mine)
        for name, given in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs))
        if given is not None
    }
    options: dict[str, Any] = {"trajectory": trajectory, "progress": progress and here.rank == 0, **conditions}
    start, end = ((first_sample + i) % 2**64 for i in (mine.start, mine.stop - 1))
    with _working_group(here) as group:
        error: Exception | None = None
        try:
            drawn = own(mine.stop - mine.start, seed=seed, first_sample=start, **options)
        except Exception as raised:
            error = raised
        _raise_together(error, f"rank {here.rank}, which draws samples {start} to {end}", here, group)
        if trajectory is None:
            return _gather(drawn, 0, bounds, here, group)
        x, states = (_gather(value, axis, bounds, here, group) for axis, value in enumerate(drawn))
        return None if x is None else (x, states)


def _first(items: int, rank: int, world: int) -> int:
    """The first of a rank's items, where all are dealt out in runs that differ by at most one: the long ones first."""
    return -(-items * rank // world)


def _rows(kwargs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in kwargs.items()}


@contextmanager
def _working_group(here: Ranks) -> Iterator[Any]:
    """A Gloo group to collect samples in, with the patience that takes; None for one rank.

    After an error it is not closed, so that the others do not have an error of it before this rank has told its own.
    """
    if here.world == 1:
        yield None
        return
    from torch import distributed as dist

    mean_over_ranks(0.0)  # all are here, or this fails in the time that their group allows: only then be patient
    group: Any = dist.new_group(backend="gloo", timeout=_WORK)
    yield group
    dist.barrier(group)  # all is received: to leave before could cut it off
    dist.destroy_process_group(group)


def _raise_together(error: Exception | None, who: str, here: Ranks, group: Any) -> None:
    """Raises on all ranks where one has had an error, so that none waits for the samples of that one."""
    if here.world == 1:
        if error is not None:
            raise error
        return
    from torch import distributed as dist

    told: list[tuple[bool, str] | None] = [None] * here.world
    mine = None if error is None else (isinstance(error, NonFiniteError), f"{who}: {error}")
    try:
        dist.all_gather_object(told, mine, group=group)
    except RuntimeError as lost:
        if error is None:
            raise RuntimeError(f"a rank ended before its samples had come ({lost})") from lost
    if error is not None and not isinstance(error, NonFiniteError):
        raise error
    for not_finite, message in filter(None, [mine, *told]):
        raise (NonFiniteError if not_finite else RuntimeError)(message) from error


def _gather(own: Tensor, axis: int, bounds: list[int], here: Ranks, group: Any) -> Tensor | None:
    """On rank 0 the tensors of all ranks joined along an axis, on the CPU: rank r has bounds[r] to bounds[r + 1]."""
    from torch import distributed as dist

    own = own.cpu().contiguous()
    if here.world == 1:
        return own
    if here.rank != 0:
        if own.numel():
            dist.send(own, 0, group=group)
        return None
    whole = own.new_empty((*own.shape[:axis], bounds[-1], *own.shape[axis + 1 :]))
    for source in range(here.world):
        place = whole.narrow(axis, bounds[source], bounds[source + 1] - bounds[source])
        received = own if source == 0 else own.new_empty(place.shape)
        if source and received.numel():
            try:
                dist.recv(received, source, group=group)
            except RuntimeError as error:
                raise RuntimeError(f"rank {source} ended before its samples had come ({error})") from error
        place.copy_(received)
    return whole


# Data-parallel training ---------------------------------------------------------------------------------------------


def shard(batch_size: int, rank: int, world: int) -> slice:
    """The positions of the global batch that are a rank's own: runs in order that differ by at most one in length.

    Position i of the global batch has key i wherever it is computed: a rank takes ``sample_keys(seed,
    batch_size)[shard(batch_size, rank, world)]``.

    Raises:
        ValueError: where the batch has fewer samples than there are ranks.
    """
    check_int("world", world, 1)
    check_int("rank", rank, 0, world)
    if check_int("batch_size", batch_size, 1) < world:
        raise ValueError(f"batch_size must be at least the number of ranks, {world}, got {batch_size}")
    return slice(_first(batch_size, rank, world), _first(batch_size, rank + 1, world))


def loss_weight(batch_size: int, rank: int, world: int) -> float:
    """What a rank multiplies the mean loss over its `shard` with, before the backward pass.

    DistributedDataParallel averages gradients over the ranks: (1 / world) sum_r w_r grad(mean over shard r) is the
    gradient of the mean over the whole batch for w_r = world |shard r| / batch_size, whatever the shards' lengths.
    """
    mine = shard(batch_size, rank, world)
    length: int = mine.stop - mine.start
    return length * world / batch_size


def any_rank(flag: bool) -> bool:
    """Returns whether a flag is set on any rank, the same on all."""
    return mean_over_ranks(float(flag)) > 0


def mean_over_ranks(value: float) -> float:
    """The mean of a number of every rank, the same on all; NaN where one is. Of weighted losses, the global loss."""
    here = ranks()
    if here is None or here.world == 1:
        return float(value)
    from torch import distributed as dist

    on_cpu = "cpu:" in dist.get_backend_config()
    total = torch.tensor(float(value), dtype=torch.float64, device="cpu" if on_cpu else "cuda")
    dist.all_reduce(total)
    mean: float = total.item() / here.world
    return mean
