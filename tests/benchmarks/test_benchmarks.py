"""The benchmarks run, on settings too small to say anything of speed."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from benchmarks import report
from benchmarks.compact_json import compact
from benchmarks.harness import Target, environment
from benchmarks.training import Schedule, costs
from benchmarks.turns import Run, Segments, side_by_side
from benchmarks.watching import binned
from lightning_spectral.nanogpt import NanoGPT, TextData
from tests.limit import LIMIT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(folder: Path, module: str, settings: str) -> tuple[str, dict[str, Any]]:
    """What ``python -m benchmarks.MODULE`` prints and writes."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *settings.split(), "--json", str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(result.read_text())


def test_json_keeps_arrays_of_numbers_in_one_line() -> None:
    facts = {
        "a": [1.5, -2, 1e-300, None, True],
        "b": [[0.1 + 0.2, 1], []],
        "c": {"d [": ["x, y", "\u00e9]"], "e": {}, "f": [{"g": [3]}]},
    }
    text = compact(json.dumps(facts))
    assert json.loads(text) == facts
    assert (
        text
        == """{
 "a": [1.5, -2, 1e-300, null, true],
 "b": [
  [0.30000000000000004, 1],
  []
 ],
 "c": {
  "d [": ["x, y", "\\u00e9]"],
  "e": {},
  "f": [
   {
    "g": [3]
   }
  ]
 }
}"""
    )
    assert compact(text) == text
    assert compact(json.dumps([math.nan, math.inf])) == "[NaN, Infinity]"


def test_committed_results_are_laid_out_so() -> None:
    paths = list((BENCHMARKS / "results").rglob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text()
        assert text == compact(text) + "\n", path
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_reference_runs_are_made_once(tmp_path: Path) -> None:
    script = BENCHMARKS.parent / "examples" / "reference_runs.py"
    sizes = "--batch-sizes 128 --seeds 1 --target 4.9 --max-tokens 65536 --processes 1"
    words = [sys.executable, str(script), str(tmp_path / "runs"), *sizes.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT, check=True).stdout
        for _ in range(2)
    )
    assert first.split()[:3] == ["1", "of", "1:"]
    assert first == second
    assert len(list((tmp_path / "runs").glob("*/spectra*"))) == 1


def test_reading_records_is_timed(tmp_path: Path) -> None:
    printed, found = run(tmp_path, "records", "--runs 6 8 --reports 5 --width 16")
    assert "show --plot, 5 reports" in printed
    assert set(found["result"]["forecast"]) == {"6", "8"}
    assert all(found["result"][name] > 0 for name in ("compare", "show --json", "show --plot"))
    assert len(found["targets"]) == 5


def test_training_takes_apart_what_each_set_of_callbacks_costs(tmp_path: Path) -> None:
    sizes = "--num-layers 2 --width 64 --batch-size 4 --tokens 64 --num-tokens 1024 --num-samples 8"
    printed, found = run(tmp_path, "training", sizes)
    assert "whole report" in printed
    assert "activation spectra" not in printed
    activations, validation, gradients = (found["result"][part] for part in ("activations", "validation", "gradients"))
    for part, window, num_validations in ((activations, 4, 0), (validation, 0, 6), (gradients, 2, 0)):
        assert part["window"] == window
        for segments in part["runs"].values():
            assert len(segments["steps"]) == part["cycles"] * part["cycle"]
            assert len(segments["validations"]) == num_validations
            assert min(segments["steps"] + segments["validations"]) > 0
        assert part["runs"]["plain"]["own"] == 0
        assert all(cost["own"] > 0 for cost in part["costs"].values())
    # Passes of their own happen at the report, whatever the speed of the machine.
    assert gradients["costs"]["GradientSpectrum, vmap"]["minimum"]["reporting"] > 0
    assert [target["point"] for target in found["targets"]] == ["1", "1", "1", "1", "2"]
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_costs_are_read_off_steps_of_each_kind() -> None:
    schedule = Schedule(cycle=5, window=3, cycles=2)
    plain, watched = Segments([1.0] * 10, [2.0, 2.0]), Segments([9.0] * 5 + [1.0, 1.0, 1.1, 1.3, 4.0], [9.0, 2.5], 7.0)
    found = costs(watched, plain, schedule)
    expected = {"idle": 0, "collecting": 0.1, "reporting": 3, "validation": 0.5, "report": 3.2}
    assert {kind: round(found["minimum"][kind], 9) for kind in expected} == expected
    assert round(found["median"]["collecting"], 9) == 0.2
    assert found["own"] == 3.5


def test_runs_side_by_side_take_turns_and_end_together_when_one_fails(tmp_path: Path) -> None:
    order: list[str] = []

    class Step(Callback):
        def __init__(self, name: str, last: int = 99) -> None:
            self.name, self.last = name, last

        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            order.append(self.name)
            if trainer.global_step == self.last:
                raise ValueError("as planned")

    def run_of(name: str, last: int = 99) -> Run:
        return Run(NanoGPT(num_layers=1, width=8, num_heads=1, block_size=8), TextData(None, 8, 2), [Step(name, last)])

    settings: dict[str, Any] = {"max_steps": 3, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1}
    found = side_by_side({name: lambda name=name: run_of(name) for name in "abc"}, settings, "")
    assert order == list("abc") * 3
    assert {len(segments.steps) for segments in found.values()} == {3}
    with pytest.raises(ValueError, match="as planned"):
        side_by_side({"a": lambda: run_of("a"), "b": lambda: run_of("b", last=2)}, settings, "")


