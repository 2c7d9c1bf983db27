"""Records of runs that never were: seeds that scatter, and differences between sides that were put in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from math import exp, nan
from pathlib import Path

import numpy as np

from lightning_spectral.runs import Record, Row

NUM_VALUES, NUM_GROUPS = 48, 4
NAMES = {"activation": ("gpt.blocks.0", "gpt.blocks.1"), "gradient": ("gpt.blocks.0.out", "gpt.blocks.1.out")}
FIELDS = {"activation": ("eigenvalues", "num_tokens", 1.0), "gradient": ("singular_values", "num_samples", 0.5)}
"""Of a record, and the exponent of the spectrum."""
LOSSES = ((0.2, 2.6), (0.5, 2.1), (0.75, 1.8), (1.0, 1.5), (1.2, 1.3))
"""Shares of the tokens to a loss of 1.5, and the loss there."""

SEED_TOKENS, SEED_PACE, SEED_SPECTRA, ROWS = 0.05, 0.01, 0.05, 0.004
"""Standard deviations: of ln tokens and ln tokens a second between seeds, and of the logarithms of values between seeds
and between groups of rows."""
NUM_WAVES = 4
"""Directions in which seeds scatter: waves over ln rank."""
SHARED = 0.8
"""What runs of one seed share of the scatter of seeds, where they are pairs: a correlation. Real tiny ones of two
learning rates have 0.7 to 0.97 in ln tokens."""

START = datetime(2026, 11, 2, 9, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Plant:
    """What the variant differs by."""

    tokens: float = 0.0
    """A gain, as a share."""
    pace: float = 0.0
    """Likewise, in tokens a second."""
    ratios: tuple[float, float] = (1.0, 1.0)
    """How many times as far apart as seeds the sides are, in activations and in gradients: R in the mean."""
    same_learning: bool = False
    """Whether runs of one seed learn the very same on both sides."""


def make_sides(
    folder: Path, plant: Plant, num_seeds: int, generator: np.random.Generator, is_paired: bool = False
) -> tuple[list[Path], list[Path]]:
    """Records of two sides, whose runs ran in turn.

    Args:
        folder: Where they go.
        plant: What they differ by.
        num_seeds: Runs a side.
        generator: Source of randomness.
        is_paired: Whether runs of one seed share what seeds scatter by.

    Returns:
        Their log directories, base and variant.
    """
    sides: tuple[list[Path], list[Path]] = ([], [])
    has_pairs = is_paired or plant.same_learning
    for seed in range(num_seeds):
        common = _scatter(generator)
        own = [_scatter(generator) for _ in range(2)]
        share = 1.0 if plant.same_learning else SHARED if is_paired else 0.0
        for side, name in enumerate("bv"):
            scatter = [share**0.5 * c + (1 - share) ** 0.5 * o for c, o in zip(common, own[side], strict=True)]
            path = folder / f"{name}{seed}"
            pace = SEED_PACE * generator.standard_normal() + side * np.log1p(plant.pace)
            facts = {"seed": seed if has_pairs else 2 * seed + side, "started": _when(2 * seed + side)}
            _write(path, facts, scatter, float(pace), plant if side else Plant(), generator)
            sides[side].append(path)
    return sides


def _scatter(generator: np.random.Generator) -> list[np.ndarray]:
    """Of one seed: ln tokens, and waves for each layer of each kind."""
    return [generator.standard_normal(size) for size in (1, (4, NUM_WAVES))]


def _descending(logs: np.ndarray) -> np.ndarray:
    return np.asarray(np.sort(np.exp(logs), axis=-1)[..., ::-1])


def _when(number: int) -> str:
    return (START + timedelta(hours=number)).isoformat()


def _write(
    path: Path,
    facts: dict[str, object],
    scatter: Sequence[np.ndarray],
    pace: float,
    plant: Plant,
    generator: np.random.Generator,
) -> None:
    tokens = 1e6 * exp(SEED_TOKENS * float(scatter[0][0])) / (1 + plant.tokens)
    series = {
        "activation-validate": {"stage": "validate", "layers": list(NAMES["activation"]), "num_tokens": 1024},
        "gradient-validate": {"stage": "validate", "parameters": list(NAMES["gradient"]), "num_samples": 1024},
    }
    about = {
        "id": str(path),
        "family": "F",
        "series": series,
        "batch_tokens": 512.0,
        "machines": ["a"],
        "device": "cpu",
    }
    record = Record.begin(path / "spectra", about | facts)
    ranks = np.arange(1, NUM_VALUES + 1)
    place = np.log(ranks) / np.log(NUM_VALUES)
    waves = np.cos(np.pi * np.arange(1, NUM_WAVES + 2)[:, None] * place)
    for step, (share, loss) in enumerate(LOSSES, start=1):
        at = share * tokens
        record.append(Row(100 * step, at, at / 1e4 / exp(pace), nan, loss))
        for number, (kind, names) in enumerate(NAMES.items()):
            values, count, exponent = FIELDS[kind]
            arrays = {"tokens": np.asarray(at)}
            for layer, name in enumerate(names):
                logs = -exponent * np.log(ranks) + SEED_SPECTRA * scatter[1][2 * number + layer] @ waves[:NUM_WAVES]
                # Two seeds differ by twice the variance of one, in each of the waves.
                logs = logs + SEED_SPECTRA * (2 * NUM_WAVES * (plant.ratios[number] - 1)) ** 0.5 * waves[NUM_WAVES]
                groups = logs + ROWS * generator.standard_normal((NUM_GROUPS, NUM_VALUES))
                start = f"{kind}/{name}"
                arrays |= {f"{start}/{values}": _descending(logs), f"{start}/leave_one_out": _descending(groups)}
                arrays |= {f"{start}/dtype": np.asarray("float64"), f"{start}/{count}": np.asarray(1024)}
            record.write_report(f"{kind}-validate", 100 * step, arrays)
