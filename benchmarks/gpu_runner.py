"""Runs the parts of the GPU benchmark in a process beside this one, within a budget of time."""

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS
from benchmarks.harness import console

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 600.0
"""Of a part, however much time there is."""
START_SECONDS = 120.0


class Worker:
    """The process; a new one after each that failed, died or took too long.

    Args:
        sizes: What the worker is told about sizes.
    """

    def __init__(self, sizes: dict[str, Any]) -> None:
        words = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(sizes)]
        # From a checkout, whether or not the package is installed, and with the same bits from cuBLAS each time.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        self._process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._said = ""
        self.answer(START_SECONDS)

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """What a part found within some seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """Its next line; what it says beside is kept, so that its pipe never fills.

        Raises:
            RuntimeError: If there is none in time, or the process has ended.
        """
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            selector.register(self._process.stderr, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is self._process.stderr:
                        more = os.read(key.fd, 65536).decode(errors="replace")
                        self._said = (self._said + more)[-4000:]
                        if not more:
                            selector.unregister(key.fileobj)
                    elif line := self._process.stdout.readline():
                        return json.loads(line)
                    else:
                        raise RuntimeError(f"the process ended: {self._last_words()}")
        raise RuntimeError(f"it took more than {seconds:.0f} s")

    def _last_words(self) -> str:
        lines = [line for line in self._said.splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def run_parts(names: list[str], sizes: dict[str, Any], minutes: float | None) -> dict[str, Any]:
    """Run parts one after the other.

    Args:
        names: Of :data:`benchmarks.gpu_parts.PARTS`.
        sizes: Arguments of :func:`benchmarks.gpu_sizes.sizes_of`.
        minutes: For all of them; None for as long as it takes.

    Returns:
        What each found, or why it found nothing, by name.
    """
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}
    worker: Worker | None = None
    for index, name in enumerate(names):
        part = PARTS[name]
        left = deadline - time.monotonic()
        console.print(f"[{index + 1}/{len(names)}] {name} ...", markup=False, end=" ", highlight=False)
        begun = time.monotonic()
        outcome: dict[str, Any] = {"lines": [], "seconds": 0.0}
        if left < part.seconds and not sizes["is_tiny"]:
            outcome["skipped"] = (
                f"{left:.0f} s were left of {minutes:g} minutes, and it takes about {part.seconds:.0f}: "
                f"--parts {name} runs it alone"
            )
        else:
            try:
                worker = worker or Worker(sizes)
                outcome |= worker.run(name, min(left, MOST_SECONDS))
            except (RuntimeError, OSError) as error:
                outcome |= {"failed": str(error), "seconds": time.monotonic() - begun}
            if "failed" in outcome and worker is not None:
                worker.close()  # a GPU's error may spoil whatever comes after it in the process
                worker = None
        found[name] = {"what": part.what} | outcome
        said = "failed" if "failed" in outcome else "skipped" if "skipped" in outcome else "done"
        console.print(f"{said}, {time.monotonic() - begun:.0f} s", highlight=False)
    if worker is not None:
        worker.close()
    return found
