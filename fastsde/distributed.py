"""Several GPUs and machines under ``torchrun``: sampling sharded by index, and helpers for data-parallel training.

    torchrun --nproc-per-node 4 -m fastsde sample mnist -n 10000 --save digits.npz

A sample is a function of its global index, so the ranks need not communicate while they draw. The network's rounding
may depend on its batch size, so the work is split into parts whose size does not depend on the number of ranks; the
result is then the same to the bit for any number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .conditions import rows_of
from .inverse import known_values
from .randomness import Seed, seed_of
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
    "sum_over_ranks",
]

# How long rank 0 waits for the samples of the slowest rank. Sampling may take any length of time, and a dead rank is
# noticed at once, by its closed connection and by torchrun, which ends the others: so there is no practical limit.
_WORK = timedelta(days=365)
_PARTS, _SMALLEST_PART = 24, 4


# Sampling -----------------------------------------------------------------------------------------------------------


def sample(
    sampler: Sampler,
    n: int,
    *,
    seed: Seed = 0,
    first_sample: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    trajectory: int | None = None,
    progress: bool = False,
    part: int | None = None,
) -> Any:
    """Draws ``n`` samples on all ranks together; every rank must call it, with the same arguments.

    Without a process group it draws the same samples by itself, to the bit for the same device and number of threads.

    Args:
        sampler: the sampler of this rank, on its own device.
        n: the number of samples of all ranks together.
        seed: as for `fastsde.sample`; a seed that is to be drawn is rank 0's.
        first_sample: the global index of the first sample.
        model_kwargs: as for `fastsde.sample`, for the whole batch of ``n`` on every rank.
        uncond_kwargs: the same for the unconditional call.
        mask: as for `fastsde.sample`, for the whole batch.
        known: as for `fastsde.sample`, for the whole batch.
        trajectory: m, to return every m-th state too, as for `fastsde.sample`.
        progress: show rank 0's progress as a bar on stderr.
        part: how many samples a rank runs at once. By default the sampler's ``max_batch`` if that is a number, else a
            24th of ``n`` but at least 4; set a smaller one for more than 24 ranks. Another size may round differently.

    Returns:
        On rank 0 the samples ``[n, *shape]`` on the CPU, with ``trajectory`` a pair of the samples and the states
        ``[steps // trajectory + 1, n, *shape]``; None on the other ranks.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
        NonFiniteError: on every rank, if samples became NaN or infinity; the message names the rank and its samples.
        RuntimeError: if another rank has failed or ended.
    """
    check_instance("sampler", sampler, Sampler)
    check_int("n", n, 0)
    check_int("first_sample", first_sample, 0, 2**64)
    seed = seed_of(seed)
    usual = sampler.max_batch if isinstance(sampler.max_batch, int) else max(_SMALLEST_PART, -(-n // _PARTS))
    own = copy.copy(sampler)  # its max_batch splits a rank's samples into parts
    own.max_batch = size = usual if part is None else check_int("part", part, 1)
    here = ranks() or Ranks()
    bounds = [min(n, size * _first(-(-n // size), rank, here.world)) for rank in range(here.world + 1)]
    mine = slice(bounds[here.rank], bounds[here.rank + 1])
    conditions = {
        name: rows_of(check_kwargs(name, given, n, sampler.device), mine)
        for name, given in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs))
        if given is not None
    }
    if mask is not None and known is not None:
        whole = known_values(mask, known, (n, *sampler.sample_shape), sampler.device, sampler.state_dtype)
        mask, known = (value[mine] for value in whole)
    if own.guidance is not None:
        own.guidance = own.guidance.part(n, mine)
    options: dict[str, Any] = {"trajectory": trajectory, "progress": progress and here.rank == 0, **conditions}
    options |= {"mask": mask, "known": known}
    start, end = ((first_sample + i) % 2**64 for i in (mine.start, mine.stop - 1))
    with _working_group(here) as group:
        error: Exception | None = None
        seed = _of_rank_0(seed, here, group)
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
    """Returns the index of a rank's first item; the ranks get consecutive runs whose lengths differ by at most one."""
    return -(-items * rank // world)


@contextmanager
def _working_group(here: Ranks) -> Iterator[Any]:
    """Yields a Gloo group with a long timeout to collect samples in; None for one rank.

    After an error the group is not closed, so that other ranks do not fail of that before this rank's error is known.
    """
    if here.world == 1:
        yield None
        return
    from torch import distributed as dist

    mean_over_ranks(0.0)  # fails within the timeout of the ranks' own group unless all are here; only then wait longer
    group: Any = dist.new_group(backend="gloo", timeout=_WORK)
    yield group
    dist.barrier(group)  # leaving before everything is received could cut it off
    dist.destroy_process_group(group)


def _of_rank_0(value: int, here: Ranks, group: Any) -> int:
    """Returns rank 0's value on all ranks."""
    if here.world == 1:
        return value
    from torch import distributed as dist

    held = torch.tensor([value - 2**63], dtype=torch.int64)  # seeds reach 2^64
    dist.broadcast(held, 0, group=group)
    return int(held) + 2**63


def _raise_together(error: Exception | None, who: str, here: Ranks, group: Any) -> None:
    """Raises on all ranks if one of them has failed, so that none waits for its samples."""
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
            raise RuntimeError(f"a rank ended before its samples arrived ({lost})") from lost
    if error is not None and not isinstance(error, NonFiniteError):
        raise error
    for not_finite, message in filter(None, [mine, *told]):
        raise (NonFiniteError if not_finite else RuntimeError)(message) from error


def _gather(own: Tensor, axis: int, bounds: list[int], here: Ranks, group: Any) -> Tensor | None:
    """Joins the ranks' tensors along an axis, on rank 0 and the CPU: rank r has bounds[r] to bounds[r + 1]."""
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
                raise RuntimeError(f"rank {source} ended before its samples arrived ({error})") from error
        place.copy_(received)
    return whole


# Data-parallel training ---------------------------------------------------------------------------------------------


def shard(batch_size: int, rank: int, world: int) -> slice:
    """Returns a rank's positions in the global batch: consecutive runs whose lengths differ by at most one.

    Position i of the global batch has key i wherever it is computed: a rank uses ``sample_keys(seed,
    batch_size)[shard(batch_size, rank, world)]``.

    Args:
        batch_size: of the global batch.
        rank: this process's number among all.
        world: the number of processes.

    Raises:
        ValueError: if the batch has fewer samples than there are ranks.
    """
    check_int("world", world, 1)
    check_int("rank", rank, 0, world)
    if check_int("batch_size", batch_size, 1) < world:
        raise ValueError(f"batch_size must be at least the number of ranks, {world}, got {batch_size}")
    return slice(_first(batch_size, rank, world), _first(batch_size, rank + 1, world))


def loss_weight(batch_size: int, rank: int, world: int) -> float:
    """Returns the factor that a rank multiplies the mean loss over its `shard` by, before the backward pass.

    DistributedDataParallel averages gradients over the ranks: (1 / world) sum_r w_r grad(mean over shard r) is the
    gradient of the mean over the whole batch for w_r = world |shard r| / batch_size, whatever the shards' lengths.

    Args:
        batch_size: of the global batch.
        rank: this process's number among all.
        world: the number of processes.
    """
    mine = shard(batch_size, rank, world)
    length: int = mine.stop - mine.start
    return length * world / batch_size


def any_rank(flag: bool) -> bool:
    """Returns whether a flag is set on any rank; the result is the same on all ranks."""
    return mean_over_ranks(float(flag)) > 0


def mean_over_ranks(value: float) -> float:
    """Returns the mean over ranks, the same on all; NaN if one is. For weighted losses, this is the global loss."""
    here = ranks()
    if here is None or here.world == 1:
        return float(value)
    from torch import distributed as dist

    on_cpu = "cpu:" in dist.get_backend_config()
    total = torch.tensor(float(value), dtype=torch.float64, device="cpu" if on_cpu else "cuda")
    dist.all_reduce(total)
    mean: float = total.item() / here.world
    return mean


def sum_over_ranks(values: Tensor) -> None:
    """Replaces a tensor on the ranks' devices by its sum over them."""
    here = ranks()
    if here is None or here.world == 1:
        return
    from torch import distributed as dist

    dist.all_reduce(values)
