"""What watching costs on a GPU, by one command.

    python -m benchmarks.gpu            # half an hour at most on an H100
    python -m benchmarks.gpu --quick    # under eight minutes; what does not fit is left out, with a line
    python -m benchmarks.gpu --device cpu --tiny    # every part that a CPU can, at sizes that say nothing of speed

from the root of a checkout, with nothing installed but Python and torch with CUDA: packages that are missing are named
in one line, with the command that installs them and leaves torch alone. The model is d12 in bf16-mixed of
``examples/d12.yaml``, on random tokens. Each part runs by itself in a process beside this one, and a part that fails is
a line of the result. Results go to ``gpu.json`` and ``gpu.md`` of today's folder of results, or where ``--json`` says.
"""

import argparse
import importlib.util
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = {
    "jsonargparse": "'jsonargparse[signatures]>=4.39'",
    "lightning": "'lightning>=2.5,!=2.6.2,!=2.6.3'",
    "lightning_utilities": "'lightning-utilities>=0.15.3'",
    "matplotlib": "'matplotlib>=3.8'",
    "numpy": "'numpy>=1.26'",
    "rich": "'rich>=13'",
    "scipy": "'scipy>=1.11'",
    "tensorboard": "'tensorboard>=2.16'",
    "torchmetrics": "'torchmetrics>=1.5'",
    "typing_extensions": "'typing-extensions>=4.10'",
}
"""What the package needs beside torch, by the name it is imported by, as ``pyproject.toml`` has it."""

QUICK_MINUTES = 7.5


def what_to_install() -> str | None:
    """One line that names what is missing, and the command that brings it; None if nothing is."""
    if importlib.util.find_spec("torch") is None:
        return "torch is missing: install it as https://pytorch.org/get-started says for this machine's CUDA"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    wanted = " ".join(PACKAGES[name] for name in missing)
    # The torch that is there is wanted too, as it is: pip then keeps it, or says that it cannot.
    return f"missing: {', '.join(missing)}: {sys.executable} -m pip install torch=={version('torch')} {wanted}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from benchmarks.gpu_parts import PARTS

    parser.add_argument("--quick", action="store_true", help=f"stop after {QUICK_MINUTES:g} minutes, with fewer rounds")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, and for tests")
    parser.add_argument("--minutes", type=float, default=None, help="leave out what does not fit into so many")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu_runner import run_parts

    minutes = arguments.minutes or (QUICK_MINUTES if arguments.quick else None)
    sizes = {"device": arguments.device, "is_tiny": arguments.tiny, "is_quick": arguments.quick}
    return {"sizes": sizes, "parts": run_parts(arguments.parts, sizes, minutes)}


def show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from benchmarks.harness import console

    for name, part in result["parts"].items():
        table = Table("what", "found", "aim", "note", title=f"{name}: {part['what']}", title_justify="left")
        for line in part["lines"]:
            table.add_row(*_cells(line))
        console.print(table if part["lines"] else f"{name}: {_why_not(part)}", markup=False)


def _cells(line: dict[str, Any]) -> list[str]:
    return [line["what"], f"{line['found']:.4g} {line['unit']}".strip(), line["aim"], line["note"]]


def _why_not(part: dict[str, Any]) -> str:
    return f"failed: {part['failed']}" if "failed" in part else f"skipped: {part['skipped']}"


def markdown(result: dict[str, Any]) -> str:
    """All parts, for people."""
    from benchmarks.harness import environment
    from benchmarks.report import summary

    facts = environment()
    quick = (
        " (quick)" * result["sizes"]["is_quick"]
        + " (tiny sizes, which say nothing of speed)" * result["sizes"]["is_tiny"]
    )
    pieces = [f"# On {facts['gpu'] or 'a CPU'}, {facts['date']}{quick}\n\n{summary(facts)}\n"]
    for name, part in result["parts"].items():
        pieces.append(f"## {name}\n\n{part['what']} ({part['seconds']:.0f} s)\n")
        if part["lines"]:
            rows = [["what", "found", "aim", "note"], ["---"] * 4, *(_cells(line) for line in part["lines"])]
            pieces.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n")
        else:
            pieces.append(f"{_why_not(part)}\n")
    return "\n".join(pieces)


def targets(result: dict[str, Any]) -> list[Any]:
    """Those numbers for which there is an aim, where they were found."""
    from benchmarks.harness import Target

    return [
        Target("8", f"{name}: {line['what']}", line["found"], *limit, note=line["note"])
        for name, part in result["parts"].items()
        for line in part["lines"]
        if (limit := _limit(line["aim"])) is not None
    ]


def _limit(aim: str) -> tuple[float, bool] | None:
    """An aim's number, and whether it is a ceiling."""
    if not aim:
        return None
    if aim.startswith("at least "):
        return float(aim.split()[2].rstrip(",")), False
    return float(aim), aim == "0"


def main() -> None:
    """Say what is missing, or measure and write."""
    lacking = what_to_install()
    if lacking is not None:
        sys.exit(lacking)
    import torch

    if not torch.cuda.is_available() and "cpu" not in sys.argv:
        sys.exit("no CUDA device: `python -m benchmarks.gpu --device cpu --tiny` runs every part that a CPU can")
    from benchmarks import harness

    if "--json" not in sys.argv:
        folder = Path(__file__).parent / "results" / time.strftime("%Y-%m-%d")
        sys.argv += ["--json", str(folder / "gpu.json")]
    harness.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
