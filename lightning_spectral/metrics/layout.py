"""Which ranks hold which data, and what shards of tensors mean: a row that several ranks hold is counted once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.metrics.collectives import all_gather_axis, all_sum, largest, world_size
from lightning_spectral.metrics.reduction import gather_numbers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

NUM_COMPARED = 1024
"""Entries of a tensor, spread over it, by which ranks tell whether they hold the same."""

MOST_AXES = 8
"""Whose lengths are compared, too."""

NEARLY = 2e-2
"""Relative difference that rounding may make between replicas, in bfloat16 too; between shards few entries have it."""

SHARE_ALIKE = 0.95
"""Of the entries that are not zero everywhere, how many must be alike in replicas."""


class Shard(NamedTuple):
    """How ranks that hold the same data share one axis of a tensor: in chunks, as ``torch.chunk`` makes them."""

    axis: int
    length: int
    """Of the whole."""
    start: int
    """Where this rank's part begins."""
    size: int
    """Of this rank's part."""
    group: Any


@dataclass(frozen=True)
class Layout:
    """How data lie on the ranks: data rank r of W holds its own samples, perhaps together with other ranks.

    Ranks that hold the same data (those of a tensor-parallel dimension) are replicas in what follows. One of them
    counts: what it has is summed over all ranks, the others add nothing. Sums run over all ranks, so that all come to
    the same numbers, bit by bit.
    """

    rank: int = 0
    """Whose data this rank holds."""
    world: int = 1
    """Ranks with data of their own."""
    data_ranks: tuple[int, ...] = (0,)
    """Whose data each global rank holds."""
    replicas: tuple[int, ...] = (0,)
    """Global ranks that hold the same data as this one, itself included."""
    peers: tuple[int, ...] = (0,)
    """Global ranks in the place of this one among other data, by data rank."""
    data_group: Any = None
    """Process group of the peers; None for all ranks."""
    replica_group: Any = None
    """Process group of the replicas; None where there is but one."""

    @classmethod
    def of_world(cls) -> "Layout":
        """Each rank has data of its own."""
        world = world_size()
        rank, ranks = dist.get_rank() if world > 1 else 0, tuple(range(world))
        return cls(rank, world, ranks, (rank,), ranks)

    @classmethod
    def of_data(cls, rank: int, world: int, mesh: "DeviceMesh | None", device: torch.device) -> "Layout":
        """Data rank ``rank`` of ``world`` is here; a collective if that is fewer than there are ranks.

        Args:
            rank: Whose data this rank holds, as a distributed sampler is told.
            world: How many ranks have data of their own.
            mesh: One that has the peers and the replicas as dimensions.
            device: Where the process group can reduce.

        Raises:
            ValueError: If data are held by unequally many ranks, or the mesh has no such dimensions.
        """
        if world == world_size():
            return cls.of_world()
        told = gather_numbers([rank, world], device)
        of_ranks = [int(number) for number in told[:, 0]]
        holding = [[one for one, data in enumerate(of_ranks) if data == r] for r in range(world)]
        if len({len(ranks) for ranks in holding}) > 1 or bool((told[:, 1] != world).any()) or not holding[0]:
            raise ValueError(
                f"strategy must give the data of {world} ranks to equally many of {len(of_ranks)} each, got data ranks "
                f"{of_ranks}: see its distributed_sampler_kwargs"
            )
        replicas = holding[rank]
        peers = [ranks[replicas.index(dist.get_rank())] for ranks in holding]
        groups = {} if mesh is None else {_ranks_of(mesh, dim): mesh.get_group(dim) for dim in range(mesh.ndim)}
        missing = [ranks for ranks in (replicas, peers) if tuple(ranks) not in groups and len(ranks) > 1]
        if missing:
            raise ValueError(
                f"strategy must have a device_mesh with a dimension of ranks {missing[0]}, got data ranks {of_ranks}: "
                "ModelParallelStrategy has"
            )
        found = (groups.get(tuple(peers)), groups.get(tuple(replicas)))
        return cls(rank, world, tuple(of_ranks), tuple(replicas), tuple(peers), *found)

    @property
    def holders(self) -> tuple[int, ...]:
        """The global ranks that count, by data rank."""
        return tuple(self.data_ranks.index(rank) for rank in range(self.world))

    @property
    def counts(self) -> bool:
        """Whether this rank is the one of its replicas that counts."""
        return self.replicas[0] == (dist.get_rank() if len(self.replicas) > 1 else self.replicas[0])

    @property
    def has_replicas(self) -> bool:
        """Whether several ranks hold the same data."""
        return len(self.replicas) > 1

    def shard_of(self, tensor: Any) -> Shard | None:
        """How replicas share a parameter: what of it a forward pass finds on this rank; None if it is whole there.

        Dimensions of the mesh that data are spread over (FSDP) are not looked at: layers gather over these before they
        run.

        Raises:
            ValueError: If it is shared in another way than along one axis.
        """
        if not is_distributed(tensor):
            return None
        shared = [
            (dim, placement)
            for dim, placement in enumerate(tensor.placements)
            if self._is_of_replicas(tensor.device_mesh, dim) and not placement.is_replicate()
        ]
        if not shared:
            return None
        if len(shared) > 1 or not _is_plain_shard(shared[0][1]):
            raise ValueError(f"it is sharded as {tuple(tensor.placements)}, of which no rule is known")
        (dim, placement), mesh = shared[0], tensor.device_mesh
        axis = placement.dim % tensor.ndim
        length, number = tensor.shape[axis], mesh.size(dim)
        chunk = -(-length // number)
        start = min(mesh.get_local_rank(dim) * chunk, length)
        return Shard(axis, length, start, min(chunk, length - start), mesh.get_group(dim))

    def whole(self, tensor: "DTensor") -> Tensor:
        """What of a distributed tensor belongs to the data that are here; a collective of the replicas.

        What replicas share along an axis is brought together, sums that are still to be added up are, and what data
        ranks share along the first axis stays where it is.

        Raises:
            ValueError: For placements that mean none of this.
        """
        mesh, local = tensor.device_mesh, tensor.to_local()
        placements: tuple[Any, ...] = tuple(tensor.placements)
        sharded = [placement.dim % tensor.ndim for placement in placements if placement.is_shard()]
        for dim, placement in enumerate(placements):
            if mesh.size(dim) == 1:
                continue
            is_known = len(set(sharded)) == len(sharded) and (_is_plain_shard(placement) or not placement.is_shard())
            if is_known and self._is_of_replicas(mesh, dim):
                if placement.is_replicate():
                    continue
                if placement.is_shard():
                    axis = placement.dim % tensor.ndim
                    local = all_gather_axis(local, axis, tensor.shape[axis], mesh.get_group(dim))
                    continue
                if placement.is_partial() and placement.reduce_op == "sum":
                    local = all_sum(local, mesh.get_group(dim))
                    continue
            elif (
                is_known
                and placement.is_shard()
                and placement.dim == 0
                and set(_ranks_of(mesh, dim)) <= set(self.peers)
            ):
                continue
            raise ValueError(
                f"its output is a DTensor of placements {tuple(tensor.placements)}, of which no rule is known: "
                "watch another layer, or redistribute it"
            )
        return local

    def alike(self, tensor: Tensor) -> bool:
        """Whether all replicas hold the same tensor, as 1024 entries spread over it tell; a collective of them."""
        shape = [*tensor.shape[:MOST_AXES], *[0] * (MOST_AXES - tensor.ndim)]
        numbers = torch.zeros(MOST_AXES + NUM_COMPARED, dtype=torch.float32, device=tensor.device)
        numbers[:MOST_AXES] = torch.tensor(shape, dtype=torch.float32)
        flat = tensor.detach().flatten()
        seen = flat[:: max(1, len(flat) // NUM_COMPARED)][:NUM_COMPARED]
        numbers[MOST_AXES : MOST_AXES + len(seen)] = seen.float().nan_to_num()
        highest, lowest = largest(torch.stack([numbers, -numbers]), self.replica_group)
        spread, scale = highest + lowest, torch.maximum(highest.abs(), lowest.abs())
        if bool(spread[:MOST_AXES].any()):
            return False
        spread, scale = spread[MOST_AXES:], scale[MOST_AXES:]
        is_some = scale > 0
        is_alike = (spread <= NEARLY * scale) & is_some
        return bool(is_alike.sum() >= SHARE_ALIKE * is_some.sum())

    def total(self, number: int, device: torch.device) -> int:
        """The sum of a number over replicas; a collective of them."""
        return int(all_sum(torch.tensor([number], dtype=torch.int64, device=device), self.replica_group))

    def gathered(self, tensor: Tensor, axis: int, length: int) -> Tensor:
        """The whole, of so many entries along an axis, of which replicas hold chunks; a collective of them."""
        return all_gather_axis(tensor, axis, length, self.replica_group)

    def _is_of_replicas(self, mesh: "DeviceMesh", dim: int) -> bool:
        return set(_ranks_of(mesh, dim)) <= set(self.replicas)


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor. Not by its class: torch may have been built without."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def are_sharded(module: nn.Module) -> bool:
    """Whether some parameters are DTensors, as ``fully_shard`` and ``parallelize_module`` make them."""
    return any(is_distributed(parameter) for parameter in module.parameters())


def _is_plain_shard(placement: Any) -> bool:
    return placement.is_shard() and type(placement).__name__ == "Shard"


def _ranks_of(mesh: "DeviceMesh", dim: int) -> tuple[int, ...]:
    """Global ranks along a dimension, through this one."""
    return tuple(sorted(dist.get_process_group_ranks(mesh.get_group(dim))))
