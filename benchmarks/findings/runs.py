"""The runs that the studies rest on, trained by the command line from one YAML file, one process each.

    python -m benchmarks.findings.runs

A run whose record is complete is not made again, so that this can be interrupted. All 56 take about an hour on two
cores, with one thread each. Where there is more, ``--config`` takes another model, data and Trainer, ``--scale``
multiplies all numbers of tokens, and ``--processes`` says how many train at once; the studies of runs take the same.
"""

import argparse
import json
import math
import multiprocessing.pool
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import console
from lightning_spectral import Run

CONFIG = Path(__file__).with_name("family.yaml")
RUNS = Path("findings_runs/family")
RESULTS = Path(__file__).parents[1] / "results" / "findings"

EVERY_NUM_TOKENS = 16_384
"""Training tokens between validation runs."""
WARMUP_TOKENS = 32_768
MAX_TOKENS = 4_000_000
"""Where a run gives up."""
POINTS = (32_768, 65_536, 131_072)
"""Training tokens at which the end is forecast."""
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


@dataclass(frozen=True)
class Family:
    """Where the runs are, and what they have in common."""

    folder: Path = RUNS
    config: Path = CONFIG
    """Model, data and Trainer; ``stop_at_loss`` is the target."""
    scale: int = 1
    """Of all numbers of tokens."""

    def __post_init__(self) -> None:
        unit = max(BATCH_SIZES) * self.block_size
        if self.scale < 1 or self.scale * EVERY_NUM_TOKENS % unit:
            raise ValueError(
                f"scale must make {EVERY_NUM_TOKENS} tokens whole steps of {max(BATCH_SIZES)} sequences of "
                f"{self.block_size}, got {self.scale}: take a multiple of {unit // math.gcd(unit, EVERY_NUM_TOKENS)}"
            )

    @cached_property
    def _model(self) -> dict[str, Any]:
        model = yaml.safe_load(self.config.read_text())["model"]["init_args"]
        for name in ("stop_at_loss", "block_size"):
            if name not in model:
                raise ValueError(f"config must set {name} among the model's init_args, got none in {self.config}")
        return model

    @property
    def target(self) -> float:
        """Validation loss, in nats a token."""
        return float(self._model["stop_at_loss"])

    @property
    def block_size(self) -> int:
        """Tokens of a sequence."""
        return int(self._model["block_size"])

    @property
    def points(self) -> tuple[int, ...]:
        """Training tokens at which the end is forecast."""
        return tuple(self.scale * point for point in POINTS)

    def words(self, setting: Setting) -> list[str]:
        """Arguments of ``fit``."""
        batch_tokens = setting.batch_size * self.block_size
        arguments: dict[str, Any] = {
            "config": self.config,
            "seed_everything": setting.seed,
            "model.recipe": setting.recipe,
            "model.lr_multiplier": setting.multiplier,
            "model.warmup_steps": self.scale * WARMUP_TOKENS // batch_tokens,
            "data.batch_size": setting.batch_size,
            "data.seed": setting.seed,
            "trainer.max_steps": self.scale * MAX_TOKENS // batch_tokens,
            "trainer.val_check_interval": self.scale * EVERY_NUM_TOKENS // batch_tokens,
            "trainer.logger.save_dir": self.folder,
            "trainer.logger.version": setting.name,
        }
        if setting.recipe in LEARNING_RATES:
            arguments["model.learning_rate"] = LEARNING_RATES[setting.recipe]
        return ["fit", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]

    def is_complete(self, setting: Setting) -> bool:
        """Whether a run reached the target, or gave up where it should."""
        try:
            history = Run(self.folder / setting.name).history
        except ValueError:  # there is no record yet, or not a line of it
            return False
        losses = history.with_loss()[1]
        at_end = len(losses) and history.tokens[-1] >= self.scale * (MAX_TOKENS - EVERY_NUM_TOKENS)
        return bool(at_end or (len(losses) and losses.min() <= self.target))

    def open(self, setting: Setting) -> Run:
        """The record of a run.

        Args:
            setting: Which.

        Returns:
            The record.

        Raises:
            ValueError: If it was not made yet, or not to its end.
        """
        if not self.is_complete(setting):
            raise ValueError(f"folder must hold all runs, got none of {setting.name} in {self.folder}: make it first")
        return Run(self.folder / setting.name)

    def train(self, setting: Setting) -> str:
        """Train one run in a process of its own, unless it is there; a line that says what came out."""
        start = time.perf_counter()
        if not self.is_complete(setting):
            path = self.folder / f"{setting.name}.log"
            with path.open("w") as log:
                words = [sys.executable, "-m", "lightning_spectral", *self.words(setting)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                failed = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
            if failed or not self.is_complete(setting):
                return f"{setting.name}: FAILED, see {path}"
        tokens = Run(self.folder / setting.name).tokens_to(self.target)
        return f"{setting.name}: {tokens:,.0f} tokens, {time.perf_counter() - start:.0f} s"

    def train_all(self, settings: Sequence[Setting], processes: int) -> None:
        """Train what is missing, several at once, with a line for each as it ends."""
        with multiprocessing.pool.ThreadPool(processes) as pool:
            for number, line in enumerate(pool.imap(self.train, settings), start=1):
                console.print(f"{number:3} of {len(settings)}: {line}", highlight=False, soft_wrap=True)

    def claim(self) -> None:
        """Make the folder this family's.

        Raises:
            ValueError: If it holds runs of another configuration or scale.
        """
        facts = {"config": self.config.read_text(), "scale": self.scale}
        path = self.folder / "family.json"
        if path.exists() and json.loads(path.read_text()) != facts:
            raise ValueError(f"runs must be of one configuration and scale, got others in {path}: take a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all studies of runs have in common."""
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs go; those that are there are kept")
    parser.add_argument("--config", type=Path, default=CONFIG, help="model, data and Trainer of all runs")
    parser.add_argument("--scale", type=int, default=1, help="of all numbers of tokens")
    parser.add_argument("--processes", type=int, default=2, help="how many runs train at once")
    parser.add_argument("--folder", type=Path, help="where results go; of other runs than the default, beside them")


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Family]:
    """Read the command line; a family that cannot be is refused in one line."""
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        family = Family(arguments.runs, arguments.config, arguments.scale)
        family.claim()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments, family


def results_of(arguments: argparse.Namespace) -> Path:
    """Where results go."""
    return arguments.folder or (RESULTS if arguments.runs == RUNS else arguments.runs / "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments, family = parse(parser)
    family.train_all(all_settings(), arguments.processes)


if __name__ == "__main__":
    main()
