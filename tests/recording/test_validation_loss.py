"""What the validation loss of two real processes is, each of which has logged its own."""

import math
from typing import Any

import pytest
import torch

from lightning_spectral.metrics.collectives import Together
from lightning_spectral.recording.validation_loss import mean_over_ranks
from tests.distributed import run_distributed

CPU = torch.device("cpu")

CASES: dict[str, tuple[list[tuple[float | None, float]], tuple[float | None, bool]]] = {
    "by samples": ([(3.0, 30.0), (4.0, 10.0)], (3.25, True)),
    "of samples that are not known": ([(3.0, 30.0), (4.0, math.nan)], (3.5, True)),
    "without samples": ([(3.0, 0.0), (4.0, 0.0)], (3.5, True)),
    "alike": ([(1 / 3, 30.0), (1 / 3, 10.0)], (1 / 3, False)),
    "of one rank": ([(None, 30.0), (0.3, 10.0)], (0.3, False)),
    "of none": ([(None, 30.0), (None, 10.0)], (None, False)),
    "infinite on one": ([(3.0, 30.0), (math.inf, 10.0)], (math.inf, False)),
    "no number on one": ([(3.0, 30.0), (math.nan, 10.0)], (math.nan, False)),
}


def all_cases(rank: int) -> list[Any]:
    together = Together(CPU)
    return [mean_over_ranks(*logged[rank], together, CPU) for logged, _ in CASES.values()]


@pytest.fixture(scope="module")
def found() -> list[list[Any]]:
    return run_distributed(all_cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_learn_the_loss_of_all_samples(name: str, found: list[list[Any]]) -> None:
    _, (loss, is_mean) = CASES[name]
    for of_rank in found:
        value, said = of_rank[list(CASES).index(name)]
        assert said == is_mean
        assert value == (None if loss is None else pytest.approx(loss, rel=1e-15, nan_ok=True))


def test_one_process_has_the_loss_that_it_logged() -> None:
    assert mean_over_ranks(0.1, 3.0, Together(CPU), CPU) == (0.1, False)
    assert mean_over_ranks(None, 3.0, Together(CPU), CPU) == (None, False)
