"""What collecting rows and solving a report cost beside the bare products and solves they cannot do without.

    python -m benchmarks.rows

One layer's outputs of a training step go through the real collector, with four groups, normalised and centred. The
floor is ``torch.mm`` of as many float32 rows of the same width, the whole square matrix at once. A report's
eigensolves, five layers with four groups left out in turn, are set beside as many bare ``eigvalsh`` calls, one by one.
"""

import argparse
import statistics
import sys
from typing import Any

import torch
from rich.table import Table

from benchmarks.harness import Target, console, in_turn, main
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.decomposition import decompose

CALLS = 10
"""In a round, whose seconds are divided by them: a product of a millisecond is not timed alone."""

NUM_LAYERS = 5
NUM_GROUPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 192, 384, 768, 1600])
    parser.add_argument("--samples", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=256, help="a sequence")
    parser.add_argument("--solved", nargs="+", type=int, default=[384, 768], help="widths of which a report is solved")
    parser.add_argument("--repeats", type=int, default=20)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with torch.no_grad():
        collecting = [
            of_collecting(width, dtype, arguments)
            for width in arguments.widths
            for dtype in (torch.float32, torch.bfloat16)
        ]
        solving = [of_solving(width, max(2, arguments.repeats // 4)) for width in arguments.solved]
    return {"collecting": collecting, "solving": solving}


def of_collecting(width: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    output = torch.randn(arguments.samples, arguments.tokens, width).to(dtype)
    rows = output.float().flatten(0, 1)
    collector = Collector(["layer"], 2**60, NUM_GROUPS, True, torch.float32, torch.device("cpu"))

    def multiply() -> None:
        for _ in range(CALLS):
            rows.T @ rows

    def collect() -> None:
        for _ in range(CALLS):
            collector.begin_batch(len(output), None)
            collector.add("layer", output)

    seconds = {
        name: [value / CALLS for value in values]
        for name, values in in_turn({"product": multiply, "collecting": collect}, arguments.repeats).items()
    }
    assert not collector.failures, collector.failures
    state = NUM_LAYERS * NUM_GROUPS * width**2 * 8
    return {"width": width, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds, "state_bytes": state}


def of_solving(width: int, repeats: int) -> dict[str, Any]:
    rows = torch.randn(NUM_LAYERS, NUM_GROUPS, 2 * width, width, dtype=torch.float64)
    parts = Moments(torch.full((NUM_LAYERS, NUM_GROUPS), 2.0 * width), rows.mean(2) * 0, rows.mT @ rows)
    parts = Moments(parts.num_rows.double(), parts.mean, parts.scatter)
    names = [f"layer{index}" for index in range(NUM_LAYERS)]
    alone = [parts.scatter[layer, 0] for layer in range(NUM_LAYERS) for _ in range(1 + NUM_GROUPS)]
    contenders = {
        "solves": lambda: [torch.linalg.eigvalsh(matrix) for matrix in alone],
        "vectors": lambda: [torch.linalg.eigh(matrix) for matrix in alone],
        "report": lambda: decompose(names, parts, {}, dtypes=["float32"] * NUM_LAYERS),
        "report_with_vectors": lambda: decompose(names, parts, {}, num_vectors=10, dtypes=["float32"] * NUM_LAYERS),
    }
    return {"width": width, "seconds": in_turn(contenders, repeats, f"solving at width {width}")}


def show(result: dict[str, Any]) -> None:
    title = "Rows of one layer and step: normalised, centred, split into groups, multiplied, summed"
    table = Table("width", "rows", "torch.mm ms", "collecting ms", "ratio", "state MiB", title=title)
    for found in result["collecting"]:
        product, collecting = (1e3 * min(found["seconds"][name]) for name in ("product", "collecting"))
        state = found["state_bytes"] / 2**20
        numbers = (f"{product:.2f}", f"{collecting:.2f}", f"{collecting / product:.2f}", f"{state:.1f}")
        table.add_row(str(found["width"]), found["dtype"], *numbers)
    console.print(table)
    table = Table("width", "", "minimum s", "median s", title="Solving a report: 5 layers, 4 groups, 25 matrices")
    for found in result["solving"]:
        for name, seconds in found["seconds"].items():
            table.add_row(str(found["width"]), name, f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}")
    console.print(table)


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for row in result["collecting"]:
        if row["dtype"] != "float32":
            continue  # shown, but no different
        product, collecting = (min(row["seconds"][name]) for name in ("product", "collecting"))
        what = f"collecting {row['dtype']} rows of width {row['width']}, times the bare product"
        note = ""
        if collecting > 1.3 * product:
            note = "a product this small is soon over: launching four groups' normalising, centring and summing shows"
        floor = f"torch.mm {1e3 * product:.2f} ms; half of it, the product being symmetric"
        found.append(Target("3", what, collecting / product, 1.3, True, floor, note))
    for row in result["solving"]:
        seconds = {name: min(values) for name, values in row["seconds"].items()}
        what = f"solving a report of width {row['width']}, times its bare eigvalsh calls"
        floor = f"25 x eigvalsh {seconds['solves']:.2f} s; with vectors {seconds['report_with_vectors']:.2f} s"
        found.append(Target("3", what, seconds["report"] / seconds["solves"], 1.3, True, floor))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
