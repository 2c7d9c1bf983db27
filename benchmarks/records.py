"""How reading records grows with the number of runs and of reports, in CPU seconds.

    python -m benchmarks.records --json records.json

Records that never were: runs of twenty reports of four layers for `forecast` and `compare`, and one long run of five
layers with error bars for `show`. CPU seconds of one process, because other work on the machine does not count.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.harness import Target, console, main
from lightning_spectral import compare, forecast
from lightning_spectral.cli import main as command
from lightning_spectral.runs import Record, Row

SERIES = "activation-validate"
TARGET = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--reports", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256, help="of the layers of the long run")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        most = max(arguments.runs)
        runs = [_finished(Path(folder) / f"{run:03d}", run) for run in range(most)]
        long = _long(Path(folder) / "long", arguments.reports, arguments.width)
        forecast(runs[:5], TARGET)  # imports and first calls are not what is measured
        with redirect_stdout(StringIO()):
            found = {
                "forecast": {str(n): _cpu(lambda n=n: forecast(runs[:n], TARGET)) for n in arguments.runs},
                "compare": _cpu(lambda: compare(runs[: most // 2], runs[most // 2 :])),
                "show --json": _cpu(lambda: command(["show", str(long), "--json"])),
                "show --plot": _cpu(lambda: command(["show", str(long), "--plot", f"{folder}/long.png"])),
            }
    return found | {"runs": most, "reports": arguments.reports}


def _finished(folder: Path, number: int) -> Path:
    """A run of a family of its own length, which comes down to the target."""
    generator, layers = np.random.default_rng(number), ("a", "b", "c", "d")
    tokens = 1e6 * math.exp(generator.normal(0, 0.5))
    record = _begin(folder, number, layers)
    ranks = np.arange(1, 65.0)
    for step in range(1, 21):
        record.append(Row(step, step / 10 * tokens, float(step), math.nan, max(3 - step / 8, 1)))
        arrays = {"tokens": np.asarray(step / 10 * tokens)}
        for layer in layers:
            arrays[f"activation/{layer}/eigenvalues"] = ranks ** -(1 + 0.1 * generator.normal())
            arrays[f"activation/{layer}/num_tokens"] = np.asarray(4096)
        record.write_report(SERIES, step, arrays)
    return folder


def _long(folder: Path, reports: int, width: int) -> Path:
    """One run of many reports, with error bars."""
    generator, layers = np.random.default_rng(0), ("a", "b", "c", "d", "e")
    record = _begin(folder, 0, layers)
    ranks = np.arange(1, width + 1.0)
    for step in range(1, reports + 1):
        arrays = {"tokens": np.asarray(100.0 * step)}
        for layer in layers:
            values = ranks ** -(1 + 0.1 * generator.normal())
            groups = values * np.exp(0.01 * generator.normal(size=(4, 1))) * ranks ** generator.normal(0, 0.01, (4, 1))
            facts = {"num_tokens": 4096, "num_rows_without": 3072, "failure": ""}
            fields = {"eigenvalues": values, "leave_one_out": groups} | facts
            arrays |= {f"activation/{layer}/{field}": np.asarray(array) for field, array in fields.items()}
        record.write_report(SERIES, step, arrays)
        record.append(Row(step, 100.0 * step, float(step), math.nan, 3 - step / reports))
    return folder


def _begin(folder: Path, number: int, layers: tuple[str, ...]) -> Record:
    settings = {"kind": "activation", "stage": "validate", "layers": list(layers), "num_tokens": 4096}
    about = {"id": str(folder), "family": "F", "series": {SERIES: settings}, "batch_tokens": 64.0 * 2 ** (number % 6)}
    return Record.begin(folder / "spectra", about)


def _cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def show(result: dict[str, Any]) -> None:
    table = Table("", "CPU seconds", title="Reading records", title_justify="left")
    for runs, seconds in result["forecast"].items():
        table.add_row(f"forecast, {runs} runs", f"{seconds:.2f}")
    table.add_row(f"compare, {result['runs'] // 2} runs a side", f"{result['compare']:.2f}")
    for name in ("show --json", "show --plot"):
        table.add_row(f"{name}, {result['reports']} reports", f"{result[name]:.2f}")
    console.print(table)


def targets(result: dict[str, Any]) -> list[Target]:
    runs, seconds = zip(*((int(n), found) for n, found in result["forecast"].items()), strict=True)
    growth = math.log(seconds[-1] / seconds[0]) / math.log(runs[-1] / runs[0])
    reports, most = result["reports"], result["runs"]
    return [
        Target("records", f"forecast, from {runs[0]} to {runs[-1]} runs, exponent of the growth", growth, 1.3, True),
        Target("records", f"forecast of {most} runs, CPU s", seconds[-1], 15, True),
        Target("records", f"compare of {most // 2} against {most // 2}, CPU s", result["compare"], 4, True),
        Target("records", f"show --json on {reports} reports, CPU s", result["show --json"], 3, True),
        Target("records", f"show --plot on {reports} reports, CPU s", result["show --plot"], 3, True),
    ]


if __name__ == "__main__":
    main(sys.modules[__name__])
