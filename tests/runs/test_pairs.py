"""Runs of one seed are pairs, where their records say so, and gains of pairs are SciPy's."""

import re
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_spectral import compare
from lightning_spectral.runs.gains import MIN_GAIN, gain_in
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.pairs import Pairs, find_pairs
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import Scatter, scatter
from tests.runs.made_up import made_up, when


def runs(*seeds: int | None, **facts: Any) -> list[Any]:
    return [SimpleNamespace(about={"seed": seed, **facts}, path=seed) for seed in seeds]


@pytest.mark.parametrize(
    ("base", "variant", "found", "reason"),
    [
        (runs(1, 2, 3), runs(3, 1, 2), [1, 2, 3], ""),
        (runs(1, 2), runs(3, 4), [], ""),
        (runs(None, None), runs(None, None), [], ""),
        (runs(1, 2, 3), runs(1, 2), [], "not all runs have a partner"),
        (runs(1, 2), runs(1, None), [], "not all runs have a partner"),
        (runs(1, 1), runs(1, 1), [], "not all runs have a partner"),
        (runs(1, 2, batch_tokens=512.0), runs(1, 2, batch_tokens=2048.0), [], "batch_tokens is 512 in .* and 2048 in"),
        (runs(1, 2, world_size=1), runs(1, 2, world_size=2), [], "world_size is 1 in .* and 2 in"),
        (runs(1, 2, world_size=1), runs(1, 2), [1, 2], ""),
    ],
)
def test_pairs_are_runs_of_one_seed_in_one_order(base: list, variant: list, found: list[int], reason: str) -> None:
    pairs = find_pairs(base, variant)
    assert pairs.seeds == found
    assert re.match(reason or "$", pairs.reason)


def measured(logs: list[float]) -> list[Measured]:
    run: Any = SimpleNamespace(id="", family="F")
    return [Measured(run, {Key("tokens"): log, Key("throughput"): log}, {}, {}) for log in logs]


BASE, VARIANT = [10.0, 10.5, 9.8, 10.2], [9.6, 10.15, 9.35, 9.8]


def test_a_gain_of_pairs_is_that_of_scipy() -> None:
    sides = [measured(BASE), measured(VARIANT)]
    paired, single = (Sides(*sides, scatter(sides), is_paired) for is_paired in (True, False))
    test = stats.ttest_rel(BASE, VARIANT)
    gain, interval = gain_in("tokens", paired), test.confidence_interval(0.975)
    assert (gain.low, gain.high) == pytest.approx((exp(interval.low) - 1, exp(interval.high) - 1))
    wide = test.confidence_interval(0.9)
    assert gain.resolved == pytest.approx(exp(wide.high) - 1)
    assert gain.is_detected
    assert not gain_in("tokens", single).is_detected
    assert gain_in("throughput", paired) == gain_in("throughput", single)


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("num_seeds", [2, 3, 6])
def test_what_is_detectable_is_detected_in_80_of_100_cases(num_seeds: int, is_paired: bool) -> None:
    numbers = np.random.default_rng(0).standard_normal((2, num_seeds)) * 0.1
    sides = [measured(side.tolist()) for side in numbers]
    both = Sides(*sides, scatter(sides), is_paired)
    error = both.error(Key("tokens"))
    assert error.degrees == (num_seeds - 1 if is_paired else 2 * num_seeds - 2)
    limit = stats.t.ppf(0.9875, error.degrees)
    power = stats.nct.sf(limit, error.degrees, both.detectable(Key("tokens")) / error.stderr)
    assert power == pytest.approx(0.8, abs=1e-5)
    gain = gain_in("tokens", both)
    assert gain.detectable == pytest.approx(exp(both.detectable(Key("tokens"))) - 1)


def test_a_gain_below_two_percent_is_never_said_to_be_detectable() -> None:
    sides = [measured([10.0, 10.0, 10.0]), measured([10.0, 10.0, 10.0])]
    gain = gain_in("tokens", Sides(*sides, scatter(sides)))
    assert (gain.detectable, gain.resolved, gain.is_zero) == (MIN_GAIN, 0.0, True)


