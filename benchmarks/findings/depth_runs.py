"""The runs of study 6 (``plan_depth.md``): three depths, three batch sizes, tuned and then trained, one process each.

    python -m benchmarks.findings.depth_runs

What is there is kept, and a run that was cut off goes on from its latest validation run, so that this can be
interrupted at any time and started again. About an hour and a half on two cores, with one thread each: a run to its end
takes 2, 6 and 8 minutes at the three depths.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.findings import byte_pairs
from benchmarks.findings.studies import Study, add_arguments, parse

CONFIG = Path(__file__).with_name("depth.yaml")
RUNS = Path("findings_runs/depth")
BLOCK_SIZE = 128
VOCAB_SIZE = 512
DEPTHS = (12, 36, 48)
BATCH_SIZES = (4, 8, 16)
"""Sequences."""
RATE = 1e-3
"""At a batch of eight."""
RATE_AT = 8
FACTORS = (0.5, 1.0, 2.0)
SEEDS = (1, 2, 3)
EVERY_NUM_TOKENS = 16_384
"""Training tokens between validation runs."""
WARMUP_TOKENS = 16_384
TUNING_TOKENS = 98_304
NUM_TOKENS = 294_912


@dataclass(frozen=True)
class Setting:
    """One run."""

    depth: int
    """Layers."""
    batch_size: int
    """Sequences."""
    factor: float
    """Of the learning rate that goes with the root of the batch."""
    seed: int = 1

    @property
    def name(self) -> str:
        return f"depth_{self.depth}-batch_{self.batch_size}-lr_x{self.factor:.3g}-seed_{self.seed}"

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * BLOCK_SIZE


@dataclass(frozen=True)
class Depth(Study):
    """The runs of study 6."""

    folder: Path = RUNS
    tokens: Path = byte_pairs.SMALL

    def arguments(self, setting: Setting, tokens: int) -> dict[str, Any]:
        return {
            "config": CONFIG,
            "seed_everything": setting.seed,
            "model.num_layers": setting.depth,
            "model.learning_rate": RATE,
            "model.lr_multiplier": setting.factor * math.sqrt(setting.batch_size / RATE_AT),
            "model.warmup_steps": WARMUP_TOKENS // setting.batch_tokens // self.scale,
            "data.path": self.tokens / "clean",
            "data.batch_size": setting.batch_size,
            "data.seed": setting.seed,
            "trainer.max_steps": tokens // setting.batch_tokens,
            "trainer.val_check_interval": EVERY_NUM_TOKENS // setting.batch_tokens // self.scale,
        }

    def tuned(self, depth: int) -> list[Setting]:
        """Train the tuning runs of a depth; of each batch size the one of the best rate."""
        tokens = TUNING_TOKENS // self.scale
        tried = tuning(depth)
        self.train_all(tried, tokens)
        return [self.best((one for one in tried if one.batch_size == size), tokens) for size in BATCH_SIZES]

    def runs(self, depth: int) -> list[Setting]:
        """All nine runs of a depth, at their full length; that of the first seed goes on from its tuning run."""
        settings = seeds_of(self.tuned(depth))
        self.train_all(settings, NUM_TOKENS // self.scale)
        return settings


def tuning(depth: int) -> list[Setting]:
    """The tuning runs of a depth."""
    return [Setting(depth, size, factor) for size in BATCH_SIZES for factor in FACTORS]


def seeds_of(tuned: Iterable[Setting]) -> list[Setting]:
    """All runs at the best rates, seeds in turn."""
    tuned = list(tuned)
    return [replace(setting, seed=seed) for seed in SEEDS for setting in tuned]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, RUNS, byte_pairs.SMALL)
    parser.add_argument("--depths", nargs="+", type=int, choices=DEPTHS, default=DEPTHS, help="in this order")
    arguments = parse(parser, VOCAB_SIZE, BLOCK_SIZE)
    study = Depth(arguments.runs, arguments.tokens, arguments.processes, arguments.scale)
    for depth in arguments.depths:
        study.runs(depth)


if __name__ == "__main__":
    main()
