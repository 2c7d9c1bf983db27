"""How the cost of each part of a report grows: one size swept by doublings, the exponent fitted beside the theory's.

    python -m benchmarks.growth --json growth.json --plot growth.png

Sweeps are run in turn over several rounds, and the least time of each point counts: CPU seconds of one thread, because
libraries take a second one only from some size on, which would bend the curves, and because other work on the machine
does not count. Beside each part, the bare kernels of the same shapes are swept in the same run: what they exceed the
theory by is the machine's doing. A cost has lower-order terms, so that an exponent below the theory is no gain.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.growth_parts import PARTS, STATE, STATE_THEORY, Run, state_bytes
from benchmarks.growth_plot import draw
from benchmarks.growth_ranks import BARE, WORK, measure_ranks
from benchmarks.harness import Target, console, main

SIZES = {
    "layers": [6, 12, 24, 48],
    "width": [96, 192, 384, 768],
    "tokens": [4096, 8192, 16384, 32768, 65536],
    "samples": [32, 64, 128, 256, 512],
    "numbers": [2**14, 2**15, 2**16, 2**17, 2**18],
    "matrices": [4, 8, 16, 32],
}
"""What is swept, by doublings."""

REFERENCE = {"layers": 0, "width": 1, "tokens": 0, "samples": 1, "numbers": 2, "matrices": 0}
"""Which of these a size has while another is swept."""

RANKS = {"layers": 5, "width": 384, "tokens": 32768, "samples": 512, "numbers": 2**16}
"""All ranks together take these, however many they are."""

TOLERANCE = 0.15
"""By how much an exponent may exceed the theory: timings scatter, and four points make a fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for size, default in SIZES.items():
        parser.add_argument(f"--{size}", type=int, nargs="+", default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    for size, number in RANKS.items():
        parser.add_argument(f"--rank-{size}", type=int, default=number)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank-rounds", type=int, default=2, help="how often processes are started")
    parser.add_argument("--rank-repeats", type=int, default=3, help="how often they measure")
    parser.add_argument("--plot", help="where to draw the fits")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        sweeps = [*_parts(arguments, progress), *_state(arguments), *_ranks(arguments, progress)]
    if arguments.plot:
        draw(sweeps, Path(arguments.plot))
    return {"sweeps": sweeps}


def _parts(arguments: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    """Sweeps of the parts in this process, round by round."""
    sizes = {size: getattr(arguments, size) for size in SIZES}
    reference = {size: sizes[size][min(index, len(sizes[size]) - 1)] for size, index in REFERENCE.items()}
    swept = [(part, size) for part in PARTS for size in part.theory]
    least = [[(math.inf, math.inf) for _ in sizes[size]] for _, size in swept]
    task = progress.add_task("", total=arguments.rounds * len(swept))
    for _ in range(arguments.rounds):
        for (part, size), found in zip(swept, least, strict=True):
            progress.update(task, description=f"{part.name}, {size}")
            for place, number in enumerate(sizes[size]):
                # Made anew each time: the inputs of all points together would be gigabytes.
                ours, bare = part.make(**{key: reference[key] for key in part.theory} | {size: number})
                before = found[place]
                found[place] = (min(before[0], cpu_seconds(ours)), min(before[1], cpu_seconds(bare)))
            progress.advance(task)
    for (part, size), found in zip(swept, least, strict=True):
        held = {key: reference[key] for key in part.theory if key != size}
        bare_seconds = [point[1] for point in found]
        yield sweep(
            part.name,
            size,
            part.theory[size],
            sizes[size],
            [point[0] for point in found],
            held,
            bare=bare_seconds,
            kernel=part.kernel,
        )


def _state(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes that collecting keeps, counted, not timed."""
    reference = {size: getattr(arguments, size)[0] for size in STATE_THEORY}
    for swept, theory in STATE_THEORY.items():
        numbers = getattr(arguments, swept)
        found = [float(state_bytes(**reference | {swept: number})) for number in numbers]
        held = {size: number for size, number in reference.items() if size != swept}
        yield sweep(STATE, swept, theory, numbers, found, held)


def _ranks(arguments: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    """Sweeps over the number of ranks, each round with processes of its own."""
    settings = {size: getattr(arguments, f"rank_{size}") for size in RANKS}
    least = {part: dict.fromkeys(arguments.ranks, (math.inf, math.inf)) for part in (*WORK, *BARE.values())}
    task = progress.add_task("", total=arguments.rank_rounds * len(arguments.ranks))
    for _ in range(arguments.rank_rounds):
        for world in arguments.ranks:
            progress.update(task, description=f"ranks: {world}")
            for part, found in measure_ranks(world, settings | {"repeats": arguments.rank_repeats}).items():
                cpu, wall = least[part][world]
                least[part][world] = (min(cpu, found[0]), min(wall, found[1]))
            progress.advance(task)
    for part, work in WORK.items():
        worlds = [world for world in arguments.ranks if work(world) > 0]
        if len(worlds) < 2:
            continue
        theory = exponent(worlds, [work(world) for world in worlds])
        times = [least[part][world] for world in worlds]
        cpu_of_each, walls = [cpu for cpu, _ in times], [wall for _, wall in times]
        kernel = BARE.get(part, "")
        bare = [least[kernel][world][0] for world in worlds] if kernel else None
        yield sweep(part, "ranks", theory, worlds, cpu_of_each, settings, bare, kernel, walls)


def cpu_seconds(run: Run, budget: float = 0.1) -> float:
    """The least CPU time of as many calls as fit into some seconds, of one at least."""
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        seconds: list[float] = []
        while not seconds or time.perf_counter() < end:
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(seconds)


def sweep(
    part: str,
    size: str,
    theory: float,
    numbers: list[int],
    found: list[float],
    held: dict[str, int],
    bare: list[float] | None = None,
    kernel: str = "",
    walls: list[float] | None = None,
) -> dict[str, Any]:
    """What was found of one part over one size, with its fit; ``found`` is in CPU seconds, for ranks those of each."""
    return {
        "part": part,
        "size": size,
        "theory": theory,
        "numbers": numbers,
        "found": found,
        "exponent": exponent(numbers, found),
        "last_doubling": exponent(numbers[-2:], found[-2:]),
        "held": held,
        "kernel": kernel,
        "bare": bare,
        "bare_exponent": exponent(numbers, bare) if bare else None,
        "wall_seconds": walls,
    }


def exponent(numbers: list[int], found: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(numbers), np.log(found), 1)[0])


def show(result: dict[str, Any]) -> None:
    headers = ("part", "over", "from", "to", "found at both ends", "exponent", "theory", "last doubling", "bare kernel")
    table = Table(
        *headers,
        title="Growth of the cost in CPU seconds of one thread, for ranks of each (and wall)",
        title_justify="left",
    )
    for each in result["sweeps"]:
        ends = [f"{each['found'][end]:.3g}" for end in (0, -1)]
        if each["wall_seconds"]:
            ends = [f"{end} ({each['wall_seconds'][place]:.2g})" for end, place in zip(ends, (0, -1), strict=True)]
        table.add_row(
            each["part"],
            each["size"],
            *(str(each["numbers"][end]) for end in (0, -1)),
            " .. ".join(ends),
            f"{each['exponent']:.2f}",
            f"{each['theory']:.2f}",
            f"{each['last_doubling']:.2f}",
            f"{each['bare_exponent']:.2f} {each['kernel']}" if each["bare"] else "",
        )
    console.print(table)


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for each in result["sweeps"]:
        note = f"{each['kernel']} alone {each['bare_exponent']:.2f}" if each["bare"] else ""
        what = f"{each['part']}: exponent over {each['size']}"
        limit = round(each["theory"] + TOLERANCE, 3)
        found.append(Target("6", what, each["exponent"], limit, True, f"theory {each['theory']:.2f}", note))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
