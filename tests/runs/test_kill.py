"""A training run killed at random moments loses no report that was written, and goes on with its record."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_spectral import Run
from tests.limit import LIMIT
from tests.runs import kill_run

NUM_KILLS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def attempts(folder: Path) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, kill_run.__file__, str(folder), str(NUM_KILLS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_every_report_that_was_written_is_there(attempts: list[dict]) -> None:
    assert len(attempts) == NUM_KILLS
    for attempt in attempts:
        assert set(attempt["told"]) <= set(attempt["steps"])
        assert set(attempt["told"]) <= set(attempt["history"])


def test_resuming_appends(attempts: list[dict]) -> None:
    assert len({attempt["resumed"] for attempt in attempts}) > 5
    for before, attempt in pairwise(attempts):
        # What the record held at the checkpoint is there still, whether or not the new attempt came far.
        kept = {step for step in before["steps"] if step <= attempt["resumed"]}
        assert kept <= set(attempt["steps"])
    last = attempts[-1]
    assert last["steps"] == list(range(1, len(last["steps"]) + 1))
    # A report is written before its line of the history: the last kill may fall between the two.
    assert last["history"] in (last["steps"], last["steps"][:-1])


def test_nothing_is_thrown_away(attempts: list[dict], folder: Path) -> None:
    everything = [Run(path) for path in folder.glob("spectra*")]
    seen = {(step, run.tokens_at("activation", step)) for run in everything for step in run.steps("activation")}
    for attempt in attempts:
        assert {(step, 32.0 * step) for step in attempt["told"]} <= seen
