"""The examples of two processes print what the same example prints in one."""

from pathlib import Path

import pytest

from lightning_spectral import Run
from tests.examples.running import run_example

NUM_VALUES = 5 * 2 + 4 * 3
"""Exponent and effective rank of five outputs; these and the noise scale of four matrices."""


def values(name: str, processes: int, folder: Path) -> dict[str, float]:
    lines = run_example(name, "--processes", str(processes), "--max-steps", "12", "--folder", folder)
    assert str(folder) in lines[-1]
    assert Run(folder).about["world_size"] == processes
    return {
        key: float(value) for key, value in (line.split() for line in lines if "gradient/" in line or "on/" in line)
    }


@pytest.mark.parametrize("name", ["fsdp2", "tensor_parallel"])
def test_two_processes_print_the_numbers_of_one(name: str, tmp_path: Path) -> None:
    one, two = (values(name, processes, tmp_path / str(processes)) for processes in (1, 2))
    assert len(one) == NUM_VALUES
    assert two == pytest.approx(one, rel=1e-5)  # which NaN is not
