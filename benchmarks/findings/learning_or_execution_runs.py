"""The runs of study 5 (``plan_learning_or_execution.md``): tuned, changed and planted, one process each.

    python -m benchmarks.findings.learning_or_execution_runs

What is there is kept, and a run that was cut off starts anew, so that this can be interrupted at any time and started
again. A run takes 70 seconds on one core, 40 of them for what is measured. On two cores the first 102 take an hour, the
240 of the nulls two and a half, the 42 of the chain half of one.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.findings import byte_pairs
from benchmarks.findings.studies import Study, add_arguments, parse
from benchmarks.harness import console

CONFIG = Path(__file__).with_name("learning_or_execution.yaml")
RUNS = Path("findings_runs/learning_or_execution")
BLOCK_SIZE = 128
VOCAB_SIZE = 512
BATCH_SIZE = 8
"""Sequences."""
CHAIN_BATCH_SIZE = 32
"""At which the natural changes are compared once more."""
NUM_TOKENS = 262_144
EVERY_NUM_TOKENS = 16_384
"""Training tokens between validation runs."""
WARMUP_TOKENS = 16_384
FACTORS = (0.5, 1.0, 2.0)
"""Of the recipe's learning rates."""
SEEDS = (1, 2, 3, 4)
NULL_SEEDS = range(101, 341)
PLANTED = "benchmarks.findings.planted"


@dataclass(frozen=True)
class Arm:
    """What is set besides batch size, rate and seed."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of ``fit``."""
    callback: str = ""
    factor: float = 1.0
    """Of the learning rate of its base."""
    threads: int = 1


