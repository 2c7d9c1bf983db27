"""What one activation report costs by the width of the model, and what share of published training runs that is.

    python -m benchmarks.cost_by_width --json benchmarks/results/2026-11-27/cost_by_width.json

A report of five layers in four groups, of 65,536 rows of each: collecting them, and solving the 25 matrices. Up to
``--five-layers-up-to`` all of it is measured, up to ``--one-layer-up-to`` one layer, whose cost is taken five times,
and beyond that it is computed from the widest that was measured, products by the second and solves by the third power
of the width; each row of the table says which. Each width is measured in a fresh process, with its peak memory. Seconds
are those of the threads' work (``--threads``, one), which are those of the clock on a machine with nothing beside.

The table of published runs sets these against the time of 100 training steps, the default between reports: products at
the full float32 rate of the cards of that run, over all of which the rows are spread, which is computed; the solve as
it was found here, on the CPU, while all cards wait.
"""

import argparse
import sys
from typing import Any

from rich.progress import track
from rich.table import Table

from benchmarks.harness import Target, console, in_fresh_process, main
from benchmarks.one_report import GROUPS
from benchmarks.published_runs import RUNS, PublishedRun
from lightning_spectral.probing.cost import sums_bytes as of_layer

EVERY_N_STEPS = 100
LAYERS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 1024, 1600, 2048, 4096, 8192])
    parser.add_argument("--five-layers-up-to", type=int, default=2048, help="width up to which all is measured")
    parser.add_argument("--one-layer-up-to", type=int, default=4096, help="width up to which one layer is")
    parser.add_argument("--num-tokens", type=int, default=65536, help="rows of each layer")
    parser.add_argument("--threads", type=int, default=1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for width in track(sorted(arguments.widths), "widths", console=console, transient=True):
        layers = 0
        if width <= arguments.one_layer_up_to:
            layers = LAYERS if width <= arguments.five_layers_up_to else 1
        rows.append(of_width(width, layers, arguments) if layers else computed(width, rows[-1]))
    return {"num_tokens": arguments.num_tokens, "threads": arguments.threads, "widths": rows}


def of_width(width: int, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measured, of so many layers."""
    sizes = {"width": width, "layers": layers, "num_tokens": arguments.num_tokens, "threads": arguments.threads}
    peak, found = in_fresh_process("benchmarks.one_report", "report", sizes)
    assert not found["failures"], found["failures"]
    times = LAYERS / layers
    return {
        "width": width,
        "how": "measured" if layers == LAYERS else "one layer measured, times 5",
        "collecting": times * found["collecting_cpu"],
        "solving": times * found["solving_cpu"],
        "clock": times * (found["collecting"] + found["solving"]),
        "sums_bytes": sums_bytes(width),
        # What is solved at a time is one layer's: of the others there are but sums.
        "peak_bytes": peak + (LAYERS - layers) * sums_bytes(width) // LAYERS,
    }


def sums_bytes(width: int) -> int:
    """What is kept while rows are collected, of all layers, counted from shapes."""
    return LAYERS * of_layer(GROUPS, width)


def computed(width: int, widest: dict[str, Any]) -> dict[str, Any]:
    """Of a width that was not measured, from one that was."""
    ratio = width / widest["width"]
    return {
        "width": width,
        "how": f"computed from {widest['width']}: products by width^2, solves by width^3, bytes by width^2",
        "collecting": widest["collecting"] * ratio**2,
        "solving": widest["solving"] * ratio**3,
        "clock": None,
        "sums_bytes": sums_bytes(width),
        "peak_bytes": round(widest["peak_bytes"] * ratio**2),
    }


def of_runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a report would be of each published run whose width is in the table."""
    solving = {row["width"]: row["solving"] for row in result["widths"]}
    return [
        {
            "name": run.name,
            "width": run.width,
            "tokens_per_second": run.tokens_per_second,
            "products": run.products_share(LAYERS, result["num_tokens"], EVERY_N_STEPS),
            "solving": run.share(solving[run.width], EVERY_N_STEPS),
            "run": run,
        }
        for run in RUNS
        if run.width in solving
    ]


def show(result: dict[str, Any]) -> None:
    for title, header, rows in tables(result):
        table = Table(*header, title=title, title_justify="left")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of both."""
    rows = [
        [
            f"{row['width']:,}",
            _seconds(row["collecting"]),
            _seconds(row["solving"]),
            _gib(row["sums_bytes"]),
            _gib(row["peak_bytes"]),
            row["how"],
        ]
        for row in result["widths"]
    ]
    shares = [
        [
            found["name"],
            f"{found['width']:,}",
            f"{found['run'].cards:,} {found['run'].card}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['run'].seconds_per_step:.3g}",
            f"{found['products']:.2g}",
            f"{found['solving']:.2g}",
        ]
        for found in of_runs(result)
    ]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    tokens = f"{result['num_tokens']:,}"
    return [
        (
            f"One report: 5 layers, {GROUPS} groups, {tokens} rows of each; seconds of {threads} of a CPU",
            ["width", "collecting, s", "solving, s", "sums, GiB", "peak, GiB", "how"],
            rows,
        ),
        (
            f"Of {EVERY_N_STEPS} steps of published runs, the share of its products (computed, at the cards' float32 "
            "rate) and of its solve (on this CPU, for which the cards wait)",
            ["run", "width", "cards", "tokens/s", "step, s", "products", "solve"],
            shares,
        ),
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g}"


def markdown(result: dict[str, Any]) -> str:
    """Both tables, and where the published numbers stand."""
    parts = ["# Cost of an activation report by width\n"]
    for title, header, rows in tables(result):
        lines = [" | ".join(["", *header, ""]).strip(), "|" + " --- |" * len(header)]
        lines += [" | ".join(["", *cells, ""]).strip() for cells in rows]
        parts.append(f"{title}:\n\n" + "\n".join(lines) + "\n")
    sources = "\n".join(f"- {_source(found['run'])}" for found in of_runs(result))
    return "\n".join(parts) + f"\nTokens and seconds of a step are from\n\n{sources}\n"


def _source(run: PublishedRun) -> str:
    return f"{run.name}: {run.how} ({run.source})"


def targets(result: dict[str, Any]) -> list[Target]:
    """None was asked for: the table is the result."""
    return []


if __name__ == "__main__":
    main(sys.modules[__name__])
