"""Study 5: verdicts on changes that were put in, runs that are the same to the bit, what is said of missing runs."""

import csv
import json
import math
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.findings import learning_or_execution
from benchmarks.findings.identical_runs import largest_difference
from benchmarks.findings.learning_or_execution import is_as_expected, is_stable, judge
from benchmarks.findings.learning_or_execution_report import write_report
from benchmarks.findings.learning_or_execution_runs import (
    NUM_TOKENS,
    Setting,
    base_of,
    nulls_of,
    seeds_of,
    tuning,
)
from benchmarks.findings.runs import RESULTS
from lightning_spectral import Run
from tests.benchmarks.planted_runs import plant

COUNTS = [NUM_TOKENS * share for share in (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)]
LAYERS = ("gpt.blocks.0",)
START = datetime(2026, 11, 27, 9, tzinfo=timezone.utc)
NATURAL = ("baseline", "rope")
CHANGED = ("workers", "micro_batches", "sleep", "quarter_rate", "noise", "rotated", "scaled_channel")
TAKES = {"baseline": 1.5, "quarter_rate": 3.0, "noise": 1.4}
"""Tokens to a loss, as a multiple of rope's."""
FAR = {"noise": (0.0, 1.0), "baseline": (1.0, 0.0), "scaled_channel": (1.0, 0.0)}
"""Whether activations and gradients are moved."""
OWN_DRAW = ("rotated", "micro_batches", "baseline")
"""Whose seeds scatter apart from rope's."""


def values(generator: np.random.Generator, exponent: float, is_far: float) -> np.ndarray:
    """A power law that scatters in waves over ln rank, and is moved in another."""
    ranks = np.arange(1, 33.0)
    place = np.pi * np.log(ranks) / np.log(33)
    scatter = 0.03 * sum(generator.standard_normal() * np.cos(wave * place) for wave in range(1, 5))
    return np.asarray(np.sort(ranks**-exponent * np.exp(scatter + 0.4 * is_far * np.cos(5 * place)))[::-1])