def test_single_runs_say_nothing_of_what_is_detectable() -> None:
    gain = gain_in("tokens", Sides(measured([10.0]), measured([9.0]), Scatter({}, [], [])))
    assert np.isnan([gain.detectable, gain.resolved]).all()
    assert not gain.is_zero


def sides_of(folder: Path, num_seeds: int, gain: float = 1.2, scatter: float = 0.3, seeds: int = 0) -> list[list[Path]]:
    """Seeds that scatter by more than the gain, which is nearly the same for each."""
    generator = np.random.default_rng(0)
    found: list[list[Path]] = [[], []]
    for number, log in enumerate(scatter * generator.standard_normal(num_seeds)):
        for side, name in enumerate("bv"):
            facts = when(2 * number + side) | {"seed": number + side * seeds}
            tokens = 1e5 * exp(log) / (gain * exp(0.005 * number) if side else 1)
            # Written in another order than the seeds'.
            found[side].insert(0, made_up(folder / f"{name}{number}", tokens, 10.0, about=facts))
    return found


def test_pairs_show_what_single_runs_do_not(tmp_path: Path) -> None:
    sides = sides_of(tmp_path, 4)
    paired, single = compare(*sides), compare(*sides, paired=False)
    assert (paired.pairs, single.pairs) == (Pairs([0, 1, 2, 3], ""), Pairs([], "paired is false"))
    assert paired.verdict.kind == "learning-side"
    assert single.verdict.kind == "none"
    assert paired.gains["tokens"].detectable < 0.1 < single.gains["tokens"].detectable
    assert [run.about["seed"] for run in paired.variant] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="paired must be true, false or None for the rule, got 'yes'"):
        compare(*sides, paired="yes")


def test_two_pairs_are_taken_for_single_runs_unless_asked(tmp_path: Path) -> None:
    sides = sides_of(tmp_path, 2)
    assert compare(*sides).pairs == Pairs([], "that takes 3 of them")
    assert compare(*sides, paired=True).pairs.seeds == [0, 1]


def test_other_seeds_are_no_pairs(tmp_path: Path) -> None:
    sides = sides_of(tmp_path, 3, seeds=10)
    assert compare(*sides).pairs == Pairs([], "")
    message = "paired must be true only for pairs of runs, got base and variant have no seed in common: train"
    with pytest.raises(ValueError, match=message):
        compare(*sides, paired=True)


def test_beside_a_floor_runs_are_single(tmp_path: Path) -> None:
    sides = sides_of(tmp_path, 3)
    floor = [made_up(tmp_path / f"f{n}", 1e5 * (1 + n), 10.0) for n in range(2)]
    assert compare(*sides, floor=floor).pairs.reason == "the floor is of single runs"


def test_what_learns_the_very_same_is_no_faster_learner_however_seeds_scatter(tmp_path: Path) -> None:
    """Two pairs are enough where both runs of each took the same tokens: a loader, a compiler, another machine."""
    sides: list[list[Path]] = [[], []]
    for number, tokens in enumerate((1e5, 2e5)):
        for side, name in enumerate("bv"):
            about = when(2 * number + side) | {"seed": number}
            seconds = tokens / 1e4 * (1 + 0.001 * number) / (1 + side)
            sides[side].append(made_up(tmp_path / f"{name}{number}", tokens, seconds, about=about))
    comparison = compare(*sides)
    assert (comparison.verdict.kind, comparison.verdict.led_by) == ("execution-side", "throughput-leaning")
    assert comparison.gains["tokens"].is_zero
    alone = compare(*sides, paired=False)
    assert (alone.verdict.kind, alone.verdict.led_by) == ("execution-side", "")
    assert "a gain in tokens is not resolvable below " in alone.verdict.text
    assert alone.gains["tokens"].resolved > 1
    assert alone.gains["tokens"].gain == pytest.approx(0)
