"""The benchmarks run, on settings too small to say anything of speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_overhead_runs_and_writes_what_it_found(tmp_path: Path) -> None:
    sizes = "--num-layers 2 --width 64 --batch-size 2 --steps 5 --every-n-steps 2 --num-tokens 1024 --repeats 1"
    result = tmp_path / "overhead.json"
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "overhead.py"), *sizes.split(), "--json", str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert "ratio" in run.stdout
    found = json.loads(result.read_text())
    assert found["own_seconds"][0] > 0
    assert found["settings"]["num_tokens"] == 1024
