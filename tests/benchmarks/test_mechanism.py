"""The study of the mechanism: its tests on planted courses, its harmonics against enumeration, runs made once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.findings import mechanism, mechanism_report, mechanism_runs
from benchmarks.findings.mechanism import AGREE, agreement, half_way, judged, moves
from benchmarks.findings.mechanism_linear import ALPHAS, BATCHES, LEVELS, RATE, linear
from benchmarks.findings.mechanism_runs import CYCLES, Setting, Task, probe_of, task_harmonics
from lightning_spectral.theory import power_law_spectrum, steps_to_risk


@pytest.mark.parametrize("cycle", CYCLES)
def test_the_harmonics_are_those_that_the_next_state_shares(cycle: int) -> None:
    steps = np.arange(math.ceil(cycle / 8), cycle)
    # The mean of the next state's harmonic over all steps, whatever the present state is.
    energy = np.array([abs(np.exp(2j * np.pi * r * steps / cycle).mean()) ** 2 for r in range(1, cycle // 2 + 1)])
    chosen = task_harmonics(cycle)
    share = energy[np.array(chosen) - 1].sum() / energy.sum()
    assert share >= 0.5
    assert share - energy[np.array(chosen) - 1].min() / energy.sum() < 0.5
    assert energy[np.array(chosen) - 1].min() >= np.delete(energy, np.array(chosen) - 1).max()


def test_probes_are_sequences_of_the_task() -> None:
    probe = probe_of(17, 16)
    steps = (probe.states[:, 1:] - probe.states[:, :-1]) % 17
    assert (steps == steps[:, :1]).all()
    assert set(steps.unique().tolist()) == set(range(3, 17))
    assert torch.equal(probe.states, probe_of(17, 16).states)


def test_half_way_is_between_looks() -> None:
    # In log2(1 + steps) 0, 1, 2, 3: half of the way from 4 to 0 is two thirds of the way from 1 to 2.
    assert half_way([0, 1, 3, 7], [4.0, 4.0, 1.0, 0.0]) == pytest.approx(2 ** (1 + 2 / 3) - 1)
    assert math.isnan(half_way([0, 1], [1.0, math.nan]))


def test_what_scatters_does_not_move() -> None:
    steps = [2**k - 1 for k in range(10)]
    assert moves(steps, [0.1 + 0.05 * k for k in range(10)])
    assert not moves(steps, [0.1 + 0.001 * k for k in range(10)])
    assert not moves(steps, [0.1] * 5 + [0.3, 0.0, 0.4, 0.0, 0.35])


def run(lead: float, correlation: float, change: float, is_moving: bool = True) -> dict[str, Any]:
    same = dict.fromkeys(mechanism.SPECTRAL, correlation)
    return {
        "lead": lead,
        "h_s_moves": is_moving,
        "h_s_change": 0.1,
        "with_h_s": same,
        "with_loss": same,
        "head_share_begun": 0.5,
        "head_share_change": change,
    }


@pytest.mark.parametrize(
    ("leads", "outcome"),
    [
        ([0.5] * 12, "before"),
        ([-0.5] * 10 + [0.5] * 2, "after"),
        ([0.5] * 9 + [-0.5] * 3, "with"),
        ([0.1] * 12, "with"),
    ],
)
def test_the_first_test_keeps_to_the_plan(leads: list[float], outcome: str) -> None:
    assert judged([run(lead, 0.0, 0.1) for lead in leads])["when"]["outcome"] == outcome


def test_runs_in_which_nothing_moves_count_against() -> None:
    found = judged([run(0.5, 0.0, -0.1)] * 9 + [run(0.5, 0.0, -0.1, is_moving=False)] * 3)
    assert found["when"]["outcome"] == "not shown"
    assert found["head_share"]["holds"]


def test_agreement_asks_for_signs_and_size() -> None:
    assert agreement([0.6] * AGREE + [-0.6])["holds"]
    assert not agreement([0.6] * (AGREE - 1) + [-0.6] * 2)["holds"]
    assert not agreement([0.4] * 12)["holds"]


def test_the_linear_model_turns_between_its_levels() -> None:
    found = linear(64, 1.5, math.inf)
    assert found["steps"][0][-1] < found["steps"][0][0]
    assert found["steps"][-1][-1] > found["steps"][-1][0]
    below = [level for level, steps in zip(LEVELS, found["steps"], strict=True) if steps[-1] > steps[0]]
    assert max(below) < found["crossing"] < min(set(LEVELS) - set(below))


@pytest.mark.parametrize("batch_size", BATCHES)
def test_its_steps_are_those_of_the_theory(batch_size: float) -> None:
    found = linear(32, 1.5, batch_size)
    power = torch.arange(1, 33, dtype=torch.float64) ** -1.5
    power /= power.sum()
    for index in (0, len(ALPHAS) - 1):
        spectrum = power_law_spectrum(32, ALPHAS[index])
        for level, steps in zip(LEVELS, found["steps"], strict=True):
            expected = steps_to_risk(spectrum, power, RATE, batch_size, 0.0, level)
            # The theory's are interpolated between the first whole step below and the one before.
            assert steps[index] == pytest.approx(expected, rel=2e-3)


def test_runs_are_made_once_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism_runs, "TASKS", {"tiny": Task(32, 16, 4096, {32: 6, 64: 6})})
    monkeypatch.setattr(mechanism_runs, "NUM_LOOKS", 6)
    monkeypatch.setattr(mechanism_runs, "HELD_OUT_TOKENS", 512)
    settings = [Setting("tiny", 32, 1), Setting("tiny", 64, 1)]
    told: list[str] = []
    mechanism_runs.train_all(settings[:1], tmp_path, told.append)
    mechanism_runs.train_all(settings, tmp_path, told.append)
    assert told == ["tiny-batch_32-seed_1: done", "tiny-batch_64-seed_1: done"]
    looks = mechanism_runs.done(settings[0], tmp_path)
    assert looks is not None
    assert [look["step"] for look in looks] == settings[0].looks
    # Looking at a model is no part of its training.
    again = mechanism_runs.train(settings[0], mechanism_runs.Observer(settings[0].sizes))
    assert json.loads(json.dumps(again))[-1]["loss"] == looks[-1]["loss"]
    assert looks[-1]["loss"] < looks[0]["loss"]
    runs = [mechanism.measured(one, mechanism_runs.done(one, tmp_path) or []) for one in settings]
    found = {
        "linear": [linear(512, beta, math.inf) for beta in (1.1, 1.5)],
        "chance": 0.26,
        "runs": {"tiny": runs},
        "tests": {"tiny": judged(runs)},
        "explored": {"tiny": mechanism.explored(runs)},
    }
    mechanism_report.write_report(found, {"date": "today"}, tmp_path / "results")
    text = (tmp_path / "results" / "mechanism.md").read_text()
    assert "test 1" in text
    assert "tiny-batch_64-seed_1" in text
    assert (tmp_path / "results" / "mechanism.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "results" / "mechanism.json").read_text())["runs"]["tiny"]) == 2
