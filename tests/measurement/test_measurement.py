"""When any measurement collects and reports, with one that counts: in training, in validation, after a resume."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from lightning_spectral.measurement import Measurement, Report, Request, Scene
from lightning_spectral.measurement.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Counting(Request):
    """Wants some rows; each batch has four."""

    kind: ClassVar[str] = "activation"
    num_rows: int = 8

    def measure(self, scene: Scene) -> "Counter":
        return Counter(self)


class Counter(Measurement):
    """Reports the batches it collected, by step."""

    def __init__(self, request: Counting) -> None:
        super().__init__(request, request.num_rows, Stopwatch(), torch.device("cpu"))
        self.held: list[int] = []
        self.reports: dict[int, list[int]] = {}
        self.error: Exception | None = None

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        if self.is_collecting and has_right_stage:
            self.held.append(step)

    def close(self) -> None: ...

    def agree_on_rows(self) -> float:
        return 4.0 * len(self.held)

    def make_report(self, step: int) -> None:
        if self.error is not None:
            raise self.error
        self.reports[step] = list(self.held)
        self.report = Report(step, {})
        self.reset()

    def missing_report(self, step: int, reason: str) -> Report:
        self.reports[step] = [reason]  # type: ignore[list-item]
        return Report(step, {})

    def reset(self) -> None:
        super().reset()
        self.held = []

    def remove(self) -> None: ...


def counter(**kwargs: Any) -> Counter:
    return Counter(Counting(**{"stage": "train", "every_n_steps": 5, "num_groups": 1, **kwargs}))


def train(one: Counter, start: int, stop: int, batches: int = 1) -> None:
    one.start_training(start)
    for step in range(start, stop):
        for index in range(batches):
            one.start_train_batch("batch", step)
            one.end_train_batch(step + (index == batches - 1))


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        pytest.param(8, {5: [3, 4], 10: [8, 9]}, id="the last two steps"),
        pytest.param(4, {5: [4], 10: [9]}, id="the last"),
        pytest.param(10**6, {5: [0, 1, 2, 3, 4], 10: [5, 6, 7, 8, 9]}, id="all"),
    ],
)
def test_a_report_is_of_the_last_steps_before_it(num_rows: int, expected: dict[int, list[int]]) -> None:
    one = counter(num_rows=num_rows)
    train(one, 0, 12)
    assert one.reports == expected


def test_accumulated_batches_are_one_step() -> None:
    one = counter(num_rows=8)
    train(one, 0, 10, batches=2)
    assert one.reports == {5: [4, 4], 10: [9, 9]}


def test_a_resumed_run_reports_at_the_same_steps_on_as_many_rows() -> None:
    whole, first, second = counter(), counter(), counter()
    train(whole, 0, 15)
    train(first, 0, 7)
    second.load_state_dict(first.state_dict())
    train(second, 7, 15)
    assert first.reports | second.reports == whole.reports


def test_validation_runs_are_measured_so_many_steps_apart_or_always() -> None:
    one = counter(stage="validate", every_n_steps=4)
    for step, always in ((2, False), (4, False), (6, False), (8, False), (9, True)):
        one.start_validation(step, always)
        one.start_validation_batch("batch", step)
        one.end_validation_batch(step, is_last=True)
        one.end_validation(step)
    assert one.reports == {2: [2], 6: [6], 9: [9]}
    again = counter(stage="validate", every_n_steps=4)
    again.load_state_dict(one.state_dict())
    again.start_validation(12)
    assert not again.is_collecting


def test_batches_of_the_other_stage_are_not_collected() -> None:
    one = counter(stage="validate")
    train(one, 0, 6)
    assert one.reports == {}
    other = counter()
    other.start_validation(3)
    other.start_validation_batch("batch", 3)
    other.end_validation(3)
    assert other.reports == {}


def test_a_report_that_fails_is_one_of_nothing_with_the_reason() -> None:
    one = counter()
    one.error = RuntimeError("no memory left\nand a trace")
    train(one, 0, 6)
    assert one.reports == {5: ["no memory left"]}
    assert one.report == Report(5, {})
    one.error = None
    train(one, 6, 10)
    assert one.reports[10] == [8, 9]
