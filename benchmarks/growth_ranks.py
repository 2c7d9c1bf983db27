"""What a report costs each of several ranks: real gloo processes of one thread each, timed by their own CPU clocks.

CPU seconds are those of all threads of a process, gloo's own among them. Four ranks on two cores also wait for each
other's turn, which shows in the wall time and says nothing of what a rank has to do.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.growth_parts import BATCH_TOKENS, GROUPS, Batch, Run
from lightning_spectral.functional import gram
from lightning_spectral.measurement.decomposition import decompose
from lightning_spectral.measurement.sums import Sums, pooled
from lightning_spectral.metrics.exchange import gram_share

WORK: dict[str, Callable[[int], float]] = {
    # Each rank takes its share of the rows.
    "collecting activations": lambda world: 1 / world,
    # In an all-reduce a rank sends and receives 2 (W - 1) / W times the buffer.
    "reducing moments": lambda world: (world - 1) / world,
    # Each matrix is solved on one of the ranks, and its eigenvalues are sent to the others.
    "decomposing activations": lambda world: 1 / world,
    # N^2 P / W multiply-adds.
    "Gram of rows, arithmetic alone": lambda world: 1 / world,
    # Beside these a rank sends and receives what it does not keep of N P / W numbers: that falls the most slowly.
    "Gram of rows, with exchange": lambda world: (world - 1) / world**2,
}
"""What each rank has to do, by number of ranks: of several parts the one that must grow most. Zero: nothing at all."""

BARE = {"reducing moments": "all_reduce"}
"""The bare kernel that a part cannot do without, where its cost is not arithmetic but the transport's doing."""


def measure_ranks(world: int, settings: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Start some ranks, let each do its part of every report, and stop them.

    Args:
        world: Number of ranks.
        settings: ``layers``, ``width`` and ``tokens`` of activations, ``samples`` and ``numbers`` of rows, over all
            ranks, and ``repeats``.

    Returns:
        CPU seconds, the mean of ranks, and wall seconds of the slowest rank, both at their least, by part and kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, settings, folder), nprocs=world)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    found = {}
    for part in (*WORK, *BARE.values()):
        cpu = statistics.mean(min(each[part]["cpu"]) for each in ranks)
        slowest = [max(walls) for walls in zip(*(each[part]["wall"] for each in ranks), strict=True)]
        found[part] = (cpu, min(slowest))
    return found


def _rank(rank: int, world: int, settings: dict[str, int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    found: dict[str, Any] = {part: {"cpu": [], "wall": []} for part in (*WORK, *BARE.values())}
    parts = _parts(world, settings)
    for repeat in range(settings["repeats"] + 1):
        for part, (ready, run) in parts.items():
            ready()
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if repeat > 0:  # the first touches memory and opens connections
                found[part]["cpu"].append(cpu)
                found[part]["wall"].append(wall)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _parts(world: int, settings: dict[str, int]) -> dict[str, tuple[Run, Run]]:
    """What makes each part or kernel ready, off the clock, and the part."""
    layers, width, tokens = settings["layers"], settings["width"], settings["tokens"]
    samples, numbers = settings["samples"] // world, settings["numbers"]
    batch = Batch(layers, width, tokens // world, share=tokens)
    solved, device = Batch(layers, width, BATCH_TOKENS).moments(), torch.device("cpu")
    sums: list[Sums] = []
    rows, slab = torch.randn(samples, numbers), torch.randn(samples * world, numbers // world)
    none, alike = torch.zeros(1, dtype=torch.float64), Sums(layers * GROUPS, width, device).outer

    def nothing() -> None:
        pass

    def make_sums() -> None:
        sums.extend(Sums(GROUPS, width, device) for _ in range(layers))

    runs: tuple[tuple[Run, Run], ...] = (
        (batch.collector.reset, lambda: batch.offer(batch.repeats)),
        (make_sums, lambda: pooled(sums, none, device)),
        (nothing, lambda: decompose(batch.names, solved, {})),
        (nothing, lambda: gram(slab)),
        (nothing, lambda: gram_share(rows, [samples] * world)),
        (nothing, lambda: dist.all_reduce(alike)),
    )
    return dict(zip((*WORK, *BARE.values()), runs, strict=True))
