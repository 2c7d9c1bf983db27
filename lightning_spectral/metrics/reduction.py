"""Moments of rows that lie on several ranks become the moments of all of them, exactly."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.moments import between_sets
from lightning_spectral.metrics.collectives import all_reduce, world_size


def reduce_means(
    count: Tensor, mean: Tensor, riders: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Counts and means of the rows of all ranks, in one small all-reduce, and how far this rank's lie from them.

    Scatters follow if every rank moves its own to the common mean, :math:`S_r + n_r (\mu_r - \mu)(\mu_r - \mu)^\top`,
    and adds them up: no digits are lost however far apart the ranks' means lie. Nothing grows with the number of ranks.

    Args:
        count: ``(...)`` rows of each set, float64.
        mean: ``(..., d)`` their means.
        riders: 1-D float64 numbers that are summed, too.
        group: Process group, None for all ranks.

    Returns:
        Counts, means, the deviation :math:`\sqrt{n_r} (\mu_r - \mu)` of this rank, and the sums of riders.
    """
    if world_size(group) == 1:
        return count, mean, torch.zeros_like(mean), riders
    weighted = mean * count.unsqueeze(-1)
    small = torch.cat([count.flatten(), weighted.flatten(), riders])
    all_reduce(small, group)
    counts, sums, riders = small.split([count.numel(), weighted.numel(), len(riders)])
    of_all = counts.view_as(count)
    common = sums.view_as(weighted) / of_all.clamp(min=1).unsqueeze(-1)
    # A rank without rows weighs nothing, however far from the common mean its own zero lies.
    return of_all, common, (mean - common) * count.sqrt().unsqueeze(-1), riders


def reduce_packed(packed: Tensor, num_features: int, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Pool one covariance's ``(1 + d + d * d,)`` packed count, mean and scatter over ranks in a single all-reduce.

    Every rank writes its count and mean into a slot of its own beside the scatter: the sum over ranks then carries
    :math:`\sum_r S_r` and each :math:`(n_r, \mu_r)`, from which the scatter between ranks follows without cancellation.
    The slots cost W (d + 1) numbers, little beside d x d for a single matrix; :func:`reduce_means` serves many. The
    tensor given stays as it is.
    """
    world = world_size(group)
    size = 1 + num_features
    slots = packed.new_zeros(world, size)
    slots[dist.get_rank(group) if world > 1 else 0] = packed[:size]
    flat = torch.cat([packed[size:], slots.flatten()])
    if world > 1:
        all_reduce(flat, group)
    slots = flat[-slots.numel() :].view(world, size)
    count, mean, between = between_sets(slots[:, 0], slots[:, 1:], slots.new_ones(1, world))
    scatter = flat[: num_features * num_features] + between.flatten()
    return torch.cat([count, mean.flatten(), scatter])


def gather_numbers(numbers: list[int], device: torch.device, group: dist.ProcessGroup | None = None) -> Tensor:
    """Show every rank the integers of all, below 2^53 and equally many on each, in one collective.

    They come as ``(W, len(numbers))`` float64 on the CPU; ``device`` is one on which the process group can reduce.
    """
    world = world_size(group)
    slots = torch.zeros(world, len(numbers), dtype=torch.float64, device=device)
    slots[dist.get_rank(group) if world > 1 else 0] = torch.tensor(numbers, dtype=torch.float64)
    if world > 1:
        all_reduce(slots, group)
    return slots.cpu()
