"""The runs of a study: trained by the command line, a process each, several at once, and taken up where they were."""

import argparse
import math
import multiprocessing.pool
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from benchmarks.findings import byte_pairs
from benchmarks.findings.runs import RESULTS
from benchmarks.harness import console
from lightning_spectral import Run


class Setting(Protocol):
    """One run of a study."""

    @property
    def name(self) -> str:
        """Of its folder."""
        ...


@dataclass(frozen=True)
class Study:
    """Where the runs of a study are, and how they are made.

    Subclasses give ``arguments``, and the order of the runs.

    Attributes:
        folder: Gets a folder for each run.
        tokens: Shards of :mod:`benchmarks.findings.byte_pairs`.
        processes: How many runs train at once.
        scale: Divides all numbers of training tokens, to try the study out.
        only_read: Train nothing: a run that is not there is an error.
    """

    folder: Path
    tokens: Path
    processes: int = 2
    scale: int = 1
    only_read: bool = False

    keeps_state: ClassVar[bool] = True
    """Whether a run that was cut off goes on from its latest validation run; else it starts anew."""

    def arguments(self, setting: Any, tokens: int) -> dict[str, Any]:
        """Options of ``fit`` for a run that ends at a number of tokens."""
        raise NotImplementedError

    def callbacks(self, setting: Any) -> list[str]:
        """Callbacks beside those of the configuration."""
        return []

    def threads(self, setting: Any) -> int:
        """Of the run's process."""
        return 1

    def words(self, setting: Any, tokens: int, target: float | None = None) -> list[str]:
        """Arguments of ``fit`` for a run that ends at a number of tokens, or at the target."""
        run = self.folder / setting.name
        arguments = self.arguments(setting, tokens)
        arguments |= {"trainer.logger.save_dir": self.folder, "trainer.logger.version": setting.name}
        words = ["fit", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]
        words += [f"--trainer.callbacks+={name}" for name in self.callbacks(setting)]
        if self.keeps_state:
            words += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={run}"]
            words += ["--trainer.callbacks.filename=state", "--trainer.callbacks.enable_version_counter=false"]
            words += ["--trainer.callbacks.save_on_train_epoch_end=false"]
        if target is not None:
            words += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
            words += [f"--trainer.callbacks.stopping_threshold={target}", "--trainer.callbacks.patience=1000000"]
        if self.keeps_state and (state := run / "state.ckpt").exists():
            words += ["--ckpt_path", str(state)]
        return words

    def losses(self, setting: Any) -> tuple[list[float], list[float]]:
        """Training tokens and validation losses of a run so far; none of one that has not begun."""
        try:
            history = Run(self.folder / setting.name).history
        except ValueError:
            return [], []
        entries, losses = history.with_loss()
        return history.tokens[entries].tolist(), losses.tolist()

    def is_there(self, setting: Any, tokens: int, target: float | None = None) -> bool:
        """Whether a run has come to a number of tokens, or to the target."""
        seen, losses = self.losses(setting)
        reached = target is not None and min(losses, default=math.inf) <= target
        return reached or max(seen, default=0) >= tokens

    def missing(self, settings: Iterable[Any], tokens: int, target: float | None = None) -> list[str]:
        """Names of runs that have not come to a number of tokens, or to the target."""
        return [setting.name for setting in settings if not self.is_there(setting, tokens, target)]

    def train(self, setting: Any, tokens: int, target: float | None = None) -> str:
        """Train a run on, in a process of its own; a line that says what came out."""
        start = time.perf_counter()
        if not self.is_there(setting, tokens, target):
            if self.only_read:
                return f"{setting.name}: FAILED, is not there"
            path = self.folder / f"{setting.name}.log"
            if not self.keeps_state:
                shutil.rmtree(self.folder / setting.name, ignore_errors=True)
            with path.open("a") as log:
                self.fit(setting, self.words(setting, tokens, target), log)
            if not self.is_there(setting, tokens, target):
                return f"{setting.name}: FAILED, see {path}"
        seen, losses = self.losses(setting)
        return f"{setting.name}: {seen[-1]:,.0f} tokens, loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s"

    def fit(self, setting: Any, words: list[str], log: Any) -> None:
        """Train by the command line, in a process of its own."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads(setting))}
        command = [sys.executable, "-m", "lightning_spectral", *words]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def train_all(self, settings: Iterable[Any], tokens: int, target: float | None = None) -> None:
        """Train what is missing, several at once, with a line for each as it ends.

        Raises:
            RuntimeError: If one failed.
        """
        settings = list(settings)
        with multiprocessing.pool.ThreadPool(self.processes) as pool:
            lines = pool.imap(lambda setting: self.train(setting, tokens, target), settings)
            for number, line in enumerate(lines, start=1):
                if not self.only_read:
                    console.print(f"{number:3} of {len(settings)}: {line}", highlight=False, soft_wrap=True)
                if "FAILED" in line:
                    raise RuntimeError(line)

    def loss_at(self, setting: Any, tokens: int) -> float:
        """The validation loss of a run at a number of tokens; infinite where it is not a number.

        Raises:
            KeyError: If the run was not validated there.
        """
        found = dict(zip(*self.losses(setting), strict=True))[tokens]
        return math.inf if math.isnan(found) else found

    def best(self, settings: Iterable[Any], tokens: int) -> Any:
        """The run of the lowest loss at a number of tokens; one whose loss is not a number is none."""
        return min(settings, key=lambda setting: self.loss_at(setting, tokens))


def rounded_up(loss: float) -> float:
    """To 0.01 nats."""
    return math.ceil(loss * 100) / 100


def add_arguments(parser: argparse.ArgumentParser, runs: Path, tokens: Path) -> None:
    """What all runners have in common."""
    parser.add_argument("--runs", type=Path, default=runs, help="where runs go; those that are there are kept")
    parser.add_argument("--tokens", type=Path, default=tokens, help="where shards go")
    parser.add_argument("--processes", type=int, default=2, help="how many runs train at once")
    parser.add_argument("--scale", type=int, default=1, help="divides all numbers of tokens, to try it out")


def add_reading_arguments(parser: argparse.ArgumentParser, runs: Path) -> None:
    """What all analyses have in common."""
    parser.add_argument("--runs", type=Path, default=runs, help="where the runs are")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")


def parse(parser: argparse.ArgumentParser, vocab_size: int, block_size: int) -> argparse.Namespace:
    """Read the command line, and make shards and the folder of runs; one line where that cannot be."""
    arguments = parser.parse_args()
    if arguments.scale != 1 and arguments.runs == parser.get_default("runs"):
        parser.error(f"runs must be a folder of its own for scale {arguments.scale}, got {arguments.runs}: give --runs")
    try:
        byte_pairs.make(arguments.tokens, vocab_size, block_size)
    except ValueError as error:
        parser.error(str(error))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    return arguments
