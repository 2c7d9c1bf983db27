"""The GPU benchmark runs on a CPU, at tiny sizes; what it lacks, what fails and what does not fit is a line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_gaps import Gaps, gaps_between
from benchmarks.gpu_parts import Line, Part, SkippedError
from benchmarks.gpu_runner import run_parts
from benchmarks.gpu_sizes import Sizes, sizes_of
from benchmarks.gpu_worker import outcome
from tests.limit import LIMIT

ROOT = Path(__file__).parents[2]
TINY = {"device": "cpu", "is_tiny": True, "is_quick": False}


def test_every_part_that_a_cpu_can_run_runs(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--json", "found/gpu.json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found" / "gpu.json").read_text())["result"]["parts"]
    assert list(found) == list(gpu_parts.PARTS)
    assert {name: part["failed"] for name, part in found.items() if "failed" in part} == {}
    assert {name for name, part in found.items() if "skipped" in part} <= {"flex", "overlap"}
    lines = {(name, line["what"]): line["found"] for name, part in found.items() for line in part["lines"]}
    assert lines["identity", "parameters that differ with all four callbacks"] == 0
    assert 0.2 < lines["training", "ActivationSpectrum: throughput, a report every 100 steps of 1 batch"] <= 1.5
    assert 0 <= lines["gaps", "plain steps: share of the time with no operator running"] < 1
    for name, strategy in (("nccl", "gloo"), ("fsdp2", "fully_shard")):
        assert lines[name, f"exponents under {strategy}, worst relative difference from those without"] < 1e-4
    (tabled,) = (tmp_path / "found").glob("*.md")
    text = tabled.read_text()
    assert "say nothing of speed" in text
    assert all(f"## {name}\n" in text for name in found)
    assert f"[{len(found)}/{len(found)}] " in done.stdout


def test_what_is_missing_is_named_in_one_line_that_leaves_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.what_to_install() is None
    there = importlib.util.find_spec
    missing = {"lightning", "scipy"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else there(name))
    line = gpu.what_to_install()
    assert line is not None
    assert line.startswith("missing: lightning, scipy: ")
    assert line.endswith(f" -m pip install torch=={torch.__version__} 'lightning>=2.5,!=2.6.2,!=2.6.3' 'scipy>=1.11'")
    missing.add("torch")
    assert "torch is missing" in str(gpu.what_to_install())


def test_what_the_gpu_benchmark_installs_is_what_the_package_needs() -> None:
    import re

    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert needed is not None
    names = set(re.findall(r'"([^"]+)"', needed[1]))
    assert {quoted.strip("'") for quoted in gpu.PACKAGES.values()} == {n for n in names if not n.startswith("torch>")}


def test_a_machine_without_cuda_is_told_so_in_one_line() -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--quick"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert (
        done.stderr == "no CUDA device: `python -m benchmarks.gpu --device cpu --tiny` runs every part that a CPU can\n"
    )


def test_parts_that_do_not_fit_into_the_time_are_left_out_with_a_line() -> None:
    found = run_parts(["training", "flex"], TINY | {"is_tiny": False}, minutes=0.1)
    said = [part["skipped"] for part in found.values()]
    assert said[0].endswith("of 0.1 minutes, and it takes about 45: --parts training runs it alone")
    assert [part["lines"] for part in found.values()] == [[], []]


def test_a_part_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sizes: Sizes) -> list[Line]:
        """Fails."""
        raise RuntimeError("CUDA error\nand more")

    def cannot(sizes: Sizes) -> list[Line]:
        """Cannot."""
        raise SkippedError("not here")

    for name, run in (("fails", fails), ("cannot", cannot)):
        monkeypatch.setitem(gpu_parts.PARTS, name, Part(run, 1))
    sizes = sizes_of(**TINY)
    failed, skipped = outcome("fails", sizes), outcome("cannot", sizes)
    assert failed["failed"].startswith("RuntimeError: ")
    assert "CUDA error" in failed["failed"]
    assert "\n" not in failed["failed"]
    assert skipped["skipped"] == "not here"
    parts: dict[str, Any] = {"a": failed | {"what": "Fails."}, "b": skipped | {"what": "Cannot."}}
    text = gpu.markdown({"sizes": TINY, "parts": parts})
    assert "failed: RuntimeError: " in text
    assert "skipped: not here" in text


def test_gaps_are_what_no_interval_covers() -> None:
    assert gaps_between([(0, 4), (1, 2), (3, 6), (8, 10)]) == Gaps(share=0.2, longest=2e-6, count=4)
    with pytest.raises(ValueError, match="the profiler has seen nothing"):
        gaps_between([])
