"""Each example, run briefly as its user would run it, leaves a record without a failed measurement."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_spectral import Run

ROOT = Path(__file__).parents[2]
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}  # this tree's package, whichever is installed


MEASURED = {
    "own_module": ("blocks.3", "blocks.3.0.weight"),
    "hf_trainer": ("transformer.h.3", "transformer.h.3.attn.c_proj.weight"),
}
"""A layer and a parameter of each."""


@pytest.mark.parametrize("name", MEASURED)
def test_an_example_leaves_a_record(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{name}.py", "--max-steps", "20", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=HERE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout.splitlines()[-1]
    assert "lightning_spectral/" not in done.stderr  # where a warning of ours would say that it comes from
    run = Run(tmp_path)
    for kind, part in zip(("activation", "gradient"), MEASURED[name], strict=True):
        assert math.isfinite(run.spectrum(kind, part, step=20).exponent((0.125, 0.5)).value)
