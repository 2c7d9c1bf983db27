"""Rows that lie on several ranks become one Gram matrix, exactly, with no rank ever holding all rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.singular import gram
from lightning_spectral.metrics.collectives import all_reduce, all_to_all, world_size

SLAB_NUMBERS = 2**23
"""Numbers that a rank receives at a time, 32 MiB in float32: what the exchange needs beside the rows themselves."""


def gram_share(
    rows: Tensor,
    counts: list[int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""This rank's share of the Gram matrix of all ranks' rows; the sum over ranks is the whole. A collective.

    :math:`G G^\top = \sum_r G_r G_r^\top` over blocks of columns: slab by slab, each rank gets one block of every
    rank's rows (all-to-all) and multiplies it with itself. In all a rank receives N x P / W numbers, but holds no more
    of them than one slab.

    Args:
        rows: ``(n, P)`` this rank's rows; P is the same on every rank.
        counts: n of every rank, by rank; they sum to N.
        device: Where the process group exchanges and the products are computed; None for that of the rows.
        dtype: In which the rows travel, the same on every rank; None for their own.
        group: Process group, None for all ranks.

    Returns:
        ``(N, N)`` float64 on that device: rows ordered by rank, then as given.
    """
    device = rows.device if device is None else device
    world = world_size(group)
    if world == 1:
        return gram_blocks(rows, device)
    rank, num_rows, num_columns = dist.get_rank(group), sum(counts), rows.shape[1]
    width = max(1, min(SLAB_NUMBERS // max(num_rows, 1), -(-num_columns // world)))
    share = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    for start in range(0, num_columns, width * world):
        slab = rows[:, start : start + width * world].to(device, dtype or rows.dtype)
        blocks = [slab[:, r * width : (r + 1) * width] for r in range(world)]
        mine = blocks[rank].shape[1]
        received = slab.new_empty(num_rows * mine)
        sent = torch.cat([block.flatten() for block in blocks])
        all_to_all(received, sent, [count * mine for count in counts], [block.numel() for block in blocks], group)
        share += gram(received.view(num_rows, mine))
    return share


def gram_blocks(rows: Tensor, device: torch.device) -> Tensor:
    """The Gram matrix of rows that may lie elsewhere: on the device there is a block of their columns at a time.

    Returns:
        ``(N, N)`` float64 on the device.
    """
    if rows.device == device:
        return gram(rows)
    num_rows, num_columns = rows.shape
    width = max(1, SLAB_NUMBERS // max(num_rows, 1))
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    for start in range(0, num_columns, width):
        total += gram(rows[:, start : start + width].to(device))
    return total


def sum_over_ranks(share: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor of one shape on every rank over the ranks of a group, None for all, in place; a collective."""
    if world_size(group) > 1:
        all_reduce(share, group)
    return share
