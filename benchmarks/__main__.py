"""All benchmarks one after the other, into a folder of results with a report: ``python -m benchmarks``."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report

BENCHMARKS = (
    "imports",
    "rows",
    "watching",
    "activation_protocol",
    "per_sample",
    "growth",
    "memory",
    "records",
    "training",
)
PICTURES = {"growth": "growth.png"}

NUMPY_BLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Some machines set these for the sake of old builds; they would slow NumPy down, and flatter us."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results" / time.strftime("%Y-%m-%d"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in NUMPY_BLAS}
    for name in arguments.only:
        print(f"\n== {name} ==", flush=True)
        words = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(arguments.folder / f"{name}.json")]
        if name in PICTURES:
            words += ["--plot", str(arguments.folder / PICTURES[name])]
        subprocess.run(words, env=environment, check=True)
    report.write(arguments.folder)


if __name__ == "__main__":
    main()
