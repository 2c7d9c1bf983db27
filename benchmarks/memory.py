"""Peak memory of a report, in fresh processes, beside the formula of docs/memory.md.

    python -m benchmarks.memory --json memory.json

Sums of activations are collected and decomposed as in a report of the layers of one width; rows of
per-sample gradients of one square matrix are written by hooks, multiplied and solved. Each peak is that of a process
of its own above what it held before: resident memory on a CPU, one run at a time.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.harness import Target, console, main, peak_bytes
from lightning_spectral.capture.contraction import LayerRows
from lightning_spectral.measurement import ActivationRequest
from lightning_spectral.measurement.decomposition import decompose
from lightning_spectral.measurement.gradient_report import decompose_grams
from lightning_spectral.measurement.row_store import RowStore
from lightning_spectral.measurement.sums import sums_bytes
from lightning_spectral.metrics.exchange import gram_share
from lightning_spectral.probing.cost import report_bytes

SAMPLES = 8
LENGTH = 64
"""Of a batch of activations: 8 x 64 rows."""

ROW_SAMPLES = 8
ROW_LENGTH = 16
"""Of a batch of gradients."""

COPIES = 10
"""Bytes to a number of the output that is read: centred rows, and what a product packs of them; measured."""

TOLERANCE = 0.15

CPU = torch.device("cpu")

SMALL = {"width": 64, "layers": 1, "groups": 2, "rows": 16}
"""Of the run that warms up."""

PARTS = {
    "collecting": "sums between their first rows and the report",
    "report": "sums, and the report on them",
    "gradients": "rows of gradients, and the report on them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1600, 2048, 4096])
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 1, 1, 1], help="watched, by width")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 4, 4, 2], help="for error bars, by width")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 128, 64, 32], help="of gradients, by width")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))


def contender(name: str, settings: Mapping[str, int]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A run of one part, and a small one to warm up, for a fresh process."""
    run = {"collecting": _collect, "report": _report, "gradients": _gradients}[name]
    return lambda: run(**SMALL), lambda: run(**settings)


def _collect(width: int, layers: int, groups: int, rows: int) -> Any:
    request = ActivationRequest(
        stage="train", every_n_steps=1, num_groups=groups, num_tokens=2**30, normalize=True, dtype="float32"
    )
    names = [f"layer{index}" for index in range(layers)]
    collector = request.collector(names, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(groups + 1):  # which brings the spare slot into use
        collector.begin_batch(SAMPLES, None)
        for name in names:
            collector.add(name, torch.randn(SAMPLES, LENGTH, width, generator=generator))
    assert not collector.failures, collector.failures
    return collector


def _report(width: int, layers: int, groups: int, rows: int) -> None:
    collector = _collect(width, layers, groups, rows)
    for names, parts, *_ in collector.pool():
        decompose(names, parts, {})


def _gradients(width: int, layers: int, groups: int, rows: int) -> None:
    linear = nn.Linear(width, width, bias=False)
    store = RowStore({"weight": width**2}, rows, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    while store.room:
        size = min(ROW_SAMPLES, store.room)
        x, gradient = torch.randn(2, size, ROW_LENGTH, width, generator=generator)
        LayerRows(size, store.open(size), float(size)).add("weight", linear, "weight", x, gradient)
        store.commit()
    share = gram_share(store.take("weight"), [rows], CPU)
    decompose_grams({"weight": share}, {"weight": width**2}, torch.arange(rows) * groups // rows, groups, torch.float32)


def formula(name: str, width: int, layers: int, groups: int, rows: int) -> int:
    """Bytes by the formula of docs/memory.md."""
    if name == "gradients":
        # Of the layer itself one matrix.
        return 4 * width**2 * (rows + 1)
    # The output itself, which in training is the model's, and what collecting makes of it.
    kept = layers * sums_bytes(groups, width) + SAMPLES * LENGTH * width * (4 + COPIES)
    return kept if name == "collecting" else max(kept, report_bytes([width] * layers, groups, CPU))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    points = []
    sizes = zip(arguments.widths, arguments.layers, arguments.groups, arguments.rows, strict=True)
    for width, layers, groups, rows in sizes:
        settings = {"width": width, "layers": layers, "groups": groups, "rows": rows}
        for name in arguments.parts:
            found = peak_bytes("benchmarks.memory", name, settings)
            points.append({"part": name, **settings, "measured": found, "formula": formula(name, **settings)})
            console.print(points[-1])
    return {"points": points}


def show(result: dict[str, Any]) -> None:
    table = Table("", "width", "layers", "groups", "rows of gradients", "formula, MiB", "measured, MiB", "ratio")
    for point in result["points"]:
        is_rows = point["part"] == "gradients"
        sizes = ["" if (key == "rows") != is_rows else str(point[key]) for key in ("layers", "groups", "rows")]
        numbers = [f"{point[key] / 2**20:,.0f}" for key in ("formula", "measured")]
        table.add_row(
            PARTS[point["part"]], str(point["width"]), *sizes, *numbers, f"{point['measured'] / point['formula']:.3f}"
        )
    console.print(table)


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for point in result["points"]:
        missed = abs(point["measured"] / point["formula"] - 1)
        what = f"peak memory beside its formula, {PARTS[point['part']]}, width {point['width']}"
        found.append(Target("memory", what, missed, TOLERANCE, True))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
