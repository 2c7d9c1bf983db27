"""What importing the package adds to importing lightning and torch.

    python -m benchmarks.imports

Fresh interpreters, in turn; the import is timed inside, once all that a training script imports anyway is there.
"""

import argparse
import statistics
import subprocess
import sys
from typing import Any

from rich.table import Table

from benchmarks.harness import Target, console, main

PROGRAM = """
import time
start = time.perf_counter()
import torch, lightning.pytorch
middle = time.perf_counter()
import lightning_spectral
print(middle - start, time.perf_counter() - middle)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = [], []
    for _ in range(arguments.repeats + 1):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        before, added = map(float, done.stdout.split())
        theirs.append(before)
        ours.append(added)
    # The first fills the page cache.
    return {"lightning_and_torch": theirs[1:], "added": ours[1:]}


def show(result: dict[str, Any]) -> None:
    table = Table("", "minimum s", "median s", title="Imports", title_justify="left")
    for name, seconds in result.items():
        table.add_row(name, f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}")
    console.print(table)


def targets(result: dict[str, Any]) -> list[Target]:
    theirs = statistics.median(result["lightning_and_torch"])
    what = "importing lightning_spectral, seconds beyond lightning and torch, median"
    return [Target("7", what, statistics.median(result["added"]), 0.2, True, f"lightning and torch {theirs:.1f} s")]


if __name__ == "__main__":
    main(sys.modules[__name__])
