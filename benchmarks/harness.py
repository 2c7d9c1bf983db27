"""How every benchmark measures and tells: contenders in turn, memory in fresh processes, found against wanted."""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.compact_json import write_compact

console = Console(width=140, file=sys.stdout)
"""Where results go, even while the standard output of what is measured is put aside."""

PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "opacus", "backpack-for-pytorch")


@dataclass(frozen=True)
class Target:
    """A number that was asked for, and what was found."""

    point: str
    """Which point of the list of targets it belongs to."""
    what: str
    found: float
    limit: float
    is_ceiling: bool
    """Whether ``found`` must not exceed the limit; else it must not fall below."""
    floor: str = ""
    """What the work must cost, whoever does it."""
    note: str = ""
    """Why it was missed, or what else must be known to read the number."""

    @property
    def holds(self) -> bool:
        return self.found <= self.limit if self.is_ceiling else self.found >= self.limit

    def cells(self) -> list[str]:
        """What a table shows of it."""
        bound = f"{'at most' if self.is_ceiling else 'at least'} {self.limit:g}"
        return [self.point, self.what, bound, f"{self.found:.3g}", "yes" if self.holds else "no", self.floor, self.note]


COLUMNS = ("", "what", "wanted", "found", "holds", "floor", "note")


def in_turn(contenders: dict[str, Callable[[], Any]], repeats: int, title: str = "") -> dict[str, list[float]]:
    """Run all contenders one after the other, several times over; what disturbs one disturbs its neighbours too.

    Args:
        contenders: What to run, by name; each runs once more before the clock starts.
        repeats: Rounds that are timed.
        title: For the progress bar; none without.

    Returns:
        Seconds of each round by name.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = track(range(repeats), title, console=console, transient=True) if title else range(repeats)
    for _ in rounds:
        for name, run in contenders.items():
            seconds[name].append(seconds_of(run))
    return seconds


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of one call, without the rubbish of those before."""
    gc.collect()
    start = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - start


def settle() -> None:
    """Wait for a GPU, where there is one: work that is only queued is not done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def min_and_median(seconds: list[float]) -> str:
    return f"{min(seconds):.3f} / {statistics.median(seconds):.3f}"


PROMPT_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Makes glibc give back at once what is freed: else the same run varies by more than contenders do."""


def peak_bytes(module: str, contender: str, settings: dict[str, Any]) -> int:
    """Memory that one run takes at its peak, see :func:`in_fresh_process`."""
    return in_fresh_process(module, contender, settings)[0]


def in_fresh_process(module: str, contender: str, settings: dict[str, Any]) -> tuple[int, Any]:
    """What one run finds in a process of its own, and what memory it takes at its peak above what was held before.

    Args:
        module: A benchmark, whose ``contender(name, settings)`` gives the run, and a small one to warm up.
        contender: Name of the run.
        settings: Handed on, as JSON.

    Returns:
        Bytes of resident memory, and what the run returned, where JSON has it; else None.

    Raises:
        RuntimeError: With the last line of what the process said, where the run fails.
    """
    words = [sys.executable, "-m", "benchmarks.harness", module, contender, json.dumps(settings)]
    environment = os.environ | PROMPT_MALLOC
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak_bytes"], found["result"]


def print_peak(module: str, contender: str, settings: dict[str, Any]) -> None:
    """What :func:`in_fresh_process` runs there."""
    warnings.filterwarnings("ignore")
    small, run = __import__(module, fromlist=["contender"]).contender(contender, settings)
    small()  # imports and thread pools are not what is measured
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    result = run()
    peak = resident("VmHWM") - before
    print(json.dumps({"peak_bytes": peak, "result": result if isinstance(result, dict) else None}))


def resident(field: str) -> int:
    """Bytes of resident memory of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"field must be in /proc/self/status, got {field!r}: peak memory is measured on Linux")


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code: machine and versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
    }


def show_targets(found: list[Target], title: str) -> None:
    """Print what was asked and what was found."""
    table = Table(*COLUMNS, title=title, title_justify="left")
    for target in found:
        table.add_row(*target.cells())
    console.print(table)


def main(benchmark: ModuleType) -> None:
    """The command line of one benchmark: measure, print, and write JSON if asked.

    Args:
        benchmark: A module with ``add_arguments(parser)``, ``measure(arguments)``, ``show(result)`` and
            ``targets(result)``, whose docstring opens with what it measures; ``markdown(result)``, where there is one,
            is written beside the JSON.
    """
    assert benchmark.__doc__ is not None
    parser = argparse.ArgumentParser(description=benchmark.__doc__.splitlines()[0])
    benchmark.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    result = benchmark.measure(arguments)
    benchmark.show(result)
    found = benchmark.targets(result)
    if found:
        show_targets(found, "against what was asked")
    if arguments.json:
        name = benchmark.__spec__.name if benchmark.__spec__ else benchmark.__name__
        written = {
            "command": " ".join(["python", "-m", name, *_without_files(sys.argv[1:])]),
            "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "plot")},
            "environment": environment(),
            "targets": [asdict(target) for target in found],
            "result": result,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_compact(arguments.json, written)
        if hasattr(benchmark, "markdown"):
            arguments.json.with_suffix(".md").write_text(benchmark.markdown(result))


def _without_files(words: list[str]) -> list[str]:
    """The command as somebody would repeat it, wherever this one wrote its results."""
    for option in ("--json", "--plot"):
        if option in words:
            place = words.index(option)
            words = words[:place] + words[place + 2 :]
    return words


if __name__ == "__main__":
    print_peak(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
