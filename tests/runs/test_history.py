"""Histories: lines become entries, and a loss is reached where SciPy's root of the curve lies."""

from math import exp, inf, isnan, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from lightning_spectral.runs import History, Record, Row
from lightning_spectral.runs.history import Point

LOSSES = st.lists(st.integers(1, 40).map(lambda n: n / 8), min_size=2, max_size=12)
"""Multiples of an eighth, so that equal losses, and losses equal to the target, come up."""
TARGETS = st.integers(2, 82).map(lambda n: n / 16)
SHARES = st.lists(st.floats(0.05, 3), min_size=12, max_size=12)


def history(tokens, losses, seconds=None, step=None) -> History:
    """A validated run; seconds run evenly with tokens if none are given."""
    tokens = np.asarray(tokens, dtype=np.float64)
    seconds = tokens / 100 if seconds is None else np.asarray(seconds, dtype=np.float64)
    step = np.arange(1.0, len(tokens) + 1) if step is None else np.asarray(step, dtype=np.float64)
    return History(step, tokens, seconds, np.full(len(tokens), nan), np.asarray(losses, dtype=np.float64))


def first_root(tokens, losses, target: float) -> float:
    """Where the loss, linear in log tokens, first comes down to a target: SciPy's root on the first piece with one."""
    if losses[0] < target:
        return nan
    logs = np.log(tokens)
    for low, high, loss in zip([logs[0], *logs], logs, losses, strict=False):
        if loss == target:
            return exp(high)
        if loss < target:
            return exp(brentq(lambda x: np.interp(x, logs, losses) - target, low, high, xtol=1e-14, rtol=1e-14))
    return nan


@given(LOSSES, SHARES, TARGETS)
def test_a_loss_is_first_reached_at_the_first_root(losses: list[float], shares: list[float], target: float) -> None:
    tokens = 100 * np.cumsum(shares)[: len(losses)]
    found = history(tokens, losses).first_at(target)
    assert found.tokens == pytest.approx(first_root(tokens, losses, target), rel=1e-10, nan_ok=True)


@given(LOSSES, SHARES, st.floats(0, 1))
def test_a_falling_loss_is_inverted_as_numpy_does(losses: list[float], shares: list[float], share: float) -> None:
    falling = sorted(set(losses), reverse=True)
    tokens = 100 * np.cumsum(shares)[: len(falling)]
    target = falling[-1] + share * (falling[0] - falling[-1])
    expected = np.exp(np.interp(target, falling[::-1], np.log(tokens)[::-1]))
    assert history(tokens, falling).first_at(target).tokens == pytest.approx(expected, rel=1e-10)


@given(LOSSES, SHARES, TARGETS, TARGETS)
def test_a_lower_loss_is_never_reached_earlier(losses: list[float], shares: list[float], one, other) -> None:
    found = history(np.cumsum(shares)[: len(losses)], losses)
    high, low = (found.first_at(target).tokens for target in (max(one, other), min(one, other)))
    assert isnan(high) or isnan(low) or high <= low * (1 + 1e-12)


@given(LOSSES, SHARES, SHARES, TARGETS)
def test_steps_and_seconds_run_evenly_with_tokens_in_between(losses, shares, pauses, target: float) -> None:
    tokens, seconds = (np.cumsum(gaps)[: len(losses)] for gaps in (shares, pauses))
    step = np.arange(len(losses)) * 10.0
    found = history(tokens, losses, seconds, step).first_at(target)
    if not isnan(found.tokens):
        assert found.seconds == pytest.approx(np.interp(found.tokens, tokens, seconds), rel=1e-9)
        assert found.step == pytest.approx(np.interp(found.tokens, tokens, step), rel=1e-9, abs=1e-9)


def test_entries_without_a_loss_change_nothing() -> None:
    plain = history([100, 400], [3.0, 1.0])
    between = history([50, 100, 200, 300, 400, 900], [nan, 3.0, nan, np.inf, 1.0, nan])
    assert between.first_at(2.0).tokens == pytest.approx(200.0)  # half way in log tokens
    assert between.first_at(2.0).tokens == plain.first_at(2.0).tokens
    entries, losses = between.with_loss()
    assert (entries.tolist(), losses.tolist()) == ([1, 4], [3.0, 1.0])


