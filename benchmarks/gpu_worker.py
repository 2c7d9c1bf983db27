"""A process that runs the parts of the GPU benchmark it is told on its standard input, one JSON line for each."""

import json
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from time import perf_counter
from typing import Any

from benchmarks.gpu_parts import PARTS, SkippedError
from benchmarks.gpu_sizes import Sizes, sizes_of
from lightning_spectral.capture.one_line import reason_of


def main() -> None:
    """Answer on what was the standard output; whatever else is printed goes where errors go."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sizes = sizes_of(**json.loads(sys.argv[1]))
    warnings.filterwarnings("ignore")
    print(json.dumps({"is_ready": True}), file=answers)
    for line in sys.stdin:
        name = line.strip()
        print(f"== {name} ==", file=sys.stderr, flush=True)
        print(json.dumps(outcome(name, sizes)), file=answers)


def outcome(name: str, sizes: Sizes) -> dict[str, Any]:
    """What a part found, or why it found nothing, with its time."""
    start = perf_counter()
    found: dict[str, Any] = {"lines": []}
    try:
        found["lines"] = [asdict(line) for line in PARTS[name].run(sizes)]
    except SkippedError as reason:
        found["skipped"] = str(reason)
    except Exception as error:  # the other parts are of use all the same
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {reason_of(error)}"
    return found | {"seconds": perf_counter() - start}


if __name__ == "__main__":
    main()
