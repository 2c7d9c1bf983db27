"""The runs that the studies rest on, trained by the command line from one YAML file, one process each.

    python -m benchmarks.findings.runs

A run whose record is complete is not made again, so that this can be interrupted. All 56 take about an hour on two
cores, with one thread each.
"""

import argparse
import math
import multiprocessing.pool
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import console
from lightning_spectral import Run

CONFIG = Path(__file__).with_name("family.yaml")
RUNS = Path("findings_runs/family")
BLOCK_SIZE = 128
EVERY_NUM_TOKENS = 16_384
"""Training tokens between validation runs."""
WARMUP_TOKENS = 32_768
MAX_TOKENS = 4_000_000
"""Where a run gives up."""
TARGET = 2.0
"""Validation loss, in nats a byte."""
LEARNING_RATES = {"rope": 1e-3}
"""At a batch of 16; other recipes have their own, by group of parameters."""

BATCH_SIZES = (4, 8, 16, 32, 64, 128)
"""Sequences."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    batch_size: int
    """Sequences."""
    seed: int
    multiplier: float
    """Of the learning rates that the recipe has at a batch of 16."""
    recipe: str = "rope"

    @property
    def name(self) -> str:
        return f"{self.recipe}-batch_{self.batch_size}-lr_x{self.multiplier:.3g}-seed_{self.seed}"

    def words(self, folder: Path) -> list[str]:
        """Arguments of ``fit``."""
        batch_tokens = self.batch_size * BLOCK_SIZE
        arguments = {
            "config": CONFIG,
            "seed_everything": self.seed,
            "model.recipe": self.recipe,
            "model.lr_multiplier": self.multiplier,
            "model.warmup_steps": WARMUP_TOKENS // batch_tokens,
            "data.batch_size": self.batch_size,
            "data.seed": self.seed,
            "trainer.max_steps": MAX_TOKENS // batch_tokens,
            "trainer.val_check_interval": EVERY_NUM_TOKENS // batch_tokens,
            "trainer.logger.save_dir": folder,
            "trainer.logger.version": self.name,
        }
        if self.recipe in LEARNING_RATES:
            arguments["model.learning_rate"] = LEARNING_RATES[self.recipe]
        return ["fit", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]


def root_rule(batch_size: int, factor: float = 1.0) -> float:
    """The learning rate that grows with the root of the batch, as a multiple of that at 16."""
    return factor * math.sqrt(batch_size / 16)


def first_set() -> list[Setting]:
    """Six batch sizes by four seeds, the learning rate by the root rule."""
    return [Setting(size, seed, root_rule(size)) for size in BATCH_SIZES for seed in (1, 2, 3, 4)]


def second_set() -> list[Setting]:
    """Three batch sizes by three seeds, all at one learning rate."""
    return [Setting(size, seed, 1.0) for size in (4, 16, 64) for seed in (1, 2, 3)]


def rates() -> list[Setting]:
    """Half and twice the learning rate of the root rule at each batch size."""
    return [Setting(size, 1, root_rule(size, factor)) for size in BATCH_SIZES for factor in (0.5, 2.0)]


def others() -> list[Setting]:
    """Two more recipes, by batch size and seed, at learning rates of their own times the root rule."""
    sizes = (8, 16, 32, 64)
    return [
        Setting(size, seed, root_rule(size), recipe)
        for recipe in ("muon", "untied")
        for size in sizes
        for seed in (1, 2)
    ]


def all_settings() -> list[Setting]:
    """Each once, in the order of the studies; where two rules give one learning rate they share the run."""
    return list(dict.fromkeys([*first_set(), *second_set(), *rates(), *others()]))


def open_run(folder: Path, setting: Setting) -> Run:
    """The record of a run.

    Args:
        folder: Where runs go.
        setting: Which.

    Returns:
        The record.

    Raises:
        ValueError: If it was not made yet, or not to its end.
    """
    if not is_complete(folder, setting):
        raise ValueError(f"folder must hold all runs, got none of {setting.name} in {folder}: make it first")
    return Run(folder / setting.name)


def is_complete(folder: Path, setting: Setting) -> bool:
    """Whether a run reached the target, or gave up where it should."""
    try:
        history = Run(folder / setting.name).history
    except ValueError:  # there is no record yet, or not a line of it
        return False
    losses = history.with_loss()[1]
    at_end = len(losses) and history.tokens[-1] >= MAX_TOKENS - EVERY_NUM_TOKENS
    return bool(at_end or (len(losses) and losses.min() <= TARGET))


def train(folder: Path, setting: Setting) -> str:
    """Train one run in a process of its own, unless it is there; a line that says what came out."""
    start = time.perf_counter()
    if not is_complete(folder, setting):
        path = folder / f"{setting.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as log:
            words = [sys.executable, "-m", "lightning_spectral", *setting.words(folder)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            failed = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if failed or not is_complete(folder, setting):
            return f"{setting.name}: FAILED, see {path}"
    run = Run(folder / setting.name)
    return f"{setting.name}: {run.tokens_to(TARGET):,.0f} tokens, {time.perf_counter() - start:.0f} s"


def train_all(folder: Path, settings: Sequence[Setting], processes: int) -> None:
    """Train what is missing, several at once, with a line for each as it ends.

    Args:
        folder: Where runs go.
        settings: Which.
        processes: How many at once.
    """
    with multiprocessing.pool.ThreadPool(processes) as pool:
        for number, line in enumerate(pool.imap(lambda setting: train(folder, setting), settings), start=1):
            console.print(f"{number:3} of {len(settings)}: {line}", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RUNS, help="where runs go; those that are there are kept")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    train_all(arguments.folder, all_settings(), arguments.processes)


if __name__ == "__main__":
    main()
