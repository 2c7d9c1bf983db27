"""Which engines work where: strategies, precisions and compilers, each tried on a CPU against a naive twin.

    python -m benchmarks.engines --json benchmarks/results/2026-11-27/engines.json
    python -m benchmarks.engines --page    # puts the newest of such results into docs/engines.md

Two or four gloo processes where a strategy needs them; five minutes on two quiet cores. A cell says how far the worst
layer or parameter is from the twin in float64, as a share of its largest value: "exact" below 1e-6, in float32 below
1e-4; "rounding" below 0.05 for types of 16 bits. Else it has the line that refuses, or the reason of a NaN.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Trainer
from rich.progress import track
from rich.table import Table

from benchmarks.engine_runs import COMPILED, ENGINES, WORLDS, expected, found_by, in_ranks
from benchmarks.harness import Target, console, main
from lightning_spectral import GradientSpectrum
from lightning_spectral.capture.one_line import reason_of

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
UNTRIED = {"fsdp": "FSDPStrategy", "deepspeed": "DeepSpeedStrategy"}
"""Strategies of Lightning that refuse a CPU, or need a package of their own, by the name that a Trainer takes."""

NAMES = {
    "single": "one device",
    "ddp": "DDP, two processes",
    "fsdp2": "`fully_shard` (FSDP2), two",
    "hsdp": "HSDP, two by two",
    "tp": "tensor parallel, two",
    "sequence": "the same with sequence parallelism",
    "fsdp": "`FSDPStrategy` (the older FSDP)",
    "deepspeed": "DeepSpeed",
}
TABLES = {
    "strategies": "Strategies, in float64",
    "precisions": "Precisions, on one device",
    "compiled": "Compiled models, in float32 on one device",
}
EXACT = {"64-true": 1e-6, "32-true": 1e-4}
ROUNDING = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--strategies", nargs="+", choices=[*WORLDS, *UNTRIED], default=[*WORLDS, *UNTRIED])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = {
        "strategies": arguments.strategies,
        "precisions": arguments.precisions,
        "compiled": ["not compiled", *COMPILED],
    }
    wanted = [(table, row) for table in arguments.tables for row in rows[table]]
    right = expected()
    found: dict[str, Any] = {table: {} for table in arguments.tables}
    for table, row in track(wanted, "engines", console=console, transient=True):
        found[table][row] = of_row(table, row, right)
    return found


def of_row(table: str, row: str, right: dict[str, Any]) -> dict[str, str]:
    """The cells of a row by engine."""
    if row in UNTRIED:
        return of_untried(row)
    if table == "strategies":
        return {engine: cell(found, right, "64-true") for engine, found in in_ranks(row).items()}
    if table == "precisions":
        return {engine: cell(found_by(engine, precision=row), right, row) for engine in ENGINES}
    compiled = "" if row == "not compiled" else row
    return {
        engine: cell(found_by(engine, precision="32-true", compiled=compiled), right, "32-true") for engine in ENGINES
    }


def cell(found: dict[str, Any], right: dict[str, Any], precision: str) -> str:
    """What a cell says of what an engine found."""
    if "refused" in found:
        return f"{'refused' if found['by'] == 'ValueError' else 'fails'}: {found['refused']}"
    reasons = [one["failure"] for one in found.values() if one["failure"] is not None]
    if reasons:
        return f"NaN: {reasons[0]}"
    error = max(_error(one["values"], _right(right, name)) for name, one in found.items())
    if error <= EXACT.get(precision, 0.0):
        return f"exact ({error:.0e})"
    is_short = precision not in EXACT
    return f"{'rounding' if is_short and error <= ROUNDING else 'off'} ({error:.0e})"


def _right(right: dict[str, Any], name: str) -> list[float]:
    return next(kind[name] for kind in right.values() if name in kind)


def _error(values: list[float], right: list[float]) -> float:
    if len(values) != len(right):
        return math.inf
    return max(abs(mine - its) for mine, its in zip(values, right, strict=True)) / right[0]


def of_untried(name: str) -> dict[str, str]:
    """What Lightning says of a strategy here, and what GradientSpectrum says of it anywhere."""
    why = "it runs here"
    try:
        Trainer(accelerator="cpu", strategy=name, devices=2, logger=False, enable_checkpointing=False)
    except Exception as error:
        why = f"{type(error).__name__}: {reason_of(error)}"
    # It is refused by its name, before anything is asked of it.
    host: Any = SimpleNamespace(strategy=UNTRIED[name])
    cells = {"activations": f"not tried, for on this machine Lightning says {why}"}
    for engine in ENGINES[1:]:
        try:
            GradientSpectrum(method=engine).join(host)
            cells[engine] = "not tried"
        except ValueError as error:
            cells[engine] = f"refused: {error}"
    return cells


def show(result: dict[str, Any]) -> None:
    for name, rows in result.items():
        table = Table("", *ENGINES, title=TABLES[name], title_justify="left")
        for row, cells in rows.items():
            table.add_row(NAMES.get(row, row), *(cells[engine] for engine in ENGINES))
        console.print(table)


def markdown(result: dict[str, Any]) -> str:
    """The tables, each long line once below its table and by number in its cells."""
    pieces = []
    for name, rows in result.items():
        notes: dict[str, int] = {}
        lines = [f"| | {' | '.join(ENGINES)} |", "|" + " --- |" * (len(ENGINES) + 1)]
        for row, cells in rows.items():
            short = [_short(cells[engine], notes) for engine in ENGINES]
            lines.append(f"| {NAMES.get(row, row)} | {' | '.join(short)} |")
        listed = "\n".join(f"{number}. {note}" for note, number in notes.items())
        pieces.append(f"## {TABLES[name]}\n\n" + "\n".join(lines) + "\n" + (f"\n{listed}\n" if listed else ""))
    return "\n".join(pieces)


def _short(words: str, notes: dict[str, int]) -> str:
    for kind in ("refused", "fails", "NaN", "not tried"):
        if words.startswith(kind) and len(words) > len(kind):
            reason = words[len(kind) :].lstrip(":, ")
            return f"{kind} [{notes.setdefault(reason, len(notes) + 1)}]"
    return words


def targets(result: dict[str, Any]) -> list[Target]:
    """None was asked for: the tables are the result."""
    return []


PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
BEGIN, END = "<!-- python -m benchmarks.engines --page -->\n", "<!-- end -->\n"


def newest() -> dict[str, Any]:
    """The newest committed tables."""
    path = max((Path(__file__).parent / "results").glob("*/engines.json"))
    return json.loads(path.read_text())["result"]


def page(text: str, result: dict[str, Any]) -> str:
    """The page with these tables in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}"


if __name__ == "__main__":
    if "--page" in sys.argv:
        PAGE.write_text(page(PAGE.read_text(), newest()))
    else:
        main(sys.modules[__name__])
