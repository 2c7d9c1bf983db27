"""The runs of study 4 (``plan_early_tail.md``): tuned, trained to a target and varied, one process each.

    python -m benchmarks.findings.early_tail_runs

What is there is kept, and a run that was cut off goes on from its latest validation run, so that this can be
interrupted at any time and started again. About two and a half hours on two cores, with one thread each, and nearly as
much again for the second family (``--families rope untied``).
"""

import argparse
import math
import multiprocessing.pool
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.findings import byte_pairs
from benchmarks.harness import console
from lightning_spectral import Run

CONFIG = Path(__file__).with_name("early_tail.yaml")
RUNS = Path("findings_runs/early_tail")
BLOCK_SIZE = 128
VOCAB_SIZE = 2048
BATCH_SIZES = (1, 2, 4, 8, 16)
"""Sequences."""
EVERY_NUM_TOKENS = 32_768
"""Training tokens between validation runs."""
WARMUP_TOKENS = 32_768
TUNING_TOKENS = 163_840
TARGET_TOKENS = 524_288
"""At which the best run says what the target is."""
MAX_TOKENS = 1_474_560
"""Where a run gives up."""
RATE = 1e-3
"""At a batch of four."""
FACTORS = (0.5, 1.0, 2.0)
"""Of the learning rate, tried first."""
SEEDS = {"rope": (1, 2, 3), "untied": (1, 2)}
VARIED_AT = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "warmup_x4": {"model.warmup_steps": 4 * WARMUP_TOKENS // (VARIED_AT * BLOCK_SIZE)},
    "beta2_.999": {"model.betas": [0.9, 0.999]},
    "decay_1": {"model.weight_decay": 1.0},
    "clip_.1": {"trainer.gradient_clip_val": 0.1},
    "no_qk_norm": {"model.switches": {"qk_norm": False}},
    "attention_.12": {"model.switches": {"attention_scale": 0.12}},
    "noisy": {"data.path": "noisy"},
}
"""What is set in each besides batch size, rate and seed."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    batch_size: int
    """Sequences."""
    factor: float
    """Of the learning rate that goes with the root of the batch."""
    seed: int = 1
    recipe: str = "rope"
    variant: str = ""
    """A key of ``VARIANTS``."""

    @property
    def name(self) -> str:
        ending = f"-{self.variant}" if self.variant else ""
        return f"{self.recipe}-batch_{self.batch_size}-lr_x{self.factor:.3g}-seed_{self.seed}{ending}"

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * BLOCK_SIZE


@dataclass(frozen=True)
class Study:
    """Where runs are, and how many train at once.

    Attributes:
        folder: Gets a folder for each run.
        tokens: Shards of :mod:`benchmarks.findings.byte_pairs`.
        processes: How many runs train at once.
        scale: Divides all numbers of tokens, to try the study out.
    """

    folder: Path = RUNS
    tokens: Path = byte_pairs.FOLDER
    processes: int = 2
    scale: int = 1

    def words(self, setting: Setting, tokens: int, target: float | None) -> list[str]:
        """Arguments of ``fit`` for a run that ends at a number of tokens, or at the target."""
        run = self.folder / setting.name
        # sqrt(B / 4): a recipe of several rates has one multiplier for all of them.
        multiplier = setting.factor * math.sqrt(setting.batch_size / VARIED_AT)
        arguments: dict[str, Any] = {
            "config": CONFIG,
            "seed_everything": setting.seed,
            "model.recipe": setting.recipe,
            "model.lr_multiplier": multiplier,
            "model.warmup_steps": WARMUP_TOKENS // setting.batch_tokens // self.scale,
            "data.path": self.tokens / "clean",
            "data.batch_size": setting.batch_size,
            "data.seed": setting.seed,
            "trainer.max_steps": tokens // setting.batch_tokens,
            "trainer.val_check_interval": EVERY_NUM_TOKENS // setting.batch_tokens // self.scale,
            "trainer.logger.save_dir": self.folder,
            "trainer.logger.version": setting.name,
            **VARIANTS[setting.variant],
        }
        if setting.recipe == "rope":
            arguments["model.learning_rate"] = RATE
        if setting.variant == "noisy":
            arguments["data.path"] = self.tokens / "noisy"
        words = ["fit", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]
        # The state after the latest validation run, from which one that was cut off goes on.
        words += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={run}"]
        words += ["--trainer.callbacks.filename=state", "--trainer.callbacks.enable_version_counter=false"]
        words += ["--trainer.callbacks.save_on_train_epoch_end=false"]
        if target is not None:
            words += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
            words += [f"--trainer.callbacks.stopping_threshold={target}", "--trainer.callbacks.patience=1000000"]
        if (state := run / "state.ckpt").exists():
            words += ["--ckpt_path", str(state)]
        return words

    def losses(self, setting: Setting) -> tuple[list[float], list[float]]:
        """Training tokens and validation losses of a run so far; none of one that has not begun."""
        try:
            history = Run(self.folder / setting.name).history
        except ValueError:
            return [], []
        entries, losses = history.with_loss()
        return history.tokens[entries].tolist(), losses.tolist()

    def is_there(self, setting: Setting, tokens: int, target: float | None) -> bool:
        """Whether a run has come to a number of tokens, or to the target."""
        seen, losses = self.losses(setting)
        reached = target is not None and min(losses, default=math.inf) <= target
        return reached or max(seen, default=0) >= tokens

    def train(self, setting: Setting, tokens: int, target: float | None = None) -> str:
        """Train a run on, in a process of its own; a line that says what came out."""
        start = time.perf_counter()
        if not self.is_there(setting, tokens, target):
            path = self.folder / f"{setting.name}.log"
            with path.open("a") as log:
                words = [sys.executable, "-m", "lightning_spectral", *self.words(setting, tokens, target)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
            if not self.is_there(setting, tokens, target):
                return f"{setting.name}: FAILED, see {path}"
        seen, losses = self.losses(setting)
        return f"{setting.name}: {seen[-1]:,.0f} tokens, loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s"

    def train_all(self, settings: Iterable[Setting], tokens: int, target: float | None = None) -> None:
        """Train what is missing, several at once, with a line for each as it ends.

        Raises:
            RuntimeError: If one failed.
        """
        settings = list(settings)
        with multiprocessing.pool.ThreadPool(self.processes) as pool:
            lines = pool.imap(lambda setting: self.train(setting, tokens, target), settings)
            for number, line in enumerate(lines, start=1):
                console.print(f"{number:3} of {len(settings)}: {line}", highlight=False, soft_wrap=True)
                if "FAILED" in line:
                    raise RuntimeError(line)

    def tuned(self, recipe: str) -> list[Setting]:
        """Train the tuning runs; of each batch size the one of the best rate, see the plan."""
        tokens = TUNING_TOKENS // self.scale
        tried = [Setting(size, factor, recipe=recipe) for size in BATCH_SIZES for factor in FACTORS]
        self.train_all(tried, tokens)
        beyond = []
        for size in BATCH_SIZES:
            best = self.best(one for one in tried if one.batch_size == size)
            if best.factor == FACTORS[0]:
                beyond.append(replace(best, factor=best.factor / 2))
            elif best.factor == FACTORS[-1]:
                beyond.append(replace(best, factor=best.factor * 2))
        self.train_all(beyond, tokens)
        return [self.best(one for one in tried + beyond if one.batch_size == size) for size in BATCH_SIZES]

    def best(self, settings: Iterable[Setting]) -> Setting:
        """The run of the lowest loss after tuning; one whose loss is not a number is none."""

        def loss(setting: Setting) -> float:
            found = dict(zip(*self.losses(setting), strict=True))[TUNING_TOKENS // self.scale]
            return math.inf if math.isnan(found) else found

        return min(settings, key=loss)

    def target(self, tuned: Sequence[Setting]) -> float:
        """Train the tuned runs to where the best says what the target is."""
        tokens = TARGET_TOKENS // self.scale
        self.train_all(tuned, tokens)
        losses = [dict(zip(*self.losses(setting), strict=True))[tokens] for setting in tuned]
        return math.ceil(min(losses) * 100) / 100

    def family(self, recipe: str) -> tuple[list[Setting], float]:
        """All runs of a recipe, trained to its target.

        Args:
            recipe: ``"rope"``, which is varied at one batch size too, or ``"untied"``.

        Returns:
            The runs, and the target in nats a token.
        """
        tuned = self.tuned(recipe)
        target = self.target(tuned)
        console.print(f"{recipe}: the target is {target} nats a token")
        runs = [replace(setting, seed=seed) for seed in SEEDS[recipe] for setting in tuned]
        if recipe == "rope":
            (centre,) = (setting for setting in tuned if setting.batch_size == VARIED_AT)
            runs += [replace(centre, factor=centre.factor * factor) for factor in (0.5, 2.0)]
            runs += [replace(centre, variant=variant) for variant in VARIANTS if variant]
        self.train_all(runs, MAX_TOKENS // self.scale, target)
        return runs, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs go; those that are there are kept")
    parser.add_argument("--tokens", type=Path, default=byte_pairs.FOLDER, help="where shards go")
    parser.add_argument("--processes", type=int, default=2, help="how many runs train at once")
    parser.add_argument("--scale", type=int, default=1, help="divides all numbers of tokens, to try it out")
    parser.add_argument("--families", nargs="+", choices=list(SEEDS), default=["rope"], help="recipes, in this order")
    arguments = parser.parse_args()
    byte_pairs.make(arguments.tokens, VOCAB_SIZE, BLOCK_SIZE)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.runs, arguments.tokens, arguments.processes, arguments.scale)
    for recipe in arguments.families:
        study.family(recipe)


if __name__ == "__main__":
    main()