NATURAL = ("baseline", "rope", "muon", "untied", "value_mix", "unet", "fixed_window")
"""Recipes, neighbours of which are compared."""
EXECUTION = {
    "fused": Arm(callback="FusedOptimizer"),
    "compiled": Arm({"model": f"{PLANTED}.Compiled"}),
    "workers": Arm({"data.num_workers": 2}),
    "micro_batches": Arm({"trainer.accumulate_grad_batches": 2}),
    "bf16": Arm({"trainer.precision": "bf16-mixed"}),
    "repacked": Arm({"data": f"{PLANTED}.Repacked", "data.shift": BLOCK_SIZE // 2}),
    "threads": Arm(threads=2),
}
CHANGES = {
    "sleep": Arm(callback="Sleep"),
    "twice": Arm({"data": f"{PLANTED}.Twice"}),
    "quarter_rate": Arm(factor=0.25),
    "noise": Arm(callback="GradientNoise"),
    "rotated": Arm({"model": f"{PLANTED}.Rotated"}),
    "scaled_channel": Arm({"model": f"{PLANTED}.ScaledChannel"}),
}
"""Planted."""
BASES = {"again": Arm(), "part": Arm({"data": f"{PLANTED}.Repacked", "data.shift": 0})}
"""Rope once more beside what is compared with it, in turn, and on the tokens that are repacked."""
ARMS = {**dict.fromkeys(NATURAL, Arm()), **BASES, **EXECUTION, **CHANGES}


def base_of(arm: str) -> str:
    """What an arm that is not natural is compared with."""
    return {"repacked": "part", "again": "rope"}.get(arm, "again")


@dataclass(frozen=True)
class Setting:
    """One run."""

    arm: str
    """A key of ``ARMS``."""
    factor: float
    """Of the recipe's learning rates, before the arm's own."""
    seed: int = 1
    batch_size: int = BATCH_SIZE
    """Sequences of an optimizer step."""

    @property
    def name(self) -> str:
        return f"{self.arm}-batch_{self.batch_size}-lr_x{self.factor:.3g}-seed_{self.seed}"

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * BLOCK_SIZE


@dataclass(frozen=True)
class LearningOrExecution(Study):
    """The runs of study 5.

    Attributes:
        num_nulls: How many comparisons of sides that differ by nothing, at the most.
    """

    folder: Path = RUNS
    tokens: Path = byte_pairs.SMALL
    num_nulls: int = len(NULL_SEEDS) // 4

    keeps_state: ClassVar[bool] = False

    @property
    def num_tokens(self) -> int:
        """Of each run."""
        return NUM_TOKENS // self.scale

    def arguments(self, setting: Setting, tokens: int) -> dict[str, Any]:
        arm = ARMS[setting.arm]
        parts = arm.options.get("trainer.accumulate_grad_batches", 1)
        options = dict(arm.options)
        # a class first, as options are its own
        classes = {name: options.pop(name) for name in ("model", "data") if name in options}
        if classes.get("data", "").endswith("Repacked"):
            options["data.part_tokens"] = self.num_tokens
        return {
            "config": CONFIG,
            **classes,
            "seed_everything": setting.seed,
            "model.recipe": setting.arm if setting.arm in NATURAL else "rope",
            "model.lr_multiplier": setting.factor * arm.factor,
            "model.warmup_steps": WARMUP_TOKENS // setting.batch_tokens // self.scale,
            "data.path": self.tokens / "clean",
            "data.batch_size": setting.batch_size // parts,
            "data.seed": setting.seed,
            "trainer.max_steps": tokens // setting.batch_tokens,
            "trainer.val_check_interval": parts * EVERY_NUM_TOKENS // setting.batch_tokens,
            **options,
        }

    def callbacks(self, setting: Setting) -> list[str]:
        name = ARMS[setting.arm].callback
        return [f"{PLANTED}.{name}"] if name else []

    def threads(self, setting: Setting) -> int:
        return ARMS[setting.arm].threads

    def tuned(self, batch_size: int) -> dict[str, Setting]:
        """Train the tuning runs of the natural arms; of each the one of the best rate."""
        tried = {name: tuning(name, batch_size) for name in NATURAL}
        self.train_all([one for settings in tried.values() for one in settings], self.num_tokens)
        return {name: self.best(settings, self.num_tokens) for name, settings in tried.items()}

    def natural(self, batch_size: int = BATCH_SIZE) -> dict[str, list[Setting]]:
        """All seeds of the natural arms, seeds in turn."""
        sides = {name: seeds_of(one) for name, one in self.tuned(batch_size).items()}
        self.train_all(in_turn(sides), self.num_tokens)
        return sides

    def changed(self, rope: Setting) -> dict[str, list[Setting]]:
        """All seeds of what is compared with rope, seeds in turn."""
        sides = {name: seeds_of(rope, name) for name in (*BASES, *EXECUTION, *CHANGES)}
        self.train_all(in_turn(sides), self.num_tokens)
        return sides

    def nulls(self, rope: Setting) -> list[tuple[list[Setting], list[Setting]]]:
        """Two runs of rope against two, which ran in turn; none in two comparisons."""
        sides = nulls_of(rope, self.num_nulls)
        self.train_all(sorted((one for pair in sides for side in pair for one in side), key=seed_of), self.num_tokens)
        return sides


def tuning(arm: str, batch_size: int = BATCH_SIZE) -> list[Setting]:
    """The tuning runs of a natural arm."""
    return [Setting(arm, factor, 1, batch_size) for factor in FACTORS]


def seeds_of(setting: Setting, arm: str = "") -> list[Setting]:
    """All seeds at a rate, of its own arm or another."""
    return [replace(setting, arm=arm or setting.arm, seed=seed) for seed in SEEDS]


def nulls_of(rope: Setting, num: int = len(NULL_SEEDS) // 4) -> list[tuple[list[Setting], list[Setting]]]:
    """The first and third of each four seeds against the second and fourth."""
    runs = [replace(rope, seed=seed) for seed in NULL_SEEDS[: 4 * num]]
    return [(runs[at : at + 4 : 2], runs[at + 1 : at + 4 : 2]) for at in range(0, len(runs), 4)]


def seed_of(setting: Setting) -> int:
    """In whose order nulls are trained."""
    return setting.seed


def in_turn(sides: dict[str, list[Setting]]) -> Iterator[Setting]:
    """The first of each side, the second of each, and so on: tokens a second are then compared fairly."""
    return (one for of_seed in zip(*sides.values(), strict=True) for one in of_seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, RUNS, byte_pairs.SMALL)
    parser.add_argument("--nulls", type=int, default=len(NULL_SEEDS) // 4, help="comparisons of nothing with nothing")
    parser.add_argument("--no-chain", action="store_true", help=f"leave out the chain at B = {CHAIN_BATCH_SIZE}")
    arguments = parse(parser, VOCAB_SIZE, BLOCK_SIZE)
    study = LearningOrExecution(
        arguments.runs, arguments.tokens, arguments.processes, arguments.scale, num_nulls=arguments.nulls
    )
    rope = study.natural()["rope"][0]
    console.print(f"rope is trained at {rope.factor:g} times its recipe's rate")
    study.changed(rope)
    study.nulls(rope)
    if not arguments.no_chain:
        study.natural(CHAIN_BATCH_SIZE)


if __name__ == "__main__":
    main()