def test_from_no_tokens_on_a_loss_falls_evenly_with_tokens() -> None:
    """There is no logarithm of zero: a run that was validated before it was trained."""
    found = history([0, 80], [4.0, 2.0], step=[0, 8]).first_at(3.5)
    assert found == pytest.approx((2.0, 20.0, 0.2))


def test_without_new_tokens_steps_follow_the_loss() -> None:
    found = history([50, 50], [4.0, 2.0], seconds=[1, 3], step=[10, 20]).first_at(2.5)
    assert found == pytest.approx((17.5, 50.0, 2.5))


@pytest.mark.parametrize("target", [4.1, 0.9, nan, -1.0], ids=["below from the first", "never", "NaN", "negative"])
def test_nowhere_is_nan_in_all(target: float) -> None:
    assert all(map(isnan, history([1, 2], [4.0, 1.0]).first_at(target)))


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (Point(3, 700.0, 9.0), (700 - 100) / (9 - 5)),  # without the first entry, in which a model compiles
        (Point(1, 100.0, 5.0), 100 / 5),
        (Point(0.5, 50.0, 2.0), 50 / 2),
        (Point(nan, nan, nan), nan),
        (Point(2, 200.0, 5.0), nan),  # in no time
    ],
    ids=["later", "first entry", "before it", "nowhere", "no time"],
)
def test_throughput_is_counted_from_the_first_entry(point: Point, expected: float) -> None:
    found = history([100, 400, 800], [3, 2, 1], seconds=[5, 8, 10]).throughput(point)
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_validation_before_training_takes_no_part_in_throughput() -> None:
    """It is of no tokens, and the first steps, in which a model compiles, come after it."""
    found = history([0, 100, 200, 300], [4, 3, 2, 1], seconds=[0, 61, 62, 63])
    assert found.throughput(Point(3, 300.0, 63.0)) == 100
    assert found.throughput(Point(1, 100.0, 61.0)) == pytest.approx(100 / 61)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([3, 2, inf, inf], 3), ([3, inf, 2, nan], nan), ([3, inf, nan, inf], 2), ([3, nan, nan, nan], nan)],
    ids=["to the end", "came back", "not always validated", "validated once"],
)
def test_a_loss_that_is_no_number_to_the_end_is_told(losses: list[float], expected: float) -> None:
    assert history([1, 2, 3, 4], losses).diverged_at == pytest.approx(expected, nan_ok=True)


def test_an_empty_history_is_one(tmp_path: Path) -> None:
    Record.begin(tmp_path / "spectra", {"id": "a"})
    found = History.read(tmp_path / "spectra")
    assert [column.shape for column in found] == [(0,)] * 5
    assert found.loss_name == "train_loss"
    assert isnan(found.first_at(1.0).tokens)
    assert found.throughput(Point(1, 10.0, 2.0)) == 5.0


ROWS = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([nan, 0.5, 1.5]), st.sampled_from([nan, 2.0, 3.0])), max_size=8
)


@given(ROWS)
def test_of_one_step_the_first_training_loss_and_the_last_of_all_else_count(tmp_path_factory, rows) -> None:
    """The later training loss is the mean over the few batches since the earlier line."""
    record = Record.begin(tmp_path_factory.mktemp("rows") / "spectra", {"id": "a"})
    for number, (step, train, validated) in enumerate(rows):
        record.append(Row(step, 10.0 * step, float(number), train, validated))
    found = History.read(record.folder)
    steps = sorted({step for step, *_ in rows})
    assert found.step.tolist() == steps
    for entry, step in enumerate(steps):
        of_step = [(number, *row[1:]) for number, row in enumerate(rows) if row[0] == step]
        train, validated = ([row[column] for row in of_step if not isnan(row[column])] for column in (1, 2))
        assert found.seconds[entry] == of_step[-1][0]
        np.testing.assert_equal(found.train_loss[entry], train[0] if train else nan)
        np.testing.assert_equal(found.val_loss[entry], validated[-1] if validated else nan)


def test_one_validation_makes_it_the_loss() -> None:
    found = history([1, 2, 3], [nan, 2.0, nan])._replace(train_loss=np.array([5.0, 4.0, 3.0]))
    assert found.loss_name == "val_loss"
    assert found.with_loss()[1].tolist() == [2.0]
    assert found._replace(val_loss=np.full(3, nan)).with_loss()[1].tolist() == [5.0, 4.0, 3.0]
