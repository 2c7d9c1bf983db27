"""When reports are due and which steps they are made of, as properties of step counts."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.measurement.schedule import TrainSchedule

COUNTS = st.integers(1, 12)


def run(schedule: TrainSchedule, start: int, num_batches: int, stride: int = 1, accumulate: int = 1, rows: int = 1):
    """Walk through training; what was collected for each report, by the report's step."""
    reports: dict[int, list[int]] = {}
    collected: list[int] = []
    step = start
    schedule.start(start)
    for batch in range(1, num_batches + 1):
        collects = schedule.collects(step)
        before, step = step, step + (stride if batch % accumulate == 0 else 0)
        moved = schedule.advance(step)
        assert moved == step - before
        if moved == 0:
            continue
        collected += [before] if collects else []
        if schedule.rows_per_step is None:
            schedule.rows_per_step = rows
            collected = collected if schedule.collects(before) else []
        if schedule.due():
            reports[step] = collected
            collected = []
    return reports, step


@given(
    every=COUNTS, start=st.integers(0, 30), num_batches=st.integers(0, 60), stride=COUNTS, accumulate=st.integers(1, 3)
)
def test_a_report_is_due_exactly_when_the_quotient_grows(every, start, num_batches, stride, accumulate) -> None:
    reports, last = run(TrainSchedule(every, 10), start, num_batches, stride, accumulate)
    steps = range(start, last + 1, stride)
    assert list(reports) == [step for step in steps[1:] if step // every > (step - stride) // every]


@given(every=COUNTS, num_tokens=st.integers(1, 60), rows=st.integers(1, 20), stride=st.integers(1, 3))
def test_a_report_is_made_of_the_last_steps_before_it(every, num_tokens, rows, stride) -> None:
    reports, _ = run(TrainSchedule(every, num_tokens), 0, 40, stride, rows=rows)
    window = min(every, math.ceil(num_tokens / rows))
    previous = 0
    for step, collected in reports.items():
        # Never more than lie between two reports: nothing slides from one into the next.
        expected = range(max(previous, step - window * stride), step, stride)
        assert collected == list(expected)
        previous = step


def test_two_optimizers_do_not_miss_an_odd_multiple() -> None:
    reports, _ = run(TrainSchedule(3, 1), 0, 6, stride=2)
    assert list(reports) == [4, 6, 10, 12]


@given(every=COUNTS, num_tokens=COUNTS, split=st.integers(0, 40))
def test_resumed_run_reports_at_the_same_steps(every, num_tokens, split) -> None:
    whole, _ = run(TrainSchedule(every, num_tokens), 0, 40)
    first = TrainSchedule(every, num_tokens)
    before, step = run(first, 0, split)
    second = TrainSchedule(every, num_tokens)
    second.rows_per_step, second.stride = first.rows_per_step, first.stride
    after, _ = run(second, step, 40 - split)
    assert list(before) + list(after) == list(whole)


def test_rows_that_nobody_saw_open_the_window_wide() -> None:
    schedule = TrainSchedule(5, 100)
    schedule.rows_per_step = 0.0
    assert schedule.window == 5
