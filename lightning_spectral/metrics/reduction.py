"""Moments of rows that lie on several ranks become the moments of all of them, exactly."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.moments import Moments, between_sets
from lightning_spectral.metrics.collectives import all_reduce, world_size


def reduce_moments(parts: Moments, riders: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Moments, Tensor]:
    r"""Pool moments over ranks with two all-reduces: a small one of counts and sums, a large one of scatters.

    Between the two every rank moves its scatter to the common mean, :math:`S_r + n_r (\mu_r - \mu)(\mu_r - \mu)^\top`,
    so that no digits are lost however far apart the ranks' means lie. Nothing grows with the number of ranks. The
    moments are batched in the same way on every rank, and their scatter is overwritten; ``riders`` are 1-D float64
    numbers that are summed in the small reduction.
    """
    if world_size(group) == 1:
        return parts, riders
    weighted = parts.mean * parts.num_rows.unsqueeze(-1)
    small = torch.cat([parts.num_rows.flatten(), weighted.flatten(), riders])
    all_reduce(small, group)
    num_sets, num_sums = parts.num_rows.numel(), weighted.numel()
    count = small[:num_sets].view_as(parts.num_rows)
    total = small[num_sets : num_sets + num_sums].view_as(weighted)
    mean = total / count.clamp(min=1).unsqueeze(-1)
    # A rank without rows weighs nothing, however far from the common mean its own zero lies.
    deviation = (parts.mean - mean) * parts.num_rows.sqrt().unsqueeze(-1)
    scatter = parts.scatter.addcmul_(deviation.unsqueeze(-1), deviation.unsqueeze(-2))
    all_reduce(scatter, group)
    return Moments(count, mean, scatter), small[num_sets + num_sums :]


def reduce_packed(packed: Tensor, num_features: int, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Pool one covariance's ``(1 + d + d * d,)`` packed count, mean and scatter over ranks in a single all-reduce.

    Every rank writes its count and mean into a slot of its own beside the scatter: the sum over ranks then carries
    :math:`\sum_r S_r` and each :math:`(n_r, \mu_r)`, from which the scatter between ranks follows without cancellation.
    The slots cost W (d + 1) numbers, little beside d x d for a single matrix; :func:`reduce_moments` serves many. The
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