def make(folder: Path, setting: Setting, number: int) -> None:
    """One run; the number is its place in the order in which runs ran."""
    arm, seed = setting.arm, setting.seed
    own = 1_000 if arm in OWN_DRAW else 0
    generator = np.random.default_rng([seed, own])
    takes = TAKES.get(arm, 1.0) * math.exp(0.02 * generator.standard_normal()) * (1 + abs(math.log2(setting.factor)))
    drawn = [
        [values(generator, exponent, far) for _ in LAYERS]
        for exponent, far in zip((1.0, 0.5), FAR.get(arm, (0, 0)), strict=True)
    ]
    jitter = math.exp(0.003 * np.random.default_rng([seed, number]).standard_normal())
    about = {
        "seed": seed,
        "started": (START + timedelta(minutes=number)).isoformat(),
        "machines": ["a"],
        "device": "cpu",
    }
    about |= {"accumulate_grad_batches": 2 if arm == "micro_batches" else 1}
    plant(
        folder / setting.name,
        [(tokens, 10 - 0.5 * math.log(tokens / takes)) for tokens in COUNTS],
        lambda name, tokens: drawn[0][LAYERS.index(name)],
        LAYERS,
        setting.batch_tokens,
        lambda name, tokens: drawn[1][LAYERS.index(name.removesuffix(".out.weight"))],
        pace=1e3 * jitter * (0.7 if arm == "sleep" else 1.0),
        about=about,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    rope = Setting("rope", 1.0)
    sides = [seeds_of(rope, arm) for arm in (*NATURAL, "again", *CHANGED)]
    tuned = [one for arm in NATURAL for one in tuning(arm)]
    dealt = [one for pair in nulls_of(rope, 2) for side in pair for one in side]
    order = [*tuned, *(one for of_seed in zip(*sides, strict=True) for one in of_seed)]
    order += sorted(dealt, key=lambda one: one.seed)
    for number, setting in enumerate(dict.fromkeys(order)):
        make(folder, setting, number)
    return folder


@pytest.fixture(scope="module")
def found(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["study", "--runs", str(runs), "--folder", str(folder)])
        patch.setattr(learning_or_execution, "NATURAL", NATURAL)
        learning_or_execution.main()
    results: dict[str, Any] = json.loads((folder / "learning_or_execution.json").read_text())
    return results | {"report": (folder / "learning_or_execution.md").read_text()}


def test_what_was_put_in_gets_the_planned_verdict(found: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in found["changes"]}
    assert set(rows) == set(CHANGED)
    for name, row in rows.items():
        primary = row["at"]["primary"]
        assert row["is_right"], (name, primary["text"])
        assert primary["pairs"] == ([] if name == "micro_batches" else [1, 2, 3, 4])
    assert rows["noise"]["at"]["primary"]["led_by"] == "gradient-led"
    assert rows["sleep"]["at"]["primary"]["gains"]["tokens"][0] == 0.0
    assert rows["sleep"]["at"]["primary"]["gains"]["throughput"][0] == pytest.approx(-0.3, abs=0.01)
    assert rows["scaled_channel"]["at"]["primary"]["moved"] == {"activation": True, "gradient": False}
    (step,) = found["natural"]
    assert (step["base"], step["variant"], step["rate"], step["notes"]) == ("baseline", "rope", 1.0, [0.578, 0.0063])
    primary = step["at"]["primary"]
    assert primary["gains"]["tokens"][0] == pytest.approx(0.5, abs=0.1)
    assert (primary["kind"], primary["led_by"]) == ("learning-side", "activation-led")


def test_losses_are_those_of_the_plan(found: dict[str, Any], runs: Path) -> None:
    row = next(row for row in found["changes"] if row["variant"] == "noise")
    last = [Run(runs / replace(one).name).history.val_loss[-1] for one in seeds_of(Setting("rope", 1.0), "noise")]
    assert row["at"]["primary"]["loss"] == math.ceil(100 * max(last)) / 100
    base = [Run(runs / one.name).history.val_loss for one in seeds_of(Setting("rope", 1.0), "again")]
    assert row["at"]["half"]["loss"] == pytest.approx(np.mean([losses[2] for losses in base]))
    assert row["at"]["three quarters"]["loss"] == pytest.approx(np.mean([losses[3] for losses in base]))
    slow = next(row for row in found["changes"] if row["variant"] == "quarter_rate")
    assert "quarter_rate-batch_8-lr_x1-seed_1" in slow["at"]["half"]["why"], "it never comes down so far"
    assert slow["is_stable"] is None


def test_runs_that_are_the_same_to_the_bit_are_found_to_be(found: dict[str, Any]) -> None:
    assert [row["variant"] for row in found["identical"]] == ["again", "workers", "sleep", "scaled_channel"]
    assert all(row["differences"] == [0.0] * 4 for row in found["identical"])


def test_what_is_missing_is_named_and_not_judged(found: dict[str, Any]) -> None:
    assert found["missing"]["fused, B = 8"][0] == "fused-batch_8-lr_x1-seed_1"
    assert found["missing"]["rope, B = 32"] == [one.name for one in tuning("rope", 32)]
    assert len(found["nulls"]) == 2
    outcome = found["outcome"]
    assert [outcome[name] for name in "NPES"] == [None, None, True, None]
    report = found["report"]
    assert "2 of 60 comparisons of two seeds against two" in report
    assert "The chain at B = 32 was not made." in report
    assert "| fused, B = 8 | 4 | fused-batch_8-lr_x1-seed_1 |" in report
    assert "+57.8%" in report, "of the authors' notes"


def test_nothing_is_made_of_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--runs", str(tmp_path / "none"), "--folder", str(tmp_path)])
    learning_or_execution.main()
    results = json.loads((tmp_path / "learning_or_execution.json").read_text())
    assert results["outcome"]["in words"] == "not made"
    assert "not made" in (tmp_path / "learning_or_execution.md").read_text()


def test_what_was_found_stands_where_its_runs_are_gone(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "learning_or_execution.json"
    facts = {name: value for name, value in found.items() if name != "report"}
    path.write_text(json.dumps(facts | {"environment": facts["environment"] | {"date": "2026-01-02"}}))
    monkeypatch.setattr(sys, "argv", ["study", "--runs", str(tmp_path / "none"), "--folder", str(tmp_path)])
    monkeypatch.setattr(learning_or_execution, "NATURAL", NATURAL)
    for _ in range(2):  # the date is that of the runs, and not of the last look
        learning_or_execution.main()
        results = json.loads(path.read_text())
        assert results["kept"] == dict.fromkeys(("natural", "changes", "identical"), "2026-01-02")
        assert results["nulls"] == [{"kept": "2026-01-02", **row} for row in found["nulls"]]
    assert [results[name] for name in ("rate", "natural", "changes", "outcome")] == [
        found[name] for name in ("rate", "natural", "changes", "outcome")
    ]
    assert "rope, B = 8" not in results["missing"]
    assert "the natural steps of 2026-01-02" in path.with_suffix(".md").read_text()
    assert "when their runs were there: 2 of 2026-01-02" in path.with_suffix(".md").read_text()


def test_nulls_are_made_in_parts(found: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "learning_or_execution.json"
    first, second = found["nulls"]
    path.write_text(json.dumps({"nulls": [first, second], "environment": {"date": "2026-01-02"}}))
    here = second | {"kind": "both"}
    third = second | {"seed": 3}
    results: dict[str, Any] = {"natural": [1], "changes": [1], "identical": [1], "chain": [1], "nulls": [here, third]}
    learning_or_execution.keep_landed(results, path)
    assert results["nulls"] == [third, first | {"kept": "2026-01-02"}, here], "what is here is made anew"
    assert results["kept"] == {}


@pytest.mark.parametrize(
    ("expected", "kind", "led_by", "moved", "is_right"),
    [
        ("not learning", "none", "", False, True),
        ("not learning", "execution-side", "throughput-leaning", False, True),
        ("not learning", "both", "unmoved", False, False),
        ("not learning", "unknown", "", False, False),
        ("execution", "execution-side", "", False, True),
        ("execution", "none", "", False, False),
        ("learning", "learning-side", "unmoved", False, True),
        ("learning", "both", "unmoved", False, False),
        ("gradient-led", "learning-side", "gradient-led", True, True),
        ("gradient-led", "learning-side", "mixed", True, False),
        ("nothing", "none", "", False, True),
        ("nothing", "none", "", True, False),
        ("spectra alone", "none", "", True, True),
        ("spectra alone", "none", "", False, False),
        ("spectra alone", "learning-side", "activation-led", True, False),
    ],
)
def test_verdicts_are_held_against_the_plan(expected: str, kind: str, led_by: str, moved: bool, is_right: bool) -> None:
    fact = {"kind": kind, "led_by": led_by, "moved": {"activation": moved, "gradient": False}}
    assert is_as_expected(expected, fact) == is_right


def _results(kinds: list[str | None], right: bool = True) -> dict[str, Any]:
    return {
        "nulls": [{"kind": kind} for kind in kinds],
        "changes": [
            {"is_right": right or at > 0, "is_planted": at < 6, "is_stable": True}
            for at in range(len(learning_or_execution.EXPECTED))
        ],
        "identical": [{"differences": [0.0] * 4}] * 4,
        "natural": [{"is_stable": True}] * 6,
    }


@pytest.mark.parametrize(
    ("kinds", "holds"),
    [
        (["none"] * 57 + ["execution-side"] * 3, True),
        (["none"] * 56 + ["execution-side"] * 4, False),
        (["none"] * 59 + ["both"], False),
        (["none"] * 40, None),
        (["learning-side"], False),
        (["none"] * 56 + [None] * 4, None),
        ([], None),
    ],
)
def test_nulls_are_to_be_silent(kinds: list[str | None], holds: bool | None) -> None:
    assert judge(_results(kinds))["N"] is holds


def test_the_outcome_says_which_test_fails() -> None:
    assert judge(_results(["none"] * 60))["in words"] == "held"
    words = judge(_results(["none"] * 10, right=False))["in words"]
    assert words == "N not made for all, P does not hold, E holds, S holds"


def test_a_verdict_is_stable_if_it_is_the_same_throughout() -> None:
    one, other, none = {"kind": "none", "led_by": ""}, {"kind": "both", "led_by": "mixed"}, {"why": "never"}
    assert is_stable({"a": one, "b": one}) is True
    assert is_stable({"a": one, "b": none}) is None
    assert is_stable({"a": one, "b": other, "c": none}) is False


def test_a_bit_of_difference_is_seen(runs: Path, tmp_path: Path) -> None:
    again, scaled = (Run(runs / f"{arm}-batch_8-lr_x1-seed_1") for arm in ("again", "scaled_channel"))
    assert base_of("scaled_channel") == "again"
    assert largest_difference(again, scaled, ("activation",)) == 0.0
    assert largest_difference(again, scaled) > 0.1
    assert largest_difference(again, Run(runs / "noise-batch_8-lr_x1-seed_1"), ("activation", "gradient")) > 0.01

    def logged(name: str, rows: list[dict[str, float | str]]) -> Run:
        plant(tmp_path / name, [(1024.0, 3.0)], lambda *given: np.arange(8, 0, -1.0), LAYERS, 1024)
        with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return Run(tmp_path / name)

    first = logged("first", [{"step": 1, "drift/js": 0.5, "tokens_per_second": 9.0, "val_loss": ""}])
    second = logged("second", [{"step": 1, "drift/js": 0.5 + 2**-53, "tokens_per_second": 8.0, "val_loss": ""}])
    assert largest_difference(first, second) == 2**-53
    assert largest_difference(first, second, ("drift",)) == 0.0
    assert largest_difference(first, logged("third", [{"step": 1}])) == math.inf


LANDED = RESULTS / "learning_or_execution.json"


@pytest.mark.skipif(not LANDED.exists(), reason="no run was made")
def test_the_report_says_what_the_landed_results_hold(tmp_path: Path) -> None:
    write_report(json.loads(LANDED.read_text()), tmp_path)
    assert (tmp_path / "learning_or_execution.md").read_text() == LANDED.with_suffix(".md").read_text()
