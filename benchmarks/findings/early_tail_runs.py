"""The runs of study 4 (``plan_early_tail.md``): tuned, trained to a target and varied, one process each.

    python -m benchmarks.findings.early_tail_runs

What is there is kept, and a run that was cut off goes on from its latest validation run, so that this can be
interrupted at any time and started again. About two and a half hours on two cores, with one thread each, and nearly as
much again for the second family (``--families rope untied``). Where the runs of an earlier result are gone,
``--lacking benchmarks/results/findings/early_tail.json`` trains those alone that it lacks, by its rates and to its
target.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.findings import byte_pairs
from benchmarks.findings.studies import Study, add_arguments, parse, rounded_up
from benchmarks.harness import console

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
class EarlyTail(Study):
    """The runs of study 4."""

    folder: Path = RUNS
    tokens: Path = byte_pairs.FOLDER

    def arguments(self, setting: Setting, tokens: int) -> dict[str, Any]:
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
            **VARIANTS[setting.variant],
        }
        if setting.recipe == "rope":
            arguments["model.learning_rate"] = RATE
        if setting.variant == "noisy":
            arguments["data.path"] = self.tokens / "noisy"
        return arguments

    def tuned(self, recipe: str) -> list[Setting]:
        """Train the tuning runs; of each batch size the one of the best rate, see the plan."""
        tokens = TUNING_TOKENS // self.scale
        tried = [Setting(size, factor, recipe=recipe) for size in BATCH_SIZES for factor in FACTORS]
        self.train_all(tried, tokens)
        beyond = []
        for size in BATCH_SIZES:
            best = self.best((one for one in tried if one.batch_size == size), tokens)
            if best.factor == FACTORS[0]:
                beyond.append(replace(best, factor=best.factor / 2))
            elif best.factor == FACTORS[-1]:
                beyond.append(replace(best, factor=best.factor * 2))
        self.train_all(beyond, tokens)
        tried += beyond
        return [self.best((one for one in tried if one.batch_size == size), tokens) for size in BATCH_SIZES]

    def target(self, tuned: Sequence[Setting]) -> float:
        """Train the tuned runs to where the best says what the target is."""
        tokens = TARGET_TOKENS // self.scale
        self.train_all(tuned, tokens)
        return rounded_up(min(self.loss_at(setting, tokens) for setting in tuned))

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
        runs = all_of(tuned)
        self.train_all(runs, MAX_TOKENS // self.scale, target)
        return runs, target


def tuned_in(family: dict[str, Any]) -> list[Setting]:
    """The tuned settings of a family of an earlier result, by batch size."""
    tiers = {run["batch_size"]: run["tier"] for run in family["runs"] if run["is_tuned"]}
    factors = {size: float(tier.partition("-lr_x")[2]) for size, tier in tiers.items()}
    return [Setting(size, factors[size], recipe=family["recipe"]) for size in BATCH_SIZES]


def lacking(family: dict[str, Any]) -> list[Setting]:
    """Runs of the plan that a family of an earlier result has not."""
    names = {run["name"] for run in family["runs"]}
    return [setting for setting in all_of(tuned_in(family)) if setting.name not in names]


def all_of(tuned: Sequence[Setting]) -> list[Setting]:
    """All runs of a recipe: seeds of its tuned runs, seeds in turn, and of rope the settings at one batch size."""
    recipe = tuned[0].recipe
    runs = [replace(setting, seed=seed) for seed in SEEDS[recipe] for setting in tuned]
    if recipe == "rope":
        (centre,) = (setting for setting in tuned if setting.batch_size == VARIED_AT)
        runs += [replace(centre, factor=centre.factor * factor) for factor in (0.5, 2.0)]
        runs += [replace(centre, variant=variant) for variant in VARIANTS if variant]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, RUNS, byte_pairs.FOLDER)
    parser.add_argument("--families", nargs="+", choices=list(SEEDS), default=["rope"], help="recipes, in this order")
    parser.add_argument("--lacking", type=Path, help="an earlier result, whose runs are gone, to be completed")
    arguments = parse(parser, VOCAB_SIZE, BLOCK_SIZE)
    study = EarlyTail(arguments.runs, arguments.tokens, arguments.processes, arguments.scale)
    if arguments.lacking:
        for family in json.loads(arguments.lacking.read_text())["families"]:
            study.train_all(lacking(family), MAX_TOKENS // study.scale, family["target"])
        return
    for recipe in arguments.families:
        study.family(recipe)


if __name__ == "__main__":
    main()
