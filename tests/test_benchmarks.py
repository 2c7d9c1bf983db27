"""The benchmarks run, on settings too small to say anything of speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(folder: Path, script: str, settings: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints and what it writes."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *settings.split(), "--json", str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(result.read_text())


def test_reference_runs_are_made_once(tmp_path: Path) -> None:
    script = BENCHMARKS.parent / "examples" / "reference_runs.py"
    sizes = "--batch-sizes 128 --seeds 1 --target 4.9 --max-tokens 65536 --processes 1"
    words = [sys.executable, str(script), str(tmp_path / "runs"), *sizes.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=True).stdout
        for _ in range(2)
    )
    assert first.split()[:3] == ["1", "of", "1:"]
    assert first == second
    assert len(list((tmp_path / "runs").glob("*/spectra*"))) == 1


def test_overhead_runs_and_writes_what_it_found(tmp_path: Path) -> None:
    sizes = "--num-layers 2 --width 64 --batch-size 2 --steps 5 --every-n-steps 2 --num-tokens 1024 --repeats 1"
    printed, found = run(tmp_path, "overhead.py", sizes)
    assert "ratio" in printed
    assert found["own_seconds"][0] > 0
    assert found["settings"]["num_tokens"] == 1024


def test_per_sample_runs_and_its_memory_is_of_the_order_of_the_formula(tmp_path: Path) -> None:
    sizes = "--num-layers 4 --width 128 --tokens 64 --samples 8 --chunk 4 --repeats 1 --published-repeats 1"
    printed, found = run(tmp_path, "per_sample.py", f"{sizes} --memory-points 8:32")
    assert "hooks inside a training step add" in printed
    assert all(values and min(values) > 0 for values in found["seconds"].values())
    (point,) = found["formula"]
    assert 0.3 < point["measured"] / point["formula"] < 1.5
