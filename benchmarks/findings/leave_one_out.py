"""Error bars for less: spectra without each group in float32, or by perturbation theory, beside solves in float64.

    python -m benchmarks.findings.leave_one_out

A report solves one matrix with all groups and one without each. What else could be done, what it costs by width, and
what it does to standard errors, corrections, coverage and floors where the truth is known: Gaussian rows of several
widths and numbers, heavy tails, and the processes of the control study, all turned into a basis that is no special one.
About five minutes on one core; table and JSON go to ``benchmarks/results/findings``. ``--device cuda`` measures cost
there.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.progress import track
from scipy.special import stdtrit
from torch import Tensor

from benchmarks.compact_json import write_compact
from benchmarks.findings import perturbation
from benchmarks.findings.control import HEAD, LEVEL, NUM_GROUPS, TAIL
from benchmarks.findings.leave_one_out_report import write_report
from benchmarks.findings.processes import LENGTH, PROCESSES, eigenvalues, rows
from benchmarks.findings.runs import RESULTS
from benchmarks.harness import console, environment
from lightning_spectral.functional import (
    Moments,
    Spectrum,
    angle_floor,
    head_share,
    jackknife,
    js_divergence,
    js_floor,
    moments,
    overlap_floor,
    power_law,
    principal_angles,
    rankme,
    subspace_overlap,
)
from lightning_spectral.functional.moments import covariance, pool
from lightning_spectral.functional.single_precision import spectra_of_parts

RANK = 10
"""Leading vectors, and the values of the head."""
WIDTHS = (192, 256, 384, 768, 1600, 2048, 4096)
METHODS = ("float64", "float32", "first order", "second order")
MEMBERS = torch.cat([torch.ones(1, NUM_GROUPS), 1 - torch.eye(NUM_GROUPS)])
QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "tail": lambda values: power_law(values, TAIL).exponent,
    "head": lambda values: power_law(values, HEAD).exponent,
    "RankMe": rankme,
    "head share": lambda values: head_share(values, RANK),
}


@dataclass(frozen=True)
class Cell:
    """Draws of one size from one process."""

    process: str
    spectrum: str
    """An exponent, or a name that the control study knows."""
    width: int
    ratio: int
    """Rows a channel, n/d."""
    num_draws: int

    @property
    def name(self) -> str:
        return f"{self.process}, {self.spectrum}, d = {self.width}"

    def truth(self) -> Tensor:
        if self.spectrum == "broken":
            return eigenvalues("broken", self.width)
        return torch.arange(1, self.width + 1, dtype=torch.float64) ** -float(self.spectrum)


def cells_of(num_draws: int) -> list[Cell]:
    """Rows that are independent of every n/d, those that are not of two; few draws where they are wide."""
    gaussian = [Cell("independent", power, 192, n, num_draws) for power in ("1.2", "0.8") for n in (2, 4, 8, 16, 64)]
    sizes = [Cell("independent", "1.2", 64, n, num_draws) for n in (4, 16)]
    sizes += [Cell("independent", "1.2", 768, n, num_draws // 5 // 2 * 2) for n in (4, 16)]
    others = [Cell(process, "1.2", 128, n, num_draws) for process in PROCESSES[1:] for n in (16, 64)]
    steep = [Cell("independent", power, 192, 64, num_draws) for power in ("2", "3")]
    return gaussian + sizes + others + [Cell("independent", "broken", 128, 64, num_draws)] + steep


def draw(cell: Cell, truth: Tensor, basis: Tensor, generator: torch.Generator) -> dict[str, Spectrum]:
    """One report's spectrum by each of the methods."""
    if cell.process == "independent":
        groups = torch.randn(
            NUM_GROUPS, cell.ratio * cell.width // NUM_GROUPS, cell.width, dtype=torch.float64, generator=generator
        )
        groups *= truth.sqrt()
    else:
        sequences = rows(cell.process, truth, cell.ratio * cell.width // LENGTH, generator)
        groups = sequences.reshape(NUM_GROUPS, -1, cell.width)
    return by_method(moments(groups @ basis))


def by_method(parts: Moments) -> dict[str, Spectrum]:
    """Spectra, with error bars by each method, of moments ``(G, d, d)`` of groups."""
    sample, width = pool(parts, MEMBERS.to(parts.num_rows)), parts.mean.shape[-1]
    whole, left = (Moments(*(part[some] for part in sample)) for some in (0, slice(1, None)))
    ascending, vectors = torch.linalg.eigh(covariance(whole))
    values, vectors = ascending.flip(-1), vectors.flip(-1)
    without = covariance(left)
    exact, exact_vectors = torch.linalg.eigh(without)
    rtol = values.new_tensor([width * torch.finfo(torch.float64).eps])
    matrices = perturbation.rotated(without, vectors)
    turned = perturbation.leading_vectors(matrices, vectors, RANK)
    found = {
        "float64": (exact.flip(-1), exact_vectors.flip(-1)[..., :RANK]),
        "float32": spectra_of_parts(left, whole.num_rows, RANK, rtol, values),
        "first order": (perturbation.first_order(matrices), turned),
        "second order": (perturbation.second_order(matrices), turned),
    }
    count, count_without = int(whole.num_rows), int(left.num_rows.min())
    return {
        method: Spectrum(
            values, *((found[method][0], vectors[:, :RANK], found[method][1])), count, count_without, dtype="float64"
        )
        for method in METHODS
    }


def judge(draws: list[Spectrum], truth: Tensor) -> dict[str, Any]:
    """Bias, spread, coverage and floors over independent draws."""
    reach = float(stdtrit(NUM_GROUPS - 1, (1 + LEVEL) / 2))
    found: dict[str, Any] = {}
    for name, of in QUANTITIES.items():
        plain = torch.stack([of(one.values) for one in draws])
        corrected, stderr = jackknife(plain, torch.stack([of(one.leave_one_out) for one in draws]))
        found[name] = {
            "truth": float(of(truth)),
            "plain": float(plain.mean()),
            "corrected": float(corrected.mean()),
            "spread": float(plain.std()),
            "spread_corrected": float(corrected.std()),
            "stderr": float(stderr.square().mean().sqrt()),
            "coverage_of_mean": _share((plain - plain.mean()).abs() <= reach * stderr),
            "coverage_of_truth": _share((corrected - of(truth)).abs() <= reach * stderr),
        }
    floors: dict[str, list[tuple[Tensor, Tensor]]] = {"js": [], "overlap": [], "angle": []}
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        assert first.vectors is not None
        assert second.vectors is not None
        floors["js"].append((js_divergence(first.values, second.values), js_floor(first, second)))
        lost = 1 - subspace_overlap(first.vectors, second.vectors)
        floors["overlap"].append((lost, 1 - overlap_floor(first, second)))
        floors["angle"].append((principal_angles(first.vectors, second.vectors)[0], angle_floor(first, second)))
    for name, pairs in floors.items():
        distances, limits = (torch.stack(some) for some in zip(*pairs, strict=True))
        found[name] = {"floor": float(limits.mean()), "beyond": _share(distances > limits)}
    return found


def _share(is_true: Tensor) -> float:
    return float(is_true.double().mean())


def run_cell(cell: Cell) -> dict[str, Any]:
    truth, generator = cell.truth(), torch.Generator().manual_seed(crc32(cell.name.encode()) + cell.ratio)
    # Diagonal matrices, and graded ones, would be easier for float32 than those of a model.
    basis = torch.linalg.qr(torch.randn(cell.width, cell.width, dtype=torch.float64, generator=generator)).Q
    draws = [draw(cell, truth, basis, generator) for _ in range(cell.num_draws)]
    single = [bool((one["float32"].leave_one_out != one["float64"].leave_one_out).all()) for one in draws]
    found = {method: judge([one[method] for one in draws], truth) for method in METHODS}
    return {**asdict(cell), "name": cell.name, "in_float32": sum(single) / len(single), "methods": found}


def costs_of(width: int, device: torch.device, seconds: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Least seconds of each step, over rounds in which they take turns."""
    values = torch.arange(1, width + 1, dtype=torch.float64) ** -1.2
    noise = torch.randn(2 * width, width, dtype=torch.float64) * values.sqrt()
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    double = ((noise @ basis).mT @ (noise @ basis) / len(noise)).to(device)
    single, band = double.float(), width * 3 // 8
    steps: dict[str, Callable[[], Any]] = {
        "eigvalsh": lambda: torch.linalg.eigvalsh(double),
        "eigvalsh, float32": lambda: torch.linalg.eigvalsh(single),
        "eigh": lambda: torch.linalg.eigh(double),
        "eigh, float32": lambda: torch.linalg.eigh(single),
        "product": lambda: double @ double,
        "product, float32": lambda: single @ single,
        "product of a band": lambda: double @ double[:, :band],
        "repulsion": lambda: perturbation.second_order(double),
        "repulsion, float32": lambda: perturbation.second_order(single),
    }
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats if width < 1024 else max(1, repeats // 2) if width < 4096 else 1):
        for name, run in steps.items():
            start = seconds()
            run()
            least[name] = min(least[name], seconds() - start)
    return {"width": width, "device": str(device), "seconds": least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--draws", type=int, default=60, help="even: they are also compared in pairs")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="whose cost is measured")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where cost is measured")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="of costs, fewer of wide layers",
    )
    arguments = parser.parse_args()
    if arguments.draws < 20 or arguments.draws % 2:
        parser.error(f"--draws must be even, and 20 or more, got {arguments.draws}")
    torch.set_num_threads(1)  # of one thread the CPU's own time can be read, whatever else it does
    on_cpu = arguments.device.type == "cpu"
    costs = [
        costs_of(width, arguments.device, time.thread_time if on_cpu else _after_all, arguments.repeats)
        for width in track(arguments.widths, "costs", console=console, transient=True)
    ]
    cells = [run_cell(cell) for cell in track(cells_of(arguments.draws), "cells", console=console, transient=True)]
    written = {"environment": environment(), "costs": costs, "cells": cells}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_compact(arguments.folder / "leave_one_out.json", written)
    write_report(written, arguments.folder / "leave_one_out.md")


def _after_all() -> float:
    """Wall time, once a device has done what it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