def test_rows_are_measured_against_bare_products(tmp_path: Path) -> None:
    printed, found = run(tmp_path, "rows", "--widths 16 24 --samples 4 --tokens 8 --solved 16 --repeats 2")
    assert "torch.mm" in printed
    assert [(row["width"], row["dtype"]) for row in found["result"]["collecting"]] == [
        (width, dtype) for width in (16, 24) for dtype in ("float32", "bfloat16")
    ]
    assert len(found["targets"]) == 3


def test_imports_are_timed_in_fresh_interpreters(tmp_path: Path) -> None:
    _, found = run(tmp_path, "imports", "--repeats 1")
    assert 0 < found["result"]["added"][0] < found["result"]["lightning_and_torch"][0]


def test_a_report_holds_every_target_with_its_command(tmp_path: Path) -> None:
    found = {
        "late": Target("6", "growth", 1.2, 1.15, True, note="a | b"),
        "early": Target("1", "speed", 1.0, 0.99, False),
    }
    for name, target in found.items():
        written = {"command": f"python -m {name}", "environment": environment(), "targets": [asdict(target)]}
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| 1 | speed | at least 0.99 | 1 | yes |  |  | `python -m early` |",
        "| 6 | growth | at most 1.15 | 1.2 | no |  | a \\| b | `python -m late` |",
    ]
    assert "Not measured" in text
    assert json.loads((tmp_path / "environment.json").read_text()) == environment()


def test_the_committed_report_is_that_of_its_results_and_the_readme_points_to_it() -> None:
    newest = max(path.parent for path in (BENCHMARKS / "results").glob("*/report.md"))
    assert report.told(report.load(newest)) == (newest / "report.md").read_text()
    assert f"(results/{newest.name}/report.md)" in (BENCHMARKS / "README.md").read_text()


def test_per_sample_runs_and_its_memory_is_of_the_order_of_the_formula(tmp_path: Path) -> None:
    sizes = "--num-layers 4 --width 128 --tokens 64 --samples 8 --chunk 4 --repeats 1 --published-repeats 1"
    memory = "--memory-of step_hooks step_opacus --memory-points 8:32"
    printed, written = run(tmp_path, "per_sample", f"{sizes} {memory}")
    assert "within a training step" in printed
    found = written["result"]
    assert all(values and min(values) > 0 for values in found["seconds"].values())
    assert found["peak_bytes"].keys() == {"plain", "step_hooks", "step_opacus"}
    assert {target["point"] for target in written["targets"]} == {"4", "5"}
    for said in found["models"].values():
        assert said["ours"].startswith("right")
        assert not said["opacus"].startswith("right")
    (point,) = found["formula"]
    assert 0.3 < point["measured"] / point["formula"] < 1.5


def test_activation_protocol_agrees_with_the_published_one_and_counts_its_block_passes(tmp_path: Path) -> None:
    sizes = "--sizes 4:64 6:64 --all-layers-up-to 4 --tokens 512 --batch-size 4 --block-size 64 --repeats 1"
    printed, found = run(tmp_path, "activation_protocol", sizes)
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
    printed, found = run(tmp_path, "watching", sizes)
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


def test_memory_is_that_of_the_formula(tmp_path: Path) -> None:
    printed, found = run(tmp_path, "memory", "--widths 512 --layers 5 --groups 4 --rows 128")
    assert "formula, MiB" in printed
    points = {point["part"]: point for point in found["result"]["points"]}
    assert points.keys() == {"collecting", "report", "gradients"}
    # At this width what is held of a batch is not little beside it.
    assert all(0.85 < point["measured"] / point["formula"] < 1.2 for point in points.values()), points
    assert [target["limit"] for target in found["targets"]] == [0.15] * 3


def test_growth_fits_an_exponent_to_every_part(tmp_path: Path) -> None:
    sizes = "--layers 1 2 --width 8 16 --tokens 64 128 --samples 8 16 --numbers 64 128 --matrices 1 2 --ranks 1 2"
    ranks = "--rank-layers 2 --rank-width 8 --rank-tokens 64 --rank-samples 8 --rank-numbers 64"
    repeats = "--rounds 1 --rank-rounds 1 --rank-repeats 1"
    printed, found = run(tmp_path, "growth", f"{sizes} {ranks} {repeats} --plot growth.png")
    assert "theory" in printed
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    sweeps = {(sweep["part"], sweep["size"]): sweep for sweep in found["result"]["sweeps"]}
    # With two ranks at the most, what begins with two has no exponent.
    assert len(found["targets"]) == len(sweeps) == 19
    for target, sweep in zip(found["targets"], sweeps.values(), strict=True):
        assert target["point"] == "6"
        assert target["is_ceiling"]
        assert target["found"] == sweep["exponent"]
        assert abs(target["limit"] - sweep["theory"] - 0.15) < 1e-3
        assert len(sweep["found"]) == len(sweep["numbers"]) == 2
        assert min(sweep["found"]) > 0
    assert round(sweeps["collecting activations", "ranks"]["theory"], 9) == -1
    # Counted, not timed: of two layers twice as much, of more tokens no more.
    layers, tokens = (sweeps["state of collecting, bytes", size] for size in ("layers", "tokens"))
    groups, width = 4, 8
    assert layers["found"][0] == groups * 8 * (1 + width + width**2) + 8 * width
    assert layers["found"][1] == 2 * layers["found"][0]
    assert tokens["found"][1] == tokens["found"][0]
