"""The collectives of this package, and a guard under which what fails on one rank is learnt by all, and none waits."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

NUM_BYTES = 240
"""Of a failure's reason that other ranks are told."""

_DEEPEST = 1000


class OtherRankError(Exception):
    """Another rank has failed; the message is its own."""

    def __init__(self, reason: str, level: int) -> None:
        super().__init__(reason)
        self.level = level
        """Of the attempt that has failed: those inside it are over, too."""


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in a group, None for all; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's place in a group, None for all ranks, and their number; (0, 1) without torch.distributed."""
    world = world_size(group)
    return dist.get_rank(group) if world > 1 else 0, world


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum a tensor of one shape on every rank over the ranks of a group, None for all, in place."""
    _meet()
    dist.all_reduce(tensor, group=group)


def all_to_all(
    received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], group: dist.ProcessGroup | None
) -> None:
    """Send a part of a flat tensor to each rank of a group, and receive one of each."""
    _meet()
    dist.all_to_all_single(received, sent, output_split_sizes=received_sizes, input_split_sizes=sent_sizes, group=group)


def broadcast_object(value: T) -> T:
    """What rank zero has, on all ranks; it can be pickled."""
    if world_size() == 1:
        return value
    _meet()
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def largest(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest of each entry over the ranks of a group, in place."""
    _meet()
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def all_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a tensor over the ranks of a group, in memory of its own."""
    total = _all_or_none(tensor.device, group, tensor.clone)
    _meet()
    dist.all_reduce(total, group=group)
    return total


def all_gather_axis(tensor: Tensor, axis: int, length: int, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of a tensor, of so many entries along an axis, of which each rank of a group holds a chunk."""
    world = dist.get_world_size(group)
    chunk = -(-length // world)

    def make() -> tuple[Tensor, Tensor]:
        mine = tensor.movedim(axis, 0)
        sent = mine.new_zeros(chunk, *mine.shape[1:])
        sent[: len(mine)] = mine
        return sent, mine.new_empty(world * chunk, *mine.shape[1:])

    sent, received = _all_or_none(tensor.device, group, make)
    _meet()
    # The name it has from torch 2.13 on, where the other warns.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(received, sent, group=group)
    return received[:length].movedim(0, axis)


def _all_or_none(device: torch.device, group: dist.ProcessGroup | None, make: Callable[[], T]) -> T:
    """Memory for a collective within a forward pass: where one rank of the group has none, no rank begins it."""
    made: T | None = None
    failure: Exception | None = None
    try:
        made = make()
    except RuntimeError as error:  # out of memory
        failure = error
    flag = torch.full((1,), int(made is None), dtype=torch.int32, device=device)
    if int(largest(flag, group)) or made is None:
        raise failure or RuntimeError("another rank has no memory for it")
    return made


class Together:
    """Attempts that succeed on all ranks or on none, however many collectives they consist of.

    Before each collective of this module the ranks meet: one number tells whether all have come so far. A rank that
    fails, out of memory say, in the work between two of them skips the rest of its attempt and meets the others once
    more; they learn of it before they begin a collective that it will not join. At the end of an attempt they meet,
    too. Attempts may be made within attempts: what fails further out ends those inside. All ranks make the same
    attempts in the same order.

    Args:
        device: Where the process group can reduce. What is sent is allocated now, for then there is memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._world = world_size()
        self._level = 0
        if self._world > 1:
            with torch.inference_mode(False):  # in which validation runs
                self._flag = torch.zeros(1, dtype=torch.int32, device=device)
                self._reasons = torch.zeros(self._world, NUM_BYTES, dtype=torch.uint8, device=device)

    def attempt(self, work: Callable[[], T]) -> T:
        """Work that may hold collectives, on all ranks.

        Returns:
            What it returned.

        Raises:
            Exception: What it raised; where another rank failed, OtherRankError with that rank's reason.
        """
        if self._world == 1:
            return work()
        self._level += 1
        token = _under.set(self)
        try:
            found = work()
            self.meet()
            return found
        except OtherRankError:
            raise
        except Exception as error:
            reason, level = self._tell(self._level, error)
            if level < self._level:
                raise OtherRankError(reason, level) from error
            raise
        finally:
            _under.reset(token)
            self._level -= 1

    def ends(self, error: Exception) -> bool:
        """Whether what an attempt raised ends not only it, but the attempt that it was made in."""
        return isinstance(error, OtherRankError) and error.level <= self._level

    def meet(self) -> None:
        """Wait for the other ranks; raises OtherRankError if one has failed."""
        reason, level = self._tell(0, None)
        if level:
            raise OtherRankError(reason, level)

    def all(self, is_so: bool) -> bool:
        """Whether it is so on all ranks; a collective."""
        if self._world == 1:
            return is_so
        self._flag.fill_(not is_so)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return not int(self._flag)

    def _tell(self, level: int, error: Exception | None) -> tuple[str, int]:
        """Tell the other ranks of a failure at a level, or of none; why, and at which level, the attempt is over."""
        self._flag.fill_(_DEEPEST - level if level else 0)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        worst = int(self._flag)
        if not worst:
            return "", 0
        reason = None if error is None else str(error).strip().partition("\n")[0] or type(error).__name__
        return self._share(reason), _DEEPEST - worst

    def reasons(self, reason: str | None) -> str:
        """Reasons of all ranks, in one line, where all know that one has one; None for a rank without."""
        _meet()
        return "" if self._world == 1 else self._share(reason)

    def _share(self, reason: str | None) -> str:
        words = (reason or "").encode()[:NUM_BYTES]
        self._reasons.zero_()
        if words:
            self._reasons[dist.get_rank(), : len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        dist.all_reduce(self._reasons)
        found = (bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in self._reasons.cpu())
        return "; ".join([f"rank {rank}: {one}" for rank, one in enumerate(found) if one][:3])


_under: ContextVar[Together | None] = ContextVar("_under", default=None)


def _meet() -> None:
    together = _under.get()
    if together is not None:
        together.meet()
