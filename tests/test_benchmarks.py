"""The benchmarks run, on settings too small to say anything of speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.watching import binned

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


def run_module(folder: Path, module: str, settings: str) -> tuple[str, dict[str, Any]]:
    """What ``python -m benchmarks.MODULE`` prints and writes."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *settings.split(), "--json", str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
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


def test_activation_protocol_agrees_with_the_published_one_and_counts_its_block_passes(tmp_path: Path) -> None:
    sizes = "--sizes 4:64 6:64 --all-layers-up-to 4 --tokens 512 --batch-size 4 --block-size 64 --repeats 1"
    printed, found = run_module(tmp_path, "activation_protocol", sizes)
    assert "without the forward pass" in printed
    shallow, deep = found["result"]["sizes"]
    assert shallow["block_passes"] == {"five": 1 + 2 + 3 + 4, "all": 10}
    assert "ours, all" in shallow["seconds"]
    assert "ours, all" not in deep["seconds"]
    assert all(difference < 1e-4 for difference in shallow["worst_difference"].values())
    for size in (shallow, deep):
        for name, own in size["without_forward"].items():
            assert 0 < size["solving"][name][0] < own[0] < size["seconds"][name][0]
    assert [target["limit"] for target in found["targets"]] == [2.3, 5.0, 2.3]
    assert all(target["point"] == "4" for target in found["targets"])


def test_watching_counts_every_part_of_a_report_and_every_value_that_others_bin(tmp_path: Path) -> None:
    sizes = "--num-layers 4 --width 64 --batch-size 4 --block-size 64 --num-tokens 1024 --repeats 1"
    printed, found = run_module(tmp_path, "watching", sizes)
    assert "without the figure" in printed
    result = found["result"]
    (parts,) = result["parts"]
    assert {"reading", "solving", "figure", "scalars", "histograms and layout"} <= set(parts)
    assert all(seconds > 0 for seconds in parts.values())
    assert abs(sum(parts.values()) - result["seconds"]["ActivationSpectrum"][0]) < 1e-9
    parameters = 256 * 64 + 4 * 12 * 64**2
    assert result["values"] == {
        "wandb's method": 2 * parameters,
        "wandb.watch": 2 * parameters,
        "TensorBoard histograms": 2 * parameters,
        "ActivationSpectrum": 4 * 1024 * 64,
    }
    watched = result["seconds"]["wandb.watch"]
    assert watched or result["why_no_wandb"]
    assert len(found["targets"]) == 2 + bool(watched)
    assert not list(tmp_path.glob("wandb*"))


def test_binned_counts_every_finite_value() -> None:
    counts, edges = binned(torch.tensor([[-1.0, 0.0, torch.nan], [torch.inf, 0.01, 3.0]]))
    assert len(counts) == 64
    assert (edges[0], edges[-1], len(edges)) == (-1.0, 3.0, 65)
    assert {index: count for index, count in enumerate(counts) if count} == {0: 1.0, 16: 2.0, 63: 1.0}
    assert binned(torch.full((2, 3), 5.0)) == ([6.0], [5.0, 5.0])
    assert binned(torch.full((2,), torch.nan)) == ([], [])
