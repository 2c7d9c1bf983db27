"""All benchmarks' results of one day as one report: what was asked, what was found, and what was not measured.

    python -m benchmarks.report benchmarks/results/2026-11-26

writes ``report.md`` and ``environment.json`` beside the results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import COLUMNS, Target

NOT_MEASURED = [
    "Anything on a GPU (point 8): step time at full size in bfloat16, kernel gaps, the share of time in the hooks, and "
    "whether a solve beside training would be worth its staleness. On a CPU it would take the cores that train.",
    "More than four ranks, and ranks on machines of their own.",
    "`torch.compile`d models, activation checkpointing and sharded models.",
    "Peers other than those named; wandb's upload of what its hooks collect.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results as `python -m benchmarks` wrote them")
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Write the report of a folder of results.

    Args:
        folder: Holds a ``.json`` of each benchmark.
    """
    results = load(folder)
    environment = results[0]["environment"]
    (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    (folder / "report.md").write_text(told(results))


def load(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by the first of the points they answer."""
    files = [path for path in sorted(folder.glob("*.json")) if path.name != "environment.json"]
    if not files:
        raise ValueError(f"folder must hold results, got {folder}: `python -m benchmarks` makes them")
    results = [json.loads(path.read_text()) for path in files]
    return sorted(results, key=lambda result: min((target["point"] for target in result["targets"]), default="~"))


def summary(environment: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
    where = environment["gpu"] or f"{environment['cores']} cores of an {environment['cpu']}"
    return f"{where}, {environment['memory_gib']:g} GiB, Python {environment['python']}, {packages}."


def told(results: list[dict[str, Any]]) -> str:
    """The report in Markdown: machine, table, and what is missing."""
    environment = results[0]["environment"]
    missing = "\n".join(f"- {line}" for line in NOT_MEASURED)
    return (
        f"# Benchmarks of {environment['date']}\n\n{summary(environment)}\n\n{table(results)}\n"
        f"Not measured:\n\n{missing}\n"
    )


def table(results: list[dict[str, Any]]) -> str:
    """All targets as one Markdown table, by point, with the command that measured them."""
    rows = [
        (target["point"], [*Target(**target).cells(), f"`{result['command']}`"])
        for result in results
        for target in result["targets"]
    ]
    lines = [" | ".join(("", *COLUMNS, "command", "")).strip(), "|" + " --- |" * (len(COLUMNS) + 1)]
    for _, cells in sorted(rows, key=lambda row: row[0]):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
