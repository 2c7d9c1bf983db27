"""The estimator's own control: bias, spread and coverage of exponents and distances where the truth is known.

    python -m benchmarks.findings.control

Study 1 of ``plan.md``. Cells that are done are kept in the work folder, so that the study can be interrupted; figure,
JSON and report go to ``benchmarks/results/findings``. About ten minutes on two cores.
"""

import argparse
import json
import logging
import math
import multiprocessing
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.progress import track
from scipy.special import stdtrit
from torch import Tensor

from benchmarks.findings.control_report import write_report
from benchmarks.findings.processes import LENGTH, PROCESSES, eigenvalues, held_out_activations, rows
from benchmarks.findings.runs import RESULTS
from benchmarks.harness import console, environment
from lightning_spectral.functional import js_divergence, power_law, rankme
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import js_floor
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.decomposition import decompose

HEAD, TAIL = (1, 10), (0.125, 0.5)
NUM_GROUPS = 4
RATIOS = (4, 16, 64, 256)
"""Tokens a channel, n/d."""
LEVEL = 0.8


def population_of(num_steps: int) -> str:
    """File of the held-out activations of a model trained for so many steps."""
    return f"population-{num_steps}.pt"


@dataclass(frozen=True)
class Cell:
    """Draws of one size from one source."""

    source: str
    """A process, or a block of the trained model."""
    spectrum: str
    """Of a process; ``"trained"`` for a block."""
    width: int
    ratio: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.spectrum}-{self.width}-{self.ratio}"

    @property
    def num_sequences(self) -> int:
        return self.ratio * self.width // LENGTH


def cells_of(blocks: list[str], width: int) -> list[Cell]:
    """All cells of the plan."""
    known = [
        Cell(process, spectrum, 128, n) for process in PROCESSES for spectrum in ("power", "broken") for n in RATIOS
    ]
    wide = [Cell("independent", spectrum, 256, ratio) for spectrum in ("power", "broken") for ratio in (16, 64)]
    return known + wide + [Cell(block, "trained", width, ratio) for block in blocks for ratio in RATIOS]


def measured(sequences: Tensor, normalize: bool) -> Spectrum:
    """What a callback would make of these rows: its own parts, in one batch.

    Args:
        sequences: ``(S, T, d)``.
        normalize: Apply the parameter-free RMSNorm.

    Returns:
        The spectrum, with groups of whole sequences.
    """
    collector = Collector(["layer"], 2**60, NUM_GROUPS, normalize, torch.float64, torch.device("cpu"))
    collector.begin_batch(len(sequences), None)
    collector.add("layer", sequences)
    ((names, parts, _, dtypes),) = collector.pool()
    (spectrum,) = decompose(names, parts, collector.failures, dtypes=dtypes).values()
    return spectrum


def run_cell(cell: Cell, num_draws: int, num_steps: int, work: Path) -> dict[str, Any]:
    """All draws of a cell, and how far they are from the truth and from each other."""
    population: Tensor | None = None
    if cell.spectrum == "trained":
        population = torch.load(work / population_of(num_steps), mmap=True)[cell.source]
        truth = measured(population, normalize=True).values
    else:
        truth = eigenvalues(cell.spectrum, cell.width)
    generator = torch.Generator().manual_seed(crc32(cell.name.encode()))
    draws = []
    for _ in range(num_draws):
        if population is None:
            sequences = rows(cell.source, truth, cell.num_sequences, generator)
        else:
            sequences = population[torch.randperm(len(population), generator=generator)[: cell.num_sequences]]
        draws.append(measured(sequences, normalize=population is not None))
    return {**asdict(cell), "num_draws": num_draws, "num_steps": num_steps, **judge(draws, truth)}


def is_done(cell: Cell, num_draws: int, num_steps: int, work: Path) -> bool:
    """Whether a cell's result is there, and of these numbers; a known spectrum does not depend on the steps."""
    path = work / f"{cell.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    same_model = cell.spectrum != "trained" or found.get("num_steps") == num_steps
    return found.get("num_draws") == num_draws and same_model


def judge(draws: list[Spectrum], truth: Tensor) -> dict[str, Any]:
    """Bias, spread and coverage of what a report says, over draws.

    Args:
        draws: Independent reports on one process.
        truth: ``(d,)`` its eigenvalues.

    Returns:
        Numbers by name, bands apart.
    """
    found: dict[str, Any] = {"tail": exponents(draws, truth, TAIL), "head": exponents(draws, truth, HEAD)}
    values = torch.stack([draw.values for draw in draws])
    found["rankme_bias"] = float((rankme(values).mean() / rankme(truth)) - 1)
    found["js_to_truth"] = float(js_divergence(values, truth).mean())
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    between = js_divergence(values[::2], values[1::2])
    floors = torch.stack([js_floor(*pair) for pair in pairs])
    found["js_between_draws"] = float(between.mean())
    found["beyond_js_floor"] = float((between > floors).double().mean())
    return found


def exponents(draws: list[Spectrum], truth: Tensor, band: Any) -> dict[str, float]:
    fits = [draw.exponent(band) for draw in draws]
    plain, corrected, stderr = (
        torch.tensor([getattr(fit, name) for fit in fits], dtype=torch.float64)
        for name in ("value", "corrected", "stderr")
    )
    expected = float(power_law(truth, band).exponent)
    reach = float(stdtrit(NUM_GROUPS - 1, (1 + LEVEL) / 2)) * stderr
    return {
        "truth": expected,
        "bias": float(plain.mean()) - expected,
        "bias_corrected": float(corrected.mean()) - expected,
        "spread": float(plain.std()),
        "spread_corrected": float(corrected.std()),
        "stderr_over_spread": float(stderr.mean() / plain.std()),
        "coverage_of_mean": float(((plain - plain.mean()).abs() <= reach).double().mean()),
        "coverage_of_truth": float(((corrected - expected).abs() <= reach).double().mean()),
        "without_error_bar": float(stderr.isnan().double().mean()),
    }


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _run(arguments: tuple[Cell, int, int, Path]) -> None:
    cell, num_draws, num_steps, work = arguments
    path = work / f"{cell.name}.json"
    found = json.dumps(run_cell(cell, num_draws, num_steps, work))
    path.with_suffix(".part").write_text(found)
    path.with_suffix(".part").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("findings_runs/control"), help="where cells are kept")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--draws", type=int, default=200, help="even: they are also compared in pairs")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the model")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.draws < 2 or arguments.draws % 2:
        parser.error(f"--draws must be even, as draws are compared in pairs, got {arguments.draws}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    population = arguments.work / population_of(arguments.steps)
    _quiet()
    if not population.exists():
        console.print("training the model whose held-out activations are the population")
        torch.save(held_out_activations(num_steps=arguments.steps), population.with_suffix(".part"))
        population.with_suffix(".part").replace(population)
    blocks = torch.load(population, mmap=True)
    width = next(iter(blocks.values())).shape[-1]
    cells = cells_of(list(blocks), width)
    settings = (arguments.draws, arguments.steps, arguments.work)
    waiting = [cell for cell in cells if not is_done(cell, *settings)]
    waiting.sort(key=lambda cell: -cell.ratio)  # long ones first
    jobs = [(cell, *settings) for cell in waiting]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, _quiet) as pool:
        for _ in track(pool.imap_unordered(_run, jobs), "cells", len(jobs), console=console):
            pass
    found = [json.loads((arguments.work / f"{cell.name}.json").read_text()) for cell in cells]
    assert all(math.isfinite(cell["js_to_truth"]) for cell in found)
    write_report(found, environment(), arguments.folder)


if __name__ == "__main__":
    main()
