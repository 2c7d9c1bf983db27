"""All benchmarks' results of one day as one report: what was asked, what was found, and what was not measured.

    python -m benchmarks.report benchmarks/results/2026-11-25

writes ``report.md`` and ``environment.json`` beside the results, and the table into ``benchmarks/README.md``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import COLUMNS, Target

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

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
    """Write the report of a folder of results, and its table into the README.

    Args:
        folder: Holds a ``.json`` of each benchmark.
    """
    results = load(folder)
    environment = results[0]["environment"]
    (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    text = [f"# Benchmarks of {environment['date']}\n", summary(environment), "", table(results)]
    text += ["Not measured:\n", *(f"- {line}" for line in NOT_MEASURED)]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{block(folder, results)}{END}{after}")


def load(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by the first of the points they answer."""
    files = [path for path in sorted(folder.glob("*.json")) if path.name != "environment.json"]
    if not files:
        raise ValueError(f"folder must hold results, got {folder}: `python -m benchmarks` makes them")
    results = [json.loads(path.read_text()) for path in files]
    return sorted(results, key=lambda result: min(target["point"] for target in result["targets"]))


def summary(environment: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
    where = environment["gpu"] or f"{environment['cores']} cores of an {environment['cpu']}"
    return f"{where}, {environment['memory_gib']:g} GiB, Python {environment['python']}, {packages}."


def block(folder: Path, results: list[dict[str, Any]]) -> str:
    """What stands in the README between its two marks."""
    environment = results[0]["environment"]
    return f"Of {environment['date']}, {summary(environment)}\n\n{table(results)}"


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
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main()
